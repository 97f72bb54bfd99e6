"""A contribution from a stranger: whatever it holds, it is refused in one sentence, or is as good as an honest one."""

import copy
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo_jax.errors import UserError
from flexolmo_jax.merge import merge
from flexolmo_jax.store import contribution
from flexolmo_jax.store.manifest import read
from tests.small import write_anchor, write_contribution

GATE = "arrays/state/experts.math.gate"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    write_anchor(root / "anchor")
    write_contribution(root / "math", root / "anchor", "math")
    write_anchor(root / "other", seed=7)
    write_contribution(root / "foreign", root / "other", "math")
    return root


@pytest.fixture
def bad(parts, tmp_path):
    """A copy of an honest contribution, to be spoilt."""
    return Path(shutil.copytree(parts / "math", tmp_path / "bad"))


def edit(directory: Path, change) -> None:
    file = directory / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refused(parts: Path, directory: Path) -> str:
    """Merges, expects a refusal that leaves nothing, and returns its sentence."""
    out = directory.parent / "merged"
    before = sorted(os.listdir(directory.parent))
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as refusal:
            merge(parts / "anchor", [directory], out)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert sorted(os.listdir(directory.parent)) == before
    sentence = str(refusal.value)
    assert "\n" not in sentence and sentence.isprintable() and len(sentence) < 800
    return sentence


def record(content):
    return content["experts"][0]


def gate(content):
    return content["arrays"]["experts/math/gate"]


def rename(content, name):
    record(content)["name"] = name
    content["arrays"] = {path.replace("math", name): leaf for path, leaf in content["arrays"].items()}


MANIFESTS = {
    "path traversal": (lambda c: rename(c, "../../etc"), "cannot name an expert"),
    "absolute path": (lambda c: rename(c, "/etc/passwd"), "cannot name an expert"),
    "name with NUL": (lambda c: rename(c, "ma\0th"), "cannot be printed"),
    "name of the public expert": (lambda c: rename(c, "public"), "cannot name an expert"),
    "Cyrillic letter": (lambda c: rename(c, "m\u0430th"), "cannot name an expert"),
    "full-width letters": (lambda c: rename(c, "ｍａｔｈ"), "cannot name an expert"),
    "upper case": (lambda c: rename(c, "Math"), "cannot name an expert"),
    "right-to-left override": (lambda c: rename(c, "ma\u202eth"), "cannot be printed"),
    "newline at the end": (lambda c: rename(c, "math\n"), "cannot name an expert"),
    "surrogate": (lambda c: rename(c, "ma\ud800"), "cannot be printed"),
    "empty name": (lambda c: rename(c, ""), "cannot name an expert"),
    "long name": (lambda c: rename(c, "m" * 10_000), "cannot name an expert"),
    "escape sequence in the owner": (lambda c: record(c).update(owner="\x1b]0;title\x07"), "cannot be printed"),
    "no expert": (lambda c: c.update(experts=[]), "exactly one expert"),
    "two experts": (lambda c: c["experts"].append(record(c) | {"name": "code"}), "exactly one expert"),
    "the same expert twice": (lambda c: c["experts"].append(record(c)), "exactly one expert"),
    "huge shape": (lambda c: gate(c).update(shape=[10**9, 10**9, 10**9]), "does not fit its model"),
    "shape beyond all integers": (lambda c: gate(c).update(shape=[10**40]), "has the shape"),
    "negative shape": (lambda c: gate(c).update(shape=[2, -16, 24]), "has the shape"),
    "true for a size": (lambda c: gate(c).update(shape=[True, 16, 24]), "has the shape"),
    "huge model": (lambda c: c["model"].update(width=2**40), "says its model"),
    "infinite constant": (lambda c: c["model"].update(rope_theta=float("inf")), "Infinity"),
    "constant that is no number": (lambda c: c["model"].update(norm_epsilon=float("nan")), "NaN"),
    "objects for a dtype": (lambda c: gate(c).update(dtype="object"), "has the dtype"),
    "float64": (lambda c: gate(c).update(dtype="float64"), "has the dtype"),
    "wrong digest": (lambda c: gate(c).update(sha256="0" * 64), "does not match the digest of experts/math/gate"),
    "no digest": (lambda c: gate(c).pop("sha256"), "must have a shape, a dtype and a SHA-256"),
    "another anchor's fingerprint": (lambda c: c.update(anchor="f" * 64), "another anchor"),
    "fingerprint that is none": (lambda c: c.update(anchor="../.."), "not a fingerprint"),
    "extra array": (lambda c: c["arrays"].update({"anchor/head": dict(gate(c))}), "anchor/head does not belong there"),
    "array of another expert": (
        lambda c: c["arrays"].update({"experts/code/gate": dict(gate(c))}),
        "experts/code/gate does not belong there",
    ),
    "array that leaves": (lambda c: c["arrays"].update({"../x": dict(gate(c))}), "does not belong there"),
    "missing array": (lambda c: c["arrays"].pop("router/math/bias"), "router/math/bias is missing"),
    "unknown field": (lambda c: c.update(run="rm -rf /"), "unexpected keyword"),
    "unknown field of the record": (lambda c: record(c).update(path="/etc"), "unexpected keyword"),
    "negative tokens": (lambda c: record(c).update(tokens_seen=-1), "below what it can be"),
    "text for a number": (lambda c: record(c).update(tokens_seen="1"), "tokens_seen is '1'"),
    "rank above the matrices": (lambda c: record(c).update(rank=10**6), "has rank 16 at most"),
    "rank of full arrays": (lambda c: record(c).update(rank=2), "does not fit its model"),
    "what a merge fills in": (lambda c: record(c).update(contribution="f" * 64), "fills in what a merge fills in"),
    "another tokenizer": (lambda c: c.update(tokenizer="words"), "tokenized with 'words'"),
    "a merged model": (lambda c: c.update(kind="merged"), "must list the expert 'public' first"),
    "version of text": (lambda c: c.update(format_version="2"), "format version"),
    "version true": (lambda c: c.update(format_version=True), "format version"),
    "list for a manifest": (lambda c: c.update(experts="math"), "not a manifest"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused(name, parts, bad):
    change, complaint = MANIFESTS[name]
    edit(bad, change)
    assert complaint in refused(parts, bad)


def symlink_in_place_of_a_chunk(bad):
    (bad / GATE / "c/0/0/0").unlink()
    (bad / GATE / "c/0/0/0").symlink_to("/dev/zero")


def symlink_in_place_of_a_leaf(bad):
    shutil.rmtree(bad / GATE)
    (bad / GATE).symlink_to("/etc")


def symlink_in_place_of_the_arrays(bad):
    (bad / "arrays").rename(bad.parent / "elsewhere")
    (bad / "arrays").symlink_to(bad.parent / "elsewhere")


def symlink_in_place_of_the_manifest(bad):
    (bad / "manifest.json").unlink()
    (bad / "manifest.json").symlink_to("/dev/zero")


def pipe_in_place_of_a_chunk(bad):
    (bad / GATE / "c/0/0/0").unlink()
    os.mkfifo(bad / GATE / "c/0/0/0")


def pipe_in_place_of_the_manifest(bad):
    (bad / "manifest.json").unlink()
    os.mkfifo(bad / "manifest.json")


def truncated_chunk(bad):
    os.truncate(bad / GATE / "c/1/0/0", 100)


def chunk_of_a_terabyte(bad):
    os.truncate(bad / GATE / "c/1/0/0", 2**40)


def manifest_of_a_terabyte(bad):
    os.truncate(bad / "manifest.json", 2**40)


def missing_chunk(bad):
    (bad / GATE / "c/1/0/0").unlink()


def chunk_outside_the_grid(bad):
    shutil.copytree(bad / GATE / "c/1", bad / GATE / "c/2")


def extra_file_beside_the_chunks(bad):
    (bad / GATE / "private.txt").write_text("a secret")


def extra_leaf(bad):
    shutil.copytree(bad / GATE, bad / "arrays/state/experts.code.gate")


def extra_file_beside_the_manifest(bad):
    (bad / "setup.py").write_text("raise SystemExit")


def directories_without_end(bad):
    deep = bad / GATE / "c"
    for _ in range(200):
        deep = deep / "d"
    deep.mkdir(parents=True)


def metadata_of_a_huge_array(bad):
    file = bad / GATE / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [10**12, 10**12, 10**12]}))


def metadata_with_another_codec(bad):
    file = bad / GATE / "zarr.json"
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"codecs": codecs}))


def metadata_nested_without_end(bad):
    (bad / GATE / "zarr.json").write_text("[" * 10_000)


def manifest_nested_without_end(bad):
    (bad / "manifest.json").write_text("[" * 1_000_000)


def manifest_with_a_field_twice(bad):
    file = bad / "manifest.json"
    file.write_text(file.read_text().replace('"kind"', '"kind": "anchor", "kind"', 1))


def manifest_in_another_encoding(bad):
    (bad / "manifest.json").write_bytes((bad / "manifest.json").read_text().encode("utf-16"))


def manifest_with_a_number_without_end(bad):
    file = bad / "manifest.json"
    file.write_text(file.read_text().replace('"tokens_seen": 10', f'"tokens_seen": {"9" * 100_000}'))


def not_a_number(bad):
    respoil(bad, np.nan)


def infinity(bad):
    respoil(bad, np.inf)


def respoil(bad, value):
    shutil.rmtree(bad)

    def spoil(params):
        params["experts"]["math"]["gate"][1, 2, 3] = value

    write_contribution(bad, bad.parent / "anchor_of_bad", "math", change=spoil)


FILES = {
    symlink_in_place_of_a_chunk: "a link",
    symlink_in_place_of_a_leaf: "a link",
    symlink_in_place_of_the_arrays: "a link",
    symlink_in_place_of_the_manifest: "a link",
    pipe_in_place_of_a_chunk: "no plain file",
    pipe_in_place_of_the_manifest: "no manifest.json",
    truncated_chunk: "100 bytes",
    chunk_of_a_terabyte: "1,099,511,627,776 bytes",
    manifest_of_a_terabyte: "1,099,511,627,776 bytes",
    missing_chunk: "a part of experts/math/gate is missing",
    chunk_outside_the_grid: "no part of an array",
    extra_file_beside_the_chunks: "no part of an array",
    extra_leaf: "does not belong there",
    extra_file_beside_the_manifest: "does not belong there",
    directories_without_end: "nested deeper",
    metadata_of_a_huge_array: "does not describe",
    metadata_with_another_codec: "does not describe",
    metadata_nested_without_end: "does not describe",
    manifest_nested_without_end: "not a manifest",
    manifest_with_a_field_twice: "a field twice",
    manifest_in_another_encoding: "not a manifest",
    manifest_with_a_number_without_end: "not a manifest",
    not_a_number: "not finite in experts/math/gate",
    infinity: "not finite in experts/math/gate",
}


@pytest.mark.parametrize("spoil", FILES, ids=lambda spoil: spoil.__name__)
def test_hostile_files_are_refused(spoil, parts, bad):
    if spoil in (not_a_number, infinity):
        shutil.copytree(parts / "anchor", bad.parent / "anchor_of_bad")
    spoil(bad)
    assert FILES[spoil] in refused(parts, bad)


def test_a_contribution_for_another_anchor_is_refused(parts, tmp_path):
    shutil.copytree(parts / "foreign", tmp_path / "bad")
    assert "another anchor" in refused(parts, tmp_path / "bad")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value, prefix=()):
    """Every place of a JSON value, as the keys that lead there."""
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*prefix, key))


HARMLESS = {("gin",), ("experts", 0, "owner"), ("experts", 0, "licence"), ("experts", 0, "privacy"), ("top_k",)} | {
    ("experts", 0, "tokens_seen"),
    ("implementation",),
    ("router_tuned_on",),
}
"""What an owner may say as it pleases, within its type."""

FUZZ = settings(max_examples=350, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FUZZ
@given(data=st.data())
def test_a_mutated_manifest_is_refused_or_means_the_same(parts, data):
    content = json.loads((parts / "math/manifest.json").read_text())
    place = data.draw(st.sampled_from([place for place in places(content) if place]))
    mutated = copy.deepcopy(content)
    parent = mutated
    for key in place[:-1]:
        parent = parent[key]
    action = data.draw(st.sampled_from(["replace", "delete", "duplicate"]))
    if action == "replace":
        parent[place[-1]] = data.draw(ANYTHING)
    elif action == "delete":
        del parent[place[-1]]
    elif isinstance(parent, list):
        parent.append(copy.deepcopy(parent[place[-1]]))
    else:
        parent[data.draw(st.text(max_size=10))] = copy.deepcopy(parent[place[-1]])
    _examine(parts, json.dumps(mutated).encode("utf-8", "surrogatepass"), content)


@FUZZ
@given(data=st.data())
def test_a_manifest_with_changed_bytes_is_refused_or_means_the_same(parts, data):
    text = bytearray((parts / "math/manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    _examine(parts, bytes(text), json.loads((parts / "math/manifest.json").read_text()))


def _examine(parts: Path, manifest: bytes, honest: dict) -> None:
    """Whatever is let through differs from the honest manifest only in what an owner may say as it pleases."""
    bad = parts / "fuzzed"
    if not bad.exists():
        shutil.copytree(parts / "math", bad)
    (bad / "manifest.json").write_bytes(manifest)
    try:
        contribution.verify(bad, read(parts / "anchor"))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        found = json.loads(manifest)
        for place in HARMLESS:
            for content in (found, honest):
                parent = content
                for key in place[:-1]:
                    parent = parent[key]
                parent.pop(place[-1], None)
        for content in (found, honest):  # May be left out: they are then what they were.
            content["experts"][0] = {
                key: value for key, value in content["experts"][0].items() if value not in ("", None)
            }
            content["model"] = {key: float(value) for key, value in content["model"].items()}
            content.setdefault("tokenizer", "bytes")
        defaults = {"rope_theta": 500_000.0, "norm_epsilon": 1e-6, "normalize_top_k": 0.0}
        found["model"] = defaults | found["model"]
        assert found == honest


@FUZZ
@given(data=st.data())
def test_mutated_arrays_are_refused(parts, data):
    honest = parts / "math"
    files = sorted(file for file in (honest / "arrays/state").rglob("*") if file.is_file() and file.name != "_METADATA")
    file = data.draw(st.sampled_from(files)).relative_to(honest)
    bad = parts / "changed"
    if not bad.exists():
        shutil.copytree(honest, bad)
    content = bytearray((honest / file).read_bytes())
    action = data.draw(st.sampled_from(["flip", "cut", "grow", "remove", "link"]))
    at = data.draw(st.integers(0, len(content) - 1))
    try:
        if action == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
            (bad / file).write_bytes(content)
        elif action == "cut":
            os.truncate(bad / file, at)
        elif action == "grow":
            os.truncate(bad / file, len(content) + at + 1)
        else:
            (bad / file).unlink()
            if action == "link":
                (bad / file).symlink_to(honest / file)
        with pytest.raises(UserError) as refusal:
            contribution.verify(bad, read(parts / "anchor"))
        assert "\n" not in str(refusal.value)
    finally:
        (bad / file).unlink(missing_ok=True)
        shutil.copyfile(honest / file, bad / file)

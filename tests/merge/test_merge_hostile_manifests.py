"""A stranger's manifest: whatever it says, it is refused in one sentence, or means the same as an honest one."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo_jax.errors import UserError
from flexolmo_jax.store import contribution
from flexolmo_jax.store.manifest import read

WITHIN_SECONDS = pytest.mark.timeout(60)
"""So many only because the machine may be busy."""


def edit(directory: Path, change) -> None:
    file = directory / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


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
    "right-to-left override in a field's name": (lambda c: c.update({"\u202egnol": 1}), r"unexpected keyword"),
    "escape sequence in a field's name": (lambda c: c["model"].update({"\x1b]0;title\x07": 1}), r"\x1b]0;title\x07"),
    "escape sequence for a version": (lambda c: c.update(format_version="\x1b[31m"), r"format version \x1b[31m"),
    "escape sequence for a shape": (lambda c: gate(c).update(shape="\x1b[31m"), r"has the shape \x1b[31m"),
    "escape sequence in an array's name": (lambda c: c["arrays"].update({"\x1b[2J": dict(gate(c))}), r"\x1b[2J"),
    "surrogate in a field's name": (lambda c: c.update({"\udc80": 1}), r"\udc80"),
    "this directory": (lambda c: rename(c, "."), "cannot name an expert"),
    "the directory above": (lambda c: rename(c, ".."), "cannot name an expert"),
    "dot at the end": (lambda c: rename(c, "math."), "cannot name an expert"),
    "combining accent": (lambda c: rename(c, "ma\u0301th"), "cannot name an expert"),
    "zero-width space": (lambda c: rename(c, "ma\u200bth"), "cannot be printed"),
    "letter that folds to another": (lambda c: rename(c, "boo\u212a"), "cannot name an expert"),
    "digit of another script": (lambda c: rename(c, "math\u0661"), "cannot name an expert"),
    "list for a name": (lambda c: record(c).update(name=["math"]), "name is ['math']"),
    "zero-width space in the owner": (lambda c: record(c).update(owner="a\u200bb"), "cannot be printed"),
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
    "owners whose proxies it saw": (lambda c: c.update(router_tuned_on=["public"]), "fills in what a merge fills in"),
    "text for a list": (lambda c: c.update(router_tuned_on="math"), "must be a list"),
    "another tokenizer": (lambda c: c.update(tokenizer="words"), "tokenized with 'words'"),
    "a merged model": (lambda c: c.update(kind="merged"), "must list the expert 'public' first"),
    "version of text": (lambda c: c.update(format_version="2"), "format version"),
    "first version's manifest beside today's files": (lambda c: c.update(format_version=1), "does not describe"),
    "version true": (lambda c: c.update(format_version=True), "format version"),
    "list for a manifest": (lambda c: c.update(experts="math"), "not a manifest"),
}


@WITHIN_SECONDS
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused(name, bad, refused):
    change, complaint = MANIFESTS[name]
    edit(bad, change)
    assert complaint in refused(bad)


def end_with(text: str, more: str) -> str:
    """The manifest with one more field at its end, as text, because no JSON library would write it."""
    return f"{text.rstrip().removesuffix('}')}, {more}}}"


TEXTS = {
    "a field twice": (lambda t: end_with(t, '"kind": "contribution"'), "a field twice"),
    "a field twice, deeper": (lambda t: t.replace('"name": "math"', '"name": "x", "name": "math"'), "a field twice"),
    "nested without end": (lambda t: "[" * 1_000_000, "not a manifest"),
    "objects nested without end": (lambda t: '{"a":' * 100_000, "not a manifest"),
    "many small objects": (lambda t: end_with(t, f'"x": [{",".join(["{}"] * 340_000)}]'), "unexpected keyword"),
    "many more": (lambda t: end_with(t, f'"x": [{",".join(["{}"] * 5_000_000)}]'), "may have 1,048,576"),
    "a text of many megabytes": (lambda t: end_with(t, f'"x": "{"x" * 2**24}"'), "which no such file has"),
    "a number without end": (lambda t: t.replace('"tokens_seen": 10', f'"tokens_seen": {"9" * 100_000}'), "not a"),
    "a number beyond all floats": (lambda t: t.replace('"rope_theta": 500000.0', '"rope_theta": 1e999'), "is inf"),
    "a whole number as a float": (lambda t: t.replace('"tokens_seen": 10', '"tokens_seen": 1e1'), "seen is 10.0"),
    "NaN": (lambda t: t.replace('"tokens_seen": 10', '"tokens_seen": NaN'), "the number NaN"),
    "infinity": (lambda t: t.replace('"top_k": 2', '"top_k": -Infinity'), "the number -Infinity"),
    "nothing": (lambda t: "", "not a manifest"),
    "zeros": (lambda t: "\0" * 100, "not a manifest"),
    "a list": (lambda t: f"[{t}]", "no JSON object"),
    "byte order mark": (lambda t: "\ufeff" + t, "BOM"),
}


@WITHIN_SECONDS
@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_text_is_refused(name, bad, refused):
    change, complaint = TEXTS[name]
    file = bad / "manifest.json"
    text = file.read_text()
    file.write_text(change(text), encoding="utf-8")
    assert file.read_text(encoding="utf-8") != text
    assert complaint in refused(bad)


def test_a_manifest_in_another_encoding_is_refused(bad, refused):
    (bad / "manifest.json").write_bytes((bad / "manifest.json").read_text().encode("utf-16"))
    assert "not a manifest" in refused(bad)


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
}
"""What an owner may say as it pleases, within its type."""

FUZZ = settings(max_examples=350, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FUZZ
@given(data=st.data())
def test_a_mutated_manifest_is_refused_or_means_the_same(honest, data):
    content = json.loads((honest / "math/manifest.json").read_text())
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
    _examine(honest, json.dumps(mutated).encode("utf-8", "surrogatepass"), content)


@FUZZ
@given(data=st.data())
def test_a_manifest_with_changed_bytes_is_refused_or_means_the_same(honest, data):
    text = bytearray((honest / "math/manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    _examine(honest, bytes(text), json.loads((honest / "math/manifest.json").read_text()))


def _examine(honest: Path, manifest: bytes, said: dict) -> None:
    """Whatever is let through differs from the honest manifest only in what an owner may say as it pleases."""
    bad = honest / "fuzzed"
    if not bad.exists():
        shutil.copytree(honest / "math", bad)
    (bad / "manifest.json").write_bytes(manifest)
    try:
        contribution.verify(bad, read(honest / "anchor"))
    except UserError as error:
        assert str(error).isprintable()
    else:
        found = json.loads(manifest)
        for place in HARMLESS:
            for content in (found, said):
                parent = content
                for key in place[:-1]:
                    parent = parent[key]
                parent.pop(place[-1], None)
        for content in (found, said):  # May be left out: they are then what they were.
            content["experts"][0] = {
                key: value for key, value in content["experts"][0].items() if value not in ("", None)
            }
            content["model"] = {key: float(value) for key, value in content["model"].items()}
            content.setdefault("tokenizer", "bytes")
        defaults = {"rope_theta": 500_000.0, "norm_epsilon": 1e-6, "normalize_top_k": 0.0}
        found["model"] = defaults | found["model"]
        assert found == said

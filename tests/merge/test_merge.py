"""The merge: concatenation bit for bit, deterministic, strict, and refusing what it must refuse."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.infer import load, load_with_contribution
from flexolmo_jax.merge import merge
from flexolmo_jax.model.partition import flatten
from flexolmo_jax.store import checkpoint
from flexolmo_jax.store.manifest import read
from tests.small import write_anchor, write_contribution


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An anchor and the contributions of two owners."""
    root = tmp_path_factory.mktemp("parts")
    write_anchor(root / "anchor")
    for seed, name in enumerate(("math", "code"), 1):
        write_contribution(root / name, root / "anchor", name, seed)
    return root


def test_every_array_is_its_owners_bit_for_bit(parts, tmp_path):
    manifest = merge(parts / "anchor", [parts / "math", parts / "code"], tmp_path / "merged")
    assert manifest.names == ("public", "math", "code") and manifest.top_k == 3
    _, merged = checkpoint.load(tmp_path / "merged", "merged")
    sources = [checkpoint.load(parts / name)[1] for name in ("anchor", "math", "code")]
    expected = {path: leaf for source in sources for path, leaf in flatten(source).items()}
    assert flatten(merged).keys() == expected.keys()
    for path, leaf in flatten(merged).items():
        np.testing.assert_array_equal(leaf, expected[path])
    assert [record.owner for record in manifest.experts] == ["", "owner of math", "owner of code"]
    assert manifest.experts[1].contribution and manifest.experts[1].contribution != manifest.experts[2].contribution


def test_merging_twice_gives_the_same_arrays_and_manifest(parts, tmp_path):
    for out in ("first", "second"):
        merge(parts / "anchor", [parts / "math", parts / "code"], tmp_path / out)
    assert (tmp_path / "first/manifest.json").read_bytes() == (tmp_path / "second/manifest.json").read_bytes()
    files = sorted(
        p.relative_to(tmp_path / "first") for p in (tmp_path / "first/arrays/state").rglob("*") if p.is_file()
    )
    assert len(files) > 20
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_excluding_an_expert_is_the_merge_that_never_had_it(parts, tmp_path):
    merge(parts / "anchor", [parts / "math", parts / "code"], tmp_path / "both", top_k=2)
    merge(parts / "anchor", [parts / "code"], tmp_path / "one", top_k=2)
    ids = np.arange(24, dtype=np.int32).reshape(2, 12) + 5
    both, one = load(tmp_path / "both"), load(tmp_path / "one")
    np.testing.assert_allclose(both(ids, experts=["public", "code"]), one(ids), atol=1e-5)
    np.testing.assert_allclose(both(ids, experts=["public"]), load(parts / "anchor")(ids), atol=1e-5)
    assert np.abs(np.asarray(both(ids)) - np.asarray(one(ids))).max() > 1e-2


def test_one_contribution_gives_the_owners_own_model(parts, tmp_path):
    merge(parts / "anchor", [parts / "math"], tmp_path / "merged")
    ids = np.arange(12, dtype=np.int32)[None] + 5
    own = load_with_contribution(parts / "anchor", parts / "math")
    np.testing.assert_allclose(load(tmp_path / "merged")(ids), own(ids), atol=1e-6)


def change_manifest(directory, **changes):
    content = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(content | changes))


def foreign(root, parts):
    write_anchor(root / "other", seed=9)
    write_contribution(root / "bad", root / "other", "math")


def flip_a_bit(leaf):
    """Changes one bit of the first value of a leaf on disk."""
    chunk = next(file for file in sorted((leaf / "c").rglob("*")) if file.is_file())
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)


def damaged(root, parts):
    write_contribution(root / "bad", parts / "anchor", "math")
    flip_a_bit(root / "bad/arrays/state/experts.math.up")


def interrupted(root, parts):
    write_contribution(root / "bad", parts / "anchor", "math")
    (root / "bad/arrays").rename(root / "bad/arrays.orbax-checkpoint-tmp")


def half_written(root, parts):
    write_contribution(root / "bad", parts / "anchor", "math")
    shutil.rmtree(root / "bad/arrays/state/experts.math.up/c/1")


def not_finite(root, parts):
    def spoil(params):
        params["experts"]["math"]["down"][1, 2, 3] = np.nan

    write_contribution(root / "bad", parts / "anchor", "math", change=spoil)


def no_manifest(root, parts):
    (root / "bad").mkdir()


def manifest_is_not_json(root, parts):
    (root / "bad").mkdir()
    (root / "bad/manifest.json").write_text("{")


def newer_format(root, parts):
    write_contribution(root / "bad", parts / "anchor", "math")
    change_manifest(root / "bad", format_version=99)


def an_anchor(root, parts):
    write_anchor(root / "bad")


def other_shape(root, parts):
    write_contribution(root / "bad", parts / "anchor", "math")
    change_manifest(root / "bad", model=dataclasses.asdict(read(parts / "anchor").model) | {"hidden": 32})


def name_leaves_the_directory(root, parts):
    write_contribution(root / "bad", parts / "anchor", "math")
    content = json.loads((root / "bad/manifest.json").read_text())
    change_manifest(root / "bad", experts=[content["experts"][0] | {"name": "../math"}])


REFUSED = {
    foreign: "another anchor",
    damaged: "digest of experts/math/up",
    interrupted: "which does not belong there",
    half_written: "a part of experts/math/up is missing",
    not_finite: "not finite in experts/math/down",
    no_manifest: "is not a contribution: it has no manifest.json",
    manifest_is_not_json: "not a manifest",
    newer_format: "format version 99",
    an_anchor: "is an anchor, but a contribution is needed",
    other_shape: "says its model",
    name_leaves_the_directory: "cannot name an expert",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_a_bad_contribution_is_refused_in_one_sentence_and_leaves_nothing(make, parts, tmp_path):
    make(tmp_path, parts)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=REFUSED[make]) as refusal:
        merge(parts / "anchor", [parts / "code", tmp_path / "bad"], tmp_path / "merged")
    assert "\n" not in str(refusal.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_two_contributions_of_one_name_are_refused(parts, tmp_path):
    with pytest.raises(UserError, match="two contributions bring an expert 'math'"):
        merge(parts / "anchor", [parts / "math", parts / "math"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_changed_anchor_is_refused(parts, tmp_path):
    write_anchor(tmp_path / "anchor")
    flip_a_bit(tmp_path / "anchor/arrays/state/anchor.attention.q")
    with pytest.raises(UserError, match="damaged or changed"):
        merge(tmp_path / "anchor", [], tmp_path / "merged")


def test_an_existing_output_stays_unless_told(parts, tmp_path):
    merge(parts / "anchor", [parts / "math"], tmp_path / "merged")
    before = (tmp_path / "merged/manifest.json").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        merge(parts / "anchor", [parts / "code"], tmp_path / "merged")
    assert (tmp_path / "merged/manifest.json").read_bytes() == before
    merge(parts / "anchor", [parts / "code"], tmp_path / "merged", overwrite=True)
    assert read(tmp_path / "merged").names == ("public", "code")


def test_top_k_must_not_exceed_the_experts(parts, tmp_path):
    with pytest.raises(UserError, match="top_k is 3, but the merged model has 2 experts"):
        merge(parts / "anchor", [parts / "math"], tmp_path / "merged", top_k=3)


def test_a_full_disk_leaves_nothing(parts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexolmo_jax.store.layout.LeafLayout.write_known", full)
    with pytest.raises(UserError, match="No space left on device"):
        merge(parts / "anchor", [parts / "math"], tmp_path / "merged")
    assert os.listdir(tmp_path) == []

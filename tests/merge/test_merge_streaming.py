"""How a merge writes: the same bytes always, within its budget, by several writers, resumable, sharing what stays."""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from flexolmo_jax.errors import UserError
from flexolmo_jax.merge import merge, revise
from flexolmo_jax.model.partition import flatten
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.layout import LeafLayout
from flexolmo_jax.store.manifest import read
from tests.small import write_anchor, write_contribution

NAMES = ("math", "code", "law")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    write_anchor(root / "anchor")
    for seed, name in enumerate(NAMES, 1):
        write_contribution(root / name, root / "anchor", name, seed)
    merge(root / "anchor", [root / name for name in NAMES], root / "merged")
    return root


def content(directory: Path) -> dict[str, bytes]:
    """Every byte of a directory, by file."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def merge_all(parts, out, **options):
    return merge(parts / "anchor", [parts / name for name in NAMES], out, **options)


def nothing_beside(out: Path) -> bool:
    return [name for name in os.listdir(out.parent) if name.startswith(f".{out.name}.")] == []


def test_every_byte_is_the_same_each_time_and_by_any_number_of_writers(parts, tmp_path):
    for writers in (1, 4):
        merge_all(parts, tmp_path / str(writers), writers=writers)
        assert content(tmp_path / str(writers)) == content(parts / "merged")
    merge_all(parts, tmp_path / "unverified", verify=False)
    assert content(tmp_path / "unverified") == content(parts / "merged")


def test_no_file_tells_when_or_where_it_was_written(parts):
    everything = b"".join(content(parts / "merged").values()) + b"".join(content(parts / "math").values())
    assert str(parts).encode() not in everything and b".partial" not in everything and b".merging" not in everything
    noted = json.loads((parts / "math/arrays/_CHECKPOINT_METADATA").read_text())
    assert [value for key, value in noted.items() if "timestamp" in key] == [0, 0]


def test_the_files_of_a_leaf_are_its_bytes_and_their_digest_is_the_manifests(parts):
    for layout in checkpoint.layouts(read(parts / "merged")).values():
        leaf = parts / "merged/arrays/state" / layout.directory
        joined = b"".join((leaf / file).read_bytes() for file in layout.files())
        assert hashlib.sha256(joined).hexdigest() == read(parts / "merged").arrays[layout.name]["sha256"]


def test_orbax_alone_reads_what_a_merge_wrote(parts):
    found = flatten(ocp.load((parts / "merged/arrays").absolute()))
    expected = flatten(checkpoint.load(parts / "anchor")[1])
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_adding_then_removing_gives_back_every_byte(parts, tmp_path):
    merge(parts / "anchor", [parts / "math", parts / "code"], tmp_path / "two")
    revise(tmp_path / "two", tmp_path / "three", add=[parts / "law"])
    assert content(tmp_path / "three") == content(parts / "merged")
    revise(tmp_path / "three", tmp_path / "back", remove=["law"])
    assert content(tmp_path / "back") == content(tmp_path / "two")


def test_replacing_keeps_the_place_and_is_the_merge_with_the_other_contribution(parts, tmp_path):
    write_contribution(tmp_path / "better", parts / "anchor", "math", seed=9)
    revise(parts / "merged", tmp_path / "revised", replace=[tmp_path / "better"])
    merge(parts / "anchor", [tmp_path / "better", parts / "code", parts / "law"], tmp_path / "anew")
    assert content(tmp_path / "revised") == content(tmp_path / "anew")


@pytest.mark.parametrize("verify", [True, False])
def test_what_stays_is_linked_and_not_written_again(parts, tmp_path, verify):
    shutil.copytree(parts / "merged", tmp_path / "merged")
    revise(tmp_path / "merged", tmp_path / "revised", remove=["code"], verify=verify)
    chunk = "arrays/state/experts.law.gate/c/0/0/0"
    assert os.path.samefile(tmp_path / "merged" / chunk, tmp_path / "revised" / chunk)
    before = content(tmp_path / "revised")
    shutil.rmtree(tmp_path / "merged")
    assert content(tmp_path / "revised") == before


def test_what_cannot_be_linked_is_copied(parts, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    revise(parts / "merged", tmp_path / "revised", remove=["law"])
    merge(parts / "anchor", [parts / "math", parts / "code"], tmp_path / "anew")
    assert content(tmp_path / "revised") == content(tmp_path / "anew")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"remove": ["art"]}, "no expert 'art'"),
        ({"remove": ["public"]}, "no expert 'public' of an owner"),
        ({"add": ["math"]}, "has an expert 'math' already: --replace it"),
        ({"replace": ["other"]}, "another anchor"),
        ({"add": ["other"]}, "another anchor"),
    ],
)
def test_a_revision_that_cannot_be_is_refused(parts, tmp_path, change, complaint):
    write_anchor(tmp_path / "anchor", seed=5)
    write_contribution(parts / "other", tmp_path / "anchor", "math") if not (parts / "other").exists() else None
    change = {key: [parts / each if key != "remove" else each for each in value] for key, value in change.items()}
    with pytest.raises(UserError, match=complaint):
        revise(parts / "merged", tmp_path / "revised", **change)
    assert not (tmp_path / "revised").exists() and nothing_beside(tmp_path / "revised")


def test_a_damaged_expert_is_noticed_when_it_is_only_linked(parts, tmp_path):
    shutil.copytree(parts / "merged", tmp_path / "merged")
    chunk = tmp_path / "merged/arrays/state/experts.law.gate/c/1/0/0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(UserError, match="does not match the digest of experts/law/gate"):
        revise(tmp_path / "merged", tmp_path / "revised", remove=["math"])
    assert not (tmp_path / "revised").exists() and nothing_beside(tmp_path / "revised")


def test_a_derived_model_is_not_revised(parts, tmp_path):
    shutil.copytree(parts / "merged", tmp_path / "derived")
    derived = dataclasses.replace(read(parts / "merged"), router_tuned_on=("math",))
    derived.write(tmp_path / "derived")
    with pytest.raises(UserError, match="was tuned for the experts that it has"):
        revise(tmp_path / "derived", tmp_path / "revised", remove=["math"])


def test_top_k_follows_the_number_of_experts_only_where_all_were_used(parts, tmp_path):
    merge_all(parts, tmp_path / "two_of_four", top_k=2)
    assert revise(parts / "merged", tmp_path / "a", remove=["law"]).top_k == 3
    assert revise(tmp_path / "two_of_four", tmp_path / "b", remove=["law"]).top_k == 2
    assert revise(tmp_path / "two_of_four", tmp_path / "c", remove=["law", "code", "math"]).top_k == 1


def test_a_budget_that_is_too_small_is_refused(parts, tmp_path):
    with pytest.raises(UserError, match="--memory-budget is 1,000 bytes"):
        merge_all(parts, tmp_path / "merged", memory_budget=1000)


def test_a_merge_goes_on_where_it_was_stopped(parts, tmp_path, monkeypatch):
    whole, written = LeafLayout.write_known, []

    def stopped(self, state, blocks):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(self.name)
        return whole(self, state, blocks)

    monkeypatch.setattr(LeafLayout, "write_known", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge_all(parts, tmp_path / "merged", writers=1)
    assert not (tmp_path / "merged").exists()
    first = list(written)

    def go_on(self, state, blocks):
        written.append(self.name)
        return whole(self, state, blocks)

    monkeypatch.setattr(LeafLayout, "write_known", go_on)
    merge_all(parts, tmp_path / "merged", writers=1)
    assert len(written) == len(set(written)) and written[:5] == first
    assert content(tmp_path / "merged") == content(parts / "merged") and nothing_beside(tmp_path / "merged")


def test_receipts_of_a_result_that_is_in_place_already_are_void(parts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flexolmo_jax.store.assembly._remove", lambda work: None)  # As if killed just before.
        merge_all(parts, tmp_path / "merged")
    assert not nothing_beside(tmp_path / "merged")
    merge_all(parts, tmp_path / "merged", overwrite=True)
    assert content(tmp_path / "merged") == content(parts / "merged") and nothing_beside(tmp_path / "merged")


def test_one_that_begins_leaves_others_their_directory_of_receipts(parts, tmp_path, monkeypatch):
    opened, outline = [], arrays.outline

    def stopped(*_):
        raise KeyboardInterrupt

    def watched(*arguments):
        assert os.listdir(opened[0]) == [] and os.fstat(opened[0]).st_nlink > 0
        outline(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(arrays, "outline", stopped)
        with pytest.raises(KeyboardInterrupt):
            merge_all(parts, tmp_path / "merged")
    (receipts,) = tmp_path.glob(".merged.merging-*/receipts")
    (receipts / "experts.law.gate").write_text("void")
    opened.append(os.open(receipts, os.O_RDONLY))
    monkeypatch.setattr(arrays, "outline", watched)
    merge_all(parts, tmp_path / "merged")
    os.close(opened[0])
    assert content(tmp_path / "merged") == content(parts / "merged")


def test_one_whose_work_another_gave_up_says_so(parts, tmp_path, monkeypatch):
    def given_up(directory, _):
        shutil.rmtree(directory.parent)
        raise FileNotFoundError(directory)

    monkeypatch.setattr(arrays, "outline", given_up)
    with pytest.raises(UserError, match="was given up by another process"):
        merge_all(parts, tmp_path / "merged")
    assert os.listdir(tmp_path) == []


def test_what_another_merge_left_behind_is_swept_away(parts, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LeafLayout, "write_known", stopped)
        with pytest.raises(KeyboardInterrupt):
            merge(parts / "anchor", [parts / "law"], tmp_path / "merged")
    assert not nothing_beside(tmp_path / "merged")
    merge_all(parts, tmp_path / "merged")
    assert nothing_beside(tmp_path / "merged")


@pytest.mark.parametrize("attempt", range(5))  # Where two meet differs from time to time.
def test_merges_that_run_at_once_share_the_work_and_agree(parts, tmp_path, attempt):
    found, errors, together = [], [], threading.Barrier(4)

    def run():
        together.wait()
        try:
            found.append(merge_all(parts, tmp_path / "merged", writers=2))
        except UserError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(tmp_path / "merged") == content(parts / "merged") and nothing_beside(tmp_path / "merged")
    # One that starts after another has finished finds the output there.
    assert found and all(each == found[0] for each in found)
    assert [error for error in errors if "exists already" not in error] == []

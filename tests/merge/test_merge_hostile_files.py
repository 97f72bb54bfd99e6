"""A stranger's files: whatever lies in a contribution's directory, nothing but the arrays of its manifest is let in."""

import contextlib
import errno
import gzip
import json
import os
import shutil
import socket
import stat

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo_jax.errors import UserError
from flexolmo_jax.merge import merge
from flexolmo_jax.store.layout import LeafLayout
from tests.small import write_contribution

GATE = "arrays/state/experts.math.gate"

WITHIN_SECONDS = pytest.mark.timeout(60)
"""So many only because the machine may be busy."""


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


def device_in_place_of_a_chunk(bad):
    (bad / GATE / "c/0/0/0").unlink()
    try:
        os.mknod(bad / GATE / "c/0/0/0", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")


def socket_in_place_of_a_chunk(bad):
    (bad / GATE / "c/0/0/0").unlink()
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(bad / GATE / "c/0/0"):
        made.bind("0")


def directory_in_place_of_a_chunk(bad):
    (bad / GATE / "c/0/0/0").unlink()
    (bad / GATE / "c/0/0/0").mkdir()


def directory_in_place_of_the_manifest(bad):
    (bad / "manifest.json").unlink()
    (bad / "manifest.json").mkdir()


def file_in_place_of_the_arrays(bad):
    shutil.rmtree(bad / "arrays")
    (bad / "arrays").write_text("")


def directory_beside_the_leaves(bad):
    (bad / "arrays/orbax.checkpoint").unlink()
    (bad / "arrays/orbax.checkpoint").mkdir()
    (bad / "arrays/orbax.checkpoint/private.txt").write_text("a secret")


def pipe_beside_the_leaves(bad):
    (bad / "arrays/state/_METADATA").unlink()
    os.mkfifo(bad / "arrays/state/_METADATA")


def terabyte_beside_the_leaves(bad):
    os.truncate(bad / "arrays/_CHECKPOINT_METADATA", 2**40)


def pipe_for_a_signature(bad):
    os.mkfifo(bad / "signature.json")


def signature_of_a_terabyte(bad):
    (bad / "signature.json").touch()
    os.truncate(bad / "signature.json", 2**40)


def name_that_a_terminal_obeys(bad):
    directory = bad / GATE / "c/\x1b]0;title\x07\n\u202e"
    directory.mkdir()
    (directory / "link").symlink_to("/etc")


def name_that_is_no_text(bad):
    directory = os.fsencode(bad / GATE / "c") + b"/\xff\xfe"
    os.mkdir(directory)
    os.symlink("/etc", directory + b"/link")


def names_that_differ_in_case(bad):
    shutil.copytree(bad / GATE, bad / "arrays/state/experts.MATH.gate")


def names_that_look_alike(bad):
    shutil.copytree(bad / GATE, bad / "arrays/state/experts.m\u0430th.gate")


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


def chunk_that_unpacks_to_more(bad):
    """Its metadata says so, and its size is what it should be."""
    metadata_with_another_codec(bad)
    packed = gzip.compress(bytes(2**24), 9, mtime=0)[:1536].ljust(1536, b"\0")
    (bad / GATE / "c/0/0/0").write_bytes(packed)


def metadata_with_a_field_twice(bad):
    file = bad / GATE / "zarr.json"
    file.write_text(file.read_text().replace('"shape"', '"shape": [1], "shape"'))


def metadata_in_another_encoding(bad):
    file = bad / GATE / "zarr.json"
    file.write_bytes(file.read_text().encode("utf-16"))


def metadata_of_a_group(bad):
    file = bad / GATE / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"node_type": "group"}))


def metadata_of_a_terabyte(bad):
    os.truncate(bad / GATE / "zarr.json", 2**40)


def metadata_nested_without_end(bad):
    (bad / GATE / "zarr.json").write_text("[" * 10_000)


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
    pipe_in_place_of_the_manifest: "manifest.json is no plain file",
    device_in_place_of_a_chunk: "no plain file",
    socket_in_place_of_a_chunk: "no plain file",
    directory_in_place_of_a_chunk: "lacks c/0/0/0",
    directory_in_place_of_the_manifest: "manifest.json is no plain file",
    file_in_place_of_the_arrays: "arrays is no directory",
    directory_beside_the_leaves: "orbax.checkpoint is no plain file",
    pipe_beside_the_leaves: "_METADATA is no plain file",
    terabyte_beside_the_leaves: "1,099,511,627,776 bytes",
    pipe_for_a_signature: "signature.json is no plain file",
    signature_of_a_terabyte: "1,099,511,627,776 bytes",
    name_that_a_terminal_obeys: r"c/\x1b]0;title\x07\n\u202e holds 'link'",
    name_that_is_no_text: r"c/\udcff\udcfe holds 'link'",
    names_that_differ_in_case: "does not belong there",
    names_that_look_alike: r"m\u0430th.gate', which does not belong there",
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
    chunk_that_unpacks_to_more: "does not describe",
    metadata_with_a_field_twice: "does not describe",
    metadata_in_another_encoding: "does not describe",
    metadata_of_a_group: "does not describe",
    metadata_of_a_terabyte: "does not describe",
    metadata_nested_without_end: "does not describe",
    not_a_number: "not finite in experts/math/gate",
    infinity: "not finite in experts/math/gate",
}


@WITHIN_SECONDS
@pytest.mark.parametrize("spoil", FILES, ids=lambda spoil: spoil.__name__)
def test_hostile_files_are_refused(spoil, honest, bad, refused):
    if spoil in (not_a_number, infinity):
        shutil.copytree(honest / "anchor", bad.parent / "anchor_of_bad")
    spoil(bad)
    assert FILES[spoil] in refused(bad)


def test_a_contribution_for_another_anchor_is_refused(honest, tmp_path, refused):
    shutil.copytree(honest / "foreign", tmp_path / "bad")
    assert "another anchor" in refused(tmp_path / "bad")


@pytest.mark.parametrize("refusing", ["open", "scandir"])
def test_what_may_not_be_read_is_named(refusing, honest, bad, tmp_path, monkeypatch):
    allowed = getattr(os, refusing)

    def refuse(path, *arguments, **options):
        if GATE in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return allowed(path, *arguments, **options)

    monkeypatch.setattr(os, refusing, refuse)
    with pytest.raises(UserError, match=rf"{GATE}.*: Permission denied"):
        merge(honest / "anchor", [bad], tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_a_pipe_that_takes_a_chunks_place_after_the_check_is_not_waited_for(honest, bad, tmp_path, monkeypatch):
    checked = LeafLayout.check

    def check_then_change(layout, state):
        checked(layout, state)
        if layout.directory in GATE and state.is_relative_to(bad):
            pipe_in_place_of_a_chunk(bad)

    monkeypatch.setattr(LeafLayout, "check", check_then_change)
    with pytest.raises(UserError, match="ends too early"):
        merge(honest / "anchor", [bad], tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


@settings(max_examples=350, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_mutated_arrays_are_refused(honest, data):
    good, bad, out = honest / "math", honest / "changed", honest / "merged"
    files = sorted(file for file in (good / "arrays/state").rglob("*") if file.is_file() and file.name != "_METADATA")
    file = data.draw(st.sampled_from(files)).relative_to(good)
    if not bad.exists():
        shutil.copytree(good, bad)
    content = bytearray((good / file).read_bytes())
    action = data.draw(st.sampled_from(["flip", "cut", "grow", "remove", "link"]))
    at = data.draw(st.integers(0, len(content) - 1))
    before = sorted(os.listdir(honest))
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
                (bad / file).symlink_to(good / file)
        with pytest.raises(UserError) as refusal:
            merge(honest / "anchor", [bad], out)
        assert str(refusal.value).isprintable()
        assert sorted(os.listdir(honest)) == before
    finally:
        (bad / file).unlink(missing_ok=True)
        shutil.copyfile(good / file, bad / file)

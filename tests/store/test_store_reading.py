"""Reading what is on disk: in part, onto any mesh, from earlier format versions, and saying what it is."""

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax import cli
from flexolmo_jax.errors import UserError
from flexolmo_jax.merge import merge
from flexolmo_jax.model.partition import belongs_to_expert, flatten
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.inspection import array_differences, describe
from flexolmo_jax.store.layout import LeafLayout
from flexolmo_jax.store.manifest import Manifest, read
from flexolmo_jax.store.progress import Keep, Progress
from flexolmo_jax.store.stored import stored_leaves
from tests.small import write_anchor, write_contribution

KEEP = Keep(latest=2, every=None)
KEEP_EVERY_20 = Keep(latest=2, every=20)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    write_anchor(root / "anchor")
    for seed, name in enumerate(("math", "code"), 1):
        write_contribution(root / name, root / "anchor", name, seed)
    merge(root / "anchor", [root / "math", root / "code"], root / "merged")
    return root


def as_version_1(directory: Path) -> None:
    """Rewrites an artefact as the first format version had it: indexed shards, and records without later fields."""
    manifest = read(directory)
    for path, leaf in stored_leaves(directory, manifest).items():
        old = dataclasses.replace(leaf.layout, format_version=1)
        target = leaf.state / leaf.layout.directory
        for file in old.files():
            with (target / file).open("ab") as chunk:
                index = struct.pack("<QQ", 0, old.chunk_bytes)
                chunk.write(index + struct.pack("<I", crc32c(index)))
        old.write_metadata(target)
        assert path
    content = json.loads((directory / "manifest.json").read_text())
    for record in content["experts"]:
        del record["rank"], record["signed_by"]
    (directory / "manifest.json").write_text(json.dumps(content | {"format_version": 1}))


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_the_first_format_version_is_read_and_merged_into_todays(parts, tmp_path):
    for name in ("anchor", "math", "code"):
        shutil.copytree(parts / name, tmp_path / name)
        as_version_1(tmp_path / name)
        assert read(tmp_path / name).format_version == 1
    old = flatten(checkpoint.load(tmp_path / "anchor")[1])  # Orbax checks the index and its checksum.
    assert all(np.array_equal(leaf, old[path]) for path, leaf in flatten(checkpoint.load(parts / "anchor")[1]).items())
    merge(tmp_path / "anchor", [tmp_path / "math", tmp_path / "code"], tmp_path / "merged")
    merge(tmp_path / "anchor", [tmp_path / "math", tmp_path / "code"], tmp_path / "unverified", verify=False)
    for out in ("merged", "unverified"):
        files = [file.relative_to(parts / "merged") for file in (parts / "merged").rglob("*") if file.is_file()]
        assert all((tmp_path / out / file).read_bytes() == (parts / "merged" / file).read_bytes() for file in files)


def test_only_what_is_asked_for_is_read(parts, tmp_path):
    shutil.copytree(parts / "merged", tmp_path / "merged")
    for leaf in (tmp_path / "merged/arrays/state").iterdir():
        if "code" not in leaf.name and leaf.is_dir():
            shutil.rmtree(leaf / "c")
    predicate = lambda path: belongs_to_expert(path, "code")  # noqa: E731
    _, found = checkpoint.load(tmp_path / "merged", predicate=predicate)
    expected = flatten(checkpoint.load(parts / "code")[1])
    assert flatten(found).keys() == expected.keys()
    assert all(np.array_equal(leaf, expected[path]) for path, leaf in flatten(found).items())


MESHES = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from flexolmo_jax.model.partition import flatten
from flexolmo_jax.store import checkpoint
from flexolmo_jax.store.progress import Keep, Progress
KEEP = Keep(latest=2, every=None)
merged, out = Path(sys.argv[1]), Path(sys.argv[2])
_, whole = checkpoint.load(merged)
whole = flatten(whole)
for shape in ((8, 1), (2, 4), (1, 2)):
    mesh = jax.make_mesh(shape, ("fsdp", "tensor"), devices=jax.devices()[: shape[0] * shape[1]])
    sharding = lambda path, leaf: NamedSharding(
        mesh, P(*([None] * (leaf.ndim - 2)), "fsdp" if leaf.ndim > 1 and leaf.shape[-2] % 8 == 0 else None,
                "tensor" if leaf.shape[-1] % 8 == 0 else None))
    found = flatten(checkpoint.load(merged, shardings=sharding)[1])
    for path, leaf in found.items():
        assert leaf.sharding.is_equivalent_to(sharding(path, leaf), leaf.ndim), path
        np.testing.assert_array_equal(leaf, whole[path])
first = jax.make_mesh((8,), ("fsdp",))
second = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
values = {"a": np.arange(64.0, dtype=np.float32).reshape(16, 4), "step": np.int32(3)}
put = lambda mesh: {"a": jax.device_put(values["a"], NamedSharding(mesh, P("fsdp"))),
                    "step": jax.device_put(values["step"], NamedSharding(mesh, P()))}
progress = Progress(out, KEEP)
progress.save(3, put(first))
progress.close()
again = Progress(out, KEEP).restore(put(second))
assert again["a"].sharding.num_devices == 2
np.testing.assert_array_equal(again["a"], values["a"])
print("same")
"""


def test_a_checkpoint_is_restored_onto_any_mesh(parts, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MESHES, str(parts / "merged"), str(tmp_path / "progress")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "same", done.stderr


def test_the_checkpoints_that_are_kept(tmp_path):
    progress = Progress(tmp_path / "checkpoints", KEEP_EVERY_20)
    for step in range(10, 80, 10):
        progress.save(step, {"a": jax.numpy.full((4,), step)})
    progress.close()
    kept = sorted(int(entry.name) for entry in (tmp_path / "checkpoints").iterdir())
    assert kept == [20, 40, 60, 70]
    with pytest.raises(UserError, match="latest"):
        Keep(latest=0, every=None)


def test_a_state_that_does_not_match_is_named_path_by_path(tmp_path):
    progress = Progress(tmp_path / "checkpoints", KEEP)
    progress.save(1, {"params": {"a": jax.numpy.zeros((4, 2)), "b": jax.numpy.zeros(3)}})
    progress.close()
    wanted = {"params": {"a": jax.numpy.zeros((4, 5)), "c": jax.numpy.zeros(3)}}
    with pytest.raises(UserError) as refusal:
        Progress(tmp_path / "checkpoints", KEEP).restore(wanted)
    sentence = str(refusal.value)
    assert "params/a is float32[4,2], not float32[4,5]" in sentence
    assert "params/b does not belong there" in sentence and "params/c is missing" in sentence


def test_an_artefact_whose_arrays_are_not_its_models_is_named_path_by_path(parts, tmp_path):
    shutil.copytree(parts / "merged", tmp_path / "bad")
    manifest = read(parts / "merged")
    described = {path: leaf for path, leaf in manifest.arrays.items() if path != "router/math/row"}
    dataclasses.replace(manifest, arrays=described).write(tmp_path / "bad")
    with pytest.raises(UserError, match="does not fit its model: router/math/row is missing"):
        checkpoint.load(tmp_path / "bad")


def test_inspect_reads_no_array(parts, tmp_path, capsys):
    (tmp_path / "only").mkdir()
    shutil.copyfile(parts / "merged/manifest.json", tmp_path / "only/manifest.json")
    assert cli.main(["inspect", str(tmp_path / "only"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    whole = checkpoint.load(parts / "merged")[1]
    assert report["bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    assert report["arrays"]["experts/math/gate"] == {"shape": [2, 16, 24], "dtype": "float32", "bytes": 3072}
    assert report["fingerprint"] == arrays.fingerprint(arrays.digests(whole))
    assert [record["bytes"] for record in report["records"]] == [9344, 9352, 9352]
    assert describe(parts / "merged") == describe(tmp_path / "only")


def test_inspect_says_how_two_directories_differ(parts, tmp_path):
    assert array_differences(parts / "merged", parts / "merged") == []
    write_contribution(tmp_path / "math", parts / "anchor", "math", seed=8)
    merge(parts / "anchor", [tmp_path / "math"], tmp_path / "merged")
    found = array_differences(tmp_path / "merged", parts / "merged")
    assert "experts/code/gate is missing" in found
    assert any(phrase.startswith("experts/math/gate is float32 [2, 16, 24] with digest") for phrase in found)
    assert not any(phrase.startswith("anchor/") for phrase in found)


DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    dtype=st.sampled_from(sorted(DTYPES)),
    limit=st.integers(8, 200),
    stacked=st.booleans(),
    cuts=st.integers(1, 50),
)
def test_a_leaf_of_any_shape_comes_back_and_tensorstore_reads_it(shape, dtype, limit, stacked, cuts, tmp_path_factory):
    import tensorstore

    state = tmp_path_factory.mktemp("state")
    path = ("anchor", "attention", "q") if stacked else ("anchor", "embed")
    value = np.random.default_rng(0).normal(size=shape).astype(DTYPES[dtype])
    raw = value.reshape(-1).view(np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexolmo_jax.store.layout.CHUNK_BYTES", limit)
        layout = LeafLayout(path, tuple(shape), dtype)
        layout.write(state, (raw[at : at + cuts] for at in range(0, len(raw), cuts)))
        layout.check(state)
        again = np.concatenate([block.copy() for block in layout.blocks(state, np.empty(24, np.uint8))])
        assert np.array_equal(again, raw)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{state}/{layout.directory}/"}}
        read_back = tensorstore.open(spec).result().read().result()
        assert np.array_equal(read_back.view(np.uint8), value.view(np.uint8))
        if stacked:
            assert np.array_equal(layout.read_layer(state, shape[0] - 1).view(np.uint8), value[-1].view(np.uint8))


def test_a_vocabulary_without_divisors_stays_in_one_file():
    assert LeafLayout(("anchor", "embed"), (50_257, 4096), "float32").chunk_shape == (50_257, 4096)
    assert LeafLayout(("anchor", "embed"), (100_278, 4096), "float32").chunk_shape == (3714, 4096)
    assert LeafLayout(("experts", "a", "gate"), (32, 4096, 11_008), "float32").chunk_shape == (1, 1024, 11_008)


def test_manifests_keep_todays_version_whatever_they_were_read_from(parts, tmp_path):
    dataclasses.replace(read(parts / "anchor"), format_version=1).write(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["format_version"] == Manifest.format_version

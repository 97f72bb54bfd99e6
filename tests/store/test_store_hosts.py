"""What one process wrote is read by two, and what two wrote by one; each reads what it needs and no more."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.model import ModelConfig, abstract_params
from flexolmo_jax.model.partition import flatten, unflatten
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.manifest import ExpertRecord, Manifest

CONFIG = ModelConfig(vocab_size=256, width=256, hidden=1024, layers=8, heads=2, kv_heads=2)

HOST = """
import sys
from pathlib import Path
import jax, numpy as np

model, steps, hosts, host, address = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]), sys.argv[5]
jax.config.update("jax_num_cpu_devices", 2)
if hosts > 1:
    jax.distributed.initialize(address, num_processes=hosts, process_id=host)
from jax.sharding import NamedSharding, PartitionSpec as P
from flexolmo_jax.model.partition import flatten
from flexolmo_jax.store import checkpoint
from flexolmo_jax.store.progress import Keep, Progress

mesh = jax.make_mesh((2 * hosts,), ("fsdp",))

def by_layers(path, leaf):  # So that each device needs whole files, which are a layer's.
    return NamedSharding(mesh, P("fsdp"))

def bytes_read():
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

before = bytes_read()
_, found = checkpoint.load(model, predicate=lambda path: path[0] == "experts", shardings=by_layers)
read, mine = bytes_read() - before, 0
for leaf in flatten(found).values():
    for shard in leaf.addressable_shards:
        mine += shard.data.nbytes
        layers = np.asarray(shard.data)[:, 0, 0]
        np.testing.assert_array_equal(layers, np.arange(8)[shard.index[0]])
assert mine * hosts == sum(leaf.nbytes for leaf in flatten(found).values())
assert mine <= read < 1.2 * mine, (mine, read)

state = jax.jit(lambda: {"a": jax.numpy.arange(64.0).reshape(8, 8)}, out_shardings=NamedSharding(mesh, P("fsdp")))()
progress = Progress(steps, Keep(latest=2, every=None))
step = progress.latest() or 0
if step:
    state = progress.restore(jax.tree.map(lambda leaf: leaf * 0, state))
    for shard in state["a"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), np.arange(64.0).reshape(8, 8)[shard.index])
progress.save(step + 1, state)
progress.close()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An anchor in which every layer of a leaf holds its own number."""
    shapes = flatten(abstract_params(CONFIG, ("public",)))
    leaves = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    for leaf in leaves.values():
        leaf += np.arange(len(leaf), dtype=np.float32).reshape(-1, *[1] * (leaf.ndim - 1))
    params = unflatten(leaves)
    described = arrays.digests(params)
    manifest = Manifest(
        kind="anchor",
        model=CONFIG,
        experts=(ExpertRecord(name="public"),),
        anchor=checkpoint.anchor_fingerprint(described),
        arrays=described,
        top_k=1,
    )
    directory = tmp_path_factory.mktemp("model") / "anchor"
    checkpoint.write(directory, params, manifest)
    return directory


@pytest.mark.slow
def test_any_number_of_hosts_reads_what_another_number_wrote(model, tmp_path):
    for hosts in (1, 2, 1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        arguments = [sys.executable, "-c", HOST, str(model), str(tmp_path / "steps"), str(hosts)]
        running = [subprocess.Popen([*arguments, str(host), address]) for host in range(hosts)]
        assert [host.wait() for host in running] == [0] * hosts
    assert sorted(entry.name for entry in (tmp_path / "steps").iterdir()) == ["3", "4"]

"""Two processes place the rows that they read, and together they hold the batch of one."""

import socket
import subprocess
import sys

import numpy as np
import pytest

HOST = """
import sys
import jax, numpy as np

address, host, out = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, num_processes=2, process_id=int(host))
from flexolmo_jax.parallel import MeshConfig

layout = MeshConfig(layout="fsdp", data=2, fsdp=2).build()
whole = np.arange(8 * 3).reshape(8, 3)
rows = layout.local_rows(8)
placed = layout.place_batch({"ids": whole[rows]})["ids"]
assert placed.shape == (8, 3)
for shard in placed.addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
np.save(f"{out}/{host}.npy", rows)
"""


@pytest.mark.slow
def test_each_process_reads_and_places_its_own_rows(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = [subprocess.Popen([sys.executable, "-c", HOST, address, str(host), str(tmp_path)]) for host in range(2)]
    assert [host.wait() for host in hosts] == [0, 0]
    rows = [np.load(tmp_path / f"{host}.npy").tolist() for host in range(2)]
    assert sorted(rows[0] + rows[1]) == list(range(8)) and len(rows[0]) == len(rows[1]) == 4

"""H100s that are not here: XLA compiles for them wherever JAX's plugin for CUDA is installed, with or without a GPU.

The plugin takes a description of the GPU in place of one. These are NVIDIA's published numbers for the H100 SXM.
"""

import pytest
from jax.experimental import topologies

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100s(count: int) -> list:
    """So many devices of one host."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="`make ahead-of-time` installs the compiler for GPUs")
    name = {"topology_name": "h100", "topology": f"1x1x{count}"}
    return list(topologies.get_topology_desc(platform="cuda", target_config=_H100, **name).devices)

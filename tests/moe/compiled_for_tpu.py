"""A program that compiles for TPUs that are not here, and prints, as JSON, the products that were compiled.

Every figure is FLOPs over those of the active experts: forward, and forward with all gradients, on one of eight chips.
"""

import json

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from flexolmo_jax.moe import IMPLEMENTATIONS, FeedForward
from flexolmo_jax.parallel import MeshConfig

TOKENS, WIDTH, HIDDEN = 4096, 512, 1408
COMPILED = [
    ("grouped", {"layout": "fsdp"}, 7, 5),
    ("ring", {"layout": "fsdp_expert", "fsdp": 2, "expert": 4}, 7, 5),
    ("ragged", {"layout": "fsdp_expert", "fsdp": 2, "expert": 4}, 7, 5),
    ("ragged", {"layout": "fsdp_expert", "expert": 8}, 2, 1),
    ("ring", {"layout": "fsdp_expert", "expert": 8}, 2, 2),
]


def work(implementation: str, axes: dict, experts: int, top_k: int) -> tuple[float, float]:
    """Compiled over active FLOPs."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    layout = MeshConfig(**axes).build(devices)

    def tokens(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.batch_sharding())

    def weight(spec, *shape):
        at = NamedSharding(layout.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at)

    into, out = ("fsdp", ("expert", "tensor")), (("expert", "tensor"), "fsdp")
    weights = FeedForward(weight(into, WIDTH, HIDDEN), weight(into, WIDTH, HIDDEN), weight(out, HIDDEN, WIDTH))
    x, probabilities = tokens(jnp.bfloat16, TOKENS, WIDTH), tokens(jnp.float32, TOKENS, top_k)
    arguments = x, probabilities, [weights] * experts, tokens(jnp.int32, TOKENS, top_k)

    def mix(x, probabilities, experts, choices):
        return IMPLEMENTATIONS[implementation](x, probabilities, choices, experts)

    def loss(*arguments):
        return jnp.sum(jnp.square(mix(*arguments).astype(jnp.float32)))

    active = 6 * TOKENS * top_k * WIDTH * HIDDEN / layout.mesh.size
    with jax.set_mesh(layout.mesh):
        forward = jax.jit(mix).lower(*arguments).compile()
        both = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
    return forward.cost_analysis()["flops"] / active, both.cost_analysis()["flops"] / (3 * active)


if __name__ == "__main__":
    print(json.dumps([work(*each) for each in COMPILED]))

"""A program on eight simulated devices: the parity test of an implementation on a mesh; prints what it checked.

Arguments: the implementation, the sizes of the mesh's axes as JSON, which of the edges, and how many cases besides.
`ragged` has its one operation that XLA lacks on CPU, the exchange, made of operations that it has.
"""

import json
import sys

import jax
import jax.numpy as jnp

from flexolmo_jax.moe import IMPLEMENTATIONS, ragged
from flexolmo_jax.parallel import MeshConfig
from tests.moe.parity import EDGES, check, check_drawn


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` is defined as: everybody sees everything and takes its part."""
    del recv_sizes
    me = jax.lax.axis_index(axis_name)
    everything = [jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    for sent, begins, sizes, arrives in zip(*(list(a) for a in everything), strict=True):
        row = jnp.arange(len(output)) - arrives[me]
        taken = sent[jnp.clip(begins[me] + row, 0, len(sent) - 1)]
        output = jnp.where(((row >= 0) & (row < sizes[me]))[:, None], taken, output)
    return output


def main(implementation: str, axes: str, edges: str, drawn: str) -> None:
    chosen = [EDGES[edge] for edge in json.loads(edges)]
    if implementation == "ragged":
        jax.lax.ragged_all_to_all = ragged_all_to_all
        ragged.platform = lambda: "tpu"
    with jax.set_mesh(MeshConfig(layout="fsdp_expert", **json.loads(axes)).build().mesh):
        for case in chosen:
            check(IMPLEMENTATIONS[implementation], case)
        if int(drawn):
            check_drawn(IMPLEMENTATIONS[implementation], int(drawn))
    print(f"{implementation}: {len(chosen)} edges, {drawn} drawn")


if __name__ == "__main__":
    main(*sys.argv[1:])

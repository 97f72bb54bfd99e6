"""Expert parallelism by showing tokens around: an all-gather and a reduce-scatter over the mesh axis `expert`.

Every device holds a piece of every expert: some hidden units of each, so that its work and its messages are the same
whatever the router decides, the number of experts need not fit the axis, and no buffer is sized for the worst case. The
usual expert parallelism, whole experts on some devices, has the same two messages and none of this. It is right where
tokens choose a large part of the experts, as FlexOlmo's do; where they choose few of many, `ragged` sends less.

Axis legend: see `flexolmo_jax.moe.api`.
"""

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from flexolmo_jax.moe import dense, grouped
from flexolmo_jax.moe.across_devices import with_gathered_tokens
from flexolmo_jax.moe.choice import choose_local
from flexolmo_jax.parallel.current import mesh_axes

LOCAL = {"dense": dense.mix_local, "grouped": grouped.mix_local}


def mix_experts(
    x: Float[Array, "T D"],
    probabilities: Float[Array, "T K"],
    choices: Int[Array, "T K"],
    experts: Sequence,
) -> Float[Array, "T D"]:
    if mesh_axes().get("expert", 1) == 1:
        raise ValueError("ring needs a mesh whose axis `expert` is larger than 1; set it with jax.set_mesh")

    def local(x, probabilities, choices, experts):
        name = choose_local(tokens=len(x), top_k=choices.shape[1], experts=len(experts))
        return LOCAL[name](x, probabilities, choices, experts)

    return with_gathered_tokens(local, (x, probabilities, choices), experts)

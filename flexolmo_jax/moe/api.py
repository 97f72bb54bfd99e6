"""The public face of the mixture-of-experts operation.

Axis legend: `T` tokens, `K` choices per token, `E` experts, `D` model width, `F` hidden width of an expert.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from flexolmo_jax.moe import dense, grouped, ragged, ring
from flexolmo_jax.moe.across_devices import with_gathered_tokens, with_gathered_weights
from flexolmo_jax.moe.choice import choose_implementation
from flexolmo_jax.parallel.current import mesh_axes


class FeedForward(NamedTuple):
    """The weights of one expert: `down(silu(x @ gate) * (x @ up))`."""

    gate: Float[Array, "D F"]
    up: Float[Array, "D F"]
    down: Float[Array, "F D"]


IMPLEMENTATIONS = {
    "dense": dense.mix_experts,
    "grouped": grouped.mix_experts,
    "ring": ring.mix_experts,
    "ragged": ragged.mix_experts,
}


def mix_experts(
    x: Float[Array, "T D"],
    probabilities: Float[Array, "T K"],
    choices: Int[Array, "T K"],
    experts: Sequence[FeedForward],
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Returns `sum_k probabilities[t, k] * FFN_{choices[t, k]}(x[t])`, exactly: no token is ever dropped.

    Source: section 3.2 of arXiv 2507.07024, `y = sum_{i in TopK} softmax(r(x))_i M_i(x)`.

    Args:
      x: tokens, in the compute dtype. On a mesh they are cut over its batch axes, the weights as the layouts say.
      probabilities: float32 weight of each choice. A choice of weight zero contributes exactly nothing.
      choices: index of the expert behind each weight; the experts of one token are distinct. An index of `E` means no
        expert: that choice contributes nothing, to no gradient either.
      experts: weights of the `E` experts, in the order that `choices` counts them.
      implementation: a name of `IMPLEMENTATIONS`; None takes the one that `choose_implementation` names.

    Raises:
      ValueError: the implementation's name is unknown, or it cannot run on this mesh.
    """
    name = implementation or choose_implementation(
        tokens=x.shape[0], top_k=choices.shape[1], experts=len(experts), axes=mesh_axes()
    )
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r} of mix_experts; there are {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](x, probabilities, choices, experts)


def each_expert(x: Float[Array, "T D"], experts: Sequence[FeedForward]) -> list[Float[Array, "T D"]]:
    """The output of every expert on every token, not mixed."""
    axes = mesh_axes()
    if not axes:
        return dense.each_expert(x, experts)
    spread = with_gathered_tokens if axes["expert"] > 1 else with_gathered_weights
    return spread(dense.each_expert, (x,), experts)

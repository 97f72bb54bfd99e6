"""Which implementation of `mix_experts` runs where nobody names one: one rule, explained in docs/moe.md."""

from collections.abc import Mapping

from flexolmo_jax.parallel.current import platform

LARGEST_SHARE = {"cpu": 0.8, "gpu": 0.9, "tpu": 0.9}
"""By platform: up to this share of experts per token, `grouped` is taken. On CPU it is 1.8 times as fast as `dense`
at a half and 1.2 times at 0.75; on TPU it is compiled to the active FLOPs; on GPU nothing is measured yet."""

FEWEST_ROWS = {"cpu": 32, "gpu": 1, "tpu": 1}
"""By platform: rows per expert from which on sorting is worth it."""


def choose_implementation(*, tokens: int, top_k: int, experts: int, axes: Mapping[str, int]) -> str:
    """The best implementation for so many tokens that each choose `top_k` of so many experts.

    Args:
      tokens: on all devices together.
      top_k: choices per token.
      experts: experts to choose from.
      axes: sizes of the axes of the mesh; empty without one.
    """
    if axes.get("expert", 1) > 1:
        return "ring"
    return choose_local(tokens=tokens, top_k=top_k, experts=experts)


def choose_local(*, tokens: int, top_k: int, experts: int) -> str:
    """The same for the tokens of one device, which has all it needs of all experts."""
    few = tokens * top_k < FEWEST_ROWS[platform()] * experts
    return "dense" if few or top_k > LARGEST_SHARE[platform()] * experts else "grouped"

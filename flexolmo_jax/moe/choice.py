"""Which implementation of `mix_experts` runs where nobody names one: one rule, explained in docs/moe.md."""

from collections.abc import Mapping


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
    return "dense"

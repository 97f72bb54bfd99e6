"""SwiGLU, `down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202), and what its backward pass needs.

Axis legend: `F` hidden units.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float


class Activated(NamedTuple):
    """Hidden units, and how fast they change with what they are made of.

    Attributes:
      hidden: `silu(g) * u`.
      by_gate: its derivative with respect to `g`.
      by_up: its derivative with respect to `u`.
    """

    hidden: Float[Array, "*T F"]
    by_gate: Float[Array, "*T F"]
    by_up: Float[Array, "*T F"]


def activate(g: Float[Array, "*T F"], u: Float[Array, "*T F"]) -> Float[Array, "*T F"]:
    return jax.nn.silu(g) * u


def activate_with_slopes(g: Float[Array, "*T F"], u: Float[Array, "*T F"]) -> Activated:
    """All of it from `g` and `u` alone: it is cheaper to compute again than to keep."""
    share = jax.nn.sigmoid(g)
    silu = g * share
    return Activated(silu * u, u * share * (1 + g * (1 - share)), silu)

"""SwiGLU, `down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202), and what its backward pass needs.

Axis legend: `F` hidden units.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
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


@jax.custom_vjp
def activate(g: Float[Array, "*T F"], u: Float[Array, "*T F"]) -> Float[Array, "*T F"]:
    """`silu(g) * u`, computed in float32. For the backward pass it keeps `g` and `u` alone."""
    return _hidden(g, u)


def activate_with_slopes(g: Float[Array, "*T F"], u: Float[Array, "*T F"]) -> Activated:
    """All of it from `g` and `u` alone: it is cheaper to compute again than to keep. In their dtype, out of float32."""
    dtype, g, u = g.dtype, g.astype(jnp.float32), u.astype(jnp.float32)
    share = jax.nn.sigmoid(g)
    silu = g * share
    return Activated(*(a.astype(dtype) for a in (silu * u, u * share * (1 + g * (1 - share)), silu)))


def _hidden(g, u):
    return (jax.nn.silu(g.astype(jnp.float32)) * u.astype(jnp.float32)).astype(g.dtype)


def _with_residuals(g, u):
    return _hidden(g, u), (g, u)


def _backward(residuals, d_hidden):
    g, u = residuals
    slopes = activate_with_slopes(g, u)
    return d_hidden * slopes.by_gate, d_hidden * slopes.by_up


activate.defvjp(_with_residuals, _backward)

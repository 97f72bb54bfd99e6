"""The products of `grouped` on TPU and GPU: all experts' weights in one array, one grouped product for each matrix.

On TPU, products of rows are `jax.lax.ragged_dot_general`, which XLA compiles to the active products alone. The
gradients of weights it would compute for every expert from every row; there it is the Pallas kernel `tgmm` of megablox.
On GPU XLA's backward pass may be dense as well, so all are tokamax's kernels, by name: left to choose, tokamax takes
another one silently. What it gives for the weights of an empty group is whatever lay in memory; here that is zero.

Axis legend: see `flexolmo_jax.moe.sorting`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array, Float

from flexolmo_jax.errors import UserError
from flexolmo_jax.moe.swiglu import activate, activate_with_slopes
from flexolmo_jax.parallel.current import platform

GPU_IMPLEMENTATION = "triton"
"""Of tokamax's `ragged_dot_general`; it exists for all of NVIDIA's GPUs that JAX supports. Not yet measured."""

TILE = 512
"""Rows, and columns at most, of the tiles that `tgmm` works on."""

_BY_ROW = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
_BY_ROW_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_BY_GROUP = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def forward(x: Float[Array, "T D"], rows, experts) -> tuple[Float[Array, "R D"], tuple[Array, Array]]:
    """Outputs of all rows, and the activations that the backward pass needs: gate and up, before the nonlinearity."""
    gate, up, down = (jnp.stack(w) for w in zip(*experts, strict=True))
    inputs = x[rows.token]
    g, u = (_of_rows(inputs, w, rows.sizes, _BY_ROW) for w in (gate, up))
    return _of_rows(activate(g, u), down, rows.sizes, _BY_ROW), (g, u)


def backward(x, cotangent, weights, rows, experts, activations, trained) -> tuple[Any, Any, Any]:
    """Gradients of the rows' inputs [R, D], of their weights [R, 1], and of the experts, None for those not trained.

    What belongs to no expert is zero.
    """
    gate, up, down = (jnp.stack(w) for w in zip(*experts, strict=True))
    # Rows of no expert hold whatever the kernels left there.
    there = (jnp.arange(len(rows.choice)) < jnp.sum(rows.sizes))[:, None]
    g, u = (jnp.where(there, a, 0) for a in activations)
    inputs, d_mixed, weight = x[rows.token], cotangent[rows.token], weights[:, None]
    h, by_gate, by_up = activate_with_slopes(g, u)
    d_h = jnp.where(there, _of_rows(d_mixed, down, rows.sizes, _BY_ROW_TRANSPOSED), 0)
    d_weight = jnp.sum(d_h.astype(jnp.float32) * h, axis=1, keepdims=True)
    d_h = (d_h * weight).astype(x.dtype)
    d_g, d_u = d_h * by_gate, d_h * by_up
    d_inputs = _of_rows(d_g, gate, rows.sizes, _BY_ROW_TRANSPOSED) + _of_rows(d_u, up, rows.sizes, _BY_ROW_TRANSPOSED)
    if not any(trained):
        return jnp.where(there, d_inputs, 0), d_weight, [None] * len(experts)
    pairs = (inputs, d_g), (inputs, d_u), (h, (d_mixed * weight).astype(x.dtype))
    d_experts = zip(*(_of_groups(a, b, rows.sizes, trained) for a, b in pairs), strict=True)
    return (
        jnp.where(there, d_inputs, 0),
        d_weight,
        [d if own else None for d, own in zip(d_experts, trained, strict=True)],
    )


def _of_rows(a: Float[Array, "R _"], b: Float[Array, "E _ _"], sizes, dimensions) -> Float[Array, "R _"]:
    """Every row times its own expert's matrix."""
    if platform() == "tpu":
        return jax.lax.ragged_dot_general(a, b, sizes, dimensions, preferred_element_type=a.dtype)
    return _tokamax(a, b, sizes, dimensions)


def _of_groups(a: Float[Array, "R _"], b: Float[Array, "R _"], sizes, wanted: tuple[bool, ...]) -> list:
    """For each wanted expert, the product of its rows of `a`, transposed, with those of `b`; None for the others."""
    of_all, of_one = (_tgmm, _tgmm_of_one) if platform() == "tpu" else (_tokamax_of_all, _tokamax_of_one)
    if all(wanted):
        return list(of_all(a, b, sizes))
    return [of_one(a, b, sizes, expert) if own else None for expert, own in enumerate(wanted)]


def _tgmm(a, b, sizes, *of_group) -> Float[Array, "_ _ _"]:
    missing = -len(a) % TILE
    a, b = (jnp.pad(each, ((0, missing), (0, 0))) for each in (a, b))
    tiling = TILE, min(TILE, a.shape[1]), min(TILE, b.shape[1])
    return tgmm(a.T, b, sizes, a.dtype, tiling, *of_group)


def _tgmm_of_one(a, b, sizes, expert: int) -> Float[Array, "_ _"]:
    return _tgmm(a, b, sizes, jnp.int32(expert), 1)[0]


def _tokamax_of_all(a, b, sizes) -> Float[Array, "_ _ _"]:
    return jnp.where((sizes > 0)[:, None, None], _tokamax(a, b, sizes, _BY_GROUP), 0)


def _tokamax_of_one(a, b, sizes, expert: int) -> Float[Array, "_ _"]:
    """The kernel begins with the first row, so this expert's go there; those after the last group it passes over."""
    begin = jnp.sum(sizes[:expert])
    a, b = (jnp.roll(each, -begin, axis=0) for each in (a, b))
    return _tokamax_of_all(a, b, sizes[expert : expert + 1])[0]


def _tokamax(a: Array, b: Array, sizes: Array, dimensions) -> Array:
    try:
        import tokamax
    except ImportError:
        raise UserError("experts on a GPU need tokamax's kernels: pip install 'flexolmo_jax[cuda]'") from None
    if not flags.FLAGS.is_parsed():
        # tokamax would look for its options on the command line, and give up at those of ours.
        flags.FLAGS.mark_as_parsed()
    return tokamax.ragged_dot_general(
        a, b, sizes, dimensions, preferred_element_type=a.dtype, implementation=GPU_IMPLEMENTATION
    )

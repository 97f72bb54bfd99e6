"""The products of `grouped` on TPU and GPU: all experts' weights in one array, one grouped product for each matrix.

On TPU it is `jax.lax.ragged_dot_general`, which XLA compiles to exactly the active products. On GPU XLA may compute its
backward pass densely, so there it is tokamax's kernel, by name: left to choose, tokamax would take another silently. Its
gradient of an empty group's weights is not defined, so those are set to zero here.

Axis legend: see `flexolmo_jax.moe.grouped`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexolmo_jax.moe.across_devices import platform

GPU_IMPLEMENTATION = "triton"
"""The implementation of `tokamax.ragged_dot_general` on GPU; not yet measured."""

_BY_ROW = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
_BY_ROW_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_BY_GROUP = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def forward(x: Float[Array, "T D"], rows, experts) -> tuple[Float[Array, "R D"], tuple[Array, Array]]:
    """Outputs of all rows, and the activations that the backward pass needs: gate and up, before the nonlinearity."""
    gate, up, down = (jnp.stack(w) for w in zip(*experts, strict=True))
    inputs = x[rows.token]
    g, u = (_product(inputs, w, rows.sizes, _BY_ROW) for w in (gate, up))
    return _product(jax.nn.silu(g) * u, down, rows.sizes, _BY_ROW), (g, u)


def backward(x, cotangent, weights, rows, experts, activations, trained) -> tuple[Any, Any, Any]:
    """Gradients of the rows' inputs [R, D], of their weights [R], and of the experts, None for those not trained."""
    gate, up, down = (jnp.stack(w) for w in zip(*experts, strict=True))
    g, u = activations
    # Rows of no expert hold whatever the kernels left there.
    there = (jnp.arange(len(rows.token)) < jnp.sum(rows.sizes))[:, None]
    g, u, weight = jnp.where(there, g, 0), jnp.where(there, u, 0), weights[:, None]
    inputs, d_mixed = x[rows.token], cotangent[rows.token]
    silu, slope = jax.nn.silu(g), jax.nn.sigmoid(g)
    slope = slope * (1 + g * (1 - slope))
    h = silu * u
    d_h = jnp.where(there, _product(d_mixed, down, rows.sizes, _BY_ROW_TRANSPOSED), 0)
    d_weight = jnp.sum(d_h.astype(jnp.float32) * h, axis=1)
    d_h = (d_h * weight).astype(x.dtype)
    d_g, d_u = d_h * u * slope, d_h * silu
    d_inputs = _product(d_g, gate, rows.sizes, _BY_ROW_TRANSPOSED) + _product(d_u, up, rows.sizes, _BY_ROW_TRANSPOSED)
    if not any(trained):
        return d_inputs, d_weight, [None] * len(experts)
    sums = [
        jnp.where((rows.sizes > 0)[:, None, None], _product(a, b, rows.sizes, _BY_GROUP), 0)
        for a, b in ((inputs, d_g), (inputs, d_u), (h, (d_mixed * weight).astype(x.dtype)))
    ]
    return (
        d_inputs,
        d_weight,
        [tuple(s[i] for s in sums) if is_trained else None for i, is_trained in enumerate(trained)],
    )


def _product(a: Array, b: Array, sizes: Array, dimensions: jax.lax.RaggedDotDimensionNumbers) -> Array:
    if platform() == "tpu":
        return jax.lax.ragged_dot_general(a, b, sizes, dimensions, preferred_element_type=a.dtype)
    import tokamax

    return tokamax.ragged_dot_general(
        a, b, sizes, dimensions, preferred_element_type=a.dtype, implementation=GPU_IMPLEMENTATION
    )

"""Products of rows with a matrix of weights, on which nearly all time of a step is spent.

XLA multiplies 16-bit matrices on CPU at the speed of 32-bit ones: it widens them first. Only a product of plain
matrices, the first cut along its rows and the sum written in float32, goes to the processor's own instructions for
16 bits, with AMX four to five times as fast. Automatic differentiation asks for other products, so the backward pass is
written out. For 32 bits the compiler has options that are faster than its own choice. TPUs and GPUs need nothing of
this.

Axis legend: `T` rows, `I` inputs, `O` outputs.
"""

import functools
from collections.abc import Callable
from platform import machine

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from flexolmo_jax.parallel.current import platform

KEPT = "product"
"""The name of results for policies of rematerialisation, which do not see the product itself in what is written out."""

BY_ONEDNN: dict[str, bool | str] = {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}
"""Products of 32 bits by oneDNN. Most are YNNPACK's otherwise, which leaves the second factor as it lies: with AVX-512
a large one ran at 146 GFLOP/s, and by oneDNN at 164 (`benchmarks/results/train_step_avx512.json`). Those of 16 bits
stay with YNNPACK."""

ROWS_TOGETHER = 8
"""Rows that `transposed` moves as one: XLA would fold a plain transpose into the product, and then widen it."""


def compiler_options(device: str) -> dict[str, bool | str] | None:
    """Options of `jax.jit` for a program of many rows on devices of this kind: "cpu", "gpu" or "tpu".

    Not for few rows, as in generation: oneDNN packs the weights anew at every product, and 64 rows took a fifth longer.
    """
    return BY_ONEDNN if device == "cpu" and machine() == "x86_64" else None


def jit_rows(function: Callable, static_argnums: tuple[int, ...] = ()) -> Callable:
    """`jax.jit` of a program of many rows, with the `compiler_options` of the devices that a call is for."""

    @functools.cache
    def compiled(device: str) -> Callable:
        return jax.jit(function, static_argnums=static_argnums, compiler_options=compiler_options(device))

    @functools.wraps(function)
    def call(*arguments):
        return compiled(platform())(*arguments)

    return call


def project(x: Float[Array, "*T I"], w: Float[Array, "I O"]) -> Float[Array, "*T O"]:
    """`x @ w` in the dtype of `x`, whatever that of `w`; sums are float32."""
    if not _by_16_bits(x):
        return x @ w.astype(x.dtype)
    return checkpoint_name(project_wide(x, w).astype(x.dtype), KEPT)


def project_wide(x: Float[Array, "*T I"], w: Float[Array, "I O"]) -> Float[Array, "*T O"]:
    """`x @ w` in float32, of factors in the dtype of `x`."""
    multiply = _with_own_backward if _by_16_bits(x) else _multiply
    return multiply(x, w)


def project_back(d_y: Float[Array, "*T O"], w: Float[Array, "I O"]) -> Float[Array, "*T I"]:
    """`d_y @ w.T` in float32, of factors in the dtype of `w`: the gradient of `x` in `x @ w`."""
    return jax.lax.dot_general(
        d_y.astype(w.dtype), w, (((d_y.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def sum_of_outer(x: Float[Array, "*T I"], d_y: Float[Array, "*T O"]) -> Float[Array, "I O"]:
    """`x.T @ d_y` in float32, of factors in the dtype of `x`: the gradient of `w` in `x @ w`."""
    x, d_y = (a.astype(x.dtype).reshape(-1, a.shape[-1]) for a in (x, d_y))
    return jnp.matmul(transposed(x), d_y, preferred_element_type=jnp.float32)


def transposed(a: Float[Array, "*B T I"]) -> Float[Array, "*B I T"]:
    """The two last axes exchanged, for the first factor of a product."""
    *batch, rows, width = a.shape
    if not _by_16_bits(a) or rows % ROWS_TOGETHER:
        return jnp.swapaxes(a, -1, -2)
    together = a.reshape(*batch, rows // ROWS_TOGETHER, ROWS_TOGETHER, width)
    return jnp.moveaxis(together, -1, -3).reshape(*batch, width, rows)


def _multiply(x, w):
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _with_residuals(x, w):
    return _multiply(x, w), (x, w)


def _backward(residuals, d_y):
    x, w = residuals
    return project_back(d_y, w.astype(x.dtype)).astype(x.dtype), sum_of_outer(x, d_y).astype(w.dtype)


_with_own_backward = jax.custom_vjp(_multiply)
_with_own_backward.defvjp(_with_residuals, _backward)


def _by_16_bits(x: Array) -> bool:
    return platform() == "cpu" and x.dtype == jnp.bfloat16

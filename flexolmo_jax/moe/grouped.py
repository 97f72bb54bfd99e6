"""Each token through its own experts only: sort by expert, one product per group of rows, un-sort and sum.

The backward pass is written out: sums over a token's rows are gathers, as in the forward pass, where automatic
differentiation would scatter and add; a frozen expert gets no weight gradient; and what is cheap is computed again
rather than kept. The products themselves are `blocks` on CPU and `kernels` elsewhere.

Axis legend: `R = T * K` rows, one for each choice, sorted by expert; otherwise see `flexolmo_jax.moe.api`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexolmo_jax.moe import blocks, kernels
from flexolmo_jax.moe.across_devices import mesh_axes, platform, with_gathered_weights


class Rows(NamedTuple):
    """Which row belongs to which choice. Rows of no expert come last, and no group counts them.

    Attributes:
      token: the token behind each row.
      of_choice: the row behind each choice, the inverse of the sorting.
      sizes: rows of each expert.
    """

    token: Int[Array, "R"]
    of_choice: Int[Array, "T K"]
    sizes: Int[Array, "E"]


def sort_by_expert(choices: Int[Array, "T K"], experts: int) -> tuple[Rows, Int[Array, "R"]]:
    """Sorts all choices by expert, those of one expert by token; also returns the choice behind each row."""
    flat = choices.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    of_choice = jnp.argsort(order).reshape(choices.shape)
    sizes = jnp.sum(flat[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return Rows(order // choices.shape[1], of_choice, sizes), order


def mix_experts(
    x: Float[Array, "T D"],
    probabilities: Float[Array, "T K"],
    choices: Int[Array, "T K"],
    experts: Sequence,
) -> Float[Array, "T D"]:
    if mesh_axes():
        return with_gathered_weights(mix_local, (x, probabilities, choices), experts)
    return mix_local(x, probabilities, choices, experts)


def mix_local(
    x: Float[Array, "T D"],
    probabilities: Float[Array, "T K"],
    choices: Int[Array, "T K"],
    experts: Sequence,
) -> Float[Array, "T D"]:
    return _mix(x, probabilities, choices, [tuple(w.astype(x.dtype) for w in expert) for expert in experts])


@jax.custom_vjp
def _mix(x, probabilities, choices, experts):
    return _forward(x, probabilities, choices, experts)[0]


def _forward(x, probabilities, choices, experts):
    rows, _ = sort_by_expert(choices, len(experts))
    y, activations = _products().forward(x, rows, experts)
    chosen = jnp.where((choices < len(experts))[..., None], y[rows.of_choice], 0)
    mixed = jnp.einsum("tk,tkd->td", probabilities, chosen, preferred_element_type=jnp.float32)
    return mixed.astype(x.dtype), activations


def _with_residuals(x, probabilities, choices, experts):
    trained = _Static(tuple(any(w.perturbed for w in expert) for expert in experts))
    values = [tuple(w.value for w in expert) for expert in experts]
    mixed, activations = _forward(x.value, probabilities.value, choices.value, values)
    return mixed, (x.value, probabilities.value, choices.value, values, activations, trained)


def _backward(residuals, cotangent):
    x, probabilities, choices, experts, activations, trained = residuals
    rows, order = sort_by_expert(choices, len(experts))
    weights = jnp.where(choices < len(experts), probabilities, 0.0).reshape(-1)[order]
    d_x, d_weights, d_experts = _products().backward(
        x, cotangent.astype(x.dtype), weights, rows, experts, activations, trained.value
    )
    there = choices < len(experts)
    d_x = jnp.sum(jnp.where(there[..., None], d_x[rows.of_choice], 0), axis=1, dtype=jnp.float32)
    d_probabilities = jnp.where(there, d_weights[rows.of_choice], 0.0)
    return d_x.astype(x.dtype), d_probabilities.astype(probabilities.dtype), None, d_experts


_mix.defvjp(_with_residuals, _backward, symbolic_zeros=True)


def _products():
    return blocks if platform() == "cpu" else kernels


@jax.tree_util.register_static
class _Static(NamedTuple):
    """Something that is known when the program is traced, among residuals that are not."""

    value: tuple[bool, ...]

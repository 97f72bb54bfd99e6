"""Each token through its own experts only: sort by expert, one product per group of rows, un-sort and sum.

The backward pass is written out: sums over a token's rows are gathers, as in the forward pass, where automatic
differentiation would scatter and add; a frozen expert gets no weight gradient; and what is cheap is computed again
rather than kept. The products themselves are `blocks` on CPU and `kernels` elsewhere.

Axis legend: see `flexolmo_jax.moe.sorting`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexolmo_jax.moe import blocks, kernels
from flexolmo_jax.moe.across_devices import with_gathered_weights
from flexolmo_jax.moe.mixing import weighted_sum
from flexolmo_jax.moe.sorting import choices_of, sort_by_expert, sum_of_choices
from flexolmo_jax.parallel.current import mesh_axes, platform


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
    rows = sort_by_expert(choices, len(experts))
    y, activations = _products().forward(x, rows, experts)
    there = choices < len(experts)
    chosen = [jnp.where(there[:, k, None], y[rows.of_choice[:, k]], 0) for k in range(choices.shape[1])]
    return weighted_sum(probabilities, chosen).astype(x.dtype), activations


def _with_residuals(x, probabilities, choices, experts):
    trained = _Trained(tuple(any(w.perturbed for w in expert) for expert in experts))
    values = [tuple(w.value for w in expert) for expert in experts]
    mixed, activations = _forward(x.value, probabilities.value, choices.value, values)
    return mixed, (x.value, probabilities.value, choices.value, values, activations, trained)


def _backward(residuals, cotangent):
    x, probabilities, choices, experts, activations, trained = residuals
    rows = sort_by_expert(choices, len(experts))
    weights = probabilities.reshape(-1)[rows.choice]
    d_rows, d_weights, d_experts = _products().backward(
        x, cotangent.astype(x.dtype), weights, rows, experts, activations, trained.experts
    )
    d_x = sum_of_choices(d_rows, rows).astype(x.dtype)
    d_probabilities = choices_of(d_weights, rows)[..., 0].astype(probabilities.dtype)
    return d_x, d_probabilities, None, d_experts


_mix.defvjp(_with_residuals, _backward, symbolic_zeros=True)


def _products():
    return blocks if platform() == "cpu" else kernels


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Trained:
    """Which experts are differentiated: known when the program is traced, unlike the residuals that it is among."""

    experts: tuple[bool, ...]

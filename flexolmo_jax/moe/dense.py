"""Every expert on every token, then the mix: right when nearly all experts are active (k close to E).

There is no sort and no gather, and a frozen expert costs no weight gradient, because nothing differentiates it.
Axis legend: see `flexolmo_jax.moe.api`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexolmo_jax.moe.across_devices import with_gathered_weights
from flexolmo_jax.moe.mixing import weighted_sum
from flexolmo_jax.moe.swiglu import activate
from flexolmo_jax.parallel.current import mesh_axes
from flexolmo_jax.products import project


def feed_forward(x: Float[Array, "*T D"], weights) -> Float[Array, "*T D"]:
    """One expert's SwiGLU of every token."""
    gate, up, down = weights
    return project(activate(project(x, gate), project(x, up)), down)


def each_expert(x: Float[Array, "T D"], experts: Sequence) -> list[Float[Array, "T D"]]:
    return [feed_forward(x, expert) for expert in experts]


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
    one_hot = jax.nn.one_hot(choices, len(experts), dtype=probabilities.dtype, axis=1)
    weights = weighted_sum(probabilities, jnp.unstack(one_hot, axis=2))
    mixed = jnp.zeros(x.shape, jnp.float32)
    for index, expert in enumerate(experts):
        mixed += weights[:, index, None] * feed_forward(x, expert)
    return mixed.astype(x.dtype)

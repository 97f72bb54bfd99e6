"""Which experts a token goes to.

Axis legend: `B` rows, `S` positions, `D` width, `E` experts, `K` choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.model.config import ModelConfig


class RouterRow(nnx.Module):
    """One expert's row in every layer and, but for the public one, its bias, of which the negative part alone acts."""

    def __init__(self, config: ModelConfig, *, has_bias: bool):
        self.row = nnx.Param(jnp.zeros((config.layers, config.width)))
        if has_bias:
            self.bias = nnx.Param(jnp.zeros((config.layers,)))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        logit = x.astype(jnp.float32) @ self.row[...].astype(jnp.float32)
        if hasattr(self, "bias"):
            logit += jnp.minimum(self.bias[...].astype(jnp.float32), 0.0)
        return logit


class Routing(NamedTuple):
    """What the router decided: all float32, `logits` before forbidden experts were struck out."""

    logits: Float[Array, "B S E"]
    probabilities: Float[Array, "B S K"]
    choices: Int[Array, "B S K"]


def choose(logits: Float[Array, "B S E"], permitted: Bool[Array, "B E"] | None, top_k: int, normalize: bool) -> Routing:
    """Softmax over the permitted experts, then the `top_k` most probable ones.

    A forbidden expert's logit becomes minus infinity before the softmax, so that the model is the one that never had
    it; where fewer than `top_k` experts are permitted, the surplus choices have weight exactly zero.
    """
    struck = logits if permitted is None else jnp.where(permitted[:, None, :], logits, -jnp.inf)
    probabilities = jax.nn.softmax(struck, axis=-1)
    if top_k == logits.shape[-1]:
        choices = jnp.broadcast_to(jnp.arange(top_k), logits.shape)
    else:
        probabilities, choices = jax.lax.top_k(probabilities, top_k)
    if normalize:
        probabilities /= jnp.sum(probabilities, axis=-1, keepdims=True)
    return Routing(logits, probabilities, choices)

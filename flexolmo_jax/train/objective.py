"""What a job minimises.

Axis legend: `L` layers, `B` rows, `S` positions, `V` vocabulary, `E` experts.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexolmo_jax.data.packing import Rows
from flexolmo_jax.data.reading import Batch
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.transformer import Transformer
from flexolmo_jax.train.step import Weights

POSITIONS_AT_ONCE = 512
"""Logits of so many positions exist at a time; longer rows are done piece by piece, and again in the backward pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the parts of the loss; each part is a mean over the tokens that count.

    Attributes:
      head_z_loss: of the squared log-partition of the head's softmax (PaLM, arXiv 2204.02311).
      router_z_loss: of the squared log-partition of the router's softmax (ST-MoE, arXiv 2202.08906), mean over layers.
    """

    head_z_loss: float = 1e-5
    router_z_loss: float = 1e-3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise UserError(
                    f"ObjectiveConfig.{field.name} must not be negative, but it is {getattr(self, field.name)}"
                )


class TokenLosses(NamedTuple):
    """Per token, in nats: cross-entropy and squared log-partition of the head."""

    cross_entropy: Float[Array, "B S"]
    head_z: Float[Array, "B S"]


def token_losses(model: Transformer, hidden: Float[Array, "B S D"], targets: Int[Array, "B S"]) -> TokenLosses:
    """Losses of predicting `targets` from the final hidden states."""

    unembed = model.unembedding(hidden.dtype)

    def piece(hidden, targets):
        logits = unembed(hidden)
        log_partition = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return TokenLosses(log_partition - target, jnp.square(log_partition))

    length = targets.shape[1]
    if length <= POSITIONS_AT_ONCE or length % POSITIONS_AT_ONCE:
        return piece(hidden, targets)

    def cut(a):
        return jnp.moveaxis(a.reshape(a.shape[0], -1, POSITIONS_AT_ONCE, *a.shape[2:]), 1, 0)

    pieces = jax.lax.map(lambda each: jax.checkpoint(piece)(*each), (cut(hidden), cut(targets)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(targets.shape), pieces)


def normalised(weights: Float[Array, "B S"]) -> Float[Array, "B S"]:
    """The weights divided by their sum; all zero if they are."""
    return weights / jnp.maximum(jnp.sum(weights), 1.0)


class LanguageModelling:
    """Next-token prediction of whatever text comes, as in pre-training and router tuning."""

    def __init__(self, config: ObjectiveConfig):
        self._config = config

    def weigh(self, batch: Batch) -> Weights:
        return {"text": normalised(batch.rows.weights)}

    def loss(self, model: Transformer, batch: Batch, weights: Weights):
        return language_modelling(model, batch.rows, weights["text"], self._config)[:2]


def language_modelling(
    model: Transformer, rows: Rows, weights: Float[Array, "B S"], config: ObjectiveConfig, **trace_options
):
    """The loss of predicting every token with its weight, with both z-losses.

    Returns:
      The loss; the cross-entropy as the metric "loss", in nats; per-token losses and the trace of the pass.
    """
    trace = model.trace(rows.inputs, rows.positions, rows.segments, **trace_options)
    losses = token_losses(model, trace.hidden, rows.targets)
    cross_entropy = jnp.sum(losses.cross_entropy * weights)
    loss = cross_entropy + config.head_z_loss * jnp.sum(losses.head_z * weights)
    if len(model.names) > 1:
        router_z = jnp.mean(jnp.square(jax.nn.logsumexp(trace.routing.logits, axis=-1)), axis=0)
        loss += config.router_z_loss * jnp.sum(router_z * weights)
    return loss, {"loss": cross_entropy}, (losses, trace)

"""What a job minimises.

Axis legend: `L` layers, `B` rows, `S` positions, `V` vocabulary, `E` experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexolmo_jax.data.packing import Rows
from flexolmo_jax.data.reading import Batch
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.transformer import Transformer
from flexolmo_jax.train.step import Weights
from flexolmo_jax.train.token_losses import token_losses


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
    losses = token_losses(trace.hidden, model.head_in(trace.hidden.dtype), rows.targets, config.head_z_loss)
    loss = jnp.sum(losses.total * weights)
    if len(model.names) > 1:
        router_z = jnp.mean(jnp.square(jax.nn.logsumexp(trace.routing.logits, axis=-1)), axis=0)
        loss += config.router_z_loss * jnp.sum(router_z * weights)
    return loss, {"loss": jnp.sum(losses.cross_entropy * weights)}, (losses, trace)

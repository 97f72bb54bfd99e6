"""What an owner minimises: predict its own text, and let everybody else's text alone.

Axis legend: `L` layers, `B` rows, `S` positions, `D` width, `E` = 2 experts, the public one and the owner's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexolmo_jax.data.reading import Batch
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.config import PUBLIC
from flexolmo_jax.model.router import Routing
from flexolmo_jax.model.transformer import Layers, Transformer
from flexolmo_jax.moe import each_expert
from flexolmo_jax.train.objective import ObjectiveConfig, language_modelling, normalised
from flexolmo_jax.train.step import Weights

OWN, FOREIGN, DECOY = range(3)
"""Where a row of a batch comes from: the owner's text, public text, or decoys (see `flexolmo_jax.data.decoys`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestraintConfig:
    """Weights of what keeps an expert to its own domain; all of it needs the owner's and public text only.

    Attributes:
      domain_loss: of the cross-entropy, per token and layer, between the router's preference (own expert or public one)
        and whether the text is the owner's. Owner's and other text weigh the same.
      stillness_loss: of the squared distance between the mix of both experts and the public one's output, relative to
        the latter's squared size, per token and layer, on text that is not the owner's: there nothing should change.
    """

    domain_loss: float = 1.0
    stillness_loss: float = 10.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise UserError(
                    f"RestraintConfig.{field.name} must not be negative, but it is {getattr(self, field.name)}"
                )


class ExpertTraining:
    """The objective of an expert job. With both restraints at zero and no public text it is the published recipe."""

    def __init__(self, name: str, objective: ObjectiveConfig, restraint: RestraintConfig):
        self._name = name
        self._objective = objective
        self._restraint = restraint

    def weigh(self, batch: Batch) -> Weights:
        """Decoys are not text to predict; own and other tokens have half of the router's weight each."""
        weights, source = batch.rows.weights, batch.source[:, None]
        own, foreign = weights * (source == OWN), weights * (source != OWN)
        return {
            "text": normalised(weights * (source != DECOY)),
            "own": normalised(own),
            "foreign": normalised(foreign),
        }

    def loss(self, model: Transformer, batch: Batch, weights: Weights):
        loss, metrics, (losses, trace) = language_modelling(
            model, batch.rows, weights["text"], self._objective, mix=self._mix
        )
        preference = trace.routing.logits[..., 1] - trace.routing.logits[..., 0]
        own, foreign = weights["own"], weights["foreign"]
        domain = jnp.mean(
            jnp.sum(jax.nn.softplus(-preference) * own + jax.nn.softplus(preference) * foreign, axis=(1, 2))
        )
        stillness = jnp.mean(jnp.sum(trace.measured * foreign, axis=(1, 2)))
        loss += self._restraint.domain_loss * domain / 2 + self._restraint.stillness_loss * stillness
        metrics |= {
            "own_loss": jnp.sum(losses.cross_entropy * own),
            "own_preferred": jnp.mean(jnp.sum((preference > 0) * own, axis=(1, 2))),
            "foreign_preferred": jnp.mean(jnp.sum((preference > 0) * foreign, axis=(1, 2))),
        }
        return loss, metrics

    def _mix(self, x: Float[Array, "B S D"], routing: Routing, layer: Layers) -> tuple[Array, Array]:
        """Mixes both experts densely, and measures how far the mix is from the public expert's output.

        Returns:
          The mix [B, S, D], and [B, S] the squared distance relative to the public output's squared size.
        """
        weights = [layer.experts[name].weights() for name in (PUBLIC, self._name)]
        public, mine = (y.reshape(x.shape) for y in each_expert(x.reshape(-1, x.shape[-1]), weights))
        mixed = routing.probabilities[..., :1] * public + routing.probabilities[..., 1:] * mine
        still = jax.lax.stop_gradient(public).astype(jnp.float32)
        moved = routing.probabilities[..., 1:] * (mine - still)
        distance = jnp.sum(jnp.square(moved), axis=-1) / (jnp.sum(jnp.square(still), axis=-1) + 1e-6)
        return mixed.astype(x.dtype), distance

"""Causal grouped-query attention with normalised queries and keys.

Axis legend: `B` rows, `S` positions, `D` width, `H` query heads, `G` key/value heads, `C` width of a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.model.config import ModelConfig
from flexolmo_jax.model.documents import attend_documents
from flexolmo_jax.model.norm import rms_norm
from flexolmo_jax.model.rotary import rotate
from flexolmo_jax.products import project


class KeyValues(NamedTuple):
    """Keys and values of one layer (or, with a leading axis, of all layers) for `S` cached positions."""

    keys: Float[Array, "*L B S G C"]
    values: Float[Array, "*L B S G C"]


class Attention(nnx.Module):
    """Attention weights, stacked over layers at rest and without the leading axis inside the scan over layers."""

    def __init__(self, config: ModelConfig, initialise):
        stacked = config.layers, config.width
        self.q = nnx.Param(initialise((*stacked, config.width)))
        self.k = nnx.Param(initialise((*stacked, config.kv_width)))
        self.v = nnx.Param(initialise((*stacked, config.kv_width)))
        self.o = nnx.Param(initialise((*stacked, config.width)))
        self.q_norm = nnx.Param(jnp.ones(stacked))
        self.k_norm = nnx.Param(jnp.ones((config.layers, config.kv_width)))
        self.config = config

    def project(self, x: Float[Array, "B S D"], angles) -> tuple[Array, KeyValues]:
        """Queries [B, S, H, C] and key-values [B, S, G, C], normalised over their whole width, then rotated."""
        config = self.config
        q, k, v = (project(x, w[...]) for w in (self.q, self.k, self.v))
        q = rms_norm(q, self.q_norm[...], config.norm_epsilon)
        k = rms_norm(k, self.k_norm[...], config.norm_epsilon)
        q, k, v = (a.reshape(*a.shape[:2], -1, config.head_width) for a in (q, k, v))
        return rotate(q, angles), KeyValues(rotate(k, angles), v)

    def attend_documents(self, q, own: KeyValues, segments: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Every position attends to those before it in its own document."""
        return self._project_out(attend_documents(q, own.keys, own.values, segments))

    def attend(self, q, cached: KeyValues, mask: Bool[Array, "B 1 S T"]) -> Float[Array, "B S D"]:
        return self._project_out(
            jax.nn.dot_product_attention(q, cached.keys.astype(q.dtype), cached.values.astype(q.dtype), mask=mask)
        )

    def _project_out(self, mixed: Float[Array, "B S H C"]) -> Float[Array, "B S D"]:
        return project(mixed.reshape(*mixed.shape[:2], -1), self.o[...])

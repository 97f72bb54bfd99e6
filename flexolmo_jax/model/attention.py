"""Causal grouped-query attention with normalised queries and keys.

Axis legend: `B` rows, `S` positions, `D` width, `H` query heads, `G` key/value heads, `C` width of a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.model.config import ModelConfig
from flexolmo_jax.model.norm import rms_norm
from flexolmo_jax.model.rotary import rotate


class KeyValues(NamedTuple):
    """Keys and values of one layer (or, with a leading axis, of all layers) for `S` cached positions."""

    keys: Float[Array, "*L B S G C"]
    values: Float[Array, "*L B S G C"]


QUERIES_AT_ONCE = 512
"""Longer rows are attended in blocks of so many queries, so that no block meets keys that come after all of it."""


def document_mask(segments: Int[Array, "B T"], begin: int) -> Bool[Array, "B 1 Q T"]:
    """True where a query, one of the positions from `begin` on, may look at a key.

    That is a key that is not later than itself, in the same document.
    """
    positions = jnp.arange(segments.shape[1])
    causal = positions[begin:, None] >= positions[None, :]
    same = segments[:, begin:, None] == segments[:, None, :]
    return (causal & same)[:, None]


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
        q, k, v = (x @ w[...].astype(x.dtype) for w in (self.q, self.k, self.v))
        q = rms_norm(q, self.q_norm[...], config.norm_epsilon)
        k = rms_norm(k, self.k_norm[...], config.norm_epsilon)
        q, k, v = (a.reshape(*a.shape[:2], -1, config.head_width) for a in (q, k, v))
        return rotate(q, angles), KeyValues(rotate(k, angles), v)

    def attend_documents(self, q, own: KeyValues, segments: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Every position attends to those before it in its own document.

        With `n` blocks of queries that takes `(n + 1) / 2n` of the products that all pairs of positions would.
        """
        length = segments.shape[1]
        block = length if length % QUERIES_AT_ONCE else QUERIES_AT_ONCE
        return jnp.concatenate(
            [
                self.attend(
                    q[:, end - block : end],
                    KeyValues(own.keys[:, :end], own.values[:, :end]),
                    document_mask(segments[:, :end], end - block),
                )
                for end in range(block, length + 1, block)
            ],
            axis=1,
        )

    def attend(self, q, cached: KeyValues, mask: Bool[Array, "B 1 S T"]) -> Float[Array, "B S D"]:
        mixed = jax.nn.dot_product_attention(q, cached.keys.astype(q.dtype), cached.values.astype(q.dtype), mask=mask)
        return mixed.reshape(*mixed.shape[:2], -1) @ self.o[...].astype(q.dtype)

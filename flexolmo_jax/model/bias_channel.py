"""The reserved residual channel that makes a router bias part of a router row.

Channel 0 of the embedding is 1 and both norms of every block give it nothing, so the residual stream is exactly 1
there in every layer, and `row[0] + min(bias, 0)` is the bias. Routers without a bias can then represent ours exactly.
"""

import jax.numpy as jnp

from flexolmo_jax.model.partition import flatten, unflatten

PINNED = {
    ("anchor", "embed"): 1.0,
    ("anchor", "attention_norm"): 0.0,
    ("anchor", "ffn_norm"): 0.0,
}


def pin(params: dict) -> dict:
    """The same parameters with channel 0 reserved."""
    flat = flatten(params)
    return unflatten({p: leaf.at[..., 0].set(PINNED[p]) if p in PINNED else leaf for p, leaf in flat.items()})


def is_pinned(params: dict) -> bool:
    """Whether channel 0 is reserved in these parameters."""
    flat = flatten(params)
    return all(bool(jnp.all(flat[path][..., 0] == value)) for path, value in PINNED.items())


def fold(row, bias):
    """The row [L, D] of a router without bias that acts like `row` with `bias` [L] on a pinned anchor."""
    return row.at[:, 0].add(jnp.minimum(bias, 0.0))

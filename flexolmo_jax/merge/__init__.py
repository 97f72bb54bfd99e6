"""Offline merging of an anchor and contributions."""

from flexolmo_jax.merge.concatenate import merge, revise

__all__ = ["merge", "revise"]

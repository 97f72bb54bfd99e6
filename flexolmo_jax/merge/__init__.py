"""Offline merging of an anchor and contributions."""

from flexolmo_jax.merge.average import btx, likelihood_weights, soup
from flexolmo_jax.merge.concatenate import merge, revise

__all__ = ["btx", "likelihood_weights", "merge", "revise", "soup"]

"""Loaded models: logits and text, with a choice of experts for every request."""

from flexolmo_jax.infer.language_model import LanguageModel, load, load_with_contribution

__all__ = ["LanguageModel", "load", "load_with_contribution"]

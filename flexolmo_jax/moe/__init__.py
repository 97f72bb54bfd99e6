"""One operation, `mix_experts`: send each token through its experts and mix what comes back."""

from flexolmo_jax.moe.api import FeedForward, mix_experts

__all__ = ["FeedForward", "mix_experts"]

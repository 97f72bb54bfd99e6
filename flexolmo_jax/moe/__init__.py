"""One operation, `mix_experts`: send each token through its experts and mix what comes back."""

from flexolmo_jax.moe.api import IMPLEMENTATIONS, FeedForward, each_expert, mix_experts
from flexolmo_jax.moe.choice import choose_implementation

__all__ = ["IMPLEMENTATIONS", "FeedForward", "choose_implementation", "each_expert", "mix_experts"]

"""Ahead-of-time plans: memory, work, traffic and time of a job on chips that are not here."""

from flexolmo_jax.plan.stage import plan

__all__ = ["plan"]

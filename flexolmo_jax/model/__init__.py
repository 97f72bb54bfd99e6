"""The model: OLMo 2 blocks with named experts, and the predicate that splits it into anchor, experts and router."""

from flexolmo_jax.model.config import PUBLIC, ModelConfig
from flexolmo_jax.model.transformer import InitialScales, Trace, Transformer, abstract_params, builder, initialise

__all__ = ["PUBLIC", "InitialScales", "ModelConfig", "Trace", "Transformer", "abstract_params", "builder", "initialise"]

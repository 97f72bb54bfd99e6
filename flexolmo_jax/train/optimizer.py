"""AdamW with warm-up and cosine decay, for the trainable part of a model alone."""

import dataclasses

import optax

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import flatten, is_matrix, unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW. The defaults are those of OLMo 2 and FlexOlmo; sizes differ in the learning rate.

    Attributes:
      learning_rate: peak, reached after the warm-up.
      warmup_steps: steps of linear warm-up from zero.
      final_fraction: learning rate at the last step as a fraction of the peak (cosine in between).
      weight_decay: decoupled decay of the matrices; norms, embeddings, router rows and biases are not decayed.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      clip_norm: largest global norm of the trainable parameters' gradient.
    """

    learning_rate: float
    warmup_steps: int
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise UserError(f"OptimizerConfig.learning_rate must be positive, but it is {self.learning_rate}")
        if self.clip_norm <= 0:
            raise UserError(f"OptimizerConfig.clip_norm must be positive, but it is {self.clip_norm}")

    def schedule(self, steps: int) -> optax.Schedule:
        """Learning rate of each of so many steps."""
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=min(self.warmup_steps, steps),
            decay_steps=max(steps, self.warmup_steps + 1),
            end_value=self.final_fraction * self.learning_rate,
        )

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a run of so many steps."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.schedule(steps),
                b1=self.beta1,
                b2=self.beta2,
                weight_decay=self.weight_decay,
                mask=lambda params: unflatten({path: is_matrix(path) for path in flatten(params)}),
            ),
        )

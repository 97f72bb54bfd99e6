"""Settings that every job shares."""

import dataclasses

import jax
import jax.numpy as jnp

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.transformer import REMAT_POLICIES
from flexolmo_jax.moe import choose_implementation
from flexolmo_jax.parallel import Layout

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long and on what batches a job trains, and how it computes.

    Attributes:
      steps: optimizer steps.
      batch_size: rows of a batch, over all devices.
      sequence_length: tokens of a row.
      seed: of initialisation and data order.
      accumulation: micro-batches that a batch is cut into, one after another.
      compute_dtype: "float32" or "bfloat16"; router, norms, softmax and the trained parameters stay float32.
      remat: name of the rematerialisation policy: "none", "dots" or "full".
      checkpoint_every: steps between checkpoints.
      log_every: steps between lines of metrics.
    """

    steps: int
    batch_size: int
    sequence_length: int
    seed: int = 0
    accumulation: int = 1
    compute_dtype: str = "float32"
    remat: str = "none"
    checkpoint_every: int = 1000
    log_every: int = 10

    def __post_init__(self):
        for field in ("steps", "batch_size", "sequence_length", "accumulation", "checkpoint_every", "log_every"):
            if getattr(self, field) < 1:
                raise UserError(f"RunConfig.{field} must be at least 1, but it is {getattr(self, field)}")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"RunConfig.accumulation is {self.accumulation}, which does not divide the batch size {self.batch_size}"
            )
        if self.compute_dtype not in DTYPES:
            raise UserError(f"RunConfig.compute_dtype is {self.compute_dtype!r}, but must be one of {sorted(DTYPES)}")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"RunConfig.remat is {self.remat!r}, but must be one of {sorted(REMAT_POLICIES)}")

    def implementation(self, experts: int, layout: Layout) -> str:
        """The implementation of `mix_experts` that a step runs, every token choosing all of so many experts."""
        tokens = self.batch_size // self.accumulation * self.sequence_length
        with jax.set_mesh(layout.mesh):
            return choose_implementation(tokens=tokens, top_k=experts, experts=experts, axes=dict(layout.mesh.shape))

    @property
    def model_options(self) -> dict:
        return {"compute_dtype": DTYPES[self.compute_dtype], "remat": self.remat}

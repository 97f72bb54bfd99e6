"""Settings that every job shares."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from flexolmo_jax.data.mixture import open_rows
from flexolmo_jax.data.packing import PACKINGS, TextRows
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
      packing: how documents become rows: "best_fit" packs them side by side, and none attends to another;
        "concatenate" joins and cuts them, as OLMo-core does.
      seed: of initialisation and data order.
      accumulation: micro-batches that a batch is cut into, one after another.
      compute_dtype: "float32" or "bfloat16"; router, norms, softmax and the trained parameters stay float32.
      remat: name of the rematerialisation policy: "none", "dots" or "full".
      checkpoint_every: steps between checkpoints.
      keep_latest: how many of the newest checkpoints stay.
      keep_every: besides, checkpoints at multiples of so many steps stay; None for no others.
      log_every: steps between lines of metrics.
    """

    steps: int
    batch_size: int
    sequence_length: int
    packing: str = "best_fit"
    seed: int = 0
    accumulation: int = 1
    compute_dtype: str = "float32"
    remat: str = "none"
    checkpoint_every: int = 1000
    keep_latest: int = 2
    keep_every: int | None = None
    log_every: int = 10

    def __post_init__(self):
        for field in ("steps", "batch_size", "sequence_length", "accumulation", "checkpoint_every", "log_every"):
            if getattr(self, field) < 1:
                raise UserError(f"RunConfig.{field} must be at least 1, but it is {getattr(self, field)}")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"RunConfig.accumulation is {self.accumulation}, which does not divide the batch size {self.batch_size}"
            )
        if self.packing not in PACKINGS:
            raise UserError(f"RunConfig.packing is {self.packing!r}, but must be one of {sorted(PACKINGS)}")
        if self.compute_dtype not in DTYPES:
            raise UserError(f"RunConfig.compute_dtype is {self.compute_dtype!r}, but must be one of {sorted(DTYPES)}")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"RunConfig.remat is {self.remat!r}, but must be one of {sorted(REMAT_POLICIES)}")

    def rows(self, prepared: Path, split: str) -> TextRows:
        """The rows of a split of a prepared text or mixture, packed for this run.

        Raises:
          UserError: there is no such text.
        """
        return open_rows(prepared, split, lambda documents: PACKINGS[self.packing](documents, self.sequence_length))

    def implementation(self, experts: int, layout: Layout, top_k: int | None = None) -> str:
        """The implementation of `mix_experts` that a step runs; `top_k` is all of the experts where it is not given."""
        tokens = self.batch_size // self.accumulation * self.sequence_length
        with layout.active():
            return choose_implementation(
                tokens=tokens, top_k=top_k or experts, experts=experts, axes=dict(layout.mesh.shape)
            )

    @property
    def model_options(self) -> dict:
        return {"compute_dtype": DTYPES[self.compute_dtype], "remat": self.remat}

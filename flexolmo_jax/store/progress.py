"""Checkpoints of a running job: what it trains, its optimizer state and the step, each complete or absent."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp


class Progress:
    """The checkpoints of one job in one directory; the newest two are kept."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(2),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None before the first."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def restore(self, state: Any) -> Any:
        """The newest checkpoint, with the structure, shapes and shardings of `state`."""
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        return self._checkpointer.load(self.latest(), abstract)

    def save(self, step: int, state: Any) -> None:
        """Begins to write a checkpoint; `close` waits for it."""
        self._checkpointer.save_async(step, state)

    def close(self) -> None:
        self._checkpointer.close()

"""Checkpoints of a running job: what it trains, its optimizer state and the step, each complete or absent."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from flexolmo_jax.errors import UserError
from flexolmo_jax.store.difference import differences, in_one_sentence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints of a job stay.

    Attributes:
      latest: how many of the newest.
      every: besides, those whose step is a multiple of this; None for no others.
    """

    latest: int
    every: int | None

    def __post_init__(self):
        if self.latest < 1:
            raise UserError(f"the latest {self.latest} checkpoints are to be kept, but it must be at least 1")
        if self.every is not None and self.every < 1:
            raise UserError(f"every {self.every} steps a checkpoint is to be kept, but it must be at least 1")

    def policy(self) -> Any:
        """The same in Orbax's words."""
        policies = ocp.training.preservation_policies
        newest = policies.LatestN(self.latest)
        return (
            newest if self.every is None else policies.AnyPreservationPolicy([newest, policies.EveryNSteps(self.every)])
        )


class Progress:
    """The checkpoints of one job in one directory."""

    def __init__(self, directory: Path, keep: Keep):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=keep.policy(),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None before the first."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def restore(self, state: Any) -> Any:
        """The newest checkpoint, with the structure, shapes and shardings of `state`, on whatever mesh it was saved.

        Raises:
          UserError: the checkpoint is of another structure, or of other shapes; names the paths that differ.
        """
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        step = self.latest()
        try:
            return self._checkpointer.load(step, abstract)
        except (ValueError, KeyError, TypeError) as error:
            found = _described(self._checkpointer.metadata(step).metadata)
            if phrases := differences(found, _described(abstract)):
                raise UserError(
                    f"the checkpoint of step {step} in {self._directory} does not fit this job: "
                    f"{in_one_sentence(phrases)}"
                ) from error
            raise

    def save(self, step: int, state: Any) -> None:
        """Begins to write a checkpoint; `close` waits for it."""
        self._checkpointer.save_async(step, state)

    def close(self) -> None:
        self._checkpointer.close()


def _described(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf by its path, for example `float32[4,2]`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in leaves
    }

"""What is to be prepared, and how."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from flexolmo_jax.data.runs import Unit
from flexolmo_jax.data.vocabularies import Vocabulary
from flexolmo_jax.errors import UserError


class Task(Protocol):
    """What is to be prepared."""

    @property
    def name(self) -> str: ...

    @property
    def where(self) -> str:
        """Where its text comes from, to be said to a person."""
        ...

    @property
    def bad_share(self) -> float:
        """Largest share of bad lines that is skipped."""
        ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    def units(self) -> Sequence[Unit]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """How text is prepared.

    Attributes:
      deduplicate: "exact" leaves out documents that occur again in their split; "near" leaves out also those that
        resemble another, and of twins in two splits keeps the held-out one; "none" keeps all.
      near_threshold: least share of common runs of five tokens that makes two documents near-duplicates.
      shard_tokens: tokens of a shard, about.
      workers: processes; 0 means one for every core, or threads of this one where there are few cores.
    """

    deduplicate: Literal["exact", "near", "none"] = "exact"
    near_threshold: float = 0.8
    shard_tokens: int = 2**25
    workers: int = 0

    def __post_init__(self):
        if not 0 < self.near_threshold <= 1:
            raise UserError(
                f"Preparation.near_threshold must be above 0 and at most 1, but it is {self.near_threshold}"
            )
        if self.shard_tokens < 1:
            raise UserError(f"Preparation.shard_tokens must be at least 1, but it is {self.shard_tokens}")
        if self.workers < 0:
            raise UserError(f"Preparation.workers must be at least 0, but it is {self.workers}")

    @property
    def decides(self) -> dict[str, Any]:
        """The settings that decide what comes out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "workers"}

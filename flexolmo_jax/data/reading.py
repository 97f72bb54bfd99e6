"""Batches of packed rows, read with Grain: row `i` of step `s` is a pure function of (seed, `s`, `i`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from flexolmo_jax.data.mixture import MixedRows
from flexolmo_jax.data.packing import Rows, RowSource

BATCHES_READ_AHEAD = 8

_STEPS = 2**62
"""Length of a dataset without an end."""


class Batch(NamedTuple):
    """A batch of packed rows, or the part of it that a process reads.

    Attributes:
      rows: each field [B, S].
      source: int32 [B], the number of the source that each row comes from.
    """

    rows: Rows
    source: Any


class Batches:
    """An endless sequence of batches: element `s` is the batch of step `s`.

    Nothing is remembered from one element to the next, so any process can read any rows of any step, in any order: the
    number of processes can change in the middle of a run.
    """

    def __init__(self, rows: grain.MapDataset, batch_size: int):
        self._rows, self._batch_size = rows, batch_size

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, step: int) -> Batch:
        return self.read(step, range(self._batch_size))

    def read(self, step: int, rows: Sequence[int]) -> Batch:
        """Some rows of the batch of a step, in the order given."""
        read = [self._rows[step * self._batch_size + row] for row in rows]
        return Batch(
            Rows(*(np.stack(field) for field in zip(*(row for row, _ in read), strict=True))),
            np.array([source for _, source in read], np.int32),
        )


def batches(sources: Mapping[int, RowSource], shares: Mapping[int, float], batch_size: int, seed: int) -> Batches:
    """Batches from several sources.

    Each source is reshuffled every time it has been read through. Over any window of rows the sources, and the parts of
    a source that is itself mixed, appear in exact proportion to their shares.

    Args:
      sources: rows, by the number that labels them in `Batch.source`.
      shares: share of each of them in the rows; they sum to one.
      batch_size: rows in a batch (B).
      seed: of the order.
    """
    endless, weights = [], []
    for number, share in shares.items():
        source = sources[number]
        parts = source.parts if isinstance(source, MixedRows) else ((source, 1.0),)
        for place, (rows, rate) in enumerate(parts):
            if share * rate > 0:
                labelled = grain.MapDataset.source(_Labelled(rows, number))
                endless.append(labelled.shuffle(seed=seed + number + 1000 * place).repeat())
                weights.append(share * rate)
    return Batches(grain.MapDataset.mix(endless, weights=weights), batch_size)


def read_from(batches: Batches, step: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
    """The batches of step `step`, `step + 1`, … read ahead in the background.

    Args:
      batches: what to read.
      step: where to begin.
      rows: the rows of each batch that this process needs; None means all.
    """
    source = batches if rows is None else _Part(batches, rows)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=BATCHES_READ_AHEAD)
    return iter(grain.MapDataset.source(source)[step:].to_iter_dataset(options))


class _Part:
    """The same rows of every batch."""

    def __init__(self, batches: Batches, rows: Sequence[int]):
        self._batches, self._rows = batches, rows

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Batch:
        return self._batches.read(step, self._rows)


class _Labelled:
    """Rows of a source together with its number."""

    def __init__(self, rows: RowSource, source: int):
        self._rows, self._source = rows, source

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Rows, int]:
        return self._rows[index], self._source

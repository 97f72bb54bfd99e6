"""Batches of packed rows, read with Grain: row `i` of step `s` is a pure function of (seed, `s`, `i`)."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from flexolmo_jax.data.packing import Rows

BATCHES_READ_AHEAD = 8


class Batch(NamedTuple):
    """A batch of packed rows.

    Attributes:
      rows: each field [B, S].
      source: int32 [B], the number of the source that each row comes from.
    """

    rows: Rows
    source: Any


class RowSource(Protocol):
    """Random access to packed rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Rows: ...


def batches(
    sources: Mapping[int, RowSource], shares: Mapping[int, float], batch_size: int, seed: int
) -> grain.MapDataset:
    """An endless dataset whose element `s` is the batch of step `s`.

    Each source is reshuffled every time it has been read through. Over any window of rows the sources appear in exact
    proportion to their shares.

    Args:
      sources: packed rows, by the number that labels them in `Batch.source`.
      shares: share of each of them in the rows; they sum to one.
      batch_size: rows in a batch (B).
      seed: of the order.
    """
    endless = [
        grain.MapDataset.source(_Labelled(sources[number], number)).shuffle(seed=seed + number).repeat()
        for number, share in shares.items()
        if share > 0
    ]
    mixed = grain.MapDataset.mix(endless, weights=[share for share in shares.values() if share > 0])
    return mixed.batch(batch_size)


def read_from(dataset: grain.MapDataset, step: int) -> Iterator[Batch]:
    """The batches of step `step`, `step + 1`, … read ahead in the background."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=BATCHES_READ_AHEAD)
    return iter(dataset[step:].to_iter_dataset(options))


class _Labelled:
    """Rows of a source together with its number."""

    def __init__(self, rows: RowSource, source: int):
        self._rows = rows
        self._source = np.int32(source)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        return Batch(self._rows[index], self._source)

"""Documents in rows of equal length: packed side by side, or joined and cut. Decided from their lengths alone."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from flexolmo_jax.data.files import replacing
from flexolmo_jax.data.tokens import PreparedShard, PreparedSplit, TokenShard, TokenSource, mapped


class Rows(NamedTuple):
    """Packed documents: NumPy arrays, or JAX arrays once they are on a device.

    A row holds `S + 1` tokens: inputs are the first `S`, targets the last `S`.

    Attributes:
      inputs: int32 [..., S] ids.
      targets: int32 [..., S] the id that follows each input.
      positions: int32 [..., S] position of each input in its document piece.
      segments: int32 [..., S] number of the piece in its row, from 1; 0 is padding.
      weights: float32 [..., S] 1 where input and target belong to the same piece, else 0.
    """

    inputs: Any
    targets: Any
    positions: Any
    segments: Any
    weights: Any


@runtime_checkable
class RowSource(Protocol):
    """Random access to rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Rows: ...


@runtime_checkable
class TextRows(RowSource, Protocol):
    """Rows of documents."""

    @property
    def padding(self) -> float:
        """Share of the rows' tokens that is padding."""
        ...


class Plan(NamedTuple):
    """Which piece of which document of a shard lies in which row.

    Attributes:
      ends: int64 [rows]; row `r` has the pieces from `ends[r - 1]` to `ends[r]`.
      pieces: uint32 [pieces, 3]: document, first token in it, tokens.
    """

    ends: np.ndarray
    pieces: np.ndarray


class Packing:
    """Random access to documents packed into rows, so that no document attends to another.

    Documents longer than a row are cut into pieces. Within a shard pieces fill rows by best fit, longest first, which
    leaves a few percent of padding at most for text; which piece lies where depends on the lengths alone. The plan of
    prepared text is kept beside its shards and mapped from there.
    """

    def __init__(self, documents: TokenSource, length: int):
        self._shards = documents.shards
        self._width = length + 1
        with _directory_of_plans(documents, self._width) as directory:
            self._plans = [_planned(shard, self._width, directory) for shard in self._shards]
        self._first = np.concatenate([[0], np.cumsum([len(plan.ends) for plan in self._plans], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._first[-1])

    @functools.cached_property
    def padding(self) -> float:
        """Share of the rows' tokens that is padding."""
        tokens = sum(int(plan.pieces[:, 2].sum(dtype=np.int64)) for plan in self._plans)
        return 1 - tokens / max(1, len(self) * self._width)

    def __getitem__(self, index: int) -> Rows:
        shard, row = _locate(self._first, index)
        plan, documents = self._plans[shard], self._shards[shard]
        first = int(plan.ends[row - 1]) if row else 0
        tokens = np.zeros(self._width, np.int32)
        positions = np.zeros(self._width, np.int32)
        segments = np.zeros(self._width, np.int32)
        count = _count_up(self._width)
        cursor = 0
        for number, (document, start, length) in enumerate(plan.pieces[first : int(plan.ends[row])].tolist(), 1):
            end = cursor + length
            tokens[cursor:end] = documents[document][start : start + length]
            positions[cursor:end] = count[:length]
            segments[cursor:end] = number
            cursor = end
        same = (segments[:-1] == segments[1:]) & (segments[:-1] > 0)
        return Rows(tokens[:-1], tokens[1:], positions[:-1], segments[:-1], same.astype(np.float32))


class Chunking:
    """Random access to documents joined one after another and cut into rows, as OLMo-core does: no padding.

    A row is one segment: documents in it attend to what stands before them. Row `i` of a shard holds its tokens from
    `i S` to `i S + S`, the last of which is also the next row's first, so that every token is a target once; what is
    left at a shard's end is dropped.

    Attributes:
      padding: share of the rows' tokens that is padding: 0.
    """

    padding = 0.0

    def __init__(self, documents: TokenSource, length: int):
        self._shards = documents.shards
        self._length = length
        self._offsets = [shard.offsets for shard in self._shards]
        rows = [max(0, int(offsets[-1]) - 1) // length for offsets in self._offsets]
        self._first = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Rows:
        shard, row = _locate(self._first, index)
        documents, offsets = self._shards[shard], self._offsets[shard]
        begin, end = row * self._length, (row + 1) * self._length + 1
        first, last = np.searchsorted(offsets, [begin, end - 1], "right") - 1
        joined = np.concatenate([documents[document] for document in range(first, last + 1)])
        start = begin - int(offsets[first])
        tokens = joined[start : start + self._length + 1].astype(np.int32)
        ones = np.ones(self._length, np.int32)
        return Rows(tokens[:-1], tokens[1:], _count_up(self._length).copy(), ones, ones.astype(np.float32))


PACKINGS: dict[str, Callable[[TokenSource, int], "Packing | Chunking"]] = {
    "best_fit": Packing,
    "concatenate": Chunking,
}
"""How documents become rows, by the name that a job gives it."""


def stack(rows: Sequence[Rows], count: int) -> Rows:
    """Exactly `count` rows one above the other; where there are fewer, rows of padding of weight zero fill up."""
    padding = Rows(*map(np.zeros_like, rows[0]))
    return Rows(*(np.stack(field) for field in zip(*rows, *[padding] * (count - len(rows)), strict=True)))


def spread(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced indices below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()


def sample_rows(rows: RowSource, count: int) -> Rows:
    """Exactly `count` evenly spaced rows, filled up with padding where there are fewer."""
    return stack([rows[index] for index in spread(len(rows), count)], count)


def best_fit(lengths: np.ndarray, width: int) -> Plan:
    """Packs documents of these lengths into rows of `width`.

    The longest piece goes first, each to the fullest row that still has room for it. Pieces of one token teach nothing
    and are left out.
    """
    lengths = np.asarray(lengths, np.int64)
    whole, rest = lengths // width, lengths % width
    documents = np.concatenate([np.repeat(np.arange(len(lengths)), whole), np.flatnonzero(rest > 1)])
    starts = np.concatenate([_count_each(whole) * width, (whole * width)[rest > 1]])
    sizes = np.concatenate([np.full(int(whole.sum()), width), rest[rest > 1]])
    order = np.argsort(-sizes, kind="stable")
    row_of = np.empty(len(sizes), np.int64)
    row_of[order] = _rows_by_best_fit(sizes[order].tolist(), width)
    # Within a row the pieces keep the order in which they were put there: longest first.
    placed = order[np.argsort(row_of[order], kind="stable")]
    pieces = np.stack([documents[placed], starts[placed], sizes[placed]], axis=1).astype(np.uint32)
    counts = np.bincount(row_of) if len(row_of) else np.zeros(0, np.int64)
    return Plan(np.cumsum(counts, dtype=np.int64), pieces)


def _rows_by_best_fit(sizes: list[int], width: int) -> list[int]:
    """The row of each piece, given longest first.

    Bit `r` of `rooms` is set where some row has room for just `r` more tokens, so the tightest fit is the lowest bit
    from the piece's size on.
    """
    with_room: list[list[int]] = [[] for _ in range(width + 1)]
    rooms = 0
    rows = 0
    placed = []
    for size in sizes:
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = width, rows
            rows += 1
        placed.append(row)
        left = room - size
        if left > 1:
            with_room[left].append(row)
            rooms |= 1 << left
    return placed


def _count_each(counts: np.ndarray) -> np.ndarray:
    """0, 1, … below each count, one after another."""
    total = int(counts.sum())
    return np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)


@functools.cache
def _count_up(width: int) -> np.ndarray:
    return np.arange(width, dtype=np.int32)


def _locate(first: np.ndarray, index: int) -> tuple[int, int]:
    """The shard of a row, and the row's number in it."""
    if not 0 <= index < first[-1]:
        raise IndexError(index)
    shard = int(np.searchsorted(first, index, "right")) - 1
    return shard, index - int(first[shard])


@contextlib.contextmanager
def _directory_of_plans(documents: TokenSource, width: int) -> Iterator[Path | None]:
    """Where plans are kept: beside the shards, or in a directory of this process's own if that cannot be written."""
    if not isinstance(documents, PreparedSplit):
        yield None
        return
    directory = documents.directory / "packing" / f"{documents.name}-{width}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
    except OSError:
        with tempfile.TemporaryDirectory() as own:
            yield Path(own)


def _planned(shard: TokenShard, width: int, directory: Path | None) -> Plan:
    """The plan of a shard, from its files where they are there already."""
    if directory is None or not isinstance(shard, PreparedShard):
        return best_fit(shard.lengths, width)
    ends, pieces = (directory / f"{shard.file.stem}.{part}.npy" for part in Plan._fields)
    if not ends.exists():
        plan = best_fit(shard.lengths, width)
        for file, values in ((pieces, plan.pieces), (ends, plan.ends)):
            with replacing(file) as partial, partial.open("wb") as opened:
                np.save(opened, values)
    return Plan(mapped(ends), mapped(pieces))

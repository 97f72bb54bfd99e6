"""Packing of documents into rows of equal length, decided from the documents' lengths alone."""

import itertools
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.data.prepare import Documents


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


class Packing:
    """Random access to the packed rows of a prepared split.

    Documents longer than a row are cut into pieces. Pieces fill rows first-fit in decreasing length, which leaves a few
    percent of padding at most for text; which piece lies where depends on the lengths alone.
    """

    def __init__(self, documents: Documents, length: int):
        self._documents = documents
        self._width = length + 1
        starts, lengths = _pieces(documents.offsets, self._width)
        self._starts, self._lengths = starts, lengths
        self._rows = _fit(lengths, self._width)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Rows:
        tokens = np.zeros(self._width, np.int32)
        positions = np.zeros(self._width, np.int32)
        segments = np.zeros(self._width, np.int32)
        cursor = 0
        for number, piece in enumerate(self._rows[index], 1):
            length = self._lengths[piece]
            here = slice(cursor, cursor + length)
            tokens[here] = self._documents.tokens[self._starts[piece] : self._starts[piece] + length]
            positions[here] = np.arange(length)
            segments[here] = number
            cursor += length
        same = (segments[:-1] == segments[1:]) & (segments[:-1] > 0)
        return Rows(tokens[:-1], tokens[1:], positions[:-1], segments[:-1], same.astype(np.float32))


def stack(rows: list[Rows], count: int) -> Rows:
    """Exactly `count` rows one above the other; where there are fewer, rows of padding of weight zero fill up."""
    padding = Rows(*map(np.zeros_like, rows[0]))
    return Rows(*(np.stack(field) for field in zip(*rows, *[padding] * (count - len(rows)), strict=True)))


def spread(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced indices below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()


def sample_rows(packing: Packing, count: int) -> Rows:
    """Exactly `count` evenly spaced rows, filled up with padding where there are fewer."""
    return stack([packing[index] for index in spread(len(packing), count)], count)


def _pieces(offsets: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of every document piece of at most `width` tokens; pieces of one token teach nothing."""
    starts, lengths = [], []
    for begin, end in itertools.pairwise(offsets):
        for start in range(begin, end, width):
            if (length := min(width, end - start)) > 1:
                starts.append(start)
                lengths.append(length)
    return np.array(starts, np.int64), np.array(lengths, np.int64)


def _fit(lengths: np.ndarray, width: int) -> list[list[int]]:
    """Best fit, longest piece first: each piece goes to the fullest row that still has room for it."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(width + 1)]
    for piece in np.argsort(-lengths, kind="stable"):
        length = int(lengths[piece])
        room = next((space for space in range(length, width + 1) if with_room[space]), None)
        if room is None:
            row, room = len(rows), width
            rows.append([])
        else:
            row = with_room[room].pop()
        rows[row].append(int(piece))
        with_room[room - length].append(row)
    return rows

"""safetensors files by byte range: reading a part of a tensor, and writing a file tensor by tensor.

The safetensors library maps whole files into memory and serialises from a dict of all tensors; a file of many gigabytes
must pass through here with one tensor in memory. The format: eight bytes of header length (little-endian), a JSON
header that gives every tensor's dtype, shape and offsets, and the tensors' bytes without gaps.
Source: https://github.com/huggingface/safetensors#format
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.store import strict_json
from flexolmo_jax.store.layout import WRITE_BYTES
from flexolmo_jax.store.stored import PIECE_BYTES

MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""Every dtype that a model of ours can have, by the format's name."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Slot(NamedTuple):
    """Where one tensor lies: its dtype's code and shape, and its first byte in the file."""

    code: str
    shape: tuple[int, ...]
    begin: int


class SafetensorsFile:
    """A file whose header was read and checked against its size, so that no read goes astray.

    It is opened anew for every read: a checkpoint may have more files than a process may hold open.

    Attributes:
      tensors: what the file holds, by name.
    """

    def __init__(self, file: Path):
        """Reads the header.

        Raises:
          UserError: the file cannot be read or is not a whole, well-formed safetensors file.
        """
        self._file = file
        with self._opened() as descriptor:
            self._state = _state(descriptor)
            self.tensors = self._read_header(descriptor)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor.

        Raises:
          UserError: it is not a dtype that models of ours have.
        """
        code = self.tensors[name].code
        if code not in DTYPES:
            raise UserError(f"{self._file} holds {name} as {code}, but only {', '.join(DTYPES)} can be read")
        return DTYPES[code]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a tensor, by their byte range; all rows without `stop`.

        Raises:
          UserError: the file was changed since its header was read.
        """
        slot, dtype = self.tensors[name], self.dtype(name)
        shape = slot.shape if stop is None else (stop - start, *slot.shape[1:])
        row_bytes = dtype.itemsize * math.prod(slot.shape[1:])
        part = np.empty(shape, dtype)
        view = part.reshape(-1).view(np.uint8).data
        offset = slot.begin + (start * row_bytes if stop is not None else 0)
        with self._opened() as descriptor:
            while view and _state(descriptor) == self._state:
                count = os.preadv(descriptor, [view], offset)
                view, offset = view[count:], offset + count
        if view:
            raise UserError(f"{self._file} was changed while {name} was read from it")
        return part

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self._file, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {self._file}: {error.strerror}") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _read_header(self, descriptor: int) -> dict[str, Slot]:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise self._malformed(f"its first bytes announce a header of {length:,} bytes in a file of {size:,}")
        try:
            header = strict_json.loads(os.pread(descriptor, length, 8))
        except (ValueError, RecursionError) as error:
            raise self._malformed(f"its header cannot be read: {error}") from error
        if not isinstance(header, dict):
            raise self._malformed("its header is not an object")
        header.pop("__metadata__", None)
        slots, ends = {}, []
        for name, entry in header.items():
            try:
                slots[name], end = _slot(entry, 8 + length)
            except (KeyError, TypeError, ValueError) as error:
                raise self._malformed(f"its header is wrong about {name[:200]!r}") from error
            ends.append((slots[name].begin, end))
        reached = 8 + length
        for begin, end in sorted(ends):
            if begin != reached:
                raise self._malformed("its tensors overlap or leave gaps")
            reached = end
        if reached != size:
            raise self._malformed(f"it has {size:,} bytes, but its header describes {reached:,}")
        return slots

    def _malformed(self, reason: str) -> UserError:
        return UserError(f"{self._file} is not a whole safetensors file: {reason}")


def header_bytes(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a file that holds these tensors in this order."""
    # Transformers refuses files that do not say which framework's layout they follow.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def write(
    file: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], contents: Iterator[np.ndarray]
) -> dict[str, Any]:
    """Writes a file; `contents` yields the tensors in order. Returns its size in bytes and its SHA-256."""
    running = hashlib.sha256()
    with file.open("wb", buffering=0) as target, ThreadPoolExecutor(1) as thread:

        def put(data: Any) -> None:
            view = memoryview(data)
            while view:  # Piece by piece, so that the cache holds what is written and digested at once.
                piece, view = view[:PIECE_BYTES], view[PIECE_BYTES:]
                pending = thread.submit(running.update, piece)
                while piece:
                    piece = piece[target.write(piece[:WRITE_BYTES]) :]
                pending.result()

        put(header_bytes(tensors))
        for (dtype, shape), content in zip(tensors.values(), contents, strict=True):
            if content.dtype != dtype or content.shape != shape:
                raise ValueError(f"announced {dtype} {shape}, got {content.dtype} {content.shape}")
            put(np.asarray(content, order="C").reshape(-1).view(np.uint8).data)
        return {"bytes": target.tell(), "sha256": running.hexdigest()}


def digest(file: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as `write` returns them."""
    with file.open("rb") as source:
        sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        return {"bytes": source.tell(), "sha256": sha256}


def _state(descriptor: int) -> tuple[int, int, int]:
    """What tells a file from another, or from itself after a change."""
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _slot(entry: Mapping[str, Any], first: int) -> tuple[Slot, int]:
    """The tensor that a header's entry describes, and the byte after it.

    Raises:
      KeyError, TypeError, ValueError: the entry is malformed or contradicts itself.
    """
    code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or not isinstance(code, str):
        raise ValueError
    if code in DTYPES and end - begin != DTYPES[code].itemsize * math.prod(shape):
        raise ValueError
    if end < begin:
        raise ValueError
    return Slot(code, shape, first + begin), first + end

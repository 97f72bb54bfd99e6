"""How one leaf lies on disk: a Zarr directory whose files, in order, are the leaf's bytes and nothing else.

    state/experts.math.gate/zarr.json      shape, dtype, and that the chunks are plain little-endian bytes
    state/experts.math.gate/c/7/0/0        layer 7

So `cat` of the files gives what the manifest's SHA-256 is of, a merge copies a leaf without decoding it, and every
file's name and size follow from shape and dtype: a leaf from a stranger is checked before a byte of it is read.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import LeafPath
from flexolmo_jax.store import strict_json

CHUNK_BYTES = 64 * 2**20
"""Largest piece of a leaf in one file. A leaf that is stacked over layers has at least one file per layer."""

WRITE_BYTES = 2**18
"""Most that one call writes. Linux keeps larger writes to ext4 in larger pieces of its cache (seen with 6.18), which it
first has to find: a gigabyte took 2.5 seconds of system time in calls of 4 MiB, 0.3 in calls of 256 KiB."""

DTYPES = ("float32", "bfloat16", "float16")
"""What a leaf may be made of."""

STATE = "state"
"""Where, within a checkpoint, Orbax puts the Zarr directories of a tree that it was given without a name."""

METADATA, CHUNKS = "zarr.json", "c"
_NOT_STACKED = ("embed", "head", "final_norm")
_LARGEST_METADATA = 16 * 2**10
_DEEPEST = 8
_SHARD_INDEX_BYTES = 20
"""What format version 1 has at the end of each file: the offset and size of the data, and a checksum of the two."""


def is_stacked(path: LeafPath) -> bool:
    """Whether the first axis of a leaf is the layers."""
    return path[-1] not in _NOT_STACKED


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """Where the bytes of one leaf are.

    Attributes:
      path: of the leaf in the schema.
      shape: of the leaf.
      dtype: name of its dtype.
      format_version: of the artefact; version 1 appends an index to each file.
    """

    path: LeafPath
    shape: tuple[int, ...]
    dtype: str
    format_version: int = 2

    @property
    def name(self) -> str:
        """As a person writes it, and as the manifest does."""
        return "/".join(self.path)

    @property
    def directory(self) -> str:
        """Directory below `state/`."""
        return ".".join(self.path)

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(jnp.dtype(self.dtype))

    @property
    def itemsize(self) -> int:
        return self.numpy_dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of the piece in one file: whole rows of one layer, as many as evenly fit into `CHUNK_BYTES`."""
        lead = (1,) if is_stacked(self.path) and self.shape else ()
        rest = self.shape[len(lead) :]
        if not rest:
            return lead
        row_bytes = math.prod(rest[1:]) * self.itemsize
        most = max(1, CHUNK_BYTES // row_bytes)
        if rest[0] <= most:
            return (*lead, *rest)
        # A size without a divisor of use, such as a prime vocabulary, stays in one file rather than in thousands.
        rows = next((rows for rows in range(most, most // 8, -1) if rest[0] % rows == 0), rest[0])
        return (*lead, rows, *rest[1:])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the leaf in one file."""
        return math.prod(self.chunk_shape) * self.itemsize

    @property
    def file_bytes(self) -> int:
        """Size of one file."""
        return self.chunk_bytes + (_SHARD_INDEX_BYTES if self.format_version == 1 else 0)

    def files(self) -> Iterator[str]:
        """The files below the leaf's directory, in the order of the bytes that they hold."""
        grid = [range(size // chunk) for size, chunk in zip(self.shape, self.chunk_shape, strict=True)]
        for index in itertools.product(*grid):
            yield "/".join((CHUNKS, *map(str, index)))

    def metadata(self) -> dict[str, Any]:
        """What its `zarr.json` says."""
        codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if self.format_version == 1:
            checked = [*codecs, {"name": "crc32c"}]
            inner = {"chunk_shape": list(self.chunk_shape), "codecs": codecs, "index_codecs": checked}
            codecs = [{"name": "sharding_indexed", "configuration": inner}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": codecs,
            "fill_value": 0.0,
        }

    def write(self, state: Path, blocks: Iterable[np.ndarray]) -> str:
        """Writes the leaf below `state` and returns the SHA-256 of its bytes.

        Args:
          state: directory of the tree.
          blocks: the leaf's bytes in order (uint8), cut anywhere.
        """
        digest = hashlib.sha256()

        def digested(thread: ThreadPoolExecutor):
            for block in blocks:  # Its digest is taken while the caller writes it.
                pending = thread.submit(digest.update, block.data)
                yield block
                pending.result()

        with ThreadPoolExecutor(1) as thread:
            self.write_known(state, digested(thread))
        return digest.hexdigest()

    def write_known(self, state: Path, blocks: Iterable[np.ndarray]) -> None:
        """The same for bytes whose digest is known, such as those of a leaf that is verified while it is read."""
        pieces = (block.data for block in blocks)
        piece = memoryview(b"")
        directory = state / self.directory
        directory.mkdir()
        for name in self.files():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            with open(directory / name, "xb", buffering=0) as file:
                left = self.chunk_bytes
                while left:
                    piece = piece or next(pieces)
                    written = file.write(piece[: min(left, WRITE_BYTES)])
                    piece, left = piece[written:], left - written
        if piece or next(pieces, None) is not None:
            raise ValueError(f"{self.name} was given more than {self.nbytes} bytes")
        self.write_metadata(directory)

    def write_metadata(self, directory: Path) -> None:
        """Writes the `zarr.json` into the leaf's directory."""
        (directory / METADATA).write_text(json.dumps(self.metadata(), sort_keys=True))

    def check(self, state: Path) -> None:
        """Raises UserError unless `state` holds exactly the files of this leaf; reads none but `zarr.json`."""
        directory = state / self.directory
        lacking = dict.fromkeys(self.files(), self.file_bytes)
        described = False
        for file, status in regular_files(directory):
            if file == METADATA:
                self._check_metadata(directory / file, status)
                described = True
            elif file not in lacking:
                raise UserError(f"{directory} holds {ascii(file)[:80]}, which is no part of an array")
            elif status.st_size != lacking[file]:
                raise UserError(f"{directory / file} has {status.st_size:,} bytes, not {lacking[file]:,}: truncated?")
            else:
                del lacking[file]
        if lacking or not described:
            raise UserError(f"{directory} lacks {next(iter(lacking), METADATA)}: a part of {self.name} is missing")

    def blocks(self, state: Path, buffer: np.ndarray) -> Iterator[np.ndarray]:
        """The leaf's bytes in order, piece by piece in `buffer` (uint8 [N]), which the next piece overwrites."""
        directory = state / self.directory
        for name in self.files():
            with _opened(directory / name) as file:
                left = self.chunk_bytes
                while left:
                    block = buffer[:left]
                    _fill(file, block.data)
                    left -= len(block)
                    yield block

    def read_layer(self, state: Path, layer: int) -> np.ndarray:
        """One layer of a leaf that is stacked over layers."""
        one = np.empty(self.shape[1:], self.numpy_dtype)
        flat = one.reshape(-1).view(np.uint8)
        per_layer = math.prod(self.shape[1:]) * self.itemsize // self.chunk_bytes
        for number, name in enumerate(itertools.islice(self.files(), layer * per_layer, (layer + 1) * per_layer)):
            with _opened(state / self.directory / name) as file:
                _fill(file, flat[number * self.chunk_bytes : (number + 1) * self.chunk_bytes].data)
        return one

    def _check_metadata(self, file: Path, status: os.stat_result) -> None:
        try:
            found = strict_json.loads(file.read_bytes()) if status.st_size <= _LARGEST_METADATA else None
        except (ValueError, RecursionError):
            found = None
        if found is None or json.dumps(found, sort_keys=True) != json.dumps(self.metadata(), sort_keys=True):
            raise UserError(f"{file} does not describe a {self.dtype} array of shape {list(self.shape)} as ours does")


def regular_files(directory: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Every file below a directory with its status, by its path within.

    Raises:
      UserError: the directory is missing, nested deeper than any of ours, or holds a symbolic link, a device or
        anything else that is no plain file.
    """
    if prefix.count("/") > _DEEPEST:
        raise UserError(f"{directory} is nested deeper than an array is")
    try:
        entries = os.scandir(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from error
    with entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield from regular_files(directory / entry.name, f"{name}/")
            elif stat.S_ISREG(status.st_mode):
                yield name, status
            else:
                raise UserError(f"{directory} holds {ascii(entry.name)[:80]}, which is a link or no plain file")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A plain file to read, as it was when it was checked: no link is followed, and no pipe is waited for."""
    try:
        with open(path, "rb", buffering=0, opener=_without_following_links) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _without_following_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _fill(file: BinaryIO, view: memoryview) -> None:
    while view:
        read = file.readinto(view)  # type: ignore[attr-defined]
        if not read:
            raise UserError(f"{file.name} ends too early: it was truncated")
        view = view[read:]

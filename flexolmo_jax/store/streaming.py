"""Writing the arrays of a model leaf by leaf and layer by layer, so that host memory never holds a whole leaf.

Orbax writes what makes a directory a checkpoint; tensorstore writes the leaves into it, one file per layer.
"""

import hashlib
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import LeafPath, unflatten
from flexolmo_jax.store import arrays

_UNSYNCED = tensorstore.Context({"file_io_sync": False})
"""A half-written directory never takes its final name, so waiting for the disk at every file protects nothing."""


def create_checkpoint(directory: Path, paths: Iterable[LeafPath]) -> None:
    """Writes an Orbax checkpoint that lists leaves at these paths; `LeafWriter` then fills them one by one."""
    arrays.save(directory, unflatten({path: np.zeros(1, np.float32) for path in paths}))
    for path in paths:
        shutil.rmtree(arrays.leaf_directory(directory, path))


class LeafWriter:
    """Writes one leaf of a checkpoint that `create_checkpoint` made, its layers in order, and digests it on the way."""

    def __init__(self, directory: Path, path: LeafPath, shape: tuple[int, ...], dtype: np.dtype):
        """Creates the leaf, in place of whatever an interrupted run left of it."""
        self._described = {"shape": list(shape), "dtype": dtype.name}
        self._stacked = arrays.is_stacked(path)
        self._hash = hashlib.sha256()
        self._pending: list[Any] = []
        self._where = arrays.leaf_directory(directory, path)
        shutil.rmtree(self._where, ignore_errors=True)
        chunk = _chunk(shape, dtype.itemsize, stacked=self._stacked)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self._where.absolute()}/"},
            "metadata": {
                "shape": shape,
                "data_type": dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                # A reader takes a missing file for damage, so even a chunk of zeros has one.
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
            "store_data_equal_to_fill_value": True,
        }
        try:
            self._leaf = tensorstore.open(spec, create=True, context=_UNSYNCED).result()
        except (ValueError, OSError) as error:
            raise UserError(f"cannot write {self._where}: {str(error).splitlines()[0][:200]}") from error

    def append(self, part: np.ndarray) -> None:
        """Writes the next layer, or a leaf that is not stacked as a whole. `part` must not change afterwards."""
        index = len(self._pending)
        target = self._leaf[index] if self._stacked else self._leaf
        part = np.asarray(part, order="C")
        self._pending.append(target.write(part, can_reference_source_data_indefinitely=True))
        self._hash.update(part.reshape(-1).view(np.uint8).data)
        if index:
            self._wait(index - 1)

    def close(self) -> dict[str, Any]:
        """Waits until all is written; returns the leaf's shape, dtype and SHA-256 as `arrays.digests` does."""
        self._wait(len(self._pending) - 1)
        return self._described | {"sha256": self._hash.hexdigest()}

    def _wait(self, index: int) -> None:
        try:
            self._pending[index].result()
        except (ValueError, OSError) as error:
            raise UserError(f"cannot write {self._where}: {str(error).splitlines()[0][:200]}") from error
        self._pending[index] = None


def digest(leaf: tensorstore.TensorStore, path: LeafPath) -> str:
    """SHA-256 of a leaf on disk, as `arrays.digests` has it, read layer by layer."""
    running = hashlib.sha256()
    for part in range(leaf.shape[0]) if arrays.is_stacked(path) else [...]:
        array = np.asarray(arrays.read(leaf[part]), order="C")
        running.update(array.reshape(-1).view(np.uint8).data)
    return running.hexdigest()


def link_leaves(source: Path, target: Path, paths: Iterable[LeafPath]) -> None:
    """Puts leaves of one checkpoint into another: as links to the same files, or copies where those are impossible."""
    for path in paths:
        shutil.copytree(
            arrays.leaf_directory(source, path), arrays.leaf_directory(target, path), copy_function=_link_or_copy
        )


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _chunk(shape: tuple[int, ...], itemsize: int, *, stacked: bool) -> list[int]:
    """Shape of the part of a leaf in one file: a layer, cut along its first axis where it is too large."""
    chunk = list(shape)
    if stacked:
        chunk[0] = 1
    axis = int(stacked)
    if axis < len(chunk):
        rest = itemsize * math.prod(chunk) // chunk[axis]
        chunk[axis] = min(chunk[axis], max(1, arrays.CHUNK_BYTES // rest))
    return chunk

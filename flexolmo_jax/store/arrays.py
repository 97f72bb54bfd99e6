"""Arrays on disk: Orbax checkpoints with one Zarr directory per leaf, so that a part can be read or copied alone."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import LeafPath, Predicate, flatten, select, unflatten

CHUNK_BYTES = 64 * 2**20
"""Largest piece of a leaf in one file. A leaf that is stacked over layers has at least one file per layer."""

_NOT_STACKED = ("embed", "head", "final_norm")

logging.getLogger("absl").addFilter(
    # Orbax warns about what it does by itself with a checkpoint of one directory per leaf, at every read and write.
    lambda record: (
        not str(record.msg).startswith(("TensorStore data files not found", "[process=%s][thread=%s] Skipping"))
    )
)

_ITEM = "state"
"""Where, within a checkpoint, Orbax puts the Zarr directories of a tree that it was given without a name."""


def save(directory: Path, params: Mapping[str, Any]) -> None:
    """Writes a nested dict of arrays as an Orbax checkpoint, uncompressed, without timing or sharding sidecars."""
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = False
    saving.use_compression = False
    saving.enable_write_sharding_file = False
    saving.array_metadata_store = None
    saving.scoped_storage_options_creator = _chunking
    with context:
        ocp.save(directory.absolute(), dict(params))


def shapes(directory: Path) -> dict[str, Any]:
    """Nested dict of `jax.ShapeDtypeStruct` of every leaf, without reading any array.

    Raises:
      UserError: the directory is not a complete checkpoint.
    """
    if not ocp.is_orbax_checkpoint(directory.absolute()):
        raise UserError(f"{directory} is not a complete Orbax checkpoint")
    metadata = ocp.metadata(directory.absolute()).metadata
    if metadata is None:  # So Orbax answers where a leaf that the checkpoint lists is not there.
        raise UserError(f"{directory} cannot be read, a part of it is missing or damaged")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)


def load(directory: Path, predicate: Predicate = lambda path: True, *, shardings=None) -> dict[str, Any]:
    """Reads the leaves that satisfy the predicate, and nothing else.

    Raises:
      UserError: a part of it is missing or damaged.

    Args:
      directory: an Orbax checkpoint.
      predicate: which paths to read.
      shardings: function from a path and a `jax.ShapeDtypeStruct` to the sharding to read that leaf into; without it,
        leaves come back as NumPy arrays in host memory.
    """
    wanted = flatten(select(shapes(directory), predicate))
    if shardings is None:
        target: dict[LeafPath, Any] = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in wanted.items()}
    else:
        target = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings(path, leaf))
            for path, leaf in wanted.items()
        }
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return ocp.load(directory.absolute(), unflatten(target))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{directory} cannot be read, a part of it is missing or damaged: {_first_line(error)}"
        ) from error


def open_leaves(directory: Path) -> dict[LeafPath, tensorstore.TensorStore]:
    """Every leaf by its path, opened but not read: `leaf[layer].read().result()` reads that layer and nothing else.

    Raises:
      UserError: the directory is not a complete checkpoint, or a leaf is missing.
    """

    return {path: open_leaf(directory, path) for path in flatten(shapes(directory))}


def open_leaf(directory: Path, path: LeafPath) -> tensorstore.TensorStore:
    """One leaf, opened but not read.

    Raises:
      UserError: it is missing or damaged.
    """
    where = f"{leaf_directory(directory.absolute(), path)}/"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": where}}
    try:
        # A missing file shall be an error of its reader, not zeros.
        return tensorstore.open(spec | {"fill_missing_data_reads": False}, read=True).result()
    except ValueError as error:
        raise UserError(f"{directory} cannot be read, {'/'.join(path)} is missing or damaged") from error


def read(leaf: tensorstore.TensorStore) -> np.ndarray:
    """What an opened leaf, or a part of one, holds.

    Raises:
      UserError: a file of it is missing or damaged.
    """
    try:
        return np.asarray(leaf.read().result())
    except (ValueError, OSError) as error:
        where = leaf.kvstore.path if leaf.kvstore is not None else "an array"
        raise UserError(f"{where} cannot be read, a part of it is missing or damaged") from error


def leaf_directory(directory: Path, path: LeafPath) -> Path:
    """Where, within a checkpoint, the files of one leaf are."""
    return directory / _ITEM / ".".join(path)


def is_stacked(path: LeafPath) -> bool:
    """Whether the leaf's first axis is the layers."""
    return path[-1] not in _NOT_STACKED


def digests(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and SHA-256 (of the little-endian bytes in C order) of every leaf, by its path joined with '/'."""
    described = {}
    for path, leaf in flatten(params).items():
        array = np.ascontiguousarray(leaf)
        digest = hashlib.sha256(array.view(np.uint8).data if array.ndim else array.tobytes()).hexdigest()
        described["/".join(path)] = {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest}
    return described


def fingerprint(described: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 of what `digests` returns: equal exactly if every leaf is bit-identical."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _chunking(path, _value):
    options = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES)
    if is_stacked(tuple(key.key for key in path)):
        options.shard_axes = (0,)
    return options


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]

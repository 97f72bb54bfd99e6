"""Arrays on disk: Orbax checkpoints with one Zarr directory per leaf, so that a part can be read or copied alone."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import LeafPath, Predicate, flatten, select, unflatten
from flexolmo_jax.store.layout import STATE, LeafLayout

logging.getLogger("absl").addFilter(
    # Orbax warns about what it does by itself with a checkpoint of one directory per leaf, at every read and write.
    lambda record: (
        not str(record.msg).startswith(("TensorStore data files not found", "[process=%s][thread=%s] Skipping"))
    )
)

_CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
_PLACE_OF_WRITING = "commit_success.txt"

SIDECARS = (_CHECKPOINT_METADATA, "orbax.checkpoint", f"{STATE}/_METADATA")
"""What Orbax puts beside the leaves."""

SIDECARS_OF_VERSION_1 = (_PLACE_OF_WRITING,)
"""What it also puts there and we leave away."""


def save(directory: Path, params: Mapping[str, Any]) -> None:
    """Writes a nested dict of arrays as an Orbax checkpoint whose bytes follow from the arrays alone."""
    leaves = flatten(params)
    outline(directory, leaves)
    for path, leaf in leaves.items():
        layout = LeafLayout(path, tuple(leaf.shape), leaf.dtype.name)
        slabs = leaf if len(layout.chunk_shape) > 1 and layout.chunk_shape[0] == 1 else [leaf]
        layout.write(directory / STATE, (_bytes(np.asarray(slab)) for slab in slabs))


def outline(directory: Path, paths: Iterable[LeafPath]) -> None:
    """Writes a checkpoint with these leaves but without their Zarr directories, which are still to be filled in.

    Orbax notes the times and the place of writing; neither is anybody's business, and the same arrays shall give the
    same bytes.
    """
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = False
    saving.enable_write_sharding_file = False
    saving.array_metadata_store = None
    with context:
        ocp.save(directory.absolute(), unflatten({path: np.zeros(()) for path in paths}))
    for path in paths:
        shutil.rmtree(directory / STATE / ".".join(path))
    (directory / _PLACE_OF_WRITING).unlink(missing_ok=True)
    noted = json.loads((directory / _CHECKPOINT_METADATA).read_text())
    timeless = {key: 0 if key.endswith("_timestamp_nsecs") else value for key, value in noted.items()}
    (directory / _CHECKPOINT_METADATA).write_text(json.dumps(timeless, sort_keys=True))


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


def open_leaf(directory: Path, path: LeafPath) -> tensorstore.TensorStore:
    """One leaf, opened but not read.

    Raises:
      UserError: it is missing or damaged.
    """
    where = f"{directory.absolute()}/{STATE}/{'.'.join(path)}/"
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


def digests(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and SHA-256 (of the little-endian bytes in C order) of every leaf, by its path joined with '/'."""
    return {
        "/".join(path): describe(tuple(leaf.shape), leaf.dtype.name, hashlib.sha256(_bytes(np.asarray(leaf)).data))
        for path, leaf in flatten(params).items()
    }


def describe(shape: tuple[int, ...], dtype: str, sha256: Any) -> dict[str, Any]:
    """What a manifest says of one leaf; `sha256` is a hash object or its hexadecimal digest."""
    digest = sha256 if isinstance(sha256, str) else sha256.hexdigest()
    return {"shape": list(shape), "dtype": dtype, "sha256": digest}


def fingerprint(described: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 of what `digests` returns: equal exactly if every leaf is bit-identical."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _bytes(array: np.ndarray) -> np.ndarray:
    """The array's bytes in C order, as a vector."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]

"""The tensors of an export: what each is made of, which file it goes to, and writing the files one tensor at a time."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexolmo_jax.hf import safetensors_file
from flexolmo_jax.hf.matrices import cast, transposed
from flexolmo_jax.hf.names import Piece
from flexolmo_jax.hf.shards import INDEX, SINGLE_FILE
from flexolmo_jax.model.partition import LeafPath
from flexolmo_jax.store.resumable import Parts
from flexolmo_jax.store.stored import StoredLeaf
from flexolmo_jax.terminal import Progress

Leaves = Mapping[LeafPath, StoredLeaf | np.ndarray]
"""The leaves of a model on disk, but for those that an export has to change."""

Tensors = Mapping[str, Sequence[Piece]]
"""The pieces of every tensor, by its name, in the order of the files."""

Announced = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""Dtype and shape of every tensor, in the same order."""


def is_tied(leaves: Leaves) -> bool:
    """Whether the head is the embedding, value by value; the first value tells it of almost every model that is not."""
    embed, head = leaves["anchor", "embed"], leaves["anchor", "head"]
    if not (isinstance(embed, StoredLeaf) and isinstance(head, StoredLeaf)) or embed.layout.dtype != head.layout.dtype:
        return False
    first = [next(leaf.layout.blocks(leaf.state, np.empty(leaf.layout.itemsize, np.uint8))) for leaf in (embed, head)]
    if first[0].tobytes() != first[1].tobytes():
        return False
    return np.array_equal(_bits(transposed(head.read())), _bits(embed.read()))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def announce(leaves: Leaves, group: Sequence[Piece], target: np.dtype | None) -> tuple[np.dtype, tuple[int, ...]]:
    """Dtype and shape of a tensor."""
    shape = _shape(leaves[group[0].path], group[0])
    if group[0].rows is not None:
        shape = (len(group), *shape)
    elif group[0].transposed:
        shape = shape[::-1]
    # Rows of several owners lie in one tensor; the widest dtype holds them all exactly.
    return target or np.dtype(jnp.result_type(*(_dtype(leaves[piece.path]) for piece in group))), shape


def widest(announced: Announced) -> str:
    """The dtype to load the model in: the widest of its matrices, whatever the few router rows are kept in."""
    return jnp.result_type(*(dtype for name, (dtype, _) in announced.items() if ".mlp.gate." not in name)).name


def cut_into_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names of the tensors in each file, in order."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_tensors(
    parts: Parts,
    leaves: Leaves,
    tensors: Tensors,
    announced: Announced,
    shards: Sequence[Sequence[str]],
) -> dict[str, str]:
    """Writes the shards that an interrupted run has not written yet, and the index; returns the shards' SHA-256."""
    directory = parts.directory
    placed: dict[str, str] = {}
    digests: dict[str, str] = {}
    total = sum(dtype.itemsize * math.prod(shape) for dtype, shape in announced.values())
    written = 0
    with Progress("export-hf, MB", total=megabytes(total)) as progress:
        for number, shard in enumerate(shards, start=1):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            placed |= dict.fromkeys(shard, name)
            noted = parts.earlier(name)
            if noted is None or not _is_written(directory / name, noted):
                described = {tensor: announced[tensor] for tensor in shard}
                contents = _contents(leaves, {tensor: tensors[tensor] for tensor in shard}, announced)
                noted = safetensors_file.write(directory / name, described, contents)
                parts.finish(name, noted)
            digests[name] = noted["sha256"]
            written += noted["bytes"]
            progress.update(megabytes(min(written, total)))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


def megabytes(count: int) -> int:
    """Bytes as whole megabytes, rounded up."""
    return -(-count // 10**6)


def _is_written(file: Path, noted: Mapping[str, Any]) -> bool:
    return file.is_file() and safetensors_file.digest(file) == noted


def _contents(leaves: Leaves, tensors: Tensors, announced: Announced) -> Iterator[np.ndarray]:
    """The tensors in order, the next one being read while the caller writes one."""
    groups = [(group, announced[name][0]) for name, group in tensors.items()]
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(_tensor, leaves, *groups[0])
        for following in (*groups[1:], None):
            tensor = pending.result()
            if following is not None:
                pending = reader.submit(_tensor, leaves, *following)
            yield tensor


def _tensor(leaves: Leaves, group: Sequence[Piece], dtype: np.dtype) -> np.ndarray:
    parts = [cast(_read(leaves[piece.path], piece), dtype) for piece in group]
    if group[0].rows is not None:
        return np.stack(parts)
    return transposed(parts[0]) if group[0].transposed else parts[0]


def _shape(leaf: StoredLeaf | np.ndarray, piece: Piece) -> tuple[int, ...]:
    """Shape of a piece of a leaf."""
    whole = leaf.layout.shape if isinstance(leaf, StoredLeaf) else leaf.shape
    return tuple(whole if piece.layer is None else whole[1:])


def _dtype(leaf: StoredLeaf | np.ndarray) -> np.dtype:
    return leaf.layout.numpy_dtype if isinstance(leaf, StoredLeaf) else leaf.dtype


def _read(leaf: StoredLeaf | np.ndarray, piece: Piece) -> np.ndarray:
    """A piece of a leaf."""
    if isinstance(leaf, np.ndarray):
        return leaf if piece.layer is None else np.asarray(leaf[piece.layer])
    return leaf.read() if piece.layer is None else leaf.read_layer(piece.layer)

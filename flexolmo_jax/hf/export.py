"""Writing a model as a Hugging Face directory that transformers and vLLM load with their own classes.

Nothing here imports torch or transformers. Tensors stream from the checkpoint shard by shard, so that host memory holds
one shard at a time.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from flexolmo_jax.data.vocabulary import EOS_ID, PAD_ID
from flexolmo_jax.errors import UserError
from flexolmo_jax.hf.config import to_hf
from flexolmo_jax.hf.names import Piece, dense_pieces, mixture_pieces
from flexolmo_jax.hf.tokenizer import write_tokenizer
from flexolmo_jax.model import bias_channel
from flexolmo_jax.model.partition import LeafPath, belongs_to_router, unflatten
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.directories import complete_directory, refuse_existing
from flexolmo_jax.store.manifest import Manifest, read

MAX_SHARD_BYTES = 2 * 2**30
"""Largest safetensors file, unless a single tensor is larger."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What an export wrote.

    Attributes:
      architecture: the transformers class that loads it.
      experts: its experts, in order.
      top_k: its experts per token.
      shards: number of safetensors files.
      tensor_bytes: size of all tensors.
      dropped_bias: largest size of a router bias that was left out; 0 if the export is exact.
    """

    architecture: str
    experts: tuple[str, ...]
    top_k: int
    shards: int
    tensor_bytes: int
    dropped_bias: float


def export_hf(
    checkpoint_directory: Path,
    out: Path,
    *,
    experts: Sequence[str] | None = None,
    top_k: int | None = None,
    drop_bias: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Export:
    """Writes an anchor or merged model as a Hugging Face directory.

    A model of one expert is dense and becomes an `Olmo2ForCausalLM`, any other a `FlexOlmoForCausalLM`. Hugging Face's
    router has no bias: ours is folded into the rows, exactly, through the bias channel of the anchor.

    Args:
      checkpoint_directory: directory of the model.
      out: directory to write; it appears complete or not at all.
      experts: names of the experts to include; None includes all. The order is always that of the model.
      top_k: experts per token; None takes the model's own, as far as so many experts are included.
      drop_bias: where the anchor has no bias channel, leave the router bias out instead of stopping.
      max_shard_bytes: largest safetensors file; a single larger tensor gets a file of its own.
      overwrite: whether an existing `out` is replaced.

    Raises:
      UserError: the model cannot be read, an expert is unknown, `top_k` does not fit, a bias would be lost, or `out`
        exists or cannot be written.
    """
    refuse_existing(out, overwrite=overwrite)
    manifest = read(checkpoint_directory, "anchor", "merged")
    checkpoint.check_leaves(checkpoint_directory, manifest)
    if manifest.tokenizer != "bytes":
        raise UserError(
            f"{checkpoint_directory} has the tokenizer {manifest.tokenizer!r}, but only 'bytes' can be exported"
        )
    names = _chosen(manifest, experts, checkpoint_directory)
    top_k = _check_top_k(manifest, names, top_k)
    leaves: dict[LeafPath, Any] = dict(arrays.open_leaves(checkpoint_directory / checkpoint.ARRAYS))
    dropped = 0.0
    if len(names) == 1:
        pieces = dense_pieces(manifest.model.layers, names[0])
    else:
        pieces = mixture_pieces(manifest.model.layers, names)
        dropped = _replace_rows(leaves, manifest, names, checkpoint_directory, drop_bias)
    tensors = {name: list(group) for name, group in itertools.groupby(pieces, lambda piece: piece.tensor)}
    sizes = {name: _bytes(leaves, group) for name, group in tensors.items()}
    shards = _shards(sizes, max_shard_bytes)
    content = to_hf(manifest.model, names, top_k, dtype=_dtype(leaves, tensors), eos=EOS_ID, pad=PAD_ID)
    with complete_directory(out, overwrite=overwrite) as partial:
        _write_json(partial / "config.json", content)
        _write_json(partial / "generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID})
        write_tokenizer(partial)
        try:
            _write_tensors(partial, leaves, tensors, shards, sum(sizes.values()))
        except SafetensorError as error:
            raise UserError(f"cannot write {out}: {error}") from error
    return Export(
        architecture=content["architectures"][0],
        experts=names,
        top_k=top_k,
        shards=len(shards),
        tensor_bytes=sum(sizes.values()),
        dropped_bias=dropped,
    )


def _chosen(manifest: Manifest, experts: Sequence[str] | None, directory: Path) -> tuple[str, ...]:
    if experts is None:
        return manifest.names
    if unknown := sorted(set(experts) - set(manifest.names)):
        raise UserError(f"{directory} has no expert {unknown[0]!r}; it has {', '.join(manifest.names)}")
    if not experts:
        raise UserError("at least one expert must be exported")
    return tuple(name for name in manifest.names if name in experts)


def _check_top_k(manifest: Manifest, names: Sequence[str], top_k: int | None) -> int:
    top_k = min(manifest.top_k, len(names)) if top_k is None else top_k
    if not 1 <= top_k <= len(names):
        raise UserError(f"top_k is {top_k}, but the exported model has {len(names)} experts")
    return top_k


def _replace_rows(
    leaves: dict[LeafPath, Any], manifest: Manifest, names: Sequence[str], directory: Path, drop_bias: bool
) -> float:
    """Puts rows that need no bias in place of the rows on disk; returns the largest bias that no row could take up."""
    biases = {name: _read(leaves["router", name, "bias"]) for name in names if ("router", name, "bias") in leaves}
    largest, owner = max(((-float(min(bias.min(), 0.0)), name) for name, bias in biases.items()), default=(0.0, ""))
    if largest == 0.0:
        return 0.0
    if not manifest.model.bias_channel:
        if not drop_bias:
            raise UserError(
                f"{directory} has a router bias of size up to {largest:.4g} (expert {owner!r}), which Hugging Face's "
                "router lacks and this anchor has no bias channel to fold into: give --drop-bias to leave it out"
            )
        return largest
    # A bias folded into a channel that is not exactly 1 would silently export another model.
    channel: dict[LeafPath, Any] = {
        path: _read(leaf[..., :1]) for path, leaf in leaves.items() if path in bias_channel.PINNED
    }
    if not bias_channel.is_pinned(unflatten(channel)):
        raise UserError(f"{directory} says that it reserves a bias channel, but channel 0 of its anchor is in use")
    for name, bias in biases.items():
        row = jnp.asarray(_read(leaves["router", name, "row"]))
        leaves["router", name, "row"] = np.asarray(bias_channel.fold(row, jnp.asarray(bias)))
    return 0.0


def _dtype(leaves: Mapping[LeafPath, Any], tensors: Mapping[str, Sequence[Piece]]) -> str:
    """The dtype to load the model in: the widest of its matrices, whatever the few router rows are kept in."""
    used = {group[0].path for group in tensors.values()}
    return jnp.result_type(*(_numpy_dtype(leaves[path]) for path in used if not belongs_to_router(path))).name


def _bytes(leaves: Mapping[LeafPath, Any], group: Sequence[Piece]) -> int:
    return sum(int(np.prod(part.shape)) * _numpy_dtype(part).itemsize for part in (_part(leaves, p) for p in group))


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
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


def _write_tensors(
    directory: Path,
    leaves: Mapping[LeafPath, Any],
    tensors: Mapping[str, Sequence[Piece]],
    shards: Sequence[Sequence[str]],
    total: int,
) -> None:
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Transformers refuses files that do not say which framework's layout they follow.
        save_file({name: _tensor(leaves, tensors[name]) for name in shard}, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _write_json(directory / "model.safetensors.index.json", index)


def _tensor(leaves: Mapping[LeafPath, Any], group: Sequence[Piece]) -> np.ndarray:
    parts = [_read(_part(leaves, piece)) for piece in group]
    # safetensors writes the buffer as it lies, so a transposed view must be copied.
    return (
        np.stack(parts)
        if group[0].row is not None
        else np.ascontiguousarray(parts[0].T if group[0].transposed else parts[0])
    )


def _part(leaves: Mapping[LeafPath, Any], piece: Piece) -> Any:
    """The piece of its leaf, not read yet."""
    leaf = leaves[piece.path]
    return leaf if piece.layer is None else leaf[piece.layer]


def _read(leaf: Any) -> np.ndarray:
    if isinstance(leaf, np.ndarray):
        return leaf
    try:
        return leaf.read().result()
    except (ValueError, OSError) as error:
        where = leaf.kvstore.path
        raise UserError(f"{where} cannot be read, a part of it is missing or damaged") from error


def _numpy_dtype(leaf: Any) -> np.dtype:
    return leaf.dtype if isinstance(leaf, np.ndarray) else leaf.dtype.numpy_dtype


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")

"""Writing a model as a Hugging Face directory that transformers and vLLM load with their own classes.

Nothing here imports torch or transformers. Tensors stream from the checkpoint into the shards one by one, so that host
memory holds a few tensors at a time. A killed export goes on after its last whole shard.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import companions, safetensors_file
from flexolmo_jax.hf.card import model_card
from flexolmo_jax.hf.config import DENSE, MIXTURE, MIXTURE_WITH_BIAS, to_hf
from flexolmo_jax.hf.fold_bias import BiasFold
from flexolmo_jax.hf.names import HEAD, dense_pieces, mixture_pieces
from flexolmo_jax.hf.router_bias import Handled, handle_biases
from flexolmo_jax.hf.tensors import announce, cut_into_shards, is_tied, widest, write_tensors
from flexolmo_jax.model.partition import LeafPath
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.directories import refuse_existing
from flexolmo_jax.store.manifest import Manifest, read
from flexolmo_jax.store.resumable import refuse_losing, resumable_directory
from flexolmo_jax.store.stored import StoredLeaf, check_files, stored_leaves

MAX_SHARD_BYTES = 2 * 2**30
"""Largest safetensors file, unless a single tensor is larger."""

MODELING = "modeling_flex_olmo_bias"
DIGESTS = "SHA256SUMS"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What an export wrote.

    Attributes:
      architecture: the transformers class that loads it.
      experts: its experts, in order.
      top_k: its experts per token.
      dtype: what most of its tensors are in.
      shards: number of safetensors files.
      tensor_bytes: size of all tensors.
      dropped_bias: largest size of a router bias that was left out; 0 if none was.
      folded: what folding biases by regression left and did; None if the export is exact or biases were left out.
    """

    architecture: str
    experts: tuple[str, ...]
    top_k: int
    dtype: str
    shards: int
    tensor_bytes: int
    dropped_bias: float
    folded: BiasFold | None


def export_hf(
    checkpoint_directory: str | Path,
    out: str | Path,
    *,
    experts: Sequence[str] | None = None,
    top_k: int | None = None,
    dtype: str | None = None,
    fold_bias: str | Path | None = None,
    drop_bias: bool = False,
    custom_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> Export:
    """Writes an anchor or merged model as a Hugging Face directory.

    A model of one expert is dense and becomes an `Olmo2ForCausalLM`, any other a `FlexOlmoForCausalLM`. Hugging Face's
    router has no bias: ours is folded into the rows, exactly, through the bias channel of the anchor. For an anchor
    without that channel, one of `fold_bias`, `drop_bias` and `custom_code` says what to do.

    Args:
      checkpoint_directory: directory of the model.
      out: directory to write; it appears complete or not at all.
      experts: names of the experts to include; None includes all. The order is always that of the model.
      top_k: experts per token; None takes the model's own, as far as so many experts are included.
      dtype: "float32" or "bfloat16" for all tensors; None keeps what the model has.
      fold_bias: a corpus of public text to fold the biases on, approximately; see `fold_bias.py`.
      drop_bias: leave the biases out.
      custom_code: write a model class that has biases beside the weights. It loads with `trust_remote_code` alone.
      max_shard_bytes: largest safetensors file; a single larger tensor gets a file of its own.
      tokenizer: a directory that holds the model's tokenizer, if the model does not carry it.
      overwrite: whether an existing `out` is replaced.

    Raises:
      UserError: the model cannot be read, an expert is unknown, `top_k` does not fit, a bias would be lost, or `out`
        exists or cannot be written.
    """
    source, out = Path(checkpoint_directory), Path(out)
    refuse_existing(out, overwrite=overwrite)
    refuse_losing(source, out)
    target = _dtype_named(dtype)
    if max_shard_bytes < 1:
        raise UserError(f"a shard must hold at least one byte, not {max_shard_bytes}")
    manifest = read(source, "anchor", "merged")
    checkpoint.check_leaves(source, manifest)
    names = _chosen(manifest, experts, source)
    top_k = _check_top_k(manifest, names, top_k)
    found = companions.find(source, manifest.tokenizer, None if tokenizer is None else Path(tokenizer))
    check_files(source, manifest)
    leaves: dict[LeafPath, StoredLeaf | np.ndarray] = dict(stored_leaves(source, manifest))
    handled = Handled()
    if len(names) == 1:
        architecture, pieces = DENSE, dense_pieces(manifest.model.layers, names[0])
    else:
        handled = handle_biases(
            leaves,
            manifest,
            names,
            source,
            fold=None if fold_bias is None else Path(fold_bias),
            drop=drop_bias,
            custom_code=custom_code,
            top_k=top_k,
            encode=lambda text: companions.encoder(found, manifest.tokenizer)(text),
        )
        architecture = MIXTURE_WITH_BIAS if handled.kept else MIXTURE
        pieces = mixture_pieces(manifest.model.layers, names, biases=handled.kept)
    tensors = {name: list(group) for name, group in itertools.groupby(pieces, lambda piece: piece.tensor)}
    if tied := is_tied(leaves):
        del tensors[HEAD]
    announced = {name: announce(leaves, group, target) for name, group in tensors.items()}
    sizes = {name: kind.itemsize * math.prod(shape) for name, (kind, shape) in announced.items()}
    shards = cut_into_shards(sizes, max_shard_bytes)
    fields = companions.text_side(found, manifest.tokenizer)
    model_dtype = dtype or widest(announced)
    content = to_hf(
        manifest.model, names, top_k, architecture=architecture, dtype=model_dtype, tied=tied, text_side=fields
    )
    if handled.kept:
        content["auto_map"] = {
            "AutoConfig": f"{MODELING}.FlexOlmoBiasConfig",
            "AutoModelForCausalLM": f"{MODELING}.{MIXTURE_WITH_BIAS}",
        }
    plan = {
        "export": str(source.absolute()),
        "arrays": arrays.fingerprint(manifest.arrays),
        "config": content,
        "shards": shards,
        "handled": dataclasses.asdict(handled),
    }
    with resumable_directory(out, plan, overwrite=overwrite) as parts:
        directory = parts.directory
        digests = write_tensors(parts, leaves, tensors, announced, shards)
        _write_json(directory / "config.json", content)
        companions.write(directory, found, manifest.tokenizer, fields)
        if handled.kept:
            (directory / f"{MODELING}.py").write_text(modeling_code(), encoding="utf-8")
        card = model_card(manifest, names, top_k, architecture=architecture, dtype=model_dtype, handled=handled)
        (directory / "README.md").write_text(card, encoding="utf-8")
        _write_digests(directory, digests)
    return Export(
        architecture=architecture,
        experts=names,
        top_k=top_k,
        dtype=model_dtype,
        shards=len(shards),
        tensor_bytes=sum(sizes.values()),
        dropped_bias=handled.dropped,
        folded=handled.folded,
    )


def modeling_code() -> str:
    """The model class with router biases that an export with custom code brings along."""
    return resources.files("flexolmo_jax.hf").joinpath(f"{MODELING}.txt").read_text(encoding="utf-8")


def _dtype_named(name: str | None) -> np.dtype | None:
    known = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
    if name is not None and name not in known:
        raise UserError(f"dtype is {name!r}, but must be one of {', '.join(known)}")
    return None if name is None else known[name]


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


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_digests(directory: Path, digests: Mapping[str, str]) -> None:
    """Writes the SHA-256 of every file in the form that `sha256sum --check` reads."""
    files = sorted(file.name for file in directory.iterdir() if file.suffix in (".json", ".safetensors", ".py", ".md"))
    known = {**digests} | {
        name: safetensors_file.digest(directory / name)["sha256"] for name in files if name not in digests
    }
    (directory / DIGESTS).write_text("".join(f"{known[name]}  {name}\n" for name in sorted(known)), encoding="utf-8")

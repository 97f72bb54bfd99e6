"""A model of another program, opened and checked but not read: which leaf of ours comes from which tensors."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import olmo_core
from flexolmo_jax.hf.config import DENSE, MIXTURE_WITH_BIAS, HfShape, from_hf
from flexolmo_jax.hf.matrices import is_finite, transposed
from flexolmo_jax.hf.names import EMBED, HEAD, Piece, dense_pieces, mixture_pieces
from flexolmo_jax.hf.shards import Shards, open_shards, read_json
from flexolmo_jax.model import PUBLIC, ModelConfig, abstract_params
from flexolmo_jax.model.bias_channel import PINNED
from flexolmo_jax.model.partition import LeafPath, flatten
from flexolmo_jax.store.layout import LeafLayout
from flexolmo_jax.store.manifest import check_name

MAX_EXPERTS = 1024

_NOT_WEIGHTS = ("rotary_emb.inv_freq", "router.batch_size_per_expert")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One leaf of ours in another program's files.

    Attributes:
      layout: its shape and dtype, which is that of the tensors.
      pieces: the tensors it is made of, in the order of the layers; none if it is zero there.
    """

    layout: LeafLayout
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An opened model.

    Attributes:
      directory: where it is.
      config: shape of the model; it has a bias channel if the weights have one.
      names: its experts in order, `public` first.
      top_k: its experts per token.
      leaves: every leaf of our schema, by path.
      shards: the files, their headers read.
    """

    directory: Path
    config: ModelConfig
    names: tuple[str, ...]
    top_k: int
    leaves: dict[LeafPath, Leaf]
    shards: Shards

    def parts(self, path: LeafPath) -> Iterator[tuple[str, np.ndarray]]:
        """The leaf's layers in order, or the whole of a leaf that is not stacked, each with its tensor's name.

        The next part is read while the caller works on one.

        Raises:
          UserError: a value is not finite, or a file changed meanwhile.
        """
        leaf = self.leaves[path]
        if not leaf.pieces:  # Hugging Face's router has no bias, a dense model no router: zeros act like none.
            layers, *rest = leaf.layout.shape
            yield from (("", np.zeros(rest, leaf.layout.numpy_dtype)) for _ in range(layers))
            return
        with ThreadPoolExecutor(1) as reader:
            pending = reader.submit(self._read, leaf.pieces[0], leaf)
            for piece, following in zip(leaf.pieces, (*leaf.pieces[1:], None), strict=True):
                part = pending.result()
                if following is not None:
                    pending = reader.submit(self._read, following, leaf)
                yield piece.tensor, part

    def _read(self, piece: Piece, leaf: Leaf) -> np.ndarray:
        part = self.shards.read(piece.tensor, piece.rows)
        if not is_finite(part):
            raise UserError(f"{self.directory} holds a value that is not finite in {piece.tensor}")
        if piece.transposed:
            part = transposed(part)
        return part.reshape(leaf.layout.shape if piece.layer is None else leaf.layout.shape[1:])


def open_source(directory: Path, names: Sequence[str] | None = None) -> Source:
    """Opens an `Olmo2ForCausalLM`, a `FlexOlmoForCausalLM` or an OLMo-core checkpoint and checks all but its values.

    Args:
      directory: holds `config.json` and safetensors files.
      names: names for its experts in order; None takes those that our export noted, else `public`, `expert-1`, …

    Raises:
      UserError: the directory is no such model, is incomplete or damaged, or has a feature that our blocks lack.
    """
    shape, core = _read_config(directory)
    shards = open_shards(directory)
    _check_size(directory, shape, len(shards.names))
    named = _check_expert_names(directory, names or shape.names or _default_names(shape.experts), shape.experts)
    if core is None:
        pieces = _hf_pieces(shape, named)
    else:
        pieces = olmo_core.pieces(
            shape.config,
            named,
            dropless=core["block"].get("feed_forward_moe", {}).get("name", "default") == "dropless",
            biases=f"blocks.0.{olmo_core.BIAS}" in shards.names,
        )
    leaves = _leaves(directory, shards, list(pieces), shape, named)
    source = Source(
        directory=directory, config=shape.config, names=named, top_k=shape.top_k, leaves=leaves, shards=shards
    )
    return dataclasses.replace(source, config=dataclasses.replace(shape.config, bias_channel=_is_pinned(source)))


def read_hf_config(directory: Path) -> HfShape:
    """Reads and checks the `config.json` of a Hugging Face directory alone.

    Raises:
      UserError: it is missing or malformed, or describes a model that our blocks cannot be.
    """
    return from_hf(_config_content(directory), str(directory / "config.json"))


def _read_config(directory: Path) -> tuple[HfShape, dict | None]:
    """The shape of a model and, if OLMo-core wrote it, its own description."""
    content, source = _config_content(directory), str(directory / "config.json")
    if olmo_core.is_experiment(content):
        return olmo_core.from_experiment(content, source), content["model"]
    return from_hf(content, source), None


def _config_content(directory: Path) -> dict:
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} is not a Hugging Face model: it has no config.json")
    return read_json(file, directory)


def _hf_pieces(shape: HfShape, names: Sequence[str]) -> Iterator[Piece]:
    if shape.architecture == DENSE:
        yield from dense_pieces(shape.config.layers, PUBLIC)
        return
    for piece in mixture_pieces(shape.config.layers, names, biases=shape.architecture == MIXTURE_WITH_BIAS):
        if piece.path != ("router", PUBLIC, "bias"):
            yield piece


def _check_size(directory: Path, shape: HfShape, tensors: int) -> None:
    """Raises UserError if config.json speaks of more than the files can hold, before lists of that length are made."""
    if shape.config.layers > tensors:
        raise UserError(f"{directory} has {tensors} tensors, but its config.json says {shape.config.layers} layers")
    if shape.experts > MAX_EXPERTS:
        raise UserError(
            f"{directory} says that it has {shape.experts} experts, more than the {MAX_EXPERTS} possible here"
        )


def _default_names(experts: int) -> tuple[str, ...]:
    return (PUBLIC, *(f"expert-{index}" for index in range(1, experts)))


def _check_expert_names(directory: Path, names: Sequence[str], experts: int) -> tuple[str, ...]:
    if len(names) != experts or len(set(names)) != experts:
        raise UserError(f"{directory} has {experts} experts, which {list(names)} does not name one by one")
    if experts == 1:
        return (PUBLIC,)  # Whoever trained it, a dense model is imported to be an anchor.
    if names[0] != PUBLIC:
        raise UserError(f"the first expert of {directory} must be {PUBLIC!r}, but is {names[0]!r}")
    for name in names[1:]:
        check_name(name)
    return tuple(names)


def _leaves(
    directory: Path, shards: Shards, pieces: Sequence[Piece], shape: HfShape, names: Sequence[str]
) -> dict[LeafPath, Leaf]:
    """Which tensors each leaf is made of, after a look at every tensor's name, shape and dtype."""
    if shape.tied:
        pieces = [piece._replace(tensor=EMBED) if piece.tensor == HEAD else piece for piece in pieces]
    _check_tensor_names(directory, shards.names, {piece.tensor for piece in pieces}, tied=shape.tied)
    expected = flatten(abstract_params(shape.config, names))
    grouped: dict[LeafPath, list[Piece]] = {path: [] for path in expected}
    heights: dict[str, int] = {}
    for piece in pieces:
        grouped[piece.path].append(piece)
        if piece.rows is not None:
            heights[piece.tensor] = max(heights.get(piece.tensor, 0), piece.rows[1])
    leaves = {}
    for path, group in grouped.items():
        target = expected[path].shape
        for piece in group:
            slot = target if piece.layer is None else target[1:]
            _check_shape(directory, piece, shards.shape(piece.tensor), slot, heights.get(piece.tensor))
        dtypes = {shards.dtype(piece.tensor): piece.tensor for piece in group} or {np.dtype(np.float32): ""}
        if len(dtypes) > 1:
            raise UserError(
                f"{directory} holds {' and '.join(dtypes.values())} as {' and '.join(d.name for d in dtypes)}, but one "
                "matrix must have one dtype in all layers"
            )
        leaves[path] = Leaf(layout=LeafLayout(path, target, next(iter(dtypes)).name), pieces=tuple(group))
    return leaves


def _check_tensor_names(directory: Path, found: set[str], wanted: set[str], *, tied: bool) -> None:
    found = {name for name in found if not name.endswith(_NOT_WEIGHTS)}
    # A tied model may carry its head all the same; some programs write both.
    unused = {HEAD} if tied else set()
    if missing := sorted(wanted - found):
        raise UserError(f"{directory} lacks the tensor {missing[0]} ({len(missing)} missing in all)")
    if surplus := sorted(found - wanted - unused):
        raise UserError(f"{directory} holds the tensor {surplus[0][:200]}, which its config.json has no place for")


def _check_shape(
    directory: Path, piece: Piece, found: tuple[int, ...], slot: tuple[int, ...], height: int | None
) -> None:
    """Raises UserError unless the piece of a tensor of this shape fills the slot and the whole tensor is used."""
    wanted = slot[::-1] if piece.transposed else slot
    if piece.rows is not None:
        rows = piece.rows[1] - piece.rows[0]
        # One row of a matrix is a vector, and one entry of a vector a number: a leading 1 may be missing or surplus.
        part = (rows, *found[1:])
        fits = bool(found) and found[0] == height and _without_ones(part) == _without_ones(wanted)
    else:
        fits = found == wanted
    if not fits:
        raise UserError(
            f"{directory} has {piece.tensor} of shape {found}, where its config.json says {wanted} per part"
        )


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _is_pinned(source: Source) -> bool:
    """Whether channel 0 is reserved. The norms of a model without one tell it before the embedding is read."""
    return all(
        bool(np.all(part[..., 0].astype(np.float32) == PINNED[path]))
        for path in sorted(PINNED)
        for _, part in source.parts(path)
    )

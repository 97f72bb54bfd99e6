"""Reading the safetensors of a Hugging Face OLMo 2 or FlexOlmo directory into our parameters."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf.config import DENSE, HfShape, from_hf
from flexolmo_jax.hf.names import EMBED, HEAD, Piece, dense_pieces, mixture_pieces
from flexolmo_jax.model import PUBLIC, ModelConfig, abstract_params
from flexolmo_jax.model.bias_channel import is_pinned
from flexolmo_jax.model.partition import LeafPath, flatten, unflatten

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfModel:
    """A model that was read from a Hugging Face directory.

    Attributes:
      config: shape of the model; it has a bias channel if the weights have one.
      names: its experts, in order, `public` first.
      top_k: its experts per token.
      params: nested dict of NumPy arrays under the paths of the schema, in the dtypes of the files.
    """

    config: ModelConfig
    names: tuple[str, ...]
    top_k: int
    params: dict[str, Any]


def read_hf(directory: Path, *, names: Sequence[str] | None = None) -> HfModel:
    """Reads a local `Olmo2ForCausalLM` or `FlexOlmoForCausalLM`.

    Args:
      directory: holds `config.json` and safetensors files.
      names: names for its experts in order; None takes those that our export noted, else `public`, `expert-1`, …

    Raises:
      UserError: the directory is no such model, is incomplete or damaged, or has a feature that our blocks lack.
    """
    shape = read_hf_config(directory)
    named = _check_expert_names(directory, names or shape.names or _default_names(shape.experts), shape.experts)
    if shape.architecture == DENSE:
        pieces = list(dense_pieces(shape.config.layers, PUBLIC))
    else:
        pieces = list(mixture_pieces(shape.config.layers, named))
    files = _files(directory)
    _check_tensor_names(directory, files.keys(), {piece.tensor for piece in pieces}, tied=shape.tied)
    params = _read_pieces(directory, files, pieces, shape, named)
    config = dataclasses.replace(shape.config, bias_channel=is_pinned(params))
    return HfModel(config=config, names=named, top_k=shape.top_k, params=params)


def read_hf_config(directory: Path) -> HfShape:
    """Reads and checks `config.json` alone.

    Raises:
      UserError: it is missing or malformed, or describes a model that our blocks cannot be.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} is not a Hugging Face model: it has no config.json")
    return from_hf(_read_json(file), str(file))


def _default_names(experts: int) -> tuple[str, ...]:
    return (PUBLIC, *(f"expert-{index}" for index in range(1, experts)))


def _check_expert_names(directory: Path, names: Sequence[str], experts: int) -> tuple[str, ...]:
    if len(names) != experts or len(set(names)) != experts:
        raise UserError(f"{directory} has {experts} experts, which {list(names)} does not name one by one")
    if experts == 1:
        return (PUBLIC,)  # Whoever trained it, a dense model is imported to be an anchor.
    if names[0] != PUBLIC:
        raise UserError(f"the first expert of {directory} must be {PUBLIC!r}, but is {names[0]!r}")
    return tuple(names)


def _files(directory: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    if (index := directory / INDEX).is_file():
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise UserError(f"{index} has no weight_map")
        for file in set(placed.values()):
            if not isinstance(file, str) or Path(file).name != file or not (directory / file).is_file():
                raise UserError(f"{index} names the file {file!r}, which {directory} does not hold")
        return {tensor: directory / file for tensor, file in placed.items()}
    if not (single := directory / SINGLE_FILE).is_file():
        raise UserError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX}")
    with ExitStack() as stack:
        return dict.fromkeys(_open(stack, single).keys(), single)


def _check_tensor_names(directory: Path, found: Iterable[str], wanted: set[str], *, tied: bool) -> None:
    found = {name for name in found if not name.endswith(_NOT_WEIGHTS)}
    optional = {HEAD} if tied else set()
    if missing := sorted(wanted - found - optional):
        raise UserError(f"{directory} lacks the tensor {missing[0]} ({len(missing)} missing in all)")
    if surplus := sorted(found - wanted):
        raise UserError(f"{directory} holds the tensor {surplus[0]}, which its config.json has no place for")


def _read_pieces(
    directory: Path, files: Mapping[str, Path], pieces: Sequence[Piece], shape: HfShape, names: Sequence[str]
) -> dict[str, Any]:
    expected = flatten(abstract_params(shape.config, names))
    leaves: dict[LeafPath, np.ndarray] = {}
    with ExitStack() as stack:
        handles = {file: _open(stack, file) for file in set(files.values())}
        for piece in pieces:
            name = EMBED if shape.tied and piece.tensor == HEAD else piece.tensor
            part = _part(handles[files[name]], name, piece)
            if piece.path not in leaves:
                leaves[piece.path] = np.empty(expected[piece.path].shape, part.dtype)
            slot = leaves[piece.path] if piece.layer is None else leaves[piece.path][piece.layer]
            if part.shape != slot.shape:
                raise UserError(
                    f"{directory} has {name} with a part of shape {part.shape} where its config.json says {slot.shape}"
                )
            slot[...] = part
    # Hugging Face's router has no bias: none is a bias of zero.
    biases = {path: np.zeros(leaf.shape, np.float32) for path, leaf in expected.items() if path not in leaves}
    return unflatten(leaves | biases)


def _part(handle: Any, name: str, piece: Piece) -> np.ndarray:
    try:
        tensor = handle.get_slice(name)
        part = tensor[:] if piece.row is None else tensor[piece.row]
    except (SafetensorError, IndexError) as error:
        raise UserError(f"the tensor {name} cannot be read: {error}") from error
    return part.T if piece.transposed else part


def _open(stack: ExitStack, file: Path) -> Any:
    try:
        return stack.enter_context(safe_open(file, framework="np"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object")
    return content

"""A directory of safetensors files as one collection of tensors. It may come from anywhere, so it is not trusted.

No file is read that does not belong to the directory: an index names plain files, and a symbolic link must stay within
the directory, or lead to the blobs of the Hugging Face cache that the directory is a snapshot of.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf.safetensors_file import SafetensorsFile

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FOLDER = "model"
"""Where OLMo-core puts its files if there is one per tensor or one per chunk."""

MAX_JSON_BYTES = 64 * 2**20


class Shards:
    """Tensors by name, from whichever file holds them."""

    def __init__(self, files: Mapping[str, SafetensorsFile]):
        self._files = dict(files)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._files[name].dtype(name)

    def read(self, name: str, rows: tuple[int, int] | None) -> np.ndarray:
        """Reads these rows of a tensor, or all of it."""
        return self._files[name].read(name, *(rows or (0, None)))


def open_shards(directory: Path) -> Shards:
    """Opens the weights of a Hugging Face directory, or of an OLMo-core checkpoint without pickles.

    Raises:
      UserError: there are none, one is not whole, or the index does not tell where the tensors are.
    """
    if (directory / INDEX).is_file():
        return _indexed(directory)
    if (directory / SINGLE_FILE).is_file():
        return _all_of([directory / SINGLE_FILE], directory)
    if (directory / FOLDER).is_dir() and (files := sorted((directory / FOLDER).glob("*.safetensors"))):
        return _all_of(files, directory)
    if pickles := sorted(
        file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".distcp")
    ):
        raise UserError(
            f"{directory} holds its weights as a pickle, {pickles[0]}, which runs code when it is opened: save them as "
            "safetensors"
        )
    raise UserError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX}")


def own_file(file: Path, directory: Path) -> Path:
    """The file itself, refused unless it is a plain file of this directory.

    Raises:
      UserError: it is missing, not a plain file, or a link that leaves the directory.
    """
    root = directory.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    target = file.resolve()
    if not any(target.is_relative_to(home) for home in homes):
        raise UserError(f"{file} is a link that leaves its directory: put the file itself there")
    if not target.is_file():
        raise UserError(f"{file} is missing, or not a plain file")
    return target


def read_json(file: Path, directory: Path) -> dict[str, Any]:
    """A JSON object from a file of this directory.

    Raises:
      UserError: the file is not in it, too large, or holds something else.
    """
    source = own_file(file, directory)
    if source.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{file} is larger than {MAX_JSON_BYTES:,} bytes, so it is not what its name says")
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object")
    return content


def _indexed(directory: Path) -> Shards:
    index = directory / INDEX
    placed = read_json(index, directory).get("weight_map")
    if not isinstance(placed, dict):
        raise UserError(f"{index} has no weight_map")
    opened: dict[str, SafetensorsFile] = {}
    for name in {str(file): None for file in placed.values()}:
        if Path(name).name != name or not (directory / name).is_file():
            raise UserError(f"{index} names the file {name[:200]!r}, which {directory} does not hold")
        opened[name] = SafetensorsFile(own_file(directory / name, directory))
    for tensor, name in placed.items():
        if tensor not in opened[str(name)].tensors:
            raise UserError(f"{index} says that {name} holds {tensor[:200]}, but it does not")
    return Shards({tensor: opened[str(name)] for tensor, name in placed.items()})


def _all_of(files: list[Path], directory: Path) -> Shards:
    found: dict[str, SafetensorsFile] = {}
    for path in files:
        opened = SafetensorsFile(own_file(path, directory))
        if twice := sorted(found.keys() & opened.tensors.keys()):
            raise UserError(f"{path} holds {twice[0][:200]}, which another file of {directory} holds too")
        found |= dict.fromkeys(opened.tensors, opened)
    return Shards(found)

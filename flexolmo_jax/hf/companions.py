"""What accompanies the weights of a Hugging Face model: tokenizer, generation settings, ids of special tokens.

A model that was trained here on bytes needs none of it on disk. An imported one keeps the files of its origin in
`huggingface/` beside its arrays, and an export gives them back.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from flexolmo_jax.data import vocabulary
from flexolmo_jax.data.vocabularies import fingerprint_of_rules, open_vocabulary
from flexolmo_jax.errors import UserError
from flexolmo_jax.hf.config import MAX_POSITIONS
from flexolmo_jax.hf.shards import own_file, read_json
from flexolmo_jax.hf.tokenizer import byte_tokenizer, write_tokenizer
from flexolmo_jax.store.companions import DIRECTORY, MAX_FILE_BYTES

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION = "generation_config.json"
CONFIG = "config.json"

BYTES = "bytes"
UNKNOWN = "unknown"
"""Manifest's `tokenizer` of a model that was imported without one."""

_TEXT_SIDE = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_id(directory: Path) -> str:
    """What a manifest says of the tokenizer in a Hugging Face directory: `bytes`, its fingerprint, or `unknown`."""
    file = directory / TOKENIZER
    if not file.is_file():
        return UNKNOWN
    content = _loads(file, _small(file, directory).read_bytes())
    return BYTES if content == json.loads(byte_tokenizer().to_str()) else fingerprint_of_rules(content)


def keep(source: Path, artefact: Path) -> None:
    """Copies what accompanies the weights in `source` into a model of ours.

    Raises:
      UserError: a file is too large for what it should be, or a link that leaves the directory.
    """
    target = artefact / DIRECTORY
    target.mkdir(exist_ok=True)
    for name in (*TOKENIZER_FILES, GENERATION, CONFIG):
        if (source / name).is_file():
            shutil.copyfile(_small(source / name, source), target / name)


def find(checkpoint: Path, tokenizer: str, given: Path | None) -> Path | None:
    """The directory of the files that belong to a model, or None for the byte vocabulary and for an unknown one.

    Args:
      checkpoint: directory of the model.
      tokenizer: what its manifest says of the tokenizer.
      given: a directory that the user named: a Hugging Face directory, or a model of ours that keeps such files.

    Raises:
      UserError: the files are missing, or are those of another tokenizer.
    """
    if given is not None:
        found = given / DIRECTORY if (given / DIRECTORY).is_dir() else given
        if tokenizer_id(found) != tokenizer:
            raise UserError(
                f"{given} has no tokenizer, or another one than {checkpoint} was trained with ({tokenizer})"
            )
        return None if tokenizer == BYTES else found
    if tokenizer == BYTES:
        return None
    kept = checkpoint / DIRECTORY
    if tokenizer == UNKNOWN:
        return kept if kept.is_dir() else None
    if not kept.is_dir():
        raise UserError(
            f"{checkpoint} was trained with the tokenizer {tokenizer}, which it does not carry: name a directory that "
            "does with --tokenizer, such as the imported anchor"
        )
    if tokenizer_id(kept) != tokenizer:
        raise UserError(f"{kept / TOKENIZER} is not the tokenizer that {checkpoint} was trained with ({tokenizer})")
    return kept


def text_side(found: Path | None, tokenizer: str) -> dict[str, Any]:
    """The fields of `config.json` that are about text; see `to_hf`."""
    if tokenizer == BYTES:
        eos, pad = vocabulary.EOS_ID, vocabulary.PAD_ID
        return dict(zip(_TEXT_SIDE, (MAX_POSITIONS, None, eos, pad), strict=True))
    content: dict[str, Any] = {}
    if found is not None and (found / CONFIG).is_file():
        content = read_json(found / CONFIG, found)
    elif found is not None and (found / TOKENIZER).is_file():  # A model that was trained here: its tokenizer says it.
        rules = open_vocabulary(str(found / TOKENIZER))
        content = {"eos_token_id": rules.eos_id, "pad_token_id": rules.pad_id}
    return {name: content.get(name) for name in _TEXT_SIDE} | {
        "max_position_embeddings": content.get("max_position_embeddings") or MAX_POSITIONS
    }


def write(out: Path, found: Path | None, tokenizer: str, fields: dict[str, Any]) -> None:
    """Writes `generation_config.json` and the tokenizer's files into an export."""
    generation = {name: fields[name] for name in _TEXT_SIDE[1:] if fields[name] is not None}
    if found is not None and (found / GENERATION).is_file():
        generation = read_json(found / GENERATION, found)
    (out / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    if tokenizer == BYTES:
        write_tokenizer(out)
    elif found is not None:
        for name in TOKENIZER_FILES:
            if (found / name).is_file():
                shutil.copyfile(own_file(found / name, found), out / name)


def encoder(found: Path | None, tokenizer: str) -> Callable[[str], list[int]]:
    """The function from a text to ids, without special tokens.

    Raises:
      UserError: the tokenizer is unknown, or its file cannot be read.
    """
    if tokenizer == BYTES:
        return vocabulary.encode
    if found is None or not (found / TOKENIZER).is_file():
        raise UserError("text can be read only with the model's tokenizer, which is unknown")
    try:
        loaded = Tokenizer.from_file(str(found / TOKENIZER))
    except Exception as error:  # The library raises bare exceptions.
        raise UserError(f"{found / TOKENIZER} is not a tokenizer: {error}") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _small(file: Path, directory: Path) -> Path:
    """The file, refused if it is not of this directory or too large for what it should be."""
    own = own_file(file, directory)
    if own.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{file} is larger than {MAX_FILE_BYTES:,} bytes: it is not what it should be")
    return own


def _loads(file: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON: {error}") from error

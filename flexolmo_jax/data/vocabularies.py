"""Vocabularies: bytes, SentencePiece models, and Hugging Face's `tokenizer.json`.

A vocabulary is named as a job file names it: "bytes", or the path of a `.model` or `.json` file. What goes into
manifests is its fingerprint, which says which ids a text gets and not where the file lies. Prepared text and models
carry its files along.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from flexolmo_jax.data import vocabulary
from flexolmo_jax.errors import UserError, did_you_mean

BYTES = "bytes"
TOKENIZER_JSON, TOKENIZER_CONFIG, SENTENCEPIECE_MODEL = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
"""Names of the files that are carried along."""

ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""What tokenizers call their end of text, where `tokenizer_config.json` beside them does not say."""
PADS = ("<|pad|>", "<pad>", "[PAD]")


@runtime_checkable
class Vocabulary(Protocol):
    """Text to token ids and back.

    Attributes:
      fingerprint: "bytes", or the kind and a SHA-256 of what decides the ids.
      size: ids are below it.
      eos_id: id that ends every document.
      pad_id: id that fills rows up; never a target.
    """

    fingerprint: str
    size: int
    eos_id: int
    pad_id: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without an end of text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids up to the first end of text."""
        ...

    def text_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 text that each id stands for, int32 [size]; 0 for what is no text, such as an end of text."""
        ...

    def save(self, directory: Path) -> None:
        """Writes the files that a `SavedVocabulary` opens into a new directory; for bytes there is nothing to write."""
        ...


@dataclasses.dataclass(frozen=True)
class SavedVocabulary:
    """A vocabulary that a prepared text or a model carries.

    Attributes:
      fingerprint: which one it is.
      directory: where its files are.
    """

    fingerprint: str = BYTES
    directory: Path = Path()

    @property
    def name(self) -> str:
        """As a job file would name it.

        Raises:
          UserError: its files are not there, or those of another one are.
        """
        if self.fingerprint == BYTES:
            return BYTES
        for file in (self.directory / TOKENIZER_JSON, self.directory / SENTENCEPIECE_MODEL):
            if file.is_file() and open_vocabulary(str(file)).fingerprint == self.fingerprint:
                return str(file)
        raise UserError(
            f"{self.directory} does not hold the tokenizer {self.fingerprint}, which text for this model needs: "
            "prepare the text with it (flexolmo prepare)"
        )

    def open(self) -> Vocabulary:
        """The vocabulary; errors are those of `name`."""
        return open_vocabulary(self.name)


def id_type(size: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds every id below `size`, as OLMo-core's token arrays have it."""
    return np.dtype("<u2" if size <= 2**16 else "<u4")


@functools.cache
def open_vocabulary(name: str, eos_token: str = "") -> Vocabulary:
    """The vocabulary of this name.

    Args:
      name: "bytes", or the path of a SentencePiece `.model` or a `tokenizer.json`.
      eos_token: the end of text of a `tokenizer.json`, where it is not one of the usual ones.

    Raises:
      UserError: there is no such vocabulary, or its end of text cannot be told.
    """
    if name == BYTES:
        return _Bytes()
    file = Path(name)
    if file.is_dir():
        file = file / TOKENIZER_JSON
    if not file.is_file():
        raise UserError(
            f"there is no tokenizer {name!r}: give 'bytes' or the path of a tokenizer.json or a .model file"
        )
    return _SentencePiece(file) if file.suffix == ".model" else _HuggingFace(file, eos_token)


class _Bytes:
    """The UTF-8 bytes, as in `flexolmo_jax.data.vocabulary`."""

    fingerprint = BYTES
    size = vocabulary.VOCAB_SIZE
    eos_id = vocabulary.EOS_ID
    pad_id = vocabulary.PAD_ID

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        first = np.uint16(self.size - 256)
        return [np.frombuffer(text.encode(), np.uint8) + first for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return vocabulary.decode(ids)

    def text_bytes(self) -> np.ndarray:
        return (np.arange(self.size) >= self.size - 256).astype(np.int32)

    def save(self, directory: Path) -> None:
        pass


class _SentencePiece:
    def __init__(self, file: Path):
        import sentencepiece

        try:
            self._model = file.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{file} is not a SentencePiece model that can be read: {_one_line(error)}") from error
        self.fingerprint = f"sentencepiece:{hashlib.sha256(self._model).hexdigest()}"
        self.size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{file} has no end of text: train the SentencePiece model with eos_id")
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in self._processor.encode(list(texts), num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(_until(self.eos_id, ids))

    def text_bytes(self) -> np.ndarray:
        def of_one(token: int) -> int:
            if self._processor.is_control(token) or self._processor.is_unused(token):
                return 0
            return _piece_bytes(self._processor.id_to_piece(token))

        return np.array([of_one(token) for token in range(self.size)], np.int32)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / SENTENCEPIECE_MODEL).write_bytes(self._model)


class _HuggingFace:
    """Ids are those of the `tokenizers` library, without what a post-processor would add."""

    def __init__(self, file: Path, eos_token: str):
        from tokenizers import Tokenizer

        try:
            text = file.read_text(encoding="utf-8")
            self._tokenizer = Tokenizer.from_str(text)
            content = json.loads(text)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{file} is not a tokenizer.json that can be read: {_one_line(error)}") from error
        self._file, self._text, self._content = file, text, content
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.fingerprint = fingerprint_of_rules(content)
        special = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = _end_of_text(file, self._tokenizer, special, eos_token)
        self.pad_id = next((special[name] for name in PADS if name in special), self.eos_id)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_until(self.eos_id, ids), skip_special_tokens=False)

    def text_bytes(self) -> np.ndarray:
        found = np.zeros(self.size, np.int32)
        measure = len if _maps_bytes_to_characters(self._content.get("decoder")) else _piece_bytes
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            found[number] = measure(token)
        for added in self._content.get("added_tokens", []):
            found[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return found

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / TOKENIZER_JSON).write_text(self._text, encoding="utf-8")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | _settings_beside(self._file)
        settings["eos_token"] = self._tokenizer.id_to_token(self.eos_id)
        (directory / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def fingerprint_of_rules(content: dict[str, Any]) -> str:
    """The fingerprint of what a `tokenizer.json` holds: of what decides the ids, not of padding or layout."""
    rules = {key: value for key, value in content.items() if key not in ("version", "truncation", "padding")}
    return f"tokenizer.json:{hashlib.sha256(json.dumps(rules, sort_keys=True, ensure_ascii=True).encode()).hexdigest()}"


def _end_of_text(file: Path, tokenizer: Any, special: dict[str, int], eos_token: str) -> int:
    if eos_token:
        if (found := tokenizer.token_to_id(eos_token)) is None:
            raise UserError(f"{file} has no token {eos_token!r}; {did_you_mean(eos_token, special)}")
        return found
    candidates = [name for name in (_configured_end(file), *ENDS_OF_TEXT) if name in special]
    if not candidates:
        raise UserError(f"{file} does not say which token ends a text: set TextTask.eos_token")
    return special[candidates[0]]


def _configured_end(file: Path) -> str | None:
    """The end of text that `tokenizer_config.json` beside the tokenizer names, if there is one."""
    named = _settings_beside(file).get("eos_token")
    return named["content"] if isinstance(named, dict) else named


def _settings_beside(file: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` beside a tokenizer says."""
    try:
        settings = json.loads(file.with_name(TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _maps_bytes_to_characters(decoder: dict[str, Any] | None) -> bool:
    """Whether a `tokenizer.json` writes each byte of a token as one character."""
    decoder = decoder or {}
    return decoder.get("type") == "ByteLevel" or any(map(_maps_bytes_to_characters, decoder.get("decoders", ())))


def _piece_bytes(piece: str) -> int:
    """Bytes of a token that is written as text, with U+2581 for a space, or as `<0x0A>` for a single byte."""
    return 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else len(piece.replace("\u2581", " ").encode())


def _until(end: int, ids: Iterable[int]) -> list[int]:
    kept = []
    for token in ids:
        if token == end:
            break
        kept.append(int(token))
    return kept


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

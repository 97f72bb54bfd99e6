"""Token ids of documents: in memory, or in the shards of a prepared split."""

import collections
import dataclasses
import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from flexolmo_jax.data.vocabularies import SavedVocabulary, id_type
from flexolmo_jax.errors import UserError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
"""Directory within prepared text that holds the files of its tokenizer, if it has any."""

KINDS = ("prepared", "mixture")

_READERS_OPEN = 128
"""Shards of a split that are open at a time; each keeps an index of eight bytes for every document of its own."""


class TokenShard(Protocol):
    """Documents that are packed together."""

    @property
    def offsets(self) -> np.ndarray:
        """Where each document begins among the tokens of all, and the end: int64 [documents + 1]."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 [documents]."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of a document, its end of text included."""
        ...


class TokenSource(Protocol):
    """Random access to the documents of a split.

    Attributes:
      shards: the documents, in groups.
    """

    @property
    def shards(self) -> Sequence[TokenShard]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents in memory.

    Attributes:
      tokens: [N] ids, all documents one after another, each with its end of text.
      offsets: int64 [documents + 1].
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def shards(self) -> "Sequence[Documents]":
        return (self,)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class PreparedShard:
    """One shard on disk: an ArrayRecord file with a record for each document, and the documents' offsets beside it."""

    def __init__(self, split: "PreparedSplit", number: int, file: Path, documents: int, kind: np.dtype):
        self._split, self._number, self._documents, self._kind = split, number, documents, kind
        self.file = file

    @property
    def offsets(self) -> np.ndarray:
        """Where each document begins among the shard's tokens, and the end: int64 [documents + 1], mapped from disk."""
        return mapped(offsets_file(self.file))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return self._documents

    def __getitem__(self, index: int) -> np.ndarray:
        return np.frombuffer(self._split.record(self._number, index), self._kind)


class PreparedSplit:
    """A split of prepared text. Only the shards that are being read from are open, so memory does not grow with it.

    Attributes:
      directory: of the prepared text.
      name: of the split.
      shards: in order.
    """

    def __init__(self, directory: Path, name: str, files: Sequence[Path], counts: Sequence[int], kind: np.dtype):
        self.directory, self.name = directory, name
        self.shards = tuple(
            PreparedShard(self, number, file, count, kind)
            for number, (file, count) in enumerate(zip(files, counts, strict=True))
        )
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._open: collections.OrderedDict[int, object] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._first, index, "right")) - 1
        return self.shards[shard][index - int(self._first[shard])]

    def record(self, shard: int, index: int) -> bytes:
        """The bytes of a document of a shard."""
        with self._lock:
            reader = self._reader(shard)
            reader.seek(index)
            return reader.read()

    def _reader(self, shard: int):
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            from array_record.python import array_record_module

            # One record at a time: a pool of threads and reading ahead cost more than they bring.
            options = "readahead_buffer_size:0,max_parallelism:0"
            file = str(self.shards[shard].file)
            self._open[shard] = array_record_module.ArrayRecordReader(file, options=options)
            if len(self._open) > _READERS_OPEN:
                self._open.popitem(last=False)
        return self._open[shard]


def mapped(file: Path) -> np.ndarray:
    """An array on disk, of which only what is looked at comes into memory."""
    # A view of NumPy's plain kind: slices of np.memmap itself cost some ten times as much.
    return np.load(file, mmap_mode="r").view(np.ndarray)


def offsets_file(shard: Path) -> Path:
    """Where the offsets of a shard are."""
    return shard.with_suffix(".offsets.npy")


def is_prepared(directory: Path) -> bool:
    """Whether a directory holds prepared text, of whatever format version, or a mixture of such."""
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") in KINDS


def read_manifest(directory: Path) -> dict:
    """What `flexolmo prepare` wrote about a directory; docs/formats.md lists it.

    Raises:
      UserError: there is no manifest, or it is of another format version.
    """
    if not is_prepared(directory):
        raise UserError(f"{directory} is no prepared text: flexolmo prepare makes it")
    content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{directory} has format version {content['format_version']!r}, but this program reads {FORMAT_VERSION}: "
            "prepare it again"
        )
    return content


def fingerprint(directory: Path) -> str:
    """SHA-256 of what prepared text or a mixture is made of: other documents or ids give another one."""
    manifest = read_manifest(directory)
    content = manifest.get("splits") or [
        [fingerprint(directory / part["path"]), part["rate"]] for part in manifest["parts"]
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def vocabulary_of(prepared: Path) -> SavedVocabulary:
    """What a text, or the first part of a mixture, was prepared with."""
    manifest = read_manifest(prepared)
    if parts := manifest.get("parts"):
        return vocabulary_of(prepared / parts[0]["path"])
    return SavedVocabulary(manifest["vocabulary"]["fingerprint"], prepared / TOKENIZER)


def open_split(prepared: Path, split: str) -> PreparedSplit:
    """One split of prepared text; it may be empty.

    Raises:
      UserError: there is no prepared text, or a shard of it is missing.
    """
    manifest = read_manifest(prepared)
    if "splits" not in manifest:
        raise UserError(f"{prepared} is a mixture of prepared texts, but one text is needed here")
    shards = manifest["splits"][split]["shards"]
    missing = [shard["file"] for shard in shards if not (prepared / shard["file"]).is_file()]
    if missing:
        raise UserError(f"{prepared} is damaged: {missing[0]} is missing; prepare it again")
    kind = id_type(manifest["vocabulary"]["size"])
    paths = [prepared / shard["file"] for shard in shards]
    return PreparedSplit(prepared, split, paths, [shard["documents"] for shard in shards], kind)

"""The first half of preparation: pieces of work to sorted runs of token ids.

A *unit* is a part of a file. Its documents, as token ids, become one or more *runs*: files sorted by (split, digest),
so that any stretch of digests of a split lies in one place of each run, whichever unit a document came from. Nothing of
a run leaves preparation, and no text is written at all.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from flexolmo_jax.data.documents import Bad, Record
from flexolmo_jax.data.files import SourceFile, digest, replacing
from flexolmo_jax.data.near_duplicates import signature
from flexolmo_jax.data.splits import SPLITS, digest_of, split_of_digest
from flexolmo_jax.data.vocabularies import Vocabulary, id_type

KEY = np.dtype([("split", "u1"), ("order", "<u8"), ("check", "<u8"), ("length", "<u8")])
"""A document in a run: number of its split, two halves of its digest, and its ids, end of text included."""

BAD_SHOWN = 20
"""So many bad lines of a unit are reported with file and line; all of them are counted."""

_RUN_TOKENS = 2**24
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**20


class Unit(Protocol):
    """A piece of work: documents that one process reads and tokenizes."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def split(self) -> str:
        """The split of all its documents; empty where each document's digest decides."""
        ...

    def records(self) -> Iterator[Record]: ...

    def source(self) -> SourceFile | None:
        """The file that this unit accounts for in the manifest, if any."""
        ...


@dataclasses.dataclass(frozen=True)
class Run:
    """A sorted run on disk."""

    keys: Path
    tokens: Path
    signatures: Path

    @classmethod
    def of(cls, keys: Path) -> "Run":
        """The run whose keys are in this file."""
        stem = keys.name.removesuffix(".keys.npy")
        return cls(*(keys.with_name(f"{stem}.{part}.npy") for part in ("keys", "tokens", "signatures")))


class UnitReport(NamedTuple):
    """What a unit held.

    Attributes:
      runs: number of runs.
      tokens: by split, ends of text included.
      records: documents, empty and bad ones among them.
      empty: documents without a token, which are left out.
      bad: how many lines were skipped.
      shown: the first of them, with file and line.
      sources: name, size and SHA-256 of the file, from the unit that accounts for it.
    """

    runs: int
    tokens: dict[str, int]
    records: int
    empty: int
    bad: int
    shown: list[str]
    sources: list[dict[str, Any]]


def unit_key(unit: Unit) -> str:
    """A name for the unit's files that changes when what it reads does."""
    return hashlib.sha256(repr(unit).encode()).hexdigest()[:24]


def read_report(unit: Unit, directory: Path) -> UnitReport | None:
    """The report of a unit that is done, else None."""
    file = directory / f"{unit_key(unit)}.json"
    return UnitReport(**json.loads(file.read_text())) if file.exists() else None


def write_runs(unit: Unit, directory: Path, near: bool) -> UnitReport:
    """Tokenizes a unit into runs; its report is written last, and says that it is done.

    Args:
      unit: what to read.
      directory: where runs are gathered.
      near: whether to sign every document for the search for near-duplicates.

    Raises:
      UserError: the unit cannot be read.
    """
    key = unit_key(unit)
    runs, tokens, records, empty = 0, dict.fromkeys(SPLITS, 0), 0, 0
    bad = _BadLines()
    gathered = _Gathered(unit, near)
    for batch in _batches(unit.records(), bad):
        records += len(batch)
        empty += gathered.add(batch)
        if gathered.tokens >= _RUN_TOKENS:
            gathered.write(_run(directory, key, runs), tokens)
            runs, gathered = runs + 1, _Gathered(unit, near)
    if gathered.tokens:
        gathered.write(_run(directory, key, runs), tokens)
        runs += 1
    file = unit.source()
    sources = [{"name": file.name, "bytes": file.size, "sha256": digest(file.path)}] if file else []
    report = UnitReport(runs, tokens, records + bad.count, empty, bad.count, bad.shown, sources)
    with replacing(directory / f"{key}.json") as partial:
        partial.write_text(json.dumps(report._asdict()))
    return report


class _BadLines:
    """How many lines were bad, and which were the first."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []

    def add(self, bad: Bad) -> None:
        self.count += 1
        if len(self.shown) < BAD_SHOWN:
            self.shown.append(str(bad))


class _Gathered:
    """Documents of a run that is still in memory."""

    def __init__(self, unit: Unit, near: bool):
        self._unit, self._near = unit, near
        self._documents: list[np.ndarray] = []
        self._digests: list[bytes] = []
        self._signatures: list[np.ndarray] = []
        self.tokens = 0

    def add(self, contents: list[str | np.ndarray]) -> int:
        """Adds documents; returns how many of them were empty and left out."""
        vocabulary = self._unit.vocabulary
        end = np.array([vocabulary.eos_id], id_type(vocabulary.size))
        texts = [content for content in contents if isinstance(content, str)]
        encoded = iter(vocabulary.encode(texts) if texts else [])
        kept = 0
        for content in contents:
            ids = next(encoded) if isinstance(content, str) else content
            if not len(ids):
                continue
            kept += 1
            self._documents.append(np.concatenate([ids, end], dtype=end.dtype, casting="unsafe"))
            self._digests.append(digest_of(content))
            if self._near:
                self._signatures.append(signature(ids))
            self.tokens += len(ids) + 1
        return len(contents) - kept

    def write(self, run: Run, tokens: dict[str, int]) -> None:
        """Writes the run and adds its tokens to those of each split."""
        keys = np.empty(len(self._documents), KEY)
        halves = np.frombuffer(b"".join(digest[8:24] for digest in self._digests), ">u8").reshape(-1, 2)
        keys["order"], keys["check"] = halves[:, 0], halves[:, 1]
        keys["length"] = [len(document) for document in self._documents]
        splits = [self._unit.split or split_of_digest(digest) for digest in self._digests]
        keys["split"] = [SPLITS.index(split) for split in splits]
        order = np.lexsort((keys["check"], keys["order"], keys["split"]))
        with replacing(run.tokens) as file, file.open("wb") as opened:
            np.save(opened, np.concatenate([self._documents[index] for index in order]))
        if self._near:
            with replacing(run.signatures) as file, file.open("wb") as opened:
                np.save(opened, np.stack([self._signatures[index] for index in order]))
        with replacing(run.keys) as file, file.open("wb") as opened:
            np.save(opened, keys[order])
        for number, split in enumerate(SPLITS):
            tokens[split] += int(keys["length"][keys["split"] == number].sum())


def _run(directory: Path, key: str, number: int) -> Run:
    return Run.of(directory / f"{key}.{number:05}.keys.npy")


def _batches(records: Iterator[Record], bad: _BadLines) -> Iterator[list[str | np.ndarray]]:
    """The documents in batches that are worth a call of the tokenizer; what is bad goes into `bad`."""
    batch: list[str | np.ndarray] = []
    size = 0
    for record in records:
        if isinstance(record, Bad):
            bad.add(record)
            continue
        batch.append(record.content)
        size += len(record.content)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

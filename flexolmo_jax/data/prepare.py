"""From a corpus to token files that a training host maps into memory.

A prepared split is `<split>.tokens.npy` (all documents one after another, each ended by EOS) and `<split>.offsets.npy`
(where each begins, and the end). `manifest.json` names the digests of the sources and is written last.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flexolmo_jax.data.documents import split_texts, text_files
from flexolmo_jax.data.splits import SPLITS
from flexolmo_jax.errors import UserError

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Documents:
    """Token ids of a prepared split, mapped from disk.

    Attributes:
      tokens: uint16 [N], all documents one after another.
      offsets: int64 [documents + 1].
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def prepare(corpus: Path, out: Path) -> Path:
    """Tokenizes every split of a corpus into `out`, unless that is what `out` already holds; returns `out`.

    A corpus with files named `train*`, `validation*`, `test*` has these splits. In any other corpus, a stable hash of
    its text decides which split a document belongs to.

    Raises:
      UserError: the corpus is missing, empty or unreadable.
    """
    files = text_files(corpus)
    sources = {str(file.relative_to(corpus) if corpus.is_dir() else file.name): _digest(file) for file in files}
    manifest = {"format_version": FORMAT_VERSION, "vocabulary": "bytes", "sources": sources}
    if (out / "manifest.json").exists() and json.loads((out / "manifest.json").read_text()) == manifest:
        return out

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        counts = {split: _write_split(partial, split, documents) for split, documents in _tokenize(corpus).items()}
        if not counts["train"]:
            raise UserError(f"the corpus {corpus} has no document to train on")
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def open_split(prepared: Path, split: str) -> Documents:
    """Maps one split of a prepared corpus into memory."""
    tokens = np.load(prepared / f"{split}.tokens.npy", mmap_mode="r")
    return Documents(tokens, np.load(prepared / f"{split}.offsets.npy"))


def _tokenize(corpus: Path) -> dict[str, list[np.ndarray]]:
    with _quiet_start_of_tensorflow():
        from flexolmo_jax.data.tasks import text_task

    task = text_task("corpus", corpus)
    documents: dict[str, list[np.ndarray]] = {}
    for split in SPLITS:
        examples = task.get_dataset(None, split=split, shuffle=False).as_numpy_iterator()
        try:
            documents[split] = [example["targets"] for example in examples]
        except Exception:
            # TensorFlow buries what the reader raised; reading once more without it says what is wrong.
            collections.deque(split_texts(corpus, split), maxlen=0)
            raise
    return documents


@contextlib.contextmanager
def _quiet_start_of_tensorflow() -> Iterator[None]:
    """TensorFlow greets on standard error whatever its log level says; a person who prepares text need not see that."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _write_split(directory: Path, split: str, documents: list[np.ndarray]) -> int:
    documents = [document for document in documents if len(document) > 1]
    lengths = np.array([len(document) for document in documents], np.int64)
    tokens = np.concatenate(documents).astype(np.uint16) if documents else np.zeros(0, np.uint16)
    np.save(directory / f"{split}.tokens.npy", tokens)
    np.save(directory / f"{split}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    return len(documents)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

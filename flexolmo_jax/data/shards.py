"""The second half of preparation: sorted runs to shards, each a function of the documents in its stretch of digests."""

import hashlib
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.data.files import replacing
from flexolmo_jax.data.near_duplicates import Key
from flexolmo_jax.data.runs import Run
from flexolmo_jax.data.splits import SPLITS
from flexolmo_jax.data.tokens import offsets_file

MOST_DOCUMENT_TOKENS = 2**20
"""A longer document is stored as several, so that one row never has to read more than this."""

_DIGESTS = 2**64


class ShardJob(NamedTuple):
    """A shard to be written.

    Attributes:
      split: name of the split.
      number: of the shard, from 0.
      shards: how many the split has.
    """

    split: str
    number: int
    shards: int

    @property
    def file_name(self) -> str:
        return f"{self.split}-{self.number:05}-of-{self.shards:05}.array_record"


def write_shard(
    job: ShardJob, runs: Sequence[Run], directory: Path, *, once: bool, left_out: Set[Key]
) -> dict[str, Any]:
    """Writes a shard and its offsets, documents in the order of their digests; returns what the manifest says of it.

    Args:
      job: which shard.
      runs: all runs of all units, in any order.
      directory: where to write.
      once: whether a document that occurs again is left out.
      left_out: documents to leave out besides.
    """
    gathered = [_stretch(run, job) for run in runs]
    keys = np.concatenate([keys for keys, _ in gathered])
    documents = [document for each in gathered for document in _cut(*each)]
    order = np.lexsort((keys["check"], keys["order"]))
    repeated = similar = 0
    before = None
    kept: list[np.ndarray] = []
    for index in order.tolist():
        this = int(keys["order"][index]), int(keys["check"][index])
        again, before = this == before, this
        if once and again:
            repeated += 1
        elif (rank(job.split), *this) in left_out:
            similar += 1
        else:
            whole = documents[index]
            kept += [whole[cut : cut + MOST_DOCUMENT_TOKENS] for cut in range(0, len(whole), MOST_DOCUMENT_TOKENS)]
    file = directory / job.file_name
    _write(file, kept)
    return {
        "file": job.file_name,
        "documents": len(kept),
        "tokens": sum(map(len, kept)),
        "sha256": {each.name: _digest(each) for each in (file, offsets_file(file))},
        "repeated": repeated,
        "similar": similar,
    }


def rank(split: str) -> int:
    """Place of a split in the order in which near-duplicates are looked for: what is held out comes first."""
    return len(SPLITS) - 1 - SPLITS.index(split)


def _stretch(run: Run, job: ShardJob) -> tuple[np.ndarray, np.ndarray]:
    """The keys and tokens of a run that belong to the shard: one place in each file, because runs are sorted."""
    keys = np.load(run.keys, mmap_mode="r")
    number = SPLITS.index(job.split)
    begin, end = np.searchsorted(keys["split"], [number, number + 1])
    bounds = [-(-_DIGESTS * part // job.shards) for part in (job.number, job.number + 1)]
    order = keys["order"][begin:end]
    first, last = (begin + (np.searchsorted(order, np.uint64(b)) if b < _DIGESTS else len(order)) for b in bounds)
    before = int(keys["length"][:first].sum())
    mine = np.array(keys[first:last])
    tokens = np.load(run.tokens, mmap_mode="r")[before : before + int(mine["length"].sum())]
    return mine, np.array(tokens)


def _cut(keys: np.ndarray, tokens: np.ndarray) -> Iterator[np.ndarray]:
    ends = np.cumsum(keys["length"].astype(np.int64)).tolist()
    yield from (tokens[begin:end] for begin, end in zip([0, *ends], ends, strict=False))


def _write(file: Path, documents: Sequence[np.ndarray]) -> None:
    from array_record.python import array_record_module

    lengths = np.array([len(document) for document in documents], np.int64)
    with replacing(offsets_file(file)) as partial, partial.open("wb") as opened:
        np.save(opened, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    with replacing(file) as partial:
        writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
        for document in documents:
            writer.write(document.tobytes())
        writer.close()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

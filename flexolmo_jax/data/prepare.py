"""From text to token shards: plan, tokenize into sorted runs, find duplicates, write shards, move into place.

What comes out is a function of the documents and the settings: not of how files are named or ordered, how many
processes worked, or how often they were killed. While it grows it lies in `<out>.partial`; a finished piece there is
not done again, and `out` appears complete or not at all.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.data import files
from flexolmo_jax.data.files import replacing
from flexolmo_jax.data.near_duplicates import Key, near_duplicates
from flexolmo_jax.data.preparation import Preparation, Task
from flexolmo_jax.data.runs import BAD_SHOWN, Run, Unit, UnitReport, read_report, unit_key, write_runs
from flexolmo_jax.data.shards import ShardJob, rank, write_shard
from flexolmo_jax.data.splits import SPLITS
from flexolmo_jax.data.text_task import task_of
from flexolmo_jax.data.tokens import FORMAT_VERSION, MANIFEST, TOKENIZER, is_prepared, read_manifest
from flexolmo_jax.data.vocabularies import BYTES, SavedVocabulary
from flexolmo_jax.data.workers import Workers, in_processes, in_this_process, in_threads
from flexolmo_jax.errors import UserError

_SMALL_BYTES = 2**24
"""Starting processes costs more than it brings below this."""

_FEW_CORES = 4
"""Up to here one process keeps all cores busy; beyond, what Python does between calls of a tokenizer holds it up."""

_TOKENIZING = 0.9
"""About this share of the time goes into tokenizing, the rest into writing shards."""


def prepare(corpus: Path, out: Path, saved: SavedVocabulary | None = None) -> Path:
    """Where the tokens of a corpus are: `corpus` itself if it is prepared text, else `out`, where it is then prepared.

    A corpus with files named `train*`, `validation*`, `test*` has these splits. In any other corpus, a stable hash of
    its text decides which split a document belongs to.

    Args:
      corpus: text, or prepared text.
      out: directory to prepare text in.
      saved: what text is prepared with; None means bytes.

    Raises:
      UserError: the corpus is missing, empty or unreadable, or the vocabulary is not there.
    """
    if is_prepared(corpus):
        read_manifest(corpus)
        return corpus
    task = task_of(corpus, saved.name if saved else BYTES)
    prepare_task(task, out, Preparation(workers=1), overwrite=True)
    return out


def prepare_task(
    task: Task,
    out: Path,
    preparation: Preparation,
    *,
    workers: Workers | None = None,
    progress: Callable[[float], None] = lambda share: None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Prepares a task into `out`, unless that is what `out` already holds.

    Args:
      task: what to prepare.
      out: directory to write.
      preparation: how.
      workers: who does it; None means processes on this machine, as `preparation` says.
      progress: is told what share of the work is done.
      overwrite: whether other prepared text in `out` is replaced, when all is done; anything else never is.

    Returns:
      The manifest.

    Raises:
      UserError: the text, the tokenizer or `out` cannot be used; nothing is left behind.
    """
    units = task.units()
    settings = {"task": task.name, "vocabulary": task.vocabulary.fingerprint} | preparation.decides
    place = _Place(out.with_name(out.name + ".partial"))
    if _holds(out, settings, units):
        place.remove()
        return read_manifest(out)
    if out.exists() and not is_prepared(out) and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is no prepared text: give another --out")
    if is_prepared(out) and not overwrite:
        raise UserError(f"{out} holds other prepared text: give another --out, or --overwrite to replace it")
    try:
        place.begin({"settings": settings, "units": [unit_key(unit) for unit in units]})
        manifest = _work(place, task, units, preparation, workers or _local(preparation, units), progress)
        place.finish(manifest | {"settings": settings}, out)
    except OSError as error:
        place.remove()
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    except Exception:
        place.remove()
        raise
    return read_manifest(out)


@dataclasses.dataclass(frozen=True)
class _Place:
    """The directory in which a preparation grows."""

    directory: Path

    @property
    def runs(self) -> Path:
        return self.directory / "runs"

    @property
    def result(self) -> Path:
        return self.directory / "result"

    @property
    def reports(self) -> Path:
        return self.directory / "reports"

    @property
    def left_out(self) -> Path:
        return self.directory / "left_out.npy"

    def begin(self, plan: dict[str, Any]) -> None:
        """Goes on with what is there if it was begun with the same plan, else begins anew."""
        file = self.directory / "plan.json"
        if not (file.is_file() and json.loads(file.read_text()) == plan):
            self.remove()
            self.directory.mkdir(parents=True)
            with replacing(file) as partial:
                partial.write_text(json.dumps(plan))
        for each in (self.runs, self.result, self.reports):
            each.mkdir(exist_ok=True)

    def finish(self, manifest: dict[str, Any], out: Path) -> None:
        """Writes the manifest and moves the result to `out`."""
        for leftover in self.result.glob(".*"):
            leftover.unlink()
        with replacing(self.result / MANIFEST) as partial:
            partial.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if out.exists():
            shutil.rmtree(out)
        os.replace(self.result, out)
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def shard_report(self, job: ShardJob) -> Path:
        return self.reports / f"{job.file_name}.json"


def _work(
    place: _Place,
    task: Task,
    units: Sequence[Unit],
    preparation: Preparation,
    workers: Workers,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Everything between plan and manifest; returns what the manifest says."""
    near = preparation.deduplicate == "near"
    pending = [unit for unit in units if read_report(unit, place.runs) is None]
    advance = _Advance(lambda done: progress(_TOKENIZING * done), len(units), len(pending))
    workers(functools.partial(_tokenize, place, near), pending, advance)
    reports = [report for unit in units if (report := read_report(unit, place.runs)) is not None]
    _check(task, reports)
    if near and not place.left_out.exists():
        _write_left_out(place, preparation.near_threshold)
    jobs = []
    for split in SPLITS:
        count = -(-sum(report.tokens[split] for report in reports) // preparation.shard_tokens)
        jobs += [ShardJob(split, number, count) for number in range(count)]
    unwritten = [job for job in jobs if not place.shard_report(job).exists()]
    advance = _Advance(lambda done: progress(_TOKENIZING + (1 - _TOKENIZING) * done), len(jobs), len(unwritten))
    workers(functools.partial(_write, place, preparation.deduplicate != "none"), unwritten, advance)
    shutil.rmtree(place.result / TOKENIZER, ignore_errors=True)  # of a try that was killed
    task.vocabulary.save(place.result / TOKENIZER)
    return _manifest(place, task, reports, jobs)


def _tokenize(place: _Place, near: bool, unit: Unit) -> None:
    write_runs(unit, place.runs, near)


def _write(place: _Place, once: bool, job: ShardJob) -> None:
    report = write_shard(job, _all_runs(place), place.result, once=once, left_out=_read_left_out(place))
    with replacing(place.shard_report(job)) as partial:
        partial.write_text(json.dumps(report))


def _all_runs(place: _Place) -> list[Run]:
    return [Run.of(keys) for keys in sorted(place.runs.glob("[!.]*.keys.npy"))]


def _check(task: Task, reports: Sequence[UnitReport]) -> None:
    """Refuses text with too many bad lines, and text that there is not."""
    records, bad = sum(report.records for report in reports), sum(report.bad for report in reports)
    if bad > task.bad_share * records:
        first = next(line for report in reports for line in report.shown)
        raise UserError(
            f"{bad} of {records} lines of {task.name} are bad, more than the share of {task.bad_share:g} "
            f"that is skipped; the first: {first}"
        )
    if not sum(report.tokens["train"] for report in reports):
        raise UserError(f"the corpus {task.where} has no document to train on")


def _write_left_out(place: _Place, threshold: float) -> None:
    keys: list[Key] = []
    signatures = []
    for run in _all_runs(place):
        for split, order, check, _ in np.load(run.keys).tolist():
            keys.append((rank(SPLITS[split]), order, check))
        signatures.append(np.load(run.signatures))
    found = sorted(near_duplicates(keys, np.concatenate(signatures), threshold))
    with replacing(place.left_out) as partial, partial.open("wb") as opened:
        np.save(opened, np.array(found, np.uint64).reshape(-1, 3))


def _read_left_out(place: _Place) -> set[Key]:
    return {tuple(key) for key in np.load(place.left_out).tolist()} if place.left_out.exists() else set()


def _manifest(place: _Place, task: Task, reports: Sequence[UnitReport], jobs: Sequence[ShardJob]) -> dict[str, Any]:
    vocabulary = task.vocabulary
    splits: dict[str, Any] = {split: {"documents": 0, "tokens": 0, "shards": []} for split in SPLITS}
    dropped = {"repeated": 0, "similar": 0}
    for job in jobs:
        shard = json.loads(place.shard_report(job).read_text())
        for kind in dropped:
            dropped[kind] += shard.pop(kind)
        split = splits[job.split]
        split["shards"].append(shard)
        split["documents"] += shard["documents"]
        split["tokens"] += shard["tokens"]
    return {
        "format_version": FORMAT_VERSION,
        "kind": "prepared",
        "name": task.name,
        "vocabulary": {
            "fingerprint": vocabulary.fingerprint,
            "size": vocabulary.size,
            "eos_id": vocabulary.eos_id,
            "pad_id": vocabulary.pad_id,
        },
        "splits": splits,
        "records": sum(report.records for report in reports),
        "empty": sum(report.empty for report in reports),
        "bad": sum(report.bad for report in reports),
        "bad_lines": [line for report in reports for line in report.shown][:BAD_SHOWN],
        **dropped,
        "sources": sorted(
            (source for report in reports for source in report.sources), key=lambda each: (each["name"], each["bytes"])
        ),
    }


def _holds(out: Path, settings: dict[str, Any], units: Sequence[Unit]) -> bool:
    """Whether `out` is what would come out, by the digests of the sources."""
    if not (out / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(out)
    except UserError:
        return False
    if manifest.get("settings") != settings:
        return False
    found = sorted((source.name, source.size, source.path) for unit in units if (source := unit.source()))
    known = [(each["name"], each["bytes"], each["sha256"]) for each in manifest["sources"]]
    return [each[:2] for each in found] == [each[:2] for each in known] and all(
        files.digest(path) == sha256 for (_, _, path), (_, _, sha256) in zip(found, known, strict=True)
    )


def _local(preparation: Preparation, units: Sequence[Unit]) -> Workers:
    total = sum(source.size for unit in units if (source := unit.source()))
    cores = os.cpu_count() or 1
    if total < _SMALL_BYTES or (preparation.workers or cores) == 1:
        return in_this_process
    if not preparation.workers and cores <= _FEW_CORES:
        return in_threads(cores)
    return in_processes(preparation.workers or cores)


class _Advance:
    """Counts pieces of work that are done, and tells their share."""

    def __init__(self, tell: Callable[[float], None], total: int, left: int):
        self._tell, self._total, self._left = tell, total, left

    def __call__(self, done: int) -> None:
        self._left -= done
        self._tell(1 - self._left / self._total)

"""Builds an artefact leaf by leaf out of others: within a memory budget, by several writers, resumable, atomic.

The work goes on in `.NAME.merging-KEY/` beside the output, KEY being a digest of what is to be built. Every leaf has a
lock there, which the kernel gives back when its writer ends, however it ends, and a receipt once it is whole. So
threads, processes and machines that share the file system can work on one output, and a command that was killed goes
on where it was. The last one finishes: it writes the manifest and gives the directory its name.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import LeafPath
from flexolmo_jax.store import arrays
from flexolmo_jax.store.checkpoint import ARRAYS
from flexolmo_jax.store.companions import carry
from flexolmo_jax.store.directories import cannot_write, held, is_held, put_in_place, refuse_existing
from flexolmo_jax.store.layout import STATE, LeafLayout
from flexolmo_jax.store.manifest import FILE, Manifest, read
from flexolmo_jax.store.stored import PIECE_BYTES, StoredLeaf, refuse_not_finite

MEMORY_BUDGET = 2**30
"""Bytes of host memory that the arrays of an assembly take at most, where nobody says otherwise."""

_RESULT, _RECEIPTS, _LOCKS = "result", "receipts", "locks"
_SECONDS_BETWEEN_LOOKS = 0.1


class Source(Protocol):
    """Where a leaf of the output comes from."""

    @property
    def layout(self) -> LeafLayout:
        """Where it goes."""

    @property
    def identity(self) -> str:
        """Differs wherever the leaf's bytes would."""

    @property
    def memory(self) -> int:
        """The fewest bytes of memory that it needs."""

    def put(self, state: Path, memory: int) -> str:
        """Puts the leaf below `state` within so many bytes of memory and returns the SHA-256 of its bytes."""


@dataclasses.dataclass(frozen=True)
class Copied:
    """A leaf of another artefact, verified in the pass that copies it."""

    leaf: StoredLeaf

    @property
    def layout(self) -> LeafLayout:
        return dataclasses.replace(self.leaf.layout, format_version=LeafLayout.format_version)

    @property
    def identity(self) -> str:
        return self.leaf.sha256

    @property
    def memory(self) -> int:
        return PIECE_BYTES

    def put(self, state: Path, memory: int) -> str:
        self.layout.write_known(state, self.leaf.checked_pieces())
        return self.leaf.sha256


@dataclasses.dataclass(frozen=True)
class CopiedUnread(Copied):
    """A leaf of an artefact that was verified before: its files are copied without looking into them."""

    def put(self, state: Path, memory: int) -> str:
        if self.leaf.layout != self.layout:
            return super().put(state, memory)
        self.leaf.place(state, shutil.copyfile)
        return self.leaf.sha256


@dataclasses.dataclass(frozen=True)
class Linked(Copied):
    """A leaf whose files the output shares with another artefact, where the file system can; nothing is rewritten."""

    def put(self, state: Path, memory: int) -> str:
        if self.leaf.layout != self.layout:
            return super().put(state, memory)
        self.leaf.verify()
        return self._link(state)

    def _link(self, state: Path) -> str:
        try:
            self.leaf.place(state, os.link)
        except (OSError, shutil.Error):  # Another file system, or one without hard links.
            shutil.rmtree(state / self.layout.directory, ignore_errors=True)
            self.leaf.place(state, shutil.copyfile)
        return self.leaf.sha256


@dataclasses.dataclass(frozen=True)
class LinkedUnread(Linked):
    """The same of an artefact that was verified before."""

    def put(self, state: Path, memory: int) -> str:
        return self._link(state) if self.leaf.layout == self.layout else super().put(state, memory)


@dataclasses.dataclass(frozen=True)
class Computed:
    """A leaf that is computed from others.

    Attributes:
      layout: where it goes.
      identity: differs wherever the leaf's bytes would.
      memory: the fewest bytes that `slabs` needs.
      slabs: from a number of bytes of memory to the leaf in order, piece by piece.
      artefact: whose values they are, for the message if one is not finite.
    """

    layout: LeafLayout
    identity: str
    memory: int
    slabs: Callable[[int], Iterator[np.ndarray]]
    artefact: Path

    def put(self, state: Path, memory: int) -> str:
        return self.layout.write(state, self._pieces(memory))

    def _pieces(self, memory: int) -> Iterator[np.ndarray]:
        for slab in self.slabs(memory):
            piece = np.ascontiguousarray(slab).reshape(-1).view(np.uint8)
            refuse_not_finite(piece, self.layout, self.artefact)
            yield piece


def assemble(
    out: Path,
    sources: Mapping[LeafPath, Source],
    manifest: Callable[[dict], Manifest],
    *,
    carried: Path | None = None,
    overwrite: bool = False,
    memory_budget: int | None = None,
    writers: int | None = None,
) -> Manifest:
    """Writes an artefact whose directory appears complete or not at all.

    Args:
      out: directory to write.
      sources: where each of its leaves comes from.
      manifest: from the digests of the leaves to the manifest.
      carried: directory of accompanying files that the output carries along (see `flexolmo_jax.store.companions`).
      overwrite: whether an existing `out` is replaced.
      memory_budget: bytes of memory that arrays may take, over all writers of this process; None means `MEMORY_BUDGET`.
      writers: threads of this process that write; None takes as many as there are processors.

    Raises:
      UserError: a source is not what it should be, the budget is too small, or `out` cannot be written. Nothing is left
        behind; only what is interrupted or killed leaves what it has, for another try.
    """
    refuse_existing(out, overwrite=overwrite)
    memory_budget = MEMORY_BUDGET if memory_budget is None else memory_budget
    needed = max(source.memory for source in sources.values())
    if needed > memory_budget:
        raise UserError(f"--memory-budget is {memory_budget:,} bytes, but one piece takes {needed:,}")
    writers = max(1, min(writers or os.cpu_count() or 1, memory_budget // needed))
    work = _work_directory(out, sources, manifest)
    with cannot_write(out):
        _sweep(out, work)
        assembly = _Assembly(out, work, sources, manifest, carried, overwrite)
        try:
            for part in (f"{_RESULT}/{ARRAYS}", _RECEIPTS, _LOCKS):
                (work / part).mkdir(parents=True, exist_ok=True)
            with held(work):
                return assembly.run(writers, memory_budget // writers)
        except (UserError, OSError) as error:
            # Another who worked here has finished, or given up.
            if isinstance(error, FileNotFoundError) and (out.exists() or not work.exists()):
                return assembly.finished_by_another()
            _remove(work)
            raise


class _Assembly:
    """One process's part in building one output."""

    def __init__(
        self,
        out: Path,
        work: Path,
        sources: Mapping[LeafPath, Source],
        manifest: Callable[[dict], Manifest],
        carried: Path | None,
        overwrite: bool,
    ):
        self._out, self._work, self._sources = out, work, sources
        self._manifest, self._carried, self._overwrite = manifest, carried, overwrite
        self._stop = threading.Event()

    @property
    def _arrays(self) -> Path:
        return self._work / _RESULT / ARRAYS

    def run(self, writers: int, memory: int) -> Manifest:
        self._outline()
        largest_first = sorted(self._sources, key=lambda path: -self._sources[path].layout.nbytes)
        with ThreadPoolExecutor(writers) as pool:
            try:
                while pending := [path for path in largest_first if not self._receipt(path).exists()]:
                    done = sum(pool.map(lambda path: self._write(path, memory), pending))
                    if not done:  # Other processes are at the rest.
                        time.sleep(_SECONDS_BETWEEN_LOOKS)
                        os.stat(self._work)
            finally:
                self._stop.set()
        return self._finish()

    def _outline(self) -> None:
        with self._locked("outline", wait=True):
            if not (self._arrays / STATE).exists():
                # Receipts without it are those of a result that was put in place by a process killed right after. Their
                # directory stays: others who begin now rely on it.
                for receipt in (self._work / _RECEIPTS).iterdir():
                    receipt.unlink(missing_ok=True)
                fresh = self._work / "outline"
                shutil.rmtree(fresh, ignore_errors=True)
                arrays.outline(fresh, self._sources)
                shutil.rmtree(self._arrays, ignore_errors=True)
                fresh.rename(self._arrays)

    def _write(self, path: LeafPath, memory: int) -> bool:
        """Writes one leaf, unless somebody else is at it; says whether it did."""
        receipt = self._receipt(path)
        if self._stop.is_set():
            return False
        with self._locked(receipt.name, wait=False) as mine:
            if not mine or receipt.exists():
                return False
            state = self._arrays / STATE
            shutil.rmtree(state / ".".join(path), ignore_errors=True)
            try:
                digest = self._sources[path].put(state, memory)
            except BaseException:
                self._stop.set()
                raise
            unfinished = receipt.with_name(f"{receipt.name}.unfinished")
            unfinished.write_text(digest)
            unfinished.rename(receipt)
        return True

    def _finish(self) -> Manifest:
        with self._locked("finish", wait=True):
            described = {}
            for path, source in sorted(self._sources.items()):
                layout = source.layout
                described[layout.name] = arrays.describe(layout.shape, layout.dtype, self._receipt(path).read_text())
            manifest = self._manifest(described)
            if self._carried:
                carry(self._carried, self._work / _RESULT)
            manifest.write(self._work / _RESULT)
            if self._out.exists() and not self._overwrite:  # Another process was done before this one began to write.
                manifest = self.finished_by_another()
            else:
                put_in_place(self._work / _RESULT, self._out)
            _remove(self._work)
        return manifest

    def finished_by_another(self) -> Manifest:
        """The manifest of an output that another process has finished while this one worked on it too."""
        if (self._out / FILE).is_file():
            manifest = read(self._out)
            if self._manifest(manifest.arrays) == manifest:
                return manifest
        raise UserError(f"{self._out} was given up by another process that worked on the same merge; it says why")

    def _receipt(self, path: LeafPath) -> Path:
        return self._work / _RECEIPTS / ".".join(path)

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Holds a lock of the work directory and says so; without waiting, says whether it could have it."""
        handle = os.open(self._work / _LOCKS / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                mine = True
            except BlockingIOError:
                mine = False
            yield mine
        finally:
            os.close(handle)


def _work_directory(out: Path, sources: Mapping[LeafPath, Source], manifest: Callable[[dict], Manifest]) -> Path:
    """Where this very output is built, by whichever process and however often it takes."""
    plan = {source.layout.name: source.identity for source in sources.values()}
    planned = dataclasses.asdict(manifest({}))
    key = hashlib.sha256(json.dumps([plan, planned], sort_keys=True).encode()).hexdigest()
    return out.with_name(f".{out.name}.merging-{key[:16]}")


def _remove(work: Path) -> None:
    """Removes a work directory in one step for all others who work there, and then in peace."""
    gone = work.with_name(f"{work.name}-{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(FileNotFoundError):
        work.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sweep(out: Path, work: Path) -> None:
    """Deletes what killed writers of other contents for the same output have left."""
    for left in out.parent.glob(".*.merging-*"):
        if left.name.startswith(f".{out.name}.merging-") and left != work and left.is_dir() and not is_held(left):
            shutil.rmtree(left, ignore_errors=True)

"""Output directories that appear complete or not at all, and that a second run goes on writing after a kill."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.store.directories import cannot_write, put_in_place, refuse_existing

JOURNAL = "journal.jsonl"


class Parts:
    """The parts of an output that are done, each with what is to be remembered of it, such as its digest.

    Attributes:
      directory: where the output is written until it is complete.
    """

    def __init__(self, directory: Path, plan: Mapping[str, Any]):
        self.directory = directory
        self._file = directory / JOURNAL
        header = json.dumps({"plan": plan}, sort_keys=True)
        lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines() if self._file.is_file() else []
        if not lines or lines[0] != header:
            for each in directory.iterdir():
                shutil.rmtree(each) if each.is_dir() else each.unlink()
            self._file.write_text(header + "\n", encoding="utf-8")
            lines = []
        self._done: dict[str, Any] = {}
        for line in lines[1:]:
            with contextlib.suppress(ValueError):  # A kill can leave half a line, at the end.
                self._done |= json.loads(line)

    def earlier(self, name: str) -> Any | None:
        """What an interrupted run noted of this part, or None if it did not finish it."""
        return self._done.get(name)

    def finish(self, name: str, noted: Any) -> None:
        """Notes that a part is written."""
        with self._file.open("a", encoding="utf-8") as journal:
            # The line break comes first, so that half a line of an interrupted run spoils no other.
            journal.write("\n" + json.dumps({name: noted}))


@contextlib.contextmanager
def resumable_directory(out: Path, plan: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Parts]:
    """Yields the parts of a directory beside `out` that takes its name when the block ends well.

    A killed run leaves the directory there, hidden, and the next run with the same plan goes on with it. An exception
    removes it, but for an interruption by the user.

    Args:
      out: directory to write.
      plan: what determines every byte of the output; a left-over with another plan is discarded.
      overwrite: whether an existing `out` is replaced.

    Raises:
      UserError: `out` exists and may not be replaced, cannot be written to, the disk is full, or another process is
        writing it.
    """
    refuse_existing(out, overwrite=overwrite)
    partial = out.with_name(f".{out.name}.partial")
    with cannot_write(out):
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, out):
            try:
                yield Parts(partial, plan)
                (partial / JOURNAL).unlink()
                put_in_place(partial, out)
            except Exception:
                shutil.rmtree(partial, ignore_errors=True)
                raise


def refuse_losing(source: Path, out: Path) -> None:
    """Raises UserError if writing `out` would replace what is to be read."""
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} is or holds {source}, which is to be read: give another --out")


@contextlib.contextmanager
def _locked(directory: Path, out: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"another process is writing {out}: wait for it, or give another --out") from error
    finally:
        os.close(descriptor)

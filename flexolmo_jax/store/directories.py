"""Output directories that appear complete or not at all, whenever the process that writes them ends."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flexolmo_jax.errors import UserError


@contextlib.contextmanager
def complete_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new directory beside `out` that takes its name when the block ends well, and vanishes otherwise.

    What a killed process has left of such a directory vanishes too, when the next one writes the same `out`.

    Raises:
      UserError: `out` exists and may not be replaced, or cannot be written to, or the disk is full.
    """
    refuse_existing(out, overwrite=overwrite)
    with cannot_write(out):
        _sweep(out, "partial")
        partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            with held(partial):
                yield partial
                put_in_place(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, out: Path) -> None:
    """Gives a complete directory its name; an older one of that name is moved aside first and deleted afterwards."""
    _sweep(out, "replaced")
    if not out.exists():
        partial.rename(out)
        return
    aside = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    out.rename(aside)
    partial.rename(out)
    shutil.rmtree(aside)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Marks a directory as in use for as long as this process lives; several may hold it."""
    handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def is_held(directory: Path) -> bool:
    """Whether a living process holds the directory."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


@contextlib.contextmanager
def cannot_write(out: Path) -> Iterator[None]:
    """Turns an error of the operating system into a sentence about `out`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


@contextlib.contextmanager
def cannot_read(directory: Path) -> Iterator[None]:
    """The same about a directory that is read, or about the file in it that the error names."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or directory}: {error.strerror or error}") from error


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raises UserError if `out` is there already and may not be replaced."""
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: give another --out, or --overwrite to replace it")


def _sweep(out: Path, what: str) -> None:
    """Deletes what processes that were killed have left beside `out`."""
    for left in out.parent.glob(f".{_escaped(out.name)}.{what}-*"):
        if left.is_dir() and not is_held(left):
            shutil.rmtree(left, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)

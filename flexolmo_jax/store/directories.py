"""Output directories that appear complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flexolmo_jax.errors import UserError


@contextlib.contextmanager
def complete_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new directory beside `out` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
      UserError: `out` exists and may not be replaced, or cannot be written to, or the disk is full.
    """
    refuse_existing(out, overwrite=overwrite)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raises UserError if `out` is there already and may not be replaced."""
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: give another --out, or --overwrite to replace it")

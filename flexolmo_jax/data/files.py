"""The files of a corpus, here or wherever fsspec reaches; how files are opened, and how they are written."""

import dataclasses
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from flexolmo_jax.errors import UserError

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
"""One JSON object a line, as Dolma writes its documents too."""
TABLES = (".parquet", ".arrow", ".feather")
TEXT = (".txt", ".txt.gz", ".txt.zst")
TOKENS = (".npy",)
SUFFIXES = LINES + TABLES + TEXT + TOKENS


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Attributes:
      path: as fsspec takes it.
      name: its path within the corpus.
      size: bytes on disk.
      stamp: changes when the file does: its modification time, or what its file system has in place of one.
    """

    path: str
    name: str
    size: int
    stamp: str


def find_files(corpus: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[SourceFile]:
    """The files that a path or URL is, holds or, with `*`, matches, sorted by name.

    Raises:
      UserError: it does not exist or cannot be read, or there is no file of a known kind in it.
    """
    corpus = str(corpus)
    kinds = ", ".join(suffixes)
    try:
        system, root = fsspec.core.url_to_fs(corpus)
        local = isinstance(system, LocalFileSystem)
        if "*" in corpus:
            root, _, _ = root.partition("*")
            root = root.rpartition("/")[0]
            found = [path for path in system.glob(fsspec.core.url_to_fs(corpus)[1]) if not system.isdir(path)]
        elif not system.exists(root):
            raise UserError(f"no corpus at {corpus}: name a directory or a file that ends in {kinds}")
        elif system.isfile(root):
            found, root = [root], root.rpartition("/")[0]
        else:
            found = list(_walk(root)) if local else system.find(root)
        found = sorted(path for path in found if path.endswith(suffixes))
        files = [_describe(system, path, root, local) for path in found]
    except OSError as error:
        raise UserError(f"cannot read {corpus}: {error.strerror or error}") from error
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot read {corpus}: {' '.join(str(error).split())}") from error
    if not files:
        raise UserError(f"the corpus {corpus} holds no file that ends in {kinds}")
    return files


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed.

    Raises:
      UserError: it cannot be read, or what it holds is cut off or damaged.
    """
    try:
        with fsspec.open(path, "rb") as raw:
            if path.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), 2**20))
            elif path.endswith(".zst"):
                import pyarrow

                with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd") as stream:
                    yield cast(BinaryIO, io.BufferedReader(stream, 2**20))
            else:
                yield cast(BinaryIO, raw)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {path}: {' '.join(reason.split())}") from error


def digest(path: str) -> str:
    """SHA-256 of the file as it lies on disk."""
    with fsspec.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class replacing:
    """A file that appears whole or not at all: write what it gives, and at the end it takes the file's name."""

    def __init__(self, file: Path):
        self._file = file
        self._partial = file.with_name(f".{os.getpid()}.{file.name}")

    def __enter__(self) -> Path:
        return self._partial

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            os.replace(self._partial, self._file)
        else:
            self._partial.unlink(missing_ok=True)


def _walk(root: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:  # or a directory that cannot be listed would look empty
        raise error

    for directory, _, names in os.walk(root, onerror=refuse):
        yield from (os.path.join(directory, name) for name in names)


def _describe(system: fsspec.AbstractFileSystem, path: str, root: str, local: bool) -> SourceFile:
    name = path.removeprefix(root).lstrip("/")
    if local:
        status = os.stat(path)
        return SourceFile(path, name, status.st_size, str(status.st_mtime_ns))
    return SourceFile(system.unstrip_protocol(path), name, int(system.size(path) or 0), str(system.ukey(path)))

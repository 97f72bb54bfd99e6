"""Text documents from `.jsonl`, `.jsonl.gz` and `.txt` files."""

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from flexolmo_jax.data.splits import split_of
from flexolmo_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")


def text_files(path: Path) -> list[Path]:
    """The text files that `path` is or holds, sorted.

    Raises:
      UserError: the path does not exist or cannot be read, or there is no such file in it.
    """
    if not path.exists():
        raise UserError(f"no corpus at {path}: name a directory or a file that ends in {', '.join(SUFFIXES)}")
    try:
        files = [path] if path.is_file() else [path / name for name in os.listdir(path)]
    except OSError as error:  # looking for files in it would find none and not say why
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    files = sorted(part for file in files for part in (file, *file.rglob("*")) if part.is_file())
    files = [file for file in files if file.name.endswith(SUFFIXES)]
    if not files:
        raise UserError(f"the corpus {path} holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """The texts of all files in order: each line of a `.jsonl` has a field `text`; a `.txt` is one document.

    Raises:
      UserError: a file cannot be read, is not UTF-8, or a line is not a JSON object with a text.
    """
    for file in files:
        try:
            if file.name.endswith(".txt"):
                yield file.read_text(encoding="utf-8")
            else:
                yield from _read_lines(file)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text (byte {error.start}): convert it first") from error
        except (OSError, EOFError) as error:
            raise UserError(f"cannot read {file}: {error}") from error


def split_texts(corpus: Path, split: str) -> Iterator[str]:
    """The texts of one split of a corpus.

    A corpus with files named `train*`, `validation*`, `test*` has these splits. In any other corpus, a stable hash of
    its text decides which split a document belongs to.

    Raises:
      UserError: the corpus is missing, empty or unreadable.
    """
    files = text_files(corpus)
    if any(file.name.startswith("train") for file in files):
        yield from read_documents([file for file in files if file.name.startswith(split)])
    else:
        yield from (text for text in read_documents(files) if split_of(text) == split)


def _read_lines(file: Path) -> Iterator[str]:
    opener = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file} line {number} is not a JSON object with a field 'text'") from error
            if not isinstance(text, str):
                raise UserError(f"{file} line {number} has a 'text' that is not a string, but {type(text).__name__}")
            yield text

"""A task: whose text, where it lies, and how it becomes token ids. What a job file says in a few lines."""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from flexolmo_jax.data.documents import (
    Bad,
    Record,
    named_splits,
    read_records,
    read_token_array,
)
from flexolmo_jax.data.files import TOKENS, SourceFile, find_files, open_file
from flexolmo_jax.data.vocabularies import BYTES, Vocabulary, open_vocabulary
from flexolmo_jax.errors import UserError

PART_BYTES = 2**20
"""A file larger than this is read in several parts, where there are few files."""
_MOST_PARTS = 8
"""Of one file: every part of a compressed file decompresses all of it."""
_UNITS_PER_CORE = 2
"""So many pieces of work for each core keep the processes of a machine busy to the end."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoMix:
    """A mix file of OLMo-core: lines `label,path` that name token arrays.

    Attributes:
      file: the mix file.
      base: directory or URL that its paths are relative to.
      tokenizer: what stands in place of `{TOKENIZER}` in them.
    """

    file: str
    base: str
    tokenizer: str = "allenai/dolma2-tokenizer"

    def paths(self) -> list[str]:
        """Where the token arrays are.

        Raises:
          UserError: the mix file cannot be read, or a line of it is not `label,path`.
        """
        with open_file(self.file) as stream:
            lines = stream.read().decode(errors="replace").splitlines()
        found = []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            label, comma, path = line.strip().partition(",")
            if not (label and comma and path.endswith(TOKENS)):
                raise UserError(f"{self.file} line {number} is not a label, a comma and the path of a .npy file")
            found.append(f"{self.base.rstrip('/')}/{path.replace('{TOKENIZER}', self.tokenizer)}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask:
    """An owner's text.

    Attributes:
      name: of the task, in SeqIO's registry and in manifests.
      files: a file, a directory with everything in it, a pattern with `*`, several of these, or a mix file of
        OLMo-core; local, or any URL that fsspec knows.
      text_field: field or column that holds the text; dots lead into nested objects.
      tokenizer: "bytes", or the path of a `tokenizer.json` or a SentencePiece `.model`.
      eos_token: the end of text of a `tokenizer.json` that does not say which it is.
      bad_share: largest share of bad lines that is skipped; any more, and nothing is prepared.
    """

    name: str
    files: str | tuple[str, ...] | OlmoMix
    text_field: str = "text"
    tokenizer: str = BYTES
    eos_token: str = ""
    bad_share: float = 0.0

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise UserError(f"TextTask.name is {self.name!r}, but may have letters, digits, '.', '_' and '-' only")
        if not 0 <= self.bad_share < 1:
            raise UserError(f"TextTask.bad_share must be at least 0 and below 1, but it is {self.bad_share}")

    @property
    def where(self) -> str:
        return self.files.file if isinstance(self.files, OlmoMix) else str(self.files)

    @property
    def vocabulary(self) -> Vocabulary:
        return open_vocabulary(self.tokenizer, self.eos_token)

    def units(self) -> "list[TextUnit]":
        """Every part of every file, as pieces of work that can be done in any order, by anybody.

        Raises:
          UserError: there are no such files.
        """
        files = self._files()
        splits = named_splits(files)
        wanted = min(_MOST_PARTS, -(-_UNITS_PER_CORE * (os.cpu_count() or 1) // len(files)))
        found = []
        for file in files:
            if splits and file not in splits:
                continue
            parts = min(wanted, max(1, -(-file.size // PART_BYTES)))
            found += [TextUnit(self, file, splits.get(file, ""), part, parts) for part in range(parts)]
        return found

    def _files(self) -> list[SourceFile]:
        if isinstance(self.files, OlmoMix):
            named = self.files.paths()
        else:
            named = [self.files] if isinstance(self.files, str) else list(self.files)
        return list(dict.fromkeys(file for each in named for file in find_files(each)))


@dataclasses.dataclass(frozen=True)
class TextUnit:
    """A part of a file of a task.

    Attributes:
      task: whose text it is.
      file: the file.
      split: the split that the file's name puts it into; empty where each document's hash decides.
      part: which part of the file, from 0.
      parts: how many parts the file is read in.
    """

    task: TextTask
    file: SourceFile
    split: str
    part: int
    parts: int

    @property
    def vocabulary(self) -> Vocabulary:
        return self.task.vocabulary

    def records(self) -> Iterator[Record]:
        """Its documents, and what cannot be one.

        Raises:
          UserError: the file cannot be read, or it has a bad line and the task skips none.
        """
        if self.file.path.endswith(TOKENS):
            yield from read_token_array(self.file, self.vocabulary, self.part, self.parts)
            return
        for record in read_records(self.file, self.task.text_field, self.part, self.parts):
            if isinstance(record, Bad) and not self.task.bad_share:
                raise UserError(str(record))
            yield record

    def source(self) -> SourceFile | None:
        """The file, if this unit is the one to account for it."""
        return self.file if self.part == 0 else None


def task_of(corpus: Path, tokenizer: str = BYTES) -> TextTask:
    """The task of a corpus that a job names by its path alone: its field `text`."""
    name = re.sub(r"[^A-Za-z0-9._-]|^[._-]+", "_", corpus.name).lstrip("._-") or "corpus"
    return TextTask(name=name, files=str(corpus), tokenizer=tokenizer)

"""Documents out of files: JSON lines, tables, plain text and token arrays.

A *record* is a document or, where a line cannot be one, a `Bad`. To let several processes read one file, every reader
takes the records of part `k` of `n` only; the parts of a file are disjoint and together all of it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np

from flexolmo_jax.data.files import LINES, TABLES, TEXT, SourceFile, find_files, open_file
from flexolmo_jax.data.splits import SPLITS, digest_of, split_of_digest
from flexolmo_jax.data.vocabularies import Vocabulary, id_type
from flexolmo_jax.errors import UserError

MOST_LINE_BYTES = 64 * 2**20
"""A longer line is no document but a file that lost its line ends; it is not read into memory."""

_RECORDS_IN_A_BLOCK = 64
"""So many records in a row belong to one part of a file."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROWS_AT_ONCE = 256
_IDS_AT_ONCE = 2**22
_NPY_MAGIC = b"\x93NUMPY"


class Document(NamedTuple):
    """A document: its text, or its token ids where it comes from a token array, without an end of text."""

    content: str | np.ndarray


class Bad(NamedTuple):
    """What cannot be a document: where it stands, and what is wrong with it."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where} {self.problem}"


Record = Document | Bad


def read_records(file: SourceFile, field: str = "text", part: int = 0, parts: int = 1) -> Iterator[Record]:
    """The documents of a text file, in order.

    Args:
      file: a file of JSON lines, a table or plain text.
      field: where a line or a table has its text; dots lead into nested objects.
      part: which part of the file to read, from 0.
      parts: how many parts it is read in.

    Raises:
      UserError: the file cannot be read as what its name says.
    """
    if file.path.endswith(LINES):
        yield from _read_lines(file.path, field.split("."), part, parts)
    elif file.path.endswith(TABLES):
        yield from _read_table(file.path, field, part, parts)
    elif file.path.endswith(TEXT):
        if part == 0:
            yield _read_text(file.path)
    else:
        raise UserError(f"{file.path} is a token array, but text is needed here")


def split_texts(corpus: Path, split: str) -> Iterator[str]:
    """The texts of one split of a corpus; see `named_splits` and `split_of_digest` for which split each belongs to.

    Raises:
      UserError: the corpus is missing, empty or unreadable, or a line of it is bad.
    """
    files = find_files(corpus)
    by_name = named_splits(files)
    for file in files:
        if by_name and by_name.get(file) != split:
            continue
        for text in _texts(file):
            if by_name or split_of_digest(digest_of(text)) == split:
                yield text


def read_documents(paths: Sequence[Path]) -> Iterator[str]:
    """The texts of all files that the paths are or hold, in order.

    Raises:
      UserError: a file cannot be read, or a line of it is bad.
    """
    for path in paths:
        for file in find_files(path):
            yield from _texts(file)


def named_splits(files: Sequence[SourceFile]) -> dict[SourceFile, str]:
    """The split of each file by its name, where a file's name begins with `train`; other files are left out then.

    Empty where no file's name does: a stable hash of each document decides then.
    """
    names = {file: file.name.rpartition("/")[2] for file in files}
    if not any(name.startswith("train") for name in names.values()):
        return {}
    return {file: split for file, name in names.items() for split in SPLITS if name.startswith(split)}


def read_token_array(file: SourceFile, vocabulary: Vocabulary, part: int = 0, parts: int = 1) -> Iterator[Document]:
    """The documents of a token array: runs of ids between ends of text.

    OLMo-core's arrays are ids one after another without a header, of the smallest unsigned type that holds the
    vocabulary; NumPy's own files, which begin with one, are read too. Part `k` has the documents that begin in the
    `k`-th of `parts` equal stretches.

    Raises:
      UserError: the size is odd, an id lies outside the vocabulary, or NumPy's header is of another type.
    """
    with open_file(file.path) as stream:
        kind, begin, count = _layout_of_array(file, stream, vocabulary)
        start, end = count * part // parts, count * (part + 1) // parts
        pending: list[np.ndarray] = []
        position = max(start - 1, 0)
        skipping = start > 0
        stream.seek(begin + position * kind.itemsize)
        while position < count and (position < end or pending):
            ids = np.frombuffer(stream.read(min(_IDS_AT_ONCE, count - position) * kind.itemsize), kind)
            if len(ids) and int(ids.max()) >= vocabulary.size:
                raise UserError(
                    f"{file.path} holds the id {int(ids.max())}, but the vocabulary has {vocabulary.size}: "
                    "it was made with another tokenizer or type"
                )
            ends = np.flatnonzero(ids == vocabulary.eos_id)
            cursor = 0
            for stop in ends:
                if skipping:
                    skipping = False
                elif position + cursor < end or pending:
                    yield Document(np.concatenate([*pending, ids[cursor:stop]]))
                pending = []
                cursor = int(stop) + 1
                if position + cursor >= end:
                    return
            if not skipping and cursor < len(ids):
                pending.append(ids[cursor:])
            position += len(ids)
        if pending:
            yield Document(np.concatenate(pending))


def _texts(file: SourceFile) -> Iterator[str]:
    for record in read_records(file):
        if isinstance(record, Bad):
            raise UserError(str(record))
        yield str(record.content)


def _layout_of_array(file: SourceFile, stream: BinaryIO, vocabulary: Vocabulary) -> tuple[np.dtype, int, int]:
    """Type of the ids, where they begin in the file, and how many there are."""
    kind = id_type(vocabulary.size)
    if stream.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
        if file.size % kind.itemsize:
            raise UserError(f"{file.path} has {file.size} bytes, which is no whole number of {kind.name} ids")
        return kind, 0, file.size // kind.itemsize
    stream.seek(0)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(stream)
    except ValueError as error:
        raise UserError(f"{file.path} has a damaged NumPy header: {error}") from error
    if len(shape) != 1 or kind.kind != "u":
        raise UserError(f"{file.path} holds {kind.name} of shape {shape}, but token ids are a row of unsigned integers")
    begin = stream.tell()
    if file.size - begin != shape[0] * kind.itemsize:
        raise UserError(f"{file.path} is cut off: its header promises {shape[0]} ids")
    return kind, begin, shape[0]


def _read_lines(path: str, field: list[str], part: int, parts: int) -> Iterator[Record]:
    with open_file(path) as stream:
        for number, line in enumerate(_bounded_lines(stream), 1):
            if (number - 1) // _RECORDS_IN_A_BLOCK % parts != part:
                continue
            where = f"{path} line {number}"
            if line is None:
                yield Bad(where, f"is longer than {MOST_LINE_BYTES // 2**20} MiB")
            elif line.strip():
                yield _parse(line, field, where)


def _bounded_lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Lines, or None for one that is too long to be read."""
    while line := stream.readline(MOST_LINE_BYTES):
        if len(line) == MOST_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(MOST_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line


def _parse(line: bytes, field: list[str], where: str) -> Record:
    name = ".".join(field)
    try:
        value: Any = json.loads(line.removeprefix(_BYTE_ORDER_MARK).decode())
        for key in field:
            value = value[key]
    except UnicodeDecodeError as error:
        return Bad(where, f"is not UTF-8 text (byte {error.start})")
    except (ValueError, KeyError, TypeError, RecursionError):
        return Bad(where, f"is not a JSON object with a field {name!r}")
    return _checked(value, name, where)


def _checked(value: Any, name: str, where: str) -> Record:
    if not isinstance(value, str):
        return Bad(where, f"has a {name!r} that is not a string, but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        return Bad(where, f"has a {name!r} with half of a surrogate pair")
    return Document(value)


def _read_table(path: str, field: str, part: int, parts: int) -> Iterator[Record]:
    import pyarrow

    number = 0
    try:
        with fsspec.open(path, "rb") as raw:
            for index, texts in enumerate(_columns(raw, path, field)):
                if index % parts == part:
                    for row, text in enumerate(texts.to_pylist(), number + 1):
                        yield _checked(text, field, f"{path} row {row}")
                number += len(texts)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _columns(raw: BinaryIO, path: str, field: str) -> Iterator[Any]:
    """The field of a Parquet or Arrow file, in pieces."""
    import pyarrow
    from pyarrow import compute, parquet

    if path.endswith(".parquet"):
        table = parquet.ParquetFile(raw)
        schema, batches = table.schema_arrow, lambda name: table.iter_batches(_ROWS_AT_ONCE, columns=[name])
    else:
        try:
            file = pyarrow.ipc.open_file(raw)
            schema, batches = file.schema, lambda _: (file.get_batch(i) for i in range(file.num_record_batches))
        except pyarrow.ArrowInvalid:
            raw.seek(0)
            stream = pyarrow.ipc.open_stream(raw)
            schema, batches = stream.schema, lambda _: stream
    first, *inner = [field] if field in schema.names else field.split(".")
    if first not in schema.names:
        raise UserError(f"{path} has no column {first!r}: it has {', '.join(schema.names) or 'none'}")
    for batch in batches(first):
        column = batch.column(batch.schema.get_field_index(first))
        try:
            yield compute.struct_field(column, inner) if inner else column
        except (pyarrow.ArrowException, KeyError) as error:
            raise UserError(f"{path} has no field {field!r} in its column {first!r}") from error


def _read_text(path: str) -> Record:
    with open_file(path) as stream:
        content = stream.read()
    try:
        return Document(content.decode())
    except UnicodeDecodeError as error:
        return Bad(path, f"is not UTF-8 text (byte {error.start}): convert it first")

"""Documents out of every kind of file, and what is said of bad ones."""

import gzip
import json
import os

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from flexolmo_jax.data import documents
from flexolmo_jax.data.documents import Bad, read_documents, read_records, read_token_array, split_texts
from flexolmo_jax.data.files import find_files
from flexolmo_jax.data.splits import split_of
from flexolmo_jax.data.text_task import OlmoMix, TextTask
from flexolmo_jax.data.vocabularies import open_vocabulary
from flexolmo_jax.errors import UserError

TEXTS = [f"text number {n} — naïve" for n in range(300)]


def lines(texts=TEXTS):
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write(file, texts=TEXTS):
    """Writes the texts as what the file's name says."""
    if file.name.endswith(".gz"):
        file.write_bytes(gzip.compress(lines(texts)))
    elif file.name.endswith(".zst"):
        file.write_bytes(zstd(lines(texts)))
    elif file.suffix == ".jsonl":
        file.write_bytes(lines(texts))
    elif file.suffix == ".parquet":
        parquet.write_table(pa.table({"text": texts}), file, row_group_size=70)
    elif file.suffix == ".feather":
        with pa.ipc.new_file(file, pa.schema([("text", pa.string())])) as writer:
            writer.write_table(pa.table({"text": texts}), max_chunksize=70)
    elif file.suffix == ".arrow":
        with pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as writer:
            writer.write_table(pa.table({"text": texts}), max_chunksize=70)


KINDS = ["x.jsonl", "x.jsonl.gz", "x.json.gz", "x.json.zst", "x.jsonl.zst", "x.parquet", "x.arrow", "x.feather"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("parts", [1, 3])
def test_the_parts_of_a_file_are_all_of_it_once(name, parts, tmp_path):
    write(tmp_path / name)
    (file,) = find_files(tmp_path)
    found = [[record.content for record in read_records(file, "text", part, parts)] for part in range(parts)]
    if parts == 1:
        assert found[0] == TEXTS
    else:
        assert sorted(text for part in found for text in part) == sorted(TEXTS)
        assert sum(1 for part in found if part) > 1


def test_a_field_can_lie_in_nested_objects(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": {"text": "one"}}\n')
    parquet.write_table(pa.table({"body": [{"text": "two", "n": 1}]}), tmp_path / "b.parquet")
    contents = [record.content for file in find_files(tmp_path) for record in read_records(file, "body.text")]
    assert contents == ["one", "two"]


def test_files_are_found_by_directory_pattern_and_url(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "deep/a.jsonl")
    write(tmp_path / "deep/er/b.jsonl.gz")
    (tmp_path / "deep/notes.md").write_text("no corpus")
    assert [file.name for file in find_files(tmp_path)] == ["deep/a.jsonl", "deep/er/b.jsonl.gz"]
    assert [file.name for file in find_files(str(tmp_path / "deep/*.jsonl"))] == ["a.jsonl"]
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/x.jsonl.gz", gzip.compress(lines()))
    (file,) = find_files("memory://bucket")
    assert file.path == "memory:///bucket/x.jsonl.gz" and file.size == memory.size("/bucket/x.jsonl.gz")
    assert [record.content for record in read_records(file)] == TEXTS


def test_plain_text_files_are_documents(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first\nstill first")
    assert list(read_documents([tmp_path])) == ["first\nstill first", "second"]


def test_splits_by_hash_are_disjoint_and_whole(tmp_path):
    write(tmp_path / "all.jsonl.gz")
    parts = [list(split_texts(tmp_path, split)) for split in ("train", "validation", "test")]
    assert sorted(text for part in parts for text in part) == sorted(TEXTS) and all(parts)
    assert all(split_of(text) == "test" for text in parts[2])


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2 has a 'text' that is not a string"),
        ("x.jsonl", b'{"words": "a"}\n', "line 1 is not a JSON object with a field 'text'"),
        ("x.jsonl", b"nonsense\n", "line 1"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "line 1 has a 'text' with half of a surrogate pair"),
        ("x.jsonl", lines()[:2000] + '{"text": "é"}'.encode("latin-1"), "is not UTF-8"),
        ("x.txt", b"\xff\xfe", "not UTF-8"),
        ("x.jsonl.gz", gzip.compress(lines(), mtime=0)[:-20], "cannot read"),
        ("x.jsonl.gz", b"not gzip", "cannot read"),
        ("x.jsonl.gz", gzip.compress(lines(), mtime=0)[:200] + b"!" * 900, "cannot read"),
        ("x.jsonl.zst", zstd(lines())[:-20], "cannot read"),
        ("x.jsonl.zst", b"no zstandard", "cannot read"),
        ("x.parquet", b"no parquet", "cannot read"),
        ("x.arrow", b"no arrow", "cannot read"),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as refusal:
        list(read_documents([tmp_path]))
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_table_without_the_column_says_which_it_has(tmp_path):
    parquet.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet has no column 'text': it has body, n"):
        list(read_documents([tmp_path]))
    with pytest.raises(UserError, match=r"no field 'body\.text' in its column 'body'"):
        list(read_records(find_files(tmp_path)[0], "body.text"))


def test_a_line_that_is_too_long_is_bad_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MOST_LINE_BYTES", 2**20)
    long = json.dumps({"text": "x" * 5 * 2**20}).encode()
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' + long + b'\n{"text": "b"}\n')
    first, bad, last = read_records(find_files(tmp_path)[0])
    assert (first.content, last.content) == ("a", "b")
    assert isinstance(bad, Bad) and str(bad).endswith("line 2 is longer than 1 MiB")


@pytest.mark.parametrize("corpus", ["nowhere", "memory://nowhere", "unheard-of://bucket"])
def test_a_corpus_that_is_not_there_is_named(corpus):
    with pytest.raises(UserError, match=corpus):
        find_files(corpus)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any directory")
def test_a_directory_that_cannot_be_listed_is_not_empty(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="cannot read"):
        find_files(tmp_path)


END = open_vocabulary("bytes").eos_id


@given(
    lengths=st.lists(st.integers(0, 9), max_size=30), parts=st.integers(1, 8), ended=st.booleans(), header=st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_a_token_array_is_cut_at_ends_of_text_in_any_number_of_parts(lengths, parts, ended, header, tmp_path_factory):
    expected = [np.arange(length) % 200 + 3 for length in lengths]
    ids = np.concatenate([np.append(document, END) for document in expected] or [np.zeros(0)]).astype(np.uint16)
    if not ended and len(ids):
        ids = ids[:-1]
        expected = expected if len(expected[-1]) else expected[:-1]
    file = tmp_path_factory.mktemp("array") / "x.npy"
    if header:
        np.save(file, ids)
    else:
        file.write_bytes(ids.tobytes())
    (source,) = find_files(file)
    vocabulary = open_vocabulary("bytes")
    found = [record.content for part in range(parts) for record in read_token_array(source, vocabulary, part, parts)]
    assert [each.tolist() for each in found] == [each.tolist() for each in expected]


def test_a_token_array_is_read_across_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_IDS_AT_ONCE", 7)
    expected = [list(range(3, 3 + length)) for length in (5, 30, 1, 0, 14, 2)]
    ids = np.array([token for document in expected for token in [*document, END]], np.uint16)
    (tmp_path / "x.npy").write_bytes(ids.tobytes())
    (source,) = find_files(tmp_path)
    for parts in (1, 2, 5):
        found = [
            record.content.tolist()
            for part in range(parts)
            for record in read_token_array(source, open_vocabulary("bytes"), part, parts)
        ]
        assert found == expected


@pytest.mark.parametrize(
    "content, says",
    [
        (b"\x03\x00\x04", "has 3 bytes, which is no whole number of uint16 ids"),
        (np.array([3, 900], np.uint16).tobytes(), "holds the id 900, but the vocabulary has 259"),
        (b"\x93NUMPY\x01\x00junk", "damaged NumPy header"),
    ],
)
def test_a_bad_token_array_is_named_in_one_sentence(content, says, tmp_path):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UserError, match=says) as refusal:
        list(read_token_array(find_files(tmp_path)[0], open_vocabulary("bytes")))
    assert "x.npy" in str(refusal.value) and "\n" not in str(refusal.value)


def test_arrays_of_floats_or_of_rows_are_refused(tmp_path):
    for array in (np.zeros(3), np.zeros((2, 3), np.uint16)):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(UserError, match="a row of unsigned integers"):
            list(read_token_array(find_files(tmp_path)[0], open_vocabulary("bytes")))


def test_a_mix_file_names_token_arrays(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "pre/tok" / name).mkdir(parents=True)
        (tmp_path / "pre/tok" / name / "part-0.npy").write_bytes(np.array([3, 4, END], np.uint16).tobytes())
    mix = tmp_path / "mix.txt"
    mix.write_text("# a comment\n\nweb,pre/{TOKENIZER}/one/part-0.npy\ncode,pre/{TOKENIZER}/two/part-0.npy\n")
    task = TextTask(name="mix", files=OlmoMix(file=str(mix), base=str(tmp_path), tokenizer="tok"))
    assert [unit.file.path for unit in task.units()] == [
        f"{tmp_path}/pre/tok/{name}/part-0.npy" for name in ("one", "two")
    ]
    mix.write_text("web pre/one.npy\n")
    with pytest.raises(UserError, match=r"mix\.txt line 1 is not a label"):
        task.units()

"""Text to batches: corpora, splits, preparation, packing, order, decoys."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data import builtin
from flexolmo_jax.data.decoys import Decoys
from flexolmo_jax.data.documents import read_documents, split_texts, text_files
from flexolmo_jax.data.packing import Packing, sample_rows
from flexolmo_jax.data.prepare import Documents, open_split, prepare
from flexolmo_jax.data.reading import batches, read_from
from flexolmo_jax.data.splits import split_of
from flexolmo_jax.data.vocabulary import EOS_ID, decode, encode
from flexolmo_jax.errors import UserError
from tests.small import write_corpus


def documents(*lengths: int) -> Documents:
    """Documents of the given lengths whose tokens count up, so that every token says where it comes from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Documents(np.arange(offsets[-1], dtype=np.uint16) + 3, offsets)


@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=40), length=st.integers(2, 40))
@settings(max_examples=80, deadline=None)
def test_packing_keeps_every_token_of_every_document_in_order(lengths, length):
    source = documents(*lengths)
    packing = Packing(source, length)
    seen: list[int] = []
    starts = set(source.offsets.tolist())
    for index in range(len(packing)):
        rows = packing[index]
        tokens = np.append(rows.inputs, rows.targets[-1])
        np.testing.assert_array_equal(rows.targets[:-1], rows.inputs[1:])
        for number in range(1, rows.segments.max() + 1):
            (where,) = np.nonzero(rows.segments == number)
            np.testing.assert_array_equal(rows.positions[where], np.arange(len(where)))
            np.testing.assert_array_equal(np.diff(rows.inputs[where]), 1)
        counted = rows.weights > 0
        assert not counted[rows.segments == 0].any()
        np.testing.assert_array_equal(rows.targets[counted], rows.inputs[counted] + 1)
        seen += [token - 3 for token in tokens.tolist() if token]
    cut = {
        end - 1
        for begin, end in zip(source.offsets, source.offsets[1:], strict=False)
        if (end - begin) % (length + 1) == 1
    }
    assert sorted(seen) == [token for token in range(source.offsets[-1]) if token not in cut]
    assert starts


def test_packing_needs_no_more_rows_than_first_fit_decreasing():
    lengths = np.random.default_rng(0).integers(2, 130, 800).tolist()
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = next((row for row, room in enumerate(rooms) if room >= length), None)
        if fitting is None:
            rooms.append(129 - length)
        else:
            rooms[fitting] -= length
    packing = Packing(documents(*lengths), 128)
    assert len(packing) <= len(rooms)
    assert np.mean([(packing[index].segments == 0).mean() for index in range(len(packing))]) < 0.05


def test_a_batch_is_a_function_of_seed_and_step_and_holds_exact_shares():
    sources = {0: Packing(documents(*[20] * 50), 19), 1: Packing(documents(*[20] * 30), 19)}
    dataset = batches(sources, {0: 0.75, 1: 0.25}, 8, seed=3)
    for step, batch in zip(range(40, 50), read_from(dataset, 40), strict=False):
        again = batches(sources, {0: 0.75, 1: 0.25}, 8, seed=3)[step]
        np.testing.assert_array_equal(batch.rows.inputs, again.rows.inputs)
        assert batch.source.tolist().count(1) == 2
    other = batches(sources, {0: 0.75, 1: 0.25}, 8, seed=4)[40]
    assert not np.array_equal(other.rows.inputs, dataset[40].rows.inputs)


def test_every_row_comes_once_an_epoch_and_epochs_differ():
    packing = Packing(documents(*[20] * 24), 19)
    dataset = batches({0: packing}, {0: 1.0}, 8, seed=0)
    epochs = [[int(row[0]) for step in range(3 * e, 3 * e + 3) for row in dataset[step].rows.inputs] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(int(packing[i].inputs[0]) for i in range(24))
    assert epochs[0] != epochs[1]


def test_decoys_are_fixed_rows_that_use_known_ids_and_repeat_no_document():
    public, own = Packing(documents(*[30] * 20), 19), Packing(documents(*[25] * 20), 19)
    decoys = Decoys(public, own, seed=1)
    known = set(range(3, 603))
    for index in range(6):
        rows = decoys[index]
        np.testing.assert_array_equal(rows.inputs, Decoys(public, own, seed=1)[index].inputs)
        np.testing.assert_array_equal(rows.targets[:-1], rows.inputs[1:])
        assert set(rows.inputs.tolist()) <= known | {0}
        assert not np.array_equal(rows.inputs, public[index].inputs)
    assert not np.array_equal(decoys[0].inputs, Decoys(public, own, seed=2)[0].inputs)


def test_sampling_more_rows_than_there_are_pads_with_nothing():
    rows = sample_rows(Packing(documents(20, 20), 19), 4)
    assert rows.inputs.shape == (4, 19)
    assert rows.weights[:2].sum() == 38 and rows.weights[2:].sum() == 0


@given(st.text(max_size=40))
def test_bytes_round_trip(text):
    if "\ud800" <= max(text, default="") <= "\udfff":
        return
    assert decode([*encode(text), EOS_ID, 77]) == text


def test_the_byte_vocabulary_is_seqios():
    seqio = pytest.importorskip("seqio")
    assert encode("né 中") == seqio.ByteVocabulary().encode("né 中")


def test_preparation_tokenizes_every_split_and_is_reused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", ["one", "zwölf"])
    prepared = prepare(corpus, tmp_path / "prepared")
    train = open_split(prepared, "train")
    assert [decode(train[i].tolist()) for i in range(len(train))] == ["one", "zwölf"]
    assert train.tokens[-1] == EOS_ID
    before = (prepared / "manifest.json").stat().st_mtime_ns
    prepare(corpus, tmp_path / "prepared")
    assert (prepared / "manifest.json").stat().st_mtime_ns == before
    (corpus / "train.jsonl").write_text('{"text": "changed"}\n')
    assert decode(open_split(prepare(corpus, tmp_path / "prepared"), "train")[0].tolist()) == "changed"


def test_splits_by_hash_are_disjoint_and_whole(tmp_path):
    (tmp_path / "notes").mkdir()
    texts = [f"note {n}" for n in range(300)]
    with gzip.open(tmp_path / "notes/all.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    parts = [list(split_texts(tmp_path / "notes", split)) for split in ("train", "validation", "test")]
    assert sorted(text for part in parts for text in part) == sorted(texts) and all(parts)
    assert all(split_of(text) == "test" for text in parts[2])


def test_plain_text_files_are_documents(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first\nstill first")
    assert list(read_documents(text_files(tmp_path))) == ["first\nstill first", "second"]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2 has a 'text' that is not a string"),
        ("x.jsonl", b'{"words": "a"}\n', "line 1 is not a JSON object with a field 'text'"),
        ("x.jsonl", b"nonsense\n", "line 1"),
        ("x.jsonl", '{"text": "é"}'.encode("latin-1"), "not UTF-8"),
        ("x.txt", b"\xff\xfe", "not UTF-8"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 500, mtime=0)[:-20], "cannot read"),
        ("x.jsonl.gz", b"not gzip", "cannot read"),
    ],
    ids=["text is a number", "no text", "no JSON", "latin-1", "no UTF-8", "cut off", "no gzip"],
)
def test_a_bad_file_is_named_in_one_sentence(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as refusal:
        list(read_documents(text_files(tmp_path)))
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.slow
def test_builtin_corpora_are_deterministic_deduplicated_and_disjoint(tmp_path):
    builtin.build(tmp_path / "first")
    builtin.build(tmp_path / "second")
    for name in ("public", "code", "math", "unicode"):
        seen: dict[str, str] = {}
        for split in ("train", "validation", "test"):
            file = tmp_path / "first" / name / f"{split}.jsonl.gz"
            assert file.read_bytes() == (tmp_path / "second" / name / f"{split}.jsonl.gz").read_bytes()
            texts = list(read_documents([file]))
            assert len(texts) > 50
            entries = texts if name in ("public", "code") else [entry for text in texts for entry in _entries(text)]
            for entry in set(entries):
                assert seen.setdefault(entry, split) == split, entry
        assert len(seen) > 1000


def _entries(text: str) -> list[str]:
    return text.split("Q: ")[1:] if text.startswith("Q: ") else text.splitlines()

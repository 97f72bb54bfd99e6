"""Documents to rows: best-fit packing, and joining and cutting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.packing import Chunking, Packing, sample_rows
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.tokens import open_split
from tests.data.counting import documents
from tests.small import write_corpus


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
    padded = [np.append(packing[index].segments, packing[index].segments[-1]) == 0 for index in range(len(packing))]
    assert packing.padding < 0.05
    assert abs(packing.padding - np.mean(padded)) < 1 / 128


def test_sampling_more_rows_than_there_are_pads_with_nothing():
    rows = sample_rows(Packing(documents(20, 20), 19), 4)
    assert rows.inputs.shape == (4, 19)
    assert rows.weights[:2].sum() == 38 and rows.weights[2:].sum() == 0


def test_a_plan_is_kept_beside_the_shards_and_read_again(tmp_path):
    prepared = prepare(
        write_corpus(tmp_path / "corpus", [f"text number {n}" * (n % 7 + 1) for n in range(60)]), tmp_path / "out"
    )
    first = Packing(open_split(prepared, "train"), 40)
    written = sorted((prepared / "packing").rglob("*.npy"))
    assert len(written) == 2
    again = Packing(open_split(prepared, "train"), 40)
    for index in range(len(first)):
        for one, other in zip(first[index], again[index], strict=True):
            np.testing.assert_array_equal(one, other)
    assert sorted((prepared / "packing").rglob("*.npy")) == written


@given(lengths=st.lists(st.integers(1, 50), max_size=30), length=st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_chunks_are_the_documents_one_after_another(lengths, length):
    source = documents(*lengths)
    chunks = Chunking(source, length)
    assert len(chunks) == max(0, len(source.tokens) - 1) // length
    for index in range(len(chunks)):
        rows = chunks[index]
        np.testing.assert_array_equal(rows.inputs, source.tokens[index * length : (index + 1) * length])
        np.testing.assert_array_equal(rows.targets, source.tokens[index * length + 1 : (index + 1) * length + 1])
        assert (rows.weights == 1).all() and (rows.segments == 1).all()
        np.testing.assert_array_equal(rows.positions, np.arange(length))


@pytest.mark.parametrize("index", [-1, 10**6])
def test_a_row_that_is_not_there_is_an_index_error(index):
    for rows in (Packing(documents(20, 20), 19), Chunking(documents(20, 20), 19)):
        with pytest.raises(IndexError):
            rows[index]

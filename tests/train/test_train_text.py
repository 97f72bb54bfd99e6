"""A job refuses text whose token ids are not the anchor's."""

import json

import pytest

from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import ModelConfig
from flexolmo_jax.train.run import RunConfig
from flexolmo_jax.train.text import check_vocabulary, describe

MODEL = ModelConfig(vocab_size=264, width=16, hidden=24, layers=2, heads=2, kv_heads=2)


@pytest.fixture
def prepared(tmp_path):
    lines = "".join(json.dumps({"text": f"text number {n}"}) + "\n" for n in range(60))
    (tmp_path / "text.jsonl").write_text(lines)
    return prepare(tmp_path / "text.jsonl", tmp_path / "prepared")


def test_the_fingerprint_is_told_and_compared(prepared):
    assert check_vocabulary(prepared, MODEL) == check_vocabulary(prepared, MODEL, "bytes") == "bytes"
    with pytest.raises(UserError, match="prepared with the tokenizer bytes, but the anchor's is sentencepiece:12"):
        check_vocabulary(prepared, MODEL, "sentencepiece:12")


def test_a_model_with_fewer_ids_is_refused(prepared):
    small = ModelConfig(vocab_size=128, width=16, hidden=24, layers=2, heads=2, kv_heads=2)
    with pytest.raises(UserError, match="a tokenizer of 259 ids, but the model has 128"):
        check_vocabulary(prepared, small)


def test_a_run_packs_as_it_is_told(prepared):
    run = RunConfig(steps=1, batch_size=1, sequence_length=40)
    rows = run.rows(prepared, "train")
    assert f"{len(rows)} rows of 40 tokens, {rows.padding:.1%} padding" in describe(prepared, rows, run)
    joined = RunConfig(steps=1, batch_size=1, sequence_length=40, packing="concatenate").rows(prepared, "train")
    assert joined.padding == 0 < rows.padding
    with pytest.raises(UserError, match=r"RunConfig\.packing is 'tight'"):
        RunConfig(steps=1, batch_size=1, sequence_length=40, packing="tight")

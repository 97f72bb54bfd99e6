"""Bits per byte against a computation in float64 from the logits of one document piece at a time."""

import functools
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BATCH, CONFIG, NAMES, ROW, TEXTS, documents, fresh_params

from flexolmo_jax.data.packing import Packing
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate import bits_per_byte
from flexolmo_jax.evaluate.selection import evenly_spaced, full_batches
from flexolmo_jax.infer import LanguageModel
from flexolmo_jax.products import jit_rows

score = functools.partial(bits_per_byte.score, batch_size=BATCH)


def reference(model, texts):
    """Bits and bytes, from the definition: of a piece of at most `ROW + 1` tokens, all but the first is scored."""
    bits, scored_bytes = 0.0, 0
    for text in texts:
        ids = [*(byte + 3 for byte in text.encode()), 1]
        for start in range(0, len(ids), ROW + 1):
            piece = np.array(ids[start : start + ROW + 1])
            padded = np.zeros((1, ROW + 1), np.int32)
            padded[0, : len(piece)] = piece
            logits = np.asarray(model(jnp.asarray(padded)), np.float64)[0, : len(piece) - 1]
            log_partition = np.log(np.sum(np.exp(logits), axis=-1))
            bits += np.sum(log_partition - logits[np.arange(len(piece) - 1), piece[1:]]) / np.log(2)
            scored_bytes += np.sum(piece[1:] != 1)
    return bits, scored_bytes


@pytest.mark.parametrize(
    "texts",
    [
        TEXTS,  # several documents in a row, padding, more rows than a batch, and a document cut in pieces
        ("hello world",),  # one row
        ("y" * 200,),  # longer than several rows
        ("y" * (ROW + 1),),  # the cut leaves the end of text alone, which is then not scored
    ],
    ids=["mixed", "one row", "long", "end cut off"],
)
def test_agrees_with_the_definition(model, texts):
    code = score(model, Packing(documents(*texts), ROW))
    bits, scored_bytes = reference(model, texts)
    assert code.text_bytes == scored_bytes
    assert code.bits_per_byte == pytest.approx(bits / scored_bytes, rel=1e-5)


@pytest.mark.parametrize("top_k", [2, 3])
def test_masked_model_is_the_model_that_never_had_the_expert(model, packing, top_k):
    rest = ("public", "code")
    params = model.params
    smaller = LanguageModel(
        CONFIG,
        rest,
        {"anchor": params["anchor"]} | {part: {n: params[part][n] for n in rest} for part in ("experts", "router")},
        top_k=2,
    )
    masked = score(model, packing, experts=rest, top_k=top_k).nats
    assert masked == pytest.approx(score(smaller, packing).nats, rel=1e-6)
    assert masked != pytest.approx(score(model, packing, top_k=top_k).nats, rel=1e-4)


def test_another_choice_of_experts_or_a_twin_compiles_nothing(model, packing, monkeypatch):
    traced, row_nats = [], inspect.unwrap(bits_per_byte._row_nats)

    def counted(*arguments):
        traced.append(arguments)
        return row_nats(*arguments)

    monkeypatch.setattr(bits_per_byte, "_row_nats", jit_rows(counted, static_argnums=(0, 1)))
    values = {score(model, packing, experts=names).nats for names in (NAMES, NAMES[:2], NAMES[:1])}
    values.add(score(LanguageModel(CONFIG, NAMES, fresh_params(seed=1), 2), packing).nats)
    values.add(score(model, packing, max_rows=2).nats)
    assert len(traced) == 1
    assert len(values) == 5


def test_last_rows_count_and_a_selection_is_spread_out(packing):
    weights = sum(float(rows.weights.sum()) for rows in full_batches(packing, BATCH))
    assert len(packing) % BATCH
    assert weights == sum(float(packing[index].weights.sum()) for index in range(len(packing)))
    assert evenly_spaced(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert evenly_spaced(3, 5).tolist() == [0, 1, 2]
    chosen = [rows for rows in full_batches(packing, BATCH, max_rows=2)]
    assert len(chosen) == 1
    assert chosen[0].inputs.shape == (BATCH, ROW)
    assert not chosen[0].weights[2:].any()
    np.testing.assert_array_equal(chosen[0].inputs[1], packing[len(packing) // 2].inputs)


def test_every_k_and_the_best(model, packing):
    table = bits_per_byte.score_top_k(model, {"a": packing}, batch_size=BATCH)
    assert list(table) == [1, 2, 3]
    assert table[2]["a"] == score(model, packing, top_k=2).bits_per_byte
    assert bits_per_byte.best_top_k({1: {"a": 2.0, "b": 3.0}, 2: {"a": 2.5, "b": 2.0}, 3: {"a": 2.0, "b": 2.5}}) == 2


def test_refusals(model, packing):
    with pytest.raises(UserError, match="no held-out text"):
        score(model, Packing(documents(), ROW))
    with pytest.raises(UserError, match="no held-out text"):
        score(model, Packing(documents("a"), ROW))  # only its end of text has context
    with pytest.raises(UserError, match="no expert 'law'"):
        score(model, packing, experts=["public", "law"])
    with pytest.raises(UserError, match="top_k is 4"):
        score(model, packing, top_k=4)
    with pytest.raises(UserError, match="at least 1 row"):
        score(model, packing, max_rows=0)
    params = fresh_params()
    params["anchor"]["head"] = params["anchor"]["head"] * np.nan
    with pytest.raises(UserError, match="not finite"):
        score(LanguageModel(CONFIG, NAMES, params, 2), packing)

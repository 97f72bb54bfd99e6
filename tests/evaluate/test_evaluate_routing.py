"""The shares of tokens, against a count of one document piece at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BATCH, NAMES, ROW, documents

from flexolmo_jax.data.packing import Packing
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate.routing import shares


@functools.partial(jax.jit, static_argnums=0)
def router_logits(build, params, ids, permitted):
    positions = jnp.arange(ids.shape[1])[None]
    return build(params).trace(ids, positions, 0 * ids, permitted=permitted, top_k=2).routing.logits


def by_hand(model, packing, permitted):
    """Mean probability and share of firsts [L, E]: every piece alone in its row, from its first position on."""
    probabilities = []
    for rows in (packing[index] for index in range(len(packing))):
        for segment in range(1, rows.segments.max() + 1):
            piece = rows.inputs[rows.segments == segment]
            ids = jnp.asarray(np.pad(piece, (0, ROW - len(piece)))[None])
            logits = router_logits(model.build, model.params, ids, jnp.array([permitted]))[:, 0, : len(piece)]
            weights = np.exp(np.asarray(logits, np.float64)) * permitted
            probabilities.append(weights / weights.sum(-1, keepdims=True))
    joined = np.concatenate(probabilities, axis=1)
    return joined.mean(axis=1), np.eye(len(NAMES))[joined.argmax(axis=-1)].mean(axis=1)


@pytest.mark.parametrize("experts", [NAMES, ("public", "code")])
def test_shares_are_means_over_all_tokens_of_documents(model, packing, experts):
    found = shares(model, packing, experts=experts, batch_size=BATCH)
    probability, top_1 = by_hand(model, packing, [name in experts for name in NAMES])
    np.testing.assert_allclose(found.probability, probability, atol=1e-6)
    np.testing.assert_allclose(found.top_1, top_1, atol=1e-6)
    np.testing.assert_allclose(found.probability.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(found.top_1.sum(-1), 1.0, atol=1e-6)
    if "math" not in experts:
        assert not found.probability[:, 1].any()
        assert not found.top_1[:, 1].any()
    assert found.experts == NAMES
    assert np.shape(found.as_json()["top_1"]) == (2, 3)


def test_an_empty_split_is_refused(model):
    with pytest.raises(UserError, match="no held-out text"):
        shares(model, Packing(documents(), ROW))

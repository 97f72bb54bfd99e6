"""Ensembles and prompt-based routing on one merged model, against the owners' dense models and plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.infer import load
from flexolmo_jax.infer.ensemble import (
    chosen_experts,
    ensemble_log_probabilities,
    ensemble_weights,
    likeliest_experts,
    prompt_nats,
)
from flexolmo_jax.merge import merge, soup
from tests.small import write_anchor, write_contribution

IDS = np.arange(24, dtype=np.int32).reshape(2, 12) + 5
LENGTHS = np.array([12, 7], np.int32)


def softmax(logits):
    """In float64, over the last axis."""
    powers = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A merged model, and math's dense model made in another way: a soup that consists of math alone."""
    root = tmp_path_factory.mktemp("models")
    write_anchor(root / "anchor")
    for seed, name in enumerate(("math", "code"), 1):
        write_contribution(root / name, root / "anchor", name, seed)
    merge(root / "anchor", [root / "math", root / "code"], root / "merged")
    soup(root / "anchor", [root / "math"], root / "dense", weights={"public": 0.0, "math": 1.0})
    return load(root / "merged"), load(root / "dense")


def test_one_expert_alone_is_the_owners_dense_model(models):
    merged, dense = models
    np.testing.assert_allclose(merged(IDS, experts=["math"], top_k=1), dense(IDS), atol=1e-5)


def test_prompts_are_scored_over_their_own_length(models):
    merged, dense = models
    found = np.asarray(prompt_nats(merged, IDS, LENGTHS))
    logs = np.log(softmax(dense(IDS)))
    for row, length in enumerate(LENGTHS):
        expected = -np.mean([logs[row, at, IDS[row, at + 1]] for at in range(length - 1)])
        np.testing.assert_allclose(found[row, 1], expected, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_are_the_largest_of_the_softmax(top_k):
    nats = jnp.array([[1.0, 0.5, 2.0], [0.1, 3.0, 0.2]])
    found = np.asarray(ensemble_weights(nats, top_k=top_k, temperature=0.5))
    for row, values in zip(found, softmax(-nats / 0.5), strict=True):
        kept = np.where(values >= np.sort(values)[-top_k], values, 0)
        np.testing.assert_allclose(row, kept / kept.sum(), rtol=1e-5)


def test_an_ensemble_mixes_probabilities(models):
    merged, _ = models
    weights = jnp.array([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])
    found = np.exp(np.asarray(ensemble_log_probabilities(merged, IDS, weights)))
    alone = [softmax(merged(IDS, experts=[name], top_k=1)) for name in merged.names]
    expected = sum(np.asarray(weights)[:, n, None, None] * each for n, each in enumerate(alone))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_prompt_routing_gives_choices_that_the_model_takes(models):
    merged, _ = models
    best = np.argmin(np.asarray(prompt_nats(merged, IDS, LENGTHS)), axis=-1)
    experts = likeliest_experts(merged, IDS, LENGTHS)
    assert experts == [[merged.names[number]] for number in best]
    assert merged(IDS, experts=experts, top_k=1).shape == (2, 12, 264)
    by_word = chosen_experts(merged, ["a sum", "def f"], lambda prompt: "math" if "sum" in prompt else "code")
    assert by_word == [["math"], ["code"]]


def test_what_cannot_be_is_refused(models):
    merged, _ = models
    with pytest.raises(UserError, match="no expert 'law'"):
        chosen_experts(merged, ["?"], lambda prompt: "law")
    with pytest.raises(UserError, match="at least 2 tokens"):
        prompt_nats(merged, IDS, np.array([1, 5]))
    with pytest.raises(UserError, match="top_k is 4, but there are 3 models"):
        ensemble_weights(jnp.zeros((1, 3)), top_k=4)

"""The model against its formulas, written once more in float64 NumPy, one token and one head at a time."""

import jax
import numpy as np
import pytest

from flexolmo_jax.infer import LanguageModel
from flexolmo_jax.model import PUBLIC, ModelConfig, initialise

SHAPES = {
    "multi-head": ModelConfig(vocab_size=23, width=16, hidden=24, layers=2, heads=4, kv_heads=4),
    "grouped-query": ModelConfig(vocab_size=23, width=16, hidden=24, layers=2, heads=4, kv_heads=2),
    "normalised top-k": ModelConfig(
        vocab_size=23, width=16, hidden=24, layers=1, heads=2, kv_heads=1, normalize_top_k=True
    ),
}
NAMES = (PUBLIC, "math", "code")


def random_params(config: ModelConfig, names=NAMES) -> dict:
    """Parameters with nothing at its neutral value: norms, rows and biases (of either sign) are random too."""
    params = initialise(config, names, seed=1)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(2)
    return jax.tree.unflatten(structure, [np.float32(leaf + rng.normal(0, 0.3, leaf.shape)) for leaf in leaves])


def reference_logits(config: ModelConfig, names, params: dict, ids: np.ndarray, top_k: int, permitted) -> np.ndarray:
    """Logits [S, V] of one document, from the equations of contract C1."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    anchor, attention = p["anchor"], p["anchor"]["attention"]
    width = config.head_width

    def norm(x, scale):
        return scale * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.norm_epsilon)

    def rotate(x, position):
        out = np.empty_like(x)
        for i in range(width // 2):
            angle = position * config.rope_theta ** (-2 * i / width)
            a, b = x[i], x[i + width // 2]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + width // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x = anchor["embed"][ids]
    for layer in range(config.layers):
        q = norm(x @ attention["q"][layer], attention["q_norm"][layer])
        k = norm(x @ attention["k"][layer], attention["k_norm"][layer])
        v = x @ attention["v"][layer]
        mixed = np.zeros((len(ids), config.width))
        for head in range(config.heads):
            mine, theirs = slice(head * width, (head + 1) * width), head // (config.heads // config.kv_heads)
            shared = slice(theirs * width, (theirs + 1) * width)
            for t in range(len(ids)):
                query = rotate(q[t, mine], t)
                scores = np.array([query @ rotate(k[s, shared], s) / np.sqrt(width) for s in range(t + 1)])
                weights = np.exp(scores - scores.max())
                mixed[t, mine] = (weights / weights.sum()) @ v[: t + 1, shared]
        x = x + norm(mixed @ attention["o"][layer], anchor["attention_norm"][layer])
        out = np.zeros_like(x)
        for t in range(len(ids)):
            logits = {}
            for name in permitted:
                bias = p["router"][name].get("bias")
                logits[name] = x[t] @ p["router"][name]["row"][layer] + (0 if bias is None else min(bias[layer], 0))
            top = max(logits.values())
            total = sum(np.exp(logit - top) for logit in logits.values())
            probabilities = {name: np.exp(logit - top) / total for name, logit in logits.items()}
            chosen = sorted(permitted, key=lambda name: -probabilities[name])[:top_k]
            scale = sum(probabilities[name] for name in chosen) if config.normalize_top_k else 1.0
            for name in chosen:
                expert = p["experts"][name]
                gate = x[t] @ expert["gate"][layer]
                hidden = gate / (1 + np.exp(-gate)) * (x[t] @ expert["up"][layer])
                out[t] += probabilities[name] / scale * (hidden @ expert["down"][layer])
        x = x + norm(out, anchor["ffn_norm"][layer])
    return norm(x, anchor["final_norm"]) @ anchor["head"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_logits_follow_the_formulas(shape, top_k):
    config, params = SHAPES[shape], random_params(SHAPES[shape])
    ids = np.random.default_rng(3).integers(0, 23, (2, 7)).astype(np.int32)
    ours = LanguageModel(config, NAMES, params, top_k)(ids)
    for row, document in zip(np.asarray(ours), ids, strict=True):
        np.testing.assert_allclose(row, reference_logits(config, NAMES, params, document, top_k, NAMES), atol=2e-4)


def test_one_token_and_one_expert():
    config = SHAPES["multi-head"]
    params = random_params(config, (PUBLIC,))
    ids = np.array([[5]], np.int32)
    ours = np.asarray(LanguageModel(config, (PUBLIC,), params, 1)(ids))[0]
    np.testing.assert_allclose(ours, reference_logits(config, (PUBLIC,), params, ids[0], 1, (PUBLIC,)), atol=1e-4)


@pytest.mark.parametrize("permitted", [("public", "code"), ("math",), ("code", "math")])
def test_a_masked_expert_is_one_the_model_never_had(permitted):
    config, params = SHAPES["grouped-query"], random_params(SHAPES["grouped-query"])
    model = LanguageModel(config, NAMES, params, 2)
    ids = np.random.default_rng(4).integers(0, 23, (1, 6)).astype(np.int32)
    ours = np.asarray(model(ids, experts=permitted))[0]
    np.testing.assert_allclose(ours, reference_logits(config, NAMES, params, ids[0], 2, permitted), atol=2e-4)
    if permitted[0] == PUBLIC:
        without = {part: {n: params[part][n] for n in permitted} for part in ("experts", "router")}
        never_had = LanguageModel(config, permitted, {"anchor": params["anchor"], **without}, 2)
        np.testing.assert_allclose(ours, np.asarray(never_had(ids))[0], atol=1e-5)


def test_experts_are_chosen_row_by_row():
    config, params = SHAPES["multi-head"], random_params(SHAPES["multi-head"])
    model = LanguageModel(config, NAMES, params, 3)
    ids = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    together = np.asarray(model(ids, experts=[["public"], ["public", "math"]]))
    np.testing.assert_allclose(together[0], np.asarray(model(ids[:1], experts=["public"]))[0], atol=1e-5)
    np.testing.assert_allclose(together[1], np.asarray(model(ids[:1], experts=["public", "math"]))[0], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2

"""Attention within packed documents: the ways to compute it against a formula in float64, forward and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.model import attention_blocks, documents


def reference(q, k, v, segments):
    """Softmax attention, position by position, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    segments = np.asarray(segments)
    mixed = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for row, position, head in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(segments[row, : position + 1] == segments[row, position])
        scores = k[row, seen, head // group] @ q[row, position, head] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        mixed[row, position, head] = weights @ v[row, seen, head // group] / weights.sum()
    return mixed


def draw(seed: int, rows: int, length: int, heads: int, kv_heads: int, width: int):
    rng = np.random.default_rng(seed)
    q, cotangent = rng.normal(size=(2, rows, length, heads, width)).astype(np.float32)
    k, v = rng.normal(size=(2, rows, length, kv_heads, width)).astype(np.float32)
    segments = np.sort(rng.integers(1, 5, (rows, length)), axis=1).astype(np.int32)
    return tuple(map(jnp.asarray, (q, k, v))), jnp.asarray(segments), jnp.asarray(cotangent)


@jax.jit
def splash(q, k, v, segments):
    return documents.splash(q, k, v, segments, interpret=True)


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
)
@settings(max_examples=12, deadline=None)
def test_blocks_are_softmax_attention(seed, rows, length, kv_heads, group):
    (q, k, v), segments, _ = draw(seed, rows, length, kv_heads * group, kv_heads, 8)
    np.testing.assert_allclose(documents.blocks(q, k, v, segments), reference(q, k, v, segments), atol=2e-5)


def plain(q, k, v, segments):
    """The formula again, on all pairs at once, for JAX to differentiate."""
    group = q.shape[2] // k.shape[2]
    scores = jnp.einsum("bqhc,bthc->bhqt", q, jnp.repeat(k, group, axis=2)) / q.shape[-1] ** 0.5
    seen = attention_blocks.document_mask(segments, 0)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqt,bthc->bqhc", weights, jnp.repeat(v, group, axis=2))


@pytest.mark.parametrize("block", [1, 4, 12, 64])
def test_blocks_of_any_size_are_the_same_with_their_gradients(block, monkeypatch):
    monkeypatch.setattr(attention_blocks, "FEWEST_QUERIES", block)
    (q, k, v), segments, cotangent = draw(0, 2, 12, 4, 2, 8)
    np.testing.assert_allclose(documents.blocks(q, k, v, segments), reference(q, k, v, segments), atol=2e-5)
    for ours, formula in zip(
        *(gradients(attend, q, k, v, segments, cotangent) for attend in (documents.blocks, plain)), strict=True
    ):
        np.testing.assert_allclose(ours, formula, atol=2e-5)


def gradients(attend, q, k, v, segments, cotangent):
    return jax.grad(lambda *qkv: jnp.vdot(attend(*qkv, segments), cotangent), argnums=(0, 1, 2))(q, k, v)


def test_splash_is_softmax_attention_with_its_gradients(monkeypatch):
    monkeypatch.setattr(documents, "SPLASH_BLOCK", 128)
    (q, k, v), segments, cotangent = draw(1, 2, 256, 4, 2, 128)
    np.testing.assert_allclose(splash(q, k, v, segments), reference(q, k, v, segments), atol=2e-5)

    for ours, formula in zip(
        *(gradients(attend, q, k, v, segments, cotangent) for attend in (splash, plain)), strict=True
    ):
        np.testing.assert_allclose(ours, formula, atol=5e-5)


def test_each_platform_has_its_way(monkeypatch):
    def way(platform, length=256, width=128, dtype=jnp.bfloat16):
        monkeypatch.setattr(documents, "platform", lambda: platform)
        return documents.best_way((2, length, 4, width), dtype)

    assert way("tpu") is documents.splash
    assert way("tpu", length=200) is way("tpu", width=64) is documents.blocks
    assert way("gpu") is documents.fused
    assert way("gpu", dtype=jnp.float32) is way("cpu") is documents.blocks

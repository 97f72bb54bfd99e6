"""The private mean: noise calibrated as it must be, and no document that weighs more than it is said to."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from flexolmo_jax.domain import private_mean
from flexolmo_jax.domain.private_mean import (
    SENSITIVITY,
    PrivateMean,
    clipped_sum,
    gaussian_noise_multiplier,
    standard_normal,
)
from flexolmo_jax.domain.sampling import sample
from flexolmo_jax.errors import UserError


def delta_by_integration(epsilon: float, multiplier: float) -> float:
    """Hockey-stick divergence of two normal densities whose means are 1 apart, integrated as it is defined."""

    def excess(x):
        return stats.norm.pdf(x, 1, multiplier) - math.exp(epsilon) * stats.norm.pdf(x, 0, multiplier)

    begins = epsilon * multiplier**2 + 0.5  # where the densities' ratio is e^epsilon
    return integrate.quad(excess, begins, begins + 40 * multiplier, epsabs=1e-16, epsrel=1e-10, limit=200)[0]


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-8])
def test_the_noise_gives_exactly_the_delta_that_integration_finds(epsilon, delta):
    multiplier = gaussian_noise_multiplier(epsilon, delta)
    assert delta_by_integration(epsilon, multiplier) == pytest.approx(delta, rel=1e-5)
    assert delta_by_integration(epsilon, 0.99 * multiplier) > delta


def test_the_noise_is_the_published_one_and_less_than_the_classical_bound():
    assert gaussian_noise_multiplier(1.0, 1e-5) == pytest.approx(3.730632, abs=1e-5)
    for epsilon, delta in [(0.05, 1e-6), (0.5, 1e-5), (0.9, 1e-9)]:
        assert gaussian_noise_multiplier(epsilon, delta) < math.sqrt(2 * math.log(1.25 / delta)) / epsilon


@given(epsilon=st.floats(1e-3, 1e3), log_delta=st.floats(-100, -1.1))
@settings(max_examples=100, deadline=None)
def test_noise_exists_over_the_whole_range_and_falls_with_epsilon_and_delta(epsilon, log_delta):
    here = gaussian_noise_multiplier(epsilon, 10**log_delta)
    assert 0 < here < math.inf
    assert gaussian_noise_multiplier(min(2 * epsilon, 1e3), 10**log_delta) <= here * (1 + 1e-6)
    assert gaussian_noise_multiplier(epsilon, min(10 * 10**log_delta, 0.1)) <= here * (1 + 1e-6)


@given(seed=st.integers(0, 2**32 - 1), documents=st.integers(1, 6), layers=st.integers(1, 4), scale=st.floats(0, 1e6))
@settings(max_examples=100, deadline=None)
def test_another_document_moves_the_sum_by_no_more_than_the_noise_is_made_for(seed, documents, layers, scale):
    rng = np.random.default_rng(seed)
    vectors = scale * rng.standard_normal((documents, layers, 5)).astype(np.float32)
    other = vectors.copy()
    other[0] = -other[0] if seed % 2 else scale * rng.standard_normal((layers, 5))
    bounds = rng.uniform(0.1, 3.0, layers)
    unit = math.sqrt(layers) * bounds[:, None]
    moved = np.linalg.norm((clipped_sum(vectors, bounds) - clipped_sum(other, bounds)) / unit)
    added = np.linalg.norm((clipped_sum(vectors, bounds) - clipped_sum(vectors[1:], bounds)) / unit)
    assert moved <= SENSITIVITY * (1 + 1e-9) and added <= SENSITIVITY / 2 * (1 + 1e-9)


def test_the_bound_on_the_sum_is_reached():
    far = np.full((1, 3, 4), 1e3)
    bounds = np.array([1.0, 2.0, 3.0])
    moved = (clipped_sum(far, bounds) - clipped_sum(-far, bounds)) / (math.sqrt(3) * bounds[:, None])
    assert np.linalg.norm(moved) == pytest.approx(SENSITIVITY)


words = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=12)


@given(texts=words, count=st.integers(1, 6), where=st.integers(0, 11), new=st.text("abcd", min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_one_document_more_fewer_or_other_changes_one_of_the_sample(texts, count, where, new):
    where %= len(texts)
    before = sample(texts, count)
    for after in (
        sample([*texts[:where], new, *texts[where:]], count),
        sample([*texts[:where], *texts[where + 1 :]], count),
        sample([*texts[:where], new, *texts[where + 1 :]], count),
    ):
        left = list(before)
        entered = [text for text in after if text not in left or left.remove(text)]
        assert len(entered) <= 1 and len(left) <= 1


def test_a_sample_is_random_enough_and_does_not_depend_on_the_order():
    texts = [f"document {number}" for number in range(2000)]
    chosen = sample(texts, 500)
    assert sorted(chosen) == sorted(sample(texts[::-1], 500)) and len(set(chosen)) == 500
    places = np.sort([texts.index(text) for text in chosen])
    assert stats.kstest(places / 2000, "uniform").pvalue > 1e-3


def test_the_noise_is_as_loud_as_reported_and_never_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    own, public = rng.standard_normal((200, 2, 500)) + 1, rng.standard_normal((300, 2, 500))
    settings = PrivateMean(epsilon=1.0, delta=1e-5, clip=0.5)
    noisy, promised = settings.mean(own, public, 200)
    again, _ = settings.mean(own, public, 200)
    monkeypatch.setattr(private_mean, "standard_normal", np.zeros)
    clean, _ = settings.mean(own, public, 200)
    bounds = 0.5 * np.median(np.linalg.norm(public - public.mean(axis=0), axis=-1), axis=0)
    by_hand = promised["noise_multiplier"] * (2 / 200) * math.sqrt(2) * bounds * math.sqrt(500)
    found = np.linalg.norm(noisy - clean, axis=-1)
    np.testing.assert_allclose(found, by_hand, rtol=0.15)  # 500 values: five standard deviations of their norm
    np.testing.assert_allclose(found / bounds, promised["expected_noise"], rtol=0.15)
    assert not np.any(noisy == again)
    assert (promised["epsilon"], promised["delta"]) == (1.0, 1e-5)


def test_without_noise_a_wide_clip_gives_the_mean_and_a_narrow_one_the_public_mean(monkeypatch):
    monkeypatch.setattr(private_mean, "standard_normal", np.zeros)
    rng = np.random.default_rng(1)
    own, public = rng.standard_normal((50, 3, 8)) + 0.5, rng.standard_normal((60, 3, 8))
    for clip, expected in [(1e3, own.mean(axis=0)), (1e-3, public.mean(axis=0))]:
        mean, _ = PrivateMean(epsilon=1.0, delta=1e-3, clip=clip).mean(own, public, 50)
        np.testing.assert_allclose(mean, expected, atol=4e-3)


def test_missing_documents_draw_the_mean_to_the_public_one(monkeypatch):
    monkeypatch.setattr(private_mean, "standard_normal", np.zeros)
    own, public = np.full((10, 1, 4), 0.1), np.concatenate([np.ones((5, 1, 4)), -np.ones((5, 1, 4))])
    mean, _ = PrivateMean(epsilon=1.0, delta=1e-5).mean(own, public, 40)
    np.testing.assert_allclose(mean, 0.1 / 4)


def test_the_generator_is_normal():
    values = standard_normal((20_000,))
    assert stats.kstest(values, "norm").pvalue > 1e-4


@pytest.mark.parametrize(
    ("field", "value"),
    [("epsilon", 0.0), ("epsilon", -1.0), ("epsilon", math.nan), ("delta", 0.0), ("delta", 1.0), ("clip", 0.0)],
)
def test_impossible_promises_are_refused(field, value):
    with pytest.raises(UserError, match=rf"PrivateMean.{field} must lie between"):
        PrivateMean(**({"epsilon": 1.0, "delta": 1e-5} | {field: value}))


def test_a_delta_that_promises_nothing_is_refused():
    with pytest.raises(UserError, match="must be below 1 / 1,000"):
        PrivateMean(epsilon=1.0, delta=1e-3).mean(np.zeros((2, 1, 3)), np.zeros((2, 1, 3)), 1000)

"""Greedy MAP of a determinantal point process, against determinants computed from scratch and against all subsets."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from flexolmo_jax.domain.diversity import RIDGE, diverse


def kernel(relevance, features):
    similarity = (1 - RIDGE) * features @ features.T + RIDGE * np.eye(len(features))
    return relevance[:, None] * similarity * relevance[None]


def log_det(matrix, chosen):
    return np.linalg.slogdet(matrix[np.ix_(chosen, chosen)])[1] if len(chosen) else 0.0


def candidates(seed, count, width):
    rng = np.random.default_rng(seed)
    relevance, features = rng.uniform(0.1, 1.0, count), rng.standard_normal((count, width)) + 0.5
    return relevance, features / np.linalg.norm(features, axis=1, keepdims=True)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12), width=st.integers(1, 8), most=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_each_step_takes_what_adds_most_to_the_determinant(seed, count, width, most):
    relevance, features = candidates(seed, count, width)
    matrix = kernel(relevance, features)
    chosen = diverse(relevance, features, most)
    assert len(chosen) == len(set(chosen)) == min(most, count)
    for step, taken in enumerate(chosen):
        before = chosen[:step]
        reached = [log_det(matrix, [*before, each]) for each in range(count) if each not in before]
        assert log_det(matrix, [*before, taken]) >= max(reached) - 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_near_the_best_of_all_subsets(seed):
    relevance, features = candidates(seed, 9, 9)
    relevance = relevance + 40  # every eigenvalue is above 1, so that no step takes anything away
    matrix = kernel(relevance, features)
    assert np.linalg.eigvalsh(matrix).min() > 1
    best = max(log_det(matrix, list(subset)) for subset in itertools.combinations(range(9), 4))
    found = log_det(matrix, diverse(relevance, features, 4))
    assert (1 - 1 / np.e) * best <= found <= best + 1e-9


def test_unlike_documents_go_by_relevance_and_a_copy_comes_last():
    relevance = np.array([0.5, 0.9, 0.7, 0.89])
    features = np.eye(3)[[0, 1, 2, 1]]
    assert diverse(relevance, features, 4) == [1, 2, 0, 3]


def test_sparse_features_give_the_same():
    relevance, features = candidates(3, 30, 12)
    features[np.abs(features) < 0.5] = 0
    assert diverse(relevance, sparse.csr_matrix(features), 10) == diverse(relevance, features, 10)


def test_what_is_not_relevant_is_not_chosen():
    assert diverse(np.array([0.0, 1.0]), np.eye(2), 2) == [1]

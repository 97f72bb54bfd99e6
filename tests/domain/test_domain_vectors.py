"""Vectors from files and into other widths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.domain.vectors import cosine, project, read_vector
from flexolmo_jax.errors import UserError


@given(own=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_wider_space_keeps_all_lengths_and_angles(own, width, seed):
    vectors = np.random.default_rng(own).standard_normal((6, own)).astype(np.float32)
    projected = project(vectors, width, seed)
    assert projected.shape == (6, width)
    if width >= own:
        np.testing.assert_allclose(projected @ projected.T, vectors @ vectors.T, atol=1e-4)
    np.testing.assert_array_equal(projected, project(vectors, width, seed))
    if width != own and max(own, width) > 2:
        assert not np.allclose(projected, project(vectors, width, seed + 1))


def test_a_narrower_space_keeps_lengths_and_angles_on_average():
    a, b = np.random.default_rng(0).standard_normal((2, 300))
    b = 0.6 * a + 0.8 * b
    there = [(project(a, 60, seed), project(b, 60, seed)) for seed in range(60)]
    assert np.mean([(x @ x) / (a @ a) for x, _ in there]) == pytest.approx(1, abs=0.1)
    assert np.mean([cosine(x, y) for x, y in there]) == pytest.approx(cosine(a, b), abs=0.05)


def test_a_narrower_space_is_an_orthogonal_projection():
    matrix = project(np.eye(12, dtype=np.float32), 5, seed=3) / np.sqrt(12 / 5)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(5), atol=1e-5)


def test_cosine_is_the_cosine():
    a, b = np.array([[1.0, 0], [3, 4], [0, 0]]), np.array([[1.0, 1], [-6, -8], [1, 0]])
    np.testing.assert_allclose(cosine(a, b), [np.sqrt(0.5), -1, 0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.zeros((2, 3)), r"holds an array of shape \(2, 3\)"),
        (np.zeros(0), r"holds an array of shape \(0,\)"),
        (np.array(["a"]), "must hold one vector of numbers"),
        (np.array([1.0, np.nan]), "not finite"),
        (np.array([{"a": 1}]), "cannot read"),
        (b"no array", "cannot read"),
        (b"", "cannot read"),
    ],
    ids=["matrix", "empty", "text", "nan", "pickle", "no npy", "no bytes"],
)
def test_a_file_without_a_vector_is_named(content, says, tmp_path):
    file = tmp_path / "v.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    with pytest.raises(UserError, match=says) as refusal:
        read_vector(file)
    assert "v.npy" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read the vector"):
        read_vector(tmp_path / "nowhere.npy")

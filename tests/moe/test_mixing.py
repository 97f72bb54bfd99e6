"""The weighted sum beside float64 NumPy, and that no library of XLA's takes it for products of matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.moe import dense, grouped
from flexolmo_jax.moe.mixing import weighted_sum
from flexolmo_jax.products import compiler_options


@pytest.mark.parametrize("choices", [1, 2, 5])
def test_it_is_the_sum_over_choices(choices):
    weights = jax.random.uniform(jax.random.key(0), (7, choices))
    values = jax.random.normal(jax.random.key(1), (choices, 7, 3))
    exact = np.einsum("tk,ktd->td", np.asarray(weights, np.float64), np.asarray(values, np.float64))
    np.testing.assert_allclose(weighted_sum(weights, list(values)), exact, rtol=1e-5, atol=1e-6)


def test_values_of_16_bits_are_weighed_and_summed_in_float32():
    values = [jnp.ones((3, 4), jnp.bfloat16)] * 2
    assert weighted_sum(jnp.ones((3, 2)), values).dtype == jnp.float32


@pytest.mark.parametrize("implementation", [dense, grouped])
def test_no_matrices_of_one_token_each_are_multiplied(implementation):
    tokens, experts = 256, [tuple(jnp.ones(shape) for shape in ((16, 24), (16, 24), (24, 16)))] * 4
    arguments = jnp.ones((tokens, 16)), jnp.ones((tokens, 2)), jnp.zeros((tokens, 2), jnp.int32), experts
    program = jax.jit(implementation.mix_local, compiler_options=compiler_options("cpu"))
    text = program.lower(*arguments).compile().as_text()
    products = [line for line in text.splitlines() if " dot(" in line]
    assert products and not any("batch_dims" in line for line in products)

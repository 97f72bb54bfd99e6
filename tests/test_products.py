"""Products beside float64 NumPy, with their gradients, in 16 and in 32 bits; and what XLA makes of them on CPU."""

from platform import machine

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.products import (
    compiler_options,
    jit_rows,
    project,
    project_back,
    project_wide,
    sum_of_outer,
    transposed,
)

ROUNDED = {jnp.float32: 1e-5, jnp.bfloat16: 2**-7}
"""Of the largest number of a result: sums are float32, and factors and results are rounded to the dtype."""


def draw(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def near(found, exact, dtype) -> None:
    exact = np.asarray(exact)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0, atol=ROUNDED[dtype] * np.abs(exact).max())


def exactly(a) -> np.ndarray:
    return np.asarray(a, np.float64)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [((1,), 1, 1), ((7,), 5, 3), ((24,), 16, 9), ((3, 5), 4, 8)])
def test_a_product_and_its_gradients_are_those_of_float64(dtype, rows, inputs, outputs):
    x, w = draw(0, *rows, inputs, dtype=dtype), draw(1, inputs, outputs)
    d_y = draw(2, *rows, outputs, dtype=dtype)
    used = w.astype(dtype)  # Weights are rounded to the dtype of the rows.
    y, pull = jax.vjp(project, x, w)
    d_x, d_w = pull(d_y)
    assert (y.dtype, d_x.dtype, d_w.dtype) == (dtype, dtype, jnp.float32)
    near(y, exactly(x) @ exactly(used), dtype)
    near(d_x, exactly(d_y) @ exactly(used).T, dtype)
    flat, d_flat = (exactly(a).reshape(-1, a.shape[-1]) for a in (x, d_y))
    near(d_w, flat.T @ d_flat, dtype)


def test_wide_results_are_not_rounded():
    x, w = draw(0, 64, 32, dtype=jnp.bfloat16), draw(1, 32, 16).astype(jnp.bfloat16)
    d_y = draw(2, 64, 16)
    near(project_wide(x, w), exactly(x) @ exactly(w), jnp.float32)
    rounded = exactly(d_y.astype(jnp.bfloat16))
    near(project_back(d_y, w), rounded @ exactly(w).T, jnp.float32)
    near(sum_of_outer(x, d_y), exactly(x).T @ rounded, jnp.float32)


@pytest.mark.parametrize("rows", [1, 7, 8, 24])
def test_transposed_exchanges_the_last_axes(rows):
    a = draw(0, 2, 3, rows, 5, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(exactly(transposed(a)), exactly(a).swapaxes(-1, -2))


def factors_of_products(function, *arguments) -> list[str]:
    """The types of all factors of the products in what `function` is compiled to."""
    lines = [line.strip() for line in jax.jit(function).lower(*arguments).compile().as_text().splitlines()]
    types = dict(line.removeprefix("ROOT ").split(" = ", 1) for line in lines if " = " in line)
    products = [right.split(" dot(")[1].split(")")[0] for right in types.values() if " dot(" in right]
    return [types[factor].split("[")[0] for product in products for factor in product.split(", ")]


def test_gradients_are_multiplied_in_as_many_bits_as_a_plain_product():
    def plain(x, w):
        return jnp.matmul(x, w, preferred_element_type=jnp.float32)

    def loss(x, w):
        return jnp.sum(project(x, w).astype(jnp.float32) ** 2)

    x, w = draw(0, 256, 128, dtype=jnp.bfloat16), draw(1, 128, 64, dtype=jnp.bfloat16)
    # One product forward, and one for the gradient of either factor.
    assert factors_of_products(jax.grad(loss, argnums=(0, 1)), x, w) == 3 * factors_of_products(plain, x, w)


@pytest.mark.skipif(machine() != "x86_64", reason="oneDNN is asked for on x86 alone")
def test_products_of_32_bits_are_by_onednn_where_asked_for():
    x, w, d_y = draw(0, 256, 128), draw(1, 128, 64), draw(2, 256, 64)

    def all_three(x, w, d_y):
        y, pull = jax.vjp(project, x, w)
        return y, *pull(d_y)

    compiled = jax.jit(all_three, compiler_options=compiler_options("cpu")).lower(x, w, d_y).compile()
    assert compiled.as_text().count("__onednn_fusion") == 3
    exact = exactly(x) @ exactly(w), exactly(d_y) @ exactly(w).T, exactly(x).T @ exactly(d_y)
    for found, expected in zip(compiled(x, w, d_y), exact, strict=True):
        near(found, expected, jnp.float32)


@pytest.mark.skipif(machine() != "x86_64", reason="oneDNN is asked for on x86 alone")
def test_a_program_of_many_rows_has_the_products_of_onednn(monkeypatch):
    asked, jit = [], jax.jit

    def asking(*arguments, **options):
        asked.append(options["compiler_options"])
        return jit(*arguments, **options)

    monkeypatch.setattr(jax, "jit", asking)
    multiply = jit_rows(lambda times, x, w: times * project(x, w), static_argnums=(0,))
    x, w = draw(0, 256, 128), draw(1, 128, 64)
    for times in (1, 2):
        near(multiply(times, x, w), times * (exactly(x) @ exactly(w)), jnp.float32)
    assert asked == [compiler_options("cpu")] and asked[0]


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_other_devices_have_no_options_of_the_cpus(device):
    assert compiler_options(device) is None

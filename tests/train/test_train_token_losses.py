"""Losses and their gradients against the formula in float64, whatever is trained and however rows are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.train import token_losses

ROWS, LENGTH, WIDTH, VOCABULARY, Z_LOSS = 2, 12, 6, 9, 0.1


def draw():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(ROWS, LENGTH, WIDTH)), rng.normal(size=(WIDTH, VOCABULARY))
    return hidden, head, rng.integers(0, VOCABULARY, (ROWS, LENGTH)), rng.random((ROWS, LENGTH))


def formula(hidden, head, targets, weights):
    """Total and cross-entropy of every token, and the gradients of the weighted total, in float64."""
    logits = hidden @ head
    log_partition = np.log(np.exp(logits).sum(-1))
    cross_entropy = log_partition - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    softmax = np.exp(logits - log_partition[..., None])
    by_logits = softmax * (1 + 2 * Z_LOSS * log_partition)[..., None] - np.eye(VOCABULARY)[targets]
    by_logits *= weights[..., None]
    by_head = np.einsum("bsd,bsv->dv", hidden, by_logits)
    return cross_entropy + Z_LOSS * log_partition**2, cross_entropy, by_logits @ head.T, by_head


def losses(hidden, head, targets):
    return token_losses.token_losses(hidden, head, jnp.asarray(targets), Z_LOSS)


@pytest.fixture(params=[512, 4])
def positions_at_once(request, monkeypatch):
    monkeypatch.setattr(token_losses, "POSITIONS_AT_ONCE", request.param)


@pytest.mark.usefixtures("positions_at_once")
@pytest.mark.parametrize("trained", [(0,), (0, 1), (1,)], ids=["hidden", "hidden and head", "head"])
def test_gradients(trained):
    hidden, head, targets, weights = draw()
    *expected, by_hidden, by_head = formula(hidden, head, targets, weights)
    for ours, theirs in zip(losses(*map(jnp.float32, (hidden, head)), targets), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    def total(hidden, head):
        found = losses(hidden, head, targets)
        return jnp.sum(found.total * weights) + jnp.sum(found.cross_entropy)  # the latter has no gradient

    found = jax.jit(jax.grad(total, argnums=trained))(*map(jnp.float32, (hidden, head)))
    for ours, theirs in zip(found, [(by_hidden, by_head)[index] for index in trained], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("trained", "products"), [((0,), 2), ((0, 1), 3)], ids=["frozen", "trained"])
def test_a_frozen_head_takes_one_product_for_losses_and_one_for_gradients(trained, products):
    hidden, head, targets, weights = draw()
    gradient = jax.grad(lambda *both: jnp.sum(losses(*both, targets).total * weights), argnums=trained)
    program = jax.jit(gradient).lower(*map(jnp.float32, (hidden, head)))
    assert program.as_text().count("stablehlo.dot_general") == products


def test_bfloat16_is_close():
    hidden, head, targets, weights = draw()
    *_, by_hidden, _ = formula(hidden, head, targets, weights)
    found = jax.grad(lambda h: jnp.sum(losses(h, jnp.bfloat16(head), targets).total * weights))(jnp.bfloat16(hidden))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), by_hidden, atol=0.05)

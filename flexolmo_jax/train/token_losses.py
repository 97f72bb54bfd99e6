"""Losses of predicting every token from the final hidden states.

Logits of a large vocabulary are the largest arrays of a step, so only those of a piece of each row exist at a time.
Where the head is frozen they are made once: what a token's loss changes by with its hidden state is the difference of
two mixtures of the head's columns, as small as the hidden state itself, and the forward pass makes it beside the loss.
Where the head is trained, the backward pass makes the logits again if there are several pieces.

Axis legend: `B` rows, `S` positions, `D` width, `V` vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexolmo_jax.products import project_back, project_wide

POSITIONS_AT_ONCE = 512
"""Of each row; one that is longer, and divides by it, is done piece by piece."""


class TokenLosses(NamedTuple):
    """Per token, in nats.

    Attributes:
      total: what training minimises: the cross-entropy, and the z-loss with its weight.
      cross_entropy: to be measured; it has no gradient.
    """

    total: Float[Array, "B S"]
    cross_entropy: Float[Array, "B S"]


def token_losses(
    hidden: Float[Array, "B S D"], head: Float[Array, "D V"], targets: Int[Array, "B S"], z_loss: float
) -> TokenLosses:
    """Losses of predicting `targets` from the final hidden states.

    Args:
      hidden: normalised, in the compute dtype.
      head: the head's matrix, in the same.
      targets: ids.
      z_loss: weight of the squared log-partition of the head's softmax (PaLM, arXiv 2204.02311).
    """
    found = _losses(z_loss, hidden, head, targets)
    return found._replace(cross_entropy=jax.lax.stop_gradient(found.cross_entropy))


@jax.custom_vjp
def _losses(
    z_loss, hidden: Float[Array, "B S D"], head: Float[Array, "D V"], targets: Int[Array, "B S"]
) -> TokenLosses:
    return _by_pieces(partial(_of_piece, z_loss), hidden, head, targets)


def _with_residuals(z_loss, hidden, head, targets):
    """The losses; and their slope [B, S, D], or with a trained head the function that takes its gradient, too."""
    z_loss, hidden, targets = (argument.value for argument in (z_loss, hidden, targets))
    if not head.perturbed:
        return _by_pieces(partial(_with_slope, z_loss), hidden, head.value, targets)

    def losses(hidden, head):
        return _by_pieces(partial(_of_piece, z_loss), hidden, head, targets)

    total, gradients, cross_entropy = jax.vjp(losses, hidden, head.value, has_aux=True)
    return TokenLosses(total, cross_entropy), gradients


def _backward(residuals, cotangents):
    if callable(residuals):
        return None, *residuals(cotangents.total), None
    d_hidden = residuals * cotangents.total[..., None]
    return None, d_hidden.astype(residuals.dtype), None, None


_losses.defvjp(_with_residuals, _backward, symbolic_zeros=True)


def _of_piece(z_loss, hidden, head, targets) -> TokenLosses:
    logits = project_wide(hidden, head)
    return _of_logits(z_loss, logits, targets, jax.nn.logsumexp(logits, axis=-1))


def _with_slope(z_loss, hidden, head, targets) -> tuple[TokenLosses, Float[Array, "B S D"]]:
    """With the derivative of each token's `total` by its hidden state.

    That of the logits is `softmax * (1 + 2 z_loss log_partition) - one_hot(target)`.
    """
    logits = project_wide(hidden, head)
    log_partition = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    by_logits = jnp.exp(logits - log_partition) * (1 + 2 * z_loss * log_partition)
    by_logits -= jax.nn.one_hot(targets, head.shape[1], dtype=logits.dtype)
    slope = project_back(by_logits, head).astype(hidden.dtype)
    return _of_logits(z_loss, logits, targets, log_partition[..., 0]), slope


def _of_logits(z_loss, logits, targets, log_partition) -> TokenLosses:
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = log_partition - target
    return TokenLosses(cross_entropy + z_loss * jnp.square(log_partition), cross_entropy)


def _by_pieces(of_piece: Callable[..., Any], hidden, head, targets) -> Any:
    """`of_piece(hidden, head, targets)` of pieces of all rows, one after another, put together again.

    Were that differentiated, of each piece only what it began with would be kept.
    """
    rows, length = targets.shape
    if length <= POSITIONS_AT_ONCE or length % POSITIONS_AT_ONCE:
        return of_piece(hidden, head, targets)

    def cut(a):
        return jnp.moveaxis(a.reshape(rows, -1, POSITIONS_AT_ONCE, *a.shape[2:]), 1, 0)

    pieces = jax.lax.map(lambda each: jax.checkpoint(of_piece)(each[0], head, each[1]), (cut(hidden), cut(targets)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(rows, length, *a.shape[3:]), pieces)

"""Attention within packed documents by XLA's own matrix products, in blocks of queries: it runs on any device.

A block of queries meets all keys up to its own end, so that with `n` blocks `(n + 1) / 2n` of all pairs are computed.
The backward pass is written out (Dao et al., FlashAttention, arXiv 2205.14135, section 3.1): of the scores it keeps one
number for each query, the logarithm of the softmax's sum, and computes them again.

Axis legend: `B` rows, `G` key/value heads, `R` query heads for each of these, `C` width of a head; `S` positions of a
row, `Q` queries of a block, `T` keys up to its end.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.products import transposed

KEPT = "attention"
"""The name of attention's results for policies of rematerialisation: they take little room, and long to make."""

FEWEST_QUERIES = 64
"""In a block, where a row has as many."""


def queries_at_once(length: int) -> int:
    """Queries in a block: an eighth of a row, so that no program has many blocks, but not too few."""
    block = max(FEWEST_QUERIES, length // 8)
    return length if length % block else block


def document_mask(segments: Int[Array, "B T"], begin: int) -> Bool[Array, "B 1 Q T"]:
    """True where a query, one of the positions from `begin` on, may look at a key.

    That is a key that is not later than itself, in the same document.
    """
    positions = jnp.arange(segments.shape[1])
    causal = positions[begin:, None] >= positions[None, :]
    same = segments[:, begin:, None] == segments[:, None, :]
    return (causal & same)[:, None]


@jax.custom_vjp
def attend(
    q: Float[Array, "B G R S C"], k: Float[Array, "B G S C"], v: Float[Array, "B G S C"], segments: Int[Array, "B S"]
) -> Float[Array, "B G R S C"]:
    """Softmax attention of queries that are scaled already. Heads lie outermost: on CPU, products of matrices whose
    rows lie apart take twice as long."""
    return _with_residuals(q, k, v, segments)[0]


def _with_residuals(q, k, v, segments):
    mixed, log_sums = [], []
    for begin, end in _blocks(q.shape[3]):
        scores = _scores(q, k, segments, begin, end)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed.append((_by_key(weights.astype(v.dtype), v[:, :, :end]) / total).astype(v.dtype))
        log_sums.append(top + jnp.log(total))
    y, log_sums = (checkpoint_name(jnp.concatenate(each, axis=3), KEPT) for each in (mixed, log_sums))
    return y, (q, k, v, segments, y, log_sums)


def _backward(residuals, d_y):
    q, k, v, segments, y, log_sums = residuals
    # What every key of a query shares in the softmax's derivative.
    shared = jnp.sum(d_y.astype(jnp.float32) * y, axis=-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for begin, end in _blocks(q.shape[3]):
        here, seen = (..., slice(begin, end), slice(None)), (..., slice(0, end), slice(None))
        with jax.named_scope("rematted_computation"):
            scores = _scores(q, k, segments, begin, end)
        weights = jnp.exp(scores - log_sums[here])
        d_scores = (weights * (_by_width(d_y[here], v[seen]) - shared[here])).astype(q.dtype)
        d_q.append(_by_key(d_scores, k[seen]).astype(q.dtype))
        d_k = d_k.at[seen].add(_by_query(d_scores, q[here]))
        d_v = d_v.at[seen].add(_by_query(weights.astype(v.dtype), d_y[here]))
    return jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None


attend.defvjp(_with_residuals, _backward)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """First query of every block, and the one after its last."""
    block = queries_at_once(length)
    return ((begin, begin + block) for begin in range(0, length, block))


def _scores(q, k, segments, begin: int, end: int) -> Float[Array, "B G R Q T"]:
    """Of a block's queries with all keys up to its end; minus infinity where a query may not look."""
    scores = _by_width(q[:, :, :, begin:end], k[:, :, :end])
    return jnp.where(document_mask(segments[:, :end], begin)[:, :, None], scores, -jnp.inf)


def _by_width(a: Float[Array, "B G R Q C"], b: Float[Array, "B G T C"]) -> Float[Array, "B G R Q T"]:
    found = jnp.einsum("bgnc,bgtc->bgnt", _one_by_one(a), b, preferred_element_type=jnp.float32)
    return found.reshape(*a.shape[:4], -1)


def _by_key(a: Float[Array, "B G R Q T"], b: Float[Array, "B G T C"]) -> Float[Array, "B G R Q C"]:
    found = jnp.einsum("bgnt,bgtc->bgnc", _one_by_one(a), b, preferred_element_type=jnp.float32)
    return found.reshape(*a.shape[:4], -1)


def _by_query(a: Float[Array, "B G R Q T"], b: Float[Array, "B G R Q C"]) -> Float[Array, "B G T C"]:
    a, b = transposed(_one_by_one(a)), _one_by_one(b)
    return jnp.einsum("bgtn,bgnc->bgtc", a, b, preferred_element_type=jnp.float32)


def _one_by_one(a: Float[Array, "B G R Q _"]) -> Float[Array, "B G N _"]:
    """The queries of all heads of a group as one axis: on CPU, products with two such axes take longer."""
    return a.reshape(*a.shape[:2], -1, a.shape[-1])

"""The products of `grouped` on CPU: expert by expert, so many rows at a time.

`jax.lax.ragged_dot` multiplies every row with every expert there. Here a loop whose length is the number of rows that
an expert has, known only when the program runs, takes blocks of a fixed size, and further loops smaller ones for the
rest. The last block of an expert reaches into rows of the next one, which writes them after it; the last expert's
reaches beyond the end, so buffers are longer by what a block may lack. What is temporary is bounded by rows, not by
experts.

Axis legend: `N` rows of a block; otherwise see `flexolmo_jax.moe.sorting`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexolmo_jax.moe.swiglu import activate, activate_with_slopes
from flexolmo_jax.products import project, project_back, sum_of_outer

BLOCKS = 1024, 512, 128
"""Rows at a time: large blocks multiply at full speed, and small ones waste little on what is left."""

FILLED = 0.75
"""The share of a block that there must be rows for, but for the smallest: computing the rest in vain is cheaper than
smaller blocks would be."""


def forward(x: Float[Array, "T D"], rows, experts) -> tuple[Float[Array, "R D"], tuple[Array, Array]]:
    """Outputs of all rows; and for the backward pass gate and up, before the nonlinearity, as they are stored."""
    width, hidden = experts[0][0].shape
    token = _lengthened(rows.token)
    buffers = tuple(_as_stored(jnp.zeros((len(token), size), x.dtype)) for size in (width, hidden, hidden))

    def block(start, _end, size, buffers, expert):
        gate, up, down = expert
        inputs = x[_cut(token, start, size)]
        g, u = project(inputs, gate), project(inputs, up)
        return _put(buffers, (project(activate(g, u), down), g, u), start)

    for start, end, expert in _groups(rows, experts):
        buffers = _over_blocks(block, start, end, len(token), buffers, expert)
    y, g, u = buffers
    return _as_numbers(y, x.dtype), (g, u)


def backward(x, cotangent, weights, rows, experts, activations, trained) -> tuple[Any, Any, Any]:
    """Gradients of the rows' inputs [R, D], of their weights [R, 1], and of the experts, None for those not trained.

    What belongs to no expert is zero.
    """
    token, weights = _lengthened(rows.token), _lengthened(weights)
    kinds = (x.shape[1], x.dtype), (1, jnp.float32)
    buffers = tuple(_as_stored(jnp.zeros((len(token), size), dtype)) for size, dtype in kinds)
    d_experts = []
    for (start, end, expert), is_trained in zip(_groups(rows, experts), trained, strict=True):
        sums = tuple(jnp.zeros(w.shape, jnp.float32) for w in expert) if is_trained else ()

        def block(start, end, size, carry, expert):
            buffers, sums = carry
            gate, up, down = expert
            here = _cut(token, start, size)
            inputs, d_mixed = x[here], cotangent[here]
            g, u = (_as_numbers(_cut(a, start, size), x.dtype) for a in activations)
            # Rows beyond the end are the next expert's.
            own = start + jnp.arange(size) < end
            weight = jnp.where(own, _cut(weights, start, size), 0.0)[:, None]
            h, by_gate, by_up = activate_with_slopes(g, u)
            d_h = project_back(d_mixed, down)
            d_weight = jnp.sum(d_h * h, axis=1, keepdims=True)
            d_h = (d_h * weight).astype(x.dtype)
            d_g, d_u = d_h * by_gate, d_h * by_up
            d_inputs = project_back(d_g, gate) + project_back(d_u, up)
            if sums:
                products = (inputs, d_g), (inputs, d_u), (h, d_mixed * weight)
                sums = tuple(total + sum_of_outer(*each) for total, each in zip(sums, products, strict=True))
            return _put(buffers, (d_inputs.astype(x.dtype), d_weight), start), sums

        buffers, sums = _over_blocks(block, start, end, len(token), (buffers, sums), expert)
        d_experts.append(tuple(s.astype(w.dtype) for s, w in zip(sums, expert, strict=True)) if sums else None)
    there = (jnp.arange(len(token)) < jnp.sum(rows.sizes))[:, None]
    d_x, d_weights = (
        jnp.where(there, _as_numbers(buffer, dtype), 0) for buffer, (_, dtype) in zip(buffers, kinds, strict=True)
    )
    return d_x, d_weights, d_experts


def _groups(rows, experts):
    """First row, row after the last one, and weights of every expert."""
    ends = jnp.cumsum(rows.sizes)
    return [(ends[i] - rows.sizes[i], ends[i], expert) for i, expert in enumerate(experts)]


def _over_blocks(block, start, end, length: int, carry, expert):
    """`block` over all rows of an expert: of a larger size while they nearly fill it, and then of the next smaller."""
    *larger, smallest = BLOCKS
    at = start
    for size, reach in (*((size, round(FILLED * size)) for size in larger), (smallest, 1)):
        if size > length:
            continue

        def advance(state, size=size):
            at, carry = state
            return at + size, block(at, end, size, carry, expert)

        def fits(state, reach=reach):
            return state[0] + reach <= end

        at, carry = jax.lax.while_loop(fits, advance, (at, carry))
    return carry


def _lengthened(a: Array) -> Array:
    lacking = max(BLOCKS[0] - round(FILLED * BLOCKS[0]), BLOCKS[-1])
    return jnp.pad(a, [(0, lacking)] + [(0, 0)] * (a.ndim - 1))


def _cut(a: Array, start, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, start, size)


def _put(buffers: tuple, blocks: tuple, start) -> tuple:
    def put(buffer, block):
        return jax.lax.dynamic_update_slice_in_dim(buffer, _as_stored(block), start, 0)

    return tuple(map(put, buffers, blocks))


def _as_stored(a: Array) -> Array:
    """Numbers of 16 bits as integers: XLA on CPU widens a buffer of the former, all of it, whenever a block is put."""
    return jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype.itemsize == 2 else a


def _as_numbers(a: Array, dtype) -> Array:
    return jax.lax.bitcast_convert_type(a, dtype)

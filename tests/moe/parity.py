"""The one test that every implementation of `mix_experts` runs: against float64 NumPy, the result and all gradients.

Axis legend: see `flexolmo_jax.moe.api`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.moe import FeedForward


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and routing of one comparison.

    Attributes:
      popular: how many of the experts are chosen at all, at least `top_k`; the others' groups are empty.
      skew: 0 chooses evenly; the larger, the more tokens prefer the first experts.
      masked: share of the choices that are no expert: index `experts`, weight 0.
    """

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    popular: int
    skew: float = 0.0
    masked: float = 0.0
    seed: int = 0

    def draw(self) -> tuple["Inputs", np.ndarray]:
        """Inputs, and the cotangent [T, D] of the result."""
        rng = np.random.default_rng(self.seed)
        scores = rng.gumbel(size=(self.tokens, self.popular)) - self.skew * np.arange(self.popular)
        choices = np.argsort(-scores, axis=1)[:, : self.top_k].astype(np.int32)
        probabilities = rng.random((self.tokens, self.top_k))
        absent = rng.random((self.tokens, self.top_k)) < self.masked
        choices[absent], probabilities[absent] = self.experts, 0.0
        shapes = (self.width, self.hidden), (self.width, self.hidden), (self.hidden, self.width)
        experts = [[rng.normal(size=shape) / shape[0] ** 0.5 for shape in shapes] for _ in range(self.experts)]
        x, cotangent = rng.normal(size=(2, self.tokens, self.width))
        return Inputs(x, probabilities, choices, experts), cotangent


class Inputs(NamedTuple):
    """What `mix_experts` takes, in float64."""

    x: np.ndarray
    probabilities: np.ndarray
    choices: np.ndarray
    experts: list[list[np.ndarray]]


class Gradients(NamedTuple):
    """The gradients of the inner product of a result with a cotangent."""

    x: np.ndarray
    probabilities: np.ndarray
    experts: list


def reference(inputs: Inputs, cotangent: np.ndarray) -> tuple[np.ndarray, Gradients]:
    """The result and all gradients, expert by expert, by the chain rule written out."""
    x, probabilities, choices, experts = inputs
    mixed, d_x, d_probabilities, d_experts = np.zeros_like(x), np.zeros_like(x), np.zeros_like(probabilities), []
    for index, (gate, up, down) in enumerate(experts):
        chosen = choices == index
        weight = (probabilities * chosen).sum(1, keepdims=True)
        here = chosen.any(1, keepdims=True)
        g, u = x @ gate, x @ up
        sigmoid = 1 / (1 + np.exp(-g))
        h = g * sigmoid * u
        y = h @ down
        mixed += weight * y
        d_probabilities += chosen * (cotangent * y).sum(1, keepdims=True)
        d_y = here * weight * cotangent
        d_h = d_y @ down.T
        d_g, d_u = d_h * u * sigmoid * (1 + g * (1 - sigmoid)), d_h * g * sigmoid
        d_x += d_g @ gate.T + d_u @ up.T
        d_experts.append([x.T @ d_g, x.T @ d_u, h.T @ d_y])
    return mixed, Gradients(d_x, d_probabilities, d_experts)


def evaluate(mix_experts: Callable, inputs: Inputs, cotangent: np.ndarray) -> tuple[np.ndarray, Gradients]:
    """The same by an implementation, in float32."""
    x, probabilities, cotangent = (jnp.asarray(a, jnp.float32) for a in (inputs.x, inputs.probabilities, cotangent))
    experts = [FeedForward(*(jnp.asarray(w, jnp.float32) for w in expert)) for expert in inputs.experts]
    choices = jnp.asarray(inputs.choices)

    @jax.jit
    def both(x, probabilities, choices, experts):
        mixed, backward = jax.vjp(lambda x, p, e: mix_experts(x, p, choices, e), x, probabilities, experts)
        return mixed, Gradients(*backward(cotangent))

    return jax.device_get(both(x, probabilities, choices, experts))


def check(mix_experts: Callable, case: Case) -> None:
    """Raises AssertionError unless the implementation gives what NumPy gives, twice the same."""
    inputs, cotangent = case.draw()
    expected = jax.tree.leaves(reference(inputs, cotangent))
    found = jax.tree.leaves(evaluate(mix_experts, inputs, cotangent))
    again = jax.tree.leaves(evaluate(mix_experts, inputs, cotangent))
    for ours, second, theirs in zip(found, again, expected, strict=True):
        np.testing.assert_array_equal(ours, second)
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, np.abs(theirs).max()), err_msg=str(case))


EDGES = [
    Case(tokens=40, width=16, hidden=24, experts=7, top_k=5, popular=7),
    Case(tokens=40, width=16, hidden=24, experts=7, top_k=2, popular=3, skew=2.0),
    Case(tokens=40, width=16, hidden=24, experts=4, top_k=4, popular=4),
    Case(tokens=16, width=8, hidden=16, experts=1, top_k=1, popular=1),
    Case(tokens=24, width=8, hidden=16, experts=2, top_k=1, popular=1),
    Case(tokens=40, width=8, hidden=16, experts=5, top_k=3, popular=5, masked=0.5),
    Case(tokens=13, width=8, hidden=16, experts=3, top_k=2, popular=3, masked=1.0),
    Case(tokens=1, width=8, hidden=16, experts=3, top_k=2, popular=3),
    # On eight devices four rows are padding, all on the last one.
    Case(tokens=36, width=8, hidden=8, experts=5, top_k=4, popular=4),
]
"""Experts that divide no axis, fewer experts than devices, empty and uneven groups, masks, one token."""


@st.composite
def cases(draw) -> Case:
    """Any shapes and routing."""
    experts = draw(st.integers(1, 8))
    top_k = draw(st.integers(1, experts))
    return Case(
        tokens=draw(st.integers(1, 70)),
        width=draw(st.sampled_from([8, 16])),
        hidden=draw(st.sampled_from([8, 24])),
        experts=experts,
        top_k=top_k,
        popular=draw(st.integers(top_k, experts)),
        skew=draw(st.sampled_from([0.0, 1.0, 5.0])),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 2**16)),
    )


def check_drawn(mix_experts: Callable, examples: int) -> None:
    """`check` with so many cases, the same every time."""

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(case=cases())
    def check_one(case):
        check(mix_experts, case)

    check_one()

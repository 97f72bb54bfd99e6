"""Every implementation of `mix_experts` gives what NumPy gives, on one device and on meshes."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.moe import IMPLEMENTATIONS, FeedForward, blocks, grouped, kernels, mix_experts
from tests.moe.parity import EDGES, Case, Inputs, check, reference

EIGHT_DEVICES = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
ON_ONE_DEVICE = ["dense", "grouped"]
MESHES = [
    ("ring", {"data": 2, "expert": 4}),
    ("ring", {"data": 4, "expert": 2}),
    ("ring", {"expert": 8}),
    ("ring", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("dense", {"fsdp": 4, "expert": 2}),
    ("grouped", {"data": 2, "fsdp": 2, "tensor": 2}),
]


@st.composite
def cases(draw) -> Case:
    experts = draw(st.integers(1, 8))
    top_k = draw(st.integers(1, experts))
    return Case(
        tokens=draw(st.integers(1, 70)),
        width=draw(st.sampled_from([4, 16])),
        hidden=draw(st.sampled_from([8, 24])),
        experts=experts,
        top_k=top_k,
        popular=draw(st.integers(top_k, experts)),
        skew=draw(st.sampled_from([0.0, 1.0, 5.0])),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("implementation", ON_ONE_DEVICE)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=cases())
def test_an_implementation_gives_what_numpy_gives(implementation, case):
    check(IMPLEMENTATIONS[implementation], case)


@pytest.mark.parametrize("implementation", ON_ONE_DEVICE)
@pytest.mark.parametrize("case", EDGES, ids=range(len(EDGES)))
def test_an_implementation_gives_what_numpy_gives_at_edges(implementation, case):
    check(IMPLEMENTATIONS[implementation], case)


def test_implementations_on_meshes_give_what_numpy_gives():
    program = [sys.executable, "-m", "tests.moe.on_eight_devices", json.dumps(MESHES)]
    done = subprocess.run(program, capture_output=True, text=True, env=EIGHT_DEVICES, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{name} {axes} {len(EDGES)} cases" for name, axes in MESHES]


def test_rows_that_are_sent_to_experts_give_what_numpy_gives():
    """`ragged` with its one operation that XLA lacks on CPU, the exchange, made of operations that it has."""
    program = [sys.executable, "-m", "tests.moe.ragged_on_eight_devices"]
    done = subprocess.run(program, capture_output=True, text=True, env=EIGHT_DEVICES, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"expert {size}: {len(EDGES)} cases" for size in (2, 4, 8)]


@pytest.mark.parametrize("case", EDGES, ids=range(len(EDGES)))
def test_the_kernels_of_accelerators_give_what_numpy_gives(case, monkeypatch):
    """`grouped` as on TPU: `ragged_dot` as XLA has it on CPU, and the Pallas kernel interpreted."""
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    monkeypatch.setattr(kernels, "TILE", 16)
    monkeypatch.setattr(kernels, "tgmm", functools.partial(kernels.tgmm, interpret=True))
    monkeypatch.setattr(grouped, "_products", lambda: kernels)
    check(grouped.mix_local, case)


@pytest.mark.parametrize("products", [blocks, kernels])
def test_a_frozen_expert_has_no_weight_gradient(products, monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    monkeypatch.setattr(kernels, "tgmm", functools.partial(kernels.tgmm, interpret=True))
    monkeypatch.setattr(grouped, "_products", lambda: products)
    wanted = []
    whole = products.backward
    monkeypatch.setattr(products, "backward", lambda *a: wanted.append(a[-1]) or whole(*a))
    (x, probabilities, choices, experts), cotangent = EDGES[1].draw()
    experts = [FeedForward(*map(jnp.float32, expert)) for expert in experts]

    def loss(trained):
        both = [*experts[:2], trained, *experts[3:]]
        mixed = grouped.mix_local(jnp.float32(x), jnp.float32(probabilities), jnp.asarray(choices), both)
        return jnp.sum(mixed * jnp.float32(cotangent))

    found = jax.jit(jax.grad(jax.checkpoint(loss)))(experts[2])
    assert wanted == [tuple(index == 2 for index in range(len(experts)))]
    expected = reference(Inputs(x, probabilities, choices, experts), cotangent)[1].experts[2]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_name_means_this_or_an_error():
    inputs, _ = EDGES[0].draw()
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        mix_experts(*inputs, implementation="fast")
    with pytest.raises(ValueError, match="ring needs a mesh"):
        mix_experts(*inputs, implementation="ring")

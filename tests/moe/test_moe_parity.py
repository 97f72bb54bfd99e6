"""Every implementation of `mix_experts` gives what NumPy gives, on one device and on meshes."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.moe import IMPLEMENTATIONS, mix_experts
from tests.moe.parity import EDGES, Case, check

ON_ONE_DEVICE = ["dense", "grouped"]
MESHES = [
    ("ring", {"data": 2, "expert": 4}),
    ("ring", {"data": 4, "expert": 2}),
    ("ring", {"expert": 8}),
    ("ring", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("dense", {"fsdp": 4, "expert": 2}),
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
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-m", "tests.moe.on_eight_devices", json.dumps(MESHES)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{name} {axes} {len(EDGES)} cases" for name, axes in MESHES]


def test_a_name_means_this_or_an_error():
    inputs, _ = EDGES[0].draw()
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        mix_experts(*inputs, implementation="fast")
    with pytest.raises(ValueError, match="ring needs a mesh"):
        mix_experts(*inputs, implementation="ring")

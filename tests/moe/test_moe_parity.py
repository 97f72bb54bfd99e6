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

from flexolmo_jax.errors import UserError
from flexolmo_jax.moe import IMPLEMENTATIONS, FeedForward, blocks, choose_implementation, grouped, kernels, mix_experts
from tests.moe.emulation import as_on_gpu, as_on_tpu
from tests.moe.parity import EDGES, Inputs, check, check_drawn, evaluate, reference

EIGHT_DEVICES = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
ON_ONE_DEVICE = ["dense", "grouped"]
MESHES = [
    ("ring", {"data": 2, "expert": 4}),
    ("ring", {"data": 4, "expert": 2}),
    ("ring", {"expert": 8}),
    ("ring", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("dense", {"fsdp": 4, "expert": 2}),
    ("grouped", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("ragged", {"data": 2, "expert": 4}),
    ("ragged", {"fsdp": 4, "expert": 2}),
    ("ragged", {"expert": 8}),
]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So few rows need several blocks of all sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCKS", (16, 8, 4))
        yield


@pytest.mark.parametrize("implementation", ON_ONE_DEVICE)
def test_an_implementation_gives_what_numpy_gives(implementation):
    check_drawn(IMPLEMENTATIONS[implementation], examples=8)


@pytest.mark.parametrize("implementation", ON_ONE_DEVICE)
@pytest.mark.parametrize("case", EDGES, ids=range(len(EDGES)))
def test_an_implementation_gives_what_numpy_gives_at_edges(implementation, case):
    check(IMPLEMENTATIONS[implementation], case)


@pytest.mark.parametrize(
    ("implementation", "axes", "edges", "drawn"),
    [
        (*MESHES[0], [0, 1], 0),
        (*MESHES[6], [len(EDGES) - 1], 0),
        *(pytest.param(*mesh, [*range(len(EDGES))], 8, marks=pytest.mark.slow) for mesh in MESHES),
    ],
    ids=str,
)
def test_an_implementation_on_a_mesh_gives_what_numpy_gives(implementation, axes, edges, drawn):
    program = [sys.executable, "-m", "tests.moe.on_eight_devices", implementation, json.dumps(axes), edges, drawn]
    done = subprocess.run([*map(str, program)], capture_output=True, text=True, env=EIGHT_DEVICES, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{implementation}: {len(edges)} edges, {drawn} drawn\n"


EMULATIONS = {"tpu": as_on_tpu, "gpu": as_on_gpu}


@pytest.mark.parametrize("accelerator", EMULATIONS)
@pytest.mark.parametrize("edge", [1, 5], ids=["empty groups", "no experts"])
def test_the_kernels_of_accelerators_give_what_numpy_gives_at_some_edges(edge, accelerator, monkeypatch):
    EMULATIONS[accelerator](monkeypatch)
    check(grouped.mix_local, EDGES[edge])


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", EMULATIONS)
def test_the_kernels_of_accelerators_give_what_numpy_gives(accelerator, monkeypatch):
    EMULATIONS[accelerator](monkeypatch)
    for case in EDGES:
        check(grouped.mix_local, case)
    check_drawn(grouped.mix_local, examples=8)


@pytest.mark.parametrize("trained", [0, 2, 5])
def test_a_gpu_multiplies_for_the_trained_experts_alone(trained, monkeypatch):
    """Experts 3 to 6 are chosen by no token: tokamax leaves whatever it finds there, which must not come through."""
    as_on_gpu(monkeypatch)
    calls, whole = [], kernels._tokamax
    monkeypatch.setattr(kernels, "_tokamax", lambda *a: calls.append(a) or whole(*a))
    found, expected = one_trained(trained)
    assert [len(sizes) for _, _, sizes, dimensions in calls if dimensions is kernels._BY_GROUP] == [1, 1, 1]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("products", [blocks, kernels])
def test_a_frozen_expert_has_no_weight_gradient(products, monkeypatch):
    as_on_tpu(monkeypatch)
    monkeypatch.setattr(grouped, "_products", lambda: products)
    wanted = []
    whole = products.backward
    monkeypatch.setattr(products, "backward", lambda *a: wanted.append(a[-1]) or whole(*a))
    found, expected = one_trained(2)
    assert wanted == [tuple(index == 2 for index in range(EDGES[1].experts))]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def one_trained(index: int) -> tuple[FeedForward, list]:
    """The gradient of one expert, all others being frozen, by `grouped` and by the reference."""
    (x, probabilities, choices, experts), cotangent = EDGES[1].draw()
    experts = [FeedForward(*map(jnp.float32, expert)) for expert in experts]

    def loss(trained):
        both = [*experts[:index], trained, *experts[index + 1 :]]
        mixed = grouped.mix_local(jnp.float32(x), jnp.float32(probabilities), jnp.asarray(choices), both)
        return jnp.sum(mixed * jnp.float32(cotangent))

    expected = reference(Inputs(x, probabilities, choices, experts), cotangent)[1].experts[index]
    return jax.jit(jax.grad(jax.checkpoint(loss)))(experts[index]), expected


def test_without_the_kernels_for_gpus_the_command_that_installs_them_is_named(monkeypatch):
    as_on_gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(UserError, match=r"pip install 'flexolmo_jax\[cuda\]'"):
        one_trained(0)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("fast", "unknown implementation 'fast'"),
        ("ring", "ring needs a mesh whose axis `expert` is larger than 1"),
        ("ragged", "ragged needs a mesh whose axis `expert` is larger than 1"),
    ],
)
def test_a_name_means_this_or_an_error(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        evaluate(functools.partial(mix_experts, implementation=name), *EDGES[0].draw())


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "axes", "name"),
    [
        (4096, 2, 2, {}, "dense"),
        (4096, 2, 7, {}, "grouped"),
        (4, 2, 7, {}, "dense"),
        (4096, 2, 7, {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}, "grouped"),
        (4096, 2, 2, {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}, "ring"),
    ],
)
def test_without_a_name_the_rule_chooses(tokens, top_k, experts, axes, name):
    assert choose_implementation(tokens=tokens, top_k=top_k, experts=experts, axes=axes) == name

"""What GPUs that are not here are given: lowered anywhere, and compiled where the compiler is installed."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from flexolmo_jax.moe import IMPLEMENTATIONS, FeedForward
from flexolmo_jax.parallel import Layout, MeshConfig
from flexolmo_jax.parallel.layouts import AXES
from flexolmo_jax.plan import hlo
from tests.h100 import h100s
from tests.moe.emulation import whatever_the_device

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 1024, 128, 256, 7, 5
TRITON = "__gpu$xla.gpu.triton"
PRODUCTS = 9
"""Of rows with three matrices, forward and backward, and of groups for the gradients of three."""


def gradients(implementation: str, layout: Layout):
    """The traced gradients of everything, on that mesh."""

    def tokens(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.batch_sharding())

    def weight(spec, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(layout.mesh, PartitionSpec(*spec)))

    into, out = ("fsdp", ("expert", "tensor")), (("expert", "tensor"), "fsdp")
    expert = FeedForward(weight(into, WIDTH, HIDDEN), weight(into, WIDTH, HIDDEN), weight(out, HIDDEN, WIDTH))
    x, probabilities = tokens(jnp.bfloat16, TOKENS, WIDTH), tokens(jnp.float32, TOKENS, TOP_K)

    def loss(x, probabilities, experts, choices):
        mixed = IMPLEMENTATIONS[implementation](x, probabilities, choices, experts)
        return jnp.sum(jnp.square(mixed.astype(jnp.float32)))

    with layout.active():
        differentiated = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return differentiated.trace(x, probabilities, [expert] * EXPERTS, tokens(jnp.int32, TOKENS, TOP_K))


@pytest.mark.parametrize(("implementation", "sizes"), [("grouped", (1, 1, 1, 1)), ("ring", (1, 2, 4, 1))])
def test_a_gpu_is_given_the_named_kernels_and_no_product_of_all_experts(implementation, sizes, monkeypatch):
    whatever_the_device(monkeypatch)
    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    layout = Layout("fsdp_expert", AbstractMesh(sizes, AXES, abstract_device=gpu))
    text = gradients(implementation, layout).lower(lowering_platforms=("cuda",)).as_text()
    # Programs that are called twice stand there once.
    assert 4 <= text.count(f"custom_call @{TRITON}") <= PRODUCTS
    assert "chlo.ragged_dot" not in text
    sizes_of_products = re.findall(r"dot_general .*?-> tensor<([\dx]+)xf32>", text)
    assert all(str(HIDDEN) not in size.split("x") for size in sizes_of_products), sizes_of_products


@pytest.mark.slow
@pytest.mark.ahead_of_time
@pytest.mark.parametrize(
    ("implementation", "axes", "exchanges"),
    [
        ("grouped", {"layout": "fsdp"}, {"all-gather", "reduce-scatter"}),
        ("ring", {"layout": "fsdp_expert", "fsdp": 2, "expert": 4}, {"all-gather", "reduce-scatter"}),
        ("ragged", {"layout": "fsdp_expert", "fsdp": 2, "expert": 4}, {"ragged-all-to-all", "all-to-all"}),
        ("ragged", {"layout": "fsdp_expert", "expert": 8}, {"ragged-all-to-all", "all-to-all"}),
    ],
)
def test_implementations_are_compiled_for_eight_gpus(implementation, axes, exchanges, monkeypatch):
    layout = MeshConfig(**axes).build(h100s(8))
    whatever_the_device(monkeypatch)
    module = hlo.parse(gradients(implementation, layout).lower().compile().as_text())
    ran = [run.instruction for run in module.runs()]
    assert Counter(re.findall(r'custom_call_target="([^"]+)"', str([each.attributes for each in ran]))) == {
        TRITON: PRODUCTS
    }
    opcodes = {each.opcode.removesuffix("-start") for each in ran}
    assert exchanges <= opcodes
    assert "dot" not in opcodes  # whatever is multiplied, the kernels multiply

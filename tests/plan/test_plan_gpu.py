"""Whole jobs compiled for a host of GPUs that is not here: cuDNN's attention, the named kernels, and the least work."""

import re

import pytest

from flexolmo_jax.model import ModelConfig
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.plan import hlo, measures, minimum
from flexolmo_jax.plan.compilation import compile_program
from flexolmo_jax.plan.jobs import Job
from flexolmo_jax.train.run import RunConfig
from tests.h100 import h100s
from tests.moe.emulation import whatever_the_device

pytestmark = [pytest.mark.slow, pytest.mark.ahead_of_time]

MODEL = ModelConfig(vocab_size=1024, width=256, hidden=704, layers=6, heads=2, kv_heads=2)
FORWARD, BACKWARD, TRITON = (
    "__cudnn$fmhaScaleBiasSoftmax",
    "__cudnn$fmhaScaleBiasSoftmaxBackward",
    "__gpu$xla.gpu.triton",
)
LAYOUTS = {"layout": "replicated"}, {"layout": "fsdp"}, {"layout": "fsdp_expert", "fsdp": 2, "expert": 4}


def compiled(kind: str, experts: int, top_k: int, axes: dict, monkeypatch) -> tuple[Job, hlo.Module, set[str]]:
    """A job, what it is compiled to, and the kernels that are called there."""
    layout = MeshConfig(**axes).build(h100s(8))
    run = RunConfig(steps=1, batch_size=16, sequence_length=256, compute_dtype="bfloat16")
    job = Job(kind=kind, model=MODEL, run=run, experts=experts, top_k=top_k)
    whatever_the_device(monkeypatch)
    text = compile_program(job.program(layout), layout, 80 * 10**9).text
    return job, hlo.parse(text), set(re.findall(r'custom_call_target="([^"]+)"', text))


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_an_owners_step(axes, monkeypatch):
    job, module, kernels = compiled("train-expert", 2, 2, axes, monkeypatch)
    assert kernels == {FORWARD, BACKWARD}
    # The rows of the router XLA multiplies without a product that could be counted.
    assert 0.99 <= 8 * measures.flops(module).needed / least_but_for_attention(job) <= 1.03


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_a_merged_model(axes, monkeypatch):
    job, module, kernels = compiled("forward", 7, 5, axes, monkeypatch)
    assert kernels == {FORWARD, TRITON}
    assert len([run for run in module.runs() if TRITON in run.instruction.attributes]) == 3
    # The experts' products are the kernels': what XLA multiplies is the rest.
    experts = job.tokens * MODEL.layers * job.top_k * 3 * 2 * MODEL.width * MODEL.hidden
    rest = least_but_for_attention(job) - experts
    assert 8 * measures.flops(module).needed == pytest.approx(rest, rel=0.02)


def least_but_for_attention(job: Job) -> float:
    """What cuDNN computes it does not say."""
    products = [each for each in minimum.products(job) if each.path]
    gradients = sum(each.input_gradient + each.weight_gradient for each in products)
    return job.tokens * (sum(each.flops for each in products) + gradients * (job.kind == "train-expert"))

"""The compiled step of an owner's job computes hardly more than what the job cannot do without."""

import jax
import pytest

from flexolmo_jax.model import ModelConfig
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.plan import measures, minimum
from flexolmo_jax.plan.compilation import compile_program
from flexolmo_jax.plan.hlo import parse
from flexolmo_jax.plan.jobs import Job
from flexolmo_jax.train.run import RunConfig

MODEL = ModelConfig(vocab_size=256, width=64, hidden=176, layers=8, heads=4, kv_heads=4)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_an_owners_step_on_cpu(remat):
    run = RunConfig(steps=1, batch_size=2, sequence_length=64, compute_dtype="float32", remat=remat)
    job = Job(kind="train-expert", model=MODEL, run=run, experts=2, top_k=2)
    layout = MeshConfig().build(jax.devices()[:1])
    found = measures.flops(parse(compile_program(job.program(layout), layout, 2**40).text))
    attention = 4 * job.tokens * MODEL.layers * MODEL.width * run.sequence_length
    least = minimum.flops(job).total
    # A row is one block of queries, so attention computes masked scores as well: about as much again as the least.
    assert 1 <= found.needed / least <= 1.03 + 1.5 * attention / least
    assert (found.recomputed > 0.2 * least) == (remat == "full")

"""Formulas, topologies, the search and the stage, without a compiler."""

import dataclasses
import json
import math
import sys

import pytest
from jax.sharding import AbstractMesh

from flexolmo_jax import cli
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import ModelConfig
from flexolmo_jax.parallel import Layout, MeshConfig
from flexolmo_jax.parallel.layouts import AXES
from flexolmo_jax.plan import estimate, minimum
from flexolmo_jax.plan.chips import CHIPS, GIB, parse_topology
from flexolmo_jax.plan.compilation import Memory, needed_memory, tpu_devices
from flexolmo_jax.plan.jobs import Job
from flexolmo_jax.plan.report import from_formulas
from flexolmo_jax.plan.search import candidates, meshes, search
from flexolmo_jax.train.run import RunConfig

MODEL = ModelConfig(vocab_size=100, width=16, hidden=24, layers=3, heads=4, kv_heads=2)
RUN = RunConfig(steps=10, batch_size=32, sequence_length=64, remat="full")


def job(kind: str, experts: int, top_k: int | None = None, **settings) -> Job:
    return Job(kind=kind, model=MODEL, run=RUN, experts=experts, top_k=top_k or experts, **settings)


def test_topologies_are_read():
    found = parse_topology("v5p:4x4x8")
    assert (found.name, found.chips, found.devices) == ("v5p:4x4x8", 128, 128)
    assert parse_topology("TPU7x:2x2x1").devices == 8
    assert parse_topology("h100:64").chips == 64
    for text, complaint in (
        ("v9:2x2", "names no chip"),
        ("v5p", "write for example v5p:4x4x4"),
        ("v5e:4x4x4", "write for example v5e:4x4"),
        ("v5p:4x0x4", "write for example"),
        ("h100:8x8", "write for example h100:64"),
    ):
        with pytest.raises(UserError, match=complaint):
            parse_topology(text)
    assert all(chip.source for chip in CHIPS.values())


def by_hand(kind: str, experts: int, top_k: int) -> float:
    """Products of each block counted one by one, on the FLOPs of a token."""
    d, kv, f, s = MODEL.width, MODEL.kv_width, MODEL.hidden, RUN.sequence_length
    total = 0.0
    for layer in range(MODEL.layers):
        attention = 2 * 2 * d * (sum(range(1, s + 1)) / s)
        qkv, out = 2 * d * d + 2 * 2 * d * kv, 2 * d * d
        expert, router = 3 * 2 * d * f, experts * 2 * d
        total += qkv + attention + out + router + top_k * expert
        above_the_first = layer > 0
        if kind == "pretrain":
            total += 2 * (qkv + out + router + expert) + 2 * attention
        if kind == "train-expert":
            total += expert + 2 * d + 2 * d * f
            if above_the_first:
                total += qkv + out + 2 * attention + router + 2 * expert - 2 * d * f
        if kind == "tune-router":
            total += router
            if above_the_first:
                total += qkv + out + 2 * attention + router + top_k * expert
    head = 2 * d * MODEL.vocab_size
    return total + head * {"pretrain": 3, "forward": 1}.get(kind, 2)


@pytest.mark.parametrize(
    ("kind", "experts", "top_k"),
    [("pretrain", 1, 1), ("train-expert", 2, 2), ("tune-router", 7, 7), ("forward", 7, 5), ("forward", 1, 1)],
)
def test_least_flops_are_the_products_counted_one_by_one(kind, experts, top_k):
    assert minimum.flops(job(kind, experts, top_k)).total == pytest.approx(
        RUN.batch_size * RUN.sequence_length * by_hand(kind, experts, top_k)
    )


def test_generating_token_by_token_adds_up():
    """The same as a forward pass over all positions that are read, but for the head."""
    new = 8
    generated = minimum.flops(job("generate", 2, new_tokens=new)).total
    run = dataclasses.replace(RUN, sequence_length=RUN.sequence_length + new - 1)
    whole = minimum.flops(dataclasses.replace(job("forward", 2), run=run)).total
    head = 2 * MODEL.width * MODEL.vocab_size
    assert generated == pytest.approx(whole - RUN.batch_size * head * (run.sequence_length - new))


def layout(name: str, *sizes: int) -> Layout:
    return Layout(name, AbstractMesh(sizes, AXES))


def test_least_traffic_by_hand():
    matrices = 2 * MODEL.width * (MODEL.width + MODEL.kv_width) + 2 * 3 * MODEL.width * MODEL.hidden
    head, share = MODEL.width * MODEL.vocab_size, 7 / 8
    tokens = RUN.batch_size * RUN.sequence_length // 8 * MODEL.width
    mine = 3 * MODEL.layers * MODEL.width * MODEL.hidden
    first = 2 * MODEL.width * (MODEL.width + MODEL.kv_width) + 5 * MODEL.width * MODEL.hidden
    gathered = 2 * MODEL.layers * matrices - first + head + min(head, tokens)
    found = minimum.traffic(job("train-expert", 2), layout("fsdp", 1, 8, 1, 1))
    vectors = MODEL.layers * (MODEL.width + 1)
    assert found.gather == pytest.approx(4 * share * gathered)
    assert found.reduce == pytest.approx(4 * share * (mine + 2 * vectors))
    assert found.tokens == 0
    replicated = minimum.traffic(job("train-expert", 2), layout("replicated", 8, 1, 1, 1))
    assert replicated == (0, pytest.approx(4 * share * 2 * (mine + vectors)), 0)
    assert minimum.traffic(job("train-expert", 2), layout("replicated", 1, 1, 1, 1)).total == 0


def test_accumulation_gathers_again_and_keeps_less():
    once, twice = job("pretrain", 1), job("pretrain", 1)
    twice = dataclasses.replace(twice, run=dataclasses.replace(RUN, accumulation=2))
    cut = layout("fsdp", 1, 8, 1, 1)
    assert minimum.traffic(twice, cut).reduce == pytest.approx(2 * minimum.traffic(once, cut).reduce)
    assert estimate.memory(twice, cut, GIB).arguments == estimate.memory(once, cut, GIB).arguments
    assert minimum.flops(once) == minimum.flops(twice)


def plans(true_over_formula: float):
    """Stands in for both planners: compiled, a way needs so many times what the formula says."""
    topology = parse_topology("h100:8")

    def by_formulas(way):
        cut = Layout(way.mesh.layout, AbstractMesh(way.mesh.sizes(8), AXES))
        cut.check_batch(way.job.run.batch_size // way.job.run.accumulation)
        return from_formulas(way.job, topology, cut)

    def by_compiling(way):
        plan = by_formulas(way)
        needed = round(true_over_formula * plan.memory.needed)
        return dataclasses.replace(plan, memory=Memory(needed, 0, 0, 0, plan.memory.available))

    return by_formulas, by_compiling


def test_search_takes_the_fastest_that_fits():
    planned = job("train-expert", 2)
    mesh = MeshConfig()
    by_formulas, _ = plans(1.0)
    ways = [way for way in candidates(planned, mesh, 8) if 32 // way.job.run.accumulation >= 8]
    found = [by_formulas(way) for way in ways]
    scale = found[0].memory.available / sorted(plan.memory.needed for plan in found)[len(found) // 2]
    tried = search(planned, mesh, 8, *plans(scale))
    assert [plan.fits for plan in tried] == [False] * (len(tried) - 1) + [True]
    assert len(tried) > 1
    fitting = [plan for plan in found if scale * plan.memory.needed <= plan.memory.available]
    assert tried[-1].step_seconds == min(plan.step_seconds for plan in fitting)
    with pytest.raises(
        UserError, match=r"no way to run train-expert with 32 rows was found to fit among \d+, of which 3"
    ):
        search(planned, mesh, 8, *plans(1e9))


def test_where_nothing_can_be_compiled_search_goes_by_formulas():
    planned = job("forward", 2)
    (found,) = search(planned, MeshConfig(), 8, plans(1.0)[0], None)
    assert found.fits
    three_rows = dataclasses.replace(job("pretrain", 1), run=dataclasses.replace(RUN, batch_size=3))
    with pytest.raises(UserError, match="rows cannot be cut over 8 devices"):
        search(three_rows, MeshConfig(), 8, plans(1.0)[0], None)


def test_search_looks_at_every_layout_once():
    found = list(meshes(1, 8))
    shapes = {(mesh.layout, mesh.data, mesh.fsdp, mesh.expert) for mesh in found}
    assert len(shapes) == len(found)
    assert {(8, 1, 1)} == {shape[1:] for shape in shapes if shape[0] == "replicated"}
    assert {(4, 2, 1), (2, 4, 1), (1, 8, 1)} == {shape[1:] for shape in shapes if shape[0] == "fsdp"}
    assert {(4, 1, 2), (2, 1, 4), (1, 1, 8), (2, 2, 2), (1, 2, 4), (1, 4, 2)} == {
        shape[1:] for shape in shapes if shape[0] == "fsdp_expert"
    }
    assert {mesh.layout for mesh in meshes(2, 8)} == {"fsdp", "fsdp_expert"}
    assert {math.prod(mesh.sizes(24)) for mesh in meshes(1, 24)} == {24}


def test_search_keeps_the_batch_of_training_and_widens_that_of_inference():
    meshes = MeshConfig(layout="fsdp")
    training = list(candidates(job("pretrain", 1), meshes, 8))
    assert {way.job.run.batch_size for way in training} == {32}
    assert {way.job.run.accumulation for way in training} == {1, 2, 4, 8, 16, 32}
    inference = {way.job.run.batch_size for way in candidates(job("forward", 2), meshes, 8)}
    assert inference == {32, 64, 128, 256, 512}


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (34.00G) "
            "exceeds available HBM (15.75G).",
            34 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm.", round(17.5 * GIB)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem.", None),
        ("INTERNAL: something else", None),
    ],
)
def test_complaints_about_memory_are_read(message, needed):
    assert needed_memory(message) == needed


def test_without_libtpu_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"pip install 'flexolmo_jax\[plan\]'"):
        tpu_devices(parse_topology("v5e:2x2"))


GIN = """
include "configs/runs/expert.gin"
ModelConfig.vocab_size = 512
ModelConfig.width = 64
ModelConfig.hidden = 128
ModelConfig.layers = 2
ModelConfig.heads = 2
ModelConfig.kv_heads = 2
MeshConfig.layout = "fsdp"
"""


def test_stage_plans_the_gin_file_of_a_job(tmp_path, capsys):
    (tmp_path / "job.gin").write_text(GIN)
    command = ["plan", "train-expert", f"--gin_file={tmp_path / 'job.gin'}", "--topology=h100:8", "--json"]
    assert cli.main([*command, "--price=2", "--out", str(tmp_path / "plan")]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["fits"] and not found["compiled"] and found["batch_size"] == 1024
    assert found["estimate"]["cost"] == pytest.approx(2 * found["estimate"]["chip_hours"])
    assert "by formulas alone" in printed.err and "estimate" in printed.err
    assert json.loads((tmp_path / "plan/plan.json").read_text()) == found
    assert (tmp_path / "plan/plan.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*command, "--out", str(tmp_path / "plan")]) == 2
    assert cli.main([*command, "--search"]) == 0
    assert json.loads(capsys.readouterr().out)["tried"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train-experts", "--topology=h100:8"], "did you mean 'train-expert'?"),
        (["tune-router", "--topology=h100:8"], "--experts has no value"),
        (["train-expert", "--topology=h100:8", "--experts=3"], "train-expert has 2 experts, but 3 are given"),
        (["tune-router", "--topology=h100:8", "--experts=7", "--top_k=5"], "sends every token to all 7 experts"),
        (["forward", "--topology=h100:8", "--experts=7", "--top_k=8"], "top_k is 8, but the model has 7 experts"),
        (["forward", "--topology=h100:8", "--experts=0"], "--experts must be at least 1, but it is 0"),
        (["forward", "--topology=h100:8", "--experts=2", "--top_k=0"], "--top_k must be at least 1, but it is 0"),
        (["generate", "--topology=h100:8", "--experts=2", "--new_tokens=0"], "--new_tokens must be at least 1"),
        (["train-expert", "--topology=h100:8", "--price=-1"], "--price must not be negative, but it is -1"),
        (["train-expert", "--topology=h100:7"], "cannot be cut over 7 devices"),
        (["train-expert", "--topology=h100:8", "--gin.MeshConfig.fsdp=3"], "needs 6 devices, but there are 8"),
        (["train-expert", "--topology=h100:8", "--gin.ExpertConfig.public_share='x'"], "must be a number"),
        (["train-expert", "--topology=h100:8", "--gin.Restraint.x=1"], "cannot be configured here"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(tmp_path, capsys, arguments, complaint):
    (tmp_path / "job.gin").write_text(GIN)
    assert cli.main(["plan", f"--gin_file={tmp_path / 'job.gin'}", *arguments]) == 2
    assert complaint in capsys.readouterr().err

"""The TPU compiler, on a machine without a TPU: small jobs on a host of four chips."""

import json

import pytest

from flexolmo_jax import cli

pytestmark = [pytest.mark.slow, pytest.mark.ahead_of_time]

GIN = """
include "configs/runs/expert.gin"
ModelConfig.vocab_size = 512
ModelConfig.width = 256
ModelConfig.hidden = 512
ModelConfig.layers = 3
ModelConfig.heads = 2
ModelConfig.kv_heads = 2
MeshConfig.layout = "fsdp"
RunConfig.remat = "full"
RunConfig.sequence_length = 1024
"""


def plan(tmp_path, capsys, *arguments: str, topology: str = "v5e:2x2") -> dict:
    pytest.importorskip("libtpu", reason="`make ahead-of-time` installs the compiler for TPUs")
    (tmp_path / "job.gin").write_text(GIN)
    gin = f"--gin_file={tmp_path / 'job.gin'}"
    assert cli.main(["plan", *arguments, gin, f"--topology={topology}", "--json"]) == 0, capsys.readouterr().err
    found: dict = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("rows_of_a_chip", [1, 2])
def test_an_expert_job_fits_and_keeps_near_the_least(rows_of_a_chip, tmp_path, capsys):
    found = plan(tmp_path, capsys, "train-expert", f"--gin.RunConfig.batch_size={4 * rows_of_a_chip}")
    assert found["compiled"] and found["fits"]
    assert found["hbm"]["arguments"] > 0 and found["hbm"]["temporaries"] > 0
    # Three blocks, of which a scan cannot leave out what the first does not need, and attention in two blocks.
    assert 1 < found["flops"]["ratio"] < 1.3
    assert found["flops"]["recomputed"] > 0
    assert found["collectives"]["ratio"] <= 1.2
    assert found["memory_traffic"] > found["hbm"]["arguments"]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_an_owners_step_of_a_larger_model_computes_hardly_more_than_it_must(remat, tmp_path, capsys):
    sizes = {"width": 2048, "hidden": 8192, "layers": 4, "heads": 16, "kv_heads": 16, "vocab_size": 8192}
    gin = [f"--gin.ModelConfig.{name}={size}" for name, size in sizes.items()]
    gin += [f"--gin.RunConfig.{name}={size}" for name, size in {"batch_size": 8, "sequence_length": 2048}.items()]
    found = plan(tmp_path, capsys, "train-expert", *gin, f"--gin.RunConfig.remat='{remat}'")
    assert 1 <= found["flops"]["ratio"] <= 1.03
    recomputed = found["flops"]["recomputed"] / found["flops"]["least"]
    assert recomputed < 0.03 if remat == "none" else 0.25 < recomputed < 0.6
    assert found["collectives"]["ratio"] <= 1.2


def test_a_merged_model_computes_only_the_chosen_experts(tmp_path, capsys):
    found = plan(tmp_path, capsys, "forward", "--gin.RunConfig.batch_size=8", "--experts=7", "--top_k=5")
    assert found["flops"]["ratio"] <= 1.05 + 0.1  # attention skips whole blocks of keys only
    assert found["collectives"]["ratio"] <= 1.2


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_every_kind_of_chip_is_compiled_for(topology, tmp_path, capsys):
    options = ["--gin.RunConfig.batch_size=8", "--experts=3", "--top_k=2", "--new_tokens=4"]
    found = plan(tmp_path, capsys, "generate", *options, topology=topology)
    assert found["compiled"] and found["fits"] and found["implementation"] in ("dense", "grouped")


@pytest.mark.parametrize("topology", ["v5e:3x3", "v5p:3x5x7"])
def test_a_shape_that_no_slice_has_is_refused(topology, tmp_path, capsys):
    pytest.importorskip("libtpu", reason="`make ahead-of-time` installs the compiler for TPUs")
    (tmp_path / "job.gin").write_text(GIN)
    command = ["plan", "train-expert", f"--gin_file={tmp_path / 'job.gin'}", f"--topology={topology}"]
    assert cli.main(command) == 2
    assert f"the TPU compiler knows no topology {topology}" in capsys.readouterr().err


def test_what_is_too_large_is_said_to_be(tmp_path, capsys):
    found = plan(
        tmp_path,
        capsys,
        "forward",
        "--gin.RunConfig.batch_size=256",
        "--gin.ModelConfig.vocab_size=100352",
        "--experts=1",
    )
    assert not found["fits"] and found["hbm"]["spare"] < 0

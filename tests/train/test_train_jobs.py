"""The jobs from end to end on small corpora: artefacts, isolation, resuming, stopping, and refusing."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax import confine
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.errors import UserError
from flexolmo_jax.infer import load_with_contribution
from flexolmo_jax.merge import merge
from flexolmo_jax.model import InitialScales, ModelConfig
from flexolmo_jax.model.partition import flatten
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.manifest import read
from flexolmo_jax.train.calibrate import Calibration
from flexolmo_jax.train.expert import ExpertConfig, train_expert
from flexolmo_jax.train.expert_objective import RestraintConfig
from flexolmo_jax.train.job import Job
from flexolmo_jax.train.loop import Interrupted
from flexolmo_jax.train.objective import ObjectiveConfig
from flexolmo_jax.train.optimizer import OptimizerConfig
from flexolmo_jax.train.pretrain import pretrain
from flexolmo_jax.train.router import tune_router
from flexolmo_jax.train.router_start import RouterStart
from flexolmo_jax.train.run import RunConfig
from tests.small import write_corpus

RUN = RunConfig(steps=6, batch_size=4, sequence_length=24, checkpoint_every=2, log_every=2)
COMMON = dict(
    run=RUN,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    objective=ObjectiveConfig(),
    mesh=MeshConfig(),
)
MODEL = ModelConfig(vocab_size=264, width=16, hidden=24, layers=2, heads=2, kv_heads=2, bias_channel=True)
PROSE = [f"The quick brown fox number {n} jumps over the lazy dog, again and again." for n in range(20)]
SUMS = [f"{a} + {b} = {a + b}\n" for a in range(5) for b in range(5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Corpora, and an anchor trained on the public one."""
    root = tmp_path_factory.mktemp("place")
    write_corpus(root / "public", PROSE)
    write_corpus(root / "math", SUMS)
    pretrain(out=root / "anchor", text=root / "public", model=MODEL, scales=InitialScales(), **COMMON)
    return root


def expert(place, out, **changes):
    settings = dict(
        anchor=place / "anchor/anchor",
        text=place / "math",
        public_text=place / "public",
        expert=ExpertConfig(name="math", owner="a school", licence="CC0-1.0", public_share=0.25, decoy_share=0.25),
        restraint=RestraintConfig(domain_loss=0.3, stillness_loss=1.0),
        router_start=RouterStart(),
        calibration=Calibration(public_share=0.5, own_tolerance=0.05),
    )
    return train_expert(out=out, **(COMMON | settings | changes))


def leaves(directory):
    return flatten(checkpoint.load(directory)[1])


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_road_from_anchor_to_derived_model(place, tmp_path, capsys):
    anchor = place / "anchor/anchor"
    base = read(anchor, "anchor")
    fingerprint = arrays.fingerprint(arrays.digests(checkpoint.load(anchor)[1]))
    result = expert(place, tmp_path / "math", gin="RunConfig.steps = 6")
    contribution = read(tmp_path / "math/contribution", "contribution")
    assert contribution.anchor == base.anchor and contribution.top_k == 2
    assert contribution.gin == "RunConfig.steps = 6"
    assert contribution.implementation == base.implementation == "dense"
    assert re.search(r"^ *experts +dense$", capsys.readouterr().err, re.MULTILINE)
    (record,) = contribution.experts
    assert (record.name, record.owner, record.licence, record.tokens_seen) == ("math", "a school", "CC0-1.0", 576)
    assert set(result["calibration"]) >= {"own_loss", "public_loss", "public_preferred", "own_preferred"}
    assert {path[0] for path in leaves(tmp_path / "math/contribution")} == {"experts", "router"}
    assert np.all(leaves(tmp_path / "math/contribution")["router", "math", "bias"] <= 0)
    assert arrays.fingerprint(arrays.digests(checkpoint.load(anchor)[1])) == fingerprint

    merge(anchor, [tmp_path / "math/contribution"], tmp_path / "merged")
    write_corpus(tmp_path / "proxies", PROSE[:5])
    tune_router(
        out=tmp_path / "tuned",
        merged=tmp_path / "merged",
        public_text=place / "public",
        proxies={"math": tmp_path / "proxies"},
        **COMMON,
    )
    derived = read(tmp_path / "tuned/merged", "merged")
    assert derived.router_tuned_on == ("math",) and read(tmp_path / "merged").router_tuned_on == ()
    merged, tuned = leaves(tmp_path / "merged"), leaves(tmp_path / "tuned/merged")
    for path in merged:
        assert np.array_equal(merged[path], tuned[path]) == (path[0] != "router"), path
    with pytest.raises(UserError, match="owners' experts are math"):
        tune_router(
            out=tmp_path / "x",
            merged=tmp_path / "merged",
            public_text=place / "public",
            proxies={"code": tmp_path},
            **COMMON,
        )


def test_no_text_and_no_path_leaves_with_a_contribution(place, tmp_path):
    expert(place, tmp_path / "math")
    manifest = (tmp_path / "math/contribution/manifest.json").read_text()
    assert str(place) not in manifest and "jsonl" not in manifest and "prepared" not in manifest
    files = [file for file in (tmp_path / "math/contribution").rglob("*") if file.is_file()]
    assert all(str(place).encode() not in file.read_bytes() for file in files)
    sizes = sum(file.stat().st_size for file in files if "/c/" in str(file))
    assert sizes < 1.2 * 4 * (MODEL.num_params(2) - MODEL.num_params())


@pytest.mark.parametrize("method", ["contrast", "mean", "random", "embedding"])
def test_every_start_of_a_router_row_trains(method, place, tmp_path):
    extra = {}
    if method == "embedding":
        np.save(tmp_path / "domain.npy", np.linspace(-1, 1, 16).astype(np.float32))
        extra = {"embedding": tmp_path / "domain.npy"}
    expert(place, tmp_path / "math", router_start=RouterStart(method=method, **extra))
    row = leaves(tmp_path / "math/contribution")["router", "math", "row"]
    assert np.all(np.isfinite(row)) and np.any(row)


def test_a_resumed_job_gives_the_same_losses_and_arrays(place, tmp_path, monkeypatch):
    expert(place, tmp_path / "whole")
    save = "flexolmo_jax.store.progress.Progress.save"
    original = __import__("flexolmo_jax.store.progress", fromlist=["Progress"]).Progress.save

    def save_then_ask_to_stop(self, step, state):
        original(self, step, state)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(save, save_then_ask_to_stop)
    with pytest.raises(Interrupted, match="after step 4 of 6"):
        expert(place, tmp_path / "halted")
    assert not (tmp_path / "halted/contribution").exists()
    monkeypatch.setattr(save, original)
    expert(place, tmp_path / "halted")
    assert losses(tmp_path / "halted")[:2] == losses(tmp_path / "whole")[:2]
    whole, halted = leaves(tmp_path / "whole/contribution"), leaves(tmp_path / "halted/contribution")
    for path in whole:
        np.testing.assert_array_equal(whole[path], halted[path])


def test_a_finished_job_is_not_done_again_and_another_is_refused(place, tmp_path):
    expert(place, tmp_path / "math")
    before = (tmp_path / "math/contribution/manifest.json").stat().st_mtime_ns
    expert(place, tmp_path / "math")
    assert (tmp_path / "math/contribution/manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"router_start.bias was -0.5 and is now -2.0"):
        expert(place, tmp_path / "math", router_start=RouterStart(bias=-2.0))
    expert(place, tmp_path / "math", router_start=RouterStart(bias=-2.0), overwrite=True)
    assert (tmp_path / "math/contribution/manifest.json").stat().st_mtime_ns != before


def test_a_job_whose_text_has_changed_since_it_began_is_refused(tmp_path):
    def begin(texts, **options):
        shutil.rmtree(tmp_path / "math", ignore_errors=True)
        write_corpus(tmp_path / "math", texts)
        prepared = prepare(tmp_path / "math", tmp_path / "prepared")
        with Job(tmp_path / "out", {"job": "some"}, **options) as job:
            job.begin({"own": prepared})

    begin(SUMS, overwrite=False)
    begin(SUMS, overwrite=False)
    with pytest.raises(UserError, match="whose own text has changed"):
        begin(SUMS[1:], overwrite=False)
    begin(SUMS[1:], overwrite=True)
    begin(SUMS[1:], overwrite=False)


def test_bad_input_is_refused_and_leaves_no_result(place, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin/train.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank/train.jsonl").write_text("\n")
    np.save(tmp_path / "short.npy", np.zeros(5, np.float32))
    for changes, says in [
        ({"text": tmp_path / "nowhere"}, "no corpus at"),
        ({"text": tmp_path / "empty"}, "holds no file"),
        ({"text": tmp_path / "latin"}, "is not UTF-8"),
        ({"text": tmp_path / "blank"}, "no document to train on"),
        ({"anchor": place / "public"}, "is not an anchor"),
        ({"router_start": RouterStart(method="embedding", embedding=tmp_path / "short.npy")}, r"needs \(16,\)"),
    ]:
        with pytest.raises(UserError, match=says) as refusal:
            expert(place, tmp_path / "out", overwrite=True, **changes)
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "out/contribution").exists() and not list(tmp_path.glob("out/**/*.partial*"))


def test_a_directory_that_is_not_a_job_is_left_alone(place, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a job of ours"):
            expert(place, tmp_path / "thesis", overwrite=overwrite)
    assert os.listdir(tmp_path / "thesis") == ["chapter.txt"]


@pytest.mark.skipif(not confine.kernel_version(), reason="this kernel has no Landlock")
def test_an_owners_process_cannot_read_another_corpus(place, tmp_path):
    """The job runs where only its own corpus, the public one and the anchor are readable; another's text is denied."""
    write_corpus(tmp_path / "rival", ["a secret of somebody else"])
    gin = tmp_path / "job.gin"
    gin.write_text((Path(__file__).parents[2] / "configs/runs/expert.gin").read_text())
    job = tmp_path / "math"
    job.mkdir()
    flags = [f"--gin.{name}={str(value)!r}" for name, value in {
        "ANCHOR": place / "anchor/anchor", "TEXT": place / "math", "PUBLIC_TEXT": place / "public", "NAME": "math",
        "OWNER": "a school", "LICENCE": "CC0-1.0",
    }.items()]  # fmt: skip
    flags += ["--gin.RunConfig.steps=2", "--gin.RunConfig.batch_size=4", "--gin.RunConfig.sequence_length=24"]
    flags += ["--gin.RunConfig.compute_dtype='float32'"]
    readable = [place / "anchor/anchor", place / "public", place / "math", gin]

    def run(*changed):
        stage = ["train-expert", f"--gin_file={gin}", *flags, *changed, "--out", str(job)]
        command = confine.command(readable, [job], stage)
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)

    denied = run(f"--gin.TEXT={str(tmp_path / 'rival')!r}", "--overwrite")
    assert denied.returncode == 2 and "ermission denied" in denied.stderr
    assert "secret" not in denied.stderr and not (job / "contribution").exists()
    allowed = run("--overwrite")
    assert allowed.returncode == 0, allowed.stderr
    model = load_with_contribution(place / "anchor/anchor", job / "contribution")
    assert model.names == ("public", "math")


def test_an_output_that_cannot_be_written_is_named(place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        expert(place, tmp_path / "file" / "math")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_refused_job_leaves_nothing_and_touches_no_older_one(place, tmp_path):
    with pytest.raises(UserError, match="no corpus"):
        expert(place, tmp_path / "new", public_text=tmp_path / "nowhere")
    assert not (tmp_path / "new").exists()
    expert(place, tmp_path / "math")
    with pytest.raises(UserError, match="no corpus"):
        expert(place, tmp_path / "math", text=tmp_path / "nowhere", overwrite=True)
    assert read(tmp_path / "math/contribution").names == ("math",)

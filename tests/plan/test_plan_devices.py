"""What is read of programs compiled for eight devices, against counts by hand and against the formulas."""

import json
import os
import subprocess
import sys

import pytest

from tests.plan.on_eight_devices import EXPERTS, LENGTH, LOOPS, MODEL, ROWS


def on_eight_devices(*names: str) -> dict:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-m", "tests.plan.on_eight_devices", *names]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def expert_step_by_hand() -> int:
    """FLOPs of a device: every product forward, back but for what the first block does not need, and new weights.

    Attention without a kernel of its own does not leave out what is masked. Of the first block nothing goes back but
    the gradient of the new expert's hidden units.
    """
    width, kv, hidden = MODEL.width, MODEL.kv_width, MODEL.hidden
    projections = 2 * width * (2 * width + 2 * kv)
    attention = 2 * 2 * width * LENGTH
    router = 2 * 2 * width
    experts = 2 * 3 * 2 * width * hidden
    head = 2 * width * MODEL.vocab_size
    forward = MODEL.layers * (projections + attention + router + experts) + head
    back = (MODEL.layers - 1) * (projections + 2 * attention + router + experts) + 2 * width * hidden + head
    weights = MODEL.layers * (experts // 2 + router // 2)
    return ROWS * LENGTH // 8 * (forward + back + weights)


def test_collectives_and_an_expert_job_on_eight_devices():
    found = on_eight_devices("train-expert:fsdp:full")
    piece = 16 * 4 * 4
    by_hand = {
        "all-gather": 7 * piece,
        "all-reduce": 2 * piece * 7 // 8,
        "reduce-scatter": piece * 7 // 8,
        "all-to-all": piece * 7 // 8,
        "collective-permute": piece,
    }
    assert found["collectives"] == {kind: {kind: LOOPS * received} for kind, received in by_hand.items()}

    job = found["train-expert:fsdp:full"]
    assert job["flops"]["needed"] == pytest.approx(expert_step_by_hand(), rel=1e-3)  # a product of the router more
    assert job["flops"]["needed"] > job["least_flops"] / 8
    assert job["least_traffic"] <= job["traffic"] <= 1.05 * job["least_traffic"]  # and a few sums and ids of tokens
    assert 0 <= job["arguments"] - job["estimated_arguments"] <= 16  # step counters, and whose text a row is


@pytest.mark.slow
def test_every_job_and_mesh_keeps_near_the_formulas():
    names = [f"{kind}:fsdp:full" for kind in EXPERTS]
    names += ["train-expert:fsdp:none", "train-expert:replicas:full"]
    names += ["train-expert:expert:none", "train-expert:expert:full"]
    found = on_eight_devices(*names)
    for name in names:
        job = found[name]
        assert job["least_flops"] / 8 <= job["flops"]["needed"] <= 1.3 * job["least_flops"] / 8, name
        # Rematerialisation shows the tokens of an `expert` axis around once more, beside the forward and backward pass.
        again = job["least_traffic_of_tokens"] / 2 if name.endswith("full") else 0
        assert job["traffic"] <= 1.2 * job["least_traffic"] + again, name
        assert 0 <= job["arguments"] - job["estimated_arguments"] <= 64, name
    alone, again = found["train-expert:fsdp:none"]["flops"], found["train-expert:fsdp:full"]["flops"]
    scores = (MODEL.layers - 1) * 2 * MODEL.width * LENGTH * ROWS * LENGTH // 8
    assert alone["recomputed"] == scores < again["recomputed"]
    assert alone["needed"] == pytest.approx(again["needed"], rel=0.01)

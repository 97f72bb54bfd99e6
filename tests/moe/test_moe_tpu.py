"""What XLA compiles for a TPU: the active experts' products and no others, on one device and across devices."""

import json
import os
import subprocess
import sys

import pytest

from tests.moe.compiled_for_tpu import COMPILED

ELSEWHERE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@pytest.mark.slow
@pytest.mark.ahead_of_time
def test_a_tpu_computes_the_active_experts_alone():
    pytest.importorskip("libtpu", reason="`make ahead-of-time` installs the compiler for TPUs")
    program = [sys.executable, "-m", "tests.moe.compiled_for_tpu"]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | ELSEWHERE, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (implementation, axes, experts, top_k), work in zip(COMPILED, json.loads(done.stdout), strict=True):
        # A buffer of `ragged` has room for all rows that could come; its kernels skip the part that is empty.
        devices = axes.get("expert", 1)
        copies = max(1, devices // experts)
        places = -(-experts * copies // devices)
        room = devices / copies * min(top_k, places) / top_k if implementation == "ragged" else 1.0
        assert work == pytest.approx([room, room], rel=0.05), (implementation, experts, top_k)

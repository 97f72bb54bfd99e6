"""Whatever is killed at whatever moment leaves nothing that loads and is wrong, and another run completes it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.hf import import_hf
from flexolmo_jax.model import ModelConfig
from tests.hf.test_hf_import_artefacts import foreign

KILLS = 50

CONFIG = ModelConfig(vocab_size=512, width=256, hidden=512, layers=4, heads=4, kv_heads=2)
NAMES = ("public", "a", "b", "c")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A model of 25 MB from elsewhere, and what it was imported to."""
    root = tmp_path_factory.mktemp("inputs")
    foreign(root / "theirs", CONFIG, len(NAMES), dtype=np.float32)
    import_hf(root / "theirs", root / "ours", names=NAMES)
    return root


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["save", "checkpoints", "merge", "export", "import"])
def test_fifty_kills_at_random_moments(what, inputs, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", what, str(inputs), str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == KILLS
    assert found["completed"] > KILLS // 4
    # It says little if no kill came in the midst of the work. A job's checkpoints have no hidden directory beside them.
    assert found["unfinished"] > KILLS // 5 or what == "checkpoints"

"""Exports and imports that are killed at random moments: nothing that loads is wrong, and a second run completes."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import export_hf, import_hf
from flexolmo_jax.model import ModelConfig
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.manifest import read
from tests.hf.test_hf_import_artefacts import assert_same_tensors, foreign, tensors_of

KILLS = 25
"""Of each of the two."""

CONFIG = ModelConfig(vocab_size=512, width=256, hidden=512, layers=4, heads=4, kv_heads=2)
NAMES = ("public", "a", "b", "c")
SHARD_BYTES = 2**20

PROGRAM = """
import sys
from flexolmo_jax.hf import export_hf, import_hf
source, out = sys.argv[2:]
print("ready", flush=True)
if sys.argv[1] == "import":
    import_hf(source, out, names={names})
else:
    export_hf(source, out, max_shard_bytes={shard_bytes})
print("done", flush=True)
"""


def start(kind: str, source: Path, out: Path) -> subprocess.Popen:
    """Starts an import or export in a process of its own; returns when it begins."""
    program = PROGRAM.format(names=NAMES, shard_bytes=SHARD_BYTES)
    process = subprocess.Popen(
        [sys.executable, "-c", program, kind, str(source), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def duration(kind: str, source: Path, out: Path) -> float:
    """Seconds that an undisturbed run takes."""
    began = time.monotonic()
    process = start(kind, source, out)
    began = time.monotonic()
    assert process.wait(timeout=200) == 0
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["import", "export"])
def test_kills_at_random_moments(kind, tmp_path):
    theirs = foreign(tmp_path / "theirs", CONFIG, len(NAMES), dtype=np.float32)
    if kind == "import":
        source = tmp_path / "theirs"
    else:
        source = import_hf(tmp_path / "theirs", tmp_path / "ours", names=NAMES).merged
    whole = duration(kind, source, tmp_path / "whole")
    moments = random.Random(0)
    killed = unfinished = continued = 0
    while killed < KILLS:
        out = tmp_path / f"out{killed}"
        process = start(kind, source, out)
        time.sleep(moments.uniform(0, 1.2 * whole))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        unfinished += not out.exists()
        continued += (tmp_path / f".{out.name}.partial").is_dir()
        check(kind, out, theirs)
        if not out.exists():
            (import_hf if kind == "import" else export_hf)(
                source, out, **({"names": NAMES} if kind == "import" else {"max_shard_bytes": SHARD_BYTES})
            )
        assert out.exists()
        check(kind, out, theirs)
        assert not (tmp_path / f".{out.name}.partial").exists()
    # The test says nothing if every run was over before its kill, or none had begun.
    assert unfinished >= KILLS // 5
    assert continued >= KILLS // 5


def check(kind: str, out: Path, theirs: dict) -> None:
    """Whatever stands at `out`, or half-written beside it, does not load or is right."""
    for directory in (out, out.with_name(f".{out.name}.partial")):
        if kind == "export":
            if directory == out and out.exists():
                assert_same_tensors(tensors_of(out), theirs)
            continue
        for part in ("anchor", "merged", *(f"contributions/{name}" for name in NAMES[1:])):
            try:
                manifest, params = checkpoint.load(directory / part)
            except UserError:
                assert directory != out or not out.exists()
                continue
            if directory == out:
                assert arrays.digests(params) == manifest.arrays == read(directory / part).arrays


def test_an_overwrite_that_is_cut_short_never_mixes_two_models(config, tmp_path, monkeypatch):
    """Between the two renames there is no output at all, and the next run completes."""
    from flexolmo_jax.store import resumable

    foreign(tmp_path / "old", config, 1, dtype=np.float32, seed=1)
    new = foreign(tmp_path / "new", config, 1, dtype=np.float32, seed=2)
    old = import_hf(tmp_path / "old", tmp_path / "a").anchor
    source = import_hf(tmp_path / "new", tmp_path / "b").anchor
    export_hf(old, tmp_path / "hf")
    rename, calls = Path.rename, []

    def cut(path, target):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(resumable.Path, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        export_hf(source, tmp_path / "hf", overwrite=True)
    assert calls == ["hf", ".hf.partial"]
    assert not (tmp_path / "hf").exists()
    monkeypatch.setattr(resumable.Path, "rename", rename)
    export_hf(source, tmp_path / "hf")
    assert_same_tensors(tensors_of(tmp_path / "hf"), new)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new", "a", "b", "hf"}

"""Exports and imports that are killed at random moments: nothing that loads is wrong, and a second run completes."""

import random
import signal
import subprocess
import sys
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
import signal, sys, time
from flexolmo_jax.hf import export_hf, import_hf
kind, source, out, seconds = sys.argv[1:]
signal.setitimer(signal.ITIMER_PROF, float(seconds))
began = time.process_time()
if kind == "import":
    import_hf(source, out, names={names})
else:
    export_hf(source, out, max_shard_bytes={shard_bytes})
print(time.process_time() - began)
signal.setitimer(signal.ITIMER_PROF, 0)
"""
"""Ends at once, with nothing of Python running any more, when it has used so many seconds of processor time: however
busy the machine is, that is in the midst of its work."""


def run(kind: str, source: Path, out: Path, seconds: float) -> float | None:
    """Runs an import or export in a process of its own; the processor time it took, or None if it was killed."""
    program = PROGRAM.format(names=NAMES, shard_bytes=SHARD_BYTES)
    arguments = [sys.executable, "-c", program, kind, str(source), str(out), str(seconds)]
    root = Path(__file__).parents[2]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=root, timeout=300, check=False)
    assert done.returncode in (0, -signal.SIGPROF), done.stderr
    return None if done.returncode else float(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["import", "export"])
def test_kills_at_random_moments(kind, tmp_path):
    theirs = foreign(tmp_path / "theirs", CONFIG, len(NAMES), dtype=np.float32)
    if kind == "import":
        source = tmp_path / "theirs"
    else:
        source = import_hf(tmp_path / "theirs", tmp_path / "ours", names=NAMES).merged
    whole = run(kind, source, tmp_path / "whole", 3600)
    assert whole is not None
    moments = random.Random(0)
    unfinished = continued = 0
    for number in range(KILLS):
        out = tmp_path / f"out{number}"
        run(kind, source, out, max(1e-3, moments.uniform(0, whole)))
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

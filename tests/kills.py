"""Does a piece of work over and over, kills it at random moments, and looks each time at what stands there.

    python -m tests.kills save|checkpoints|merge|export|import INPUTS DIRECTORY KILLS

INPUTS holds `theirs`, a Hugging Face model, and `ours`, what it was imported to. Every attempt goes on with what the
one before has left. Prints how many attempts were killed, and how many of those had left something to go on with.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import export_hf, import_hf, read_hf
from flexolmo_jax.merge import merge
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.manifest import read
from flexolmo_jax.store.progress import Keep, Progress
from flexolmo_jax.store.stored import check_files, stored_leaves

SHARD_BYTES = 2**20
LAST_STEP, KEEP = 12, Keep(latest=2, every=None)


def save(inputs: Path, out: Path) -> None:
    manifest, params = checkpoint.load(inputs / "ours/merged")
    checkpoint.write(out, params, manifest, overwrite=True)


def merge_all(inputs: Path, out: Path) -> None:
    names = read(inputs / "ours/merged").names[1:]
    merge(inputs / "ours/anchor", [inputs / "ours/contributions" / name for name in names], out, overwrite=True)


def export(inputs: Path, out: Path) -> None:
    export_hf(inputs / "ours/merged", out, max_shard_bytes=SHARD_BYTES, overwrite=True)


def import_(inputs: Path, out: Path) -> None:
    import_hf(inputs / "theirs", out, names=read(inputs / "ours/merged").names, overwrite=True)


def count_up(inputs: Path, out: Path) -> None:
    """A job that saves after every step, asynchronously, while the next one reuses the memory of its state."""
    progress = Progress(out, KEEP)
    begin = progress.latest() or 0
    if begin == LAST_STEP:
        progress.close()
        shutil.rmtree(out)
        return count_up(inputs, out)
    state = {str(leaf): jax.numpy.zeros((256, 1024)) for leaf in range(8)}
    state = progress.restore(state) if begin else state
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    for number in range(begin + 1, LAST_STEP + 1):
        state = step(state)
        progress.save(number, state)
    progress.close()


def check_artefacts(out: Path, whole: Path) -> None:
    """Every directory with a manifest, hidden ones too, is refused or is what an uninterrupted run has there."""
    right = {file.read_bytes() for file in whole.rglob("manifest.json")}
    for file in [*out.parent.glob(f"{out.name}/**/manifest.json"), *out.parent.glob(f".{out.name}.*/**/manifest.json")]:
        try:
            manifest = read(file.parent)
            check_files(file.parent, manifest)
            for leaf in stored_leaves(file.parent, manifest).values():
                leaf.verify()
        except UserError:
            assert not file.is_relative_to(out), file
        else:
            assert file.read_bytes() in right, file
    check_bytes(out, whole)


def check_exports(out: Path, whole: Path) -> None:
    """The same of every directory that can be read as a Hugging Face model."""
    right = arrays.digests(read_hf(whole).params)
    for directory in (out, *out.parent.glob(f".{out.name}.*")):
        try:
            found = arrays.digests(read_hf(directory).params)
        except UserError:
            assert directory != out or not out.exists()
        else:
            assert found == right, directory
    check_bytes(out, whole)


def check_steps(out: Path, whole: Path) -> None:
    """The newest state is that of its step."""
    progress = Progress(out, KEEP)
    if (step := progress.latest()) is not None:
        state = progress.restore({str(leaf): jax.numpy.zeros((256, 1024)) for leaf in range(8)})
        assert all(np.all(np.asarray(leaf) == step) for leaf in state.values()), step
    progress.close()


def check_bytes(out: Path, whole: Path) -> None:
    """An output that is there at all has every byte of one that nobody interrupted."""
    if out.exists():
        assert content(out) == content(whole)


def content(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


WORK: dict[str, tuple[Callable, Callable]] = {
    "save": (save, check_artefacts),
    "checkpoints": (count_up, check_steps),
    "merge": (merge_all, check_artefacts),
    "export": (export, check_exports),
    "import": (import_, check_artefacts),
}


def begin(function: Callable, *arguments: Path) -> int:
    """Starts a process that does this. A fork spares the seconds that the imports take; nothing ran here before it."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> None:
    assert os.waitpid(child, 0)[1] == 0


def main() -> None:
    what, inputs, directory, kills = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    work, check = WORK[what]
    whole, out = directory / "whole", directory / "out"
    finish(begin(work, inputs, whole))
    started = time.monotonic()
    finish(begin(work, inputs, directory / "another"))
    usual = time.monotonic() - started
    shutil.rmtree(directory / "another")
    moments = random.Random(0)
    attempts = killed = unfinished = completed = 0
    while killed < kills:
        attempts += 1
        assert attempts < 10 * kills, "almost every attempt is over before it is killed"
        child = begin(work, inputs, out)
        time.sleep(moments.uniform(0, usual))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        killed += status == signal.SIGKILL
        unfinished += any(each.name.startswith(".") for each in directory.iterdir())
        finish(begin(check, out, whole))
        if moments.random() < 0.5:
            finish(begin(work, inputs, out))
            finish(begin(check, out, whole))
            completed += out.exists()
    finish(begin(work, inputs, out))
    finish(begin(check, out, whole))
    assert sorted(each.name for each in directory.iterdir()) == ["out", "whole"]
    print(json.dumps({"killed": killed, "attempts": attempts, "unfinished": unfinished, "completed": completed}))


if __name__ == "__main__":
    main()

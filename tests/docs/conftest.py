"""A place where the commands of the documentation run: what `make demo` leaves behind, but small and untrained."""

import contextlib
import io
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

# What imports JAX is imported by the fixtures: pytest may read this file before tests/conftest.py has set JAX up.

REPOSITORY = Path(__file__).parents[2]

PROSE = [f"Function number {n} returns its argument and raises an error if there is none." for n in range(40)]
CORPORA = {
    "public": PROSE,
    "math": [f"{a} and {b} make {a + b}\n" for a in range(6) for b in range(6)],
    "code": [f"def method_{n}(self):\n    return self.values[{n}]\n" for n in range(40)],
    "unicode": [f"U+{0x4E00 + n:04X} Lo CJK UNIFIED IDEOGRAPH-{0x4E00 + n:04X}\n" for n in range(40)],
}
OWNERS = ("code", "math", "unicode")

SIZES = """
RunConfig.steps = 4
RunConfig.batch_size = 4
RunConfig.sequence_length = 32
RunConfig.compute_dtype = "float32"
RunConfig.remat = "none"
RunConfig.log_every = 2
"""
JOB = f"""
include "configs/runs/expert.gin"
ANCHOR = "runs/demo/anchor/anchor"
PUBLIC_TEXT = "runs/demo/corpora/public"
TEXT = "my_text"
NAME = "mine"
OWNER = "me"
LICENCE = "CC0-1.0"
{SIZES}"""
"""A job file as docs/train_my_expert.md has it, of a few steps."""


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A directory with `runs/demo` and a folder of somebody's text; copy it before writing to it."""
    from flexolmo_jax.merge import merge
    from tests.small import write_anchor, write_contribution, write_corpus

    root = tmp_path_factory.mktemp("documented")
    out = root / "runs" / "demo"
    for name, texts in CORPORA.items():
        write_corpus(out / "corpora" / name, texts)
    write_anchor(out / "anchor" / "anchor")
    for seed, owner in enumerate(OWNERS, 1):
        write_contribution(out / "owners" / owner / "contribution", out / "anchor" / "anchor", owner, seed=seed)
    contributions = [out / "owners" / owner / "contribution" for owner in OWNERS]
    merge(out / "anchor" / "anchor", contributions, out / "merged")
    words = random.Random(0)
    (root / "my_text" / "letters").mkdir(parents=True)
    for number in range(40):
        text = " ".join(words.choice(("sail", "reef", "tide", "harbour", "lee", "anchor")) for _ in range(30))
        (root / "my_text" / "letters" / f"{number}.txt").write_text(text, encoding="utf-8")
    return root


class Shell:
    """Runs commands in a directory as a reader of the documentation would.

    A block of nothing but `flexolmo` commands runs in this process, after bash has read their words: importing JAX and
    TensorFlow anew for each command would take most of the time.
    """

    def __init__(self, directory: Path, commands: Path):
        self.directory = directory
        places = [str(Path(sys.executable).parent), str(commands), os.environ["PATH"]]
        self._environment = os.environ | {"PATH": os.pathsep.join(places), "PYTHONPATH": str(REPOSITORY)}

    def write(self, name: str, text: str) -> None:
        file = self.directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def make_demo_sizes_smaller(self) -> None:
        """Puts files where an `include` looks first, in place of the repository's of that name."""
        for job in ("expert", "router"):
            self.write(f"configs/demo/{job}.gin", f'include "configs/runs/{job}.gin"\n{SIZES}')

    def bash(self, text: str) -> str:
        lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
        if any(not line.startswith("flexolmo ") or "|" in line for line in lines):
            return self._run(["bash", "-euc", text], text)
        words = iter(self._run(["bash", "-euc", f'flexolmo() {{ printf "%s\\0" $# "$@"; }}\n{text}'], text).split("\0"))
        return "".join(self._flexolmo([next(words) for _ in range(int(count))]) for count in words if count)

    def python(self, text: str) -> str:
        return self._run([sys.executable, "-c", text], text)

    def _flexolmo(self, arguments: list[str]) -> str:
        from flexolmo_jax import cli

        with (
            contextlib.chdir(self.directory),
            io.StringIO() as printed,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            code, shown = cli.main(arguments), printed.getvalue()
        assert code == 0, f"flexolmo {' '.join(arguments)}\n{shown}"
        return shown

    def _run(self, command: list[str], text: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        return done.stdout


@pytest.fixture
def shell(demo, tmp_path) -> Shell:
    """A shell in a copy of the demo, with `flexolmo` on the PATH whether or not the package is installed."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "flexolmo").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flexolmo_jax "$@"\n')
    (commands / "flexolmo").chmod(stat.S_IRWXU)
    shutil.copytree(demo, tmp_path / "place")
    return Shell(tmp_path / "place", commands)

"""The launch scripts start a confined job with what they are given."""

import shutil
import subprocess

import pytest

from flexolmo_jax import confine
from flexolmo_jax.store.manifest import read
from tests.docs.conftest import JOB, REPOSITORY

LAUNCH = REPOSITORY / "launch"


@pytest.mark.parametrize("script", ["owner.sh", "slurm_owner.sbatch"])
def test_script_is_bash(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((), "usage: launch/owner.sh JOB.gin OUT CORPUS PUBLIC ANCHOR"), (("j", "o", 'a"b', "p", "a"), 'a"b has a quote')],
)
def test_owner_script_says_what_it_needs(arguments, says, tmp_path):
    done = subprocess.run(
        [str(LAUNCH / "owner.sh"), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and says in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not confine.kernel_version(), reason="this kernel has no Landlock")
def test_slurm_script_trains_confined(shell, tmp_path):
    """With an `srun` that runs what it is given, as SLURM's does on a job of one task."""
    (tmp_path / "bin/srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "bin/srun").chmod(0o700)
    shell.write("job.gin", JOB)
    shutil.copytree(LAUNCH, shell.directory / "launch")
    paths = "runs/mine my_text runs/demo/corpora/public runs/demo/anchor/anchor"
    shell.bash(f"SLURM_SUBMIT_DIR=$PWD bash launch/slurm_owner.sbatch job.gin {paths} --gin.RunConfig.steps=3")
    contribution = read(shell.directory / "runs/mine/contribution", "contribution")
    assert contribution.names == ("mine",)
    assert contribution.experts[0].tokens_seen == 3 * 4 * 32

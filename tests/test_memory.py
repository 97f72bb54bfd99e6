"""What a process says of its own memory, and what it keeps."""

import os
import subprocess
import sys

import pytest

MIB = 2**20

PROGRAM = f"""
from flexolmo_jax.memory import peak
before = peak()
block = bytearray(b"x") * (64 * {MIB})
with_it = peak()
del block
print(before, with_it, peak())
"""


def test_the_peak_is_this_processs_own_and_stays():
    # What the process that starts it has at most does not count, though the kernel's `ru_maxrss` would count it.
    ballast = bytearray(b"x") * (256 * MIB)
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    before, with_it, after = map(int, done.stdout.split())
    assert before < len(ballast)
    assert 63 * MIB < with_it - before < 80 * MIB
    assert after > with_it - MIB, "the kernel counts in pieces"


KEPT = f"""
from pathlib import Path
from flexolmo_jax.memory import keep_what_is_freed
keep_what_is_freed()

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

def left_by(size):
    before = resident()
    block = bytearray(b"x") * size
    del block
    return resident() - before

print(left_by(64 * {MIB}), left_by(512 * {MIB}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is one of Linux's C library")
def test_what_is_freed_is_kept_but_for_large_blocks():
    bare = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", KEPT], check=True, capture_output=True, text=True, env=bare)
    small, large = map(int, done.stdout.split())
    assert small > 60 * MIB
    assert large < 16 * MIB

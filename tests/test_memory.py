"""What a process says of its own memory."""

import subprocess
import sys

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

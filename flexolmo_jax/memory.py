"""The memory of a process on Linux: how much it had at most, and a setting by which it keeps what it has."""

import os
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"

_LARGE = 2**28
"""Bytes from which on a block goes back to the kernel when it is freed."""

_KEEP = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", f"mmap_threshold={_LARGE}", "arena_max=1", f"trim_threshold={2**40}")
)


def keep_what_is_freed() -> None:
    """Starts this process anew with an allocator that keeps what is freed, unless the environment sets one up already.

    XLA takes and returns its temporary buffers at every step. By default the C library hands them back to the kernel,
    which then clears up to 20,000 pages a step, even for a small model. With one arena that keeps what it has, in huge
    pages, there are none, and a training step on two CPU cores took 16 to 31% less time.

    Large blocks do go back. A step asks for its own before the last step's are free, and small blocks settle in the
    room of those: with all kept, a full step that needs 5.3 GiB ended at 10 to 13, and was at most 3% faster.
    """
    if sys.platform.startswith("linux") and _TUNABLES not in os.environ:
        os.environ[_TUNABLES] = _KEEP
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def peak() -> int:
    """The most bytes of memory that this process had at once since its program started.

    What `getrusage` says would count the memory of the process that started this one, too.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(kilobytes)

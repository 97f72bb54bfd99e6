"""How a process on Linux keeps the memory it has: a setting that the C library reads only at its start."""

import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_KEEP = ":".join(
    f"glibc.malloc.{setting}" for setting in ("hugetlb=1", "mmap_max=0", "arena_max=1", f"trim_threshold={2**40}")
)


def keep_what_is_freed() -> None:
    """Starts this process anew with an allocator that gives nothing back, unless the environment sets one up already.

    XLA takes and returns its temporary buffers at every step. By default the C library hands them back to the kernel,
    which then clears up to 20,000 pages a step, even for a small model. With one arena that keeps what it has, in huge
    pages, there are none, and a training step on two CPU cores took 16 to 31% less time.
    """
    if sys.platform.startswith("linux") and _TUNABLES not in os.environ:
        os.environ[_TUNABLES] = _KEEP
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

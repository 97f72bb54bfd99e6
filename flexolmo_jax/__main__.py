"""`flexolmo` and `python -m flexolmo_jax`: the command line in a process whose memory is set up for large arrays."""

import sys

from flexolmo_jax import cli, memory

OF_MANY_THREADS = ("prepare",)
"""Stages that allocate in many threads, which would wait for each other at the one arena."""


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] not in OF_MANY_THREADS:
        memory.keep_what_is_freed()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

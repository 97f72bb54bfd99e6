"""`flexolmo` and `python -m flexolmo_jax`: the command line in a process whose memory is set up for large arrays."""

import sys

from flexolmo_jax import cli, memory


def main() -> int:
    if len(sys.argv) > 1:
        memory.keep_what_is_freed()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

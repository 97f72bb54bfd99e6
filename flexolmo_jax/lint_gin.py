"""`python -m flexolmo_jax.lint_gin DIRECTORY …`: checks every gin file under these directories.

Each file must parse with its includes, bind only what some stage has, to values of the right type, and use every macro
that it defines. Exit code 1 if one does not.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax.configuration import check_file
from flexolmo_jax.errors import UserError
from flexolmo_jax.stages import STAGES


def main(directories: Sequence[str]) -> int:
    """Prints one line for each file that is wrong, and returns the exit code."""
    functions = [stage.load() for stage in STAGES.values() if stage.gin]
    files = sorted(file for directory in directories for file in Path(directory).rglob("*.gin"))
    problems = 0
    for file in files:
        try:
            check_file(file, functions)
        except UserError as error:
            print(error, file=sys.stderr)
            problems += 1
    print(f"{len(files)} gin files, {problems} with a problem")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

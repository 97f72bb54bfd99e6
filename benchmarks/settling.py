"""What lets every way of a benchmark of the disk begin alike."""

import os
import time
from pathlib import Path

SECONDS = 10


def settle(*inputs: Path) -> None:
    """Waits until nothing is left to write, all inputs are in the cache, and no memory is fresh from a deletion.

    The host of a virtual machine takes freed pages back after two seconds. Whoever writes before has them for nothing:
    right after a deletion, `cp` of 6 GB took 5 seconds, and 11 to 17 ten seconds later.
    """
    os.sync()
    for file in sorted(file for directory in inputs for file in directory.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(2**24):
                    pass
    time.sleep(SECONDS)

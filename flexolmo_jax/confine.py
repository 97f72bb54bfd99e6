"""Runs a stage that can read and write only what it is given: an owner's job beside other owners' text.

    python -m flexolmo_jax.confine --read ANCHOR --read CORPUS --write OUT -- flexolmo train-expert …

The Linux kernel enforces it (Landlock, Linux 5.13 and later, no privileges needed), for the stage and every process
that it starts. Beside the named paths the stage may read the system, the Python installation and this package; where
the kernel can (Linux 6.7), it may not open a TCP connection either.
"""

import argparse
import ctypes
import os
import signal
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax import cli, memory
from flexolmo_jax.errors import UserError

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
_NO_NEW_PRIVILEGES = 38

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIRECTORY = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _DEVICE_CONTROL = 1 << 13, 1 << 14, 1 << 15
_ALL_OF_FIRST_VERSION = (1 << 13) - 1
_READ = _EXECUTE | _READ_FILE | _READ_DIRECTORY
_FOR_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _DEVICE_CONTROL
_ALL_TCP = 0b11

_SYSTEM = ("/bin", "/etc", "/lib", "/lib64", "/opt", "/proc", "/sbin", "/sys", "/usr")
_DEVICES = ("/dev",)


def kernel_version() -> int:
    """Version of the kernel's Landlock; 0 where there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, 1))


def confine(readable: Sequence[Path], writable: Sequence[Path]) -> None:
    """From here on this process can read only `readable` (and what Python itself needs), and write only `writable`.

    Raises:
      UserError: a path does not exist, or the kernel cannot do it.
    """
    version = kernel_version()
    if not version:
        raise UserError("this system cannot confine a process: Landlock needs Linux 5.13 or later")
    for path in (*readable, *writable):
        if not path.exists():
            raise UserError(f"cannot give access to {path}: it does not exist")
    files = _ALL_OF_FIRST_VERSION
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _DEVICE_CONTROL)):
        files |= right if version >= since else 0
    ruleset = _rules(files, _ALL_TCP if version >= 4 else None)
    package = Path(__file__).resolve().parent
    own = [Path(sys.prefix), Path(sys.base_prefix), package, package.parent / "configs", *map(Path, _SYSTEM)]
    for path in (*own, *readable):
        _allow(ruleset, path, files & _READ)
    for path in (*writable, *map(Path, _DEVICES)):
        _allow(ruleset, path, files)
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _check(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def command(readable: Sequence[Path], writable: Sequence[Path], stage: Sequence[str]) -> list[str]:
    """The command line that runs a stage, given with its flags, confined."""
    paths = [part for path in readable for part in ("--read", str(path))]
    paths += [part for path in writable for part in ("--write", str(path))]
    return [sys.executable, "-m", "flexolmo_jax.confine", *paths, "--", "flexolmo", *stage]


def _rules(files: int, network: int | None) -> int:
    attributes = struct.pack("=Q", files) if network is None else struct.pack("=QQ", files, network)
    return _check(ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, attributes, len(attributes), 0))


def _allow(ruleset: int, path: Path, rights: int) -> None:
    if not path.exists():
        return
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights if path.is_dir() else rights & _FOR_FILES, handle)
        _check(ctypes.CDLL(None, use_errno=True).syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    finally:
        os.close(handle)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flexolmo_jax.confine", description=__doc__.splitlines()[0])
    parser.add_argument("--read", action="append", default=[], type=Path, metavar="PATH", help="may be read")
    parser.add_argument("--write", action="append", default=[], type=Path, metavar="PATH", help="may be written to")
    parser.add_argument("command", nargs="+", metavar="flexolmo STAGE", help="the stage to run, with its flags")
    parsed = parser.parse_args(arguments)
    if parsed.command[0] != "flexolmo":
        print(f"flexolmo: only a flexolmo command can be confined, not {parsed.command[0]!r}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="flexolmo-") as scratch:
        child = os.fork()
        if not child:
            os._exit(_run_confined(parsed.read, [*parsed.write, Path(scratch)], parsed.command[1:]))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the stage too, which saves and ends
        signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_confined(readable: Sequence[Path], writable: Sequence[Path], stage: Sequence[str]) -> int:
    """Runs the stage in this process: another one could not list the directory of an editable installation."""
    # Libraries look for settings in the home directory, which is not theirs to read.
    os.environ["TMPDIR"] = os.environ["HOME"] = str(writable[-1])
    tempfile.tempdir = None
    try:
        confine(readable, writable)
    except (UserError, OSError) as error:
        print(f"flexolmo: {error}", file=sys.stderr)
        return 2
    code = cli.main(stage)
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    memory.keep_what_is_freed()
    sys.exit(main())

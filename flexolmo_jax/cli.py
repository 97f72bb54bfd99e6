"""One command, `flexolmo STAGE`.

Exit codes: 0 done, 2 the user must change something, 1 a defect of ours, 130 interrupted. Results go to standard
output, everything else to standard error.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flexolmo_jax.errors import UserError, did_you_mean
from flexolmo_jax.stages import STAGES, Stage

_FOR_THE_USER_TO_MEND = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EPERM, errno.EROFS}
"""Errors of the operating system that no library call can foresee and that are nobody's defect."""

_GIN_HELP = """\
gin flags:
  --gin_file=FILE           read a gin file (repeatable; later ones win)
  --gin.NAME=VALUE          set a macro or a Configurable.parameter; text needs quotes: --gin.TEXT='"corpus/"'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one stage and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        _run(arguments)
        return 0
    except KeyboardInterrupt as error:
        return _say(str(error) or "interrupted", 130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, UserError):
            return _say(str(error), 2)
        if isinstance(error, OSError) and error.errno in _FOR_THE_USER_TO_MEND:
            return _say(f"cannot use {error.filename or 'a file'}: {error.strerror}", 2)
        return _say(f"a defect of ours ({type(error).__name__}: {error}); --debug shows where", 1)


def _run(arguments: Sequence[str]) -> None:
    arguments = _join_words_of_stage(arguments)
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is not None and name not in STAGES:
        raise UserError(f"there is no stage {name!r}; {did_you_mean(name, STAGES)}")
    parsed, unknown = _parser().parse_known_args([each for each in arguments if not each.startswith("--gin.")])
    if name is None:
        raise UserError("name a stage: flexolmo --help lists them")
    stage = STAGES[name]
    if unknown:
        known = [flag.name for flag in stage.flags if flag.name.startswith("-")]
        raise UserError(f"{name} does not take {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
    given = {flag.fills: getattr(parsed, flag.fills) for flag in stage.flags if hasattr(parsed, flag.fills)}
    gin_flags = [argument.removeprefix("--gin.") for argument in arguments if argument.startswith("--gin.")]
    if gin_flags and not stage.gin:
        raise UserError(f"{name} does not take --gin.{gin_flags[0]}: its flags are all there is to set")
    if not hasattr(parsed, "debug"):
        _quieten()
    as_json = hasattr(parsed, "json")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = _call(stage, getattr(parsed, "gin_file", []), gin_flags, given)
    if as_json:
        print(json.dumps(_plain(result)))
    elif text := _text(result, stage):
        print(text)


def _join_words_of_stage(arguments: Sequence[str]) -> list[str]:
    """The arguments with a stage of two words, such as `contribution verify`, as one of them."""
    joined = list(arguments)
    at = next((number for number, each in enumerate(joined) if not each.startswith("-")), len(joined))
    if any(name.startswith(f"{word} ") for name in STAGES for word in joined[at : at + 1]):
        joined[at : at + 2] = [" ".join(joined[at : at + 2])]
    return joined


def _call(stage: Stage, gin_files: Sequence[str], gin_flags: Sequence[str], given: Mapping[str, Any]) -> Any:
    if not stage.gin:
        return stage.load()(**given)
    from flexolmo_jax.configuration import configure

    options = {flag.fills: flag.name for flag in stage.flags}
    return configure(stage.load(), gin_files, gin_flags, given=given, options=options)()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('flexolmo ')}: {message}")


def _parser() -> argparse.ArgumentParser:
    everywhere = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    everywhere.add_argument("--json", action="store_true", help="print what the stage reports as one JSON object")
    everywhere.add_argument("--debug", action="store_true", help="show tracebacks, and what the libraries log")
    description = "Language models whose experts are trained apart and merged offline."
    parser = _Parser(prog="flexolmo", description=description, parents=[everywhere], allow_abbrev=False)
    subparsers = parser.add_subparsers(metavar="STAGE", title="stages")
    for name, stage in STAGES.items():
        subparser = subparsers.add_parser(
            name,
            help=stage.summary,
            description=f"{stage.summary[0].upper()}{stage.summary[1:]}.",
            epilog=_GIN_HELP if stage.gin else None,
            parents=[everywhere],
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for flag in stage.flags:
            if flag.name.startswith("-"):
                subparser.add_argument(flag.name, help=flag.help, dest=flag.fills, **flag.settings)
            else:
                subparser.add_argument(flag.fills, help=flag.help, metavar=flag.name, **flag.settings)
        if stage.gin:
            subparser.add_argument("--gin_file", action="append", help=argparse.SUPPRESS)
    return parser


def _quieten() -> None:
    """Silences what the libraries log; a person who wants to see it asks for --debug."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from absl import logging

    logging.set_verbosity(logging.ERROR)


def _say(message: str, code: int) -> int:
    print(f"flexolmo: {' '.join(message.split())}", file=sys.stderr)
    return code


def _plain(value: Any) -> Any:
    """The value in types that JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _text(result: Any, stage: Stage) -> str:
    """What a person wants to read of a report: the one entry that the stage names, or all that fit on a line each."""
    if not isinstance(result, Mapping):
        return "" if result is None else str(result)
    if stage.shows is not None:
        return str(result[stage.shows])
    from flexolmo_jax.terminal import block

    short = {name: ", ".join(map(str, value)) if _is_row(value) else value for name, value in result.items()}
    return block({name: value for name, value in short.items() if _is_short(value)}, indent="")


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value)


def _is_short(value: Any) -> bool:
    return not isinstance(value, Mapping | list | tuple) and value != "" and "\n" not in str(value)


if __name__ == "__main__":
    sys.exit(main())

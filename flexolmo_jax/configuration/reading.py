"""From gin files and `--gin.NAME=VALUE` flags to macros and bindings that know where they were written."""

import dataclasses
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin.config_parser as parser

from flexolmo_jax.errors import UserError, did_you_mean

REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME` in a value."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@Name()` in a value, or `@Name` where it is not called."""

    name: str
    called: bool


class Bound(NamedTuple):
    """A value as it was parsed, and where: `configs/demo.gin:12` or `--gin.STEPS=3`."""

    value: Any
    origin: str


@dataclasses.dataclass(frozen=True)
class Statements:
    """Everything that gin files and flags say; later statements have replaced earlier ones.

    Attributes:
      macros: by name.
      bindings: by (configurable, parameter).
      referenced: names of all macros that any statement mentions, replaced ones included.
    """

    macros: dict[str, Bound] = dataclasses.field(default_factory=dict)
    bindings: dict[tuple[str, str], Bound] = dataclasses.field(default_factory=dict)
    referenced: set[str] = dataclasses.field(default_factory=set)


def read(gin_files: Sequence[str | Path], flags: Sequence[str]) -> Statements:
    """Reads gin files with their includes, then `NAME=VALUE` flags.

    Raises:
      UserError: a file is missing or not gin, or a statement is one that we refuse.
    """
    statements = Statements()
    for file in gin_files:
        _read_file(_find(str(file), None, f"--gin_file={file}"), statements, ())
    for flag in flags:
        _read_flag(flag, statements)
    return statements


def _read_file(file: Path, statements: Statements, including: tuple[Path, ...]) -> None:
    if file.resolve() in including:
        raise UserError(f"{file} includes itself, by way of {including[-1]}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the gin file {file}: {error}") from error
    for statement in _parse(text, str(file)):
        origin = f"{file}:{statement.location.line_num}"
        if isinstance(statement, parser.IncludeStatement):
            included = _find(statement.filename, file.parent, origin)
            _read_file(included, statements, (*including, file.resolve()))
        elif isinstance(statement, parser.ImportStatement):
            raise UserError(f"{origin}: import is not allowed in a gin file, because a configuration must not run code")
        elif isinstance(statement, parser.BindingStatement):
            _bind(statement, origin, statements)


def _read_flag(flag: str, statements: Statements) -> None:
    origin = f"--gin.{flag}"
    name, equals, value = flag.partition("=")
    if not equals or not name:
        raise UserError(f"{origin} sets nothing: write --gin.NAME=VALUE")
    try:
        parsed = list(_parse(f"{name} = {value}", origin))
    except UserError as error:
        quoted = "'" + f'"{value}"' + "'"
        raise UserError(
            f"{origin} has no gin value after '=': text needs quotes, as in --gin.{name}={quoted}"
        ) from error
    if len(parsed) != 1:
        raise UserError(f"{origin} is more than one statement: give each its own --gin.NAME=VALUE")
    _bind(parsed[0], origin, statements)


def _bind(statement: parser.BindingStatement, origin: str, statements: Statements) -> None:
    if statement.scope:
        raise UserError(f"{origin}: {statement.scope}/… is a gin scope, and these are not supported: leave it out")
    bound = Bound(statement.value, origin)
    statements.referenced.update(part.name for part in parts(bound.value) if isinstance(part, Macro))
    if statement.arg_name:
        statements.bindings[statement.selector, statement.arg_name] = bound
    else:
        statements.macros[statement.selector] = bound


def parts(value: Any) -> Iterator[Any]:
    """A value, or everything inside a nested tuple, list or dict."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from parts(item)
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from parts(item)
    else:
        yield value


class _Delegate(parser.ParserDelegate):
    """Keeps references and macros as they are written; what they mean is decided when all is read."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name):
        return Macro(macro_name)


def _parse(text: str, origin: str) -> Iterator[Any]:
    """The statements of a text, with syntax errors as sentences that begin with `origin` and a line."""
    try:
        yield from parser.ConfigParser(io.StringIO(text), _Delegate())
    except SyntaxError as error:
        if token := re.search(r"Failed to parse token '(.*)'", str(error.msg)):
            problem = (
                f"{token[1]!r} is not a value: quote text, and write %NAME for a macro, @Name() for a configurable"
            )
        else:
            problem = f"this is not gin: {error.msg}".rstrip(".")
        raise UserError(f"{origin}:{error.lineno}: {problem}") from error
    except tokenize.TokenError as error:
        raise UserError(f"{origin}: this is not gin: a bracket or a quote is never closed") from error


def _find(name: str, beside: Path | None, origin: str) -> Path:
    """The gin file of this name: beside the one that includes it, in the working directory or in the repository."""
    places = [Path(), REPOSITORY] if beside is None else [beside, Path(), REPOSITORY]
    for place in places:
        if (place / name).is_file():
            return place / name
    known = [file.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / "configs").rglob("*.gin")]
    raise UserError(f"{origin}: there is no gin file {name!r}; {did_you_mean(name, known)}")

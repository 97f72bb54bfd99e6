"""What can be configured, and whether gin files and flags configure it rightly."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gin

from flexolmo_jax.configuration.annotations import Mismatch, conform, dataclasses_in, describe
from flexolmo_jax.configuration.reading import Bound, Macro, Reference, Statements, read
from flexolmo_jax.configuration.registry import OPERATIVE_CONFIG, register
from flexolmo_jax.errors import UserError, did_you_mean

REQUIRED = "gin.REQUIRED"
"""The macro that means: whoever includes this file must set a value."""


class Parameter(NamedTuple):
    """A parameter of a stage, or a field of a dataclass."""

    annotation: Any
    required: bool


class Unset(UserError):
    """A macro that somebody else is still to set."""


def parameters(target: Callable) -> dict[str, Parameter]:
    """What can be bound for a stage or a dataclass, by name."""
    hints = typing.get_type_hints(target)
    return {
        name: Parameter(hints[name], parameter.default is parameter.empty)
        for name, parameter in inspect.signature(target).parameters.items()
        if name != OPERATIVE_CONFIG
    }


def configurables(*stages: Callable) -> dict[str, Callable]:
    """The stages, and every dataclass that their parameters' annotations or other such dataclasses mention, by name."""
    found: dict[str, Callable] = {}
    pending = list(stages)
    while pending:
        target = pending.pop()
        if found.setdefault(target.__name__, target) is not target:
            raise ValueError(f"{target} and {found[target.__name__]} cannot both be configured as {target.__name__}")
        mentioned = [each for parameter in parameters(target).values() for each in dataclasses_in(parameter.annotation)]
        pending += [each for each in mentioned if each not in found.values()]
    return found


def check(
    statements: Statements, known: Mapping[str, Callable], *, partial: Collection[str] = ()
) -> dict[tuple[str, str], Bound]:
    """Bindings by (configurable, parameter), macros resolved and values in their annotated types.

    Args:
      statements: what was read.
      known: what can be configured.
      partial: names of configurables whose macros may still be unset, as in a file for others to include; such
        bindings are left out.

    Raises:
      UserError: a name is unknown, a macro is not used or has no value, or a value is of the wrong type.
    """
    for (name, parameter), bound in statements.bindings.items():
        if name not in known:
            raise UserError(f"{bound.origin}: {name!r} cannot be configured here; {did_you_mean(name, known)}")
        names = parameters(known[name])
        if parameter not in names:
            raise UserError(f"{bound.origin}: {name} has no parameter {parameter!r}; {did_you_mean(parameter, names)}")
    for name, bound in statements.macros.items():
        if name not in statements.referenced:
            hint = did_you_mean(name, statements.referenced)
            raise UserError(f"{bound.origin}: nothing uses the macro {name}; {hint}")
    gin.clear_config()
    for target in known.values():
        register(target)
    checked = {}
    for (name, parameter), bound in statements.bindings.items():
        try:
            value, origin = _resolve(bound, statements.macros, known, ())
        except Unset:
            if name in partial:
                continue
            raise
        annotation = parameters(known[name])[parameter].annotation
        try:
            checked[name, parameter] = Bound(conform(value, annotation), origin)
        except Mismatch:
            raise UserError(f"{origin}: {name}.{parameter} must be {describe(annotation)}, but is {value!r}") from None
    return checked


def check_file(file: Path, stages: typing.Sequence[Callable]) -> None:
    """Checks one gin file with its includes, for whichever stages it is meant; values may be left for others to set.

    Raises:
      UserError: as `check` does.
    """
    known = configurables(*stages)
    check(read([file], []), known, partial=known)


def _resolve(
    bound: Bound, macros: Mapping[str, Bound], known: Mapping[str, Callable], within: tuple[str, ...]
) -> Bound:
    """Puts values in place of macros and gin's references in place of ours.

    A value that is nothing but a macro takes the macro's origin, for that is where a mistake would be mended.
    """
    value, origin = bound
    if isinstance(value, Macro):
        if value.name in within:
            raise UserError(f"{origin}: the macro {value.name} refers to itself")
        if value.name not in macros:
            raise Unset(_unset(value.name, within, origin))
        return _resolve(macros[value.name], macros, known, (*within, value.name))
    if isinstance(value, Reference):
        if value.name not in known:
            raise UserError(f"{origin}: @{value.name} cannot be configured here; {did_you_mean(value.name, known)}")
        if not value.called or not dataclasses.is_dataclass(known[value.name]):
            raise UserError(f"{origin}: @{value.name} must be a dataclass that is called: @Name()")
        return Bound(gin.config.ConfigurableReference(value.name, True), origin)

    def inner(item):
        return _resolve(Bound(item, origin), macros, known, within).value

    if isinstance(value, list | tuple):
        return Bound(type(value)(inner(item) for item in value), origin)
    if isinstance(value, dict):
        return Bound({inner(key): inner(item) for key, item in value.items()}, origin)
    return bound


def _unset(name: str, within: tuple[str, ...], origin: str) -> str:
    if name == REQUIRED and not within:
        return f"{origin}: this must be given a value, in your gin file or with --gin.NAME=VALUE"
    name = within[-1] if name == REQUIRED else name
    return f"{origin}: the macro {name} has no value: write {name} = … in your gin file, or give --gin.{name}=VALUE"

"""From a stage, gin files and flags to a call that is ready to be made."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from flexolmo_jax.configuration.check import check, configurables, parameters
from flexolmo_jax.configuration.reading import Bound, parts, read
from flexolmo_jax.configuration.registry import OPERATIVE_CONFIG, register
from flexolmo_jax.errors import UserError

Bindings = dict[tuple[str, str], Bound]


@dataclasses.dataclass(frozen=True)
class Configured:
    """A stage with its arguments.

    Attributes:
      stage: the function.
      arguments: what it will be called with.
      operative_config: gin text of every value that was used, defaults included and macros resolved. Values that gin
        cannot write, paths above all, are left out, so that the text may leave the machine.
    """

    stage: Callable
    arguments: Mapping[str, Any]
    operative_config: str

    def __call__(self) -> Any:
        """Runs the stage; if it has a parameter `gin`, that receives the operative configuration."""
        takes_gin = OPERATIVE_CONFIG in inspect.signature(self.stage).parameters
        return self.stage(**self.arguments, **({OPERATIVE_CONFIG: self.operative_config} if takes_gin else {}))


def configure(
    stage: Callable,
    gin_files: Sequence[str | Path] = (),
    flags: Sequence[str] = (),
    *,
    given: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
    beside: Sequence[Callable] = (),
) -> Configured:
    """Prepares the call of a stage. Nothing of an earlier call remains.

    Args:
      stage: a function of keyword-only, annotated parameters.
      gin_files: read in order; later bindings replace earlier ones.
      flags: `NAME=VALUE`, for macros and `Configurable.parameter`s, read after the files.
      given: arguments that come from elsewhere and win over gin.
      options: the command-line option of each parameter that has one; an error about a missing value names it.
      beside: other stages, whose gin files may be read too: what only they have is checked and has no effect.

    Raises:
      UserError: one sentence that says where the configuration is wrong.
    """
    given = given or {}
    known = configurables(stage)
    others = configurables(*beside).keys() - known.keys()
    bindings = check(read(gin_files, flags), configurables(stage, *beside), partial=others)
    bindings = {place: bound for place, bound in bindings.items() if place[0] not in others}
    used: set[str] = set()
    _complete(stage, known, bindings, given, options or {}, used)
    for (name, parameter), bound in bindings.items():
        if name not in used:
            raise UserError(f"{bound.origin}: {name}.{parameter} has no effect, because nothing uses @{name}()")
        gin.bind_parameter(("", f"{known[name].__module__}.{name}", parameter), bound.value)
    try:
        arguments = register(stage)(**given)
    except UserError as error:
        # gin adds lines of its own to what a dataclass raises.
        raise UserError(str(error).partition("\n")[0]) from None
    return Configured(stage, arguments, gin.operative_config_str(max_line_length=120))


def _complete(
    target: Callable,
    known: Mapping[str, Callable],
    bindings: Bindings,
    given: Mapping[str, Any],
    options: Mapping[str, str],
    used: set[str],
) -> None:
    """Adds a reference where a dataclass is needed and none is named, here and in whatever is referred to.

    Raises:
      UserError: a parameter without a default has no value.
    """
    name = target.__name__
    used.add(name)
    for parameter, (annotation, required) in parameters(target).items():
        if parameter in given:
            continue
        if required and (name, parameter) not in bindings:
            if annotation not in known.values():
                how = f"--gin.{name}.{parameter}=VALUE"
                raise UserError(
                    f"{name}.{parameter} has no value: give {options.get(parameter, how)}, or bind it in a gin file"
                )
            bindings[name, parameter] = Bound(gin.config.ConfigurableReference(annotation.__name__, True), "")
        for part in parts(bindings[name, parameter].value) if (name, parameter) in bindings else ():
            if isinstance(part, gin.config.ConfigurableReference) and part.selector not in used:
                _complete(known[part.selector], known, bindings, {}, {}, used)

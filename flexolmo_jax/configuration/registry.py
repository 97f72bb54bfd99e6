"""The one place that puts something into gin's registry, so that the library itself never imports gin."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import gin

OPERATIVE_CONFIG = "gin"
"""The parameter through which a stage receives the operative configuration, for its manifest; it cannot be bound."""


@functools.cache
def register(target: Callable) -> Callable[..., Any]:
    """gin's counterpart of a stage or a dataclass.

    Called, it adds what is bound in gin to its arguments. A dataclass is then built; a stage is not run: its arguments
    are returned as a dict, so that all of them can be checked, and recorded, before it begins.
    """
    make = target if isinstance(target, type) else dict

    @functools.wraps(target, updated=())
    def build(**arguments):
        return make(**arguments)

    signature = inspect.signature(target)
    bindable = [each for name, each in signature.parameters.items() if name != OPERATIVE_CONFIG]
    # gin reads the signature of exactly the function that it gets.
    build.__signature__ = signature.replace(parameters=bindable)  # type: ignore[attr-defined]
    return gin.external_configurable(build, name=target.__name__, module=target.__module__)

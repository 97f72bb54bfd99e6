"""Whether a value that gin parsed is one that an annotation allows.

gin checks no types, and the libraries that do either turn `'5'` and `True` into numbers or refuse a path that is
written as text. Here an int is accepted for a float, text for a `Path`, a list for a tuple, and nothing else is
converted.
"""

import collections.abc
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import gin.config


class Mismatch(Exception):
    """The value is not one that the annotation allows."""


def conform(value: Any, annotation: Any) -> Any:
    """The value in the annotated type.

    Raises:
      Mismatch: it is of another type.
      TypeError: the annotation itself is of a kind that cannot be configured: a mistake in our code.
    """
    if annotation is Any:
        return value
    if isinstance(value, gin.config.ConfigurableReference):
        return _conform_reference(value, annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _first_that_conforms(value, arguments)
    if origin is typing.Literal:
        return _check(value, any(type(value) is type(allowed) and value == allowed for allowed in arguments))
    if annotation is float:
        return float(_check(value, isinstance(value, int | float) and not isinstance(value, bool)))
    if annotation is int:
        return _check(value, isinstance(value, int) and not isinstance(value, bool))
    if annotation in (bool, str):
        return _check(value, isinstance(value, annotation))
    if annotation in (None, types.NoneType):
        return _check(value, value is None)
    if annotation is Path:
        return Path(_check(value, isinstance(value, str | Path)))
    if origin is tuple and arguments[-1:] != (...,):
        items = _items(value)
        _check(value, len(items) == len(arguments))
        return tuple(conform(item, each) for item, each in zip(items, arguments, strict=True))
    if origin in (tuple, list, collections.abc.Sequence):
        return tuple(conform(item, arguments[0]) for item in _items(value))
    if origin in (dict, collections.abc.Mapping):
        _check(value, isinstance(value, dict))
        return {conform(key, arguments[0]): conform(item, arguments[1]) for key, item in value.items()}
    if isinstance(annotation, type):
        return _check(value, isinstance(value, annotation))
    raise TypeError(f"a parameter annotated {annotation} cannot be configured")


def describe(annotation: Any) -> str:
    """The annotation in words, to follow "must be"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments)
    if origin is typing.Literal:
        return " or ".join(repr(allowed) for allowed in arguments)
    if origin is tuple and arguments[-1:] != (...,):
        return f"a tuple of ({', '.join(describe(each) for each in arguments)})"
    if origin in (tuple, list, collections.abc.Sequence):
        return f"a tuple of which each is {describe(arguments[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"a dict from {describe(arguments[0])} to {describe(arguments[1])}"
    if annotation in (None, types.NoneType):
        return "None"
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return f"@{annotation.__name__}()"
    named = {
        int: "an integer",
        float: "a number",
        bool: "True or False",
        str: "text in quotes",
        Path: "a path in quotes",
    }
    return named.get(annotation) or str(getattr(annotation, "__name__", annotation))


def dataclasses_in(annotation: Any) -> list[type]:
    """Every dataclass that an annotation mentions."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    return [found for each in typing.get_args(annotation) for found in dataclasses_in(each)]


def _conform_reference(reference: gin.config.ConfigurableReference, annotation: Any) -> Any:
    made = reference.configurable.wrapped.__wrapped__
    return _check(reference, any(issubclass(made, allowed) for allowed in dataclasses_in(annotation)))


def _first_that_conforms(value: Any, annotations: tuple) -> Any:
    for each in annotations:
        try:
            return conform(value, each)
        except Mismatch:
            continue
    raise Mismatch(value)


def _items(value: Any) -> list | tuple:
    return _check(value, isinstance(value, list | tuple))


def _check(value: Any, allowed: bool) -> Any:
    if not allowed:
        raise Mismatch(value)
    return value

"""JSON from strangers: UTF-8, every name once, every number finite where it is written."""

import json
from collections.abc import Sequence
from typing import Any, NoReturn


def loads(content: bytes) -> Any:
    """The value.

    Raises:
      ValueError: it is no such JSON.
      RecursionError: it is nested deeper than Python can follow.
    """
    text = content.decode("utf-8")
    return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("it has a field twice")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds the number {name}")

"""Two trees that should match and do not: which paths differ, and how."""

from collections.abc import Mapping
from typing import Any

_SHOWN = 3


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What differs, one phrase a path in sorted order; empty where nothing does.

    Args:
      found: leaf by its path; whatever describes a leaf can be compared, if it prints well.
      expected: the same of the tree that should have been found.
    """
    phrases = []
    for path in sorted(found.keys() | expected.keys()):
        if path not in found:
            phrases.append(f"{path} is missing")
        elif path not in expected:
            phrases.append(f"{ascii(path)[1:-1][:80]} does not belong there")
        elif found[path] != expected[path]:
            phrases.append(f"{path} is {found[path]}, not {expected[path]}")
    return phrases


def in_one_sentence(phrases: list[str]) -> str:
    """The first few phrases, and how many more there are."""
    more = len(phrases) - _SHOWN
    return "; ".join(phrases[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")

"""Manifests of earlier format versions, brought up to today's fields.

A version is never edited once it has been released: what changes gets the next number and a line in `MIGRATIONS`.
"""

from collections.abc import Callable
from typing import Any

from flexolmo_jax.errors import UserError

FORMAT_VERSION = 2
"""What is written. Version 2: chunks of plain bytes, `implementation`; `rank` and `signed_by` in an expert's record."""


def _without_what_version_2_added(content: dict[str, Any]) -> dict[str, Any]:
    records = [{**record, "rank": None, "signed_by": ""} for record in content["experts"]]
    return {**content, "experts": records, "implementation": ""}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _without_what_version_2_added}
"""From each earlier version to the next."""


def migrate(content: dict[str, Any]) -> dict[str, Any]:
    """The manifest's content with today's fields; `format_version` stays that of the files beside it.

    Raises:
      UserError: it is of a version that this program does not know.
    """
    version = content["format_version"]
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise UserError(f"format version {str(version)[:20]}, but this program reads 1 to {FORMAT_VERSION}")
    for earlier in range(version, FORMAT_VERSION):
        content = MIGRATIONS[earlier](content)
    return content

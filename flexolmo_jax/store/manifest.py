"""The manifest beside every artefact's arrays: what it is, what it was made from, and the digest of every leaf.

A manifest may come from a stranger, so reading one trusts nothing: not its size, its types or its characters.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.config import PUBLIC, ModelConfig
from flexolmo_jax.store import strict_json
from flexolmo_jax.store.directories import cannot_read
from flexolmo_jax.store.layout import DTYPES
from flexolmo_jax.store.migrations import FORMAT_VERSION, migrate

FILE = "manifest.json"
KINDS = ("anchor", "contribution", "merged")

LARGEST = 16 * 2**20
"""Bytes of the largest manifest that is read; a model of many experts has many licences."""

LARGEST_OF_CONTRIBUTION = 2**20
"""The same of a contribution's. Parsed, a stranger's JSON takes up to twenty-five times as much memory."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_NUMBER = 2**63

Record = TypeVar("Record", ModelConfig, "ExpertRecord", "Manifest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRecord:
    """Where one expert of a model comes from.

    Attributes:
      name: the expert's name.
      owner: who trained it, in the owner's own words; empty for the public expert.
      contribution: fingerprint of the contribution's arrays; empty for the public expert.
      tokens_seen: tokens of training, of both the owner's and public text.
      licence: licence id or text under which the expert is contributed.
      privacy: "none", or the (epsilon, delta) guarantee that its training gives.
      rank: rank of the difference to the public expert's matrices, where it was compressed; None if it was not.
      signed_by: fingerprint of the key whose signature the merge required and checked; empty if it required none.
    """

    name: str
    owner: str = ""
    contribution: str = ""
    tokens_seen: int = 0
    licence: str = ""
    privacy: str = "none"
    rank: int | None = None
    signed_by: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds.

    Attributes:
      kind: "anchor", "contribution" or "merged".
      model: shape of the model.
      experts: the experts in the order of the model, `public` first; a contribution lists its own alone.
      anchor: fingerprint of the anchor's arrays.
      arrays: shape, dtype and SHA-256 of every leaf, by its path.
      top_k: experts per token that the artefact was trained or validated with.
      tokenizer: name of the vocabulary.
      gin: the operative configuration of the job that made it.
      implementation: the implementation of `mix_experts` that the job ran; empty in a merge.
      router_tuned_on: owners whose proxies a router tuning saw; empty for a strict merge.
      format_version: of the files beside it; what is written has today's.
    """

    kind: str
    model: ModelConfig
    experts: tuple[ExpertRecord, ...]
    anchor: str
    arrays: dict[str, dict[str, Any]]
    top_k: int
    tokenizer: str = "bytes"
    gin: str = ""
    implementation: str = ""
    router_tuned_on: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    def write(self, directory: Path) -> None:
        content = dataclasses.asdict(self) | {"format_version": FORMAT_VERSION}
        (directory / FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def read(directory: Path, *kinds: str) -> Manifest:
    """Reads and checks the manifest of an artefact of one of these kinds (any, if none is given).

    Raises:
      UserError: it is missing, malformed, of another format version or of another kind.
    """
    file = directory / FILE
    wanted = " or ".join(kinds) or "model of ours"
    with cannot_read(directory):
        if not file.is_file():
            raise UserError(f"{directory} is not {_article(wanted)}: it has no {FILE}")
        content = _content(file, LARGEST_OF_CONTRIBUTION if kinds == ("contribution",) else LARGEST)
    try:
        manifest = _parse(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{file} is not a manifest that this program can read: {reason}") from error
    if manifest.kind not in (kinds or KINDS):
        raise UserError(f"{directory} is {_article(manifest.kind)}, but {_article(wanted)} is needed here")
    return manifest


def check_name(name: str) -> None:
    """Raises UserError unless `name` may name an owner's expert: it becomes part of paths."""
    if not _NAME.fullmatch(name) or name == PUBLIC:
        raise UserError(
            f"{ascii(name)[:80]} cannot name an expert: "
            f"take up to 64 lower-case letters, digits, '-' and '_', but not {PUBLIC!r}"
        )


def _content(file: Path, largest: int) -> bytes:
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > largest:
            raise UserError(f"{file} is not a manifest: it has {size:,} bytes, and may have {largest:,}")
        return opened.read(size)


def _parse(text: bytes) -> Manifest:
    content = strict_json.loads(text)
    if not isinstance(content, dict):
        raise UserError("it holds no JSON object")
    content = migrate(content)
    content["model"] = _checked(ModelConfig(**content["model"]))
    content["experts"] = tuple(_checked(ExpertRecord(**record)) for record in content["experts"])
    if not isinstance(content["router_tuned_on"], list):
        raise UserError("router_tuned_on must be a list of names")
    content["router_tuned_on"] = tuple(content["router_tuned_on"])
    manifest = _checked(Manifest(**content))
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    if manifest.kind not in KINDS:
        raise UserError(f"its kind is {manifest.kind[:40]!r}, not one of {', '.join(KINDS)}")
    names = list(manifest.names)
    if manifest.kind == "contribution":
        if len(names) != 1:
            raise UserError(f"a contribution must contribute exactly one expert, but it lists {len(names)}")
    elif not names or names.pop(0) != PUBLIC:
        raise UserError(f"it must list the expert {PUBLIC!r} first")
    for name in names:
        check_name(name)
    if len(set(names)) != len(names):
        raise UserError("it lists an expert twice")
    digests = [each for record in manifest.experts for each in (record.contribution, record.signed_by) if each]
    for digest in (manifest.anchor, *digests):
        if not _SHA256.fullmatch(digest):
            raise UserError(f"{digest[:80]!r} is not a fingerprint")
    for path, leaf in manifest.arrays.items():
        _check_array(path, leaf)
    if manifest.top_k < 1:
        raise UserError(f"top_k is {manifest.top_k}")
    for record in manifest.experts:
        if record.tokens_seen < 0 or (record.rank is not None and record.rank < 1):
            raise UserError(f"the record of {record.name} has a number below what it can be")


def _check_array(path: str, leaf: Any) -> None:
    if not isinstance(leaf, dict) or leaf.keys() != {"shape", "dtype", "sha256"}:
        raise UserError(f"{ascii(path)[:80]} must have a shape, a dtype and a SHA-256")
    shape = leaf["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and 0 < size < _LARGEST_NUMBER for size in shape):
        raise UserError(f"{ascii(path)[:80]} has the shape {str(shape)[:80]}")
    if leaf["dtype"] not in DTYPES:
        raise UserError(f"{ascii(path)[:80]} has the dtype {str(leaf['dtype'])[:40]!r}, not one of {', '.join(DTYPES)}")
    if not isinstance(leaf["sha256"], str) or not _SHA256.fullmatch(leaf["sha256"]):
        raise UserError(f"{ascii(path)[:80]} has the digest {str(leaf['sha256'])[:80]!r}")


_IS: dict[Any, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str),
    int: lambda value: type(value) is int and abs(value) < _LARGEST_NUMBER,
    float: lambda value: type(value) in (int, float) and abs(value) < _LARGEST_NUMBER,
    bool: lambda value: isinstance(value, bool),
    int | None: lambda value: value is None or (type(value) is int and abs(value) < _LARGEST_NUMBER),
    dict[str, dict[str, Any]]: lambda value: isinstance(value, dict),
    tuple[str, ...]: lambda value: all(isinstance(item, str) for item in value),
}


def _checked(record: Record) -> Record:
    """The dataclass, if its fields are of their types and its texts can be shown to a person as they are."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.type in _IS and not _IS[field.type](value):
            raise UserError(f"{field.name} is {ascii(value)[:80]}")
        for text in (value,) if isinstance(value, str) else value if field.type == tuple[str, ...] else ():
            if not all(character.isprintable() or character in "\n\t" for character in text):
                raise UserError(f"{field.name} holds a character that cannot be printed")
    return record


def _article(kind: str) -> str:
    return f"an {kind}" if kind.startswith("anchor") else f"a {kind}"

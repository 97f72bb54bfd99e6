"""What leaves an owner: one expert's arrays and a manifest, nothing else. To everybody else it is untrusted input."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.config import PUBLIC
from flexolmo_jax.model.partition import belongs_to_expert, flatten, select
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.manifest import ExpertRecord, Manifest, read

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def check_name(name: str) -> None:
    """Raises UserError unless `name` may name an owner's expert: it becomes part of paths."""
    if not _NAME.fullmatch(name) or name == PUBLIC:
        raise UserError(
            f"{name!r} cannot name an expert: take up to 64 lower-case letters, digits, '-' and '_', but not {PUBLIC!r}"
        )


def write(
    out: Path,
    params: Mapping[str, Any],
    anchor: Manifest,
    record: ExpertRecord,
    *,
    top_k: int,
    gin: str,
    implementation: str = "",
) -> None:
    """Writes the contribution of expert `record.name` for this anchor, replacing an older one.

    Args:
      out: directory to write.
      params: a tree that has the expert's leaves, among others perhaps.
      anchor: manifest of the anchor it was trained beside.
      record: who contributes what under which terms; its `contribution` is filled in here.
      top_k: experts per token that it was trained with.
      gin: operative configuration of the job.
      implementation: the implementation of `mix_experts` that the job ran.
    """
    check_name(record.name)
    mine = select(params, lambda path: belongs_to_expert(path, record.name))
    manifest = Manifest(
        kind="contribution",
        model=anchor.model,
        experts=(record,),
        anchor=anchor.anchor,
        arrays=arrays.digests(mine),
        top_k=top_k,
        tokenizer=anchor.tokenizer,
        gin=gin,
        implementation=implementation,
    )
    checkpoint.write(out, mine, manifest, overwrite=True)


def load(directory: Path, anchor: Manifest) -> tuple[Manifest, dict[str, Any]]:
    """Reads a contribution and refuses it unless it is whole, finite and made for this anchor.

    Raises:
      UserError: names what is wrong, in one sentence.
    """
    manifest = read(directory, "contribution")
    if len(manifest.experts) != 1:
        raise UserError(f"{directory} must contribute exactly one expert, but lists {len(manifest.experts)}")
    check_name(manifest.names[0])
    if manifest.anchor != anchor.anchor:
        raise UserError(
            f"{directory} was made for another anchor (fingerprint {manifest.anchor[:12]}…, not {anchor.anchor[:12]}…)"
        )
    if manifest.model != anchor.model:
        raise UserError(f"{directory} says its model is {manifest.model}, but the anchor is {anchor.model}")
    if manifest.tokenizer != anchor.tokenizer:
        raise UserError(
            f"{directory} was tokenized with {manifest.tokenizer!r}, but the anchor with {anchor.tokenizer!r}"
        )
    _, params = checkpoint.load(directory, "contribution")
    for path, leaf in flatten(params).items():
        if not np.all(np.isfinite(leaf.astype(np.float32))):
            raise UserError(f"{directory} holds a value that is not finite in {'/'.join(path)}")
    if arrays.digests(params) != manifest.arrays:
        raise UserError(f"{directory} does not match the digests in its manifest: it was damaged or changed")
    return manifest, params

"""The merge: an anchor and any contributions made for it become one model, with no joint training."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import join
from flexolmo_jax.store import arrays, checkpoint, contribution
from flexolmo_jax.store.directories import refuse_existing
from flexolmo_jax.store.manifest import Manifest


def merge(
    anchor: str | Path,
    contributions: Sequence[str | Path],
    out: str | Path,
    *,
    top_k: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Concatenates an anchor and contributions into `out` and returns its manifest.

    Args:
      anchor: directory of the anchor.
      contributions: directories of the contributions, in the order that their experts shall have.
      out: directory to write; it appears complete or not at all.
      top_k: experts per token to write into the manifest as the model's default; None means all of them.
      overwrite: whether an existing `out` is replaced.

    Raises:
      UserError: an input is not what it should be, two contributions name the same expert, or `out` cannot be written.
    """
    anchor, out = Path(anchor), Path(out)
    refuse_existing(out, overwrite=overwrite)
    base, params = checkpoint.load(anchor, "anchor")
    experts = list(base.experts)
    described = arrays.digests(params)
    if checkpoint.anchor_fingerprint(described) != base.anchor:
        raise UserError(f"{anchor} does not match the digests in its manifest: it was damaged or changed")
    for directory in map(Path, contributions):
        manifest, part = contribution.load(directory, base)
        (record,) = manifest.experts
        if record.name in [expert.name for expert in experts]:
            raise UserError(f"{directory} contributes {record.name!r}, an expert that another contribution brings too")
        experts.append(dataclasses.replace(record, contribution=arrays.fingerprint(manifest.arrays)))
        described |= manifest.arrays
        params = join(params, part)
    if top_k is not None and not 1 <= top_k <= len(experts):
        raise UserError(f"top_k is {top_k}, but the merged model has {len(experts)} experts")
    merged = dataclasses.replace(
        base, kind="merged", experts=tuple(experts), arrays=described, top_k=top_k or len(experts), gin=""
    )
    checkpoint.write(out, params, merged, overwrite=overwrite)
    return merged

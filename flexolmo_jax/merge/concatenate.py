"""The merge: an anchor and any contributions made for it become one model, with no joint training."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexolmo_jax.errors import UserError
from flexolmo_jax.merge.inputs import Inputs, open_contributions, open_model
from flexolmo_jax.store import companions
from flexolmo_jax.store.assembly import Linked, LinkedUnread, assemble
from flexolmo_jax.store.manifest import ExpertRecord, Manifest


def merge(
    anchor: str | Path,
    contributions: Sequence[str | Path],
    out: str | Path,
    *,
    top_k: int | None = None,
    signed_by: Mapping[str, Path] | None = None,
    verify: bool = True,
    memory_budget: int | None = None,
    writers: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Concatenates an anchor and contributions into `out` and returns its manifest.

    The arrays stream from the inputs to the output and are checked against their digests on the way. The same inputs
    give the same bytes. A merge that was killed goes on where it was when it is started again, and the same merge may
    be started by several processes at once, which then share the work.

    Args:
      anchor: directory of the anchor.
      contributions: directories of the contributions, in the order that their experts shall have.
      out: directory to write; it appears complete or not at all.
      top_k: experts per token to write into the manifest as the model's default; None means all of them.
      signed_by: public key by the name of an expert; if given, every contribution must bear a signature by its key.
      verify: whether arrays are checked against their digests; without, they must have been verified before.
      memory_budget: bytes of host memory that arrays may take; None means 1 GiB.
      writers: threads that write; None takes one per processor.
      overwrite: whether an existing `out` is replaced.

    Raises:
      UserError: an input is not what it should be, two contributions name the same expert, or `out` cannot be written.
    """
    inputs = open_model(Path(anchor), "anchor", verify=verify)
    return _concatenate(
        inputs,
        open_contributions(contributions, inputs, signed_by=signed_by, verify=verify),
        Path(out),
        top_k=top_k,
        overwrite=overwrite,
        memory_budget=memory_budget,
        writers=writers,
    )


def revise(
    model: str | Path,
    out: str | Path,
    *,
    add: Sequence[str | Path] = (),
    remove: Sequence[str] = (),
    replace: Sequence[str | Path] = (),
    top_k: int | None = None,
    signed_by: Mapping[str, Path] | None = None,
    verify: bool = True,
    memory_budget: int | None = None,
    writers: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes a merged model with other experts; what stays is linked rather than written again where that is possible.

    Args:
      model: directory of a merged model, which stays as it is.
      out: directory to write.
      add: contributions whose experts come last.
      remove: names of experts to leave out.
      replace: contributions that take the place of the experts of their name.
      top_k: experts per token of the result; None keeps the model's own, or all of them where it used all of them.
      signed_by: as in `merge`, of the contributions that are added.
      verify: as in `merge`.
      memory_budget: as in `merge`.
      writers: as in `merge`.
      overwrite: as in `merge`.

    Raises:
      UserError: as in `merge`; or the model has no expert of a name, or its router was tuned on proxies.
    """
    model = Path(model)
    inputs = open_model(model, "merged", verify=verify, copied=Linked if verify else LinkedUnread)
    if inputs.manifest.router_tuned_on:
        raise UserError(
            f"the router of {model} was tuned for the experts that it has: merge anew, then tune the router again"
        )
    added = open_contributions([*replace, *add], inputs, signed_by=signed_by, verify=verify)
    new, names = added[len(replace) :], inputs.manifest.names[1:]
    instead = {part.record.name: part for part in added[: len(replace)]}
    if unknown := [name for name in (*remove, *instead) if name not in names]:
        raise UserError(f"{model} has no expert {unknown[0]!r} of an owner; it has {', '.join(names) or 'none'}")
    if clash := [part.record.name for part in new if part.record.name in names and part.record.name not in remove]:
        raise UserError(f"{model} has an expert {clash[0]!r} already: --replace it")
    kept = [instead.get(name) or inputs.expert(name) for name in names if name not in remove]
    if top_k is None:
        count = 1 + len(kept) + len(new)
        used_all = inputs.manifest.top_k == len(inputs.manifest.names)
        top_k = count if used_all else min(inputs.manifest.top_k, count)
    return _concatenate(
        inputs.public(),
        [*kept, *new],
        Path(out),
        top_k=top_k,
        overwrite=overwrite,
        memory_budget=memory_budget,
        writers=writers,
    )


def _concatenate(base: Inputs, parts: Sequence, out: Path, *, top_k: int | None, **options) -> Manifest:
    records: list[ExpertRecord] = [base.manifest.experts[0]]
    sources = dict(base.sources)
    for part in parts:
        if part.record.name in [record.name for record in records]:
            raise UserError(f"two contributions bring an expert {part.record.name!r}: an expert's name is its own")
        records.append(part.record)
        sources |= part.sources
    if top_k is not None and not 1 <= top_k <= len(records):
        raise UserError(f"top_k is {top_k}, but the merged model has {len(records)} experts")

    def manifest(described: dict) -> Manifest:
        return dataclasses.replace(
            base.manifest,
            kind="merged",
            experts=tuple(records),
            arrays=described,
            top_k=top_k or len(records),
            gin="",
            format_version=Manifest.format_version,
        )

    return assemble(out, sources, manifest, carried=base.directory / companions.DIRECTORY, **options)

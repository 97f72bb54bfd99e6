"""What leaves an owner: one expert's arrays and a manifest, nothing else. To everybody else it is untrusted input."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import LeafPath, belongs_to_expert, select, unflatten
from flexolmo_jax.store import arrays, checkpoint, signing
from flexolmo_jax.store.low_rank import LEFT, MATRICES, RIGHT, expand
from flexolmo_jax.store.manifest import FILE, ExpertRecord, Manifest, check_name, read
from flexolmo_jax.store.stored import StoredLeaf, check_files, refuse_foreign_files, stored_leaves


@dataclasses.dataclass(frozen=True)
class Contribution:
    """A contribution whose manifest and files have passed every check that reads no array.

    Attributes:
      directory: where it is.
      manifest: what it says.
      leaves: its leaves on disk, by path; reading one checks the rest.
    """

    directory: Path
    manifest: Manifest
    leaves: dict[LeafPath, StoredLeaf]

    @property
    def record(self) -> ExpertRecord:
        """The expert's record as a merge keeps it."""
        return dataclasses.replace(self.manifest.experts[0], contribution=arrays.fingerprint(self.manifest.arrays))

    @property
    def name(self) -> str:
        return self.manifest.experts[0].name


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
      record: who contributes what under which terms; its `contribution` is filled in by a merge.
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


def examine(directory: Path, anchor: Manifest, *, signed_by: Path | None = None) -> Contribution:
    """Checks everything about a contribution but the values of its arrays: no array is read.

    Args:
      directory: the contribution.
      anchor: manifest of the anchor that it must have been made for, or of a merged model on that anchor.
      signed_by: public key whose signature it must bear; None asks for none.

    Raises:
      UserError: names what is wrong, in one sentence.
    """
    refuse_foreign_files(directory, [FILE, signing.SIGNATURE], [checkpoint.ARRAYS])
    manifest = read(directory, "contribution")
    if manifest.anchor != anchor.anchor:
        raise UserError(
            f"{directory} was made for another anchor (fingerprint {manifest.anchor[:12]}…, not {anchor.anchor[:12]}…)"
        )
    if manifest.model != anchor.model:
        raise UserError(f"{directory} says its model is {manifest.model}, but the anchor is {anchor.model}")
    if manifest.tokenizer != anchor.tokenizer:
        raise UserError(
            f"{directory} was tokenized with {manifest.tokenizer[:80]!r}, but the anchor with {anchor.tokenizer!r}"
        )
    checkpoint.check_described(directory, manifest)
    leaves = stored_leaves(directory, manifest)
    check_files(directory, manifest)
    record = manifest.experts[0]
    if record.contribution or record.signed_by or manifest.router_tuned_on:
        raise UserError(f"the manifest of {directory} fills in what a merge fills in")
    if signed_by is not None:
        signer = signing.check(directory, signed_by)
        manifest = dataclasses.replace(manifest, experts=(dataclasses.replace(record, signed_by=signer),))
    return Contribution(directory, manifest, leaves)


def verify(directory: Path, anchor: Manifest, *, signed_by: Path | None = None) -> Contribution:
    """`examine`s a contribution, then reads every array within a few MiB of memory.

    Raises:
      UserError: names what is wrong, in one sentence.
    """
    contribution = examine(directory, anchor, signed_by=signed_by)
    for leaf in contribution.leaves.values():
        leaf.verify()
    return contribution


def load(directory: Path, anchor: Manifest) -> tuple[Manifest, dict[str, Any]]:
    """Reads a contribution and refuses it unless it is whole, finite and made for this anchor.

    Raises:
      UserError: names what is wrong, in one sentence.
    """
    contribution = examine(directory, anchor)
    return contribution.manifest, unflatten({path: leaf.read() for path, leaf in contribution.leaves.items()})


def expanded(params: Mapping[str, Any], record: ExpertRecord, public: Mapping[str, Any]) -> dict[str, Any]:
    """What `load` read, with full matrices where the contribution is a difference of low rank.

    Args:
      params: the contribution's arrays.
      record: its expert's record.
      public: the matrices of the anchor's public expert, `gate`, `up` and `down`.
    """
    if record.rank is None:
        return dict(params)
    factors = params["experts"][record.name]
    full = {}
    for matrix in MATRICES:
        layers = zip(public[matrix], factors[matrix + LEFT], factors[matrix + RIGHT], strict=True)
        full[matrix] = np.stack([expand(*layer) for layer in layers])
    return {**params, "experts": {record.name: full}}

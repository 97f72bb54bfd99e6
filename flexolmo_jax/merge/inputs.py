"""What goes into a merge, checked before anything is written: a model's leaves, and the expert of each contribution."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.config import PUBLIC
from flexolmo_jax.model.partition import LeafPath, belongs_to_anchor, belongs_to_expert
from flexolmo_jax.store import checkpoint, contribution
from flexolmo_jax.store.assembly import Computed, Copied, CopiedUnread, Source
from flexolmo_jax.store.contribution import Contribution
from flexolmo_jax.store.layout import LeafLayout
from flexolmo_jax.store.low_rank import LEFT, MATRICES, RIGHT, in_slabs
from flexolmo_jax.store.manifest import ExpertRecord, Manifest, read
from flexolmo_jax.store.stored import StoredLeaf, check_files, stored_leaves


@dataclasses.dataclass(frozen=True)
class ExpertPart:
    """One expert of the output: its record, and where each of its leaves comes from."""

    record: ExpertRecord
    sources: Mapping[LeafPath, Source]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A model: where it is, its manifest, its leaves on disk, and how each gets into the output."""

    directory: Path
    manifest: Manifest
    leaves: Mapping[LeafPath, StoredLeaf]
    sources: Mapping[LeafPath, Source]

    def expert(self, name: str) -> ExpertPart:
        """The part of an owner's expert."""
        (record,) = (record for record in self.manifest.experts if record.name == name)
        sources = {path: source for path, source in self.sources.items() if belongs_to_expert(path, name)}
        return ExpertPart(record, sources)

    def public(self) -> "Inputs":
        """The same without the owners' experts."""
        return dataclasses.replace(
            self, sources={path: source for path, source in self.sources.items() if belongs_to_anchor(path)}
        )


def open_model(
    directory: Path, kind: str, *, verify: bool = True, copied: Callable[[StoredLeaf], Source] | None = None
) -> Inputs:
    """Checks everything about a model but the values of its arrays.

    Args:
      directory: the model.
      kind: which it must be, "anchor" or "merged".
      verify: whether its arrays are checked when they are copied.
      copied: how its leaves get into the output; None copies them.

    Raises:
      UserError: names what is wrong, in one sentence.
    """
    manifest = read(directory, kind)
    checkpoint.check_described(directory, manifest)
    if checkpoint.anchor_fingerprint(manifest.arrays) != manifest.anchor:
        raise UserError(f"{directory} does not match the fingerprint in its manifest: it was damaged or changed")
    check_files(directory, manifest)
    leaves = stored_leaves(directory, manifest)
    copied = copied or (Copied if verify else CopiedUnread)
    return Inputs(directory, manifest, leaves, {path: copied(leaf) for path, leaf in leaves.items()})


def open_contributions(
    directories: Sequence[str | Path],
    base: Inputs,
    *,
    signed_by: Mapping[str, Path] | None = None,
    verify: bool = True,
) -> list[ExpertPart]:
    """Checks everything about contributions but the values of their arrays.

    Raises:
      UserError: names what is wrong, in one sentence.
    """
    parts = []
    for directory in map(Path, directories):
        key = None
        if signed_by:
            name = read(directory, "contribution").names[0]
            if name not in signed_by:
                raise UserError(f"{directory} contributes {name!r}, for which there is no key in --signed-by")
            key = signed_by[name]
        opened = contribution.examine(directory, base.manifest, signed_by=key)
        parts.append(ExpertPart(opened.record, _sources(opened, base, Copied if verify else CopiedUnread)))
    return parts


def _sources(opened: Contribution, base: Inputs, copied: Callable[[StoredLeaf], Source]) -> dict[LeafPath, Source]:
    if opened.manifest.experts[0].rank is None:
        return {path: copied(leaf) for path, leaf in opened.leaves.items()}
    sources = {path: copied(leaf) for path, leaf in opened.leaves.items() if path[0] == "router"}
    for matrix in MATRICES:
        sources[("experts", opened.name, matrix)] = _expanded(opened, base, matrix)
    return sources


def _expanded(opened: Contribution, base: Inputs, matrix: str) -> Computed:
    """A full matrix out of one of low rank, layer by layer; the factors are verified before the first."""
    public = base.leaves[("experts", PUBLIC, matrix)]
    left, right = (opened.leaves[("experts", opened.name, f"{matrix}{side}")] for side in (LEFT, RIGHT))
    layout = LeafLayout(("experts", opened.name, matrix), public.layout.shape, left.layout.dtype)
    one_layer = sum(leaf.layout.nbytes // layout.shape[0] for leaf in (public, left, right))
    right_in_float64 = 8 * right.layout.nbytes // (right.layout.itemsize * layout.shape[0])
    fixed = one_layer + right_in_float64

    def slabs(memory: int) -> Iterator[np.ndarray]:
        left.verify()
        right.verify()
        for layer in range(layout.shape[0]):
            one, *factors = (leaf.read_layer(layer) for leaf in (public, left, right))
            # Three float64 copies of a slab: the left factor's rows, the product, the public rows.
            yield from in_slabs(one, factors[0], factors[1], (memory - fixed) // 4)

    return Computed(
        layout=layout,
        identity="+".join((public.sha256, left.sha256, right.sha256)),
        memory=fixed + 4 * 8 * max(layout.shape[1:]) * 64,
        slabs=slabs,
        artefact=opened.directory,
    )

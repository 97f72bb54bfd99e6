"""Compresses a contribution: each matrix becomes its difference to the public expert's, cut to a low rank."""

import dataclasses
from pathlib import Path

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.config import PUBLIC
from flexolmo_jax.model.partition import unflatten
from flexolmo_jax.store import arrays, checkpoint, contribution
from flexolmo_jax.store.directories import refuse_existing
from flexolmo_jax.store.low_rank import LEFT, MATRICES, RIGHT, factor_shapes, rank_for_energy, singular_values, truncate
from flexolmo_jax.store.manifest import read
from flexolmo_jax.store.stored import StoredLeaf, check_files, stored_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed:
    """What a compression gave.

    Attributes:
      rank: of every matrix's difference to the public expert.
      energy_kept: share of a difference's squared Frobenius norm that is left, in the worst of the matrices.
      bytes_before: of the contribution's arrays.
      bytes_after: of the compressed contribution's arrays.
    """

    rank: int
    energy_kept: float
    bytes_before: int
    bytes_after: int


def compress(
    directory: Path,
    anchor: Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
) -> Compressed:
    """Writes a contribution as a difference of low rank; it has to be signed anew.

    One layer of one matrix at a time is decomposed in full, so memory is bounded by a few times a layer's matrix, and
    the result.

    Args:
      directory: a contribution with full matrices.
      anchor: the anchor that it was made for.
      out: directory to write.
      rank: of every difference; give either this or `energy`.
      energy: share of every difference's squared Frobenius norm, above 0 and at most 1, that the smallest rank keeps.
      overwrite: whether an existing `out` is replaced.

    Raises:
      UserError: the contribution is not what it should be or is compressed already, or the rank or energy cannot be.
    """
    refuse_existing(out, overwrite=overwrite)
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"--energy is {energy}, but must be above 0 and at most 1")
    base = read(anchor, "anchor")
    check_files(anchor, base)
    opened = contribution.verify(directory, base)
    record = opened.manifest.experts[0]
    if record.rank is not None:
        raise UserError(f"{directory} has rank {record.rank} already: compress the full contribution")
    public = stored_leaves(anchor, base)
    pairs = {m: (opened.leaves[("experts", record.name, m)], public[("experts", PUBLIC, m)]) for m in MATRICES}
    if rank is None:
        rank = max(_rank_for_energy(*pair, energy or 1.0) for pair in pairs.values())
    full = {path: leaf.layout.shape for path, leaf in opened.leaves.items()}
    factor_shapes(full, rank)  # Refuses a rank that is too high.
    leaves = {path: leaf.read() for path, leaf in opened.leaves.items() if path[0] == "router"}
    kept = 1.0
    for matrix, (own, publics) in pairs.items():
        layers = [truncate(_difference(own, publics, layer), rank) for layer in range(own.layout.shape[0])]
        # A merge expands into the factors' dtype, and what it rounds there outweighs what is rounded here.
        dtype = own.layout.numpy_dtype
        leaves[("experts", record.name, matrix + LEFT)] = np.stack([each.left.astype(dtype) for each in layers])
        leaves[("experts", record.name, matrix + RIGHT)] = np.stack([each.right.astype(dtype) for each in layers])
        kept = min(kept, *(each.energy for each in layers))
    params = unflatten(leaves)
    manifest = dataclasses.replace(
        opened.manifest,
        experts=(dataclasses.replace(record, rank=rank),),
        arrays=arrays.digests(params),
    )
    checkpoint.write(out, params, manifest, overwrite=overwrite)
    before = sum(leaf.layout.nbytes for leaf in opened.leaves.values())
    return Compressed(
        rank=rank, energy_kept=kept, bytes_before=before, bytes_after=sum(leaf.nbytes for leaf in leaves.values())
    )


def _difference(own: StoredLeaf, public: StoredLeaf, layer: int) -> np.ndarray:
    return own.read_layer(layer).astype(np.float32) - public.read_layer(layer).astype(np.float32)


def _rank_for_energy(own: StoredLeaf, public: StoredLeaf, energy: float) -> int:
    layers = [singular_values(_difference(own, public, layer)) for layer in range(own.layout.shape[0])]
    return rank_for_energy(np.stack(layers), energy)

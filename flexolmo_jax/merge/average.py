"""Merging methods that the paper compares with: parameter soups, and branch-train-mix.

Model soups: arXiv 2203.05482. Branch-Train-MiX: arXiv 2403.07816. Both take models of one shape; a contribution stands
for the dense model that its owner has: the anchor with the expert's feed-forward networks in the public one's place.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.merge.inputs import Inputs, open_contributions, open_model
from flexolmo_jax.model.config import PUBLIC
from flexolmo_jax.model.partition import LeafPath
from flexolmo_jax.store import companions
from flexolmo_jax.store.assembly import Computed, Copied, Source, assemble
from flexolmo_jax.store.checkpoint import anchor_fingerprint
from flexolmo_jax.store.layout import LeafLayout
from flexolmo_jax.store.manifest import ExpertRecord, Manifest, check_name
from flexolmo_jax.store.stored import PIECE_BYTES, StoredLeaf

INITIAL_ROW_SCALE = 0.02
"""Standard deviation of the router rows of a BTX merge, which nothing has trained yet."""


def soup(
    anchor: str | Path,
    contributions: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Mapping[str, float] | None = None,
    memory_budget: int | None = None,
    writers: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes the weighted average of the anchor and the owners' dense models: a model with one expert.

    Args:
      anchor: directory of the anchor.
      contributions: directories of contributions with full matrices.
      out: directory to write.
      weights: weight of every model by its expert's name, `public` for the anchor; they are scaled to sum to one. None
        weighs all alike.
      memory_budget: as in `merge`.
      writers: as in `merge`.
      overwrite: as in `merge`.

    Raises:
      UserError: as in `merge`; or a weight is missing, negative, of an unknown name, or all are zero.
    """
    base = open_model(Path(anchor), "anchor")
    parts = open_contributions(contributions, base)
    names = [PUBLIC, *(part.record.name for part in parts)]
    if len(set(names)) != len(names):
        raise UserError("two contributions bring an expert of the same name")
    share = _shares(names, weights)
    sources = dict(base.sources)
    for path, leaf in base.leaves.items():
        if path[:2] != ("experts", PUBLIC):
            continue
        own = {part.record.name: part.sources[("experts", part.record.name, path[2])] for part in parts}
        if low := [name for name, source in own.items() if not isinstance(source, Copied)]:
            raise UserError(f"the contribution of {low[0]!r} is of low rank: a soup takes full matrices")
        leaves = [leaf, *(source.leaf for source in own.values() if isinstance(source, Copied))]
        sources[path] = _mean(path, leaves, [share[name] for name in names])
    mixed = ", ".join(f"{name} {share[name]:.6g}" for name in names)
    record = ExpertRecord(name=PUBLIC, owner=f"soup: {mixed}", licence=_licences(part.record for part in parts))
    return _assemble(Path(out), base, sources, (record,), memory_budget, writers, overwrite)


def likelihood_weights(nats: Mapping[str, float], temperature: float = 1.0) -> dict[str, float]:
    """Weights for `soup`: the softmax of the models' log-likelihoods of some text, as in the paper's section 4.3.

    Args:
      nats: negative log-likelihood per token by model; lower is likelier.
      temperature: above 0; the higher, the more alike are the weights.
    """
    if temperature <= 0:
        raise UserError(f"the temperature is {temperature}, but must be above 0")
    best = min(nats.values())
    scaled = {name: math.exp((best - value) / temperature) for name, value in nats.items()}
    total = sum(scaled.values())
    return {name: value / total for name, value in scaled.items()}


def btx(
    models: Mapping[str, str | Path],
    out: str | Path,
    *,
    seed: int = 0,
    memory_budget: int | None = None,
    writers: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Branch-Train-MiX: every model's feed-forward networks become an expert, everything else is averaged.

    The router rows are random: the method trains them afterwards, on public data (`tune-router`).

    Args:
      models: directory of a dense model (an anchor, or one trained on from it) by the name that its expert shall have;
        `public` must be among them.
      out: directory to write.
      seed: of the router rows.
      memory_budget: as in `merge`.
      writers: as in `merge`.
      overwrite: as in `merge`.

    Raises:
      UserError: a model is not what it should be or not of the others' shape, or `out` cannot be written.
    """
    if PUBLIC not in models:
        raise UserError(f"one of the models must be named {PUBLIC!r}")
    names = [PUBLIC, *(name for name in models if name != PUBLIC)]
    opened = {name: open_model(Path(models[name]), "anchor") for name in names}
    base = opened[PUBLIC]
    for name in names[1:]:
        check_name(name)
        if opened[name].manifest.model != base.manifest.model:
            raise UserError(f"{models[name]} has another shape than {models[PUBLIC]}")
    sources: dict[LeafPath, Source] = {}
    for path in base.leaves:
        if path[0] == "anchor":
            leaves = [each.leaves[path] for each in opened.values()]
            sources[path] = _mean(path, leaves, [1 / len(leaves)] * len(leaves))
    for number, (name, each) in enumerate(opened.items()):
        for matrix in ("gate", "up", "down"):
            sources[("experts", name, matrix)] = _renamed(each.leaves[("experts", PUBLIC, matrix)], name)
        layers, width = base.manifest.model.layers, base.manifest.model.width
        row = INITIAL_ROW_SCALE * np.random.default_rng([seed, number]).standard_normal((layers, width))
        sources[("router", name, "row")] = _constant(("router", name, "row"), row.astype(np.float32), out)
        if name != PUBLIC:
            bias = np.zeros(layers, np.float32)
            sources[("router", name, "bias")] = _constant(("router", name, "bias"), bias, out)
    records = tuple(
        ExpertRecord(name=name, contribution=each.manifest.anchor if name != PUBLIC else "")
        for name, each in opened.items()
    )
    return _assemble(Path(out), base, sources, records, memory_budget, writers, overwrite)


def _shares(names: Sequence[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    weights = dict.fromkeys(names, 1.0) if weights is None else weights
    if different := set(names) ^ set(weights):
        raise UserError(f"every model needs one weight, but {sorted(different)[0]!r} is a model or a weight alone")
    total = sum(weights.values())
    if min(weights.values()) < 0 or not 0 < total < math.inf:
        raise UserError("weights must not be negative, and not all zero")
    return {name: weights[name] / total for name in names}


def _mean(path: LeafPath, leaves: Sequence[StoredLeaf], weights: Sequence[float]) -> Computed:
    """The weighted average, summed in float64 and rounded once."""
    for leaf in leaves:
        if leaf.layout.dtype != leaves[0].layout.dtype:
            raise UserError(
                f"{leaf.artefact} holds {leaf.layout.dtype} and {leaves[0].artefact} {leaves[0].layout.dtype}: "
                "an average takes one dtype"
            )
    layout = LeafLayout(path, leaves[0].layout.shape, leaves[0].layout.dtype)

    def slabs(memory: int) -> Iterator[np.ndarray]:
        per_leaf = memory // (2 * len(leaves) + 24) // 8 * 8
        pieces = [leaf.checked_pieces(per_leaf) for leaf in leaves]
        for together in zip(*pieces, strict=True):
            total = np.zeros(len(together[0]) // layout.itemsize, np.float64)
            for weight, piece, leaf in zip(weights, together, leaves, strict=True):
                total += weight * piece.view(leaf.layout.numpy_dtype).astype(np.float64)
            yield total.astype(layout.numpy_dtype)

    identity = json.dumps([[leaf.sha256, weight] for leaf, weight in zip(leaves, weights, strict=True)])
    return Computed(layout, identity, 2**20 * (len(leaves) + 6), slabs, leaves[0].artefact)


def _renamed(leaf: StoredLeaf, name: str) -> Computed:
    """A model's own feed-forward network under an expert's name."""
    layout = LeafLayout(("experts", name, leaf.layout.path[-1]), leaf.layout.shape, leaf.layout.dtype)
    return Computed(layout, leaf.sha256, PIECE_BYTES, lambda memory: leaf.checked_pieces(), leaf.artefact)


def _constant(path: LeafPath, value: np.ndarray, out: str | Path) -> Computed:
    layout = LeafLayout(path, value.shape, value.dtype.name)
    identity = hashlib.sha256(value.tobytes()).hexdigest()
    return Computed(layout, identity, value.nbytes, lambda memory: iter([value]), Path(out))


def _licences(records: Iterator[ExpertRecord]) -> str:
    return ", ".join(sorted({record.licence for record in records if record.licence}))


def _assemble(
    out: Path,
    base: Inputs,
    sources: Mapping[LeafPath, Source],
    records: tuple[ExpertRecord, ...],
    memory_budget: int | None,
    writers: int | None,
    overwrite: bool,
) -> Manifest:
    def manifest(described: dict) -> Manifest:
        return dataclasses.replace(
            base.manifest,
            kind="merged",
            experts=records,
            anchor=anchor_fingerprint(described),
            arrays=described,
            top_k=len(records),
            gin="",
            format_version=Manifest.format_version,
        )

    return assemble(
        out,
        sources,
        manifest,
        carried=base.directory / companions.DIRECTORY,
        overwrite=overwrite,
        memory_budget=memory_budget,
        writers=writers,
    )

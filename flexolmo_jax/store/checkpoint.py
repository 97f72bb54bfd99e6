"""Models on disk: `manifest.json` and, under `arrays/`, an Orbax checkpoint in the schema's paths."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.config import PUBLIC, ModelConfig
from flexolmo_jax.model.partition import LeafPath, Predicate, belongs_to_anchor, flatten, split
from flexolmo_jax.model.transformer import abstract_params
from flexolmo_jax.store import arrays
from flexolmo_jax.store.companions import carry
from flexolmo_jax.store.difference import differences, in_one_sentence
from flexolmo_jax.store.directories import complete_directory
from flexolmo_jax.store.layout import LeafLayout
from flexolmo_jax.store.low_rank import factor_shapes
from flexolmo_jax.store.manifest import Manifest, read

ARRAYS = "arrays"


def write(
    out: Path, params: Mapping[str, Any], manifest: Manifest, *, carried: Path | None = None, overwrite: bool = False
) -> None:
    """Writes an artefact so that its directory appears complete or not at all.

    Args:
      out: directory to write.
      params: its arrays.
      manifest: of it.
      carried: directory of accompanying files to carry along (see `flexolmo_jax.store.companions`).
      overwrite: whether an existing `out` is replaced.
    """
    with complete_directory(out, overwrite=overwrite) as partial:
        arrays.save(partial / ARRAYS, params)
        if carried:
            carry(carried, partial)
        manifest.write(partial)


def load(directory: Path, *kinds: str, predicate: Predicate = lambda path: True, shardings=None):
    """Reads an artefact: its manifest and the leaves that satisfy the predicate (see `arrays.load`).

    Raises:
      UserError: the artefact is missing, incomplete, of another kind, or its leaves are not those of its model.
    """
    manifest = read(directory, *kinds)
    check_leaves(directory, manifest)
    return manifest, arrays.load(directory / ARRAYS, predicate, shardings=shardings)


def check_leaves(directory: Path, manifest: Manifest) -> None:
    """Raises UserError unless the paths and shapes on disk are exactly those of the manifest's model."""
    check_described(directory, manifest)
    found = {"/".join(path): list(leaf.shape) for path, leaf in flatten(arrays.shapes(directory / ARRAYS)).items()}
    expected = {path: leaf["shape"] for path, leaf in manifest.arrays.items()}
    if phrases := differences(found, expected):
        raise UserError(f"the arrays of {directory} are not those of its manifest: {in_one_sentence(phrases)}")


def check_described(directory: Path, manifest: Manifest) -> None:
    """Raises UserError unless the manifest describes exactly the arrays that its model and experts have."""
    described = {path: leaf["shape"] for path, leaf in manifest.arrays.items()}
    expected = {"/".join(path): list(shape) for path, shape in leaf_shapes(manifest).items()}
    if phrases := differences(described, expected):
        raise UserError(f"the manifest of {directory} does not fit its model: {in_one_sentence(phrases)}")


def leaf_shapes(manifest: Manifest) -> dict[LeafPath, tuple[int, ...]]:
    """Every path that an artefact has, with its shape."""
    anchor, owner = split(_shapes_with_one_owner(manifest.model), belongs_to_anchor)
    owners = {
        (path[0], name, *path[2:]): shape
        for path, shape in flatten(owner).items()
        for name in manifest.names
        if name != PUBLIC
    }
    if manifest.kind != "contribution":
        return flatten(anchor) | owners
    (record,) = manifest.experts
    return owners if record.rank is None else factor_shapes(owners, record.rank)


@functools.cache
def _shapes_with_one_owner(model: ModelConfig) -> dict[str, Any]:
    """Nested dict of the shapes of a model with the public expert and one owner's; tracing it takes a while."""
    return jax.tree.map(lambda leaf: leaf.shape, abstract_params(model, (PUBLIC, "owner")))


def layouts(manifest: Manifest) -> dict[LeafPath, LeafLayout]:
    """How each leaf that the manifest lists lies on disk."""
    found = {}
    for name, leaf in sorted(manifest.arrays.items()):
        path = tuple(name.split("/"))
        found[path] = LeafLayout(path, tuple(leaf["shape"]), leaf["dtype"], manifest.format_version)
    return found


def anchor_fingerprint(described: Mapping[str, Mapping[str, Any]]) -> str:
    """Fingerprint of the anchor's part of what `arrays.digests` returned."""
    return arrays.fingerprint(
        {name: leaf for name, leaf in described.items() if belongs_to_anchor(tuple(name.split("/")))}
    )

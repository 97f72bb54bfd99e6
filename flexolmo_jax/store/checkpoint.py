"""Models on disk: `manifest.json` and, under `arrays/`, an Orbax checkpoint in the schema's paths."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.config import PUBLIC
from flexolmo_jax.model.partition import Predicate, belongs_to_anchor, flatten
from flexolmo_jax.model.transformer import abstract_params
from flexolmo_jax.store import arrays
from flexolmo_jax.store.directories import complete_directory
from flexolmo_jax.store.manifest import Manifest, read

ARRAYS = "arrays"


def write(out: Path, params: Mapping[str, Any], manifest: Manifest, *, overwrite: bool = False) -> None:
    """Writes an artefact so that its directory appears complete or not at all."""
    with complete_directory(out, overwrite=overwrite) as partial:
        arrays.save(partial / ARRAYS, params)
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
    expected = flatten(abstract_params(manifest.model, (PUBLIC, *(name for name in manifest.names if name != PUBLIC))))
    if manifest.kind == "contribution":
        expected = {path: leaf for path, leaf in expected.items() if not belongs_to_anchor(path)}
    found = flatten(arrays.shapes(directory / ARRAYS))
    for path in sorted(expected.keys() | found.keys()):
        name = "/".join(path)
        if path not in found:
            raise UserError(f"{directory} lacks the array {name}")
        if path not in expected:
            raise UserError(f"{directory} holds an array {name} that its model does not have")
        if found[path].shape != expected[path].shape:
            raise UserError(f"{directory} has {name} of shape {found[path].shape}, not {expected[path].shape}")
        if name not in manifest.arrays:
            raise UserError(f"the manifest of {directory} has no digest of {name}")


def anchor_fingerprint(described: Mapping[str, Mapping[str, Any]]) -> str:
    """Fingerprint of the anchor's part of what `arrays.digests` returned."""
    return arrays.fingerprint(
        {name: leaf for name, leaf in described.items() if belongs_to_anchor(tuple(name.split("/")))}
    )

"""Leaves on disk, read piece by piece within a few MiB and checked while they pass."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import LeafPath
from flexolmo_jax.store import arrays
from flexolmo_jax.store.checkpoint import ARRAYS, layouts
from flexolmo_jax.store.directories import cannot_read
from flexolmo_jax.store.layout import CHUNKS, STATE, LeafLayout
from flexolmo_jax.store.manifest import LARGEST, Manifest

PIECE_BYTES = 4 * 2**20
"""What is read at once: large enough for the disk, small enough for the processor's cache while it is checked."""

_EXPONENT_OF_16_BITS = {"bfloat16": 0x7F80, "float16": 0x7C00}


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A leaf of an artefact on disk.

    Attributes:
      artefact: directory of the artefact.
      layout: where its bytes are.
      sha256: what its bytes must have, by the manifest.
    """

    artefact: Path
    layout: LeafLayout
    sha256: str

    @property
    def state(self) -> Path:
        return self.artefact / ARRAYS / STATE

    def check_files(self) -> None:
        """Raises UserError unless exactly this leaf's files are there, with the sizes that they must have."""
        self.layout.check(self.state)

    def checked_pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[np.ndarray]:
        """The leaf's bytes, each piece of finite values, in a buffer (uint8) that the next piece overwrites.

        Args:
          piece_bytes: of a piece at most; a multiple of 8.

        Raises:
          UserError: a value is not finite; or, after the last piece, the whole does not match its digest.
        """
        digest = hashlib.sha256()
        for piece in self.layout.blocks(self.state, np.empty(piece_bytes, np.uint8)):
            digest.update(piece.data)
            refuse_not_finite(piece, self.layout, self.artefact)
            yield piece
        if digest.hexdigest() != self.sha256:
            raise UserError(
                f"{self.artefact} does not match the digest of {self.layout.name} in its manifest: "
                "it was damaged or changed"
            )

    def verify(self) -> None:
        """Reads the leaf and raises UserError unless it is what the manifest says."""
        for _ in self.checked_pieces():
            pass

    def read(self) -> np.ndarray:
        """The whole leaf, checked.

        Raises:
          UserError: a value is not finite, or the leaf does not match its digest.
        """
        leaf = np.empty(self.layout.nbytes, np.uint8)
        at = 0
        for piece in self.checked_pieces():
            leaf[at : at + len(piece)] = piece
            at += len(piece)
        return leaf.view(self.layout.numpy_dtype).reshape(self.layout.shape)

    def read_layer(self, layer: int) -> np.ndarray:
        """One layer of a stacked leaf, not checked."""
        return self.layout.read_layer(self.state, layer)

    def place(self, state: Path, copy_file: Callable[[str, str], Any]) -> None:
        """Puts the leaf below `state` without looking into its files, each by `copy_file`."""
        target = state / self.layout.directory
        shutil.copytree(self.state / self.layout.directory / CHUNKS, target / CHUNKS, copy_function=copy_file)
        self.layout.write_metadata(target)


def stored_leaves(artefact: Path, manifest: Manifest) -> dict[LeafPath, StoredLeaf]:
    """Every leaf of an artefact, by its path."""
    return {
        path: StoredLeaf(artefact, layout, manifest.arrays[layout.name]["sha256"])
        for path, layout in layouts(manifest).items()
    }


def refuse_not_finite(piece: np.ndarray, layout: LeafLayout, artefact: Path) -> None:
    """Raises UserError if these bytes (uint8, whole values) hold a NaN or an infinity."""
    if layout.dtype == "float32":
        finite = np.isfinite(piece.view(np.float32)).all()
    else:
        exponent = np.uint16(_EXPONENT_OF_16_BITS[layout.dtype])
        finite = ((piece.view(np.uint16) & exponent) != exponent).all()
    if not finite:
        raise UserError(f"{artefact} holds a value that is not finite in {layout.name}")


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raises UserError unless an artefact's arrays are exactly the files that its leaves need; reads none of them."""
    leaves = stored_leaves(directory, manifest)
    state = directory / ARRAYS / STATE
    beside = arrays.SIDECARS + (arrays.SIDECARS_OF_VERSION_1 if manifest.format_version == 1 else ())
    beside_leaves = [name.removeprefix(f"{STATE}/") for name in beside if "/" in name]
    with cannot_read(directory):
        if not state.is_dir():
            raise UserError(f"{directory} is not complete: it has no {ARRAYS}/{STATE}")
        refuse_foreign_files(directory / ARRAYS, [name for name in beside if "/" not in name], [STATE])
        refuse_foreign_files(state, beside_leaves, [leaf.layout.directory for leaf in leaves.values()])
        for leaf in leaves.values():
            leaf.check_files()


def refuse_foreign_files(directory: Path, files: Collection[str], directories: Collection[str]) -> None:
    """Raises UserError if a directory holds anything but these plain files, none of them large, and directories."""
    with cannot_read(directory):
        if not directory.is_dir():
            raise UserError(f"{directory} is no directory")
        with os.scandir(directory) as entries:
            for entry in entries:
                _refuse_foreign(entry, directory, files, directories)


def _refuse_foreign(
    entry: os.DirEntry[str], directory: Path, files: Collection[str], directories: Collection[str]
) -> None:
    if entry.name not in (*files, *directories):
        raise UserError(f"{directory} holds {ascii(entry.name)[:80]}, which does not belong there")
    if entry.is_symlink():
        raise UserError(f"{directory} holds a link, {entry.name}, which may lead anywhere")
    if entry.name in directories:
        if not entry.is_dir():
            raise UserError(f"{directory / entry.name} is no directory")
    elif not entry.is_file():
        raise UserError(f"{directory / entry.name} is no plain file")
    elif (size := entry.stat().st_size) > LARGEST:
        raise UserError(f"{directory / entry.name} has {size:,} bytes, which no such file has")

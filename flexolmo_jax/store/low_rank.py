"""Experts as differences of low rank to the public expert: a matrix [D, F] becomes public + left [D, R] · right [R, F].

Flexible mixtures of rank-heterogeneous experts: FlexMoRE, arXiv 2602.08818.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import LeafPath

LEFT, RIGHT = "_left", "_right"
MATRICES = ("gate", "up", "down")


def factor_shapes(shapes: Mapping[LeafPath, tuple[int, ...]], rank: int) -> dict[LeafPath, tuple[int, ...]]:
    """The leaves of a compressed contribution, from those of a full one.

    Raises:
      UserError: the rank is above that of the matrices.
    """
    found: dict[LeafPath, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        if path[-1] not in MATRICES:
            found[path] = shape
            continue
        layers, rows, columns = shape
        if not 1 <= rank <= min(rows, columns):
            raise UserError(f"the rank is {rank}, but {'/'.join(path)} has rank {min(rows, columns)} at most")
        found[(*path[:-1], path[-1] + LEFT)] = (layers, rows, rank)
        found[(*path[:-1], path[-1] + RIGHT)] = (layers, rank, columns)
    return found


def expand(public: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The full matrix [D, F] of one layer, in the dtype of the factors.

    The sum is taken in float64 and rounded once, so that it hardly ever depends on the machine that computes it.
    """
    product = left.astype(np.float64) @ right.astype(np.float64)
    product += public.astype(np.float64)
    return product.astype(left.dtype)


def in_slabs(public: np.ndarray, left: np.ndarray, right: np.ndarray, slab_bytes: int) -> Iterator[np.ndarray]:
    """`expand`, so many rows at a time that a float64 slab stays within `slab_bytes`."""
    rows = max(1, slab_bytes // (8 * right.shape[-1]))
    for at in range(0, len(left), rows):
        yield expand(public[at : at + rows], left[at : at + rows], right)


def singular_values(difference: np.ndarray) -> np.ndarray:
    """Singular values of one layer's difference [D, F], largest first."""
    return np.linalg.svd(difference.astype(np.float32), compute_uv=False)


class Truncated(NamedTuple):
    """A difference of low rank: left [D, R], right [R, F], and the share of its squared norm that is left."""

    left: np.ndarray
    right: np.ndarray
    energy: float


def truncate(difference: np.ndarray, rank: int) -> Truncated:
    """The nearest matrix of this rank to one layer's difference [D, F] (Eckart and Young), as factors of one scale."""
    u, s, v = np.linalg.svd(difference.astype(np.float32), full_matrices=False)
    squares = np.square(s.astype(np.float64))
    energy = float(squares[:rank].sum() / squares.sum()) if squares.any() else 1.0
    scale = np.sqrt(s[:rank])
    return Truncated(u[:, :rank] * scale, scale[:, None] * v[:rank], energy)


def rank_for_energy(singular: np.ndarray, energy: float) -> int:
    """The smallest rank that keeps this share of the squared Frobenius norm of every matrix.

    Args:
      singular: singular values [N, K] of N matrices, largest first.
      energy: share between 0 and 1.
    """
    squares = np.square(singular.astype(np.float64))
    kept = np.cumsum(squares, axis=1)
    enough = kept >= energy * kept[:, -1:]
    return int(enough.argmax(axis=1).max()) + 1

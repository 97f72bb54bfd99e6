"""Vectors from files, brought to a width, and compared.

Axis legend: `K` vectors (one for each layer, or one for all), `E` width they come with, `D` width they are needed in.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from flexolmo_jax.errors import UserError


def read_vector(file: Path) -> Float[np.ndarray, "E"]:
    """A vector from a `.npy` file, such as a published domain embedding.

    Raises:
      UserError: the file is no `.npy`, or what it holds is not one vector of finite numbers.
    """
    try:
        vector = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the vector {file}: {error}") from error
    if not isinstance(vector, np.ndarray) or vector.ndim != 1 or not vector.size or vector.dtype.kind not in "fiu":
        shape = getattr(vector, "shape", None)
        raise UserError(f"{file} must hold one vector of numbers, but holds an array of shape {shape}")
    if not np.all(np.isfinite(vector)):
        raise UserError(f"{file} holds a value that is not finite")
    return vector.astype(np.float32)


def project(vectors: Float[np.ndarray, "*K E"], width: int, seed: int) -> Float[np.ndarray, "*K D"]:
    """Vectors in another width, by a random orthogonal map that the seed and the two widths determine.

    A wider space holds them unchanged, every length and angle kept. In a narrower one lengths and angles are kept in
    expectation only: the projection onto a random subspace is scaled by `sqrt(E / D)` (Johnson and Lindenstrauss,
    "Extensions of Lipschitz mappings into a Hilbert space", 1984). Vectors compare only if all went through the same
    map, so every owner and whoever embeds public text take the same seed.
    """
    own = vectors.shape[-1]
    if own == width:
        return vectors
    normal = np.random.default_rng(seed).standard_normal((max(own, width), min(own, width)))
    basis, triangle = np.linalg.qr(normal)
    # Without its sign made positive, the diagonal would depend on how the factorisation is computed.
    basis *= np.sign(np.diagonal(triangle))
    if own > width:
        return (vectors @ (basis * np.sqrt(own / width))).astype(np.float32)
    return (vectors @ basis.T).astype(np.float32)


def cosine(a: Float[np.ndarray, "*K D"], b: Float[np.ndarray, "*K D"]) -> Float[np.ndarray, "*K"]:
    """Cosine of the angle between vectors; 0 where one of them is zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray(np.sum(a * b, axis=-1) / np.where(lengths > 0, lengths, 1.0))

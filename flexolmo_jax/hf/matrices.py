"""What tensors go through on their way between the two programs: transposition, and a look for damage."""

import numpy as np

_STRIP = 128
"""Rows that are transposed at a time. NumPy's own transposed copy runs through the whole matrix once for every column,
at a third of the speed for a 4096 × 11008 bfloat16 matrix."""

_EXPONENTS = {"bfloat16": (np.uint16, 0x7FFF, 0x7F80), "float16": (np.uint16, 0x7FFF, 0x7C00)}


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A contiguous copy of the transposed matrix."""
    plain = matrix.view(f"u{matrix.dtype.itemsize}")  # NumPy copies its own dtypes faster than those it was taught.
    out = np.empty(plain.shape[::-1], plain.dtype)
    for row in range(0, len(plain), _STRIP):
        out[:, row : row + _STRIP] = plain[row : row + _STRIP].T
    return out.view(matrix.dtype)


def is_finite(part: np.ndarray) -> bool:
    """Whether no value is infinite or not a number."""
    if part.dtype.name not in _EXPONENTS:
        return bool(np.isfinite(part).all())
    unsigned, magnitude, infinity = _EXPONENTS[part.dtype.name]
    bits = np.asarray(part, order="C").reshape(-1).view(unsigned)
    # In strips that stay in the cache: a masked copy of a whole matrix would cost more than reading the matrix.
    return all(
        np.max(strip & magnitude) < infinity for strip in np.array_split(bits, len(bits) // 2**18 + 1) if len(strip)
    )


def cast(part: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """The values in another dtype, rounded to nearest; as they are without one."""
    return part if dtype is None or part.dtype == dtype else part.astype(dtype)

"""What tensors go through on their way between the two programs: transposition, and a look for damage."""

import numpy as np

_STRIP = 64
"""Rows transposed at a time. NumPy's own transposed copy runs through the whole matrix once for every column."""

_WORD = np.dtype(np.uint64)

_EXPONENTS = {"bfloat16": (np.uint16, 0x7FFF, 0x7F80), "float16": (np.uint16, 0x7FFF, 0x7C00)}


def transposed(matrix: np.ndarray) -> np.ndarray:
    """A contiguous copy of the transposed matrix.

    The values of as many rows as fill a word (four of bfloat16) that stand below each other are joined into one, and
    the words are transposed: half the time for bfloat16.
    """
    plain = matrix.view(f"u{matrix.dtype.itemsize}")
    rows, columns = plain.shape
    per_word = _WORD.itemsize // plain.itemsize
    if rows % per_word:  # No matrix of a model is so odd.
        return np.ascontiguousarray(plain.T).view(matrix.dtype)
    out = np.empty((columns, rows // per_word), _WORD)
    words = np.empty((_STRIP // per_word, columns), _WORD)
    values = words.view(plain.dtype).reshape(len(words), columns, per_word)
    for first in range(0, rows, _STRIP):
        strip = plain[first : first + _STRIP]
        height = len(strip) // per_word
        for place in range(per_word):
            values[:height, :, place] = strip[place::per_word]
        out[:, first // per_word : first // per_word + height] = words[:height].T
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

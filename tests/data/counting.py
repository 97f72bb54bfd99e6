"""Documents whose tokens say where they come from."""

import numpy as np

from flexolmo_jax.data.tokens import Documents


def documents(*lengths: int) -> Documents:
    """Documents of the given lengths whose tokens count up, so that every token says where it comes from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Documents(np.arange(offsets[-1], dtype=np.uint16) + 3, offsets)

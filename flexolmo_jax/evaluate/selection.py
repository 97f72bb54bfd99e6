"""What an evaluation reads: evenly spaced rows in full batches."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from flexolmo_jax.data.packing import Packing, Rows, stack
from flexolmo_jax.errors import UserError


def evenly_spaced(count: int, most: int | None) -> Int[np.ndarray, "N"]:
    """At most `most` distinct indices below `count`, at equal distances from 0 on; all of them for None.

    Raises:
      UserError: `most` is not positive.
    """
    if most is not None and most < 1:
        raise UserError(f"an evaluation must read at least 1 row or question, but was told to read {most}")
    kept = count if most is None else min(count, most)
    return np.arange(kept) * count // max(kept, 1)


def full_batches(packing: Packing, batch_size: int, max_rows: int | None = None) -> Iterator[Rows]:
    """Every selected row once, in batches that all have the same shape.

    Packing puts long documents into the first rows, so a selection is evenly spaced. The last batch is filled up with
    rows whose segments and weights are zero: they count for nothing and cost no second compilation.

    Args:
      packing: the rows of a split.
      batch_size: rows in each batch (B).
      max_rows: upper bound on the rows to read.

    Raises:
      UserError: the split is empty.
    """
    if not len(packing):
        raise UserError("there is no held-out text to evaluate on: the split has no document of two tokens or more")
    chosen = evenly_spaced(len(packing), max_rows)
    for start in range(0, len(chosen), batch_size):
        rows = [packing[int(index)] for index in chosen[start : start + batch_size]]
        yield stack(rows, batch_size)

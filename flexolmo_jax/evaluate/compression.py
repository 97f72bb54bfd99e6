"""What it costs to compress a contribution, on held-out text."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax.data.packing import Packing
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.tokens import open_split
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate.bits_per_byte import score
from flexolmo_jax.infer import load_with_contribution

SEQUENCE_LENGTH = 256
"""Tokens of a row."""

MOST_ROWS = 256
"""Rows that are enough to tell a loss."""


def bits_per_byte_of_contributions(anchor: Path, contributions: Sequence[Path], corpus: Path) -> list[float]:
    """Held-out bits per byte of the owner's own two-expert model with each of these contributions.

    Raises:
      UserError: the corpus cannot be read, or has no held-out document.
    """
    with tempfile.TemporaryDirectory(prefix="flexolmo-") as scratch:
        models = [load_with_contribution(anchor, directory) for directory in contributions]
        documents = open_split(prepare(corpus, Path(scratch) / "prepared", models[0].tokenizer), "test")
        if not len(documents):
            raise UserError(f"the corpus {corpus} has no document in its test split")
        rows = Packing(documents, SEQUENCE_LENGTH)
        return [score(model, rows, max_rows=MOST_ROWS).bits_per_byte for model in models]

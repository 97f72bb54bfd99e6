"""The text that a job reads: whether it fits the model, and what a person is told of it."""

from pathlib import Path

from flexolmo_jax.data.packing import TextRows
from flexolmo_jax.data.tokens import read_manifest
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import ModelConfig
from flexolmo_jax.train.run import RunConfig


def check_vocabulary(prepared: Path, model: ModelConfig, tokenizer: str | None = None) -> str:
    """The fingerprint of the tokenizer that a text was prepared with.

    Args:
      prepared: the prepared text.
      model: shape of the model that shall read it.
      tokenizer: fingerprint of the anchor's tokenizer; None where the anchor is yet to be trained.

    Raises:
      UserError: the tokenizer is not the anchor's, or has more ids than the model.
    """
    vocabulary = read_manifest(prepared)["vocabulary"]
    if tokenizer is not None and vocabulary["fingerprint"] != tokenizer:
        raise UserError(
            f"{prepared} was prepared with the tokenizer {vocabulary['fingerprint']}, but the anchor's is {tokenizer}: "
            "prepare the text with the anchor's tokenizer"
        )
    if vocabulary["size"] > model.vocab_size:
        raise UserError(
            f"{prepared} was prepared with a tokenizer of {vocabulary['size']} ids, but the model has "
            f"{model.vocab_size}: set ModelConfig.vocab_size to at least that"
        )
    return vocabulary["fingerprint"]


def describe(text: Path, rows: TextRows, run: RunConfig) -> str:
    """A line for a banner."""
    return f"{text}, {len(rows):,} rows of {run.sequence_length} tokens, {rows.padding:.1%} padding"

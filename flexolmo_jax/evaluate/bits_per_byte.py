"""Held-out bits per byte: how many bits a model needs for each byte of text that it has not seen.

Axis legend: `B` rows, `S` positions, `E` experts.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from flexolmo_jax.data.packing import Packing, Rows
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate.selection import full_batches
from flexolmo_jax.infer import LanguageModel
from flexolmo_jax.products import jit_rows

BATCH_SIZE = 32


class Code(NamedTuple):
    """How long a text is when a model encodes it.

    Attributes:
      nats: sum of the negative log-likelihood of every target that counts, ends of text included.
      text_bytes: bytes of text that these targets stand for.
      tokens: all targets that count.
    """

    nats: float
    text_bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """`nats / ln 2 / text_bytes`."""
        return self.nats / math.log(2) / self.text_bytes


def score(
    model: LanguageModel,
    packing: Packing,
    *,
    experts: Sequence[str] | None = None,
    top_k: int | None = None,
    max_rows: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> Code:
    """Encodes a prepared split.

    A target counts where it continues its own document piece (`Rows.weights`): all of a piece but its first token. The
    end of text is scored, because the model has to predict it, but it is no text. So

        bits per byte = sum of -log2 p(target) over all targets that count / bytes of text that these targets stand for

    as for The Pile (arXiv 2101.00027, section 3.1), but for the tokens that begin a piece: nothing comes before them.
    Models with different tokenizers compare.
    Permitted experts are an argument of the compiled function, so another choice of them compiles nothing.

    Args:
      model: any loaded model.
      packing: rows of the split, prepared with the model's tokenizer.
      experts: names of the permitted experts; None permits all.
      top_k: experts per token; None means the model's own number.
      max_rows: read at most so many rows, evenly spaced; None reads all.
      batch_size: rows in a batch.

    Raises:
      UserError: the split is empty, an expert is unknown, `top_k` does not fit the model, the model has fewer ids than
        its tokenizer or does not carry it, or it gives values that are not finite.
    """
    bytes_of_ids = model.vocabulary.text_bytes()
    if model.config.vocab_size < len(bytes_of_ids):
        raise UserError(f"the model has {model.config.vocab_size} tokens, but its tokenizer {len(bytes_of_ids)}")
    top_k = model.check_top_k(top_k)
    permitted = model.permitted(model.names if experts is None else experts, batch_size)
    pending, text_bytes, tokens = [], 0, 0
    for rows in full_batches(packing, batch_size, max_rows):
        pending.append(_row_nats(model.build, top_k, model.params, rows, permitted))
        counts = rows.weights > 0
        text_bytes += int(np.sum(bytes_of_ids[rows.targets[counts]]))
        tokens += int(np.sum(counts))
    nats = float(np.sum(np.asarray(jax.device_get(pending), np.float64)))
    if not math.isfinite(nats):
        raise UserError("the model gives values that are not finite: its arrays are damaged or its training diverged")
    if not text_bytes:
        raise UserError("there is no held-out text to evaluate on: none of the documents has two bytes")
    return Code(nats, text_bytes, tokens)


def score_top_k(
    model: LanguageModel, domains: Mapping[str, Packing], *, max_rows: int | None = None, batch_size: int = BATCH_SIZE
) -> dict[int, dict[str, float]]:
    """Bits per byte of every domain, for every number of experts per token from 1 to all."""

    def bits(packing: Packing, k: int) -> float:
        return score(model, packing, top_k=k, max_rows=max_rows, batch_size=batch_size).bits_per_byte

    return {k: {name: bits(packing, k) for name, packing in domains.items()} for k in range(1, len(model.names) + 1)}


def best_top_k(table: Mapping[int, Mapping[str, float]]) -> int:
    """The number of experts with the lowest mean bits per byte over the domains; of equals, the smallest.

    Choose on validation text: a choice on test text would flatter the model.
    """
    return min(sorted(table), key=lambda k: sum(table[k].values()))


@functools.partial(jit_rows, static_argnums=(0, 1))
def _row_nats(build, top_k: int, params, rows: Rows, permitted: Bool[Array, "B E"]) -> Float[Array, "B"]:
    model = build(params)
    trace = model.trace(rows.inputs, rows.positions, rows.segments, permitted=permitted, top_k=top_k)
    logits = model.unembed(trace.hidden)
    target = jnp.take_along_axis(logits, rows.targets[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - target) * rows.weights, axis=-1)

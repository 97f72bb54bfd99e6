"""Who does the work: the share of a domain's tokens that each expert received, layer by layer.

Axis legend: `L` layers, `B` rows, `S` positions, `E` experts.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from flexolmo_jax.data.packing import Packing, Rows
from flexolmo_jax.evaluate.bits_per_byte import BATCH_SIZE
from flexolmo_jax.evaluate.selection import full_batches
from flexolmo_jax.infer import LanguageModel
from flexolmo_jax.products import jit_rows


class Shares(NamedTuple):
    """Mean over the tokens of a domain; every layer's shares sum to one, and a forbidden expert's are zero.

    Attributes:
      experts: names, in the order of the last axis.
      probability: [L, E], mean probability that the router gives each expert, a softmax over all permitted ones.
      top_1: [L, E], share of tokens whose most probable expert it is.
    """

    experts: tuple[str, ...]
    probability: Float[np.ndarray, "L E"]
    top_1: Float[np.ndarray, "L E"]

    def as_json(self) -> dict[str, Any]:
        """Names and nested lists, rounded to what a report needs."""
        return {
            "experts": list(self.experts),
            "probability": np.round(self.probability, 5).tolist(),
            "top_1": np.round(self.top_1, 5).tolist(),
        }


def shares(
    model: LanguageModel,
    packing: Packing,
    *,
    experts: Sequence[str] | None = None,
    top_k: int | None = None,
    max_rows: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> Shares:
    """Routes a prepared split and counts; the arguments and errors are those of `bits_per_byte.score`.

    Every token of a document counts, also its last. `top_k` matters: what a layer mixes is what the next one routes.
    """
    top_k = model.check_top_k(top_k)
    permitted = model.permitted(model.names if experts is None else experts, batch_size)
    pending, tokens = [], 0
    for rows in full_batches(packing, batch_size, max_rows):
        pending.append(_sums(model.build, top_k, model.params, rows, permitted))
        tokens += int(np.sum(rows.segments > 0))
    sums = np.sum(np.asarray(jax.device_get(pending), np.float64), axis=0)
    return Shares(model.names, sums[0] / tokens, sums[1] / tokens)


@functools.partial(jit_rows, static_argnums=(0, 1))
def _sums(build, top_k: int, params, rows: Rows, permitted: Bool[Array, "B E"]) -> Float[Array, "2 L E"]:
    """Sums over the tokens of a batch: of the probabilities, and of one for the most probable expert."""
    trace = build(params).trace(rows.inputs, rows.positions, rows.segments, permitted=permitted, top_k=top_k)
    struck = jnp.where(permitted[:, None, :], trace.routing.logits, -jnp.inf)
    probability = jax.nn.softmax(struck, axis=-1)
    top_1 = jax.nn.one_hot(jnp.argmax(struck, axis=-1), struck.shape[-1])
    counts = (rows.segments > 0).astype(jnp.float32)
    return jnp.einsum("ilbse,bs->ile", jnp.stack([probability, top_1]), counts)

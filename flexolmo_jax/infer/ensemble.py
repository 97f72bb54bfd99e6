"""Inference methods that the paper compares with: ensembles of whole models, and one expert per prompt.

Axis legend: `B` rows, `S` positions, `M` models, `V` vocabulary.

A merged model that permits one expert alone is the dense model of that owner, so both methods work on one merged model
and need no other weights. Branch-Train-Merge: arXiv 2208.03306 and 2303.14177.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flexolmo_jax.errors import UserError
from flexolmo_jax.infer.language_model import LanguageModel

Choose = Callable[[str], str]
"""From a prompt to the name of the expert that shall answer it."""


def prompt_nats(
    model: LanguageModel, ids: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, "B"]
) -> Float[Array, "B M"]:
    """Mean negative log-likelihood of each prompt under each expert alone, in the model's order.

    Args:
      model: a merged model.
      ids: prompts, padded on the right.
      lengths: length of each prompt; at least 2, since the first token is given.
    """
    if int(np.min(lengths)) < 2:
        raise UserError("a prompt needs at least 2 tokens to tell which expert knows it")
    counts = jnp.arange(1, ids.shape[1])[None] < jnp.asarray(lengths)[:, None]
    targets = jnp.asarray(ids)[:, 1:, None]

    def of(name: str) -> Float[Array, "B"]:
        logits = jax.nn.log_softmax(model(ids, experts=[name], top_k=1)[:, :-1])
        nats = -jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
        return jnp.sum(nats * counts, axis=-1) / jnp.sum(counts, axis=-1)

    return jnp.stack([of(name) for name in model.names], axis=-1)


def ensemble_weights(nats: Float[Array, "B M"], *, top_k: int, temperature: float = 1.0) -> Float[Array, "B M"]:
    """Weight of every model for every prompt: softmax(-L / temperature), the largest `top_k` of them, scaled to sum 1.

    Args:
      nats: negative log-likelihood of the prompts under the models (L).
      top_k: models that count.
      temperature: above 0.

    Raises:
      UserError: `top_k` or `temperature` is out of its range.
    """
    if not 1 <= top_k <= nats.shape[-1]:
        raise UserError(f"top_k is {top_k}, but there are {nats.shape[-1]} models")
    if temperature <= 0:
        raise UserError(f"the temperature is {temperature}, but must be above 0")
    weights = jax.nn.softmax(-nats / temperature, axis=-1)
    largest, chosen = jax.lax.top_k(weights, top_k)
    rows = jnp.arange(nats.shape[0])[:, None]
    return jnp.zeros_like(weights).at[rows, chosen].set(largest / jnp.sum(largest, axis=-1, keepdims=True))


def ensemble_log_probabilities(
    model: LanguageModel, ids: Int[np.ndarray, "B S"], weights: Float[Array, "B M"]
) -> Float[Array, "B S V"]:
    """Logarithm of the weighted mean of the experts' probabilities, each expert alone being one model of the ensemble.

    The paper's text mixes probabilities and its formula logits; this mixes probabilities, as Branch-Train-Merge does.
    """
    total = None
    for number, name in enumerate(model.names):
        scaled = jax.nn.log_softmax(model(ids, experts=[name], top_k=1)) + jnp.log(weights[:, number, None, None])
        total = scaled if total is None else jnp.logaddexp(total, scaled)
    return total


def likeliest_experts(
    model: LanguageModel, ids: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, "B"]
) -> list[list[str]]:
    """For each prompt the one expert that finds it least surprising, as `experts` for a call of the model."""
    return [[model.names[best]] for best in np.argmin(np.asarray(prompt_nats(model, ids, lengths)), axis=-1)]


def chosen_experts(model: LanguageModel, prompts: Sequence[str], choose: Choose) -> list[list[str]]:
    """For each prompt the one expert that `choose` names, as `experts` for a call of the model.

    The paper lets an instruction-tuned model read the prompt and name a domain; `choose` may be anything that does.

    Raises:
      UserError: it names an expert that the model does not have.
    """
    chosen = [choose(prompt) for prompt in prompts]
    if unknown := sorted(set(chosen) - set(model.names)):
        raise UserError(f"the model has no expert {unknown[0]!r}; it has {', '.join(model.names)}")
    return [[name] for name in chosen]

"""One optimizer step on the trainable part of a model, with the frozen part passed in beside it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flexolmo_jax.data.reading import Batch
from flexolmo_jax.model.partition import join
from flexolmo_jax.model.transformer import Build, Transformer
from flexolmo_jax.products import compiler_options

Weights = dict[str, jax.Array]
"""By the name of a part of the loss: [B, S], the weight of every token in it, over a whole batch."""

Weigh = Callable[[Batch], Weights]
Loss = Callable[[Transformer, Batch, Weights], tuple[jax.Array, dict[str, jax.Array]]]
"""From a model and a piece of a batch to the piece's part of the loss and of each metric: sums over weighted tokens."""

Constraint = Callable[[dict], dict]
"""Puts trainable parameters back into the set that they must lie in."""


Step = Callable[["TrainState", dict, Batch], tuple["TrainState", dict[str, jax.Array]]]
"""From (state, frozen parameters, batch) to the next state and the step's metrics."""


class TrainState(NamedTuple):
    """What training changes. A tree without the frozen part: that has no gradient and no optimizer state."""

    params: dict[str, Any]
    optimizer: optax.OptState


def jit_step(step: Step, state: TrainState) -> Callable:
    """The step, compiled at its first call: the new state takes the place of the old one, and lies where that lay.

    Args:
      step: what `make_step` returned.
      state: arrays, or `jax.ShapeDtypeStruct`s with shardings.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    # The devices are the state's: there may be no mesh in force yet, as there is when the step is traced.
    options = compiler_options(next(iter(jax.tree.leaves(shardings)[0].device_set)).platform)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def unconstrained(params: dict) -> dict:
    return params


def make_step(
    build: Build,
    weigh: Weigh,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    constrain: Constraint = unconstrained,
) -> Step:
    """A pure function from (state, frozen parameters, batch) to the next state and the step's metrics.

    Only `state.params` is differentiated, so no gradient of a frozen matrix is ever formed.

    Args:
      build: puts parameters into a model.
      weigh: weights of the tokens of a whole batch, so that pieces of it add up to the loss of the whole.
      loss: what a piece of the batch contributes.
      optimizer: its state belongs to the trainable parameters alone.
      accumulation: pieces that the batch is cut into, one after another; divides the batch size.
      constrain: applied to the parameters before the forward pass, so that their gradient respects it too, and after
        the update.
    """

    def total(params, frozen, batch, weights):
        return loss(build(join(constrain(params), frozen)), batch, weights)

    differentiate = jax.grad(total, has_aux=True)

    def step(state, frozen, batch):
        batch = batch, weigh(batch)
        if accumulation == 1:
            gradients, metrics = differentiate(state.params, frozen, *batch)
        else:
            # Row i goes to piece i mod accumulation, so that every device holds a part of every piece.
            pieces = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, accumulation, *a.shape[1:]), 1, 0), batch)
            shapes = jax.eval_shape(differentiate, state.params, frozen, *jax.tree.map(lambda a: a[0], pieces))
            zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

            def accumulate(sums, piece):
                return jax.tree.map(jnp.add, sums, differentiate(state.params, frozen, *piece)), None

            (gradients, metrics), _ = jax.lax.scan(accumulate, zero, pieces)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = constrain(optax.apply_updates(state.params, updates))
        return TrainState(params, optimizer_state), metrics | {"gradient_norm": optax.global_norm(gradients)}

    return step

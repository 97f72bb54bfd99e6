"""Rows of tokens sorted by the expert that they go to, there and back; both ways are gathers, backwards too.

Axis legend: `R = T * K` rows, one for each choice; otherwise see `flexolmo_jax.moe.api`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Rows(NamedTuple):
    """Which row belongs to which choice. Rows of no expert come last, and no group counts them.

    Attributes:
      choice: the choice behind each row, as `token * K + k`.
      of_choice: the row behind each choice, the inverse.
      sizes: rows of each expert.
    """

    choice: Int[Array, "R"]
    of_choice: Int[Array, "T K"]
    sizes: Int[Array, "E"]

    @property
    def token(self) -> Int[Array, "R"]:
        """The token behind each row."""
        return self.choice // self.of_choice.shape[1]


def sort_by_expert(choices: Int[Array, "T K"], experts: int) -> Rows:
    """Sorts all choices by expert, those of one expert by token."""
    flat = choices.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    of_choice = jnp.argsort(order).reshape(choices.shape)
    sizes = jnp.sum(flat[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return Rows(order, of_choice, sizes)


@jax.custom_vjp
def rows_of(x: Float[Array, "T D"], rows: Rows) -> Float[Array, "R D"]:
    """The token of every row."""
    return x[rows.token]


@jax.custom_vjp
def choices_of(y: Float[Array, "R D"], rows: Rows) -> Float[Array, "T K D"]:
    """The row of every choice."""
    return y[rows.of_choice]


def sum_of_choices(y: Float[Array, "R D"], rows: Rows) -> Float[Array, "T D"]:
    """The sum of a token's rows, in float32."""
    return sum((y[of_choice] for of_choice in jnp.unstack(rows.of_choice, axis=1)), jnp.zeros((), jnp.float32))


rows_of.defvjp(
    lambda x, rows: (rows_of(x, rows), rows),
    lambda rows, d: (sum_of_choices(d, rows).astype(d.dtype), None),
)
choices_of.defvjp(
    lambda y, rows: (choices_of(y, rows), rows),
    lambda rows, d: (d.reshape(-1, d.shape[-1])[rows.choice], None),
)

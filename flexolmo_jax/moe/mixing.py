"""What the experts of a token give, weighed and summed."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def weighted_sum(weights: Float[Array, "T K"], values: Sequence[Float[Array, "T _"]]) -> Float[Array, "T _"]:
    """`sum_k weights[:, k] * values[k]`, in the dtype of the weights.

    It is written out choice by choice. XLA on CPU would give a product of matrices, one row by `K` columns for every
    token, to oneDNN, which took a tenth of a forward pass for it, and a reduction over `K` to another library.
    """
    return sum((weights[:, k, None] * value for k, value in enumerate(values)), jnp.zeros((), weights.dtype))

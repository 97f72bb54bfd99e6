"""What the experts of a token give, weighed and summed."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def weighted_sum(weights: Float[Array, "T K"], values: Sequence[Float[Array, "T _"]]) -> Float[Array, "T _"]:
    """`sum_k weights[:, k] * values[k]`, in the dtype of the weights.

    It is written out choice by choice. As a product of matrices, one row by `K` columns for every token, or as a
    reduction over `K`, it would go to the libraries that XLA has on CPU, and take as long as a layer's attention.
    """
    return sum((weights[:, k, None] * value for k, value in enumerate(values)), jnp.zeros((), weights.dtype))

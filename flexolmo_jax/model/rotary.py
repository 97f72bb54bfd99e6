"""Rotary position embedding (arXiv 2104.09864), in the half-split layout that OLMo 2 and Hugging Face use."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_angles(positions: Int[Array, "B S"], head_width: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines, each float32 [B, S, 1, head_width // 2], of `position * theta ** (-2 i / head_width)`."""
    exponent = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    angles = positions[..., None, None].astype(jnp.float32) * theta**-exponent
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B S H C"], angles: tuple[Array, Array]) -> Float[Array, "B S H C"]:
    """Turns each pair `(x[i], x[i + C/2])` by its angle."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)

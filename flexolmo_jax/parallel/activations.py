"""Where activations lie: every device keeps its own rows, from the embedding to the head, and weights come to them."""

import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from flexolmo_jax.parallel.layouts import BATCH_AXES


def keep_rows(x: Array) -> Array:
    """`x`, its leading axis cut like the rows of a batch on the mesh that `jax.set_mesh` has set.

    Left to itself, XLA cuts the activations of a model whose weights are cut along its width the same way, and then
    sums them over all devices after every product: many times the traffic of gathering the weights. Rows that the mesh
    does not cut evenly stay as they are, and so does everything on a single device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2 or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def come_together(weight: Array, *axes: str | None) -> Array:
    """`weight`, gathered but for the mesh axes that cut each of its own: for one that a loop reads again and again."""
    mesh = jax.sharding.get_abstract_mesh()
    return weight if mesh.size < 2 else jax.lax.with_sharding_constraint(weight, PartitionSpec(*axes))

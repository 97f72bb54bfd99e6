"""The mesh of devices, and where parameters and batches lie on it."""

from flexolmo_jax.parallel.mesh import Layout, MeshConfig

__all__ = ["Layout", "MeshConfig"]

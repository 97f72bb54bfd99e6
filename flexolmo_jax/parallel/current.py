"""What a program that is being traced can know of the devices it is for."""

import jax


def mesh_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh in force, none if there is no mesh or it is a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if not mesh.empty and mesh.size > 1 else {}


def platform() -> str:
    """The kind of device that the program is traced for: "cpu", "gpu" or "tpu", also when compiled ahead of time."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()

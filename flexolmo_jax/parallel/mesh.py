"""The mesh of devices and where parameters and batches lie on it."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import LeafPath, flatten, unflatten

AXES = ("data", "fsdp", "expert", "tensor")
"""Batches are cut over the first three; parameters over the last three; `data` replicates."""

UNSHARDED_TOLERANCE = 0.02
"""Largest share of the parameters that may stay whole on every device of a layout that shards parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh's axes; their product is the number of devices.

    Attributes:
      data: replicas of the parameters; 0 means all devices that the other axes leave over.
      fsdp: pieces of every parameter, gathered when used.
      expert: pieces of the experts' parameters.
      tensor: pieces of heads and hidden units.
    """

    data: int = 0
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < (0 if axis == "data" else 1):
                raise UserError(f"MeshConfig.{axis} must be at least 1, but it is {getattr(self, axis)}")

    def build(self) -> "Layout":
        """The layout of this mesh over all devices of the job.

        Raises:
          UserError: the axes do not multiply to the number of devices.
        """
        devices = jax.devices()
        others = self.fsdp * self.expert * self.tensor
        data = self.data or max(1, len(devices) // others)
        if data * others != len(devices):
            raise UserError(
                f"the mesh data={data}, fsdp={self.fsdp}, expert={self.expert}, tensor={self.tensor} needs "
                f"{data * others} devices, but there are {len(devices)}"
            )
        shape = (data, self.fsdp, self.expert, self.tensor)
        return Layout(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices))


_HIDDEN = ("expert", "tensor")
_RULES: dict[str, PartitionSpec] = {
    "embed": PartitionSpec("tensor", "fsdp"),
    "head": PartitionSpec("fsdp", "tensor"),
    "q": PartitionSpec(None, "fsdp", "tensor"),
    "k": PartitionSpec(None, "fsdp", "tensor"),
    "v": PartitionSpec(None, "fsdp", "tensor"),
    "o": PartitionSpec(None, "tensor", "fsdp"),
    "gate": PartitionSpec(None, "fsdp", _HIDDEN),
    "up": PartitionSpec(None, "fsdp", _HIDDEN),
    "down": PartitionSpec(None, _HIDDEN, "fsdp"),
}
"""Which mesh axes cut which axis of a leaf, by the leaf's name; leaves that are not listed stay whole."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and what lies where on it."""

    mesh: Mesh

    def sharding(self, path: LeafPath, leaf: jax.ShapeDtypeStruct | jax.Array | np.ndarray) -> NamedSharding:
        """Where a parameter lies.

        Raises:
          UserError: an axis of the leaf is not a multiple of the mesh axes that cut it.
        """
        spec = _RULES.get(path[-1], PartitionSpec())
        for size, axes in zip(leaf.shape, spec, strict=False):
            pieces = self._pieces(axes)
            if size % pieces:
                raise UserError(
                    f"{'/'.join(path)} has an axis of {size}, which the mesh axes {axes} do not cut into {pieces}"
                )
        return NamedSharding(self.mesh, spec)

    def place(self, params: dict) -> dict:
        """Puts a tree of parameters onto the mesh.

        Raises:
          UserError: a parameter cannot be cut, or too much of the tree would stay whole.
        """
        flat = flatten(params)
        shardings = {path: self.sharding(path, leaf) for path, leaf in flat.items()}
        total = sum(leaf.size for leaf in flat.values())
        whole = sum(leaf.size for path, leaf in flat.items() if self._pieces(*shardings[path].spec) == 1)
        if self._pieces("fsdp", "expert", "tensor") > 1 and whole > UNSHARDED_TOLERANCE * total:
            raise UserError(
                f"{whole / total:.0%} of the parameters would stay whole on every device of {self.describe()}"
            )
        return unflatten({path: jax.device_put(leaf, shardings[path]) for path, leaf in flat.items()})

    def local_rows(self, batch_size: int) -> list[int]:
        """The rows of a batch that this process's own devices need, in order."""
        pieces = self._batch_sharding.addressable_devices_indices_map((batch_size,)).values()
        return sorted({row for (piece,) in pieces for row in range(*piece.indices(batch_size))})

    def place_batch(self, batch):
        """Puts a batch onto the mesh, its rows cut over the data, fsdp and expert axes.

        Every process gives the rows that `local_rows` names for it, and no row travels from one to another.
        """
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(self._batch_sharding, rows), batch)

    @property
    def _batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(("data", "fsdp", "expert")))

    def check_batch(self, rows: int) -> None:
        """Raises UserError unless so many rows can be cut over the mesh."""
        pieces = self._pieces("data", "fsdp", "expert")
        if rows % pieces:
            raise UserError(f"a (micro-)batch of {rows} rows cannot be cut over {pieces} devices of {self.describe()}")

    def describe(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())

    def _pieces(self, *axes) -> int:
        pieces = 1
        for axis in axes:
            for name in (axis,) if isinstance(axis, str) else axis or ():
                pieces *= self.mesh.shape[name]
        return pieces

"""The mesh of devices and where parameters and batches lie on it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flexolmo_jax.errors import UserError
from flexolmo_jax.parallel.layouts import AXES, BATCH_AXES, LAYOUTS, LEAVES, axes_that_cut

UNSHARDED_TOLERANCE = 0.02
"""Largest share of the parameters that may stay whole on every device of a layout that shards parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """A named layout and the sizes of the mesh's axes; their product is the number of devices.

    Attributes:
      layout: "replicated", "fsdp" or "fsdp_expert" (see `flexolmo_jax.parallel.layouts`).
      data: replicas of the parameters, over all slices; 0 means one per slice or, where `fsdp` is given or cuts
        nothing, all devices that the other axes leave over.
      fsdp: pieces of every matrix, gathered when used; 0 means all devices that the other axes leave over.
      expert: pieces of the experts' hidden units, between which tokens travel.
      tensor: pieces of heads and hidden units.
    """

    layout: str = "replicated"
    data: int = 0
    fsdp: int = 0
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise UserError(f"MeshConfig.layout is {self.layout!r}, but the layouts are {', '.join(LAYOUTS)}")
        for axis in AXES:
            size, least = getattr(self, axis), 0 if axis in ("data", "fsdp") else 1
            if size < least:
                raise UserError(f"MeshConfig.{axis} must be at least {least}, but it is {size}")
            if axis != "data" and size > 1 and axis not in axes_that_cut(self.layout):
                raise UserError(f"MeshConfig.{axis} is {size}, but the layout {self.layout} cuts nothing over {axis}")

    def build(self, devices: Sequence[Any] | None = None) -> "Layout":
        """The layout of this mesh over these devices, or over all devices of the job.

        Devices of several slices are arranged so that only the axis `data` crosses from slice to slice.

        Raises:
          UserError: the axes do not multiply to the number of devices, or `data` is not a multiple of the slices.
        """
        devices = jax.devices() if devices is None else devices
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        shape = self.sizes(len(devices), slices)
        if slices > 1:
            within, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
            arranged = mesh_utils.create_hybrid_device_mesh(within, across, devices)
        else:
            arranged = mesh_utils.create_device_mesh(shape, devices)
        return Layout(self.layout, Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES)))

    def sizes(self, devices: int, slices: int = 1) -> tuple[int, int, int, int]:
        """Sizes of all axes on so many devices, zeros replaced by what is left over.

        Raises:
          UserError: the axes do not multiply to the number of devices, or `data` is not a multiple of the slices.
        """
        shape = (*self._filled(devices, slices), self.expert, self.tensor)
        if math.prod(shape) != devices:
            raise UserError(
                f"the mesh {', '.join(f'{axis}={size}' for axis, size in zip(AXES, shape, strict=True))} needs "
                f"{math.prod(shape)} devices, but there are {devices}"
            )
        if shape[0] % slices:
            raise UserError(f"MeshConfig.data is {shape[0]}, but must be a multiple of the {slices} slices")
        return shape

    def _filled(self, devices: int, slices: int) -> tuple[int, int]:
        others = self.expert * self.tensor
        if "fsdp" not in axes_that_cut(self.layout) or self.fsdp:
            fsdp = self.fsdp or 1
            return self.data or max(1, devices // (fsdp * others)), fsdp
        data = self.data or slices
        return data, max(1, devices // (data * others))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and what lies where on it.

    The axes are of type Auto: XLA derives where activations lie from where parameters and batches do. With explicit
    types every product whose operands are cut would have to say where its result lies, so that the blocks, which also
    run row by row and without any mesh, would be written for the mesh. What must not be left to XLA, the experts, runs
    under `jax.shard_map` (see `flexolmo_jax.moe`).
    """

    name: str
    mesh: Mesh | AbstractMesh

    def active(self) -> AbstractContextManager:
        """A context in which this mesh is the current one, as the layers and constraints under it read it."""
        if isinstance(self.mesh, AbstractMesh):
            return jax.sharding.use_abstract_mesh(self.mesh)
        return jax.set_mesh(self.mesh)

    def shardings(self, tree: Any) -> Any:
        """Where the arrays of a tree lie: parameters, or an optimizer state whose leaves are named like parameters.

        Raises:
          UserError: an axis of a leaf is not a multiple of the mesh axes that cut it.
        """
        return jax.tree_util.tree_map_with_path(self._sharding, tree)

    def check(self, params: Any) -> None:
        """Raises UserError if too much of a whole model would stay whole on every device, though the mesh cuts it."""
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
        shardings = jax.tree.leaves(self.shardings(params))
        whole = sum(size for size, at in zip(sizes, shardings, strict=True) if self._pieces(*at.spec) == 1)
        if self._pieces("fsdp", "expert", "tensor") > 1 and whole > UNSHARDED_TOLERANCE * sum(sizes):
            raise UserError(
                f"{whole / sum(sizes):.0%} of the parameters would stay whole on every device of {self.describe()}"
            )

    def place(self, tree: Any) -> Any:
        """Puts a tree of arrays onto the mesh.

        Raises:
          UserError: see `shardings`.
        """
        return jax.tree.map(jax.device_put, tree, self.shardings(tree))

    def create(self, function: Callable, *args) -> Any:
        """What `function(*args)` returns, each array created where it lies: no device ever holds all of it."""
        return jax.jit(function, out_shardings=self.shardings(jax.eval_shape(function, *args)))(*args)

    def batch_sharding(self) -> NamedSharding:
        """Where a batch lies: its rows are cut over the data, fsdp and expert axes."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def local_rows(self, batch_size: int) -> list[int]:
        """The rows of a batch that this process's own devices need, in order."""
        pieces = self.batch_sharding().addressable_devices_indices_map((batch_size,)).values()
        return sorted({row for piece in pieces if piece for row in range(*piece[0].indices(batch_size))})

    def place_batch(self, batch):
        """Puts a batch onto the mesh, its rows cut over the data, fsdp and expert axes.

        Every process gives the rows that `local_rows` names for it, and no row travels from one to another.
        """
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(self.batch_sharding(), rows), batch)

    def check_batch(self, rows: int) -> None:
        """Raises UserError unless so many rows can be cut over the mesh."""
        pieces = self._pieces(*BATCH_AXES)
        if rows % pieces:
            raise UserError(f"a (micro-)batch of {rows} rows cannot be cut over {pieces} devices of {self.describe()}")

    def describe(self) -> str:
        return f"{self.name}, {' x '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items())}"

    def _sharding(self, path: tuple, leaf: jax.ShapeDtypeStruct | jax.Array | np.ndarray) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        rules = LAYOUTS[self.name]
        meanings = LEAVES.get(names[-1], ()) if names and leaf.ndim else ()
        spec = PartitionSpec(*(rules.get(meaning) for meaning in meanings))
        for size, axes in zip(leaf.shape, spec, strict=False):
            if size % self._pieces(axes):
                raise UserError(
                    f"{'/'.join(names)} has an axis of {size}, which the mesh axes {axes} do not cut into "
                    f"{self._pieces(axes)}"
                )
        return NamedSharding(self.mesh, spec)

    def _pieces(self, *axes) -> int:
        names = [name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis or ())]
        return math.prod(self.mesh.shape[name] for name in names)

"""The axes of the mesh and the three named layouts: one table from what an axis of an array means to mesh axes.

This is the ground floor: nothing here knows the model, but for the names of the axes of its leaves.
"""

AXES = ("data", "fsdp", "expert", "tensor")
"""Axes of every mesh. Between slices of a multi-slice job, over the data-centre network, only `data` runs."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Axes that the rows of a batch are cut over, in every layout."""

LEAVES = {
    "embed": ("vocabulary", "width"),
    "head": ("width", "vocabulary"),
    "q": ("layer", "width", "heads"),
    "k": ("layer", "width", "heads"),
    "v": ("layer", "width", "heads"),
    "o": ("layer", "heads", "width"),
    "gate": ("layer", "width", "hidden"),
    "up": ("layer", "width", "hidden"),
    "down": ("layer", "hidden", "width"),
}
"""What each axis of a leaf means, by the leaf's name. Leaves that are not listed are vectors and lie whole."""

Rules = dict[str, str | tuple[str, ...]]
"""By the meaning of an array's axis: the mesh axes that cut it."""

_FSDP: Rules = {"width": "fsdp", "vocabulary": "tensor", "heads": "tensor", "hidden": "tensor"}

LAYOUTS: dict[str, Rules] = {
    "replicated": {},
    "fsdp": _FSDP,
    "fsdp_expert": _FSDP | {"hidden": ("expert", "tensor")},
}
"""The named layouts.

- `replicated`: every device holds all parameters.
- `fsdp`: every matrix is cut along the model's width, and gathered layer by layer when it is used.
- `fsdp_expert`: the same, and the experts' hidden units are cut over `expert` as well. These pieces stay where they
  are: the tokens travel, not the weights (see `flexolmo_jax.moe.ring`). Every device holds a piece of every expert, so
  the number of experts need not fit the axis, and neither an unpopular nor a frozen expert leaves a device idle.
"""


def axes_that_cut(layout: str) -> set[str]:
    """The mesh axes that cut parameters in this layout."""
    return {axis for axes in LAYOUTS[layout].values() for axis in ((axes,) if isinstance(axes, str) else axes)}

"""Expert parallelism by sending each row to its expert: `ragged_all_to_all`, on TPU and GPU.

Whole experts lie on the devices of the mesh axis `expert`, each expert on as many devices as fit where there are fewer
experts than devices. The layout at rest cuts hidden units (see `flexolmo_jax.parallel.layouts`), so the weights are
first exchanged: each device gives away most of its pieces and receives the rest of its own experts.

No row is ever dropped, because every device has room for all rows that could come to it: `min(EP, E / K)` times as many
as in a balanced exchange over `EP` devices. That is little for FlexOlmo's shapes, 1.4 for 5 of 7 experts.

Axis legend: `P` devices of the axis, `V` places for experts on all of them; otherwise see `flexolmo_jax.moe.sorting`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexolmo_jax.moe import grouped
from flexolmo_jax.moe.across_devices import with_own_weights
from flexolmo_jax.moe.mixing import weighted_sum
from flexolmo_jax.moe.sorting import choices_of, rows_of, sort_by_expert
from flexolmo_jax.parallel.current import mesh_axes, platform


def mix_experts(
    x: Float[Array, "T D"],
    probabilities: Float[Array, "T K"],
    choices: Int[Array, "T K"],
    experts: Sequence,
) -> Float[Array, "T D"]:
    if mesh_axes().get("expert", 1) == 1:
        raise ValueError("ragged needs a mesh whose axis `expert` is larger than 1; set it with jax.set_mesh")
    if platform() == "cpu":
        raise ValueError("ragged needs a TPU or a GPU: XLA has no ragged_all_to_all for CPU")
    return with_own_weights(mix_local, (x, probabilities, choices), experts)


def mix_local(
    x: Float[Array, "T D"],
    probabilities: Float[Array, "T K"],
    choices: Int[Array, "T K"],
    experts: Sequence,
) -> Float[Array, "T D"]:
    """What one device does, its experts' hidden units cut over the axis."""
    devices = jax.lax.axis_size("expert")
    copies = max(1, devices // len(experts))
    here = -(-len(experts) * copies // devices)
    kinds = zip(zip(*experts, strict=True), (2, 2, 1), strict=True)
    weights = [_whole_experts(pieces, copies, here * devices, hidden) for pieces, hidden in kinds]

    # Copies of an expert take turns among a device's tokens. Choices of no expert go nowhere.
    turn = jnp.arange(len(x))[:, None] % copies
    places = jnp.where(choices < len(experts), choices * copies + turn, here * devices)
    rows = sort_by_expert(places, here * devices)
    sizes = jax.lax.all_gather(rows.sizes, "expert").reshape(devices, devices, here)
    room = devices * -(-len(x) // copies) * min(choices.shape[1], here)
    arrived, back = _exchange(rows_of(x, rows), sizes, room)

    mine = sizes[:, jax.lax.axis_index("expert")].reshape(-1)
    of_row = jnp.repeat(jnp.tile(jnp.arange(here), devices), mine, total_repeat_length=room)
    of_row = jnp.where(jnp.arange(room) < jnp.sum(mine), of_row, here)
    ones = jnp.ones((room, 1), probabilities.dtype)
    found = grouped.mix_local(arrived, ones, of_row[:, None], [tuple(w[i] for w in weights) for i in range(here)])

    y = choices_of(back(found), rows)
    there = (choices < len(experts))[..., None]
    return weighted_sum(probabilities, jnp.unstack(jnp.where(there, y, 0), axis=1)).astype(x.dtype)


def _whole_experts(pieces: Sequence[Array], copies: int, places: int, hidden: int) -> Float[Array, "V _ _"]:
    """The whole weights of the experts that have their place here, from every device's pieces of all experts."""
    stacked = jnp.repeat(jnp.stack(pieces), copies, axis=0)
    stacked = jnp.pad(stacked, [(0, places - len(stacked)), (0, 0), (0, 0)])
    return jax.lax.all_to_all(stacked, "expert", split_axis=0, concat_axis=hidden, tiled=True)


def _exchange(rows: Float[Array, "R D"], sizes: Int[Array, "P P V"], room: int):
    """Sends sorted rows to their experts' devices.

    Args:
      rows: what this device sends, sorted by place.
      sizes: [sender, receiver, place at the receiver], rows that travel.
      room: rows that can arrive.

    Returns:
      The rows that arrived, sorted by sender and then by place, and the function that sends such rows back.
    """
    me = jax.lax.axis_index("expert")
    travelling = jnp.sum(sizes, axis=2)
    begins = jnp.cumsum(travelling, axis=1) - travelling  # where a sender's rows for each receiver begin, at home
    arrives = jnp.cumsum(travelling, axis=0) - travelling  # where they begin at the receiver

    there = jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros((room, rows.shape[1]), rows.dtype),
        begins[me],
        travelling[me],
        arrives[me],
        travelling[:, me],
        axis_name="expert",
    )

    def back(found):
        return jax.lax.ragged_all_to_all(
            found,
            jnp.zeros(rows.shape, found.dtype),
            arrives[:, me],
            travelling[:, me],
            begins[:, me],
            travelling[me],
            axis_name="expert",
        )

    return there, back

"""How the experts are evaluated on a mesh: every device its own tokens, or every device its own piece of the experts.

Both run under `jax.shard_map`, on the mesh that `jax.set_mesh` has set, so that no collective is left to chance.
Weights arrive as the layouts of `flexolmo_jax.parallel.layouts` cut them: along the width over `fsdp`, along the hidden
units over `expert` and `tensor`. Which hidden units a device holds does not matter, if all three matrices agree.

Axis legend: see `flexolmo_jax.moe.api`; here `T` counts the tokens of all devices.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from flexolmo_jax.parallel.current import mesh_axes
from flexolmo_jax.parallel.layouts import BATCH_AXES

_GATHERED = "gathered expert weights"
_TOKENS = PartitionSpec(BATCH_AXES)
_IN, _OUT = PartitionSpec("fsdp", ("expert", "tensor")), PartitionSpec(("expert", "tensor"), "fsdp")

Local = Callable[..., Any]
"""From tokens and experts that a device has to [T, D], or a pytree of such: sums over the device's hidden units."""


def with_gathered_weights(local: Local, tokens: tuple[Shaped[Array, "T _"], ...], experts: Sequence) -> Any:
    """`local(*tokens, experts)` where every device gathers the weights, over `fsdp` and `expert`, for its tokens."""
    return _spread(lambda tokens, experts: local(*tokens, experts), ("fsdp", "expert"), tokens, experts)


def with_gathered_tokens(local: Local, tokens: tuple[Shaped[Array, "T _"], ...], experts: Sequence) -> Any:
    """`local(*tokens, experts)` where the devices of an `expert` axis show each other their tokens.

    Each evaluates its own hidden units of every expert on all of these tokens, and the sums are handed back, cut again
    by tokens: an all-gather and a reduce-scatter. Both are as large as the tokens, however the router decides.
    """

    def exchange(tokens, experts):
        shown = jax.tree.map(lambda a: jax.lax.all_gather(a, "expert", tiled=True), tokens)
        found = local(*shown, experts)
        return jax.tree.map(lambda a: jax.lax.psum_scatter(a, "expert", tiled=True), found)

    return _spread(exchange, ("fsdp",), tokens, experts)


def with_own_weights(local: Local, tokens: tuple[Shaped[Array, "T _"], ...], experts: Sequence) -> Any:
    """`local(*tokens, experts)` where every device has its own tokens and its own hidden units, and does the rest."""
    return _spread(lambda tokens, experts: local(*tokens, experts), ("fsdp",), tokens, experts)


def _spread(body: Callable, gathered: tuple[str, ...], tokens: tuple, experts: Sequence) -> Any:
    axes = mesh_axes()
    count, pieces = tokens[0].shape[0], math.prod(axes[axis] for axis in BATCH_AXES)
    missing = -count % pieces
    if missing:
        tokens = jax.tree.map(functools.partial(_with_padding, rows=missing, no_expert=len(experts)), tokens)

    def gather(weight, width: int):
        for axis, dimension in (("fsdp", width), ("expert", 1 - width)):
            if axis in gathered and axes[axis] > 1:
                weight = jax.lax.all_gather(weight, axis, axis=dimension, tiled=True)
        return checkpoint_name(weight, _GATHERED)

    # Gathered weights are not kept for the backward pass: it gathers them again.
    policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def on_a_device(tokens, experts):
        dtype = tokens[0].dtype
        whole = [
            type(expert)(*(gather(w.astype(dtype), width) for w, width in zip(expert, (0, 0, 1), strict=True)))
            for expert in experts
        ]
        return jax.tree.map(lambda a: jax.lax.psum(a, "tensor"), body(tokens, whole))

    specs = [type(expert)(_IN, _IN, _OUT) for expert in experts]
    # The kernels of `flexolmo_jax.moe.kernels` do not say over which axes their results vary, so this is not checked.
    spread = jax.shard_map(on_a_device, in_specs=(_TOKENS, specs), out_specs=_TOKENS, check_vma=False)
    found = spread(tokens, list(experts))
    return jax.tree.map(lambda a: a[:count], found) if missing else found


def _with_padding(a: Shaped[Array, "T _"], rows: int, no_expert: int) -> Shaped[Array, "_ _"]:
    """More rows: of zeros, or of choices of no expert, as `ragged` has no room for so many that choose the same one."""
    return jnp.pad(a, ((0, rows), (0, 0)), constant_values=no_expert if jnp.issubdtype(a.dtype, jnp.integer) else 0)

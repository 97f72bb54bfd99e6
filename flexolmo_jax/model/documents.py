"""Attention within packed documents: every position attends to itself and to those before it in its own document.

One function for each way to compute it, and one that takes the best of them for the devices and shapes at hand:

  splash  on TPU: the Pallas kernel that comes with JAX. Scores never leave the chip's own memory, and blocks of keys
          that come after all queries are passed over.
  fused   on GPU, in 16 bits: cuDNN's kernel.
  blocks  anywhere: XLA's products, in blocks of queries.

Axis legend: `B` rows, `S` positions, `H` query heads, `G` key/value heads, `C` width of a head.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.parallel.current import mesh_axes, platform
from flexolmo_jax.parallel.layouts import BATCH_AXES

Attend = Callable[..., Float[Array, "B S H C"]]

QUERIES_AT_ONCE = 512
"""Longer rows are attended in blocks of so many queries, so that no block meets keys that come after all of it."""

LANES = 128
"""Of a TPU: positions and the width of a head come in multiples of it in `splash`."""


def attend_documents(
    q: Float[Array, "B S H C"], k: Float[Array, "B S G C"], v: Float[Array, "B S G C"], segments: Int[Array, "B S"]
) -> Float[Array, "B S H C"]:
    """Attends in the best way for the devices that the program is traced for.

    Args:
      q: queries.
      k: keys.
      v: values.
      segments: number of the document that each position belongs to.
    """
    return best_way(q.shape, q.dtype)(q, k, v, segments)


def best_way(shape: tuple[int, int, int, int], dtype: DTypeLike) -> Attend:
    """`splash` or `fused` where it runs and takes such queries, `blocks` elsewhere; `shape` is [B, S, H, C]."""
    rows, length, _, width = shape
    axes = mesh_axes()
    if platform() == "tpu" and not length % LANES and not width % LANES and not rows % _pieces(axes):
        return splash
    if platform() == "gpu" and jnp.dtype(dtype).itemsize == 2:
        return fused
    return blocks


def splash(q, k, v, segments, *, interpret: bool = False) -> Float[Array, "B S H C"]:
    """The Pallas kernel for TPU, on every device for its own rows and heads.

    With `interpret`, it is emulated on any other device.
    """
    scaled = q * q.shape[-1] ** -0.5

    def of_device(q, k, v, segments):
        heads, length = q.shape[2], q.shape[1]
        block = math.gcd(length, QUERIES_AT_ONCE)
        attend = kernel.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
            block_sizes=kernel.BlockSizes(**dict.fromkeys(_SIZES, block)),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        inwards = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        mixed = jax.vmap(attend)(*inwards, kernel.SegmentIds(segments, segments))
        return jnp.swapaxes(mixed, 1, 2)

    if mesh_axes():
        rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, "tensor")
        # The kernel does not say over which axes its result varies.
        of_device = jax.shard_map(of_device, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return of_device(scaled, k, v, segments)


_SIZES = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)


def fused(q, k, v, segments) -> Float[Array, "B S H C"]:
    """cuDNN's kernel for GPU, for float16 and bfloat16. Not yet measured."""
    return jax.nn.dot_product_attention(q, k, v, mask=document_mask(segments, 0), implementation="cudnn")


def blocks(q, k, v, segments) -> Float[Array, "B S H C"]:
    """Products of blocks of queries with all keys up to the block's end.

    With `n` blocks that takes `(n + 1) / 2n` of the products that all pairs of positions would.
    """
    length = segments.shape[1]
    block = length if length % QUERIES_AT_ONCE else QUERIES_AT_ONCE
    return jnp.concatenate(
        [
            jax.nn.dot_product_attention(
                q[:, end - block : end], k[:, :end], v[:, :end], mask=document_mask(segments[:, :end], end - block)
            )
            for end in range(block, length + 1, block)
        ],
        axis=1,
    )


def document_mask(segments: Int[Array, "B T"], begin: int) -> Bool[Array, "B 1 Q T"]:
    """True where a query, one of the positions from `begin` on, may look at a key.

    That is a key that is not later than itself, in the same document.
    """
    positions = jnp.arange(segments.shape[1])
    causal = positions[begin:, None] >= positions[None, :]
    same = segments[:, begin:, None] == segments[:, None, :]
    return (causal & same)[:, None]


def _pieces(axes: dict[str, int]) -> int:
    return math.prod(axes.get(axis, 1) for axis in BATCH_AXES)

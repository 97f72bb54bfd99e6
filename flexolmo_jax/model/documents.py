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
from jaxtyping import Array, Float, Int

from flexolmo_jax.model import attention_blocks
from flexolmo_jax.parallel.current import mesh_axes, platform
from flexolmo_jax.parallel.layouts import BATCH_AXES

Attend = Callable[..., Float[Array, "B S H C"]]

SPLASH_BLOCK = 512
"""Queries, and keys, that `splash` works on at once."""

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


def best_way(shape: tuple[int, ...], dtype: DTypeLike) -> Attend:
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
        attend = kernel.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
            block_sizes=_blocks_of(math.gcd(length, SPLASH_BLOCK)),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=attention_blocks.KEPT,
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


def _blocks_of(size: int) -> kernel.BlockSizes:
    """The same size for every block of the forward and both backward kernels."""
    return kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def fused(q, k, v, segments) -> Float[Array, "B S H C"]:
    """cuDNN's kernel for GPU, for float16 and bfloat16. Not yet measured."""
    return jax.nn.dot_product_attention(
        q, k, v, mask=attention_blocks.document_mask(segments, 0), implementation="cudnn"
    )


def blocks(q, k, v, segments) -> Float[Array, "B S H C"]:
    """XLA's products, in blocks of queries."""
    rows, length, heads, width = q.shape
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * width**-0.5, k, v))
    mixed = attention_blocks.attend(q.reshape(rows, k.shape[1], -1, length, width), k, v, segments)
    return jnp.swapaxes(mixed.reshape(rows, heads, length, width), 1, 2)


def _pieces(axes: dict[str, int]) -> int:
    return math.prod(axes.get(axis, 1) for axis in BATCH_AXES)

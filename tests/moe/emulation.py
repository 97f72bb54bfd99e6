"""The kernels of accelerators, emulated on CPU, so that `grouped` runs as it does there."""

import functools

import jax
import pytest
import tokamax
from absl import flags
from jax.experimental import pallas
from tokamax._src.pallas import block

from flexolmo_jax.moe import grouped, kernels


def as_on_tpu(patch: pytest.MonkeyPatch) -> None:
    """`ragged_dot` as XLA has it on CPU, and megablox's kernel interpreted."""
    patch.setattr(kernels, "platform", lambda: "tpu")
    patch.setattr(kernels, "TILE", 16)
    patch.setattr(kernels, "tgmm", functools.partial(kernels.tgmm, interpret=True))
    patch.setattr(grouped, "_products", lambda: kernels)


def as_on_gpu(patch: pytest.MonkeyPatch) -> None:
    """tokamax's own Triton kernels, interpreted."""
    patch.setattr(kernels, "platform", lambda: "gpu")
    patch.setattr(grouped, "_products", lambda: kernels)
    compiled, ids = pallas.pallas_call, block._pids

    def interpreted(kernel, *arguments, **options):
        def begin(*refs):
            # The interpreter knows the place in the grid at the top of a kernel only, and tokamax asks within loops.
            here = ids()
            patch.setattr(block, "_pids", lambda: here)
            return kernel(*refs)

        return compiled(begin, *arguments, interpret=True, **options)

    patch.setattr(pallas, "pallas_call", interpreted)
    whatever_the_device(patch)


def whatever_the_device(patch: pytest.MonkeyPatch) -> None:
    """Lets tokamax give its kernels for a GPU to programs that are traced without one."""
    flags.FLAGS.mark_as_parsed()
    asked = tokamax.ragged_dot_general

    def cross_compiled(*arguments, **options):
        with tokamax.config.cross_compile(True):
            return asked(*arguments, **options)

    patch.setattr(tokamax, "ragged_dot_general", cross_compiled)
    jax.clear_caches()

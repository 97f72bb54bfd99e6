"""Looks for the fastest way to run a job that fits: formulas put the ways in order, and the compiler decides.

A way that does not fit shows how far the formula of the memory is off, which depends on the remat policy most of all:
by that the others of the same policy are judged before they are compiled.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.transformer import REMAT_POLICIES
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.parallel.layouts import LAYOUTS, axes_that_cut
from flexolmo_jax.plan.jobs import TRAINING, Job
from flexolmo_jax.plan.report import Plan

TRIES = 6
"""Programs compiled at most; each takes minutes."""

LARGER_BATCHES = 4
"""Doublings of an inference batch that are looked at."""

DOUBT = 1.5
"""An estimate of the memory may be so many times too large; until one is compiled, what needs more is passed over."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A job with the settings that a search may change, and the mesh that it runs on."""

    job: Job
    mesh: MeshConfig


def search(
    job: Job,
    mesh: MeshConfig,
    devices: int,
    by_formulas: Callable[[Way], Plan],
    by_compiling: Callable[[Way], Plan] | None,
) -> list[Plan]:
    """Plans in the order they were tried; the last one fits.

    Args:
      job: with the batch that training must have, whatever its accumulation, or that inference has at least.
      mesh: whose axis `tensor` is kept; layouts and the other axes are tried.
      devices: of the topology.
      by_formulas: plans a way by formulas alone.
      by_compiling: compiles it; None where there is nothing to compile for, and formulas decide.

    Raises:
      UserError: nothing that was tried fits.
    """
    ways: dict[Way, Plan] = {}
    refusal = None
    for way in candidates(job, mesh, devices):
        try:
            ways[way] = by_formulas(way)
        except UserError as error:  # a batch or a matrix that this mesh cannot cut
            refusal = error
    if refusal and not ways:
        raise refusal
    tried: list[Plan] = []
    # By remat policy: true bytes over the formula's.
    off: dict[str, float] = defaultdict(lambda: 1 / DOUBT if by_compiling else 1.0)
    for way, plan in sorted(ways.items(), key=lambda item: item[1].step_seconds / item[0].job.tokens):
        remat = way.job.run.remat
        if len(tried) == TRIES or plan.memory.needed * off[remat] > plan.memory.available:
            continue
        tried.append(by_compiling(way) if by_compiling else plan)
        if tried[-1].fits:
            return tried
        off[remat] = tried[-1].memory.needed / plan.memory.needed
    raise UserError(
        f"no way to run {job.kind} with {job.run.batch_size} rows was found to fit among {len(ways)}, of which "
        f"{len(tried)} were compiled: take a larger topology, shorter rows or a smaller batch"
    )


def candidates(job: Job, mesh: MeshConfig, devices: int) -> Iterator[Way]:
    """Every layout, mesh, remat policy and size of batch that a search looks at."""
    for arranged in meshes(mesh.tensor, devices):
        if job.kind in TRAINING:
            for accumulation in (each for each in _powers_of_two(job.run.batch_size)):
                if job.run.batch_size % accumulation == 0:
                    for remat in REMAT_POLICIES:
                        run = dataclasses.replace(job.run, accumulation=accumulation, remat=remat)
                        yield Way(dataclasses.replace(job, run=run), arranged)
        else:
            for doublings in range(LARGER_BATCHES + 1):
                run = dataclasses.replace(job.run, batch_size=job.run.batch_size * 2**doublings)
                yield Way(dataclasses.replace(job, run=run), arranged)


def meshes(tensor: int, devices: int) -> Iterator[MeshConfig]:
    """The layouts in every arrangement whose axes are powers of two, but for those that another layout has already."""
    for layout in LAYOUTS:
        cuts = axes_that_cut(layout)
        if tensor > 1 and "tensor" not in cuts:
            continue
        for fsdp in _powers_of_two(devices) if "fsdp" in cuts else (1,):
            # Without devices to show tokens to, `fsdp_expert` is `fsdp`.
            for expert in list(_powers_of_two(devices))[1:] if "expert" in cuts else (1,):
                others = fsdp * expert * tensor
                if devices % others == 0 and not (layout == "fsdp" and others == 1):
                    yield MeshConfig(layout=layout, data=devices // others, fsdp=fsdp, expert=expert, tensor=tensor)


def _powers_of_two(limit: int) -> Iterator[int]:
    power = 1
    while power <= limit:
        yield power
        power *= 2

"""Looks for the fastest way to run a job that fits: formulas put the ways in order, and the compiler decides.

What needs more by formula than a way that did not fit is passed over.
"""

import dataclasses
from collections.abc import Callable, Iterator

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.transformer import REMAT_POLICIES
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.plan.jobs import TRAINING, Job
from flexolmo_jax.plan.report import Plan

TRIES = 6
"""Programs compiled at most; each takes minutes."""

LARGER_BATCHES = 4
"""Doublings of an inference batch that are looked at."""

DOUBT = 1.5
"""An estimate of the memory may be so many times too large; what needs more by formula is not compiled."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A job with the settings that a search may change, and the mesh that it runs on."""

    job: Job
    mesh: MeshConfig


def search(
    job: Job, mesh: MeshConfig, devices: int, by_formulas: Callable[[Way], Plan], by_compiling: Callable[[Way], Plan]
) -> list[Plan]:
    """Plans that were compiled, in the order they were tried; the last one fits.

    Args:
      job: with the batch that training must have, whatever its accumulation, or that inference has at least.
      mesh: whose layout, `expert` and `tensor` axes are kept; `data` and `fsdp` are tried.
      devices: of the topology.
      by_formulas: plans a way by formulas alone.
      by_compiling: compiles it.

    Raises:
      UserError: nothing that was tried fits.
    """
    ways: dict[Way, Plan] = {}
    for way in candidates(job, mesh, devices):
        try:
            plan = by_formulas(way)
        except UserError:  # a batch or a matrix that this mesh cannot cut
            continue
        if plan.memory.needed <= DOUBT * plan.memory.available:
            ways[way] = plan
    tried: list[Plan] = []
    too_much = float("inf")
    for way, plan in sorted(ways.items(), key=lambda item: item[1].step_seconds / item[0].job.tokens):
        if len(tried) == TRIES or plan.memory.needed >= too_much:
            continue
        tried.append(by_compiling(way))
        if tried[-1].fits:
            return tried
        too_much = plan.memory.needed
    raise UserError(
        f"no way to run {job.kind} with {job.run.batch_size} rows was found to fit, {len(tried)} of {len(ways)} that "
        "might having been compiled: take a larger topology, shorter rows or a smaller batch"
    )


def candidates(job: Job, mesh: MeshConfig, devices: int) -> Iterator[Way]:
    """Every mesh, remat policy and size of batch that a search looks at."""
    others = mesh.expert * mesh.tensor
    for pieces in (pieces for pieces in _powers_of_two(devices) if devices % (pieces * others) == 0):
        if mesh.layout == "replicated" and pieces > 1:
            continue
        arranged = dataclasses.replace(mesh, data=devices // (pieces * others), fsdp=pieces)
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


def _powers_of_two(limit: int) -> Iterator[int]:
    power = 1
    while power <= limit:
        yield power
        power *= 2

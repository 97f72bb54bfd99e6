"""`flexolmo plan`: what a job needs on a topology, before anybody pays for it."""

import functools
import json
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from flexolmo_jax import terminal
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import ModelConfig
from flexolmo_jax.parallel import Layout, MeshConfig
from flexolmo_jax.parallel.layouts import AXES
from flexolmo_jax.plan.chips import Topology, parse_topology
from flexolmo_jax.plan.compilation import compile_program, tpu_devices
from flexolmo_jax.plan.jobs import Job, experts_of
from flexolmo_jax.plan.picture import draw
from flexolmo_jax.plan.report import Plan, from_compiled, from_formulas, show
from flexolmo_jax.plan.search import Way
from flexolmo_jax.plan.search import search as search_ways
from flexolmo_jax.store.directories import complete_directory, refuse_existing
from flexolmo_jax.train.run import RunConfig


def plan(
    *,
    job: str,
    topology: str,
    model: ModelConfig,
    run: RunConfig,
    mesh: MeshConfig,
    experts: int | None = None,
    top_k: int | None = None,
    new_tokens: int = 128,
    search: bool = False,
    price: float | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compiles a job for a topology that is not here and reports what it needs.

    Args:
      job: "pretrain", "train-expert", "tune-router", "forward" (logits of whole rows) or "generate".
      topology: such as `v5p:4x4x4`; for `h100:64`, GPUs, everything comes from formulas.
      model: shape of the model.
      run: the job's batches; for inference, what is computed at once.
      mesh: how the devices are arranged.
      experts: experts of the model, the public one included; None takes the job's own number.
      top_k: experts per token; None takes all.
      new_tokens: for "generate", tokens added to each row.
      search: whether to look for the fastest layout, mesh, accumulation and remat policy (or batch) that fit.
      price: US dollars per chip and hour, for the cost.
      out: directory for `plan.json` and `plan.png`.
      overwrite: whether to replace `out`.

    Returns:
      The plan, as `Plan.summary` says, and with `search` under `tried` every plan that was compiled on the way.

    Raises:
      UserError: the job, the topology or a setting cannot be planned, or a search finds nothing that fits.
    """
    if out is not None:
        refuse_existing(out, overwrite=overwrite)
    where = parse_topology(topology)
    if price is not None and price < 0:
        raise UserError(f"--price must not be negative, but it is {price}")
    count = experts_of(job) if experts is None else experts
    wanted = Job(
        kind=job,
        model=model,
        run=run,
        experts=count,
        top_k=count if top_k is None else top_k,
        new_tokens=new_tokens,
    )
    by_formulas = functools.partial(_by_formulas, where)
    by_compiling = functools.partial(_by_compiling, where) if where.chip.axes else None
    if search:
        tried = search_ways(wanted, mesh, where.devices, by_formulas, by_compiling)
    else:
        tried = [(by_compiling or by_formulas)(Way(wanted, mesh))]
    summary = tried[-1].summary(price)
    if search:
        summary["tried"] = [each.summary(price) for each in tried]
    show(summary)
    if out is not None:
        with complete_directory(out, overwrite=overwrite) as partial:
            (partial / "plan.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
            draw(summary, partial / "plan.png")
    return summary


def _by_compiling(topology: Topology, way: Way) -> Plan:
    layout = way.mesh.build(tpu_devices(topology))
    run = way.job.run
    terminal.say(
        f"compiling {way.job.kind} for {topology.name}: {layout.describe()}, "
        f"{run.batch_size // run.accumulation:,} rows at once, remat {run.remat}"
    )
    compiled = compile_program(way.job.program(layout), layout, topology.chip.usable // topology.chip.devices)
    return from_compiled(way.job, topology, layout, compiled)


def _by_formulas(topology: Topology, way: Way) -> Plan:
    layout = Layout(way.mesh.layout, AbstractMesh(way.mesh.sizes(topology.devices), AXES))
    layout.check_batch(way.job.run.batch_size // way.job.run.accumulation)
    return from_formulas(way.job, topology, layout)

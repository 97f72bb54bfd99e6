"""A plan: what a job needs on a topology, how long it takes at best, and how to say so."""

import dataclasses
from typing import Any

from flexolmo_jax import terminal
from flexolmo_jax.parallel import Layout
from flexolmo_jax.plan import estimate, measures, minimum
from flexolmo_jax.plan.chips import GIB, Topology
from flexolmo_jax.plan.compilation import Compiled, Memory
from flexolmo_jax.plan.hlo import parse
from flexolmo_jax.plan.jobs import TRAINING, Job

RESOURCES = {"arithmetic": "arithmetic", "memory": "HBM bandwidth", "links": "links between chips"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known about one way to run a job. Numbers are of one device and one step unless they say otherwise.

    Attributes:
      job: what runs.
      topology: on what.
      layout: the mesh, in words.
      implementation: how the experts are computed (see docs/moe.md); empty where nothing was compiled.
      is_compiled: whether the numbers come from the compiled program, not from formulas.
      memory: HBM, in bytes.
      flops: of matrix products, without what is recomputed.
      recomputed_flops: of what rematerialisation computes again.
      least_flops: what the job cannot do without.
      traffic: bytes received from other devices, by kind of collective.
      least_traffic: the least bytes with this layout, by purpose.
      memory_traffic: bytes to and from HBM; None where it is not known.
      compile_seconds: how long compiling took here.
    """

    job: Job
    topology: Topology
    layout: str
    implementation: str
    is_compiled: bool
    memory: Memory
    flops: float
    recomputed_flops: float
    least_flops: float
    traffic: dict[str, float]
    least_traffic: dict[str, float]
    memory_traffic: float | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.memory.needed <= self.memory.available

    @property
    def seconds(self) -> dict[str, float]:
        """By resource: how long a step would take if nothing else bound it."""
        chip = self.topology.chip
        return {
            "arithmetic": (self.flops + self.recomputed_flops) / (chip.flops / chip.devices),
            "memory": (self.memory_traffic or 0.0) / (chip.hbm_bandwidth / chip.devices),
            "links": sum(self.traffic.values()) / (chip.link_bandwidth / chip.devices),
        }

    @property
    def step_seconds(self) -> float:
        """The roofline: the slowest resource, all others hidden behind it."""
        return max(self.seconds.values())

    @property
    def bound_by(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)

    def summary(self, price: float | None = None) -> dict[str, Any]:
        """Everything as one JSON object; `price` is in US dollars per chip and hour."""
        steps = self.job.run.steps if self.job.kind in TRAINING else 1
        chip_hours = steps * self.step_seconds / 3600 * self.topology.chips
        produced = self.job.run.batch_size * self.job.new_tokens if self.job.kind == "generate" else self.job.tokens
        memory = self.memory
        spare = memory.available - memory.needed
        return {
            "verdict": f"{self.job.kind} on {self.topology.name} {'fits' if self.fits else 'does NOT fit'}, with "
            f"{abs(spare) / GIB:,.2f} GiB per device {'to spare' if self.fits else 'too little'}",
            "job": self.job.kind,
            "topology": self.topology.name,
            "mesh": self.layout,
            "experts": self.job.experts,
            "top_k": self.job.top_k,
            "implementation": self.implementation,
            "batch_size": self.job.run.batch_size,
            "sequence_length": self.job.run.sequence_length,
            "accumulation": self.job.run.accumulation,
            "remat": self.job.run.remat,
            "compiled": self.is_compiled,
            "fits": self.fits,
            "hbm": memory._asdict() | {"needed": memory.needed, "spare": spare},
            "flops": {
                "needed": self.flops,
                "recomputed": self.recomputed_flops,
                "least": self.least_flops,
                "ratio": self.flops / self.least_flops,
            },
            "collectives": {
                "bytes": self.traffic,
                "total": sum(self.traffic.values()),
                "least": self.least_traffic,
                "least_total": sum(self.least_traffic.values()),
                "ratio": _ratio(sum(self.traffic.values()), sum(self.least_traffic.values())),
            },
            "memory_traffic": self.memory_traffic,
            "estimate": {
                "seconds": self.seconds,
                "step_seconds": self.step_seconds,
                "bound_by": RESOURCES[self.bound_by],
                "tokens_per_second": produced / self.step_seconds,
                "hours": steps * self.step_seconds / 3600,
                "chip_hours": chip_hours,
                "cost": None if price is None else price * chip_hours,
            },
            "compile_seconds": self.compile_seconds,
            "chip": self.topology.chip.source,
        }


def from_compiled(job: Job, topology: Topology, layout: Layout, compiled: Compiled) -> Plan:
    """The plan of a compiled program; of one that does not fit, work and traffic come from formulas."""
    if not compiled.text:
        return dataclasses.replace(
            from_formulas(job, topology, layout), memory=compiled.memory, compile_seconds=compiled.seconds
        )
    module = parse(compiled.text)
    flops = measures.flops(module)
    return Plan(
        job=job,
        topology=topology,
        layout=layout.describe(),
        implementation=job.run.implementation(job.experts, layout, job.top_k),
        is_compiled=True,
        memory=compiled.memory,
        flops=flops.needed,
        recomputed_flops=flops.recomputed,
        least_flops=minimum.flops(job).total / topology.devices,
        traffic=dict(measures.traffic(module)),
        least_traffic=minimum.traffic(job, layout)._asdict(),
        memory_traffic=measures.memory_traffic(module),
        compile_seconds=compiled.seconds,
    )


def from_formulas(job: Job, topology: Topology, layout: Layout) -> Plan:
    """The plan by formulas alone: the least work and traffic, and an estimate of the memory."""
    least = minimum.flops(job).total / topology.devices
    traffic = minimum.traffic(job, layout)._asdict()
    return Plan(
        job=job,
        topology=topology,
        layout=layout.describe(),
        implementation="",
        is_compiled=False,
        memory=estimate.memory(job, layout, topology.chip.usable // topology.chip.devices),
        flops=least,
        recomputed_flops=estimate.recomputed_flops(job) / topology.devices,
        least_flops=least,
        traffic=traffic,
        least_traffic=traffic,
        memory_traffic=None,
        compile_seconds=0.0,
    )


def show(summary: dict[str, Any]) -> None:
    """Prints a plan's summary as tables."""
    hbm, flops, collectives, estimated = (summary[key] for key in ("hbm", "flops", "collectives", "estimate"))
    how = "from the compiled program" if summary["compiled"] else "by formulas alone, nothing was compiled"
    terminal.banner(
        summary["verdict"],
        {
            "mesh": summary["mesh"],
            "batch": f"{summary['batch_size']:,} rows of {summary['sequence_length']:,} tokens, accumulation "
            f"{summary['accumulation']}, remat {summary['remat']}",
            "experts": ", ".join(
                filter(None, (str(summary["experts"]), f"{summary['top_k']} per token", summary["implementation"]))
            ),
            "numbers": f"of one device and one step, {how}",
        },
    )
    parts = ("arguments", "outputs", "temporaries", "code", "needed", "available")
    terminal.table("HBM", ("", "GiB"), [(part, hbm[part] / GIB) for part in parts])
    terminal.table(
        "matrix products",
        ("", "TFLOP", "of the least"),
        [
            ("the step itself", flops["needed"] / 1e12, flops["ratio"]),
            ("recomputed by remat", flops["recomputed"] / 1e12, flops["recomputed"] / flops["least"]),
            ("the least for this job", flops["least"] / 1e12, 1.0),
        ],
    )
    rows = [(kind, count / 1e9, "") for kind, count in collectives["bytes"].items()]
    rows += [("all", collectives["total"] / 1e9, f"{collectives['ratio']:.3f}" if collectives["ratio"] else "-")]
    rows += [(f"least to {purpose}", count / 1e9, "") for purpose, count in collectives["least"].items() if count]
    terminal.table("received from other devices", ("", "GB", "of the least"), rows)
    facts = {
        f"{RESOURCES[name]} alone": f"{seconds:,.3f} s a step"
        for name, seconds in estimated["seconds"].items()
        if seconds
    }
    facts |= {
        "bound by": estimated["bound_by"],
        "tokens": f"{estimated['tokens_per_second']:,.0f} a second at best",
        "whole run": f"{estimated['hours']:,.2f} hours, {estimated['chip_hours']:,.1f} chip hours at best",
        "cost": "give --price to know" if estimated["cost"] is None else f"{estimated['cost']:,.0f} US dollars at best",
    }
    terminal.banner("estimate: every resource at its published peak, all others hidden behind the slowest", facts)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None

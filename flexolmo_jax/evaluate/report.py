"""What an evaluation found, as `report.json` holds it, and the questions of quality that it answers.

Models go by label: `public` is the anchor alone, `expert:math` an owner's own two-expert model, `merged` the merge, and
`merged:without:math` the merge with that expert excluded. An owner's domain has the name of its expert.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError

PUBLIC = "public"
MERGED = "merged"

BitsPerByte = Mapping[str, Mapping[str, float]]
"""Held-out bits per byte, by model and domain."""

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint", "seqio", "grain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The content of `report.json`.

    Attributes:
      domains: names of the domains, `public` first where there is one.
      models: held-out bits per byte, `{model: {domain: value}}`.
      exact_match: share of questions answered rightly, `{model: {task: value}}`.
      routing: `{model: {domain: {"experts": [E], "probability": [L][E], "top_1": [L][E]}}}`.
      opt_out: what `opt_out_changes` returns, `{excluded expert: {domain: {…}}}`.
      seconds: how long each part took, `{part: value}`.
      tokens_per_second: speed of each part, `{part: value}`.
      versions: of Python, this package and what it stands on.
      extra: further keys, beside the others in the file (`top_k`, `default_top_k`, `checks`, …).
    """

    domains: tuple[str, ...]
    models: dict[str, dict[str, float]]
    exact_match: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    routing: dict[str, Any] = dataclasses.field(default_factory=dict)
    opt_out: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens_per_second: dict[str, float] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if clash := self.extra.keys() & {field.name for field in dataclasses.fields(self)}:
            raise ValueError(f"{sorted(clash)[0]!r} is a field of the report and cannot be an extra key")

    def as_json(self) -> dict[str, Any]:
        """The object that `report.json` holds: the fields, and the extra keys beside them."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "extra"}
        return content | {"domains": list(self.domains)} | self.extra

    def write(self, file: Path) -> None:
        """Writes the report so that the file is whole or not there.

        Raises:
          UserError: the file cannot be written.
        """
        text = json.dumps(self.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        partial = file.with_name(f".{file.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write {file}: {error.strerror or error}") from error


def read(file: Path) -> Report:
    """Reads a `report.json`; keys that are no field of a report are its extra ones.

    Raises:
      UserError: there is no such file, or it is not a report.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        fields = {field.name for field in dataclasses.fields(Report)} - {"extra"}
        known = {key: value for key, value in content.items() if key in fields}
        known["domains"] = tuple(known["domains"])
        return Report(**known, extra={key: value for key, value in content.items() if key not in fields})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a report of an evaluation: {error}") from error


def machine() -> dict[str, Any]:
    """What a timing depends on beside the programs: processor, cores, system, and how busy the machine is now."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "load": os.getloadavg()[0],
    }


def _processor() -> str:
    """Its name and, of the instructions that matrix products live on, those it has."""
    try:
        fields = (line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
        known = {name.strip(): value.strip() for name, _, value in fields}
        has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known["flags"].split()]
        return ", ".join([known["model name"], *has])
    except (OSError, KeyError):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that decide its numbers."""
    from flexolmo_jax import __version__

    found = {"python": platform.python_version(), "flexolmo_jax": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def expert_label(owner: str) -> str:
    """Label of the owner's own two-expert model."""
    return f"expert:{owner}"


def without_label(owner: str) -> str:
    """Label of the merge with this owner's expert excluded."""
    return f"{MERGED}:without:{owner}"


def gap_closed(models: BitsPerByte, owner: str, merged: str = MERGED) -> float:
    """Share of an owner's gain that a merge keeps on the owner's domain: `(public - merged) / (public - own)`.

    1 is all of it, 0 is none, and less than 0 is worse than the anchor. Where the owner gained nothing, it is 0.
    """
    public, own = models[PUBLIC][owner], models[expert_label(owner)][owner]
    return (public - models[merged][owner]) / (public - own) if own < public else 0.0


def public_harm(models: BitsPerByte, merged: str = MERGED) -> float:
    """How much worse a merge is than the anchor on public text, as a share of the anchor's bits per byte."""
    return change(models[merged][PUBLIC], models[PUBLIC][PUBLIC])


def opt_out_harm(models: BitsPerByte, owner: str) -> float:
    """How much worse than the anchor the owner's own domain is once the owner has left the merge."""
    return change(models[without_label(owner)][owner], models[PUBLIC][owner])


def opt_out_shift(models: BitsPerByte, owner: str) -> float:
    """The largest change, up or down, of any other domain once the owner has left the merge."""
    left, full = models[without_label(owner)], models[MERGED]
    return max((abs(change(left[domain], full[domain])) for domain in full if domain != owner), default=0.0)


def worst_harm(models: BitsPerByte, labels: Sequence[str]) -> float:
    """The worst change against the anchor over these models and all domains: "do no harm" asks for at most 0.02."""
    return max(change(models[label][domain], models[PUBLIC][domain]) for label in labels for domain in models[label])


def change(value: float, reference: float) -> float:
    """Relative change: 0.05 is 5% more, in bits per byte 5% worse."""
    return value / reference - 1.0


def opt_out_changes(models: BitsPerByte) -> dict[str, dict[str, dict[str, float]]]:
    """For every owner that some model excludes, what that does to each domain.

    Returns:
      `{owner: {domain: {"bits_per_byte": …, "against_merged": …, "against_public": …}}}`, the last two relative
      changes, each where the model to compare with was evaluated.
    """
    references = {"against_merged": models.get(MERGED, {}), "against_public": models.get(PUBLIC, {})}
    prefix = without_label("")
    return {
        label.removeprefix(prefix): {
            domain: {"bits_per_byte": value}
            | {key: change(value, other[domain]) for key, other in references.items() if domain in other}
            for domain, value in models[label].items()
        }
        for label in models
        if label.startswith(prefix)
    }


def quality_checks(report: Report, tasks: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Every promise of a strict merge that the report's models allow to be checked.

    Args:
      report: what was measured.
      tasks: the owner whose model sets the mark, for each exact-match task; None takes the domain that the task's name
        begins with.

    Returns:
      `{name: {"value", "target", "ok"}}`; a target is a bound such as ">= 0.8".
    """
    models = report.models
    checks: dict[str, dict[str, Any]] = {}
    if MERGED in models and PUBLIC in models.get(PUBLIC, {}):
        checks["public harm"] = _at_most(public_harm(models), 0.02)
    for owner in report.domains:
        if {PUBLIC, MERGED, expert_label(owner)} <= models.keys():
            checks[f"gap closed: {owner}"] = _at_least(gap_closed(models, owner), 0.8)
        if {PUBLIC, MERGED, without_label(owner)} <= models.keys():
            checks[f"opt-out harm: {owner}"] = _at_most(opt_out_harm(models, owner), 0.05)
            checks[f"opt-out shift: {owner}"] = _at_most(opt_out_shift(models, owner), 0.05)
    for task, mine in report.exact_match.get(MERGED, {}).items():
        owner = tasks[task] if tasks else task.partition("_")[0]
        own = report.exact_match.get(expert_label(owner), {}).get(task, 0.0)
        if own > 0:
            checks[f"exact match kept: {task}"] = _at_least(mine / own, 0.9)
    return checks


def _at_least(value: float, bound: float) -> dict[str, Any]:
    return {"value": value, "target": f">= {bound}", "ok": value >= bound}


def _at_most(value: float, bound: float) -> dict[str, Any]:
    return {"value": value, "target": f"<= {bound}", "ok": value <= bound}

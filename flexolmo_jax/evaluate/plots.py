"""Pictures of an evaluation: loss curves and three heat maps, as PNG files.

An expert has one colour in all of them. In heat maps of bits per byte, blue is better and red is worse.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate.report import MERGED, PUBLIC, Report, change

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 130
ANNOTATED_LAYERS = 12
"""Cells of a routing heat map carry numbers up to so many layers."""

_PUBLIC_COLOUR = "#5b6470"
_OWNER_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a6559d", "#b8860b", "#2aa1c0", "#8c3b3b", "#4b7f2c", "#6a5acd")
"""Told apart with the common kinds of colour blindness (after Okabe and Ito)."""

_QUIET = "#5b6470"

_TITLE_STRIP = 0.55
"""Inches at the top of a picture that belong to its title."""


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name: grey for `public` and for `anchor`, the others in order."""
    owners = [name for name in names if name not in (PUBLIC, "anchor")]
    chosen = {name: _OWNER_COLOURS[index % len(_OWNER_COLOURS)] for index, name in enumerate(owners)}
    return {name: chosen.get(name, _PUBLIC_COLOUR) for name in names}


def loss_curves(runs: Mapping[str, Path], file: Path) -> None:
    """Training loss of every run over its steps.

    Args:
      runs: `metrics.jsonl` by name of the run, which is the expert's name for an owner's.
      file: PNG to write.

    Raises:
      UserError: a file is missing, or holds no loss.
    """
    curves = {name: _losses(metrics) for name, metrics in runs.items()}
    figure, (axes,) = _figure(7.5, 4.4)
    for name, colour in colours(list(runs)).items():
        steps, losses = curves[name]
        axes.plot(steps, losses, color=colour, linewidth=1.8, label=f"{name}  (ends at {losses[-1]:.2f})")
        axes.plot(steps[-1:], losses[-1:], "o", color=colour, markersize=4.5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy, nats per token")
    _title(
        figure,
        "Training loss of every run",
        "each on its own text, an owner's mixed with public text where its job says so",
    )
    axes.set_xlim(left=0)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, file)


def model_by_domain(report: Report, file: Path) -> None:
    """Held-out bits per byte of every model on every domain, coloured by the change against `public`."""
    labels = list(report.models)
    public = report.models.get(PUBLIC, {})
    changes = np.zeros((len(labels), len(report.domains)))
    lines = []
    for row, label in enumerate(labels):
        lines.append([f"{report.models[label][name]:.3f}" for name in report.domains])
        if not public or label == PUBLIC:
            continue
        for column, name in enumerate(report.domains):
            changes[row, column] = change(report.models[label][name], public[name])
            lines[row][column] += f"\n{_percent(changes[row, column])}"
    figure, (axes,) = _figure(2.6 + 1.25 * len(report.domains) + 0.9, 1.35 + 0.52 * len(labels))
    _change_map(axes, changes, lines, labels, report.domains)
    axes.set_xlabel("held-out text of the domain")
    _title(
        figure,
        "Bits per byte of every model on held-out text",
        "lower is better; colour and per cent: change against the public model",
    )
    if public:
        _change_bar(figure, [axes], "change against public")
    _save(figure, file)


def opt_out(report: Report, file: Path) -> None:
    """What excluding each expert does to each domain, against the full merge and against the public model.

    Raises:
      UserError: the report has no opt-out to show.
    """
    owners = list(report.opt_out)
    panels = {
        key: title
        for key, title in (
            ("against_merged", "against the full merge"),
            ("against_public", "against the public model alone"),
        )
        if all(key in report.opt_out[owner][name] for owner in owners for name in report.domains)
    }
    if not owners or not panels:
        raise UserError(
            "the report has no model with an expert excluded to compare with another, so there is none to draw"
        )
    width = 1.6 + (0.5 + 1.05 * len(report.domains)) * len(panels) + 0.9
    figure, rows = _figure(width, 2.0 + 0.5 * len(owners), len(panels))
    for axes, (key, title) in zip(rows, panels.items(), strict=True):
        changes = np.array([[report.opt_out[owner][name][key] for name in report.domains] for owner in owners])
        lines = [[_percent(value) for value in row] for row in changes]
        _change_map(axes, changes, lines, [f"without {owner}" for owner in owners], report.domains)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("held-out text of the domain")
        for row, owner in enumerate(owners):
            if owner in report.domains:
                _outline(axes, row, report.domains.index(owner))
        if axes is not rows[0]:
            axes.set_yticklabels([])
    _title(
        figure,
        "Opt-out: change in bits per byte when an expert is excluded",
        "more is worse; framed: the domain of the excluded expert",
    )
    _change_bar(figure, rows, "change in bits per byte")
    _save(figure, file)


def routing(report: Report, file: Path, model: str = MERGED) -> None:
    """Mean router probability of each expert, by layer, one panel per domain; each expert in its own colour.

    Raises:
      UserError: the report has no routing of this model.
    """
    if model not in report.routing:
        raise UserError(f"the report has no routing of {model!r}, so there is none to draw")
    domains = report.routing[model]
    experts = next(iter(domains.values()))["experts"]
    layers = len(next(iter(domains.values()))["probability"])
    tints = colours(list(dict.fromkeys([*report.domains, *experts])))
    columns = min(len(domains), 2) if layers <= ANNOTATED_LAYERS else 1
    rows = -(-len(domains) // columns)
    cell = 0.62 if layers <= ANNOTATED_LAYERS else 0.2
    figure, panels = _figure(
        columns * (1.4 + max(cell * layers, 2.2)), rows * (0.95 + 0.42 * len(experts)) + 0.6, columns, rows
    )
    for axes in panels[len(domains) :]:
        axes.set_axis_off()
    for axes, (name, content) in zip(panels, domains.items(), strict=False):
        share = np.array(content["probability"]).T
        lines = [[f"{100 * value:.0f}" if layers <= ANNOTATED_LAYERS else "" for value in row] for row in share]
        _heat_map(axes, _tinted(share, [tints[expert] for expert in experts]), lines, experts, range(1, layers + 1))
        for tick, expert in zip(axes.get_yticklabels(), experts, strict=True):
            tick.set_color(tints[expert])
            tick.set_fontweight("bold" if expert == name else "normal")
        if layers > ANNOTATED_LAYERS:
            axes.set_xticks(range(3, layers, 4), [str(layer + 1) for layer in range(3, layers, 4)])
        axes.set_title(f"{name} text", loc="left", fontsize=10, fontweight="bold")
    for axes in panels[max(0, len(domains) - columns) : len(domains)]:
        axes.set_xlabel("layer")
    _title(
        figure,
        f"Where each domain's tokens go ({model})",
        "mean router probability of each expert in per cent, by layer; full colour is 100",
    )
    _save(figure, file)


def _losses(file: Path) -> tuple[list[int], list[float]]:
    """Steps and losses; of a step that was done again after a resume, the last."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        by_step = {int(row["step"]): float(row["loss"]) for row in rows if "loss" in row}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read losses from {file}: {error}") from error
    if not by_step:
        raise UserError(f"{file} holds no loss: its run has not logged a step yet")
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple["Figure", list["Axes"]]:
    """A figure of a size in inches and its axes in one list, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    return figure, axes


def _change_scale():
    """Colours of relative changes from -100% to +100%, white at none."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import SymLogNorm

    # Gains are tens of percent and harm is a few: a linear scale would hide the harm.
    return ScalarMappable(SymLogNorm(linthresh=0.02, linscale=0.4, vmin=-1.0, vmax=1.0), "RdBu_r")


def _change_map(axes: "Axes", changes: np.ndarray, lines, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Draws relative changes [R, C], with a text in each cell."""
    _heat_map(axes, _change_scale().to_rgba(np.clip(changes, -1.0, 1.0))[..., :3], lines, rows, columns)


def _heat_map(axes: "Axes", cells: np.ndarray, lines, rows: Sequence[Any], columns: Sequence[Any]) -> None:
    """Draws cells of the colours [R, C, 3], with a text in each."""
    axes.imshow(cells, aspect="auto", interpolation="nearest")
    luminance = cells @ np.array([0.2126, 0.7152, 0.0722])
    for row, texts in enumerate(lines):
        for column, text in enumerate(texts):
            colour = "black" if luminance[row, column] > 0.5 else "white"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour, linespacing=1.1)
    axes.set_xticks(range(len(columns)), [str(name) for name in columns])
    axes.set_yticks(range(len(rows)), [str(name) for name in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)


def _tinted(share: np.ndarray, tints: Sequence[str]) -> np.ndarray:
    """Colours [E, L, 3]: from almost white at a share of 0 to the expert's own colour at 1."""
    from matplotlib.colors import to_rgb

    full = np.array([to_rgb(tint) for tint in tints])[:, None]
    return 0.96 + share[..., None] * (full - 0.96)


def _outline(axes: "Axes", row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, fill=False, edgecolor="black", linewidth=1.6))


def _change_bar(figure: "Figure", axes: list["Axes"], label: str) -> None:
    ticks = [-0.5, -0.1, -0.02, 0.0, 0.02, 0.1, 0.5]
    bar = figure.colorbar(_change_scale(), ax=axes, shrink=0.95, pad=0.02)
    bar.set_ticks(ticks, labels=[f"{100 * tick:+.0f}%" if tick else "0" for tick in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)


def _title(figure: "Figure", title: str, explanation: str) -> None:
    """What one sees, and under it how to read it, in a strip above all panels."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height = figure.get_figheight()
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - _TITLE_STRIP / height)))
    figure.text(0.012, 1 - 0.08 / height, title, va="top", fontsize=12, fontweight="bold")
    figure.text(0.012, 1 - 0.30 / height, explanation, va="top", fontsize=9, color=_QUIET)


def _percent(value: float) -> str:
    """A relative change, with one decimal below 10%."""
    text = f"{100 * value:+.1f}%" if abs(value) < 0.0995 else f"{100 * value:+.0f}%"
    return "0.0%" if text in ("+0.0%", "-0.0%") else text.replace("-", "−")


def _save(figure: "Figure", file: Path) -> None:
    try:
        figure.savefig(file, dpi=DOTS_PER_INCH)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error

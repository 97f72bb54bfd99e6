"""A plan as a picture: what fills the memory, what fills the time, and how far both are from the least."""

from pathlib import Path
from typing import Any

from flexolmo_jax.plan.chips import GIB

DOTS_PER_INCH = 130
_COLOURS = {"arguments": "#0072b2", "outputs": "#2aa1c0", "temporaries": "#d55e00", "code": "#5b6470"}


def draw(summary: dict[str, Any], file: Path) -> None:
    """Draws a plan's summary as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    memory, work, time = figure.subplots(1, 3, width_ratios=(1, 1.5, 1.5))
    hbm, flops, collectives, estimated = (summary[key] for key in ("hbm", "flops", "collectives", "estimate"))
    verdict = "fits" if summary["fits"] else "does not fit"
    figure.suptitle(f"{summary['job']} on {summary['topology']} ({summary['mesh']}): {verdict}", fontsize=11)

    begin = 0.0
    for part, colour in _COLOURS.items():
        size = hbm[part] / GIB
        memory.bar(["HBM per device"], [size], bottom=[begin], color=colour, width=0.5, label=f"{part} {size:.2f}")
        begin += size
    memory.axhline(hbm["available"] / GIB, color="black", linestyle="--", linewidth=1, label="available")
    memory.set_ylabel("GiB")
    memory.legend(fontsize=7, frameon=False)

    least = flops["least"]
    labels = ["products", "… with remat", "bytes received"]
    ratio = collectives["ratio"] or 0.0
    bars = work.barh(labels, [flops["ratio"], flops["ratio"] + flops["recomputed"] / least, ratio], color="#0072b2")
    work.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    work.axvline(1.0, color="black", linestyle="--", linewidth=1)
    work.set_xlabel("times the least for this job and layout")
    work.invert_yaxis()

    names = [name for name, seconds in estimated["seconds"].items() if seconds]
    bars = time.barh(names, [estimated["seconds"][name] for name in names], color="#009e73")
    time.bar_label(bars, fmt="%.3g s", padding=3, fontsize=8)
    time.set_xlabel("seconds a step at best (estimate)")
    time.invert_yaxis()
    time.ticklabel_format(axis="x", style="plain")
    for axes in (memory, work, time):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.18)
    figure.savefig(file, dpi=DOTS_PER_INCH)

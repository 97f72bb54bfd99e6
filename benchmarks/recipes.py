"""What a strict merge keeps, by the recipe that the owners trained with: the published one and the default.

    python benchmarks/recipes.py --demo runs/demo [--json FILE]

Takes the anchor and the corpora of a finished `make demo`, trains every owner's expert by both recipes with the same
steps, batches and seed, merges, and prints held-out bits per byte on test text. About ten minutes on two cores.
"""

import argparse
import json
import tempfile
from pathlib import Path

from flexolmo_jax.data.packing import Packing
from flexolmo_jax.data.tokens import open_split
from flexolmo_jax.demo import CONFIGS, OWNERS, SEQUENCE_LENGTH, run_stage
from flexolmo_jax.evaluate.bits_per_byte import best_top_k, score_top_k
from flexolmo_jax.evaluate.measurement import Candidate, measure, opt_outs
from flexolmo_jax.evaluate.report import expert_label, gap_closed, machine, opt_out_harm, public_harm, versions
from flexolmo_jax.infer import load, load_with_contribution
from flexolmo_jax.merge import merge
from flexolmo_jax.terminal import table

RECIPES = {
    "published": [CONFIGS.parent / "runs/expert_published.gin", CONFIGS / "expert.gin"],
    "default": [CONFIGS / "expert.gin"],
}
ROWS_MEASURED = 256


def train(demo: Path, recipe: str, owner: str, out: Path) -> Path:
    """Trains one owner's expert by a recipe; returns the contribution's directory."""
    macros = {
        "ANCHOR": demo / "anchor/anchor",
        "PUBLIC_TEXT": demo / "corpora/public",
        "TEXT": demo / "corpora" / owner,
        "NAME": owner,
        "OWNER": OWNERS[owner],
        "LICENCE": "PSF-2.0",
    }
    flags = [f"--gin.{name}={str(value)!r}" for name, value in macros.items()]
    run_stage("train-expert", *(f"--gin_file={file}" for file in RECIPES[recipe]), *flags, "--out", out / owner)
    return out / owner / "contribution"


def quality(demo: Path, recipe: str, out: Path) -> dict[str, float]:
    """Trains, merges and measures by one recipe: figures as shares, 0.02 being 2%."""
    anchor = demo / "anchor/anchor"
    contributions = {owner: train(demo, recipe, owner, out) for owner in OWNERS}
    merge(anchor, list(contributions.values()), out / "merged")
    prepared = {"public": demo / "anchor/prepared"}
    prepared |= {owner: demo / "owners" / owner / "prepared/own" for owner in OWNERS}

    def rows(split):
        return {name: Packing(open_split(part, split), SEQUENCE_LENGTH) for name, part in prepared.items()}

    merged = load(out / "merged")
    top_k = best_top_k(score_top_k(merged, rows("validation"), max_rows=ROWS_MEASURED))
    candidates = opt_outs(merged, top_k)
    for owner, contribution in contributions.items():
        candidates[expert_label(owner)] = Candidate(model=load_with_contribution(anchor, contribution))
    models = measure(candidates, rows("test"), max_rows=ROWS_MEASURED).models
    figures = {"public harm": public_harm(models), "top k": top_k}
    for owner in OWNERS:
        figures[f"gap closed: {owner}"] = gap_closed(models, owner)
        figures[f"opt-out harm: {owner}"] = opt_out_harm(models, owner)
        figures[f"own gain, bits per byte: {owner}"] = models["public"][owner] - models[expert_label(owner)][owner]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="directory of a finished demo")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = {recipe: quality(arguments.demo, recipe, Path(scratch) / recipe) for recipe in RECIPES}
    names = list(found["default"])
    table("a strict merge, by recipe", ["figure", *found], [[name, *(found[r][name] for r in found)] for name in names])
    checks = {}
    for name, value in found["default"].items():
        if name.startswith(("public harm", "opt-out harm")):
            checks[name] = {"value": value, "target": "<= 0.02", "ok": value <= 0.02}
        elif name.startswith("gap closed"):
            checks[name] = {"value": value, "target": ">= 0.8", "ok": value >= 0.8}
    result = {"machine": machine(), "versions": versions(), "rows": found, "checks": checks}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The whole road on one machine: an anchor, three owners in isolation, a merge, choices, and a Hugging Face directory.

Every job is a process of its own that leaves its result in a directory; what is complete is not done again.
"""

import contextlib
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax import confine, terminal
from flexolmo_jax.errors import UserError

OWNERS = {"code": "a software house", "math": "a school", "unicode": "a type foundry"}
"""The owners' experts, and who they are said to belong to."""

LICENCE = "PSF-2.0"
"""Of everything that is made from the Python distribution."""

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "demo"
PROMPTS = {"code": "def close(self):\n", "math": "remainder by 5 of 471:", "unicode": "U+4E2D"}
NEW_TOKENS = 48
QUESTIONS = 100
ROWS_MEASURED = 96
ROWS_TO_CHOOSE_TOP_K = 64
SEQUENCE_LENGTH = 128


def demo(*, out: Path) -> dict[str, Any]:
    """Walks the road in `out`; returns what `out/report.json` holds.

    Raises:
      UserError: a job cannot do its work.
    """
    clock = _Clock()
    road = Road(out)
    with clock.time("corpora"):
        road.make_corpora()
    with clock.time("anchor"):
        road.train_anchor()
    for owner in OWNERS:
        with clock.time(f"expert {owner}"):
            road.train_expert(owner)
    with clock.time("merge"):
        road.merge()
    with clock.time("router tuning"):
        road.tune_router()
    with clock.time("evaluation"):
        report = road.evaluate()
    with clock.time("export"):
        parity = road.export()
    return road.finish(report, parity, clock.seconds)


class Road:
    """The demo's directory, and what is done in it."""

    def __init__(self, out: Path):
        self.out = out
        self.corpora = out / "corpora"
        self.anchor = out / "anchor" / "anchor"
        self.merged = out / "merged"
        self.tuned = out / "router_tuned" / "merged"
        self.exported = out / "hf"
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from error

    def contribution(self, owner: str) -> Path:
        return self.out / "owners" / owner / "contribution"

    def make_corpora(self) -> None:
        if not self.corpora.exists():
            run_stage("corpora", "--out", self.corpora)

    def train_anchor(self) -> None:
        run_stage(
            "pretrain",
            f"--gin_file={CONFIGS / 'anchor.gin'}",
            _macro("TEXT", self.corpora / "public"),
            "--out",
            self.out / "anchor",
        )

    def train_expert(self, owner: str) -> None:
        """Runs the owner's job where only the anchor, the public corpus and the owner's own can be read."""
        job = self.out / "owners" / owner
        job.mkdir(parents=True, exist_ok=True)
        inputs = [self.anchor, self.corpora / "public", self.corpora / owner]
        run_stage(
            "train-expert",
            f"--gin_file={CONFIGS / 'expert.gin'}",
            _macro("ANCHOR", self.anchor),
            _macro("PUBLIC_TEXT", self.corpora / "public"),
            _macro("TEXT", self.corpora / owner),
            _macro("NAME", owner),
            _macro("OWNER", OWNERS[owner]),
            _macro("LICENCE", LICENCE),
            "--out",
            job,
            confined_to=(inputs, [job]),
        )

    def merge(self) -> None:
        """Merges, with the number of experts per token that serves the domains' validation text best."""
        from flexolmo_jax.evaluate.bits_per_byte import best_top_k, score_top_k
        from flexolmo_jax.infer import load
        from flexolmo_jax.merge import merge

        if self.merged.exists():
            return
        contributions = [self.contribution(owner) for owner in OWNERS]
        candidate = self.out / "merged_candidate"
        merge(self.anchor, contributions, candidate, overwrite=True)
        table = score_top_k(load(candidate), self._rows("validation"), max_rows=ROWS_TO_CHOOSE_TOP_K)
        merge(self.anchor, contributions, self.merged, top_k=best_top_k(table))
        shutil.rmtree(candidate)

    def tune_router(self) -> None:
        """Each owner picks its proxies out of the public text; the coordinator tunes the router on them."""
        proxies = {owner: self.out / "owners" / owner / "proxies" for owner in OWNERS}
        for owner, directory in proxies.items():
            if not directory.exists():
                self.select_proxies(owner, directory)
        run_stage(
            "tune-router",
            f"--gin_file={CONFIGS / 'router.gin'}",
            _macro("MERGED", self.merged),
            _macro("PUBLIC_TEXT", self.corpora / "public"),
            f"--gin.PROXIES={ {owner: str(directory) for owner, directory in proxies.items()}!r}",
            "--out",
            self.out / "router_tuned",
        )

    def select_proxies(self, owner: str, out: Path) -> None:
        """Runs where only the public corpus and the owner's own can be read."""
        inputs = [self.corpora / owner, self.corpora / "public"]
        run_stage(
            "select-proxies",
            f"--gin_file={CONFIGS / 'proxies.gin'}",
            "--text",
            inputs[0],
            "--public_text",
            inputs[1],
            "--out",
            out,
            confined_to=(inputs, [out.parent]),
        )

    def evaluate(self) -> dict[str, Any]:
        """Measures every model on every domain's test text, and draws the pictures."""
        from flexolmo_jax.evaluate import stage
        from flexolmo_jax.evaluate.bits_per_byte import score_top_k
        from flexolmo_jax.evaluate.measurement import Candidate, measure, opt_outs
        from flexolmo_jax.evaluate.report import expert_label, quality_checks
        from flexolmo_jax.infer import load, load_with_contribution

        merged = load(self.merged)
        candidates = {"public": Candidate(model=load(self.anchor))}
        for owner in OWNERS:
            own = load_with_contribution(self.anchor, self.contribution(owner))
            candidates[expert_label(owner)] = Candidate(model=own)
        candidates |= {label: each for label, each in opt_outs(merged).items() if label != "public"}
        candidates["merged+router_tuned"] = Candidate(model=load(self.tuned))
        rows = self._rows("test")
        corpora = {owner: self.corpora / owner for owner in OWNERS}
        report = measure(
            candidates, rows, max_rows=ROWS_MEASURED, question_sets=stage.question_sets(corpora, QUESTIONS)
        )
        extra = {
            "top_k": score_top_k(merged, rows, max_rows=ROWS_MEASURED),
            "default_top_k": merged.top_k,
            "checks": quality_checks(report),
        }
        report = dataclasses.replace(report, extra=extra)
        stage.show(report)
        runs = {"anchor": self.out / "anchor"} | {owner: self.out / "owners" / owner for owner in OWNERS}
        stage.pictures(report, self.out, {name: directory / "metrics.jsonl" for name, directory in runs.items()})
        return report.as_json()

    def export(self) -> dict[str, Any]:
        """Exports the merged model, and compares its logits with transformers' where that is installed."""
        from flexolmo_jax.hf import export_hf, verify_hf

        export_hf(self.merged, self.exported, overwrite=True)
        if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            terminal.say(
                "transformers is not installed, so its logits are not compared: pip install 'flexolmo_jax[hf]'"
            )
            return {}
        return dataclasses.asdict(verify_hf(self.exported, self.merged))

    def samples(self) -> dict[str, dict[str, str]]:
        """What the merged model writes after a prompt of each owner's kind, with and without that owner's expert."""
        import numpy as np

        from flexolmo_jax.data.vocabulary import decode, encode
        from flexolmo_jax.infer import load

        model = load(self.merged)
        written: dict[str, dict[str, str]] = {}
        for owner, prompt in PROMPTS.items():
            ids = np.array([encode(prompt)] * 2, np.int32)
            choices = [list(model.names), [name for name in model.names if name != owner]]
            new = model.generate(ids, np.full(2, ids.shape[1]), max_new_tokens=NEW_TOKENS, experts=choices)
            texts = [decode(row.tolist()) for row in new]
            written[owner] = {"prompt": prompt, "with": texts[0], "without": texts[1]}
        return written

    def finish(self, report: dict[str, Any], parity: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        """Writes `report.json` and tells the story on one screen."""
        report["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
        report["tokens_per_second"] |= {name: self._speed(name) for name in ("anchor", *OWNERS)}
        report["hf_parity"] = parity
        report["samples"] = self.samples()
        report["confined"] = bool(confine.kernel_version())
        (self.out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for owner, sample in report["samples"].items():
            terminal.banner(
                f"{owner}: {sample['prompt']!r} goes on", {way: repr(sample[way]) for way in ("with", "without")}
            )
        checks = report["checks"]
        kept = sum(check["ok"] for check in checks.values())
        facts = {
            "owners": f"{len(OWNERS)}, each trained in its own process"
            + (
                ", which could not read the others' text" if report["confined"] else " (not confined: no Landlock here)"
            ),
            "merge": f"{self.merged}, top-{report['default_top_k']}, no joint training",
            "promises kept": f"{kept} of {len(checks)}",
            "Hugging Face": f"{self.exported}"
            + (f", transformers' logits within {parity['max_difference']:.1e} of ours" if parity else ""),
            "report": self.out / "report.json",
            "pictures": ", ".join(sorted(file.name for file in self.out.glob("*.png"))),
            "time": f"{sum(seconds.values()) / 60:.1f} minutes",
        }
        terminal.banner("the whole road", facts)
        return report

    def _rows(self, split: str) -> dict[str, Any]:
        """Packed rows of every domain's split, read from what the owners' jobs prepared."""
        from flexolmo_jax.data.packing import Packing
        from flexolmo_jax.data.tokens import open_split

        prepared = {"public": self.out / "anchor" / "prepared"}
        prepared |= {owner: self.out / "owners" / owner / "prepared" / "own" for owner in OWNERS}
        return {name: Packing(open_split(part, split), SEQUENCE_LENGTH) for name, part in prepared.items()}

    def _speed(self, job: str) -> float:
        directory = self.out / job if job == "anchor" else self.out / "owners" / job
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        speeds = sorted(line["tokens_per_second"] for line in lines)
        return round(speeds[len(speeds) // 2], 1)


class _Clock:
    """Seconds that each part of the road took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - began


def _macro(name: str, value: Path | str) -> str:
    return f"--gin.{name}={str(value)!r}"


def run_stage(
    stage: str, *arguments: Path | str, confined_to: tuple[Sequence[Path], Sequence[Path]] | None = None
) -> None:
    """Runs a stage as a process of its own; with `confined_to`, it can read and write these paths only.

    Raises:
      UserError: the stage has said what is wrong.
    """
    words = [stage, *map(str, arguments)]
    command = [sys.executable, "-m", "flexolmo_jax", *words]
    if confined_to and confine.kernel_version():
        command = confine.command(*confined_to, words)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise UserError(f"the demo stops because {stage} could not do its work (see above); run it again to go on")

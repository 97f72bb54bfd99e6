"""How fast prepared text is read, beside a plain memory map, and whether memory grows over an epoch.

    python benchmarks/data.py [--corpus DIR] [--tokenizer FILE] [--demo runs/demo] [--json FILE]

Reads batches in one process: best-fit packing and joined-and-cut rows from shards through `read_from`, as a job does,
and for scale rows of a flat array of the same tokens, mapped into memory by NumPy and read at random places. The three
take turns; figures are medians. Without a corpus the built-in public one is made. About a minute on two cores.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flexolmo_jax.data import builtin
from flexolmo_jax.data.packing import Chunking, Packing
from flexolmo_jax.data.preparation import Preparation
from flexolmo_jax.data.prepare import prepare_task
from flexolmo_jax.data.reading import batches, read_from
from flexolmo_jax.data.text_task import TextTask
from flexolmo_jax.data.tokens import PreparedSplit, open_split
from flexolmo_jax.evaluate.report import machine, versions
from flexolmo_jax.terminal import table

LENGTH = 4096
BATCH = 16
TURNS = 7
SECONDS = 1.0


def from_shards(rows: Packing | Chunking) -> Callable[[], int]:
    """Reads the next batch as a job does; returns its tokens."""
    reader = read_from(batches({0: rows}, {0: 1.0}, BATCH, seed=0), 0)
    return lambda: next(reader).rows.inputs.size


def from_memory_map(split: PreparedSplit, directory: Path) -> Callable[[], int]:
    """Reads a batch of rows at random places of a flat array; returns its tokens."""
    tokens = np.concatenate([split[index] for index in range(len(split))])
    np.save(directory / "flat.npy", tokens)
    flat = np.load(directory / "flat.npy", mmap_mode="r")
    rng = np.random.default_rng(0)

    def read() -> int:
        starts = rng.integers(0, len(flat) - LENGTH - 1, BATCH)
        rows = np.stack([flat[start : start + LENGTH + 1] for start in starts]).astype(np.int32)
        return rows[:, :-1].size

    return read


def speed(read: Callable[[], int]) -> tuple[float, float]:
    """Tokens per second by the clock, and per second of processor time."""
    began, used, tokens = time.perf_counter(), time.process_time(), 0
    while (took := time.perf_counter() - began) < SECONDS:
        tokens += read()
    return tokens / took, tokens / (time.process_time() - used)


def resident() -> float:
    """MiB of memory that this process holds for itself, pages of mapped files left out."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1024


def growth_over_epochs(rows: Packing) -> list[float]:
    """MiB at the end of each of three epochs."""
    per_epoch = -(-len(rows) // BATCH)
    reader = read_from(batches({0: rows}, {0: 1.0}, BATCH, seed=1), 0)
    found = []
    for _ in range(3):
        for _ in range(per_epoch):
            next(reader)
        found.append(resident())
    return found


def demo_speed(demo: Path) -> float:
    """Tokens per second that the demo's anchor job consumed: the median over its run."""
    lines = (demo / "anchor/metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["tokens_per_second"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", help="text to read (default: the built-in public corpus)")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, a tokenizer.json or a SentencePiece model")
    parser.add_argument("--demo", type=Path, help="directory of a finished demo, to compare with what its job consumes")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = arguments.corpus or str(builtin.build(Path(scratch) / "corpora")["public"])
        task = TextTask(name="benchmark", files=corpus, tokenizer=arguments.tokenizer)
        manifest = prepare_task(task, Path(scratch) / "prepared", Preparation())
        split = open_split(Path(scratch) / "prepared", "train")
        packed = Packing(split, LENGTH)
        readers = {
            "best fit": from_shards(packed),
            "concatenate": from_shards(Chunking(split, LENGTH)),
            "memory map": from_memory_map(split, Path(scratch)),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
        for _ in range(TURNS):
            for name, read in readers.items():
                found[name].append(speed(read))
        epochs = growth_over_epochs(packed)
    medians = {name: statistics.median(wall for wall, _ in values) for name, values in found.items()}
    used = {name: statistics.median(cpu for _, cpu in values) for name, values in found.items()}
    rows = [[name, medians[name] / 1e6, used[name] / 1e6, medians[name] / medians["memory map"]] for name in found]
    columns = ["way", "a second", "a second of processor time", "share of the memory map"]
    table("reading in one process, million tokens", columns, rows)
    train = manifest["splits"]["train"]
    table(
        "what was read",
        ["", "value"],
        [
            ["documents", train["documents"]],
            ["tokens", train["tokens"]],
            ["tokens in a row", LENGTH],
            ["padding of best fit", packed.padding],
            *[[f"MiB after epoch {number}", value] for number, value in enumerate(epochs, 1)],
        ],
    )
    best = medians["best fit"]
    checks = {
        "best fit, tokens/s": {"value": best, "target": ">= 3e6", "ok": best >= 3e6},
        "growth from epoch 1 to 3, MiB": {
            "value": epochs[2] - epochs[0],
            "target": "<= 8",
            "ok": epochs[2] - epochs[0] <= 8,
        },
    }
    if arguments.demo:
        ratio = best / demo_speed(arguments.demo)
        checks["times what the demo's job consumes"] = {"value": ratio, "target": ">= 20", "ok": ratio >= 20}
    result = {
        "machine": machine(),
        "versions": versions(),
        "rows": {
            "tokens per second": medians,
            "tokens per second of processor time": used,
            "all": found,
            "documents": train["documents"],
            "tokens": train["tokens"],
            "tokenizer": manifest["vocabulary"]["fingerprint"],
            "padding": packed.padding,
            "MiB after each epoch": epochs,
        },
        "checks": checks,
    }
    table(
        "checks", ["check", "value", "target", "ok"], [[n, c["value"], c["target"], c["ok"]] for n, c in checks.items()]
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

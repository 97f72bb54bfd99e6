"""How fast text is prepared, beside the `tokenizers` library alone on the same cores, and whether the ids agree.

    python benchmarks/prepare.py --corpus DIR --tokenizer tokenizer.json [--documents 100000] [--json FILE]

The library alone encodes texts that lie in memory, in batches, with as many threads as there are cores. `prepare` reads
the files, encodes and writes shards, with as many processes. They take turns; figures are medians. Then every prepared
document is compared with the library's ids.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from flexolmo_jax.data.documents import read_documents
from flexolmo_jax.data.preparation import Preparation
from flexolmo_jax.data.prepare import prepare_task
from flexolmo_jax.data.splits import SPLITS
from flexolmo_jax.data.text_task import TextTask
from flexolmo_jax.data.tokens import open_split
from flexolmo_jax.evaluate.report import machine, versions
from flexolmo_jax.terminal import table

TURNS = 3
BATCH = 256


def encode_alone(tokenizer: Tokenizer, texts: list[str]) -> int:
    """Encodes all texts; returns the number of ids."""
    count = 0
    for begin in range(0, len(texts), BATCH):
        encodings = tokenizer.encode_batch_fast(texts[begin : begin + BATCH], add_special_tokens=False)
        count += sum(len(encoding.ids) for encoding in encodings)
    return count


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time, that of child processes included."""
    began, used = time.perf_counter(), processor_seconds()
    work()
    return time.perf_counter() - began, processor_seconds() - used


def processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def differing(prepared: Path, texts: list[str], tokenizer: Tokenizer, end: int) -> int:
    """How many documents have other ids than the library's, or are missing on one side."""
    ours: dict[bytes, int] = {}
    for split in SPLITS:
        documents = open_split(prepared, split)
        for index in range(len(documents)):
            key = documents[index].astype(np.uint32).tobytes()
            ours[key] = ours.get(key, 0) + 1
    wrong = 0
    for text in texts:
        key = np.array([*tokenizer.encode(text, add_special_tokens=False).ids, end], np.uint32).tobytes()
        if ours.get(key, 0):
            ours[key] -= 1
        else:
            wrong += 1
    return wrong + sum(ours.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, nargs="+", help="files or directories of text")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("--documents", type=int, default=100_000, help="most documents to take")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    every = [text for path in arguments.corpus for text in read_documents([Path(path)]) if text]
    taken = min(arguments.documents, len(every))
    texts = [every[index * len(every) // taken] for index in range(taken)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer.from_file(arguments.tokenizer)
    found: dict[str, list[tuple[float, float]]] = {"tokenizers alone": [], "prepare": []}
    with tempfile.TemporaryDirectory() as scratch:
        files = os.cpu_count() or 1
        (Path(scratch) / "text").mkdir()
        for number in range(files):
            lines = [json.dumps({"text": text}) + "\n" for text in texts[number::files]]
            (Path(scratch) / f"text/{number}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), 6))
        task = TextTask(name="benchmark", files=f"{scratch}/text", tokenizer=arguments.tokenizer)
        preparation = Preparation(deduplicate="none")
        for turn in range(TURNS):
            found["tokenizers alone"].append(timed(lambda: encode_alone(tokenizer, texts)))
            out = Path(scratch) / f"prepared{turn}"
            found["prepare"].append(timed(lambda out=out: prepare_task(task, out, preparation)))
        wrong = differing(Path(scratch) / "prepared0", texts, tokenizer, task.vocabulary.eos_id)
    seconds = {name: statistics.median(wall for wall, _ in values) for name, values in found.items()}
    used = {name: statistics.median(cpu for _, cpu in values) for name, values in found.items()}
    ratio = statistics.median(
        alone / ours for (alone, _), (ours, _) in zip(found["tokenizers alone"], found["prepare"], strict=True)
    )
    table(
        f"{len(texts):,} documents, {megabytes:.1f} MB",
        ["way", "seconds", "MB/s", "processor seconds"],
        [[name, seconds[name], megabytes / seconds[name], used[name]] for name in found],
    )
    checks = {
        "throughput over the library alone": {"value": ratio, "target": ">= 0.8", "ok": ratio >= 0.8},
        "documents with other ids": {"value": wrong, "target": "0", "ok": wrong == 0},
    }
    table(
        "checks", ["check", "value", "target", "ok"], [[n, c["value"], c["target"], c["ok"]] for n, c in checks.items()]
    )
    result = {
        "machine": machine(),
        "versions": versions(),
        "rows": {"seconds and processor seconds": found, "documents": len(texts), "megabytes": megabytes},
        "checks": checks,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

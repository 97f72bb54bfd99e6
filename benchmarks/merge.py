"""A merge of seven experts at the speed of the disk: beside `cp -r` of the same bytes, and the official way in PyTorch.

    python benchmarks/merge.py [--gigabytes 6] [--budget 256MiB] [--rounds 3] [--scratch DIR] [--json FILE]

Writes a synthetic anchor and six contributions, measures, and deletes everything. `cp -r` copies them all, which are
the bytes of the merge. Each way runs in a process of its own, once the disk has settled and what it will read has been
read, and the ways take turns at being the first; medians of the rounds are compared. The official way loads the
owners' state dicts (each with its frozen anchor, since that is what an owner's checkpoint holds there), asserts that
what is shared is equal, and builds and saves the state dict of the merged model.

Needs free disk of twice `--gigabytes`, of four times with the official way, which also needs memory of one and a half
times `--gigabytes`; where there is less memory, it is left out, and the result says so.
"""

import argparse
import dataclasses
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from settling import settle

from flexolmo_jax.evaluate.report import machine, versions
from flexolmo_jax.flags import number_of_bytes
from flexolmo_jax.memory import keep_what_is_freed, peak
from flexolmo_jax.model import PUBLIC, ModelConfig
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.layout import LeafLayout
from flexolmo_jax.store.manifest import ExpertRecord, Manifest
from flexolmo_jax.store.manifest import read as read_manifest
from flexolmo_jax.store.stored import stored_leaves
from flexolmo_jax.terminal import say, table

NAMES = ("math", "code", "news", "law", "art", "sea")
GIB = 2**30

OFFICIAL_MEMORY = 1.5
"""What the official way takes, as a multiple of the merged model's bytes."""


def config_for(gigabytes: float) -> ModelConfig:
    """A model whose public expert and six more take so many bytes in float32, most of them in the experts."""
    config = ModelConfig(vocab_size=8192, width=2048, hidden=5632, layers=1, heads=16, kv_heads=16)
    per_layer = config.num_params(7) - 2 * config.vocab_size * config.width
    return dataclasses.replace(config, layers=max(1, round(gigabytes * 1e9 / 4 / per_layer + 0.5)))


def write_artefact(directory: Path, manifest: Manifest, seed: int) -> Manifest:
    """Random arrays of the manifest's model, written layer by layer."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 0.02, 2**22).astype(np.float32)
    shapes = checkpoint.leaf_shapes(manifest)
    arrays_directory = directory / checkpoint.ARRAYS
    arrays.outline(arrays_directory, shapes)
    described = {}
    for path, shape in shapes.items():
        layout = LeafLayout(path, shape, "float32")

        def blocks(left: int = layout.nbytes):
            while left > 0:
                block = np.roll(noise, int(rng.integers(noise.size)))[: left // 4].view(np.uint8)
                left -= len(block)
                yield block

        described[layout.name] = arrays.describe(shape, "float32", layout.write(arrays_directory / "state", blocks()))
    manifest = dataclasses.replace(manifest, arrays=described)
    if manifest.kind == "anchor":
        manifest = dataclasses.replace(manifest, anchor=checkpoint.anchor_fingerprint(described))
    manifest.write(directory)
    return manifest


def write_inputs(scratch: Path, config: ModelConfig) -> None:
    """The anchor and the contributions."""
    anchor = Manifest(
        kind="anchor", model=config, experts=(ExpertRecord(name=PUBLIC),), anchor="0" * 64, arrays={}, top_k=1
    )
    anchor = write_artefact(scratch / "inputs/anchor", anchor, 0)
    for seed, name in enumerate(NAMES, 1):
        record = (ExpertRecord(name=name, owner=name),)
        part = dataclasses.replace(anchor, kind="contribution", experts=record, top_k=2)
        write_artefact(scratch / "inputs" / name, part, seed)


def ours(scratch: Path, out: Path, budget: int, *, verify: bool) -> None:
    from flexolmo_jax.merge import merge

    inputs = scratch / "inputs"
    merge(inputs / "anchor", [inputs / name for name in NAMES], out, memory_budget=budget, verify=verify)


def official(scratch: Path, out: Path) -> None:
    """The merge as the official script does it: state dicts in memory, experts concatenated, one file saved.

    Kinder to memory than the script, which keeps every owner's whole state dict: what is shared is dropped once it has
    been found equal.
    """
    import torch

    parts: dict[str, list] = {}
    for name in NAMES:
        state = torch.load(scratch / "torch" / f"{name}.pt", weights_only=True)
        for key, tensor in state.items():
            if key.startswith("blocks."):
                public, own = tensor.chunk(2)
                parts.setdefault(key, [public.clone()]).append(own.clone())
            elif key in parts:
                assert torch.equal(parts[key][0], tensor), key
            else:
                parts[key] = [tensor]
        del state, tensor
    merged = {key: torch.cat(parts.pop(key)) for key in list(parts)}
    out.mkdir()
    torch.save(merged, out / "model.pt")


def write_official_inputs(scratch: Path, out: Path) -> None:
    """Each owner's two-expert model as a state dict: the frozen anchor, then the public expert and its own, stacked."""
    import torch

    out.mkdir()

    def read(artefact: str) -> dict:
        directory = scratch / "inputs" / artefact
        leaves = stored_leaves(directory, read_manifest(directory))
        return {path: torch.from_numpy(leaf.read()) for path, leaf in leaves.items()}

    anchor = read("anchor")
    for name in NAMES:
        own = read(name)
        state = {".".join(path): leaf for path, leaf in anchor.items() if path[0] == "anchor"}
        for room, leaf in (("experts", "gate"), ("experts", "up"), ("experts", "down"), ("router", "row")):
            for layer, (public, mine) in enumerate(zip(anchor[room, PUBLIC, leaf], own[room, name, leaf], strict=True)):
                pair = [part.reshape(-1, part.shape[-1]) for part in (public, mine)]
                state[f"blocks.{layer}.{leaf}"] = torch.cat(pair)
        torch.save(state, out / f"{name}.pt")


def copy(scratch: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(scratch / "inputs"), str(out)], check=True)


OFFICIAL = "official, PyTorch"
WAYS = {
    "cp -r": copy,
    "merge": lambda scratch, out, budget: ours(scratch, out, budget, verify=True),
    "merge --no-verify": lambda scratch, out, budget: ours(scratch, out, budget, verify=False),
    OFFICIAL: official,
}
TO_PREPARE = "write the official way's inputs"


class Run(NamedTuple):
    """What one way took: seconds, seconds of processors, and the most bytes of memory, of libraries too."""

    seconds: float
    processor: float
    peak: int


def in_process(way: str, scratch: Path, budget: int) -> Run:
    """One way in a process of its own."""
    out = scratch / "out"
    settle(scratch / ("torch" if way == OFFICIAL else "inputs"))
    measured = json.loads(_start(way, scratch, budget).splitlines()[-1])
    shutil.rmtree(out, ignore_errors=True)
    return Run(measured["seconds"], measured["processor"], measured["peak"])


def _start(way: str, scratch: Path, budget: int) -> str:
    """Does one thing in a process of its own, whose memory ends with it; returns what it printed."""
    arguments = [sys.executable, __file__, "--way", way, "--scratch", str(scratch), "--budget", str(budget)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr}")
    return done.stdout


def run_one(way: str, scratch: Path, budget: int) -> None:
    if way == TO_PREPARE:
        write_official_inputs(scratch, scratch / "torch")
        return
    function = WAYS[way]
    if way.startswith("merge"):
        keep_what_is_freed()  # as the command `flexolmo` begins
        import flexolmo_jax.merge  # noqa: F401
    if way == OFFICIAL:
        import torch  # noqa: F401
    spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    began = time.perf_counter()
    function(scratch, scratch / "out", *([budget] if way.startswith("merge") else []))
    seconds = time.perf_counter() - began
    processor = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": seconds, "processor": processor - spent, "peak": peak()}))


def refuse_too_little_disk(scratch: Path, needed: float) -> None:
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise SystemExit(f"{scratch} has {free / 1e9:.0f} GB free, but this takes {needed / 1e9:.0f} GB")


def free_memory() -> int:
    """Bytes of memory that processes could take."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the merged model")
    parser.add_argument("--budget", type=number_of_bytes, default=2**28, help="the merge's memory budget")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way runs")
    parser.add_argument("--scratch", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run_one(arguments.way, arguments.scratch, arguments.budget)
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="benchmark-") as name:
        result = measure(Path(name), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(scratch: Path, arguments: argparse.Namespace) -> dict:
    config = config_for(arguments.gigabytes)
    nbytes = 4 * config.num_params(7)
    ways = [way for way in WAYS if way != OFFICIAL or free_memory() >= OFFICIAL_MEMORY * nbytes]
    official_inputs = 4 * config.num_params(2) * len(NAMES) if OFFICIAL in ways else 0
    refuse_too_little_disk(scratch, 1.02 * (2 * nbytes + official_inputs))
    write_inputs(scratch, config)
    say(f"{nbytes / 1e9:.1f} GB in the merged model")
    if OFFICIAL in ways:
        _start(TO_PREPARE, scratch, arguments.budget)
    else:
        say(f"{OFFICIAL} is left out: it takes {OFFICIAL_MEMORY * nbytes / GIB:.0f} GiB of memory")
    found: dict[str, list[Run]] = {way: [] for way in ways}
    for number in range(arguments.rounds):
        first = number % len(ways)
        for way in ways[first:] + ways[:first]:
            found[way].append(in_process(way, scratch, arguments.budget))
            say(f"round {number + 1}: {way} {found[way][-1].seconds:.1f} s")
    seconds = {way: statistics.median(each.seconds for each in runs) for way, runs in found.items()}
    processor = {way: statistics.median(each.processor for each in runs) for way, runs in found.items()}
    peaks = {way: max(each.peak for each in runs) for way, runs in found.items()}
    rows = [[way, seconds[way], processor[way], nbytes / 1e9 / seconds[way], peaks[way] / GIB] for way in ways]
    table("merging seven experts", ["way", "seconds", "processor seconds", "GB/s", "peak GiB"], rows)
    checks = {
        "seconds of merge --no-verify / cp -r": check(seconds["merge --no-verify"] / seconds["cp -r"], 1.25, "<="),
        "seconds of merge / cp -r": check(seconds["merge"] / seconds["cp -r"], 2.0, "<="),
        "peak GiB of merge": check(peaks["merge"] / GIB, arguments.budget / GIB + 0.5, "<="),
    }
    if OFFICIAL in ways:
        checks["seconds of official / merge"] = check(seconds[OFFICIAL] / seconds["merge"], 1.5, ">=")
        checks["peak of merge / official"] = check(peaks["merge"] / peaks[OFFICIAL], 0.1, "<=")
    for name, each in checks.items():
        say(f"{'ok  ' if each['ok'] else 'MISS'}  {name}: {each['value']:.3f} ({each['target']})")
    return {
        "machine": machine(),
        "versions": versions(),
        "bytes": nbytes,
        "left_out": [way for way in WAYS if way not in ways],
        "rows": {way: [each._asdict() for each in runs] for way, runs in found.items()},
        "checks": checks,
    }


def check(value: float, target: float, sign: str) -> dict:
    ok = value <= target if sign == "<=" else value >= target
    return {"value": value, "target": f"{sign} {target:g}", "ok": ok}


if __name__ == "__main__":
    main()

"""Import and export of a large Hugging Face model: time and memory, with `cp -r` of the same bytes as the scale.

    python benchmarks/hf.py [--directory DIR] [--gigabytes 6] [--shard 256] [--json FILE]

Makes a synthetic FlexOlmo model of 7 experts in bfloat16 on this disk, copies it with `cp -r`, imports it, exports what
was imported, and compares the two models' files. Each step runs in a process of its own and finds the same: theirs and
ours are there and have been read, and what the step before wrote is gone. The steps take turns at being the first.
Needs free disk of three times `--gigabytes`; all is deleted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from settling import settle

from flexolmo_jax.evaluate.report import machine, versions
from flexolmo_jax.hf import safetensors_file
from flexolmo_jax.hf.names import mixture_pieces
from flexolmo_jax.hf.shards import open_shards
from flexolmo_jax.model import ModelConfig, abstract_params
from flexolmo_jax.model.partition import flatten
from flexolmo_jax.terminal import table

NAMES = ("public", *(f"owner-{number}" for number in range(1, 7)))
REPEATS = 3
GIB = 2**30

STEP = """
import json, resource, sys, time
from flexolmo_jax.memory import keep_what_is_freed, peak
keep_what_is_freed()  # as the command `flexolmo` begins
from flexolmo_jax.hf import export_hf, import_hf
kind, source, out, shard = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF)
began = time.perf_counter()
if kind == "import":
    import_hf(source, out)
else:
    export_hf(source + "/merged", out, max_shard_bytes=int(shard))
seconds = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_SELF)
cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak()}))
"""


def shape(gigabytes: float) -> ModelConfig:
    """A model of seven experts of about so many 10⁹ bytes in bfloat16: layers of one size, as many as it takes."""
    one = ModelConfig(vocab_size=50_304, width=2048, hidden=5632, layers=1, heads=16, kv_heads=16)
    two = ModelConfig(vocab_size=50_304, width=2048, hidden=5632, layers=2, heads=16, kv_heads=16)
    shared, layer = one.num_params(7), two.num_params(7) - one.num_params(7)
    layers = max(1, 1 + round((gigabytes * 1e9 / 2 - shared) / layer))
    return ModelConfig(vocab_size=50_304, width=2048, hidden=5632, layers=layers, heads=16, kv_heads=16)


def make(directory: Path, config: ModelConfig, shard_bytes: int) -> int:
    """Writes the model shard by shard; returns the bytes of its tensors."""
    directory.mkdir()
    leaves = flatten(abstract_params(config, NAMES))
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in mixture_pieces(config.layers, NAMES):
        whole = leaves[piece.path].shape
        part = whole if piece.layer is None else whole[1:]
        shapes[piece.tensor] = (len(NAMES), *part) if piece.rows else part[::-1] if piece.transposed else part
    dtype, random = np.dtype(ml_dtypes.bfloat16), np.random.default_rng(0)
    # Values repeat every 32 MB, with another beginning in every tensor: making them must not take longer than the rest.
    noise = random.normal(0, 0.02, 2**24).astype(dtype)

    def tensor(number: int, wanted: tuple[int, ...]) -> np.ndarray:
        return np.resize(np.roll(noise, 7919 * number), wanted)

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, wanted in shapes.items():
        if shards[-1] and 2 * sum(map(np.prod, [*shards[-1].values(), wanted])) > shard_bytes:
            shards.append({})
        shards[-1][name] = wanted
    weight_map, total, number = {}, 0, 0
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        contents = (tensor(number + place, wanted) for place, wanted in enumerate(shard.values()))
        written = safetensors_file.write(directory / file, {name: (dtype, s) for name, s in shard.items()}, contents)
        weight_map |= dict.fromkeys(shard, file)
        total, number = total + written["bytes"], number + len(shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    content = {
        "architectures": ["FlexOlmoForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "num_experts": len(NAMES),
        "num_experts_per_tok": 4,
        "expert_names": list(NAMES),
    }
    (directory / "config.json").write_text(json.dumps(content))
    return total


def copied(source: Path, out: Path) -> dict[str, float]:
    began = time.perf_counter()
    process = subprocess.Popen(["cp", "-r", str(source), str(out)])
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"cp ended with {status}")
    return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "peak": 0}


def step(kind: str, source: Path, out: Path, shard_bytes: int) -> dict[str, float]:
    arguments = [sys.executable, "-c", STEP, kind, str(source), str(out), str(shard_bytes)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def same(one: Path, other: Path) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    first, second = open_shards(one), open_shards(other)
    return first.names == second.names and all(
        first.read(name, None).tobytes() == second.read(name, None).tobytes() for name in first.names
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to put the models (default: a temporary directory)")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the model, in 10⁹ bytes")
    parser.add_argument("--shard", type=int, default=256, help="largest shard, in MiB")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each step; medians are reported")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    shard_bytes = arguments.shard * 2**20
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        place = Path(scratch)
        free, needed = shutil.disk_usage(place).free, 3.05e9 * arguments.gigabytes
        if free < needed:
            raise SystemExit(f"{place} has {free / 1e9:.0f} GB free, but this takes {needed / 1e9:.0f} GB")
        size = make(place / "theirs", shape(arguments.gigabytes), shard_bytes)
        step("import", place / "theirs", place / "ours", shard_bytes)
        out = place / "out"
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "cp -r": lambda: copied(place / "theirs", out),
            "import-hf": lambda: step("import", place / "theirs", out, shard_bytes),
            "export-hf": lambda: step("export", place / "ours", out, shard_bytes),
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for repeat in range(arguments.repeats):
            for turn in range(len(ways)):
                name = list(ways)[(turn + repeat) % len(ways)]
                settle(place / "theirs", place / "ours")
                runs[name].append(ways[name]())
                if name == "export-hf" and repeat == 0:
                    equal = same(place / "theirs", out)
                shutil.rmtree(out)
    seconds = {name: statistics.median(run["seconds"] for run in each) for name, each in runs.items()}
    peaks = {name: max(run["peak"] for run in each) for name, each in runs.items()}
    rows = {
        name: {
            "seconds": seconds[name],
            "times cp -r": seconds[name] / seconds["cp -r"],
            "GB/s": size / 1e9 / seconds[name],
            "CPU seconds": statistics.median(run["cpu"] for run in runs[name]),
            "peak GiB": peaks[name] / GIB,
        }
        for name in runs
    }
    budget = 2 * shard_bytes / GIB + 0.5
    checks = {"tensors come back bit for bit": {"value": equal, "target": "true", "ok": equal}}
    for name in ("import-hf", "export-hf"):
        ratio, peak = rows[name]["times cp -r"], rows[name]["peak GiB"]
        checks[f"{name} over cp -r, with digests"] = {"value": ratio, "target": "<= 2", "ok": ratio <= 2}
        checks[f"{name} peak GiB"] = {"value": peak, "target": f"<= {budget:g}", "ok": peak <= budget}
    title = f"{size / 1e9:.1f} GB in bfloat16, 7 experts, shards of {arguments.shard} MiB"
    table(title, ["step", *rows["cp -r"]], [[name, *row.values()] for name, row in rows.items()])
    for name, check in checks.items():
        print(f"{'ok  ' if check['ok'] else 'MISS'}  {name}: {check['value']} ({check['target']})")
    if arguments.json:
        result = {"machine": machine(), "versions": versions(), "rows": rows, "checks": checks, "runs": runs}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The mixture-of-experts operation: every implementation beside a dense product of the same FLOPs.

    python benchmarks/moe.py [--json FILE] [--repeats 7]

Each row is one shape; times are medians, in milliseconds, of runs that take turns, so that a busy machine slows all of
them alike. The dense product sends the same `tokens * top_k` rows through one expert: what a perfect grouped product
would take. Temporaries are what XLA allocates beside arguments and results. What is freed is kept, as in the command
`flexolmo`. About three minutes on two cores.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.evaluate.report import machine, versions
from flexolmo_jax.memory import keep_what_is_freed
from flexolmo_jax.moe import FeedForward, choose_implementation, mix_experts
from flexolmo_jax.moe.dense import feed_forward
from flexolmo_jax.products import compiler_options
from flexolmo_jax.terminal import table

WIDTH, HIDDEN = 512, 1408
SHAPES = [
    # tokens, experts, top_k
    (4096, 2, 2),
    (4096, 4, 1),
    (4096, 4, 2),
    (4096, 4, 3),
    (4096, 4, 4),
    (4096, 7, 2),
    (4096, 7, 5),
    (4096, 16, 2),
    (256, 7, 2),
    (32, 7, 2),
]
IMPLEMENTATIONS = "dense", "grouped"


class Inputs(NamedTuple):
    """What `mix_experts` takes, and the cotangent of its result."""

    x: jax.Array
    probabilities: jax.Array
    choices: jax.Array
    experts: list[FeedForward]
    cotangent: jax.Array


def draw(tokens: int, experts: int, top_k: int, dtype) -> Inputs:
    """Random inputs; every token chooses its experts evenly."""
    rng = np.random.default_rng(0)
    choices = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    shapes = (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    weights = [FeedForward(*(jnp.asarray(rng.normal(0, 0.05, s), dtype) for s in shapes)) for _ in range(experts)]
    x, cotangent = jnp.asarray(rng.normal(size=(2, tokens, WIDTH)), dtype)
    return Inputs(x, jnp.asarray(rng.random((tokens, top_k)), jnp.float32), jnp.asarray(choices), weights, cotangent)


def dense_product(inputs: Inputs) -> tuple[Callable, tuple]:
    """All chosen rows through one expert, and its arguments."""
    rows = jnp.tile(inputs.x, (inputs.choices.shape[1], 1))

    def product(x, expert, _):
        return feed_forward(x, expert)

    return product, (rows, inputs.experts[0], inputs.choices)


def of_implementation(name: str, inputs: Inputs) -> tuple[Callable, tuple]:
    def mix(x, probabilities, experts, choices):
        return mix_experts(x, probabilities, choices, experts, name)

    return mix, (inputs.x, inputs.probabilities, inputs.experts, inputs.choices)


def forward_and_backward(function: Callable) -> Callable:
    """The result, and the gradients of its inner product with a cotangent."""

    def both(cotangent, *arguments):
        mixed, backward = jax.vjp(function, *arguments)
        return mixed, backward(jnp.resize(cotangent, mixed.shape))[:-1]

    return both


def take_turns(programs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median milliseconds of each program."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program())
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(times) for name, times in taken.items()}


def measure(tokens: int, experts: int, top_k: int, dtype, repeats: int) -> dict:
    """One row of the table."""
    inputs = draw(tokens, experts, top_k, dtype)
    candidates = {"product": dense_product(inputs)}
    candidates |= {name: of_implementation(name, inputs) for name in IMPLEMENTATIONS}
    programs, row = {}, {"tokens": tokens, "experts": experts, "top_k": top_k, "dtype": jnp.dtype(dtype).name}
    jit = functools.partial(jax.jit, compiler_options=compiler_options(jax.default_backend()))  # as steps are
    for name, (function, arguments) in candidates.items():
        forward = jit(function).lower(*arguments).compile()
        both = jit(forward_and_backward(function)).lower(inputs.cotangent, *arguments).compile()
        programs[f"{name} forward"] = functools.partial(forward, *arguments)
        programs[f"{name} both"] = functools.partial(both, inputs.cotangent, *arguments)
        row[f"{name} MiB"] = round(both.memory_analysis().temp_size_in_bytes / 2**20, 1)
    row |= {name: round(taken, 2) for name, taken in take_turns(programs, repeats).items()}
    row["chosen"] = choose_implementation(tokens=tokens, top_k=top_k, experts=experts, axes={})
    return row


def judge(rows: list[dict]) -> dict[str, dict]:
    """What is promised for many tokens, in float32."""
    checks = {}
    for row in rows:
        shape = f"{row['tokens']} tokens, top-{row['top_k']} of {row['experts']}"
        if row["tokens"] >= 4096 and row["top_k"] < row["experts"]:
            for part in ("forward", "both"):
                value = round(row[f"grouped {part}"] / row[f"product {part}"], 2)
                checks[f"grouped {part} over a dense product: {shape}"] = {
                    "value": value,
                    "target": "<= 1.5",
                    "ok": value <= 1.5,
                }
        best = min(row[f"{name} both"] for name in IMPLEMENTATIONS)
        value = round(row[f"{row['chosen']} both"] / best, 2)
        checks[f"chosen over best: {shape}"] = {"value": value, "target": "<= 1.15", "ok": value <= 1.15}
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each program")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    keep_what_is_freed()
    rows = [measure(*shape, jnp.dtype(arguments.dtype), arguments.repeats) for shape in SHAPES]
    table("mix_experts", list(rows[0]), [list(row.values()) for row in rows])
    checks = judge(rows)
    for name, check in checks.items():
        print(f"{'ok  ' if check['ok'] else 'MISS'} {name}: {check['value']} (target {check['target']})")
    if arguments.json:
        result = {"machine": machine(), "versions": versions(), "rows": rows, "checks": checks}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

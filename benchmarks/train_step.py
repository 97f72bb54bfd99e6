"""Forward pass, training step and expert-only step beside transformers' FlexOlmo in PyTorch.

    python benchmarks/train_step.py [--json FILE] [--repeats 5] [--dtype float32] [--jobs forward,train,expert]

Both programs have the same weights, tokens, threads and dtype. Each runs in a process of its own, and the two of a pair
take turns, so that a busy machine slows both alike; in its turn a program does its job twice, and the second counts.
PyTorch's experts are tried in forms that transformers has, each as it is and under `torch.compile`, and the best
counts; attention is `sdpa`. Figures are medians. It takes half an hour on two cores, and 8 GiB of memory;
`torch.compile` needs a C++ compiler.

The peer's expert-only step is the official one: gradients of all parameters, those of the anchor then set to zero. Ours
takes the batch row by row (`RunConfig.accumulation`), which takes a fraction of the memory. The peer is tried in such
pieces too.

Beside the ratios stands their ceiling: what ours over theirs would be if ours were nothing but the matrix products that
the job cannot do without (`flexolmo_jax/plan/minimum.py`), all as fast as a large one is on this machine. How fast a
large one is in PyTorch stands beside that: in bfloat16 it is what limits ours. A second ceiling is that of ours with
PyTorch's products.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flexolmo_jax.memory import keep_what_is_freed, peak

COMPILED, IN_PIECES = " compiled", " in pieces"
FORMS = "eager", "grouped_mm", f"eager{COMPILED}", f"grouped_mm{COMPILED}"
"""Forms of the experts that transformers has. The third, `batched_mm`, copies an expert's weights for every choice of
every token: 70 GB here."""

PEERS = {"forward": FORMS, "train": FORMS, "expert": (*FORMS, f"eager{IN_PIECES}", f"grouped_mm{IN_PIECES}")}

PIECE = 1
"""Rows of a piece, for those that take the batch in pieces."""

EXPERTS = {"forward": 4, "train": 4, "expert": 2}
"""Experts of the model in each job; every token goes to two."""

TARGETS = {"forward": 1.2, "train": 1.25, "expert": 1.7}
"""Ours over the best of theirs, tokens per second in float32."""

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
}
LEARNING_RATE = 1e-4
PRODUCTS = 50
"""In one turn of the job "product": each takes 10 to 30 ms."""

WARM_UP = 2
"""Times that a program does its job before its first turn: a compiler may want to see shapes twice."""


def draw_tokens(rows: int, length: int):
    import numpy as np

    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (rows, length + 1)).astype(np.int32)


def write_model(directory: Path, experts: int) -> None:
    """A random FlexOlmo of this many experts, as Hugging Face writes it."""
    import torch
    from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    FlexOlmoForCausalLM(FlexOlmoConfig(**SHAPE, **tokens, num_experts=experts, num_experts_per_tok=2)).save_pretrained(
        directory
    )


def ours(directory: Path, job: str, dtype: str, rows: int, length: int) -> Callable:
    """Our program of a job: every call does it once and returns when it is done."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from flexolmo_jax.data.packing import Rows
    from flexolmo_jax.data.reading import Batch
    from flexolmo_jax.hf.importing import read_hf
    from flexolmo_jax.model import builder
    from flexolmo_jax.model.partition import belongs_to_expert, split
    from flexolmo_jax.products import jit_rows
    from flexolmo_jax.train.frozen import in_compute_dtype
    from flexolmo_jax.train.objective import LanguageModelling, ObjectiveConfig, language_modelling
    from flexolmo_jax.train.step import TrainState, jit_step, make_step

    model = read_hf(directory)
    tokens = draw_tokens(rows, length)
    # An owner's job has the first block apart; the policy keeps all that it is slow to make, and no more.
    options = {"first_block_apart": True, "remat": "dots"} if job == "expert" else {}
    build = builder(model.config, model.names, compute_dtype=jnp.dtype(dtype), **options)
    if job == "forward":
        params = jax.tree.map(jnp.asarray, in_compute_dtype(model.params, jnp.dtype(dtype)))
        forward = jit_rows(lambda params, ids: build(params)(ids, top_k=2))
        return lambda: jax.block_until_ready(forward(params, tokens[:, :-1]))

    shape = rows, length
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    packed = Rows(tokens[:, :-1], tokens[:, 1:], positions, np.ones(shape, np.int32), np.ones(shape, np.float32))
    name = model.names[-1]
    trained, frozen = split(model.params, lambda path: job == "train" or belongs_to_expert(path, name))
    # On a device by name, as a job's mesh has them: else the second step, whose state is, would be compiled anew.
    here = jax.devices()[0]
    trained, frozen = jax.device_put((trained, in_compute_dtype(frozen, jnp.dtype(dtype))), here)
    objective, optimizer = ObjectiveConfig(head_z_loss=0.0, router_z_loss=0.0), optax.adamw(LEARNING_RATE)

    def loss(model, batch, weights):
        return language_modelling(model, batch.rows, weights["text"], objective, top_k=2)[:2]

    weigh, pieces = LanguageModelling(objective).weigh, rows // PIECE if job == "expert" else 1
    state = jax.device_put(TrainState(trained, optimizer.init(trained)), here)
    step = jit_step(make_step(build, weigh, loss, optimizer, accumulation=pieces), state)
    batch = jax.device_put(Batch(packed, np.zeros(rows, np.int32)), here)

    def once():
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return once


def theirs(directory: Path, job: str, dtype: str, rows: int, length: int, experts: str) -> Callable:
    """PyTorch's program of a job."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        experts_implementation=experts.removesuffix(COMPILED).removesuffix(IN_PIECES),
    )
    run = torch.compile(model) if experts.endswith(COMPILED) else model
    tokens = torch.as_tensor(draw_tokens(rows, length)).long()
    if job == "forward":

        def forward():
            with torch.inference_mode():
                run(tokens[:, :-1], use_cache=False)

        return forward

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def keep_new_expert():
        for name, parameter in model.named_parameters():
            if ".experts." in name or name.endswith("mlp.gate.weight"):
                parameter.grad[0] = 0
            else:
                parameter.grad.zero_()

    pieces = rows // PIECE if experts.endswith(IN_PIECES) else 1

    def step():
        optimizer.zero_grad(set_to_none=True)
        for piece in tokens.chunk(pieces):
            logits = run(piece[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), piece[:, 1:].flatten())
            (loss / pieces).backward()
        if job == "expert":
            keep_new_expert()
        optimizer.step()

    return step


def our_product(dtype: str, m: int, k: int, n: int) -> Callable:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    from flexolmo_jax.products import jit_rows, project

    a, b, multiply = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype), jit_rows(project)
    return lambda: jax.block_until_ready(multiply(a, b))


def their_product(dtype: str, m: int, k: int, n: int) -> Callable:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    a, b = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((m, k), (k, n)))
    return lambda: a @ b


def product(dtype: str, rows: int, length: int, experts: str) -> Callable:
    """The program of the job "product": a frozen expert's gate of all tokens, many times."""
    make = our_product if experts == "ours" else their_product
    multiply = make(dtype, rows * length, SHAPE["hidden_size"], SHAPE["intermediate_size"])

    def many():
        for _ in range(PRODUCTS):
            multiply()

    return many


def serve(directory: Path, job: str, dtype: str, rows: int, length: int, experts: str) -> None:
    """In a process of its own: does the job twice for every line that comes, and answers with the second one's seconds.

    Steps of a job follow each other. One that follows the other program's pays for memory that the machine lost
    meanwhile: a virtual one hands free pages to its host, and our full step then took nearly twice its time.
    """
    if experts == "ours":
        keep_what_is_freed()  # as the command `flexolmo` begins
    if job == "product":
        program = product(dtype, rows, length, experts)
    elif experts == "ours":
        program = ours(directory, job, dtype, rows, length)
    else:
        program = theirs(directory, job, dtype, rows, length, experts)
    for _ in range(WARM_UP):
        program()
    print("ready", flush=True)
    for _ in sys.stdin:
        program()
        begin = time.perf_counter()
        program()
        print(time.perf_counter() - begin, flush=True)
    print(peak(), flush=True)


def serving(job: str, directory: Path, dtype: str, rows: int, length: int, experts: str) -> list[str]:
    """The command that runs `serve` with these arguments."""
    command = [sys.executable, __file__, "--serve", str(directory), "--jobs", job, "--dtype", dtype]
    return [*command, "--rows", str(rows), "--length", str(length), "--experts", experts]


def take_turns(commands: list[list[str]], repeats: int) -> list[tuple[float, int]]:
    """Median seconds and peak memory in bytes of programs that run `serve`."""
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        for process in processes:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{' '.join(process.args)} failed")
        taken: list[list[float]] = [[] for _ in processes]
        for _ in range(repeats):
            for times, process in zip(taken, processes, strict=True):
                process.stdin.write("\n")
                process.stdin.flush()
                times.append(float(process.stdout.readline()))
        return [
            (statistics.median(times), int(process.communicate()[0].split()[-1]))
            for times, process in zip(taken, processes, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()


def measure(job: str, dtype: str, rows: int, length: int, repeats: int) -> list[dict]:
    """One row of the table for every form of the peer's experts, each beside ours."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch), EXPERTS[job])
        for peer in PEERS[job]:
            pair = [serving(job, Path(scratch), dtype, rows, length, who) for who in ("ours", peer)]
            (our_time, our_peak), (time_, peak) = take_turns(pair, repeats)
            found.append(
                {
                    "job": job,
                    "dtype": dtype,
                    "peer": peer,
                    "our tokens/s": round(rows * length / our_time),
                    "peer tokens/s": round(rows * length / time_),
                    "our GiB": round(our_peak / 2**30, 2),
                    "peer GiB": round(peak / 2**30, 2),
                }
            )
    return found


def least_flops(job: str, rows: int, length: int) -> float:
    """Of the matrix products that a job cannot do without."""
    from flexolmo_jax.model import ModelConfig
    from flexolmo_jax.plan import minimum
    from flexolmo_jax.plan.jobs import Job
    from flexolmo_jax.train.run import RunConfig

    model = ModelConfig(
        vocab_size=SHAPE["vocab_size"],
        width=SHAPE["hidden_size"],
        hidden=SHAPE["intermediate_size"],
        layers=SHAPE["num_hidden_layers"],
        heads=SHAPE["num_attention_heads"],
        kv_heads=SHAPE["num_key_value_heads"],
    )
    run = RunConfig(steps=1, batch_size=rows, sequence_length=length)
    kind = "train-expert" if job == "expert" else "forward"
    least = minimum.flops(Job(kind=kind, model=model, run=run, experts=EXPERTS[job], top_k=2)).total
    # Everything is trained, so every product has the gradients of both its factors.
    return 3 * least if job == "train" else least


def product_flops(dtype: str, rows: int, length: int, repeats: int) -> dict[str, float]:
    """FLOPs per second of a large matrix product in our program and in theirs."""
    taken = take_turns([serving("product", Path(), dtype, rows, length, who) for who in ("ours", "peer")], repeats)
    flops = PRODUCTS * 2 * rows * length * SHAPE["hidden_size"] * SHAPE["intermediate_size"]
    return {who: flops / time_ for who, (time_, _) in zip(("ours", "peer"), taken, strict=True)}


def judge(rows: list[dict], ceilings: dict[str, float], with_their_products: dict[str, float]) -> dict[str, dict]:
    """What is promised in float32: ours over the best of theirs in the same run."""
    checks = {}
    for job in dict.fromkeys(row["job"] for row in rows):
        best = max((row for row in rows if row["job"] == job), key=lambda row: row["peer tokens/s"])
        if best["dtype"] != "float32":
            continue
        value = round(best["our tokens/s"] / best["peer tokens/s"], 2)
        target = TARGETS[job]
        checks[f"{job}: speed"] = {
            "value": value,
            "target": f">= {target}",
            "ceiling here": round(ceilings[job] / best["peer tokens/s"], 2),
            "ceiling with the peer's products": round(with_their_products[job] / best["peer tokens/s"], 2),
            "ok": value >= target,
        }
        if job == "expert":
            # Their memory is that of the official step, which takes the whole batch at once; ours is a median, since
            # where freed memory lies differs from run to run.
            whole = [row for row in rows if row["job"] == job and not row["peer"].endswith(IN_PIECES)]
            official = max(whole, key=lambda row: row["peer tokens/s"])
            ours = statistics.median(row["our GiB"] for row in whole)
            share = round(ours / official["peer GiB"], 2)
            checks["expert: peak memory"] = {"value": share, "target": "<= 0.5", "ok": share <= 0.5}
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--repeats", type=int, default=5, help="times that each program does its job")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--jobs", default="forward,train,expert", help="which jobs, separated by commas")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--experts", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = arguments.dtype, arguments.rows, arguments.length
    if arguments.serve:
        serve(arguments.serve, arguments.jobs, *sizes, arguments.experts)
        return

    from flexolmo_jax.evaluate.report import machine, versions
    from flexolmo_jax.terminal import table

    jobs, shape = arguments.jobs.split(","), sizes[1:]
    speeds = product_flops(*sizes, arguments.repeats)
    per_flop = {job: math.prod(shape) / least_flops(job, *shape) for job in jobs}
    ceilings = {job: speeds["ours"] * per_flop[job] for job in jobs}
    rows = [row for job in jobs for row in measure(job, *sizes, arguments.repeats)]
    table("steps beside transformers' FlexOlmo", list(rows[0]), [list(row.values()) for row in rows])
    print(
        f"a large matrix product in {arguments.dtype}: "
        + ", ".join(f"{name} {speed / 1e9:.0f} GFLOP/s" for name, speed in speeds.items())
        + "; nothing else would give, in tokens per second: "
        + ", ".join(f"{job} {ceiling:,.0f}" for job, ceiling in ceilings.items())
    )
    checks = judge(rows, ceilings, {job: speeds["peer"] * per_flop[job] for job in jobs})
    for name, check in checks.items():
        print(f"{'ok  ' if check['ok'] else 'MISS'} {name}: {check['value']} (target {check['target']})", end="")
        print(*(f", {name} {value}" for name, value in check.items() if name.startswith("ceiling")), sep="")
    if arguments.json:
        products = {name: round(speed / 1e9) for name, speed in speeds.items()}
        products = {"product GFLOP/s": products, "ceilings in tokens/s": {job: round(c) for job, c in ceilings.items()}}
        result = {"machine": machine(), "versions": versions(), **products, "rows": rows, "checks": checks}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The loop that every job runs: resume, step, log, save, and stop cleanly when asked to."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax import terminal
from flexolmo_jax.data.reading import Batches, read_from
from flexolmo_jax.parallel.mesh import Layout
from flexolmo_jax.store.progress import Keep, Progress
from flexolmo_jax.train.run import RunConfig
from flexolmo_jax.train.step import TrainState, jit_step


class Interrupted(KeyboardInterrupt):
    """The job was asked to stop, has saved its state, and goes on from there when it is run again."""


def train(
    step: Callable,
    state: TrainState,
    frozen: dict[str, Any],
    dataset: Batches,
    run: RunConfig,
    *,
    out: Path,
    layout: Layout,
) -> TrainState:
    """Trains until `run.steps`, from the newest complete checkpoint if there is one.

    SIGINT and SIGTERM end the step at hand, save, and raise `Interrupted`.

    Args:
      step: what `make_step` returned.
      state: where to begin, already on the mesh.
      frozen: parameters that the step needs and does not change, already on the mesh.
      dataset: element `s` is the batch of step `s`; each process reads the rows that its own devices need.
      run: how long, and how often to log and save.
      out: directory of the job; `checkpoints/` and `metrics.jsonl` appear in it.
      layout: places batches on the mesh.
    """
    progress = Progress(out / "checkpoints", Keep(latest=run.keep_latest, every=run.keep_every))
    begin = progress.latest() or 0
    if begin:
        state = progress.restore(state)
    _forget_after(out / "metrics.jsonl", begin)
    compiled = jit_step(step, state)
    with (
        layout.active(),
        _StopFlag() as stop,
        (out / "metrics.jsonl").open("a") as log,
        terminal.Progress(out.name, run.steps, first=begin) as bar,
    ):
        window = _Window(run.log_every, run.batch_size * run.sequence_length)
        batches = read_from(dataset, begin, layout.local_rows(run.batch_size))
        for number in range(begin + 1, run.steps + 1):
            state, metrics = compiled(state, frozen, layout.place_batch(next(batches)))
            if row := window.add(number, metrics):
                log.write(json.dumps({"step": number, **row}) + "\n")
                log.flush()
                bar.update(number, **row)
            if number % run.checkpoint_every == 0 or number == run.steps or stop.raised:
                progress.save(number, state)
            if stop.raised and number < run.steps:
                progress.close()
                raise Interrupted(
                    f"stopped after step {number} of {run.steps} and saved; the same command goes on from there"
                )
    progress.close()
    return state


def _forget_after(file: Path, step: int) -> None:
    """Drops the lines of steps that a resumed job does again."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


class _Window:
    """Means of the metrics over the steps since the last line, fetched from the device only when a line is due."""

    def __init__(self, every: int, tokens_per_step: int):
        self._every, self._tokens_per_step = every, tokens_per_step
        self._pending: list[dict[str, jax.Array]] = []
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float] | None:
        self._pending.append(metrics)
        if step % self._every:
            return None
        values = jax.device_get(self._pending)
        row = {key: float(np.mean([value[key] for value in values])) for key in values[0]}
        now = time.perf_counter()
        row["tokens_per_second"] = self._tokens_per_step * len(values) / (now - self._since)
        self._pending, self._since = [], now
        return row


class _StopFlag:
    """While active, SIGINT and SIGTERM raise a flag instead of ending the process; a second SIGINT ends it.

    A second SIGTERM does not, because a scheduler's reaches a confined job twice: by itself, and handed on.
    """

    def __enter__(self) -> "_StopFlag":
        self.raised = False
        self._previous: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._raise)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _raise(self, number, _frame) -> None:
        self.raised = True
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])

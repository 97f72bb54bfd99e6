"""The stages `flexolmo prepare` and `flexolmo prepare-seqio`: text in, token shards out."""

import shlex
from pathlib import Path
from typing import Any

from flexolmo_jax import terminal
from flexolmo_jax.data.beam import on_beam
from flexolmo_jax.data.mixture import Mixture
from flexolmo_jax.data.preparation import Preparation, Task
from flexolmo_jax.data.prepare import prepare_task
from flexolmo_jax.data.registered import RegisteredTask, rates
from flexolmo_jax.data.text_task import TextTask
from flexolmo_jax.errors import UserError


def prepare(
    *, out: Path, task: TextTask | Mixture, preparation: Preparation, beam: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Prepares an owner's text, or writes down a mixture of prepared texts.

    Args:
      out: directory to write.
      task: the text, or the mixture.
      preparation: how text is prepared.
      beam: arguments of a Beam pipeline that does the work, such as "--runner=FlinkRunner"; None means this machine.
      overwrite: whether something else in `out` is replaced.

    Returns:
      What to report: documents and tokens of each split, and what was left out.

    Raises:
      UserError: the text, a tokenizer, a rate or `out` cannot be used; nothing is left behind.
    """
    if isinstance(task, Mixture):
        task.write(out, overwrite=overwrite)
        return {"prepared": out, **task.shares}
    return _prepare_one(task, out, preparation, beam, overwrite)


def prepare_seqio(
    *, out: Path, registered: str, workers: int = 0, beam: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Prepares a task or mixture of SeqIO's registries; of a mixture every task, each in a directory of its own.

    Args:
      out: directory to write.
      registered: `MODULE:NAME`, the module that registers it and its name.
      workers: processes; 0 means one for every core.
      beam: as for `prepare`.
      overwrite: as for `prepare`.

    Raises:
      UserError: there is no such task, or as for `prepare`.
    """
    module, colon, name = registered.rpartition(":")
    if not (module and colon and name):
        raise UserError(f"{registered!r} is not MODULE:NAME, such as flexolmo_jax.data.tasks:flexolmo_math")
    preparation = Preparation(workers=workers)
    mixed = rates(module, name)
    if mixed is None:
        return _prepare_one(RegisteredTask(module, name), out, preparation, beam, overwrite)
    mixture = Mixture(rates={str(out / task): rate for task, rate in mixed.items()})
    reports = {
        task: _prepare_one(RegisteredTask(module, task), out / task, preparation, beam, overwrite) for task in mixed
    }
    mixture.write(out, overwrite=True)
    return {"prepared": out, "tokens": sum(report["train_tokens"] for report in reports.values()), "rates": mixed}


def _prepare_one(task: Task, out: Path, preparation: Preparation, beam: str | None, overwrite: bool) -> dict[str, Any]:
    vocabulary = task.vocabulary
    terminal.banner(
        f"prepare {task.name}",
        {
            "text": task.where,
            "tokenizer": f"{vocabulary.fingerprint}, {vocabulary.size:,} ids, documents end with {vocabulary.eos_id}",
            "duplicates": preparation.deduplicate,
            "out": out,
        },
    )
    workers = on_beam(shlex.split(beam), out.with_name(f"{out.name}.refusals")) if beam is not None else None
    with terminal.Progress(f"prepare {task.name}, %", 100) as bar:
        manifest = prepare_task(
            task,
            out,
            preparation,
            workers=workers,
            progress=lambda share: bar.update(round(100 * share)),
            overwrite=overwrite,
        )
    for line in manifest["bad_lines"]:
        terminal.say(f"skipped: {line}")
    report: dict[str, Any] = {"prepared": out, "tokenizer": manifest["vocabulary"]["fingerprint"]}
    for split, content in manifest["splits"].items():
        report |= {f"{split}_documents": content["documents"], f"{split}_tokens": content["tokens"]}
    return report | {name: manifest[name] for name in ("repeated", "similar", "empty", "bad")}

"""The coordinator's optional job: tune router rows and biases on proxies, public text that resembles the owners'.

The result is a derived model: its rows have seen what every owner's proxies say about that owner, so leaving an expert
out no longer leaves no trace. Its manifest names the owners.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import optax

from flexolmo_jax import terminal
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.reading import batches
from flexolmo_jax.data.vocabularies import SavedVocabulary
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import PUBLIC, ModelConfig, abstract_params, builder
from flexolmo_jax.model.partition import belongs_to_router, join, split
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.store import arrays, checkpoint, companions, manifest
from flexolmo_jax.train.frozen import in_compute_dtype
from flexolmo_jax.train.job import Job
from flexolmo_jax.train.loop import train
from flexolmo_jax.train.objective import LanguageModelling, ObjectiveConfig
from flexolmo_jax.train.optimizer import OptimizerConfig
from flexolmo_jax.train.run import DTYPES, RunConfig
from flexolmo_jax.train.step import Step, TrainState, make_step
from flexolmo_jax.train.text import check_vocabulary


def tune_router(
    *,
    out: Path,
    merged: Path,
    public_text: Path,
    proxies: Mapping[str, Path],
    run: RunConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    mesh: MeshConfig,
    overwrite: bool = False,
    gin: str = "",
) -> dict:
    """Tunes the rows and biases of a merged model and writes the derived model to `out/merged`.

    Args:
      out: directory of the job; `prepared/`, `checkpoints/`, `metrics.jsonl` and `merged/` appear in it.
      merged: directory of the merged model.
      public_text: public corpus.
      proxies: by expert, a corpus of public text that resembles its owner's; all of them and the public corpus are read
        in equal parts (section 3.3.3 of arXiv 2507.07024).
      run: length and batches.
      optimizer: settings of AdamW.
      objective: weights of the losses.
      mesh: how the devices are arranged.
      overwrite: whether to begin anew where `out` holds something else.
      gin: operative configuration, for the manifest.

    Returns:
      What to report: the derived model's directory and the tokens it was tuned on.

    Raises:
      UserError: a setting, the model, a corpus or `out` cannot be used.
      Interrupted: asked to stop; the state is saved.
    """
    base = manifest.read(merged, "merged")
    for name in proxies:
        if name not in base.names or name == PUBLIC:
            raise UserError(f"proxies are given for {name!r}, but the owners' experts are {', '.join(base.names[1:])}")
    settings = {"job": "tune-router", "merged": arrays.fingerprint(base.arrays), "public_text": public_text}
    settings |= {"proxies": dict(proxies), "run": run, "optimizer": optimizer, "objective": objective, "mesh": mesh}
    tokens_seen = run.steps * run.batch_size * run.sequence_length
    result = {"merged": out / "merged", "tokens": tokens_seen}
    with Job(out, settings, overwrite=overwrite) as job:
        if job.is_done("merged"):
            return result
        layout = mesh.build()
        layout.check_batch(run.batch_size // run.accumulation)
        corpora = {PUBLIC: public_text} | dict(proxies)
        vocabulary = SavedVocabulary(base.tokenizer, merged / companions.DIRECTORY)
        prepared = {name: prepare(corpus, job.prepared / name, vocabulary) for name, corpus in corpora.items()}
        for corpus in prepared.values():
            check_vocabulary(corpus, base.model, base.tokenizer)
        rows = [run.rows(corpus, "train") for corpus in prepared.values()]
        terminal.banner(
            "tune-router",
            {
                "model": f"{merged}, experts {', '.join(base.names)}",
                "text": f"{', '.join(corpora)} in equal parts",
                "run": f"{run.steps:,} steps of {run.batch_size} rows, {tokens_seen:,} tokens",
                "mesh": layout.describe(),
                "experts": run.implementation(len(base.names), layout),
                "out": out,
            },
        )
        layout.check(abstract_params(base.model, base.names))
        _, params = checkpoint.load(merged, "merged")
        rows_and_biases, rest = split(params, belongs_to_router)
        trainable = layout.place(rows_and_biases)
        frozen = layout.place(in_compute_dtype(rest, DTYPES[run.compute_dtype]))
        transformation = optimizer.build(run.steps)
        job.begin(prepared)
        state = train(
            router_step(base.model, base.names, run, objective, transformation),
            TrainState(trainable, layout.create(transformation.init, trainable)),
            frozen,
            batches(dict(enumerate(rows)), dict.fromkeys(range(len(rows)), 1 / len(rows)), run.batch_size, run.seed),
            run,
            out=out,
            layout=layout,
        )
        tuned = jax.device_get(state.params)
        derived = dataclasses.replace(
            base,
            arrays=base.arrays | arrays.digests(tuned),
            router_tuned_on=tuple(proxies),
            gin=gin,
            implementation=run.implementation(len(base.names), layout),
        )
        checkpoint.write(out / "merged", join(rest, tuned), derived, carried=merged / companions.DIRECTORY)
        return result


def router_step(
    model: ModelConfig,
    names: Sequence[str],
    run: RunConfig,
    objective: ObjectiveConfig,
    transformation: optax.GradientTransformation,
) -> Step:
    """The step of this job; all but the router is frozen, and every token goes to every expert."""
    task = LanguageModelling(objective)
    return make_step(
        builder(model, names, first_block_apart=True, **run.model_options),
        task.weigh,
        task.loss,
        transformation,
        accumulation=run.accumulation,
    )

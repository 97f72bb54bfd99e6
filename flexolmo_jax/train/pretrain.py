"""The anchor's job: train a dense model on public text."""

from pathlib import Path

import jax
import optax

from flexolmo_jax import terminal
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.reading import batches
from flexolmo_jax.data.tokens import vocabulary_of
from flexolmo_jax.model import PUBLIC, InitialScales, ModelConfig, abstract_params, builder, initialise
from flexolmo_jax.model.bias_channel import pin
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.manifest import ExpertRecord, Manifest, read
from flexolmo_jax.train.job import Job
from flexolmo_jax.train.loop import train
from flexolmo_jax.train.objective import LanguageModelling, ObjectiveConfig
from flexolmo_jax.train.optimizer import OptimizerConfig
from flexolmo_jax.train.run import RunConfig
from flexolmo_jax.train.step import Constraint, Step, TrainState, make_step, unconstrained
from flexolmo_jax.train.text import check_vocabulary, describe


def pretrain(
    *,
    out: Path,
    text: Path,
    model: ModelConfig,
    run: RunConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    mesh: MeshConfig,
    scales: InitialScales,
    overwrite: bool = False,
    gin: str = "",
) -> dict:
    """Trains an anchor and writes it to `out/anchor`.

    Args:
      out: directory of the job; `prepared/`, `checkpoints/`, `metrics.jsonl` and `anchor/` appear in it.
      text: public corpus, a directory or a file.
      model: shape of the anchor.
      run: length and batches.
      optimizer: settings of AdamW.
      objective: weights of the losses.
      mesh: how the devices are arranged.
      scales: scales of the fresh parameters.
      overwrite: whether to begin anew where `out` holds something else.
      gin: operative configuration, for the manifest.

    Returns:
      What to report: the anchor's directory, its fingerprint, and the tokens it saw.

    Raises:
      UserError: a setting, the corpus or `out` cannot be used.
      Interrupted: asked to stop; the state is saved.
    """
    settings = {"job": "pretrain", "text": text, "model": model, "run": run, "optimizer": optimizer}
    settings |= {"objective": objective, "mesh": mesh, "scales": scales}
    tokens_seen = run.steps * run.batch_size * run.sequence_length
    with Job(out, settings, overwrite=overwrite) as job:
        if not job.is_done("anchor"):
            layout = mesh.build()
            layout.check_batch(run.batch_size // run.accumulation)
            prepared = prepare(text, job.prepared)
            tokenizer, vocabulary = check_vocabulary(prepared, model), vocabulary_of(prepared)
            rows = run.rows(prepared, "train")
            terminal.banner(
                "pretrain",
                {
                    "model": f"{model.num_params() / 1e6:,.2f} M parameters",
                    "text": describe(text, rows, run),
                    "run": f"{run.steps:,} steps of {run.batch_size} rows, {tokens_seen:,} tokens",
                    "mesh": layout.describe(),
                    "experts": run.implementation(1, layout),
                    "out": out,
                },
            )
            layout.check(abstract_params(model, (PUBLIC,)))
            params = layout.create(lambda: _constraint(model)(initialise(model, seed=run.seed, scales=scales)))
            transformation = optimizer.build(run.steps)
            job.begin({"public": prepared})
            state = train(
                pretrain_step(model, run, objective, transformation),
                TrainState(params, layout.create(transformation.init, params)),
                {},
                batches({0: rows}, {0: 1.0}, run.batch_size, run.seed),
                run,
                out=out,
                layout=layout,
            )
            described = arrays.digests(jax.device_get(state.params))
            manifest = Manifest(
                kind="anchor",
                model=model,
                experts=(ExpertRecord(name=PUBLIC, tokens_seen=tokens_seen),),
                anchor=checkpoint.anchor_fingerprint(described),
                arrays=described,
                top_k=1,
                tokenizer=tokenizer,
                gin=gin,
                implementation=run.implementation(1, layout),
            )
            checkpoint.write(out / "anchor", jax.device_get(state.params), manifest, carried=vocabulary.directory)
    manifest = read(out / "anchor", "anchor")
    return {"anchor": out / "anchor", "fingerprint": manifest.anchor, "tokens": tokens_seen}


def pretrain_step(
    model: ModelConfig, run: RunConfig, objective: ObjectiveConfig, transformation: optax.GradientTransformation
) -> Step:
    """The step of this job; nothing is frozen."""
    task = LanguageModelling(objective)
    return make_step(
        builder(model, (PUBLIC,), **run.model_options),
        task.weigh,
        task.loss,
        transformation,
        accumulation=run.accumulation,
        constrain=_constraint(model),
    )


def _constraint(model: ModelConfig) -> Constraint:
    return pin if model.bias_channel else unconstrained

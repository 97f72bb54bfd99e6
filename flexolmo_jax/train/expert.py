"""The owner's job: train one expert and its router row beside the frozen anchor, and write the contribution."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from flexolmo_jax import terminal
from flexolmo_jax.data.decoys import Decoys
from flexolmo_jax.data.packing import RowSource
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.reading import batches
from flexolmo_jax.data.vocabularies import SavedVocabulary
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import PUBLIC, ModelConfig, abstract_params, builder
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.store import checkpoint, companions, contribution, manifest
from flexolmo_jax.store.manifest import ExpertRecord
from flexolmo_jax.train.calibrate import Calibration, calibrate_bias
from flexolmo_jax.train.expert_objective import DECOY, FOREIGN, OWN, ExpertTraining, RestraintConfig
from flexolmo_jax.train.frozen import in_compute_dtype
from flexolmo_jax.train.job import Job
from flexolmo_jax.train.loop import train
from flexolmo_jax.train.objective import ObjectiveConfig
from flexolmo_jax.train.optimizer import OptimizerConfig
from flexolmo_jax.train.router_start import RouterStart, Start
from flexolmo_jax.train.run import DTYPES, RunConfig
from flexolmo_jax.train.step import Step, TrainState, make_step
from flexolmo_jax.train.text import check_vocabulary, describe

TOP_K = 2
"""Experts per token in an owner's job: both, softly mixed, as published."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """Whose expert it is, and what it reads.

    Attributes:
      name: of the expert, in lower case; it becomes part of paths.
      owner: who trains it, as the manifest shall say.
      licence: licence id or text under which it is contributed.
      public_share: share of each batch's rows that is public text, so that the row learns whom it is not for.
      decoy_share: share of each batch's rows that is made-up text, which stands in for the other owners' text.
    """

    name: str
    owner: str
    licence: str
    public_share: float = 0.25
    decoy_share: float = 0.3

    def __post_init__(self):
        contribution.check_name(self.name)
        for field in ("public_share", "decoy_share"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(
                    f"ExpertConfig.{field} must be at least 0 and below 1, but it is {getattr(self, field)}"
                )
        if self.public_share + self.decoy_share >= 1:
            raise UserError("ExpertConfig.public_share and decoy_share leave no room for the owner's own text")


def train_expert(
    *,
    out: Path,
    anchor: Path,
    text: Path,
    public_text: Path,
    expert: ExpertConfig,
    run: RunConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    restraint: RestraintConfig,
    router_start: RouterStart,
    calibration: Calibration,
    mesh: MeshConfig,
    overwrite: bool = False,
    gin: str = "",
) -> dict:
    """Trains one expert and writes it to `out/contribution`.

    Args:
      out: directory of the job; `prepared/`, `checkpoints/`, `metrics.jsonl` and `contribution/` appear in it.
      anchor: directory of the anchor.
      text: the owner's corpus.
      public_text: public corpus.
      expert: whose expert it is, and the shares of what it reads.
      run: length and batches.
      optimizer: settings of AdamW.
      objective: weights of the losses.
      restraint: weights of what keeps the expert to its own domain.
      router_start: where its router row begins.
      calibration: how far its bias is lowered after training.
      mesh: how the devices are arranged.
      overwrite: whether to begin anew where `out` holds something else.
      gin: operative configuration, for the manifest.

    Returns:
      What to report: the contribution's directory, the tokens seen, and what the calibration found.

    Raises:
      UserError: a setting, the anchor, a corpus or `out` cannot be used.
      Interrupted: asked to stop; the state is saved.
    """
    base = manifest.read(anchor, "anchor")
    settings = {"job": "train-expert", "anchor": base.anchor, "text": text, "expert": expert, "run": run}
    settings |= {"public_text": public_text}
    settings |= {"optimizer": optimizer, "objective": objective, "restraint": restraint, "router_start": router_start}
    tokens_seen = run.steps * run.batch_size * run.sequence_length
    result = {"contribution": out / "contribution", "tokens": tokens_seen}
    with Job(out, settings | {"calibration": calibration, "mesh": mesh}, overwrite=overwrite) as job:
        if job.is_done("contribution"):
            return result
        layout = mesh.build()
        layout.check_batch(run.batch_size // run.accumulation)
        vocabulary = SavedVocabulary(base.tokenizer, anchor / companions.DIRECTORY)
        own = prepare(text, job.prepared / "own", vocabulary)
        public = prepare(public_text, job.prepared / "public", vocabulary)
        for part in (own, public):
            check_vocabulary(part, base.model, base.tokenizer)
        own_rows, public_rows = (run.rows(part, "train") for part in (own, public))
        shares = {
            OWN: 1 - expert.public_share - expert.decoy_share,
            FOREIGN: expert.public_share,
            DECOY: expert.decoy_share,
        }
        sources: dict[int, RowSource] = {
            OWN: own_rows,
            FOREIGN: public_rows,
            DECOY: Decoys(public_rows, own_rows, run.seed),
        }
        terminal.banner(
            f"train-expert {expert.name}",
            {
                "anchor": f"{anchor}, {base.model.num_params() / 1e6:,.2f} M parameters, frozen",
                "trainable": f"{(base.model.num_params(2) - base.model.num_params()) / 1e6:,.2f} M parameters",
                "text": describe(text, own_rows, run),
                "batch": f"{shares[OWN]:.0%} own, {shares[FOREIGN]:.0%} public, {shares[DECOY]:.0%} decoys",
                "run": f"{run.steps:,} steps of {run.batch_size} rows, {tokens_seen:,} tokens",
                "mesh": layout.describe(),
                "experts": run.implementation(TOP_K, layout),
                "out": out,
            },
        )

        layout.check(abstract_params(base.model, (PUBLIC, expert.name)))
        _, loaded = checkpoint.load(anchor, "anchor")
        frozen = layout.place(in_compute_dtype(loaded, DTYPES[run.compute_dtype]))
        build = builder(base.model, (PUBLIC, expert.name), **run.model_options)
        build_anchor = builder(base.model, (PUBLIC,), **run.model_options)
        start = router_start.begin(base.model, build_anchor, frozen, own_rows, public_rows, run.seed)
        trainable = layout.place(_new_expert(loaded, expert.name, start))
        transformation = optimizer.build(run.steps)
        job.begin({"own": own, "public": public})
        state = train(
            expert_step(base.model, expert.name, run, objective, restraint, transformation),
            TrainState(trainable, layout.create(transformation.init, trainable)),
            frozen,
            batches(sources, shares, run.batch_size, run.seed),
            run,
            out=out,
            layout=layout,
        )
        own_held_out, public_held_out = (_held_out(part, run) for part in (own, public))
        params, found = calibrate_bias(
            build, frozen, state.params, expert.name, own_held_out, public_held_out, calibration
        )
        record = ExpertRecord(name=expert.name, owner=expert.owner, tokens_seen=tokens_seen, licence=expert.licence)
        contribution.write(
            out / "contribution",
            jax.device_get(params),
            base,
            record,
            top_k=TOP_K,
            gin=gin,
            implementation=run.implementation(TOP_K, layout),
        )
        return result | {"calibration": found}


def expert_step(
    model: ModelConfig,
    name: str,
    run: RunConfig,
    objective: ObjectiveConfig,
    restraint: RestraintConfig,
    transformation: optax.GradientTransformation,
) -> Step:
    """The step of this job; the anchor is frozen."""
    task = ExpertTraining(name, objective, restraint)
    return make_step(
        builder(model, (PUBLIC, name), first_block_apart=True, **run.model_options),
        task.weigh,
        task.loss,
        transformation,
        accumulation=run.accumulation,
    )


def _held_out(prepared: Path, run: RunConfig) -> RowSource:
    """Rows to calibrate on: the validation split, or the training split where a small corpus left it empty."""
    rows = run.rows(prepared, "validation")
    return rows if len(rows) else run.rows(prepared, "train")


def _new_expert(anchor: dict, name: str, start: Start) -> dict:
    """A copy of the public expert under a new name, with its own row and bias."""
    return {
        "experts": {name: jax.tree.map(jnp.copy, anchor["experts"][PUBLIC])},
        "router": {name: {"row": start.row, "bias": start.bias}},
    }

"""The program that each job runs on the devices, with its arguments as shapes: the job's own functions, not copies."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flexolmo_jax.data.packing import Rows
from flexolmo_jax.data.reading import Batch
from flexolmo_jax.data.vocabulary import EOS_ID
from flexolmo_jax.errors import UserError, did_you_mean
from flexolmo_jax.infer import language_model
from flexolmo_jax.model import PUBLIC, ModelConfig, abstract_params, builder
from flexolmo_jax.model.partition import LeafPath, belongs_to_expert, belongs_to_router, select
from flexolmo_jax.parallel import Layout
from flexolmo_jax.train.expert import TOP_K, expert_step
from flexolmo_jax.train.expert_objective import RestraintConfig
from flexolmo_jax.train.frozen import in_compute_dtype
from flexolmo_jax.train.objective import ObjectiveConfig
from flexolmo_jax.train.optimizer import OptimizerConfig
from flexolmo_jax.train.pretrain import pretrain_step
from flexolmo_jax.train.router import router_step
from flexolmo_jax.train.run import DTYPES, RunConfig
from flexolmo_jax.train.step import TrainState, jit_step

TRAINING = ("pretrain", "train-expert", "tune-router")
INFERENCE = ("forward", "generate")

FIXED_EXPERTS = {"pretrain": 1, "train-expert": TOP_K}
"""Jobs whose number of experts is given."""

_OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=1)
"""Rates and weights are constants of the program: their values change neither its memory nor its work."""


class Program(NamedTuple):
    """What is compiled.

    Attributes:
      function: a jitted function.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings, and static values.
    """

    function: Any
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a stage would run.

    Attributes:
      kind: a name of `TRAINING` or `INFERENCE`.
      model: shape of the model.
      run: batches and how they are computed. For `forward` and `generate` a batch is what is computed at once.
      experts: experts of the model, the public one included.
      top_k: experts per token.
      new_tokens: for `generate`, tokens to add to each row of `run.sequence_length` tokens.
    """

    kind: str
    model: ModelConfig
    run: RunConfig
    experts: int
    top_k: int
    new_tokens: int = 128

    def __post_init__(self):
        _check_kind(self.kind)
        for flag, value in (("experts", self.experts), ("top_k", self.top_k), ("new_tokens", self.new_tokens)):
            if value < 1:
                raise UserError(f"--{flag} must be at least 1, but it is {value}")
        if self.top_k > self.experts:
            raise UserError(f"top_k is {self.top_k}, but the model has {self.experts} experts")
        if self.kind in FIXED_EXPERTS and self.experts != FIXED_EXPERTS[self.kind]:
            raise UserError(f"{self.kind} has {FIXED_EXPERTS[self.kind]} experts, but {self.experts} are given")
        if self.kind in TRAINING and self.top_k != self.experts:
            raise UserError(
                f"{self.kind} sends every token to all {self.experts} experts, so top_k cannot be {self.top_k}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names for the experts; which, makes no difference."""
        return (PUBLIC, *(f"owner{number}" for number in range(1, self.experts)))

    @property
    def tokens(self) -> int:
        """Tokens of one run of the program, over all devices."""
        return self.run.batch_size * (self.run.sequence_length + (self.new_tokens if self.kind == "generate" else 0))

    def is_trained(self, path: LeafPath) -> bool:
        """Whether the job changes this leaf."""
        return {
            "pretrain": lambda: True,
            "train-expert": lambda: belongs_to_expert(path, self.names[-1]),
            "tune-router": lambda: belongs_to_router(path),
        }.get(self.kind, lambda: False)()

    def params(self) -> tuple[dict, dict]:
        """Shapes of the trained and of the frozen parameters."""
        whole = _shapes(self.model, self.names)
        frozen = select(whole, lambda path: not self.is_trained(path))
        cast = functools.partial(in_compute_dtype, dtype=DTYPES[self.run.compute_dtype])
        return select(whole, self.is_trained), jax.eval_shape(cast, frozen)

    def program(self, layout: Layout) -> Program:
        """The job's function and its arguments on a mesh.

        Raises:
          UserError: the batch or a parameter cannot be cut over the mesh.
        """
        layout.check_batch(self.run.batch_size // self.run.accumulation)
        layout.check(_shapes(self.model, self.names))
        trained, frozen = (_placed(tree, layout) for tree in self.params())
        return self._training(trained, frozen, layout) if self.kind in TRAINING else self._inference(frozen, layout)

    def _training(self, trained: dict, frozen: dict, layout: Layout) -> Program:
        transformation = _OPTIMIZER.build(self.run.steps)
        state = TrainState(trained, _placed(jax.eval_shape(transformation.init, trained), layout))
        if self.kind == "pretrain":
            step = pretrain_step(self.model, self.run, ObjectiveConfig(), transformation)
        elif self.kind == "train-expert":
            name = self.names[-1]
            step = expert_step(self.model, name, self.run, ObjectiveConfig(), RestraintConfig(), transformation)
        else:
            step = router_step(self.model, self.names, self.run, ObjectiveConfig(), transformation)
        rows = {name: self._ids(layout, jnp.float32 if name == "weights" else jnp.int32) for name in Rows._fields}
        batch = Batch(Rows(**rows), self._per_row(layout))
        return Program(jit_step(step, state), (state, frozen, batch))

    def _inference(self, params: dict, layout: Layout) -> Program:
        build = builder(self.model, self.names, **self.run.model_options)
        ids, permitted = self._ids(layout, jnp.int32), self._per_row(layout, (self.experts,), jnp.bool_)
        if self.kind == "forward":
            return Program(language_model._logits, (build, self.top_k, params, ids, permitted))
        lengths = self._per_row(layout)
        static = (build, self.top_k, self.new_tokens, EOS_ID)
        return Program(language_model._generate, (*static, params, ids, lengths, permitted))

    def _ids(self, layout: Layout, dtype) -> jax.ShapeDtypeStruct:
        return self._per_row(layout, (self.run.sequence_length,), dtype)

    def _per_row(self, layout: Layout, shape: tuple[int, ...] = (), dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.run.batch_size, *shape), dtype, sharding=layout.batch_sharding())


def experts_of(kind: str) -> int:
    """How many experts the model of such a job has.

    Raises:
      UserError: there is no such job, or its model may have any number of them.
    """
    _check_kind(kind)
    if kind not in FIXED_EXPERTS:
        raise UserError(
            f"--experts has no value: say how many experts the model of {kind} has, the public one included"
        )
    return FIXED_EXPERTS[kind]


def _check_kind(kind: str) -> None:
    if kind not in TRAINING + INFERENCE:
        raise UserError(f"there is no job {kind!r} to plan; {did_you_mean(kind, TRAINING + INFERENCE)}")


_shapes = functools.cache(abstract_params)
"""A search asks for the same ones a thousand times."""


def _placed(tree: Any, layout: Layout) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        layout.shardings(tree),
    )

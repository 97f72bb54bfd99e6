"""The language model: OLMo 2 blocks whose feed-forward network is a mixture of named experts.

Axis legend: `L` layers, `B` rows, `S` positions, `D` width, `V` vocabulary, `E` experts, `K` choices.

Modules hold their weights stacked over layers, under the same paths as the schema on disk, for example
`experts/public/gate` [L, D, F]. The scan over layers hands each block its own slice of the modules.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax import products
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import attention_blocks
from flexolmo_jax.model.attention import Attention, KeyValues
from flexolmo_jax.model.config import PUBLIC, ModelConfig
from flexolmo_jax.model.norm import rms_norm
from flexolmo_jax.model.rotary import rotary_angles
from flexolmo_jax.model.router import RouterRow, Routing, choose
from flexolmo_jax.moe import FeedForward, mix_experts
from flexolmo_jax.parallel.activations import come_together, keep_rows

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(products.KEPT, attention_blocks.KEPT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a block keeps for the backward pass: everything, the results of matrix products and of attention, or its input
alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialScales:
    """Scales of a fresh model. The defaults are those of OLMo 2; a small model learns faster with others.

    Attributes:
      weights: standard deviation of every matrix, cut off at three of them.
      embedding: the same of the embedding.
      norms: what the norms after attention and feed-forward network begin at.
    """

    weights: float = 0.02
    embedding: float = 0.02
    norms: float = 1.0


class Anchor(nnx.Module):
    """Everything that all owners share and none of them trains."""

    def __init__(self, config: ModelConfig, initialise, scales: InitialScales):
        stacked = config.layers, config.width
        self.embed = nnx.Param(initialise((config.vocab_size, config.width)) * (scales.embedding / scales.weights))
        self.attention = Attention(config, initialise)
        self.attention_norm = nnx.Param(jnp.full(stacked, scales.norms))
        self.ffn_norm = nnx.Param(jnp.full(stacked, scales.norms))
        self.final_norm = nnx.Param(jnp.ones((config.width,)))
        self.head = nnx.Param(initialise((config.width, config.vocab_size)))


class Expert(nnx.Module):
    """One feed-forward network per layer."""

    def __init__(self, config: ModelConfig, initialise):
        self.gate = nnx.Param(initialise((config.layers, config.width, config.hidden)))
        self.up = nnx.Param(initialise((config.layers, config.width, config.hidden)))
        self.down = nnx.Param(initialise((config.layers, config.hidden, config.width)))

    def weights(self) -> FeedForward:
        return FeedForward(self.gate[...], self.up[...], self.down[...])


class Layers(NamedTuple):
    """What the scan slices along its leading axis, one layer at a time."""

    attention: Attention
    attention_norm: Array
    ffn_norm: Array
    experts: dict[str, Expert]
    router: dict[str, RouterRow]


class Trace(NamedTuple):
    """What a pass through the blocks leaves behind; jit drops the parts that nobody reads.

    Attributes:
      hidden: [B, S, D], normalised and ready for the head.
      router_inputs: [L, B, S, D], the residual stream that each router saw.
      routing: logits [L, B, S, E], probabilities and choices [L, B, S, K].
      measured: what `mix` measured, with a leading axis of layers.
    """

    hidden: Float[Array, "B S D"]
    router_inputs: Float[Array, "L B S D"]
    routing: Routing
    measured: Any = None


Mix = Callable[[Float[Array, "B S D"], Routing, Layers], tuple[Float[Array, "B S D"], Any]]
"""From what a layer's experts see and what its router decided to their mixed output and a pytree of measurements."""


class Transformer(nnx.Module):
    """An anchor with its public expert and any number of further experts, known by name.

    Blocks run in a loop, whose rounds are all alike. With `first_block_apart` the first one runs before it: where
    nothing below its experts is trained, its attention has no backward pass then.
    """

    def __init__(
        self,
        config: ModelConfig,
        experts: Sequence[str] = (PUBLIC,),
        *,
        compute_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        implementation: str | None = None,
        first_block_apart: bool = False,
        scales: InitialScales | None = None,
        rngs: nnx.Rngs,
    ):
        if experts[0] != PUBLIC or len(set(experts)) != len(experts):
            raise UserError(f"experts must begin with {PUBLIC!r} and have distinct names, but they are {list(experts)}")
        if remat not in REMAT_POLICIES:
            raise UserError(f"remat is {remat!r}, but the policies are {sorted(REMAT_POLICIES)}")

        scales = scales or InitialScales()

        def initialise(shape):
            return scales.weights * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape)

        self.config = config
        self.names = tuple(experts)
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.implementation = implementation
        self.first_block_apart = first_block_apart
        self.anchor = Anchor(config, initialise, scales)
        self.experts = nnx.Dict({name: Expert(config, initialise) for name in experts})
        self.router = nnx.Dict({name: RouterRow(config, has_bias=name != PUBLIC) for name in experts})

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        permitted: Bool[Array, "B E"] | None = None,
        top_k: int | None = None,
    ) -> Float[Array, "B S V"]:
        """Float32 logits of the next token, each row of `tokens` being one document."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        trace = self.trace(tokens, positions, jnp.zeros_like(tokens), permitted=permitted, top_k=top_k)
        return self.unembed(trace.hidden)

    def trace(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        *,
        permitted: Bool[Array, "B E"] | None = None,
        top_k: int | None = None,
        mix: Mix | None = None,
    ) -> Trace:
        """Runs packed documents through the blocks.

        Args:
          tokens: ids.
          positions: position of each token in its own document.
          segments: number of the document that each token belongs to; documents do not attend to each other.
          permitted: which experts each row may use; None permits all.
          top_k: experts per token; None means all of them.
          mix: evaluates and mixes the experts, in place of `mix_experts`.
        """
        angles = self._angles(positions)

        def block(x, layer: Layers):
            queries, own = layer.attention.project(x, angles)
            x = keep_rows(
                x + self._norm(layer.attention.attend_documents(queries, own, segments), layer.attention_norm)
            )
            routing = self._route(x, layer, permitted, top_k)
            mixed, measured = (mix or self._mix)(x, routing, layer)
            return keep_rows(x + self._norm(mixed, layer.ffn_norm)), (x, routing, measured)

        if REMAT_POLICIES[self.remat] is not None:
            block = jax.checkpoint(block, policy=REMAT_POLICIES[self.remat])
        x, left_behind = self._through_blocks(block, self._embed(tokens))
        return Trace(self._norm(x, self.anchor.final_norm[...]), *left_behind)

    def decode(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        cache: KeyValues,
        *,
        permitted: Bool[Array, "B E"] | None = None,
        top_k: int | None = None,
    ) -> tuple[Float[Array, "B S D"], KeyValues]:
        """Like `trace`, but attends to `cache` [L, B, T, G, C] as well, and returns it with these tokens written in.

        A token at position p sees cached positions 0 to p, so whatever lies beyond is overwritten before it is read.
        """
        angles = self._angles(positions)
        rows = jnp.arange(tokens.shape[0])[:, None]
        mask = (jnp.arange(cache.keys.shape[2]) <= positions[:, :, None])[:, None]

        def block(x, sliced):
            layer, past = sliced
            queries, own = layer.attention.project(x, angles)
            past = jax.tree.map(lambda old, new: old.at[rows, positions].set(new.astype(old.dtype)), past, own)
            x = keep_rows(x + self._norm(layer.attention.attend(queries, past, mask), layer.attention_norm))
            mixed, _ = self._mix(x, self._route(x, layer, permitted, top_k), layer)
            return keep_rows(x + self._norm(mixed, layer.ffn_norm)), past

        x, cache = jax.lax.scan(block, self._embed(tokens), (self._layers(), cache))
        return self._norm(x, self.anchor.final_norm[...]), cache

    def empty_cache(self, rows: int, positions: int) -> KeyValues:
        config = self.config
        shape = (config.layers, rows, positions, config.kv_heads, config.head_width)
        return KeyValues(jnp.zeros(shape, self.compute_dtype), jnp.zeros(shape, self.compute_dtype))

    def unembed(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return products.project_wide(hidden, self.head_in(hidden.dtype))

    def head_in(self, dtype: DTypeLike) -> Float[Array, "D V"]:
        """The head's matrix, for products that are float32: devices gather it here, not in a loop that reads it."""
        return come_together(self.anchor.head[...].astype(dtype), None, "tensor")

    def _layers(self) -> Layers:
        anchor = self.anchor
        return Layers(
            anchor.attention, anchor.attention_norm[...], anchor.ffn_norm[...], dict(self.experts), dict(self.router)
        )

    def _through_blocks(self, block, x):
        """Like `jax.lax.scan` of a block over the layers."""
        layers = self._layers()
        if not self.first_block_apart:
            return jax.lax.scan(block, x, layers)
        x, first = block(x, jax.tree.map(lambda stacked: stacked[0], layers))
        x, others = jax.lax.scan(block, x, jax.tree.map(lambda stacked: stacked[1:], layers))
        return x, jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest]), first, others)

    def _embed(self, tokens):
        return keep_rows(jnp.take(self.anchor.embed[...].astype(self.compute_dtype), tokens, axis=0))

    def _angles(self, positions):
        return rotary_angles(positions, self.config.head_width, self.config.rope_theta)

    def _norm(self, x, scale):
        return rms_norm(x, scale, self.config.norm_epsilon)

    def _route(self, x, layer: Layers, permitted, top_k) -> Routing:
        logits = jnp.stack([layer.router[name](x) for name in self.names], axis=-1)
        top_k = min(top_k or len(self.names), len(self.names))
        return choose(logits, permitted, top_k, self.config.normalize_top_k)

    def _mix(self, x, routing: Routing, layer: Layers) -> tuple[Array, None]:
        tokens, probabilities, choices = (
            a.reshape(-1, a.shape[-1]) for a in (x, routing.probabilities, routing.choices)
        )
        weights = [layer.experts[name].weights() for name in self.names]
        # A weight is zero only where fewer experts are permitted than chosen: the surplus costs nothing as no expert.
        choices = jnp.where(probabilities > 0, choices, len(self.names))
        return mix_experts(tokens, probabilities, choices, weights, self.implementation).reshape(x.shape), None


def initialise(
    config: ModelConfig, experts: Sequence[str] = (PUBLIC,), *, seed: int, scales: InitialScales | None = None
) -> dict:
    """Fresh parameters as a nested dict under the paths of the schema, the bias channel not yet pinned."""

    def create():
        return nnx.to_pure_dict(nnx.state(Transformer(config, experts, scales=scales, rngs=nnx.Rngs(seed))))

    return jax.jit(create)()


Build = Callable[[dict], Transformer]
"""Turns a nested dict of arrays, under the paths of the schema, into a model."""


def builder(config: ModelConfig, experts: Sequence[str], **options) -> Build:
    """A function that puts arrays into a `Transformer` of this shape without initialising one first."""
    abstract = nnx.eval_shape(lambda: Transformer(config, experts, rngs=nnx.Rngs(0), **options))
    structure, _ = nnx.split(abstract)
    return lambda params: nnx.merge(structure, nnx.State(params))


def abstract_params(config: ModelConfig, experts: Sequence[str]) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`: every path and shape that a model with these experts has."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Transformer(config, experts, rngs=nnx.Rngs(0)))))

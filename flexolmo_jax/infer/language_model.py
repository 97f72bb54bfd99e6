"""A model that has been loaded for use: logits and text, with a choice of experts for every request."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flexolmo_jax.data.vocabularies import SavedVocabulary, Vocabulary
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import PUBLIC, ModelConfig, builder
from flexolmo_jax.model.partition import join
from flexolmo_jax.store import checkpoint, companions, contribution
from flexolmo_jax.store.manifest import Manifest, read

ExpertChoice = Sequence[str] | Sequence[Sequence[str]] | None
"""Names of the permitted experts: for all rows alike, or row by row; None permits all."""


class LanguageModel:
    """An anchor, an owner's two-expert model or a merged model.

    Attributes:
      config: shape of the model.
      names: its experts, in order.
      top_k: experts per token where a call does not say.
      params: nested dict of its arrays, under the paths of the schema.
      tokenizer: what its text is to be encoded with.
    """

    def __init__(
        self,
        config: ModelConfig,
        names: Sequence[str],
        params: Mapping[str, Any],
        top_k: int,
        tokenizer: SavedVocabulary | None = None,
    ):
        self.config = config
        self.names = tuple(names)
        self.top_k = top_k
        self.tokenizer = tokenizer or SavedVocabulary()
        self.params = jax.tree.map(jnp.asarray, dict(params))
        self.build = _shared_builder(config, self.names)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Text to ids and back.

        Raises:
          UserError: the model does not carry its tokenizer.
        """
        return self.tokenizer.open()

    def __call__(
        self, ids: Int[Array | np.ndarray, "B S"], *, experts: ExpertChoice = None, top_k: int | None = None
    ) -> Float[Array, "B S V"]:
        """Float32 logits of the token after each one; every row is one document without padding before its end.

        Raises:
          UserError: an expert is unknown, none is permitted, or `top_k` is not between 1 and the number of experts.
        """
        ids = jnp.asarray(ids)
        return _logits(self.build, self.check_top_k(top_k), self.params, ids, self.permitted(experts, len(ids)))

    def generate(
        self,
        ids: Int[Array | np.ndarray, "B S"],
        lengths: Int[Array | np.ndarray, "B"],
        *,
        max_new_tokens: int,
        experts: ExpertChoice = None,
        top_k: int | None = None,
    ) -> Int[np.ndarray, "B N"]:
        """Continues each prompt greedily.

        Args:
          ids: prompts, padded on the right.
          lengths: length of each prompt.
          max_new_tokens: tokens to add (N).
          experts: permitted experts, for all rows or row by row.
          top_k: experts per token.

        Returns:
          The new tokens; after an end of text, more ends of text.

        Raises:
          UserError: as for a call, or the model does not carry its tokenizer, which says what ends a text.
        """
        ids, lengths = jnp.asarray(ids), jnp.asarray(lengths)
        permitted = self.permitted(experts, len(ids))
        settings = self.build, self.check_top_k(top_k), max_new_tokens, self.vocabulary.eos_id
        new = _generate(*settings, self.params, ids, lengths, permitted)
        return np.asarray(new)

    def check_top_k(self, top_k: int | None) -> int:
        """The number of experts per token that a call asks for, or the model's own."""
        top_k = self.top_k if top_k is None else top_k
        if not 1 <= top_k <= len(self.names):
            raise UserError(f"top_k is {top_k}, but the model has {len(self.names)} experts")
        return top_k

    def permitted(self, experts: ExpertChoice, rows: int) -> jax.Array | None:
        """The mask [rows, E] of permitted experts, or None where all are."""
        if experts is None:
            return None
        for_all = [name for name in experts if isinstance(name, str)]
        choices = [for_all] * rows if for_all or not experts else [list(names) for names in experts]
        if len(choices) != rows:
            raise UserError(f"experts are chosen for {len(choices)} rows, but there are {rows}")
        mask = np.zeros((rows, len(self.names)), bool)
        for row, names in enumerate(choices):
            if unknown := sorted(set(names) - set(self.names)):
                raise UserError(f"the model has no expert {unknown[0]!r}; it has {', '.join(self.names)}")
            if not names:
                raise UserError("at least one expert must be permitted")
            mask[row, [self.names.index(name) for name in names]] = True
        return jnp.asarray(mask)


def load(directory: str | Path) -> LanguageModel:
    """Loads an anchor or a merged model.

    Raises:
      UserError: the directory holds no such model.
    """
    manifest, params = checkpoint.load(Path(directory), "anchor", "merged")
    tokenizer = SavedVocabulary(manifest.tokenizer, Path(directory) / companions.DIRECTORY)
    return LanguageModel(manifest.model, manifest.names, params, manifest.top_k, tokenizer)


def load_with_contribution(anchor: Path, directory: Path) -> LanguageModel:
    """An owner's own model: the anchor and one contribution, both experts active."""
    base: Manifest = read(anchor, "anchor")
    _, params = checkpoint.load(anchor, "anchor")
    manifest, part = contribution.load(directory, base)
    part = contribution.expanded(part, manifest.experts[0], params["experts"][PUBLIC])
    tokenizer = SavedVocabulary(base.tokenizer, anchor / companions.DIRECTORY)
    return LanguageModel(base.model, (*base.names, *manifest.names), join(params, part), 2, tokenizer)


@functools.cache
def _shared_builder(config: ModelConfig, names: tuple[str, ...]):
    """The same function for all models of a structure, so that they share whatever is compiled for it."""
    return builder(config, names)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(build, top_k, params, ids, permitted):
    return build(params)(ids, permitted=permitted, top_k=top_k)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(build, top_k, max_new_tokens, eos_id, params, ids, lengths, permitted):
    model = build(params)
    rows = jnp.arange(ids.shape[0])
    choice = {"permitted": permitted, "top_k": top_k}
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    cache = model.empty_cache(ids.shape[0], ids.shape[1] + max_new_tokens)
    hidden, cache = model.decode(ids, positions, cache, **choice)
    token = jnp.argmax(model.unembed(hidden[rows, lengths - 1]), axis=-1)

    def advance(carry, step):
        token, cache = carry
        hidden, cache = model.decode(token[:, None], (lengths + step)[:, None], cache, **choice)
        following = jnp.argmax(model.unembed(hidden[:, 0]), axis=-1)
        return (jnp.where(token == eos_id, eos_id, following), cache), token

    _, tokens = jax.lax.scan(advance, (token, cache), jnp.arange(max_new_tokens))
    return tokens.T

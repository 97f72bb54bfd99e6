"""Folding router biases into router rows where the anchor has no bias channel: approximately, and measured.

A bias b is exact in a row if some vector v gives v · x = 1 for every router input x: row + b v then acts like the row
with its bias. Without a reserved channel no such v exists, and ridge regression finds the closest: in every layer, on
the anchor's hidden states x of public text,

    v = (E[x xᵀ] + λ I)⁻¹ E[x]

minimises E[(v · x - 1)²] + λ |v|². λ is chosen on validation text, and what is left is measured on test text.
Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 3.4.1.

Axis legend: `L` layers, `B` rows, `S` positions, `D` width, `E` experts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.data.documents import split_texts
from flexolmo_jax.errors import UserError
from flexolmo_jax.infer import LanguageModel, load
from flexolmo_jax.model import PUBLIC
from flexolmo_jax.model.partition import LeafPath, flatten, unflatten
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.terminal import table

ROWS = {"train": 128, "validation": 32, "test": 32}
"""Pieces of documents that are read of each split, at most."""

LENGTH = 256
"""Tokens in a piece, at most."""

BATCH = 8
STRENGTHS = tuple(10.0**power for power in range(-8, 1))
"""λ that are tried, in units of the mean square of an entry of x."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasFold:
    """What folding left and did, on public text that the regression has not seen.

    Attributes:
      remaining_error: root mean square of v · x - 1 in each layer; 0 would be exact.
      logit_error: largest of it times the size of a bias: how far a router logit is off, typically.
      loss: of the model with its biases, in nats per token.
      loss_folded: of the model as exported.
      loss_dropped: of the model without any bias, for comparison.
      tokens: number of tokens that the losses are means over.
    """

    remaining_error: tuple[float, ...]
    logit_error: float
    loss: float
    loss_folded: float
    loss_dropped: float
    tokens: int


class Moments(NamedTuple):
    """E[x xᵀ] [L, D, D] and E[x] [L, D] of the router inputs, in float64."""

    second: np.ndarray
    first: np.ndarray


def fold_on_text(
    directory: Path,
    corpus: Path,
    biases: Mapping[str, np.ndarray],
    names: Sequence[str],
    top_k: int,
    encode: Callable[[str], list[int]],
) -> tuple[BiasFold, dict[str, np.ndarray]]:
    """Folds the biases [L] of these experts; shows what is left and what it does.

    The model must fit into memory.

    Args:
      directory: of the model.
      corpus: public text, with or without splits.
      biases: non-positive bias of every expert that has one.
      names: the experts to export, on which the loss is measured.
      top_k: experts per token.
      encode: from a text to its ids.

    Returns:
      The measurements, and a row [L, D] for every expert that had a bias.

    Raises:
      UserError: there is too little text, or it does not fit the model's vocabulary.
    """
    model = load(directory)
    batches = {split: _batches(corpus, split, encode, model.config.vocab_size) for split in ROWS}
    seen = {split: _moments(model, part) for split, part in batches.items()}
    constant = np.stack(
        [
            constant_direction(*(Moments(*(m[layer] for m in seen[split])) for split in ("train", "validation")))
            for layer in range(model.config.layers)
        ]
    )
    remaining = np.sqrt(mean_square_error(constant, seen["test"]))
    rows = {}
    for name, bias in biases.items():
        row = arrays.read(arrays.open_leaf(directory / checkpoint.ARRAYS, ("router", name, "row")))
        rows[name] = (row.astype(np.float64) + bias[:, None] * constant).astype(np.float32)
    sizes = np.max([-bias for bias in biases.values()], axis=0)
    losses = [
        _loss(model, batches["test"], names, top_k, change)
        for change in (
            {},
            {("router", name, "row"): row for name, row in rows.items()} | _without(biases),
            _without(biases),
        )
    ]
    fold = BiasFold(
        remaining_error=tuple(remaining.tolist()),
        logit_error=float(np.max(remaining * sizes)),
        loss=losses[0],
        loss_folded=losses[1],
        loss_dropped=losses[2],
        tokens=int(sum(np.sum(lengths - 1) for _, lengths in batches["test"])),
    )
    _show(fold, sizes)
    return fold, rows


def constant_direction(fit: Moments, validation: Moments) -> np.ndarray:
    """The vector v [D] of one layer: fitted on one text, its λ chosen on another."""
    width = len(fit.first)
    unit = np.trace(fit.second) / width
    candidates = [np.linalg.solve(fit.second + strength * unit * np.eye(width), fit.first) for strength in STRENGTHS]
    return min(candidates, key=lambda v: float(mean_square_error(v[None], Moments(*(m[None] for m in validation)))[0]))


def mean_square_error(v: np.ndarray, seen: Moments) -> np.ndarray:
    """E[(v · x - 1)²] in each layer, for v [L, D]."""
    square = np.einsum("ld,lde,le->l", v, seen.second, v, optimize=True)
    return np.maximum(square - 2 * np.einsum("ld,ld->l", v, seen.first) + 1, 0.0)


def _without(biases: Mapping[str, np.ndarray]) -> dict[LeafPath, np.ndarray]:
    return {("router", name, "bias"): np.zeros_like(bias) for name, bias in biases.items()}


def _batches(
    corpus: Path, split: str, encode: Callable[[str], list[int]], vocabulary: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pieces of the documents of a split, padded on the right to [B, S], and their lengths [B]."""

    def pieces() -> Iterator[list[int]]:
        for text in split_texts(corpus, split):
            ids = encode(text)
            if ids and max(ids) >= vocabulary:
                raise UserError(f"{corpus} has a token {max(ids)}, but the model's vocabulary ends at {vocabulary - 1}")
            yield from (piece for at in range(0, len(ids), LENGTH) if len(piece := ids[at : at + LENGTH]) > 1)

    found = list(itertools.islice(pieces(), ROWS[split]))
    if not found:
        raise UserError(f"{corpus} has no text in its split {split!r}: the fold needs train, validation and test text")
    batches = []
    for at in range(0, len(found), BATCH):
        ids, lengths = np.zeros((BATCH, LENGTH), np.int32), np.zeros(BATCH, np.int32)
        for row, piece in enumerate(found[at : at + BATCH]):
            ids[row, : len(piece)], lengths[row] = piece, len(piece)
        # A row without a token is not counted, but keeps the shape that is compiled for.
        batches.append((ids, np.maximum(lengths, 1)))
    return batches


def _moments(model: LanguageModel, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Moments:
    layers, width = model.config.layers, model.config.width
    second, first, count = np.zeros((layers, width, width)), np.zeros((layers, width)), 0
    public = model.permitted([PUBLIC], BATCH)
    for ids, lengths in batches:
        a, b = _sums(model.build, model.params, jnp.asarray(ids), _mask(lengths), public)
        second += np.asarray(a, np.float64)
        first += np.asarray(b, np.float64)
        count += int(np.sum(lengths[lengths > 1]))
    return Moments(second / count, first / count)


def _mask(lengths: np.ndarray) -> jax.Array:
    return jnp.asarray((np.arange(LENGTH) < lengths[:, None]) & (lengths[:, None] > 1))


@functools.partial(jax.jit, static_argnums=0)
def _sums(build, params, ids, mask, permitted) -> tuple[jax.Array, jax.Array]:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    trace = build(params).trace(ids, positions, jnp.zeros_like(ids), permitted=permitted, top_k=1)
    x = jnp.where(mask[..., None], trace.router_inputs, 0.0).astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("lbsd,lbse->lde", x, x, precision=exact), jnp.sum(x, axis=(1, 2))


def _loss(
    model: LanguageModel,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
    top_k: int,
    change: Mapping[LeafPath, Any],
) -> float:
    """Nats per token of the model with these leaves changed."""
    params = unflatten(flatten(model.params) | {path: jnp.asarray(leaf) for path, leaf in change.items()})
    permitted = model.permitted(names, BATCH)
    nats = sum(
        float(_nats(model.build, top_k, params, jnp.asarray(ids), _mask(lengths), permitted))
        for ids, lengths in batches
    )
    return nats / sum(int(np.sum(lengths - 1)) for _, lengths in batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nats(build, top_k, params, ids, mask, permitted) -> jax.Array:
    scores = jax.nn.log_softmax(build(params)(ids, permitted=permitted, top_k=top_k)[:, :-1])
    taken = jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask[:, 1:], taken, 0.0))


def _show(fold: BiasFold, sizes: np.ndarray) -> None:
    table(
        "biases folded by regression, measured on held-out public text",
        ["layer", "remaining error", "largest bias", "error of a logit"],
        [
            [f"layer {layer}", error, float(size), error * float(size)]
            for layer, (error, size) in enumerate(zip(fold.remaining_error, sizes, strict=True))
        ],
    )
    table(
        f"its effect on the loss of {fold.tokens:,} tokens of that text, in nats per token",
        ["biases", "loss", "more than exact"],
        [
            ["exact", fold.loss, 0.0],
            ["folded, as exported", fold.loss_folded, fold.loss_folded - fold.loss],
            ["left out", fold.loss_dropped, fold.loss_dropped - fold.loss],
        ],
    )

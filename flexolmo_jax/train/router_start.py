"""Where a new expert's router row and bias begin.

Axis legend: `L` layers, `B` rows, `S` positions, `D` width.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flexolmo_jax.data.packing import Rows, RowSource, sample_rows
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import PUBLIC, ModelConfig
from flexolmo_jax.model.transformer import Build
from flexolmo_jax.products import jit_rows

METHODS = ("discriminant", "contrast", "mean", "embedding", "random")
ROWS_READ = 128
ROWS_AT_ONCE = 8


class Start(NamedTuple):
    """What training begins from."""

    row: Float[Array, "L D"]
    bias: Float[Array, "L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterStart:
    """How a new expert's row and bias begin.

    Attributes:
      method: "contrast" is the anchor's mean router input per layer on the owner's text less that on public text;
        "discriminant" is the same measured against the spread of both (see `discriminant`); "mean" is the owner's mean
        alone; "embedding" is read from a file, as `flexolmo embed-domain` writes it; "random" is small noise.
      bias: the bias in every layer, not positive.
      largest_gap: for "discriminant", the most that the logits of mean owner's and mean public text may differ by.
      ridge: for "discriminant", the share of the mean variance that is added to every variance.
      embedding: for "embedding", a `.npy` file of one float vector for all layers, [D], or one for each, [L, D].
      public_embedding: the same of public text, which is then subtracted; None for none.
      random_std: for "random", the standard deviation of the noise.
    """

    method: str = "discriminant"
    bias: float = -0.5
    largest_gap: float = 24.0
    ridge: float = 0.01
    embedding: Path | None = None
    public_embedding: Path | None = None
    random_std: float = 0.02

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"RouterStart.method is {self.method!r}, but must be one of {', '.join(METHODS)}")
        if self.bias > 0:
            raise UserError(f"RouterStart.bias must not be positive, but it is {self.bias}")
        if (self.method == "embedding") != (self.embedding is not None):
            raise UserError("RouterStart.embedding names a file exactly if RouterStart.method is 'embedding'")

    def begin(
        self, config: ModelConfig, build: Build, anchor: dict, own: RowSource, public: RowSource, seed: int
    ) -> Start:
        """The row and the bias to begin with.

        Args:
          config: shape of the anchor.
          build: builds the anchor.
          anchor: its parameters.
          own: rows of the owner's text.
          public: rows of public text.
          seed: of the noise.

        Raises:
          UserError: an embedding's file does not hold finite numbers in the anchor's shape.
        """
        shape = config.layers, config.width
        bias = jnp.full(config.layers, self.bias)
        if self.method == "random":
            return Start(self.random_std * jax.random.normal(jax.random.key(seed), shape), bias)
        if self.embedding is not None:
            row = _read_rows(self.embedding, shape)
            if self.public_embedding:
                row = row - _read_rows(self.public_embedding, shape)
            if config.bias_channel:  # what an embedding holds there says nothing of the text and would be a bias
                row = row.at[:, 0].set(0.0)
            return Start(row, bias)
        mine = router_input_moments(build, anchor, own)
        if self.method == "mean":
            return Start(mine.mean, bias)
        theirs = router_input_moments(build, anchor, public)
        if self.method == "contrast":
            return Start(mine.mean - theirs.mean, bias)
        row, threshold = discriminant(mine, theirs, self.largest_gap, self.ridge)
        if config.bias_channel:  # exactly 1 in every layer, so the row can hold a threshold of either sign
            return Start(row.at[:, 0].add(-threshold - bias), bias)
        return Start(row, jnp.minimum(-threshold, bias))


class Moments(NamedTuple):
    """Mean and covariance of what each layer's router sees on a text."""

    mean: Float[Array, "L D"]
    covariance: Float[Array, "L D D"]


def discriminant(own: Moments, public: Moments, largest_gap: float, ridge: float) -> tuple[Array, Array]:
    """Fisher's linear discriminant in every layer.

    `row = S^-1 (m_own - m_public)` and `threshold = row . (m_own + m_public) / 2`, with `S` the mean covariance, give
    the log-odds of the owner's against public text if both were Gaussian with that covariance (R. A. Fisher, "The use
    of multiple measurements in taxonomic problems", 1936). Rows of different owners that are log-odds against the same
    public text compare with each other, which rows that are differences of means do not.

    Args:
      own: moments on the owner's text.
      public: moments on public text.
      largest_gap: rows are scaled down until the logits of the two means differ by this much at most.
      ridge: share of the mean variance that is added to every variance.

    Returns:
      Row [L, D] and threshold [L], to be subtracted from the row's logit.
    """
    spread = (own.covariance + public.covariance) / 2
    width = spread.shape[-1]
    mean_variance = jnp.trace(spread, axis1=1, axis2=2) / width
    spread += (ridge * mean_variance[:, None, None] + 1e-6) * jnp.eye(width)
    difference = own.mean - public.mean
    row = jax.scipy.linalg.solve(spread, difference[..., None], assume_a="pos")[..., 0]
    gap = jnp.sum(row * difference, axis=-1)
    row *= jnp.minimum(1.0, largest_gap / jnp.maximum(gap, 1e-6))[:, None]
    return row, jnp.sum(row * (own.mean + public.mean) / 2, axis=-1)


def router_input_moments(build: Build, anchor: dict, text: RowSource) -> Moments:
    """Moments over up to `ROWS_READ` evenly spaced rows of text."""
    rows = sample_rows(text, ROWS_READ)
    sums, products = _sums(build, anchor, rows)
    mean = sums / rows.weights.sum()
    return Moments(mean, products / rows.weights.sum() - mean[:, :, None] * mean[:, None, :])


@functools.partial(jit_rows, static_argnums=(0,))
def _sums(build: Build, params: dict, rows: Rows) -> tuple[Array, Array]:
    """Sums over all tokens of the router inputs [L, D] and of their outer products [L, D, D]."""

    def add(sums, piece: Rows):
        trace = build(params).trace(piece.inputs, piece.positions, piece.segments)
        inputs = trace.router_inputs.astype(jnp.float32)
        weighted = inputs * piece.weights[None, ..., None]
        products = jnp.einsum("lbsd,lbse->lde", weighted, inputs)
        return jax.tree.map(jnp.add, sums, (jnp.sum(weighted, axis=(1, 2)), products)), None

    layers, width = params["router"][PUBLIC]["row"].shape
    pieces = jax.tree.map(lambda a: a.reshape(-1, ROWS_AT_ONCE, *a.shape[1:]), rows)
    sums, _ = jax.lax.scan(add, (jnp.zeros((layers, width)), jnp.zeros((layers, width, width))), pieces)
    return sums


def _read_rows(file: Path, shape: tuple[int, int]) -> Float[Array, "L D"]:
    """One row per layer from a file that holds as many, or one for all."""
    try:
        rows = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the embedding {file}: {error}") from error
    if rows.shape not in (shape, shape[1:]):
        raise UserError(f"the embedding {file} has shape {rows.shape}, but the anchor needs {shape[1:]} or {shape}")
    if rows.dtype.kind not in "fiu" or not np.all(np.isfinite(rows)):
        raise UserError(f"the embedding {file} holds something that is not a finite number")
    return jnp.broadcast_to(jnp.asarray(rows, jnp.float32), shape)

"""After training: lower the expert's bias until it lets public text alone, and then as far as its own text allows.

Both steps see the owner's held-out text and public text only, so a merge of calibrated contributions stays strict.
Axis legend: `L` layers, `B` rows, `S` positions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexolmo_jax.data.packing import Rows, RowSource, sample_rows
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.partition import join
from flexolmo_jax.model.transformer import Build
from flexolmo_jax.products import jit_rows
from flexolmo_jax.train.token_losses import token_losses

ROWS_READ = 96
SHIFTS_TRIED = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """How far to lower the bias.

    Attributes:
      public_share: in every layer at most this share of public tokens may prefer the expert; 1 lowers nothing.
      own_tolerance: the share of what the expert gains on its owner's text that lowering it further may cost. The lower
        the bias, the less an expert takes of text that neither the owner nor the public knows.
      largest_shift: bound on the second lowering, in nats.
    """

    public_share: float = 0.5
    own_tolerance: float = 0.0
    largest_shift: float = 8.0

    def __post_init__(self):
        for field in ("public_share", "own_tolerance"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"Calibration.{field} must lie between 0 and 1, but it is {getattr(self, field)}")


def calibrate_bias(
    build: Build, frozen: dict, params: dict, name: str, own: RowSource, public: RowSource, calibration: Calibration
) -> tuple[dict, dict[str, float]]:
    """Lowers the bias of expert `name`.

    Args:
      build: builds the two-expert model, the public expert first.
      frozen: the anchor's parameters.
      params: the expert's parameters.
      name: of the expert.
      own: held-out rows of the owner's text.
      public: held-out rows of public text.
      calibration: how far.

    Returns:
      The expert's parameters with the new bias, and what was found: shares of public and own tokens that prefer the
      expert, and the owner's loss before and after, in nats per token.
    """
    own_rows, public_rows = sample_rows(own, ROWS_READ), sample_rows(public, ROWS_READ)
    evaluate = functools.partial(_evaluate, build, frozen)
    bias = jnp.minimum(params["router"][name]["bias"], 0.0)

    def with_bias(bias):
        return {**params, "router": {name: {**params["router"][name], "bias": bias}}}

    preference, _ = evaluate(with_bias(bias), public_rows)
    mask = public_rows.weights > 0
    limits = jnp.stack([jnp.quantile(layer[mask], 1 - calibration.public_share) for layer in preference])
    bias = bias - jnp.maximum(limits, 0.0) * (calibration.public_share < 1)

    _, best = evaluate(with_bias(bias), own_rows)
    _, without = evaluate(with_bias(bias - 1e6), own_rows)
    allowed = best + calibration.own_tolerance * max(without - best, 0.0)
    shift, upper = 0.0, calibration.largest_shift
    if calibration.own_tolerance > 0:
        for _ in range(SHIFTS_TRIED):
            middle = (shift + upper) / 2
            _, loss = evaluate(with_bias(bias - middle), own_rows)
            shift, upper = (middle, upper) if loss <= allowed else (shift, middle)
    bias = bias - shift

    calibrated = with_bias(bias)
    found = {"own_loss_before": best, "own_loss_without_expert": without, "further_shift": shift}
    for label, rows in (("public", public_rows), ("own", own_rows)):
        preference, loss = evaluate(calibrated, rows)
        found[f"{label}_loss"] = loss
        found[f"{label}_preferred"] = float(jnp.mean(preference[:, rows.weights > 0] > 0))
    return calibrated, found


def _evaluate(build: Build, frozen: dict, params: dict, rows: Rows) -> tuple[Float[Array, "L B S"], float]:
    preference, loss = _forward(build, join(frozen, params), rows)
    return preference, float(loss)


@functools.partial(jit_rows, static_argnums=(0,))
def _forward(build: Build, params: dict, rows: Rows):
    def some(piece: Rows):
        model = build(params)
        trace = model.trace(piece.inputs, piece.positions, piece.segments)
        losses = token_losses(trace.hidden, model.head_in(trace.hidden.dtype), piece.targets, z_loss=0.0)
        logits = trace.routing.logits
        return logits[..., 1] - logits[..., 0], jnp.sum(losses.cross_entropy * piece.weights)

    pieces = jax.tree.map(lambda a: a.reshape(-1, 8, *a.shape[1:]), rows)
    preference, losses = jax.lax.map(some, pieces)
    layers = preference.shape[1]
    return jnp.moveaxis(preference, 0, 1).reshape(layers, *rows.weights.shape), jnp.sum(losses) / jnp.sum(rows.weights)

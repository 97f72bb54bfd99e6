"""A mean of documents' vectors that hardly depends on any one document: clipped, and noised by a Gaussian.

What is promised. *Unit*: one document of the owner's corpus, not one author; whoever wrote `g` documents has `g` times
the epsilon, and a larger delta. *Neighbours*: two corpora that differ in one document, added, removed or replaced.
*Guarantee*: (epsilon, delta)-differential privacy of the mean that is returned, hence of all that is computed from it
and from public text. One call is one release; several add up.

Axis legend: `N` documents, `K` vectors of each (one per layer, or one), `E` their width.
"""

import dataclasses
import math
import random

import numpy as np
from jaxtyping import Float
from scipy import optimize
from scipy.special import log_ndtr

from flexolmo_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivateMean:
    """How private a mean shall be.

    Attributes:
      epsilon: of the guarantee; the smaller, the more private.
      delta: of the guarantee, below one over the number of documents.
      clip: the longest that a document's difference from the public mean may be, as a multiple of the median length
        of a public document's. Shorter lets less noise in but bends the mean towards the public one.
    """

    epsilon: float
    delta: float
    clip: float = 1.0

    def __post_init__(self):
        for field, least, most in (("epsilon", 1e-3, 1e3), ("delta", 1e-100, 0.1), ("clip", 1e-3, 1e3)):
            value = getattr(self, field)
            if not least <= value <= most:
                raise UserError(f"PrivateMean.{field} must lie between {least:g} and {most:g}, but it is {value}")

    def check(self, documents: int) -> None:
        """Raises UserError if delta is so large that publishing one of so many documents whole would satisfy it."""
        if self.delta >= 1 / documents:
            raise UserError(
                f"PrivateMean.delta is {self.delta}, but must be below 1 / {documents:,}, one over the number of "
                "documents: with a larger one, publishing a document at random would count as private"
            )

    def mean(
        self, own: Float[np.ndarray, "N K E"], public: Float[np.ndarray, "M K E"], documents: int
    ) -> tuple[Float[np.ndarray, "K E"], dict[str, float | str]]:
        """The owner's mean: the public mean, plus the clipped differences from it, averaged and noised.

        The sum is divided by `documents` whatever the number of vectors, because that number is the owner's secret
        too: fewer of them bring the mean nearer to the public one.

        Args:
          own: vectors of at most `documents` of the owner's documents, of which another document changes one.
          public: vectors of public documents, which need no protection.
          documents: what the sum is divided by.

        Returns:
          The mean, and what was promised: nothing in it depends on the owner's text but through the mean.

        Raises:
          UserError: as `check` does.
        """
        self.check(documents)
        centre = public.astype(np.float64).mean(axis=0)
        bounds = self.clip * np.median(np.linalg.norm(public - centre, axis=-1), axis=0)
        bounds = np.where(bounds > 0, bounds, 1.0)
        multiplier = gaussian_noise_multiplier(self.epsilon, self.delta)
        noise = multiplier * SENSITIVITY * math.sqrt(len(bounds)) / documents
        mean = clipped_sum(own - centre, bounds) / documents
        mean += noise * bounds[:, None] * standard_normal(mean.shape)
        promised: dict[str, float | str] = {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "unit": "one document",
            "neighbours": "one document added, removed or replaced",
            "mechanism": "analytic Gaussian, arXiv 1805.06530",
            "noise_multiplier": multiplier,
            # How far noise alone would move the mean, in each layer, in units of what one document may weigh.
            "expected_noise": noise * math.sqrt(mean.shape[-1]),
        }
        return (centre + mean).astype(np.float32), promised


SENSITIVITY = 2.0
"""How far another document can move a sum of vectors of length 1: one of them leaves the sample, another enters it."""


def clipped_sum(differences: Float[np.ndarray, "N K E"], bounds: Float[np.ndarray, "K"]) -> Float[np.ndarray, "K E"]:
    """Sum over documents, each of whose vectors is shortened to at most its bound.

    Measured in units of `sqrt(K) * bounds`, all vectors of a document together are at most 1 long, and so one
    document added to and one taken from the sum move it by `SENSITIVITY` at most.
    """
    differences = differences.astype(np.float64)
    lengths = np.linalg.norm(differences, axis=-1, keepdims=True)
    return np.sum(differences * np.minimum(1.0, bounds[:, None] / np.maximum(lengths, 1e-300)), axis=0)


def gaussian_noise_multiplier(epsilon: float, delta: float) -> float:
    """The least standard deviation, in units of the L2 sensitivity, that makes Gaussian noise (epsilon, delta)-private.

    Noise of standard deviation `s` gives exactly `delta = Phi(1/2s - eps s) - exp(eps) Phi(-1/2s - eps s)`, for every
    epsilon above 0 (theorem 8 of Balle and Wang, "Improving the Gaussian mechanism for differential privacy:
    analytical calibration and optimal denoising", arXiv 1805.06530). The familiar `sqrt(2 ln(1.25 / delta)) / eps`
    adds more than it needs below epsilon 1, and is not private for all larger ones.
    """

    def excess(log_multiplier: float) -> float:
        s = math.exp(log_multiplier)
        upper = log_ndtr(0.5 / s - epsilon * s)
        lower = epsilon + log_ndtr(-0.5 / s - epsilon * s)
        # In logarithms, for a delta that double precision would lose in the difference of two numbers near 1.
        return upper + math.log(-math.expm1(min(lower - upper, -1e-300))) - math.log(delta)

    root = optimize.brentq(excess, math.log(1e-3), math.log(1e6), xtol=1e-12)
    return math.exp(root) * (1 + 1e-9)  # never less than needed


def standard_normal(shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Standard normal noise from the operating system's entropy: a seed would let whoever knows it take it off again.

    Each value is four draws together, whose low bits are much harder to search than one draw's (Holohan and Braghin,
    "Secure random sampling in differential privacy", arXiv 2107.10138).
    """
    source = random.SystemRandom()
    draws = [source.gauss(0.0, 1.0) for _ in range(4 * math.prod(shape))]
    return np.array(draws).reshape(4, *shape).sum(axis=0) / 2

"""A subset whose documents are relevant and unlike each other: greedy MAP of a determinantal point process.

Axis legend: `N` candidates, `E` features of each.
"""

import numpy as np
from jaxtyping import Float
from scipy import sparse
from scipy.sparse import linalg

RIDGE = 1e-3
"""Share of every candidate that is like nothing else, so that more can be chosen than there are features."""

Features = Float[np.ndarray, "N E"] | sparse.csr_matrix


def diverse(relevance: Float[np.ndarray, "N"], features: Features, count: int) -> list[int]:
    """Up to `count` candidates, in the order in which they were chosen, that make `log det L_Y` large.

    `L_ij = r_i S_ij r_j`, with relevance `r` and `S` the cosine of two candidates' features, as in MetaMoE
    (arXiv 2605.14289). Each step takes the candidate that adds most to the log-determinant. That is at least `1 - 1/e`
    of the best choice where no step could take anything away, and a heuristic elsewhere. A Cholesky factor that grows
    by a row a step makes a step cost `O(N (E + count))` (Chen, Zhang and Zhou, "Fast greedy MAP inference for
    determinantal point process to improve recommendation diversity", arXiv 1709.05135).

    Args:
      relevance: of each candidate, not negative.
      features: of each candidate; only their directions count.
      count: how many to choose.
    """
    lengths = linalg.norm(features, axis=1) if sparse.issparse(features) else np.linalg.norm(features, axis=1)
    scale = relevance / np.where(lengths > 0, lengths, 1.0)
    count = min(count, len(relevance))
    factor = np.zeros((count, len(relevance)))
    gains = relevance.astype(np.float64) ** 2
    chosen: list[int] = []
    for step in range(count):
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        chosen.append(best)
        along = features[[best]]
        products = np.asarray((features @ along.T).todense() if sparse.issparse(features) else features @ along.T)
        row = (1 - RIDGE) * scale * scale[best] * products.ravel().astype(np.float64)
        row[best] += RIDGE * relevance[best] ** 2
        factor[step] = (row - factor[:step, best] @ factor[:step]) / np.sqrt(gains[best])
        gains -= factor[step] ** 2
        gains[chosen] = -np.inf
    return chosen

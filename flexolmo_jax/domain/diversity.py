"""A subset whose documents are relevant and unlike each other: greedy MAP of a determinantal point process.

Axis legend: `N` candidates, `E` features of each.
"""

import numpy as np
from jaxtyping import Float
from scipy import sparse

RIDGE = 1e-3
"""Share of every candidate that is like nothing else, so that more can be chosen than there are features."""


def diverse(
    relevance: Float[np.ndarray, "N"], features: Float[np.ndarray, "N E"] | sparse.csr_matrix, count: int
) -> list[int]:
    """Up to `count` candidates, in the order in which they were chosen, that make `log det L_Y` large.

    `L_ij = r_i S_ij r_j`, with relevance `r` and `S` the cosine of two candidates' features, as in MetaMoE
    (arXiv 2605.14289). Each step takes the candidate that adds most to the log-determinant. That is at least `1 - 1/e`
    of the best choice where no step could take anything away, and a heuristic elsewhere. A Cholesky factor that grows
    by a row a step makes a step cost `O(N (E + count))` (Chen, Zhang and Zhou, "Fast greedy MAP inference for
    determinantal point process to improve recommendation diversity", arXiv 1709.05135).

    Args:
      relevance: of each candidate, not negative.
      features: of each candidate, scaled to length 1.
      count: how many to choose.
    """
    count = min(count, len(relevance))
    factor = np.zeros((count, len(relevance)))
    gains = relevance.astype(np.float64) ** 2
    chosen: list[int] = []
    for step in range(count):
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        chosen.append(best)
        cosines = features @ features[[best]].T
        cosines = cosines.toarray() if sparse.issparse(cosines) else cosines
        row = relevance[best] * relevance * (1 - RIDGE) * cosines.ravel().astype(np.float64)
        row[best] = relevance[best] ** 2
        factor[step] = (row - factor[:step, best] @ factor[:step]) / np.sqrt(gains[best])
        gains -= factor[step] ** 2
        gains[chosen] = -np.inf
    return chosen

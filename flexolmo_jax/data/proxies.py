"""Proxies: the public documents that resemble an owner's text most, by a classifier that the owner trains at home."""

import gzip
import json
from pathlib import Path

import numpy as np

from flexolmo_jax.data.tokens import TokenSource
from flexolmo_jax.data.vocabulary import decode
from flexolmo_jax.errors import UserError

_BUCKETS = 2**16
_GRAM = 3


def select_proxies(own: TokenSource, public: TokenSource, out: Path, *, share: float) -> int:
    """Writes the public documents that look most like the owner's to `out/train.jsonl.gz`.

    The classifier is naive Bayes over hashed runs of three tokens. The published recipe takes the top of a fine-tuned
    encoder's scores instead (section 3.3.3 of arXiv 2507.07024).

    Args:
      own: the owner's documents.
      public: public documents.
      out: directory to write to.
      share: share of the public documents to take, at least one.

    Returns:
      How many documents were taken.

    Raises:
      UserError: the share is not between 0 and 1.
    """
    if not 0 < share <= 1:
        raise UserError(f"the share of proxies must be above 0 and at most 1, but it is {share}")
    log_odds = np.log(_counts(own)) - np.log(_counts(public))
    documents = [public[index] for index in range(len(public))]
    scores = np.array(
        [log_odds[_grams(document)].mean() if len(document) > _GRAM else -np.inf for document in documents]
    )
    count = max(1, round(share * len(public)))
    chosen = np.argsort(-scores, kind="stable")[:count]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "train.jsonl.gz").open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        for index in sorted(chosen):
            line = {"text": decode(public[int(index)].tolist()), "score": round(float(scores[index]), 4)}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    return count


def _grams(tokens: np.ndarray) -> np.ndarray:
    """Buckets of all runs of three tokens."""
    wide = tokens.astype(np.int64)
    return (wide[:-2] * 1_000_003 + wide[1:-1] * 10_007 + wide[2:] * 101) % _BUCKETS


def _counts(documents: TokenSource) -> np.ndarray:
    """Probability of each bucket, smoothed by one count."""
    counts = np.ones(_BUCKETS)
    for index in range(len(documents)):
        counts += np.bincount(_grams(documents[index]), minlength=_BUCKETS)
    return counts / counts.sum()

"""Whose text is it? Logistic regression between an owner's documents and public ones, every score held out.

Axis legend: `N` documents, `E` features of each.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from flexolmo_jax.domain.encoders import Encode
from flexolmo_jax.domain.sampling import hashed
from flexolmo_jax.errors import UserError

FOLDS = 5
_BUCKETS = 2**16

Featurize = Callable[[Sequence[str]], Any]
"""Features of documents, [N, E], dense or sparse."""


class HeldOut(NamedTuple):
    """How well documents are told apart that the classifier was not trained on.

    Attributes:
      accuracy: mean of the shares of the owner's and of public documents that are told rightly; 0.5 is guessing.
      auroc: share of pairs, one document of each side, in which the owner's has the higher score.
      own: number of the owner's documents.
      public: number of public documents.
    """

    accuracy: float
    auroc: float
    own: int
    public: int


def ngram_features(characters: int) -> Featurize:
    """Hashed counts of three consecutive characters, each document scaled to length 1: for any language and for code.

    Args:
      characters: how many of a document are read.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        analyzer="char", ngram_range=(3, 3), n_features=_BUCKETS, lowercase=False, dtype=np.float32
    )
    return lambda texts: vectorizer.transform([text[:characters] for text in texts])


def encoded_features(encode: Encode) -> Featurize:
    """The last vector of each document (of an anchor, the last layer's router inputs), scaled to length 1."""

    def featurize(texts: Sequence[str]) -> np.ndarray:
        last = encode(texts)[:, -1]
        return last / np.maximum(np.linalg.norm(last, axis=1, keepdims=True), 1e-12)

    return featurize


class Classifier:
    """Scores a document by a model that was trained without it.

    A hash of its text puts each document into one of `FOLDS` parts, and each part is scored by a model that was trained
    on the others. So public documents that served to train are scored like those that did not, and a document that
    occurs twice is never on both sides.
    """

    def __init__(self, own: Sequence[str], public: Sequence[str], featurize: Featurize):
        """Trains `FOLDS` models.

        Raises:
          UserError: a side has too few documents to leave some out of every model.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score, roc_auc_score

        self._featurize = featurize
        folds = np.array([_fold(text) for text in (*own, *public)])
        is_own = np.arange(len(folds)) < len(own)
        for side, name in ((is_own, "the owner's"), (~is_own, "public")):
            if len(set(folds[side])) < 2:
                raise UserError(f"there are too few different documents in {name} corpus to train a classifier on")
        features = featurize([*own, *public])
        self._models = [
            LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000).fit(
                features[folds != fold], is_own[folds != fold]
            )
            for fold in range(FOLDS)
        ]
        scores = self._score(features, folds)
        self.held_out = HeldOut(
            accuracy=float(balanced_accuracy_score(is_own, scores > 0)),
            auroc=float(roc_auc_score(is_own, scores)),
            own=len(own),
            public=len(public),
        )

    def scores(self, texts: Sequence[str]) -> Float[np.ndarray, "N"]:
        """Log-odds that documents are the owner's rather than public, if there were as many of both."""
        return self._score(self._featurize(texts), np.array([_fold(text) for text in texts]))

    def _score(self, features: Any, folds: np.ndarray) -> np.ndarray:
        scores = np.empty(len(folds))
        for fold in np.unique(folds):
            scores[folds == fold] = self._models[fold].decision_function(features[folds == fold])
        return scores


def _fold(text: str) -> int:
    return hashed(text, b"fold") % FOLDS

"""The stage `flexolmo select-proxies`: the public documents that resemble an owner's text, chosen at the owner's home.

A coordinator may tune a merged model's router on them, and never sees the owner's text (section 3.3.3 of
arXiv 2507.07024).
"""

import dataclasses
import gzip
import heapq
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax import terminal
from flexolmo_jax.domain.classifier import Classifier, Featurize, encoded_features, ngram_features
from flexolmo_jax.domain.diversity import diverse
from flexolmo_jax.domain.encoders import anchor_encoder, text_encoder
from flexolmo_jax.domain.sampling import document_id, sample_of, training_documents
from flexolmo_jax.errors import UserError
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.store.directories import complete_directory, refuse_existing

METHODS = ("top", "diverse")
SCORED_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxySelection:
    """How many proxies are chosen, and how.

    Attributes:
      share: proxies, as a share of the number of the owner's documents; as published, well below 0.01.
      method: "top" takes the highest scores, as published; "diverse" takes, out of a few times as many, documents that
        also differ from each other (`flexolmo_jax.domain.diversity`).
      pool: for "diverse", how many times as many; memory grows with `pool` times the square of the proxies.
      documents: at most so many documents of each side train the classifier.
      characters: at most so many characters of a document are read by the n-gram classifier.
      tokens: at most so many tokens of a document are read by the anchor; an encoder has its own limit.
    """

    share: float = 0.005
    method: str = "top"
    pool: int = 10
    documents: int = 10_000
    characters: int = 4_000
    tokens: int = 512

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UserError(f"ProxySelection.share must be above 0 and at most 1, but it is {self.share}")
        if self.method not in METHODS:
            raise UserError(f"ProxySelection.method is {self.method!r}, but must be one of {', '.join(METHODS)}")
        for field in ("pool", "documents", "characters", "tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"ProxySelection.{field} must be at least 1, but it is {getattr(self, field)}")


class Candidate(NamedTuple):
    """A public document with minus its place in the corpus, so that of equal scores the earlier one is the higher."""

    score: float
    minus_place: int
    text: str


def select_proxies(
    *,
    text: Path,
    public_text: Path,
    out: Path,
    selection: ProxySelection,
    mesh: MeshConfig,
    anchor: Path | None = None,
    encoder: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the chosen public documents to `out/train.jsonl.gz`, and what is known about the choice beside it.

    `train.jsonl.gz` is a corpus that `tune-router` reads: `id` (the first 16 hexadecimal digits of the SHA-256 of the
    text) and `text` of each proxy, in the order of the public corpus. `selection.json` holds what is reported, and the
    score of each proxy: it says more about the owner's text than the choice does, and need not leave.

    Args:
      text: the owner's corpus; documents of its training split are read.
      public_text: public corpus, likewise.
      out: directory to write.
      selection: how many, and how.
      mesh: how the devices are arranged that the anchor lies on.
      anchor: directory of an anchor, whose last router inputs the classifier is then given in place of n-grams.
      encoder: directory of a sentence-transformers model or a Hugging Face encoder, likewise.
      overwrite: whether an existing `out` is replaced.

    Returns:
      What to report: `proxies`, where they are; their number; the classifier's held-out accuracy and AUROC, and the
      number of documents that it was trained on.

    Raises:
      UserError: a setting, a corpus, the anchor or the encoder cannot be used; nothing is left behind.
    """
    refuse_existing(out, overwrite=overwrite)
    if anchor is not None and encoder is not None:
        raise UserError("give --anchor or --encoder, not both: the classifier is given the features of one")
    count = max(1, round(selection.share * _count(training_documents(text))))
    own, public = (sample_of(corpus, selection.documents) for corpus in (text, public_text))
    terminal.banner(
        "select-proxies",
        {"text": text, "public text": public_text, "classifier": encoder or anchor or "n-grams", "proxies": count},
    )
    featurize = _featurizer(selection, mesh, anchor, encoder)
    classifier = Classifier(own, public, featurize)
    pool = count * (selection.pool if selection.method == "diverse" else 1)
    candidates = _best(_scored(classifier, public_text), pool)
    if selection.method == "diverse":
        relevance = 1 / (1 + np.exp(-np.array([candidate.score for candidate in candidates])))
        features = featurize([candidate.text for candidate in candidates])
        candidates = [candidates[number] for number in diverse(relevance, features, count)]
    facts = {"count": len(candidates)} | classifier.held_out._asdict()
    _write(sorted(candidates, key=lambda each: -each.minus_place), facts, out, overwrite=overwrite)
    return {"proxies": out} | facts


def _featurizer(selection: ProxySelection, mesh: MeshConfig, anchor: Path | None, encoder: Path | None) -> Featurize:
    if anchor is not None:
        return encoded_features(anchor_encoder(anchor, selection.tokens, mesh))
    if encoder is not None:
        return encoded_features(text_encoder(encoder))
    return ngram_features(selection.characters)


def _count(texts: Iterable[str]) -> int:
    return sum(1 for _ in texts)


def _scored(classifier: Classifier, corpus: Path) -> Iterator[Candidate]:
    texts, total = training_documents(corpus), _count(training_documents(corpus))
    with terminal.Progress("score public documents", total) as progress:
        for first in itertools.count(0, SCORED_AT_ONCE):
            if not (chunk := list(itertools.islice(texts, SCORED_AT_ONCE))):
                return
            for place, (text, score) in enumerate(zip(chunk, classifier.scores(chunk), strict=True), first):
                yield Candidate(float(score), -place, text)
            progress.update(first + len(chunk))


def _best(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """The `count` highest, best first; of documents that are the same, one."""
    heap: list[Candidate] = []
    held: set[str] = set()
    for candidate in candidates:
        if (len(heap) == count and candidate < heap[0]) or candidate.text in held:
            continue
        held.add(candidate.text)
        heapq.heappush(heap, candidate)
        if len(heap) > count:
            held.remove(heapq.heappop(heap).text)
    return sorted(heap, reverse=True)


def _write(candidates: list[Candidate], facts: dict[str, Any], out: Path, *, overwrite: bool) -> None:
    lines = [{"id": document_id(each.text), "text": each.text} for each in candidates]
    scores = {line["id"]: round(each.score, 4) for line, each in zip(lines, candidates, strict=True)}
    with complete_directory(out, overwrite=overwrite) as partial:
        with (partial / "train.jsonl.gz").open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        (partial / "selection.json").write_text(json.dumps(facts | {"scores": scores}, indent=1) + "\n")

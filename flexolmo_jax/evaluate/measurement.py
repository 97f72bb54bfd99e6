"""One pass over everything: any number of models, each with its choice of experts, on every domain and question."""

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from flexolmo_jax import terminal
from flexolmo_jax.data.packing import Packing
from flexolmo_jax.evaluate import bits_per_byte, exact_match, report, routing
from flexolmo_jax.evaluate.report import Report
from flexolmo_jax.infer import LanguageModel

ROUTING_ROWS = 64
"""Rows of each domain that are enough to see where its tokens go."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model and how it is to be used.

    Attributes:
      model: anything that is loaded.
      experts: names of the permitted experts; None permits all.
      top_k: experts per token; None means the model's own number.
    """

    model: LanguageModel
    experts: tuple[str, ...] | None = None
    top_k: int | None = None

    def __post_init__(self):
        self.model.check_top_k(self.top_k)
        self.model.permitted(self.experts, 1)

    @property
    def use(self) -> dict[str, Any]:
        """The arguments that tell a measurement which experts to use."""
        return {"experts": self.experts, "top_k": self.top_k}


QuestionSet = tuple[exact_match.Kind, Sequence[exact_match.Question]]
"""A kind of question, and those to ask."""


def opt_outs(model: LanguageModel, top_k: int | None = None) -> dict[str, Candidate]:
    """A merged model in all the ways that an opt-out can be judged by, under the labels of a report.

    `public` (every owner excluded, which is the anchor exactly), `merged`, and `merged:without:<name>` for each owner.
    """
    public, *owners = model.names
    ways = {report.PUBLIC: Candidate(model=model, experts=(public,), top_k=top_k)}
    ways[report.MERGED] = Candidate(model=model, top_k=top_k)
    for owner in owners:
        others = tuple(name for name in model.names if name != owner)
        ways[report.without_label(owner)] = Candidate(model=model, experts=others, top_k=top_k)
    return ways


def measure(
    candidates: Mapping[str, Candidate],
    domains: Mapping[str, Packing],
    *,
    question_sets: Sequence[QuestionSet] = (),
    routed: Collection[str] = (report.MERGED,),
    max_rows: int | None = None,
    batch_size: int = bits_per_byte.BATCH_SIZE,
) -> Report:
    """Measures bits per byte, exact match and routing, and computes the opt-out changes.

    Args:
      candidates: by label; see `flexolmo_jax.evaluate.report` for the labels that mean something.
      domains: rows of each domain's held-out split.
      question_sets: what to ask every candidate.
      routed: labels of the candidates whose routing is counted.
      max_rows: upper bound on the rows of each domain, for bits per byte.
      batch_size: rows in a batch.

    Raises:
      UserError: a domain is empty, or a model gives values that are not finite.
    """
    seconds: dict[str, float] = {}
    tokens = 0
    models: dict[str, dict[str, float]] = {}
    right: dict[str, dict[str, float]] = {}
    went: dict[str, dict[str, Any]] = {}
    with terminal.Progress("evaluate", total=len(candidates)) as progress:
        for number, (label, candidate) in enumerate(candidates.items(), 1):
            models[label] = {}
            with _timed(seconds, "bits_per_byte"):
                for name, packing in domains.items():
                    code = bits_per_byte.score(
                        candidate.model, packing, **candidate.use, max_rows=max_rows, batch_size=batch_size
                    )
                    models[label][name] = code.bits_per_byte
                    tokens += code.tokens
            if question_sets:
                right[label] = {}
                with _timed(seconds, "exact_match"):
                    for kind, asked in question_sets:
                        right[label] |= exact_match.score(candidate.model, asked, kind, **candidate.use)
            if label in routed:
                with _timed(seconds, "routing"):
                    went[label] = {
                        name: routing.shares(
                            candidate.model,
                            packing,
                            **candidate.use,
                            max_rows=ROUTING_ROWS,
                            batch_size=min(batch_size, ROUTING_ROWS),
                        ).as_json()
                        for name, packing in domains.items()
                    }
            progress.update(number)
    return Report(
        domains=tuple(domains),
        models=models,
        exact_match=right,
        routing=went,
        opt_out=report.opt_out_changes(models),
        seconds=seconds,
        tokens_per_second={"bits_per_byte": tokens / seconds["bits_per_byte"]} if candidates else {},
        versions=report.versions(),
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds to `seconds[part]` how long the block took, compilation included."""
    began = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began

"""The stage `flexolmo evaluate`: checkpoints and corpora in; a table, `report.json` and pictures out."""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax import terminal
from flexolmo_jax.data.documents import split_texts
from flexolmo_jax.data.packing import Packing
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.tokens import is_prepared, open_split, vocabulary_of
from flexolmo_jax.data.vocabularies import SavedVocabulary
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate import bits_per_byte, exact_match, plots
from flexolmo_jax.evaluate.measurement import Candidate, QuestionSet, measure, opt_outs
from flexolmo_jax.evaluate.report import MERGED, PUBLIC, Report, expert_label, quality_checks
from flexolmo_jax.infer import LanguageModel, load, load_with_contribution

REPORT = "report.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def evaluate(
    *,
    checkpoints: tuple[Path, ...],
    corpora: dict[str, Path],
    out: Path,
    contributions: tuple[Path, ...] = (),
    metrics: dict[str, Path] | None = None,
    experts: tuple[str, ...] | None = None,
    top_k: int | None = None,
    sequence_length: int = 256,
    batch_size: int = bits_per_byte.BATCH_SIZE,
    max_rows: int | None = None,
    questions: int = exact_match.QUESTIONS,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measures every checkpoint on the test split of every corpus and writes `out/report.json` and pictures.

    An anchor is evaluated as `public`. The first merged checkpoint is `merged`, evaluated also with each owner excluded
    and for every number of experts per token; a further one is `merged:<directory>`. Where `experts` are given, merged
    checkpoints are evaluated with these alone, as `merged:only:<experts>`.

    Args:
      checkpoints: directories of anchors and merged models; at most one anchor.
      corpora: corpus by name of the domain, as `data.prepare` takes them; an owner's domain is named like its expert.
      out: directory to write; `prepared/<domain>/` appears in it too.
      contributions: evaluated beside the anchor as two-expert models `expert:<name>`.
      metrics: `metrics.jsonl` by name of the run, for the loss curves.
      experts: the permitted experts of merged checkpoints; None permits all.
      top_k: experts per token of merged checkpoints; None means their own number.
      sequence_length: tokens in a row; longer than the models were trained with asks more of them than they learnt.
      batch_size: rows in a batch.
      max_rows: upper bound on the rows of each domain; None reads all.
      questions: upper bound on the questions of each kind.
      overwrite: whether an older report in `out` is replaced.

    Returns:
      The content of `report.json`, and under `files` what was written.

    Raises:
      UserError: a checkpoint, corpus, expert, `top_k` or `out` cannot be used; nothing is left behind.
    """
    _check(checkpoints, corpora, out, batch_size, sequence_length, overwrite=overwrite)
    models = [load(each) for each in checkpoints]
    candidates = _candidates(models, checkpoints, contributions, experts, top_k)
    tokenizer = _shared_tokenizer(models, checkpoints)
    terminal.banner("evaluate", {"models": ", ".join(candidates), "domains": ", ".join(corpora), "out": out})
    with _new_files_vanish_on_error(out):
        domains = _domains(corpora, out / "prepared", sequence_length, tokenizer)
        report = measure(
            candidates,
            domains,
            question_sets=question_sets(corpora, questions),
            max_rows=max_rows,
            batch_size=batch_size,
        )
        merged = candidates.get(MERGED)
        if merged and top_k is None:
            table = bits_per_byte.score_top_k(merged.model, domains, max_rows=max_rows, batch_size=batch_size)
            extra = {"top_k": {str(k): scores for k, scores in table.items()}, "default_top_k": merged.model.top_k}
            report = dataclasses.replace(report, extra=extra)
        report = dataclasses.replace(report, extra=report.extra | {"checks": quality_checks(report)})
        files = [*pictures(report, out, metrics or {}), out / REPORT]
        report.write(out / REPORT)
    show(report)
    return report.as_json() | {"files": [str(file) for file in files]}


def pictures(report: Report, out: Path, metrics: Mapping[str, Path]) -> list[Path]:
    """Draws everything that the report and the runs' metrics allow; returns the files.

    Raises:
      UserError: metrics cannot be read, or a file cannot be written.
    """
    files = [out / "bits_per_byte.png"]
    plots.model_by_domain(report, files[0])
    if report.opt_out:
        files.append(out / "opt_out.png")
        plots.opt_out(report, files[-1])
    for model in report.routing:
        files.append(out / ("routing.png" if model == MERGED else f"routing_{model.replace(':', '_')}.png"))
        plots.routing(report, files[-1], model)
    if metrics:
        files.append(out / "loss.png")
        plots.loss_curves(metrics, files[-1])
    return files


def show(report: Report) -> None:
    """The report as tables on the terminal."""
    rows = [[label, *(scores[name] for name in report.domains)] for label, scores in report.models.items()]
    terminal.table("held-out bits per byte", ["model", *report.domains], rows)
    if table := report.extra.get("top_k"):
        default = str(report.extra.get("default_top_k"))
        rows = [[f"{k} (default)" if k == default else k, *scores.values()] for k, scores in table.items()]
        terminal.table("the same of the full merge, by experts per token", ["top k", *report.domains], rows)
    if report.exact_match:
        tasks = list(next(iter(report.exact_match.values())))
        rows = [[label, *(right[task] for task in tasks)] for label, right in report.exact_match.items()]
        terminal.table("share of questions answered rightly", ["model", *tasks], rows)
    if checks := report.extra.get("checks"):
        rows = [[name, each["value"], each["target"], "yes" if each["ok"] else "NO"] for name, each in checks.items()]
        terminal.table("what a merge promises", ["promise", "value", "target", "kept"], rows)


def question_sets(corpora: Mapping[str, Path], most: int) -> list[QuestionSet]:
    """For each kind of question, up to so many of them from the test split of the first corpus that holds any."""
    sets: list[QuestionSet] = []
    for kind in exact_match.KINDS:
        texts = (corpus for corpus in corpora.values() if not is_prepared(corpus))
        found = (exact_match.questions(split_texts(corpus, "test"), kind, most) for corpus in texts)
        if asked := next(filter(None, found), None):
            sets.append((kind, asked))
    return sets


def _check(checkpoints, corpora, out: Path, batch_size: int, sequence_length: int, *, overwrite: bool) -> None:
    """Refuses what can be refused before anything is read."""
    if not checkpoints:
        raise UserError("there is no checkpoint to evaluate: name the directory of an anchor or a merged model")
    if not corpora:
        raise UserError("there is no text to evaluate on: give --corpus NAME=DIR")
    for name, corpus in corpora.items():
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot name a domain: take letters, digits, '.', '_' and '-'")
        if not corpus.exists():
            raise UserError(f"there is no corpus at {corpus}, named as the domain {name!r}")
    if batch_size < 1 or sequence_length < 2:
        raise UserError(
            f"a batch needs at least 1 row and a row at least 2 tokens, but batch_size is {batch_size} and "
            f"sequence_length {sequence_length}"
        )
    if (out / REPORT).exists() and not overwrite:
        raise UserError(f"{out / REPORT} exists already: give another --out, or --overwrite to replace it")


def _candidates(
    models: Sequence[LanguageModel],
    directories: Sequence[Path],
    contributions: Sequence[Path],
    experts: tuple[str, ...] | None,
    top_k: int | None,
) -> dict[str, Candidate]:
    """Every model under its label, the anchor first and then owners' models."""
    anchors = [
        (model, directory) for model, directory in zip(models, directories, strict=True) if len(model.names) == 1
    ]
    mixtures = [
        (model, directory) for model, directory in zip(models, directories, strict=True) if len(model.names) > 1
    ]
    if len(anchors) > 1:
        raise UserError(f"{anchors[0][1]} and {anchors[1][1]} are both anchors: evaluate one at a time")
    if contributions and not anchors:
        raise UserError(f"{contributions[0]} is evaluated beside its anchor: name the anchor's directory too")
    if (experts is not None or top_k is not None) and not mixtures:
        raise UserError("experts and top_k choose within a merged model, but no checkpoint is one")
    found: dict[str, Candidate] = {}
    if anchors:
        found[PUBLIC] = Candidate(model=anchors[0][0])
    for directory in contributions:
        own = load_with_contribution(anchors[0][1], directory)
        _add(found, expert_label(own.names[-1]), Candidate(model=own), directory)
    for number, (model, directory) in enumerate(mixtures):
        label = MERGED if number == 0 else f"{MERGED}:{directory.resolve().name}"
        if experts is not None:
            label = f"{label}:only:{','.join(experts)}"
            _add(found, label, Candidate(model=model, experts=experts, top_k=top_k), directory)
        elif number == 0:
            found = opt_outs(model, top_k) | found
        else:
            _add(found, label, Candidate(model=model, top_k=top_k), directory)
    return _in_order(found)


def _add(found: dict[str, Candidate], label: str, candidate: Candidate, directory: Path) -> None:
    if label in found:
        raise UserError(f"{directory} would be the second model {label!r}: name every model once")
    found[label] = candidate


def _in_order(found: dict[str, Candidate]) -> dict[str, Candidate]:
    """`public`, then owners' models, then merged ones."""
    prefix = expert_label("")
    return dict(sorted(found.items(), key=lambda item: (item[0] != PUBLIC, not item[0].startswith(prefix))))


def _shared_tokenizer(models: Sequence[LanguageModel], directories: Sequence[Path]) -> SavedVocabulary:
    """The tokenizer of all models: they are measured on the same rows."""
    first = models[0].tokenizer
    for model, directory in zip(models, directories, strict=True):
        if model.tokenizer.fingerprint != first.fingerprint:
            raise UserError(f"{directories[0]} and {directory} have different tokenizers: evaluate them one at a time")
    return first


def _domains(
    corpora: Mapping[str, Path], prepared: Path, sequence_length: int, tokenizer: SavedVocabulary
) -> dict[str, Packing]:
    """Rows of every corpus's test split, `public` first."""
    domains = {}
    for name in sorted(corpora, key=lambda name: name != PUBLIC):
        where = prepare(corpora[name], prepared / name, tokenizer)
        if (other := vocabulary_of(where).fingerprint) != tokenizer.fingerprint:
            raise UserError(
                f"{corpora[name]} was prepared with the tokenizer {other}, but the models' is {tokenizer.fingerprint}: "
                "prepare the text with the models' tokenizer"
            )
        documents = open_split(where, "test")
        if not len(documents):
            raise UserError(f"the corpus {corpora[name]} has no document in its test split")
        domains[name] = Packing(documents, sequence_length)
    return domains


@contextlib.contextmanager
def _new_files_vanish_on_error(out: Path) -> Iterator[None]:
    """Creates `out`; if the block ends badly and `out` was not there before, removes it again."""
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error
        raise

"""Proxies: a classifier whose every score is held out, and the public documents that it picks."""

import gzip
import hashlib
import json

import numpy as np
import pytest

from flexolmo_jax.domain import ProxySelection, select_proxies
from flexolmo_jax.domain.classifier import Classifier, ngram_features
from flexolmo_jax.errors import UserError
from flexolmo_jax.parallel import MeshConfig
from tests.domain.conftest import PROSE, SUMS
from tests.small import write_corpus

HIDDEN = ["12 + 30 = 42\n", "17 + 8 = 25\n"]
"""Public documents that are like the owner's."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("proxies")
    write_corpus(root / "own", SUMS)
    write_corpus(root / "public", [*PROSE[:30], HIDDEN[0], " \n", *PROSE[30:], HIDDEN[1], HIDDEN[0]])
    return root


def select(corpora, out, share=2 / 64, anchor=None, encoder=None, overwrite=False, **changes):
    return select_proxies(
        text=corpora / "own",
        public_text=corpora / "public",
        out=out,
        selection=ProxySelection(share=share, **changes),
        mesh=MeshConfig(),
        anchor=anchor,
        encoder=encoder,
        overwrite=overwrite,
    )


def chosen(out):
    with gzip.open(out / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("by", ["n-grams", "anchor", "encoder"])
def test_proxies_are_the_public_documents_most_like_the_owners(by, corpora, place, hf_encoder, tmp_path):
    features = {"anchor": {"anchor": place / "anchor"}, "encoder": {"encoder": hf_encoder}}.get(by, {})
    result = select(corpora, tmp_path / "out", **features)
    lines = chosen(tmp_path / "out")
    assert [line["text"] for line in lines] == HIDDEN  # each once, in the corpus's order
    assert [line["id"] for line in lines] == [hashlib.sha256(text.encode()).hexdigest()[:16] for text in HIDDEN]
    assert result["count"] == 2 and result["accuracy"] > 0.9 and result["auroc"] > 0.9
    assert (result["own"], result["public"]) == (64, 43)
    facts = json.loads((tmp_path / "out/selection.json").read_text())
    assert facts["accuracy"] == result["accuracy"]
    assert set(facts["scores"]) == {line["id"] for line in lines}
    assert all(line.keys() == {"id", "text"} for line in lines)


def test_the_same_corpora_give_the_same_bytes(corpora, tmp_path):
    for name in ("first", "second"):
        select(corpora, tmp_path / name)
    for file in ("train.jsonl.gz", "selection.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_the_published_share_is_well_below_a_hundredth_of_the_owners_documents():
    assert ProxySelection().share < 0.01


def test_diverse_proxies_are_not_variants_of_one_document(tmp_path):
    lines = SUMS[20:30]
    variants = ["".join(lines[n:] + lines[:n]) for n in range(3)]
    others = ["".join(SUMS[n : n + 10] + PROSE[n : n + 2]) for n in (0, 30)]
    write_corpus(tmp_path / "own", ["".join(SUMS[n : n + 10]) for n in range(54)])
    write_corpus(tmp_path / "public", [*PROSE, *others, *variants])
    for method in ("top", "diverse"):
        select(tmp_path, tmp_path / method, share=3 / 54, method=method, pool=3)
    top, diverse = ({line["text"] for line in chosen(tmp_path / method)} for method in ("top", "diverse"))
    assert len(top) == len(diverse) == 3
    assert len(diverse & set(variants)) < len(top & set(variants))
    assert not diverse & set(PROSE)


def test_a_score_is_one_of_a_model_that_never_saw_the_document():
    public = PROSE[:20]
    everything = Classifier(SUMS, public, ngram_features(100))
    for document in public[:3]:
        without = Classifier(SUMS, [text for text in public if text != document], ngram_features(100))
        assert without.scores([document]) == everything.scores([document])
    for document in SUMS[:3]:
        without = Classifier([text for text in SUMS if text != document], public, ngram_features(100))
        assert without.scores([document]) == everything.scores([document])


def test_the_accuracy_is_that_of_the_scores_and_chance_where_there_is_nothing_to_tell_apart():
    classifier = Classifier(SUMS[:40], PROSE[:15] + SUMS[40:50], ngram_features(100))
    own, public = classifier.scores(SUMS[:40]), classifier.scores(PROSE[:15] + SUMS[40:50])
    assert classifier.held_out.accuracy == pytest.approx((np.mean(own > 0) + np.mean(public <= 0)) / 2)
    assert classifier.held_out.auroc == pytest.approx(np.mean(own[:, None] > public[None]), abs=0.02)
    words = np.random.default_rng(0).choice(["sail", "reef", "tide", "lee", "wind", "keel"], (400, 12))
    texts = [" ".join(row) for row in words]
    alike = Classifier(texts[:200], texts[200:], ngram_features(100)).held_out
    assert abs(alike.accuracy - 0.5) < 0.12 and abs(alike.auroc - 0.5) < 0.12
    same = Classifier(texts[:200], texts[:200], ngram_features(100)).held_out
    assert same.accuracy == pytest.approx(0.5) and same.auroc == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("share", 0.0, "share must be above 0"),
        ("share", 1.5, "share must be above 0"),
        ("method", "best", "must be one of top, diverse"),
        ("pool", 0, "pool must be at least 1"),
        ("documents", 0, "documents must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(field, value, says):
    with pytest.raises(UserError, match=says):
        ProxySelection(**{field: value})


def test_bad_input_is_one_sentence_and_leaves_nothing(corpora, place, hf_encoder, tmp_path):
    write_corpus(tmp_path / "one" / "own", ["only this"])
    write_corpus(tmp_path / "one" / "public", PROSE)
    write_corpus(tmp_path / "blank" / "own", [" \n"])
    write_corpus(tmp_path / "blank" / "public", PROSE)
    for where, changes, says in [
        (corpora, dict(anchor=place / "anchor", encoder=hf_encoder), "not both"),
        (corpora, dict(anchor=place / "math"), "is not an anchor"),
        (corpora, dict(encoder=place / "math"), "is not an encoder"),
        (tmp_path / "one", {}, "too few different documents in the owner's corpus"),
        (tmp_path / "blank", {}, "no document to train on"),
        (tmp_path / "nowhere", {}, "no corpus at"),
    ]:
        with pytest.raises(UserError, match=says) as refusal:
            select(where, tmp_path / "out", **changes)
        assert "\n" not in str(refusal.value) and not list(tmp_path.glob("*out*"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        select(corpora, tmp_path / "out")

"""The stage, with real checkpoints; only the tokenizing of corpora, which imports TensorFlow, is replaced."""

import json

import pytest
from small_models import BATCH, CONFIG, NAMES, ROW, TEXTS, documents, fresh_params, write_corpus

from flexolmo_jax.data.builtin import remainder
from flexolmo_jax.data.documents import read_documents
from flexolmo_jax.data.vocabularies import SavedVocabulary
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate import bits_per_byte, report, stage
from flexolmo_jax.model.partition import belongs_to_anchor, select
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.manifest import ExpertRecord, Manifest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of an anchor, of its merge with two experts, and of one corpus for each domain."""
    root = tmp_path_factory.mktemp("saved")
    params = fresh_params()
    whole = arrays.digests(params)
    parts = {"merged": (params, NAMES), "anchor": (select(params, belongs_to_anchor), NAMES[:1])}
    for kind, (leaves, names) in parts.items():
        manifest = Manifest(
            kind=kind,
            model=CONFIG,
            experts=tuple(ExpertRecord(name=name) for name in names),
            anchor=checkpoint.anchor_fingerprint(whole),
            arrays=arrays.digests(leaves),
            top_k=min(2, len(names)),
        )
        checkpoint.write(root / kind, leaves, manifest)
    write_corpus(root / "prose", *TEXTS)
    write_corpus(root / "sums", *(remainder(a, 2) for a in range(5)))
    return root


@pytest.fixture
def run(saved, tmp_path, monkeypatch):
    def prepare(corpus, out, tokenizer):
        out.mkdir(parents=True)
        return corpus

    monkeypatch.setattr(stage, "prepare", prepare)
    monkeypatch.setattr(stage, "vocabulary_of", lambda corpus: SavedVocabulary())
    monkeypatch.setattr(
        stage, "open_split", lambda corpus, split: documents(*read_documents([corpus / f"{split}.jsonl"]))
    )

    def evaluate(*checkpoints, **arguments):
        corpora = {"math": saved / "sums", "public": saved / "prose"}
        settings = {"corpora": corpora, "out": tmp_path / "out", "sequence_length": ROW, "batch_size": BATCH}
        return stage.evaluate(checkpoints=tuple(saved / each for each in checkpoints), **(settings | arguments))

    return evaluate


def test_merged_model(run, model, packing, tmp_path, capsys):
    found = run("merged")
    assert list(found["models"]) == ["public", "merged", "merged:without:math", "merged:without:code"]
    assert found["domains"] == ["public", "math"]
    for label, experts in (("merged", NAMES), ("merged:without:math", ("public", "code")), ("public", ("public",))):
        expected = bits_per_byte.score(model, packing, experts=experts, batch_size=BATCH).bits_per_byte
        assert found["models"][label]["public"] == pytest.approx(expected)
    assert found["exact_match"]["merged"] == {"math": 0.0}
    assert found["default_top_k"] == 2
    assert found["top_k"]["2"] == pytest.approx(found["models"]["merged"])
    assert set(found["checks"]) == {"public harm", "opt-out harm: math", "opt-out shift: math"}
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"prepared", "report.json", "bits_per_byte.png", "opt_out.png", "routing.png"}
    on_disk = json.loads((tmp_path / "out" / "report.json").read_text())
    assert on_disk == {key: value for key, value in found.items() if key != "files"}
    assert report.read(tmp_path / "out" / "report.json").extra["top_k"] == found["top_k"]
    shown = capsys.readouterr()
    assert "merged:without:code" in shown.err
    assert not shown.out
    with pytest.raises(UserError, match="exists already"):
        run("merged")


def test_choice_of_experts(run):
    found = run("merged", experts=("public", "math"), top_k=2, max_rows=2, questions=1)
    assert list(found["models"]) == ["merged:only:public,math"]


def test_anchor_is_the_public_model(saved):
    anchor, merged = stage.load(saved / "anchor"), stage.load(saved / "merged")
    labels = stage._candidates([merged, anchor, merged], [saved / "m", saved / "a", saved / "tuned"], (), None, None)
    assert list(labels) == ["public", "merged", "merged:without:math", "merged:without:code", "merged:tuned"]
    assert labels["public"].model is anchor


@pytest.mark.parametrize(
    ("checkpoints", "arguments", "message"),
    [
        ((), {}, "no checkpoint"),
        (("missing",), {}, "is not an anchor or merged"),
        (("prose",), {}, "is not an anchor or merged"),
        (("anchor", "anchor"), {}, "both anchors"),
        (("anchor",), {"experts": ("public",)}, "no checkpoint is one"),
        (("merged",), {"experts": ("public", "law")}, "no expert 'law'"),
        (("merged",), {"experts": ()}, "at least one expert"),
        (("merged",), {"top_k": 4}, "top_k is 4"),
        (("merged",), {"corpora": {}}, "no text"),
        (("merged",), {"questions": 0}, "at least 1 row or question"),
        (("merged",), {"sequence_length": 1}, "at least 2 tokens"),
    ],
)
def test_bad_input_leaves_nothing_behind(run, tmp_path, checkpoints, arguments, message):
    with pytest.raises(UserError, match=message):
        run(*checkpoints, **arguments)
    assert not (tmp_path / "out").exists()


def test_bad_corpora_and_outputs_leave_nothing_behind(run, saved, tmp_path):
    with pytest.raises(UserError, match="cannot name a domain"):
        run("merged", corpora={"../x": saved / "prose"})
    with pytest.raises(UserError, match="no corpus at"):
        run("merged", corpora={"law": saved / "law"})
    with pytest.raises(UserError, match="no document in its test split"):
        run("merged", corpora={"law": write_corpus(tmp_path / "empty")})
    with pytest.raises(UserError, match="beside its anchor"):
        run("merged", contributions=(saved / "anchor",))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        run("merged", out=tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]

"""The report on disk, and the numbers that are computed from it."""

import json

import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate import report
from flexolmo_jax.evaluate.report import Report

MODELS = {
    "public": {"public": 2.0, "math": 5.0, "code": 3.0},
    "expert:math": {"public": 2.1, "math": 1.0, "code": 3.3},
    "expert:code": {"public": 2.0, "math": 5.0, "code": 2.0},
    "merged": {"public": 2.02, "math": 1.4, "code": 2.5},
    "merged:without:math": {"public": 2.0, "math": 5.1, "code": 2.4},
    "merged:without:code": {"public": 2.01, "math": 1.1, "code": 3.3},
}
FULL = Report(
    domains=("public", "math", "code"),
    models=MODELS,
    exact_match={"merged": {"math": 0.8}, "expert:math": {"math": 1.0}},
    routing={"merged": {"math": {"experts": ["public"], "probability": [[1.0]], "top_1": [[1.0]]}}},
    opt_out=report.opt_out_changes(MODELS),
    seconds={"bits_per_byte": 1.5},
    tokens_per_second={"bits_per_byte": 1000.0},
    versions=report.versions(),
    extra={"top_k": {"1": {"math": 1.5}}, "default_top_k": 2},
)


def test_round_trip(tmp_path):
    file = tmp_path / "report.json"
    FULL.write(file)
    assert report.read(file) == FULL
    content = json.loads(file.read_text())
    assert content["default_top_k"] == 2
    assert content["models"]["merged"]["math"] == 1.4
    required = {"domains", "models", "exact_match", "routing", "opt_out", "seconds", "tokens_per_second", "versions"}
    assert content.keys() == required | {"top_k", "default_top_k"}
    assert list(tmp_path.iterdir()) == [file]


def test_refusals(tmp_path):
    for text in ("{", "[]", '{"models": {}}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(UserError, match="not a report"):
            report.read(tmp_path / "report.json")
    with pytest.raises(UserError, match="cannot write"):
        FULL.write(tmp_path / "missing" / "report.json")
    with pytest.raises(ValueError, match="'models'"):
        Report(domains=(), models={}, extra={"models": {}})


def test_versions():
    assert report.versions().keys() >= {"python", "flexolmo_jax", "jax", "flax"}


def test_quality():
    assert report.gap_closed(MODELS, "math") == pytest.approx(3.6 / 4.0)
    assert report.gap_closed(MODELS, "code") == pytest.approx(0.5)
    assert report.gap_closed({**MODELS, "expert:code": MODELS["public"]}, "code") == 0.0
    assert report.public_harm(MODELS) == pytest.approx(0.01)
    assert report.opt_out_harm(MODELS, "math") == pytest.approx(0.02)
    assert report.opt_out_shift(MODELS, "math") == pytest.approx(0.04)
    assert report.opt_out_shift(MODELS, "code") == pytest.approx(0.3 / 1.4)
    assert report.worst_harm(MODELS, ["merged", "merged:without:code"]) == pytest.approx(0.1)


def test_opt_out_changes():
    changes = report.opt_out_changes(MODELS)
    assert changes.keys() == {"math", "code"}
    assert changes["code"]["math"] == pytest.approx(
        {"bits_per_byte": 1.1, "against_merged": 1.1 / 1.4 - 1, "against_public": 1.1 / 5.0 - 1}
    )
    alone = report.opt_out_changes({"merged:without:math": {"math": 5.1}})
    assert alone == {"math": {"math": {"bits_per_byte": 5.1}}}


def test_checks_say_which_promise_is_kept():
    checks = report.quality_checks(FULL)
    assert {name: check["ok"] for name, check in checks.items()} == {
        "public harm": True,
        "gap closed: math": True,
        "gap closed: code": False,
        "opt-out harm: math": True,
        "opt-out harm: code": False,
        "opt-out shift: math": True,
        "opt-out shift: code": False,
        "exact match kept: math": False,
    }
    assert checks["gap closed: code"] == {"value": pytest.approx(0.5), "target": ">= 0.8", "ok": False}
    assert report.quality_checks(Report(domains=("law",), models={"public": {"law": 1.0}})) == {}

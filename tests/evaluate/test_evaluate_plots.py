"""Every picture is a PNG of more than one colour, and what cannot be drawn is refused."""

import json

import matplotlib.image
import numpy as np
import pytest
from test_evaluate_report import FULL

from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluate import plots
from flexolmo_jax.evaluate.report import Report


def check_picture(file):
    assert file.read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(file)
    assert min(pixels.shape[:2]) > 100
    assert np.ptp(pixels[..., :3]) > 0.5
    return pixels


def test_bits_per_byte_and_opt_out(tmp_path):
    plots.model_by_domain(FULL, tmp_path / "bits.png")
    plots.opt_out(FULL, tmp_path / "opt_out.png")
    coloured = check_picture(tmp_path / "bits.png")
    check_picture(tmp_path / "opt_out.png")
    alone = Report(domains=("math",), models={"merged": {"math": 1.0}})
    plots.model_by_domain(alone, tmp_path / "alone.png")
    grey = check_picture(tmp_path / "alone.png")
    assert np.ptp(coloured[..., :3], axis=-1).max() > 0.5  # changes are coloured, …
    assert np.ptp(grey[..., :3], axis=-1).max() < 0.2  # … and without `public` there are none
    with pytest.raises(UserError, match="none to draw"):
        plots.opt_out(alone, tmp_path / "nothing.png")


@pytest.mark.parametrize("layers", [2, 16])
def test_routing(tmp_path, layers):
    shares = np.tile([0.1, 0.7, 0.2], (layers, 1)).tolist()
    content = {"experts": ["public", "math", "code"], "probability": shares, "top_1": shares}
    report = Report(domains=("a", "b", "c"), models={}, routing={"merged": dict.fromkeys("abc", content)})
    plots.routing(report, tmp_path / "routing.png")
    check_picture(tmp_path / "routing.png")
    with pytest.raises(UserError, match="no routing of 'other'"):
        plots.routing(report, tmp_path / "nothing.png", "other")


def test_loss_curves_show_the_last_of_a_step_that_was_done_again(tmp_path):
    rows = [{"step": 10, "loss": 5.0}, {"step": 20, "loss": 9.0}, {"step": 20, "loss": 4.0}, {"step": 30, "loss": 3.0}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(map(json.dumps, rows)))
    assert plots._losses(metrics) == ([10, 20, 30], [5.0, 4.0, 3.0])
    plots.loss_curves({"anchor": metrics, "math": metrics}, tmp_path / "loss.png")
    check_picture(tmp_path / "loss.png")
    for text, reason in (("", "no loss"), ("{", "cannot read losses"), ("1\n", "cannot read losses")):
        metrics.write_text(text)
        with pytest.raises(UserError, match=reason):
            plots.loss_curves({"math": metrics}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_an_expert_has_one_colour():
    assert plots.colours(["public", "math", "code"])["code"] == plots.colours(["anchor", "math", "code"])["code"]
    assert len(set(plots.colours(["public", "a", "b", "c", "d"]).values())) == 5

"""Soups and branch-train-mix against plain NumPy."""

import shutil

import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.merge import btx, likelihood_weights, soup
from flexolmo_jax.model.partition import flatten
from flexolmo_jax.store import checkpoint
from tests.small import write_anchor, write_contribution


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    write_anchor(root / "anchor")
    for seed, name in enumerate(("math", "code"), 1):
        write_contribution(root / name, root / "anchor", name, seed)
        write_anchor(root / f"dense_{name}", seed=seed)
    return root


def leaves(directory):
    return flatten(checkpoint.load(directory)[1])


@pytest.mark.parametrize("weights", [None, {"public": 1.0, "math": 2.0, "code": 5.0}])
def test_a_soup_averages_feed_forward_networks_and_keeps_the_rest(parts, tmp_path, weights):
    manifest = soup(parts / "anchor", [parts / "math", parts / "code"], tmp_path / "soup", weights=weights)
    assert manifest.names == ("public",) and "math" in manifest.experts[0].owner
    anchor, found = leaves(parts / "anchor"), leaves(tmp_path / "soup")
    assert found.keys() == anchor.keys()
    own = {"public": anchor} | {name: leaves(parts / name) for name in ("math", "code")}
    weights = weights or dict.fromkeys(own, 1.0)
    for path, leaf in found.items():
        if path[:2] == ("experts", "public"):
            every = [weights[name] * own[name]["experts", name, path[2]].astype(np.float64) for name in own]
            np.testing.assert_allclose(leaf, sum(every) / sum(weights.values()), rtol=2e-7, atol=1e-12)
        else:
            np.testing.assert_array_equal(leaf, anchor[path])


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"public": 1.0, "math": 1.0}, "every model needs one weight, but 'code'"),
        ({"public": 1.0, "math": 1.0, "code": 1.0, "law": 1.0}, "'law'"),
        ({"public": 0.0, "math": 0.0, "code": 0.0}, "not all zero"),
        ({"public": 2.0, "math": -1.0, "code": 0.0}, "must not be negative"),
    ],
)
def test_weights_that_cannot_be_are_refused(parts, tmp_path, weights, complaint):
    with pytest.raises(UserError, match=complaint):
        soup(parts / "anchor", [parts / "math", parts / "code"], tmp_path / "soup", weights=weights)
    assert not (tmp_path / "soup").exists()


def test_likelier_models_weigh_more():
    found = likelihood_weights({"public": 2.0, "math": 1.0, "code": 3.0}, temperature=0.5)
    expected = np.exp(-np.array([2.0, 1.0, 3.0]) / 0.5)
    np.testing.assert_allclose(list(found.values()), expected / expected.sum(), rtol=1e-12)
    assert likelihood_weights({"a": 1e6, "b": 1e6 + 1})["a"] == pytest.approx(1 / (1 + np.exp(-1)))


def test_btx_takes_the_networks_as_experts_and_averages_the_rest(parts, tmp_path):
    models = {"public": parts / "anchor", "math": parts / "dense_math", "code": parts / "dense_code"}
    manifest = btx(models, tmp_path / "btx", seed=3)
    assert manifest.names == ("public", "math", "code") and manifest.top_k == 3
    found = leaves(tmp_path / "btx")
    dense = {name: leaves(directory) for name, directory in models.items()}
    for path, leaf in found.items():
        if path[0] == "anchor":
            mean = np.mean([each[path].astype(np.float64) for each in dense.values()], axis=0)
            np.testing.assert_allclose(leaf, mean, rtol=1e-6, atol=1e-9)
        elif path[0] == "experts":
            np.testing.assert_array_equal(leaf, dense[path[1]]["experts", "public", path[2]])
    rows = np.stack([found["router", name, "row"] for name in manifest.names])
    assert 0.01 < rows.std() < 0.03 and not np.allclose(rows[0], rows[1])
    btx(models, tmp_path / "again", seed=3)
    for path, leaf in leaves(tmp_path / "again").items():
        np.testing.assert_array_equal(leaf, found[path])


def test_a_damaged_model_makes_no_average(parts, tmp_path):
    shutil.copytree(parts / "dense_math", tmp_path / "bad")
    chunk = tmp_path / "bad/arrays/state/anchor.attention.q/c/0/0/0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(UserError, match="digest of anchor/attention/q"):
        btx({"public": parts / "anchor", "math": tmp_path / "bad"}, tmp_path / "btx")
    assert not (tmp_path / "btx").exists()

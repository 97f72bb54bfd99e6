"""`embed-domain` from end to end, and that a router row can begin at what it writes."""

import json

import numpy as np
import pytest

from flexolmo_jax.data.packing import Packing
from flexolmo_jax.data.tokens import Documents
from flexolmo_jax.domain import PrivateMean, embed_domain
from flexolmo_jax.domain.encoders import anchor_encoder, text_encoder
from flexolmo_jax.domain.vectors import cosine, project
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import PUBLIC, builder
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.store.manifest import read
from flexolmo_jax.train.router_start import RouterStart
from tests.domain.conftest import PROSE, SUMS


def embed(place, out, **changes):
    given = dict(text=place / "math", public_text=place / "public")
    return embed_domain(**(dict(anchor=place / "anchor", out=out, mesh=MeshConfig()) | given | changes))


def load(result):
    return np.load(result["embedding"]), np.load(result["public_embedding"])


def row_from(place, result):
    """The row [L, D] that training begins from."""
    config = read(place / "anchor").model
    rows = Packing(Documents(np.arange(20, dtype=np.uint16), np.array([0, 20])), 10)
    start = RouterStart(
        method="embedding", embedding=result["embedding"], public_embedding=result["public_embedding"], bias=-1.0
    ).begin(config, builder(config, (PUBLIC,)), {}, rows, rows, 0)
    assert np.all(np.asarray(start.bias) == -1)
    return np.asarray(start.row)


def test_the_anchors_embedding_is_the_mean_over_documents_per_layer(place, tmp_path):
    result = embed(place, tmp_path / "out")
    own, public = load(result)
    encode = anchor_encoder(place / "anchor", 512, MeshConfig())
    for found, texts in ((own, SUMS), (public, PROSE)):
        assert found.shape == (2, 16) and found.dtype == np.float32
        np.testing.assert_allclose(found, np.mean([encode([text])[0] for text in texts], axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result["cosine_to_public"], cosine(own, public), atol=1e-5)
    assert result["privacy"] == "none" and result["shape"] == (2, 16)
    facts = json.loads((tmp_path / "out/embedding.json").read_text())
    assert facts["cosine_to_public"] == result["cosine_to_public"]
    row = row_from(place, result)
    np.testing.assert_allclose(row[:, 1:], (own - public)[:, 1:])
    assert not np.any(row[:, 0])


def test_no_more_documents_are_read_than_asked_for(place, tmp_path):
    own, _ = load(embed(place, tmp_path / "out", documents=1))
    each = anchor_encoder(place / "anchor", 512, MeshConfig())(SUMS)
    assert np.sum(np.all(np.isclose(each, own, atol=1e-6), axis=(1, 2))) == 1


def test_an_encoders_embedding_is_brought_to_the_anchors_width(place, hf_encoder, tmp_path):
    result = embed(place, tmp_path / "out", encoder=hf_encoder)
    own, public = load(result)
    means = [text_encoder(hf_encoder)(texts)[:, 0].mean(axis=0) for texts in (SUMS, PROSE)]
    assert own.shape == public.shape == (16,)
    for found, mean in zip((own, public), means, strict=True):
        np.testing.assert_allclose(found, project(mean, 16, seed=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result["cosine_to_public"], [cosine(*means)], atol=1e-5)
    other, _ = load(embed(place, tmp_path / "other", encoder=hf_encoder, projection_seed=1))
    assert not np.allclose(own, other)
    row = row_from(place, result)
    np.testing.assert_allclose(row[:, 1:], np.tile(own - public, (2, 1))[:, 1:])


@pytest.mark.parametrize("width", [16, 10, 30])
def test_vectors_from_files_are_taken_in_any_width(width, place, tmp_path):
    own, public = np.random.default_rng(0).standard_normal((2, width)).astype(np.float16)
    np.save(tmp_path / "own.npy", own)
    np.save(tmp_path / "public.npy", public)
    vectors = dict(text=None, public_text=None, vector=tmp_path / "own.npy", public_vector=tmp_path / "public.npy")
    result = embed(place, tmp_path / "out", **vectors)
    found, _ = load(result)
    assert found.shape == (16,)
    if width == 16:
        np.testing.assert_array_equal(found, own.astype(np.float32))
    if width <= 16:
        assert result["cosine_to_public"] == pytest.approx([float(cosine(own, public))], abs=1e-5)


@pytest.mark.parametrize("by", ["anchor", "encoder"])
def test_a_private_embedding_says_what_it_promises_and_nothing_else(by, place, hf_encoder, tmp_path, capsys):
    changes = {"encoder": hf_encoder} if by == "encoder" else {}
    settings = dict(privacy=PrivateMean(epsilon=2.0, delta=1e-3), documents=100, **changes)
    first, second = (embed(place, tmp_path / name, **settings) for name in ("first", "second"))
    assert "fewer than 100 documents" in capsys.readouterr().err
    assert not np.any(load(first)[0] == load(second)[0])
    np.testing.assert_array_equal(load(first)[1], load(second)[1])
    assert (first["privacy"]["epsilon"], first["privacy"]["delta"]) == (2.0, 1e-3)
    facts = json.loads((tmp_path / "first/embedding.json").read_text())
    told = {key: value for key, value in facts.items() if key != "cosine_to_public"}
    assert told == {key: value for key, value in json.loads((tmp_path / "second/embedding.json").read_text()).items()
                    if key != "cosine_to_public"}  # fmt: skip
    assert facts["cosine_to_public"] == pytest.approx(np.atleast_1d(cosine(*load(first))), abs=1e-5)


def test_bad_input_is_one_sentence_and_leaves_nothing(place, hf_encoder, tmp_path):
    np.save(tmp_path / "five.npy", np.zeros(5))
    np.save(tmp_path / "six.npy", np.zeros(6))
    nothing = dict(text=None, public_text=None)
    vectors = nothing | dict(vector=tmp_path / "five.npy", public_vector=tmp_path / "five.npy")
    for changes, says in [
        (nothing, "but not neither"),
        (dict(public_text=None), "but not --text"),
        (dict(vector=tmp_path / "five.npy"), "but not --text, --public_text, --vector"),
        (vectors | dict(public_vector=tmp_path / "six.npy"), "holds 5 numbers, but .*six.npy 6"),
        (vectors | dict(encoder=hf_encoder), "leaves nothing to encode or to make private"),
        (vectors | dict(privacy=PrivateMean(epsilon=1.0, delta=1e-6)), "leaves nothing to encode"),
        (dict(documents=0), "documents is 0"),
        (dict(tokens=0), "tokens is 0"),
        (dict(text=tmp_path / "nowhere"), "no corpus at"),
        (dict(anchor=place / "math"), "is not an anchor"),
        (dict(encoder=place / "math"), "is not an encoder"),
        (dict(privacy=PrivateMean(epsilon=1.0, delta=0.05)), "must be below 1 / 1,000"),
    ]:
        with pytest.raises(UserError, match=says) as refusal:
            embed(place, tmp_path / "out", **changes)
        assert "\n" not in str(refusal.value) and not list(tmp_path.glob("*out*"))


def test_what_is_there_is_replaced_only_if_asked(place, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        embed(place, tmp_path / "out", documents=2)
    embed(place, tmp_path / "out", documents=2, overwrite=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "embedding.npy",
        "public_embedding.npy",
        "embedding.json",
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.zeros((3, 16)), r"shape \(3, 16\), but the anchor needs \(16,\) or \(2, 16\)"),
        (np.full((2, 16), np.inf), "not a finite number"),
        (np.array(["x"] * 16), "not a finite number"),
    ],
    ids=["layers", "infinite", "text"],
)
def test_rows_that_do_not_fit_the_anchor_are_refused(content, says, place, tmp_path):
    np.save(tmp_path / "rows.npy", content)
    with pytest.raises(UserError, match=says):
        row_from(place, {"embedding": tmp_path / "rows.npy", "public_embedding": tmp_path / "rows.npy"})

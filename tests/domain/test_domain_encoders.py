"""What encoders make of documents, against the models that they wrap, asked one document at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.data.vocabulary import encode as to_ids
from flexolmo_jax.domain.encoders import anchor_encoder, text_encoder
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import PUBLIC, builder
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.store import checkpoint
from tests.domain.conftest import PROSE, SUMS

TEXTS = [*PROSE[:3], *SUMS[:9], "x", "é" * 300]


def test_the_anchor_gives_each_documents_mean_router_inputs(place):
    manifest, params = checkpoint.load(place / "anchor", "anchor")
    model = builder(manifest.model, (PUBLIC,))(jax.tree.map(jnp.asarray, params))
    found = anchor_encoder(place / "anchor", 48, MeshConfig())(TEXTS)
    assert found.shape == (len(TEXTS), 2, 16)
    for vectors, text in zip(found, TEXTS, strict=True):
        ids = jnp.array([to_ids(text)[:48]])
        positions = jnp.arange(ids.shape[1])[None]
        inputs = model.trace(ids, positions, jnp.ones_like(ids)).router_inputs
        np.testing.assert_allclose(vectors, np.asarray(inputs, np.float64)[:, 0].mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[..., 0], 1, rtol=1e-5)  # the bias channel


def test_a_documents_vectors_do_not_depend_on_the_others(place):
    encode = anchor_encoder(place / "anchor", 48, MeshConfig())
    together, alone = encode(TEXTS), np.concatenate([encode([text]) for text in TEXTS])
    np.testing.assert_array_equal(together, alone)


def test_a_hugging_face_encoder_gives_its_mean_last_hidden_state(hf_encoder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    found = text_encoder(hf_encoder)(PROSE[:2] + SUMS[:3])
    assert found.shape == (5, 1, 12)
    model, tokenizer = AutoModel.from_pretrained(hf_encoder), AutoTokenizer.from_pretrained(hf_encoder)
    for vectors, text in zip(found, PROSE[:2] + SUMS[:3], strict=True):
        ids = tokenizer(text, truncation=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0].numpy().mean(axis=0)
        np.testing.assert_allclose(vectors[0], expected, rtol=1e-4, atol=1e-5)


def test_a_sentence_transformers_model_pools_in_its_own_way(hf_encoder, tmp_path):
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoModel, AutoTokenizer

    parts = [Transformer(str(hf_encoder)), Pooling(12, pooling_mode="cls"), Normalize()]
    SentenceTransformer(modules=parts).save(str(tmp_path / "st"))
    model, tokenizer = AutoModel.from_pretrained(hf_encoder), AutoTokenizer.from_pretrained(hf_encoder)
    with torch.no_grad():
        first = model(tokenizer(SUMS[5], return_tensors="pt")["input_ids"]).last_hidden_state[0, 0].numpy()
    found = text_encoder(tmp_path / "st")([SUMS[5]])
    np.testing.assert_allclose(found[0, 0], first / np.linalg.norm(first), rtol=1e-4, atol=1e-5)


def test_a_directory_that_is_no_encoder_is_refused_in_one_sentence(place, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    for directory, says in [
        (place / "math", "neither a modules.json nor a config.json"),
        (tmp_path / "nowhere", "neither a modules.json nor a config.json"),
        (tmp_path, "cannot load the encoder"),
    ]:
        with pytest.raises(UserError, match=says) as refusal:
            text_encoder(directory)
        assert "\n" not in str(refusal.value)

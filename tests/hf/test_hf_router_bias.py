"""Router biases of a model without a bias channel: folded by regression, or kept in a model class of their own."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import export_hf, read_hf
from flexolmo_jax.hf.fold_bias import LENGTH, Moments, constant_direction, mean_square_error
from flexolmo_jax.infer import LanguageModel, load
from tests.small import write_corpus

WORDS = ("sail", "reef", "tide", "harbour", "lee", "anchor", "wind", "shore")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 12)) for _ in range(24)]
    return write_corpus(tmp_path_factory.mktemp("corpus") / "public", texts)


@pytest.fixture(scope="module")
def biased(config, names, random_params, write_model, tmp_path_factory):
    params = random_params(config, names, bias=1.0)
    return write_model(tmp_path_factory.mktemp("biased") / "merged", config, params, names=names)


def moments(x):
    return Moments(np.einsum("nd,ne->de", x, x) / len(x), x.mean(axis=0))


def test_the_direction_is_that_of_least_squares_and_exact_where_a_constant_exists():
    random = np.random.default_rng(0)
    x = random.normal(size=(4000, 6)) @ random.normal(size=(6, 6)) + random.normal(size=6)
    found = constant_direction(moments(x[:2000]), moments(x[2000:]))
    # There is plenty of text, so the smallest strength is the best, and ridge regression is least squares.
    expected = np.linalg.lstsq(x[:2000], np.ones(2000), rcond=None)[0]
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    measured = mean_square_error(found[None], Moments(*(m[None] for m in moments(x[2000:]))))
    np.testing.assert_allclose(measured, np.mean((x[2000:] @ found - 1) ** 2), rtol=1e-6)
    x[:, 2] = 0.5
    found = constant_direction(moments(x[:2000]), moments(x[2000:]))
    np.testing.assert_allclose(x @ found, 1.0, atol=1e-4)


def test_strength_is_chosen_where_there_is_too_little_text():
    random = np.random.default_rng(1)
    x = random.normal(size=(30, 24)) + 0.3
    fit, validation = moments(x[:15]), moments(x[15:])
    found = constant_direction(fit, validation)
    unregularised = np.linalg.lstsq(x[:15], np.ones(15), rcond=None)[0]
    errors = [mean_square_error(v[None], Moments(*(m[None] for m in validation)))[0] for v in (found, unregularised)]
    assert errors[0] < errors[1]


@pytest.mark.slow
def test_folding_is_measured_as_another_computation_does(biased, corpus, config, names, tmp_path, capsys):
    export = export_hf(biased, tmp_path / "hf", fold_bias=corpus)
    folded = export.folded
    assert len(folded.remaining_error) == config.layers
    # The exported model, read back, has exactly the loss that was reported for it.
    back = read_hf(tmp_path / "hf")
    ours = load(biased)
    assert _loss(LanguageModel(back.config, back.names, back.params, back.top_k), corpus) == pytest.approx(
        folded.loss_folded, abs=1e-5
    )
    assert _loss(ours, corpus) == pytest.approx(folded.loss, abs=1e-5)
    export_hf(biased, tmp_path / "dropped", drop_bias=True)
    back = read_hf(tmp_path / "dropped")
    dropped = _loss(LanguageModel(back.config, back.names, back.params, back.top_k), corpus)
    assert dropped == pytest.approx(folded.loss_dropped, abs=1e-5)
    assert abs(folded.loss_folded - folded.loss) < abs(dropped - folded.loss)
    said = capsys.readouterr().err
    assert "left out" in said
    assert "layer 1" in said
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert f"{folded.loss_folded:.4f}" in card
    assert "left out, so this is not" in (tmp_path / "dropped" / "README.md").read_text(encoding="utf-8")


def _loss(model, corpus) -> float:
    nats, count = 0.0, 0
    for line in (corpus / "test.jsonl").read_text().splitlines():
        ids = np.frombuffer(json.loads(line)["text"].encode(), np.uint8).astype(np.int32)[:LENGTH] + 3
        logits = np.asarray(model(jnp.asarray(ids[None]), experts=model.names)[0], np.float64)
        scores = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        nats -= scores[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    return nats / count


def test_folding_is_exact_where_some_direction_is_constant(config, names, random_params, write_model, corpus, tmp_path):
    """A channel that is reserved, but that the manifest says nothing of, is found by the regression."""
    params = random_params(dataclasses.replace(config, bias_channel=True), names, bias=1.0)
    source = write_model(tmp_path / "merged", config, params, names=names)
    folded = export_hf(source, tmp_path / "hf", fold_bias=corpus).folded
    assert folded.logit_error < 1e-3
    assert folded.loss_folded == pytest.approx(folded.loss, abs=1e-4)


def test_folding_needs_text_of_all_splits_within_the_vocabulary(biased, corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        export_hf(biased, tmp_path / "hf", fold_bias=tmp_path / "empty")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "train.jsonl").write_text('{"text": "sail"}\n')
    with pytest.raises(UserError, match="no text in its split 'validation'"):
        export_hf(biased, tmp_path / "hf", fold_bias=tmp_path / "one")
    assert not (tmp_path / "hf").exists()


def test_the_default_is_to_refuse_and_to_name_the_three(biased, tmp_path):
    with pytest.raises(UserError, match=r"--fold-bias PUBLIC_TEXT .*--custom-code .*--drop-bias"):
        export_hf(biased, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("chosen", [("public", "math", "code"), ("math", "code")], ids="+".join)
def test_custom_code_has_the_logits_of_the_model(
    chosen, normalize, config, names, random_params, write_model, tmp_path
):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from flexolmo_jax.hf.verify import load_transformers, verify_hf

    config = dataclasses.replace(config, normalize_top_k=normalize)
    source = write_model(tmp_path / "merged", config, random_params(config, names, bias=2.0), names=names)
    for top_k in (1, len(chosen)):
        export = export_hf(source, tmp_path / "hf", custom_code=True, experts=chosen, top_k=top_k, overwrite=True)
        assert export.architecture == "FlexOlmoBiasForCausalLM"
        found = verify_hf(tmp_path / "hf", source)
        assert found.max_difference <= 2e-4
        assert found.argmax_agreement == 1.0
    export_hf(source, tmp_path / "dropped", drop_bias=True, experts=chosen)
    # The test could not fail if the biases did not matter.
    assert verify_hf(tmp_path / "dropped", source).max_difference > 1e-2
    model = load_transformers(tmp_path / "hf")
    ids = model.generate(max_new_tokens=4, do_sample=False, inputs=model.dummy_inputs["input_ids"][:, :3])
    assert ids.shape[1] >= 4
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)


def test_only_our_own_code_is_run(biased, tmp_path):
    pytest.importorskip("transformers")
    from flexolmo_jax.hf import verify_hf

    export_hf(biased, tmp_path / "hf", custom_code=True)
    file = tmp_path / "hf" / "modeling_flex_olmo_bias.py"
    file.write_text(file.read_text() + f"\nopen({str(tmp_path / 'owned')!r}, 'w')\n")
    with pytest.raises(UserError, match="is not the code that this version"):
        verify_hf(tmp_path / "hf", biased)
    assert not (tmp_path / "owned").exists()

"""Transformers' models and ours compute the same from the same weights, in both directions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tokenizers  # noqa: E402

from flexolmo_jax.errors import UserError  # noqa: E402
from flexolmo_jax.hf import export_hf, import_hf, read_hf, verify_hf  # noqa: E402
from flexolmo_jax.hf.verify import load_transformers, transformers_logits  # noqa: E402
from flexolmo_jax.infer import LanguageModel, load  # noqa: E402
from tests.hf.test_hf_import_artefacts import foreign  # noqa: E402

LIMIT = 2e-4
NEW_TOKENS = 10
EOS = 1

# RMSNorm after the mixture takes out its scale, and with it every trace of `norm_topk_prob`, were epsilon not so large.
EPSILON = 0.1

VARIANTS = [
    pytest.param(4, False, id="MHA"),
    pytest.param(2, False, id="GQA"),
    pytest.param(2, True, id="GQA-normalised"),
]


def some_ids(rows: int = 1, length: int = 24) -> np.ndarray:
    return np.random.default_rng(7).integers(3, 259, (rows, length))


def check_same_logits(ours: LanguageModel, theirs) -> None:
    ids = some_ids()
    # All experts by name, as in `verify_hf`, so that both use one compiled function.
    difference = np.abs(np.asarray(ours(jnp.asarray(ids), experts=ours.names)) - transformers_logits(theirs, ids)).max()
    assert difference <= LIMIT


def check_same_text(ours: LanguageModel, theirs) -> None:
    ids, lengths = some_ids(2, 12), np.array([12, 5])
    new = ours.generate(jnp.asarray(ids), jnp.asarray(lengths), max_new_tokens=NEW_TOKENS)
    for row, length, mine in zip(ids, lengths, new, strict=True):
        prompt = torch.as_tensor(row[None, :length])
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": EOS, "pad_token_id": EOS}
        whole = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, length:].tolist()
        assert mine.tolist() == whole + [EOS] * (NEW_TOKENS - len(whole))


def randomise(model) -> None:
    """Fills every parameter, norms included, which a fresh transformers model leaves at one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)


@pytest.mark.parametrize(("kv_heads", "normalize"), VARIANTS)
def test_our_mixture_in_transformers(kv_heads, normalize, config, names, random_params, write_model, tmp_path):
    config = dataclasses.replace(config, kv_heads=kv_heads, normalize_top_k=normalize, norm_epsilon=EPSILON)
    source = write_model(tmp_path / "merged", config, random_params(config, names), names=names)
    ours = load(source)
    for top_k in range(1, len(names) + 1):
        export_hf(source, tmp_path / f"top{top_k}", top_k=top_k)
        theirs = load_transformers(tmp_path / f"top{top_k}")
        assert type(theirs) is transformers.FlexOlmoForCausalLM
        ours.top_k = top_k
        check_same_logits(ours, theirs)
        if top_k == 2 and (normalize or kv_heads == 4):
            check_same_text(ours, theirs)


def test_our_anchor_in_transformers(config, random_params, write_model, tmp_path):
    config = dataclasses.replace(config, kv_heads=1, rope_theta=2e4, norm_epsilon=1e-5)
    source = write_model(tmp_path / "anchor", config, random_params(config, ["public"]))
    export_hf(source, tmp_path / "hf")
    theirs = load_transformers(tmp_path / "hf")
    assert type(theirs) is transformers.Olmo2ForCausalLM
    check_same_logits(load(source), theirs)
    check_same_text(load(source), theirs)


@pytest.mark.parametrize(("kv_heads", "normalize"), VARIANTS)
def test_their_mixture_in_ours(kv_heads, normalize, names, tmp_path):
    shape = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "eos_token_id": EOS, "pad_token_id": 0}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": normalize, "rms_norm_eps": EPSILON}
    settings = transformers.FlexOlmoConfig(**shape, **heads, **experts)
    theirs = transformers.FlexOlmoForCausalLM(settings).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = read_hf(tmp_path, names=names)
    assert model.config.normalize_top_k is normalize
    ours = LanguageModel(model.config, model.names, model.params, model.top_k)
    for top_k in (1, 2, 3):
        for layer in theirs.model.layers:
            layer.mlp.gate.top_k = top_k
        ours.top_k = top_k
        check_same_logits(ours, theirs)
    if normalize or kv_heads == 4:
        ours.top_k = theirs.model.layers[0].mlp.gate.top_k = theirs.model.layers[1].mlp.gate.top_k = 2
        check_same_text(ours, theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_their_dense_model_in_ours(tied, tmp_path):
    shape = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "eos_token_id": EOS, "pad_token_id": 0}
    theirs = transformers.Olmo2ForCausalLM(
        transformers.Olmo2Config(**shape, **heads, rope_parameters={"rope_theta": 2e4}, tie_word_embeddings=tied)
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model = read_hf(tmp_path)
    assert (model.config.rope_theta, model.names, model.top_k) == (2e4, ("public",), 1)
    ours = LanguageModel(model.config, model.names, model.params, model.top_k)
    check_same_logits(ours, theirs)
    check_same_text(ours, theirs)


def test_a_bias_is_folded_exactly(config, names, random_params, write_model, tmp_path):
    config = dataclasses.replace(config, bias_channel=True)
    params = random_params(config, names, bias=4.0)
    params["router"]["code"]["bias"][0] = 3.0  # A positive bias does not act.
    source = write_model(tmp_path / "merged", config, params, names=names)
    ours = load(source)
    for top_k in range(1, len(names) + 1):
        export = export_hf(source, tmp_path / "hf", top_k=top_k, overwrite=True)
        assert export.dropped_bias == 0.0
        result = verify_hf(tmp_path / "hf", source, some_ids())
        assert result.max_difference <= LIMIT
        assert result.kl <= 1e-7
    ours.top_k = len(names)
    # The test could not fail if the biases did not matter.
    for name in names[1:]:
        params["router"][name]["bias"][:] = 0.0
    without = LanguageModel(config, names, params, len(names))
    logits = [np.asarray(model(jnp.asarray(some_ids()), experts=names)) for model in (ours, without)]
    assert np.abs(logits[0] - logits[1]).max() > 0.1


@pytest.mark.parametrize("chosen", [("public", "code"), ("math", "code"), ("code",)], ids="+".join)
def test_a_subset_is_the_masked_model(chosen, config, names, random_params, write_model, tmp_path):
    config = dataclasses.replace(config, bias_channel=True)
    source = write_model(tmp_path / "merged", config, random_params(config, names, bias=2.0), names=names)
    export = export_hf(source, tmp_path / "hf", experts=chosen[::-1])
    assert export.experts == chosen
    ids = some_ids()
    theirs = transformers_logits(load_transformers(tmp_path / "hf"), ids)
    masked = np.asarray(load(source)(jnp.asarray(ids), experts=chosen, top_k=export.top_k))
    assert np.abs(masked - theirs).max() <= LIMIT
    assert verify_hf(tmp_path / "hf", source, ids).max_difference <= LIMIT


def test_verification_sees_a_wrong_weight(merged, config, names, random_params, write_model, tmp_path):
    export_hf(merged, tmp_path / "hf")
    same = verify_hf(tmp_path / "hf", merged, some_ids(2))
    assert same.max_difference <= LIMIT
    assert (same.argmax_agreement, same.tokens) == (1.0, 48)
    params = random_params(config, names)
    params["experts"]["code"]["up"][1] *= 1.5
    other = write_model(tmp_path / "other", config, params, names=names)
    wrong = verify_hf(tmp_path / "hf", other, some_ids(2))
    assert wrong.max_difference > 1e-2
    assert wrong.kl > 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("experts", "tied"), [(1, True), (1, False), (2, False), (7, True)])
def test_a_model_from_elsewhere_is_the_same_after_import_and_export(experts, tied, dtype, config, tmp_path):
    theirs = tmp_path / "theirs"
    foreign(theirs, config, experts, dtype=dtype, tied=tied)
    done = import_hf(theirs, tmp_path / "ours")
    home = done.merged or done.anchor
    assert verify_hf(theirs, home, some_ids()).max_difference <= LIMIT
    export_hf(home, tmp_path / "back", max_shard_bytes=50_000)
    back = verify_hf(tmp_path / "back", home, some_ids())
    assert back.max_difference <= LIMIT
    assert back.argmax_agreement == 1.0
    logits = [
        transformers_logits(load_transformers(directory), some_ids()) for directory in (theirs, tmp_path / "back")
    ]
    np.testing.assert_array_equal(*logits)


def test_auto_tokenizer_reads_what_came_from_elsewhere(config, tmp_path):
    theirs = tmp_path / "theirs"
    foreign(theirs, config, 1, dtype="float32")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the anchor and the tide", "the sail and the reef"], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a").save_pretrained(theirs)
    export_hf(import_hf(theirs, tmp_path / "ours").anchor, tmp_path / "back")
    before, after = (transformers.AutoTokenizer.from_pretrained(place) for place in (theirs, tmp_path / "back"))
    for text in ("the anchor and the tide", "naïve Ünïcödé, 漢字 \n\t x"):
        ids = after(text)["input_ids"]
        assert ids == before(text)["input_ids"]
        assert after.decode(ids) == text


def test_verification_refuses_another_number_of_experts(merged, config, tmp_path):
    foreign(tmp_path / "theirs", config, 2, dtype="float32")
    with pytest.raises(UserError, match="2 experts without names"):
        verify_hf(tmp_path / "theirs", merged)


def test_verification_refuses_left_over_weights(anchor, tmp_path):
    from safetensors.numpy import load_file, save_file

    export_hf(anchor, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.mlp.gate.weight": np.zeros((3, 32), np.float32)}, file, {"format": "pt"})
    with pytest.raises(UserError, match="unexpected keys"):
        verify_hf(tmp_path / "hf", anchor)
    tensors.pop("model.layers.1.self_attn.q_norm.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="missing keys"):
        verify_hf(tmp_path / "hf", anchor)


def test_transformers_count_the_same_parameters():
    from flexolmo_jax.model import ModelConfig

    config = ModelConfig(vocab_size=100352, width=4096, hidden=11008, layers=32, heads=32, kv_heads=32)
    settings = {"vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    with torch.device("meta"):
        mixture = transformers.FlexOlmoForCausalLM(transformers.FlexOlmoConfig(**settings, num_experts=7))
        dense = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**settings))
    theirs = sum(parameter.numel() for parameter in mixture.parameters())
    biases = 6 * 32  # Transformers' router has none.
    assert config.num_params(7) == theirs + biases
    assert round(config.num_params(7) / 1e9, 2) == 33.27
    # A dense model needs no router row, ours has one for the public expert.
    assert config.num_params() == sum(parameter.numel() for parameter in dense.parameters()) + 32 * 4096
    experts = sum(parameter.numel() for name, parameter in mixture.named_parameters() if ".experts." in name)
    for top_k in (1, 2, 7):
        assert config.num_active_params(top_k, 7) == theirs + biases - experts // 7 * (7 - top_k)

"""What an export writes, and what it refuses to write. None of this needs torch or transformers."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import export_hf, read_hf, verify_hf
from flexolmo_jax.hf.config import from_hf, to_hf
from flexolmo_jax.hf.names import dense_pieces, mixture_pieces
from flexolmo_jax.hf.tensors import cut_into_shards
from flexolmo_jax.model import ModelConfig, abstract_params
from flexolmo_jax.model.partition import flatten


def assert_same_params(found: dict, expected: dict) -> None:
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(leaf, expected[path], err_msg="/".join(path))


def test_names_and_shapes_on_disk(merged, anchor, tmp_path):
    export_hf(merged, tmp_path / "mixture")
    tensors = load_file(tmp_path / "mixture" / "model.safetensors")
    assert len(tensors) == 3 + 2 * (8 + 1 + 3 * 3)
    assert tensors["model.layers.1.mlp.experts.2.gate_proj.weight"].shape == (24, 32)
    assert tensors["model.layers.1.mlp.experts.2.down_proj.weight"].shape == (32, 24)
    assert tensors["model.layers.0.mlp.gate.weight"].shape == (3, 32)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)
    assert tensors["model.embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (272, 32)
    export_hf(anchor, tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert len(tensors) == 3 + 2 * (8 + 3)
    assert tensors["model.layers.0.mlp.up_proj.weight"].shape == (24, 32)


def test_configuration(merged, tmp_path):
    export = export_hf(merged, tmp_path / "hf", top_k=1)
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert content["architectures"] == ["FlexOlmoForCausalLM"] == [export.architecture]
    assert (content["num_experts"], content["num_experts_per_tok"], content["norm_topk_prob"]) == (3, 1, False)
    assert (content["eos_token_id"], content["pad_token_id"], content["dtype"]) == (1, 0, "float32")
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (1, 0)


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 2**30])
def test_what_was_exported_reads_back_bit_for_bit(shard_bytes, merged, config, names, random_params, tmp_path):
    export = export_hf(merged, tmp_path / "hf", max_shard_bytes=shard_bytes)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) == export.shards
    assert sum(tensor.nbytes for file in files for tensor in load_file(file).values()) == export.tensor_bytes
    if shard_bytes == 20_000:
        assert all(
            len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes
            for tensors in map(load_file, files)
        )
    model = read_hf(tmp_path / "hf")
    assert (model.config, model.names, model.top_k) == (config, names, 2)
    assert_same_params(model.params, random_params(config, names))


def test_bfloat16_stays_bfloat16(config, names, random_params, write_model, tmp_path):
    params = random_params(config, names)
    for group in ("anchor", "experts"):
        params[group] = {key: _to_bfloat16(value) for key, value in params[group].items()}
    source = write_model(tmp_path / "merged", config, params, names=names)
    export_hf(source, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_params(read_hf(tmp_path / "hf").params, params)


def _to_bfloat16(tree):
    return {k: _to_bfloat16(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.astype(jnp.bfloat16)


def test_an_export_of_a_pinned_anchor_reads_back_as_one(config, names, random_params, write_model, tmp_path):
    config = dataclasses.replace(config, bias_channel=True)
    params = random_params(config, names, bias=2.0)
    export_hf(write_model(tmp_path / "merged", config, params, names=names), tmp_path / "hf")
    model = read_hf(tmp_path / "hf")
    assert model.config == config
    for name in names[1:]:
        own, read = params["router"][name], model.params["router"][name]
        np.testing.assert_array_equal(read["row"][:, 0], own["row"][:, 0] + own["bias"])
        np.testing.assert_array_equal(read["row"][:, 1:], own["row"][:, 1:])
        assert not read["bias"].any()


def test_a_bias_without_a_channel_stops_the_export(config, names, random_params, write_model, tmp_path):
    params = random_params(config, names)
    params["router"]["code"]["bias"][1] = -1.5
    source = write_model(tmp_path / "merged", config, params, names=names)
    with pytest.raises(UserError, match=r"1\.5 \(expert 'code'\).*--drop-bias"):
        export_hf(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    assert export_hf(source, tmp_path / "hf", experts=["public", "math"]).dropped_bias == 0.0
    assert export_hf(source, tmp_path / "hf", drop_bias=True, overwrite=True).dropped_bias == 1.5
    params["router"]["code"]["bias"][1] = 0.0
    assert_same_params(read_hf(tmp_path / "hf").params, params)


def test_a_channel_in_use_stops_the_export(config, names, random_params, write_model, tmp_path):
    config = dataclasses.replace(config, bias_channel=True)
    params = random_params(config, names, bias=1.0)
    params["anchor"]["embed"][5, 0] = 0.9
    source = write_model(tmp_path / "merged", config, params, names=names)
    with pytest.raises(UserError, match="channel 0"):
        export_hf(source, tmp_path / "hf")


def test_refusals_leave_nothing_behind(merged, tmp_path):
    out = tmp_path / "hf"
    for options, message in (
        ({"experts": ["public", "poetry"]}, "no expert 'poetry'"),
        ({"experts": []}, "at least one expert"),
        ({"top_k": 4}, "top_k is 4, but the exported model has 3 experts"),
        ({"experts": ["public", "math"], "top_k": 3}, "top_k is 3"),
        ({"top_k": 0}, "top_k is 0"),
    ):
        with pytest.raises(UserError, match=message):
            export_hf(merged, out, **options)
    with pytest.raises(UserError, match="manifest"):
        export_hf(tmp_path / "nowhere", out)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_kept(merged, tmp_path):
    out = tmp_path / "hf"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_hf(merged, out)
    assert [file.name for file in out.iterdir()] == ["diary.txt"]
    export_hf(merged, out, overwrite=True)
    assert not (out / "diary.txt").exists()


def test_a_failing_disk_leaves_nothing_behind(merged, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexolmo_jax.hf.safetensors_file.write", full)
    with pytest.raises(UserError, match="No space left"):
        export_hf(merged, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["c/1", "zarr.json", "."])
def test_a_damaged_checkpoint_leaves_nothing_behind(part, merged, tmp_path):
    source = tmp_path / "merged"
    shutil.copytree(merged, source)
    (leaf,) = source.rglob("experts.code.up")
    shutil.move(leaf / part, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"cannot be read|is missing"):
        export_hf(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_export_needs_neither_torch_nor_transformers(merged, tmp_path):
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pathlib import Path; from flexolmo_jax.hf import export_hf, read_hf\n"
        f"export_hf(Path({str(merged)!r}), Path({str(tmp_path / 'hf')!r})); read_hf(Path({str(tmp_path / 'hf')!r}))"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, timeout=60)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_verification_names_the_missing_package(merged, tmp_path, monkeypatch):
    export_hf(merged, tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"flexolmo_jax\[hf\]"):
        verify_hf(tmp_path / "hf", merged)


@hypothesis.given(st.dictionaries(st.text(max_size=4), st.integers(1, 50), min_size=1), st.integers(1, 100))
def test_shards_hold_every_tensor_once_and_keep_the_limit(sizes, limit):
    shards = cut_into_shards(sizes, limit)
    assert [name for shard in shards for name in shard] == list(sizes)
    assert all(len(shard) == 1 or sum(sizes[name] for name in shard) <= limit for shard in shards)


@hypothesis.given(st.integers(1, 4), st.integers(2, 5))
@hypothesis.settings(max_examples=5, deadline=None)
def test_the_name_map_covers_every_leaf_once(layers, experts):
    config = ModelConfig(vocab_size=8, width=4, hidden=4, layers=layers, heads=2, kv_heads=1)
    names = ("public", *(f"owner{index}" for index in range(1, experts)))
    for pieces, present in (
        (list(mixture_pieces(layers, names)), names),
        (list(dense_pieces(layers, "public")), names[:1]),
    ):
        assert len({(piece.tensor, piece.rows) for piece in pieces}) == len(pieces)
        assert len({(piece.path, piece.layer) for piece in pieces}) == len(pieces)
        covered = {(piece.path, piece.layer) for piece in pieces}
        for path, leaf in flatten(abstract_params(config, present)).items():
            if path[-1] == "bias" or (path[0] == "router" and len(present) == 1):
                continue
            stacked = path[-1] not in ("embed", "head", "final_norm")
            expected = {(path, layer) for layer in range(leaf.shape[0])} if stacked else {(path, None)}
            assert expected <= covered


@hypothesis.given(
    heads=st.integers(1, 8),
    groups=st.integers(1, 4),
    half=st.integers(1, 8),
    theta=st.floats(1.0, 1e7),
    epsilon=st.floats(1e-9, 1e-3),
    normalize=st.booleans(),
    experts=st.integers(1, 9),
    data=st.data(),
)
def test_a_configuration_survives_the_round_trip(heads, groups, half, theta, epsilon, normalize, experts, data):
    config = ModelConfig(
        vocab_size=300,
        width=2 * half * heads * groups,
        hidden=7,
        layers=3,
        heads=heads * groups,
        kv_heads=heads,
        rope_theta=theta,
        norm_epsilon=epsilon,
        normalize_top_k=normalize and experts > 1,
    )
    names = ("public", *(f"owner{index}" for index in range(1, experts)))
    top_k = data.draw(st.integers(1, experts))
    architecture = "Olmo2ForCausalLM" if experts == 1 else "FlexOlmoForCausalLM"
    fields = {"max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 0}
    tied = data.draw(st.booleans())
    written = to_hf(config, names, top_k, architecture=architecture, dtype="float32", tied=tied, text_side=fields)
    content = json.loads(json.dumps(written))
    shape = from_hf(content, "config.json")
    assert (shape.config, shape.names, shape.tied) == (config, names, tied)
    assert shape.top_k == (1 if experts == 1 else top_k)

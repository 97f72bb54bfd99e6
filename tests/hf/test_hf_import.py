"""What reading a Hugging Face directory refuses, each in one sentence."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import export_hf, read_hf


@pytest.fixture
def directory(merged, tmp_path):
    export_hf(merged, tmp_path / "hf")
    return tmp_path / "hf"


def configure(directory, **changes):
    file = directory / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def retensor(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ...}, "describes nothing"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear'"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"hidden_size": ...}, "no field 'hidden_size'"),
        ({"rms_norm_eps": "tiny"}, "wrong type"),
        ({"num_attention_heads": 5}, "heads do not divide"),
        ({"num_experts_per_tok": 4}, "4 of 3 experts"),
        ({"num_experts": 4}, "4 experts"),
        ({"expert_names": ["public", "math"]}, "name one by one"),
        ({"expert_names": ["math", "public", "code"]}, "must be 'public'"),
        ({"intermediate_size": 25}, r"down_proj\.weight of shape \(32, 24\), where its config\.json says \(32, 25\)"),
        ({"num_hidden_layers": 3}, r"lacks the tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"holds the tensor model\.layers\.1"),
        ({"num_hidden_layers": 10**12}, "says 1000000000000 layers"),
        ({"num_experts": 10**12, "num_experts_per_tok": 1, "expert_names": ...}, "1000000000000 experts"),
        ({"expert_names": ["public", "../../math", "code"]}, "cannot name an expert"),
        ({"expert_names": ["public", "ｍａｔｈ", "code"]}, "cannot name an expert"),
        ({"architectures": "FlexOlmoForCausalLM"}, "describes nothing"),
        ({"rope_parameters": ["default"]}, "not an object"),
    ],
)
def test_configurations_that_are_refused(directory, changes, message):
    configure(directory, **changes)
    with pytest.raises(UserError, match=message):
        read_hf(directory)


def test_experts_get_names(directory):
    assert read_hf(directory).names == ("public", "math", "code")
    assert read_hf(directory, names=["public", "a", "b"]).names == ("public", "a", "b")
    configure(directory, expert_names=...)
    assert read_hf(directory).names == ("public", "expert-1", "expert-2")
    with pytest.raises(UserError, match="name one by one"):
        read_hf(directory, names=["public", "a"])


def test_older_names_of_fields(directory):
    expected = read_hf(directory).config
    configure(directory, rope_parameters=..., num_key_value_heads=2, expert_names=...)
    assert read_hf(directory).config == expected
    retensor(directory, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    assert read_hf(directory).config == expected


def test_tensors_that_are_refused(directory):
    saved = directory.with_name("saved")
    shutil.copytree(directory, saved)
    router = "model.layers.0.mlp.gate.weight"
    for change, message in (
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks the tensor model.norm.weight"),
        (lambda tensors: tensors.update({"extra": np.ones(1)}), "holds the tensor extra"),
        (lambda tensors: tensors.update({router: tensors[router][:2].copy()}), r"shape \(2, 32\)"),
        (lambda tensors: tensors.update({router: tensors[router].astype(np.float16)}), "one dtype in all layers"),
        (lambda tensors: tensors.update({router: tensors[router].astype(np.int32)}), "as I32"),
        (lambda tensors: tensors[router].__setitem__((1, 3), np.nan), "not finite in model.layers.0.mlp.gate.weight"),
        (lambda tensors: tensors.update({router: np.ones((3, 33), np.float32)}), "shape"),
    ):
        shutil.copy(saved / "model.safetensors", directory)
        retensor(directory, change)
        with pytest.raises(UserError, match=message):
            read_hf(directory)


def test_files_that_are_refused(directory, merged, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_hf(tmp_path)
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_hf(directory)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pickle, pytorch_model\.bin, which runs code"):
        read_hf(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="neither"):
        read_hf(directory)
    for file in ("../elsewhere.safetensors", "/etc/passwd", "absent.safetensors", 3):
        index = {"weight_map": {"model.norm.weight": file}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="names the file"):
            read_hf(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        read_hf(directory)

"""What an import writes: the same model, cut into an anchor and contributions that a merge puts together again."""

import dataclasses
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import export_hf, import_hf, read_hf
from flexolmo_jax.hf.shards import open_shards
from flexolmo_jax.merge import merge
from flexolmo_jax.model import ModelConfig
from flexolmo_jax.model.partition import flatten, select
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.manifest import read
from tests.hf.test_hf_export import assert_same_params

SHAPES = {
    "dense": ("public",),
    "2xN": ("public", "math"),
    "7xN": ("public", "a", "b", "c", "d", "e", "f"),
}


def foreign(directory, config: ModelConfig, experts: int, *, dtype, tied=False, seed=0, changes=None) -> dict:
    """Writes a model as another program would, in two files, without our name map; returns its tensors."""
    random = np.random.default_rng(seed)
    kv = config.width // config.heads * config.kv_heads
    shapes = {"model.embed_tokens.weight": (config.vocab_size, config.width), "model.norm.weight": (config.width,)}
    if not tied:
        shapes["lm_head.weight"] = (config.vocab_size, config.width)
    for layer in range(config.layers):
        block = f"model.layers.{layer}."
        for name, height in (("q_proj", config.width), ("k_proj", kv), ("v_proj", kv), ("o_proj", config.width)):
            shapes[f"{block}self_attn.{name}.weight"] = (height, config.width)
        shapes |= {f"{block}self_attn.q_norm.weight": (config.width,), f"{block}self_attn.k_norm.weight": (kv,)}
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            shapes[f"{block}{norm}.weight"] = (config.width,)
        networks = [f"{block}mlp."] if experts == 1 else [f"{block}mlp.experts.{e}." for e in range(experts)]
        for network in networks:
            shapes |= {f"{network}{name}_proj.weight": (config.hidden, config.width) for name in ("gate", "up")}
            shapes[f"{network}down_proj.weight"] = (config.width, config.hidden)
        if experts > 1:
            shapes[f"{block}mlp.gate.weight"] = (experts, config.width)
    tensors = {name: random.normal(0, 0.5, shape).astype(dtype) for name, shape in shapes.items()}
    tensors |= changes or {}
    directory.mkdir()
    weight_map = {}
    for number, names in enumerate(_two(tensors)):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    content = {
        "architectures": ["Olmo2ForCausalLM" if experts == 1 else "FlexOlmoForCausalLM"],
        "model_type": "olmo2" if experts == 1 else "flex_olmo",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 5,
        "pad_token_id": 6,
    }
    if experts > 1:
        content |= {"num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": False}
    (directory / "config.json").write_text(json.dumps(content))
    return tensors


def _two(tensors):
    names = sorted(tensors)
    return names[: len(names) // 2], names[len(names) // 2 :]


def tensors_of(directory) -> dict:
    shards = open_shards(directory)
    return {name: shards.read(name, None) for name in shards.names}


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].tobytes() == np.ascontiguousarray(tensor).tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("kind", SHAPES)
def test_round_trips_are_bit_exact(kind, kv_heads, tied, dtype, config, tmp_path):
    names, config = SHAPES[kind], dataclasses.replace(config, kv_heads=kv_heads)
    tensors = foreign(tmp_path / "theirs", config, len(names), dtype=dtype, tied=tied)
    done = import_hf(tmp_path / "theirs", tmp_path / "ours", names=names)
    home = done.merged or done.anchor
    export = export_hf(home, tmp_path / "back", max_shard_bytes=20_000)
    assert export.shards > 1
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors)
    theirs, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert theirs | back == back | {key: theirs[key] for key in theirs.keys() & back.keys()}


def test_parts_of_an_import_merge_into_the_same_model(config, tmp_path):
    names = SHAPES["7xN"][:4]
    foreign(tmp_path / "theirs", config, 4, dtype=np.float32)
    done = import_hf(tmp_path / "theirs", tmp_path / "ours", names=names, owner="somebody", licence="CC0-1.0")
    manifest = merge(done.anchor, list(done.contributions.values()), tmp_path / "merged", top_k=2)
    imported, params = checkpoint.load(done.merged, "merged")
    assert imported == manifest
    assert arrays.digests(params) == manifest.arrays
    assert_same_params(params, checkpoint.load(tmp_path / "merged")[1])
    assert_same_params(params, read_hf(tmp_path / "theirs", names=names).params)
    assert [record.owner for record in manifest.experts] == ["", *["somebody"] * 3]
    assert {record.licence for record in manifest.experts[1:]} == {"CC0-1.0"}
    # Two directories, one copy of the bytes.
    chunk = "arrays/state/experts.a.gate/c/0/0/0"
    assert os.stat(done.merged / chunk).st_ino == os.stat(done.contributions["a"] / chunk).st_ino
    # A contribution holds nothing but its expert.
    assert {path.name for path in done.contributions["a"].iterdir()} == {"arrays", "manifest.json"}


def test_two_expert_models_of_one_anchor_give_contributions_that_merge(config, tmp_path):
    math = foreign(tmp_path / "math", config, 2, dtype=np.float32, seed=1)
    other = {
        name: np.random.default_rng(2).normal(size=tensor.shape).astype(np.float32)
        for name, tensor in math.items()
        if ".experts.1." in name
    }
    rows = {name: np.stack([tensor[0], tensor[1] * 2]) for name, tensor in math.items() if "mlp.gate." in name}
    code = foreign(tmp_path / "code", config, 2, dtype=np.float32, seed=1, changes=other | rows)
    first = import_hf(tmp_path / "math", tmp_path / "one", names=["public", "math"])
    second = import_hf(tmp_path / "code", tmp_path / "two", names=["public", "code"], anchor=first.anchor)
    assert (second.anchor, second.proven, second.fingerprint) == (None, True, first.fingerprint)
    merge(first.anchor, [first.contributions["math"], second.contributions["code"]], tmp_path / "merged")
    export_hf(tmp_path / "merged", tmp_path / "back", tokenizer=None)
    back = tensors_of(tmp_path / "back")
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}.mlp."
        for matrix in ("gate", "up", "down"):
            found = [back[f"{prefix}experts.{e}.{matrix}_proj.weight"] for e in range(3)]
            expected = [math[f"{prefix}experts.{e}.{matrix}_proj.weight"] for e in range(2)]
            expected.append(code[f"{prefix}experts.1.{matrix}_proj.weight"])
            np.testing.assert_array_equal(found, expected)
        gates = math[f"{prefix}gate.weight"], code[f"{prefix}gate.weight"]
        np.testing.assert_array_equal(back[f"{prefix}gate.weight"], [*gates[0], gates[1][1]])


def test_a_shared_half_that_differs_is_refused_by_name_and_size(config, tmp_path):
    tensors = foreign(tmp_path / "math", config, 2, dtype=np.float32)
    first = import_hf(tmp_path / "math", tmp_path / "one", names=["public", "math"])
    for name in ("model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.gate.weight", "lm_head.weight"):
        changed = tensors[name].copy()
        changed[0, 3] += 0.25
        changed[0, 4] -= 0.125
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        foreign(tmp_path / "other", config, 2, dtype=np.float32, changes={name: changed})
        with pytest.raises(UserError, match=rf"{name} differs in 2 of [\d,]+ values, by up to 0\.25") as caught:
            import_hf(tmp_path / "other", tmp_path / "two", anchor=first.anchor)
        assert str(first.anchor) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["math", "one", "other"]
    small = dataclasses.replace(config, hidden=16)
    foreign(tmp_path / "small", small, 2, dtype=np.float32)
    with pytest.raises(UserError, match="has hidden 16, but the anchor has 24"):
        import_hf(tmp_path / "small", tmp_path / "two", anchor=first.anchor)


def test_a_dense_anchor_is_completed_by_the_public_row_of_a_mixture(config, tmp_path):
    mixture = foreign(tmp_path / "math", config, 2, dtype=jnp.bfloat16)
    dense = {
        name.replace("experts.0.", ""): tensor
        for name, tensor in mixture.items()
        if ".experts.1." not in name and "mlp.gate.w" not in name
    }
    foreign(tmp_path / "dense", config, 1, dtype=jnp.bfloat16, changes=dense)
    bare = import_hf(tmp_path / "dense", tmp_path / "one").anchor
    done = import_hf(tmp_path / "math", tmp_path / "two", names=["public", "math"], anchor=bare)
    assert done.proven
    alone = import_hf(tmp_path / "math", tmp_path / "three", names=["public", "math"])
    # The completed anchor is the one that the mixture has in itself.
    assert done.fingerprint == alone.fingerprint != read(bare).anchor
    assert read(done.merged).arrays == read(alone.merged).arrays
    _, params = checkpoint.load(done.anchor, "anchor")
    assert arrays.digests(params) == read(done.anchor).arrays
    with pytest.raises(UserError, match="is a dense model"):
        import_hf(tmp_path / "dense", tmp_path / "four", anchor=bare)


def test_biases_of_an_export_with_custom_code_come_back(config, names, random_params, write_model, tmp_path):
    params = random_params(config, names, bias=1.0)
    source = write_model(tmp_path / "merged", config, params, names=names)
    export_hf(source, tmp_path / "hf", custom_code=True)
    done = import_hf(tmp_path / "hf", tmp_path / "ours")
    assert_same_params(checkpoint.load(done.merged)[1], params)


def test_bytes_and_their_tokenizer_come_back(merged, tmp_path):
    export_hf(merged, tmp_path / "hf")
    done = import_hf(tmp_path / "hf", tmp_path / "ours")
    assert read(done.merged).tokenizer == "bytes"
    export_hf(done.merged, tmp_path / "again")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


def test_the_plan_of_an_import_is_followed_to_the_end(config, tmp_path, monkeypatch):
    """An import that stops after any leaf goes on where it was, and ends with the same directory."""
    foreign(tmp_path / "theirs", config, 2, dtype=np.float32)
    import_hf(tmp_path / "theirs", tmp_path / "whole")
    from flexolmo_jax.hf.importing import _Foreign

    written, put = [], _Foreign.put

    def interrupted(leaf, *arguments):
        digest = put(leaf, *arguments)
        written.append(leaf)
        if len(written) % 5 == 0:
            raise KeyboardInterrupt
        return digest

    monkeypatch.setattr(_Foreign, "put", interrupted)
    for _ in range(10):
        try:
            import_hf(tmp_path / "theirs", tmp_path / "ours")
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "ours").exists()
    leaves = len(flatten(read_hf(tmp_path / "theirs").params))
    assert leaves < len(written) <= leaves + 5
    for part in ("anchor", "contributions/expert-1", "merged"):
        assert (tmp_path / "ours" / part / "manifest.json").read_bytes() == (
            tmp_path / "whole" / part / "manifest.json"
        ).read_bytes()
        manifest, params = checkpoint.load(tmp_path / "ours" / part)
        assert arrays.digests(params) == manifest.arrays
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_links_that_leave_the_directory_are_refused(config, tmp_path):
    foreign(tmp_path / "theirs", config, 2, dtype=np.float32)
    secret = tmp_path / "secret.safetensors"
    shutil.move(tmp_path / "theirs" / "model-0.safetensors", secret)
    (tmp_path / "theirs" / "model-0.safetensors").symlink_to(secret)
    with pytest.raises(UserError, match="a link that leaves its directory"):
        import_hf(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "theirs" / "model-0.safetensors").unlink()
    os.mkfifo(tmp_path / "theirs" / "model-0.safetensors")
    with pytest.raises(UserError, match="does not hold"):
        import_hf(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_is_read_is_never_replaced(config, tmp_path):
    foreign(tmp_path / "theirs", config, 2, dtype=np.float32)
    done = import_hf(tmp_path / "theirs", tmp_path / "ours")
    for out, anchor in ((tmp_path / "theirs", None), (tmp_path, None), (tmp_path / "ours", done.anchor)):
        with pytest.raises(UserError, match="which is to be read"):
            import_hf(tmp_path / "theirs", out, anchor=anchor, overwrite=True)
    assert read_hf(tmp_path / "theirs").names == ("public", "expert-1")
    assert read(done.anchor).kind == "anchor"


def test_a_snapshot_of_the_cache_is_read_through_its_links(config, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    foreign(tmp_path / "theirs", config, 1, dtype=np.float32)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "theirs").iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    done = import_hf(snapshot, tmp_path / "ours")
    assert read(done.anchor).kind == "anchor"


@pytest.mark.parametrize("dropless", [False, True], ids=["default", "dropless"])
def test_olmo_core_mixtures(dropless, config, names, random_params, tmp_path):
    """Independent of our map: the tensors are laid out as OLMo-core's modules declare them."""
    params = random_params(config, names, bias=1.0)
    tensors = olmo_core_shared(params, config)
    for layer in range(config.layers):
        moe = f"blocks.{layer}.feed_forward_moe."
        experts = [
            {matrix: params["experts"][name][matrix][layer] for matrix in ("gate", "up", "down")} for name in names
        ]
        for tensor, matrix in (("w1", "gate"), ("w3", "up")):
            parts = [expert[matrix].T if dropless else expert[matrix] for expert in experts]
            tensors[f"{moe}experts.mlp.{tensor}"] = np.ascontiguousarray(np.concatenate(parts))
        tensors[f"{moe}experts.mlp.w2"] = np.concatenate([expert["down"] for expert in experts])
        tensors[f"{moe}router.weight"] = np.concatenate([params["router"][name]["row"][layer] for name in names])
        biases = [[params["router"][name]["bias"][layer]] for name in names[1:]]
        tensors[f"{moe}router.expert_bias"] = np.array(biases, np.float32)
        tensors[f"{moe}router.batch_size_per_expert"] = np.zeros(3, np.int64)
    moe = {"name": "dropless" if dropless else "default", "num_experts": 3, "hidden_size": config.hidden}
    moe["router"] = {"name": "with_expert_bias", "top_k": 2}
    write_olmo_core(tmp_path / "core", config, tensors, {"feed_forward_moe": moe, "name": "moe_reordered_norm"})
    model = read_hf(tmp_path / "core", names=names)
    assert (model.config, model.top_k) == (config, 2)
    assert_same_params(model.params, params)
    done = import_hf(tmp_path / "core", tmp_path / "ours", names=names)
    assert_same_params(checkpoint.load(done.merged)[1], params)
    assert read(done.merged).tokenizer == "unknown"


def test_olmo_core_dense_models_in_a_folder_of_files(config, random_params, tmp_path):
    params = random_params(config, ["public"])
    tensors = olmo_core_shared(params, config)
    for layer in range(config.layers):
        for tensor, matrix in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            leaf = params["experts"]["public"][matrix][layer]
            tensors[f"blocks.{layer}.feed_forward.{tensor}.weight"] = np.ascontiguousarray(leaf.T)
    block = {"feed_forward": {"hidden_size": config.hidden}, "name": "reordered_norm"}
    write_olmo_core(tmp_path / "core", config, tensors, block)
    (tmp_path / "core" / "model.safetensors").unlink()
    (tmp_path / "core" / "model").mkdir()
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / "core" / "model" / f"model-{name.replace('.', '-')}.safetensors")
    found = read_hf(tmp_path / "core").params
    shared = select(params, lambda path: path[0] != "router")
    assert_same_params(select(found, lambda path: path[0] != "router"), shared)
    save_file({"extra": np.ones(1, np.float32)}, tmp_path / "core" / "model" / "x.safetensors")
    with pytest.raises(UserError, match="holds the tensor extra"):
        read_hf(tmp_path / "core")
    shutil.rmtree(tmp_path / "core" / "model")
    (tmp_path / "core" / "model.pt").write_bytes(b"\x80\x02}.")
    with pytest.raises(UserError, match=r"pickle, model\.pt, which runs code"):
        read_hf(tmp_path / "core")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "default"}, "blocks of kind 'default'"),
        ({"attention": {"n_heads": 4, "n_kv_heads": 2}}, "no qk_norm"),
        ({"attention": {"n_heads": 4, "qk_norm": {}, "sliding_window": {"pattern": [1]}}}, "no qk_norm|slides"),
        ({"layer_norm": {}}, "no field 'eps'"),
        ({"feed_forward": 3}, "wrong type"),
    ],
)
def test_olmo_core_configurations_that_are_refused(changes, message, config, tmp_path):
    block = {"feed_forward": {"hidden_size": config.hidden}, "name": "reordered_norm"} | changes
    write_olmo_core(tmp_path / "core", config, {"a": np.ones(1, np.float32)}, block)
    with pytest.raises(UserError, match=message):
        read_hf(tmp_path / "core")


def olmo_core_shared(params: dict, config: ModelConfig) -> dict:
    anchor = params["anchor"]
    tensors = {
        "embeddings.weight": anchor["embed"],
        "lm_head.norm.weight": anchor["final_norm"],
        "lm_head.w_out.weight": np.ascontiguousarray(anchor["head"].T),
    }
    for layer in range(config.layers):
        block = f"blocks.{layer}."
        for tensor, leaf in (("w_q", "q"), ("w_k", "k"), ("w_v", "v"), ("w_out", "o")):
            tensors[f"{block}attention.{tensor}.weight"] = np.ascontiguousarray(anchor["attention"][leaf][layer].T)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{block}attention.{norm}.weight"] = anchor["attention"][norm][layer].copy()
        tensors[f"{block}attention_norm.weight"] = anchor["attention_norm"][layer].copy()
        tensors[f"{block}feed_forward_norm.weight"] = anchor["ffn_norm"][layer].copy()
    return tensors


def write_olmo_core(directory, config: ModelConfig, tensors: dict, block: dict) -> None:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    attention = {"n_heads": config.heads, "n_kv_heads": config.kv_heads, "qk_norm": {"name": "rms"}}
    attention["rope"] = {"name": "default", "theta": 500_000}
    block = {"attention": attention, "layer_norm": {"name": "rms", "eps": config.norm_epsilon}} | block
    model = {"d_model": config.width, "vocab_size": config.vocab_size, "n_layers": config.layers, "block": block}
    (directory / "config.json").write_text(json.dumps({"model": model, "train_module": {}}))

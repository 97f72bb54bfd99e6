"""Owners' OLMo-core checkpoints, imported and merged, are what the official script's rule makes of the checkpoints."""

import numpy as np
import pytest

from flexolmo_jax.hf import export_hf, import_hf
from flexolmo_jax.merge import merge
from flexolmo_jax.model.partition import flatten
from flexolmo_jax.store import checkpoint
from flexolmo_jax.store.manifest import read
from tests.hf.test_hf_import_artefacts import assert_same_tensors, olmo_core_shared, tensors_of, write_olmo_core

OWNERS = ("math", "code", "law")
MATRICES = {"w1": "gate", "w2": "down", "w3": "up"}


@pytest.fixture
def owners(config, random_params, tmp_path):
    """Every owner's two-expert model: one frozen half, and its own expert. Returns their tensors by name."""
    params = random_params(config, ("public", *OWNERS), bias=1.0)
    found = {}
    for owner in OWNERS:
        tensors = olmo_core_shared(params, config)
        for layer in range(config.layers):
            moe = f"blocks.{layer}.feed_forward_moe."
            for tensor, matrix in MATRICES.items():
                pair = [params["experts"][name][matrix][layer] for name in ("public", owner)]
                tensors[f"{moe}experts.mlp.{tensor}"] = np.concatenate(pair)
            rows = [params["router"][name]["row"][layer] for name in ("public", owner)]
            tensors[f"{moe}router.weight"] = np.concatenate(rows)
            tensors[f"{moe}router.expert_bias"] = params["router"][owner]["bias"][layer].reshape(1, 1)
        write_olmo_core(tmp_path / owner, config, tensors, block_of(config, 2))
        found[owner] = tensors
    return found


def block_of(config, experts):
    moe = {"name": "default", "num_experts": experts, "hidden_size": config.hidden, "router": {"top_k": 2}}
    return {"feed_forward_moe": moe, "name": "moe_reordered_norm"}


def official_merge(owners):
    """The first model's tensors; of experts and rows, the second halves of all models below; what is shared is equal.

    The bias is not among them: the official script leaves it behind.
    """
    first, *others = owners.values()
    merged = {}
    for name, tensor in first.items():
        if name.endswith(("mlp.w1", "mlp.w2", "mlp.w3", "router.weight")):
            half = len(tensor) // 2
            merged[name] = np.concatenate([tensor, *(other[name][half:] for other in others)])
        elif not name.endswith("expert_bias"):
            assert all(np.array_equal(tensor, other[name]) for other in others)
            merged[name] = tensor
    return merged


def test_a_merge_is_the_official_one_bit_for_bit_and_keeps_the_bias(owners, config, tmp_path):
    anchor, contributions = None, []
    for owner in OWNERS:
        done = import_hf(tmp_path / owner, tmp_path / f"ours_{owner}", names=["public", owner], anchor=anchor)
        anchor = anchor or done.anchor
        contributions.append(done.contributions[owner])
    merge(anchor, contributions, tmp_path / "merged", top_k=2)

    write_olmo_core(tmp_path / "official", config, official_merge(owners), block_of(config, 4))
    official = import_hf(tmp_path / "official", tmp_path / "theirs", names=["public", *OWNERS]).merged

    ours, theirs = read(tmp_path / "merged").arrays, read(official).arrays
    assert ours.keys() == theirs.keys()
    assert {path for path in ours if ours[path] != theirs[path]} == {f"router/{name}/bias" for name in OWNERS}
    found = flatten(checkpoint.load(tmp_path / "merged")[1])
    for owner, tensors in owners.items():
        layers = range(config.layers)
        biases = [tensors[f"blocks.{layer}.feed_forward_moe.router.expert_bias"].item() for layer in layers]
        assert found["router", owner, "bias"].tolist() == biases
    export_hf(tmp_path / "merged", tmp_path / "a", drop_bias=True)
    export_hf(official, tmp_path / "b")
    assert_same_tensors(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))

"""Small random models: every leaf is random, so that a leaf that is lost, swapped or transposed shows in the logits."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.model import ModelConfig, abstract_params
from flexolmo_jax.model.bias_channel import PINNED
from flexolmo_jax.model.partition import flatten, unflatten
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.manifest import ExpertRecord, Manifest

CONFIG = ModelConfig(vocab_size=272, width=32, hidden=24, layers=2, heads=4, kv_heads=2)
NAMES = ("public", "math", "code")


def _random_params(config: ModelConfig, names: Sequence[str], *, seed: int = 0, bias: float = 0.0) -> dict:
    """Random parameters; a bias is uniform between `-bias` and 0, and channel 0 is reserved if the config says so."""
    random = np.random.default_rng(seed)

    def leaf(path, shape):
        if path[-1] == "bias":
            return random.uniform(-bias, 0.0, shape)
        if path[-1].endswith("norm"):
            return 1.0 + 0.3 * random.standard_normal(shape)
        spread = 1.0 if path[-1] in ("embed", "row") else shape[-2] ** -0.5
        return spread * random.standard_normal(shape)

    flat = {
        path: leaf(path, found.shape).astype(np.float32)
        for path, found in flatten(abstract_params(config, names)).items()
    }
    if config.bias_channel:
        for path, value in PINNED.items():
            flat[path][..., 0] = value
    return unflatten(flat)


def _write_model(directory: Path, config: ModelConfig, params: dict, *, top_k: int = 2, **changes) -> Path:
    """Writes parameters as an anchor, or as a merged model if they have several experts, and returns the directory."""
    names = changes.pop("names", tuple(params["router"]))
    described = arrays.digests(params)
    manifest = Manifest(
        kind="anchor" if len(names) == 1 else "merged",
        model=config,
        experts=tuple(ExpertRecord(name=name) for name in names),
        anchor=checkpoint.anchor_fingerprint(described),
        arrays=described,
        top_k=min(top_k, len(names)),
    )
    checkpoint.write(directory, params, dataclasses.replace(manifest, **changes))
    return directory


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture(scope="session")
def names() -> tuple[str, ...]:
    return NAMES


@pytest.fixture(scope="session")
def random_params() -> Callable[..., dict]:
    return _random_params


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    return _write_model


@pytest.fixture(scope="session")
def merged(tmp_path_factory) -> Path:
    """A merged model of three experts without router biases, read by many tests and changed by none."""
    return _write_model(tmp_path_factory.mktemp("hf") / "merged", CONFIG, _random_params(CONFIG, NAMES), names=NAMES)


@pytest.fixture(scope="session")
def anchor(tmp_path_factory) -> Path:
    params = _random_params(CONFIG, NAMES[:1], seed=1)
    return _write_model(tmp_path_factory.mktemp("hf") / "anchor", CONFIG, params)

"""A small anchor, corpora and jobs that the tests of several rooms share."""

import json
from pathlib import Path

import jax
import numpy as np

from flexolmo_jax.model import PUBLIC, ModelConfig, abstract_params
from flexolmo_jax.model.bias_channel import pin
from flexolmo_jax.model.partition import belongs_to_expert, select
from flexolmo_jax.store import arrays, checkpoint, contribution
from flexolmo_jax.store.manifest import ExpertRecord, Manifest, read

CONFIG = ModelConfig(vocab_size=264, width=16, hidden=24, layers=2, heads=2, kv_heads=2, bias_channel=True)


def random_params(*names: str, seed: int = 0) -> dict:
    """Parameters on a pinned anchor in which nothing is at its neutral value."""
    rng = np.random.default_rng(seed)
    shapes = abstract_params(CONFIG, (PUBLIC, *names))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return jax.tree.map(np.asarray, pin(jax.tree.map(jax.numpy.asarray, params)))


def write_anchor(directory: Path, seed: int = 0) -> Manifest:
    """Writes an anchor of random parameters."""
    params = random_params(seed=seed)
    described = arrays.digests(params)
    manifest = Manifest(
        kind="anchor",
        model=CONFIG,
        experts=(ExpertRecord(name=PUBLIC),),
        anchor=checkpoint.anchor_fingerprint(described),
        arrays=described,
        top_k=1,
    )
    checkpoint.write(directory, params, manifest)
    return manifest


def write_contribution(directory: Path, anchor: Path, name: str, seed: int = 1, change=lambda params: None) -> dict:
    """Writes a contribution of random parameters for this anchor, `change`d in place, and returns them."""
    params = select(random_params(name, seed=seed), lambda path: belongs_to_expert(path, name))
    params = jax.tree.map(np.array, params)
    change(params)
    record = ExpertRecord(name=name, owner=f"owner of {name}", tokens_seen=10, licence="CC0-1.0")
    contribution.write(directory, params, read(anchor), record, top_k=2, gin="")
    return params


def write_corpus(directory: Path, texts: list[str]) -> Path:
    """Writes the same texts as train, validation and test splits."""
    directory.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return directory

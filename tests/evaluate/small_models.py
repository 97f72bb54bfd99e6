"""Tiny models whose experts differ, and small corpora. Rows and batches have one shape, so that little is compiled."""

import json

import jax
import numpy as np

from flexolmo_jax.data.tokens import Documents
from flexolmo_jax.data.vocabulary import EOS_ID, encode
from flexolmo_jax.model import ModelConfig, abstract_params

NAMES = ("public", "math", "code")
CONFIG = ModelConfig(vocab_size=264, width=16, hidden=24, layers=2, heads=2, kv_heads=1)
ROW, BATCH = 32, 4
TEXTS = (
    "a",
    "one small text",
    "two\nlines of it",
    "naïve 中文",
    "x" * 50,
    "the quick brown fox jumps over the lazy dog",
)


def fresh_params(names=NAMES, seed=0):
    """Random parameters, large enough that every expert matters and the router tells tokens apart."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), abstract_params(CONFIG, names)
    )


def documents(*texts: str) -> Documents:
    tokens = [np.array([*encode(text), EOS_ID], np.uint16) for text in texts]
    offsets = np.cumsum([0, *map(len, tokens)])
    return Documents(np.concatenate(tokens) if tokens else np.zeros(0, np.uint16), offsets)


def write_corpus(directory, *texts: str):
    """A corpus whose three splits hold the same texts."""
    directory.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (directory / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory

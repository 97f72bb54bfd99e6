"""From documents to vectors: one row per document, whatever encodes it.

Axis legend: `N` documents, `K` vectors of a document (one for each layer of an anchor, else one), `E` their width,
`L` layers, `S` positions, `D` width of the anchor.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flexolmo_jax.data.vocabularies import SavedVocabulary
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import PUBLIC, builder
from flexolmo_jax.model.transformer import Build
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.store import checkpoint, companions

Encode = Callable[[Sequence[str]], Float[np.ndarray, "N K E"]]
"""Vectors of documents: but for rounding, those of one depend on its text alone, not on what it is encoded with."""

AT_ONCE = 8
_SHORTEST = 32


def anchor_encoder(anchor: Path, tokens: int, mesh: MeshConfig) -> Encode:
    """Mean router input of every layer over the first `tokens` tokens of a document: `K` is `L`, `E` is `D`.

    Raises:
      UserError: there is no anchor, or the mesh does not fit the devices or the anchor.
    """
    layout = mesh.build()
    manifest, params = checkpoint.load(anchor, "anchor")
    build, params = builder(manifest.model, (PUBLIC,)), layout.place(params)
    vocabulary = SavedVocabulary(manifest.tokenizer, anchor / companions.DIRECTORY).open()

    def encode(texts: Sequence[str]) -> np.ndarray:
        documents = [ids[:tokens] for ids in vocabulary.encode(texts)]
        vectors = np.empty((len(documents), manifest.model.layers, manifest.model.width), np.float32)
        for rows, ids, lengths in _batches(documents, vocabulary.pad_id):
            vectors[rows] = np.asarray(_mean_router_inputs(build, params, ids, lengths))[: len(rows)]
        return vectors

    return encode


def text_encoder(directory: Path) -> Encode:
    """Any sentence-transformers model, or any Hugging Face encoder, whose last hidden states are then averaged.

    Nothing is downloaded, and no code that comes with the model is run.

    Raises:
      UserError: the directory holds no such model, or sentence-transformers is not installed.
    """
    if not any((directory / name).is_file() for name in ("modules.json", "config.json")):
        raise UserError(f"{directory} is not an encoder: it has neither a modules.json nor a config.json")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            "an encoder needs sentence-transformers, which is not installed: pip install 'flexolmo_jax[encoder]'"
        ) from error
    try:
        model = SentenceTransformer(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a foreign directory makes transformers raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot load the encoder {directory}: {reason}") from error

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.asarray(model.encode(list(texts), show_progress_bar=False), np.float32)[:, None]

    return encode


def _batches(documents: list[np.ndarray], pad_id: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Documents' numbers, ids [B, S] and lengths [B], always `AT_ONCE` rows; `S` depends on each row's length alone."""
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(documents):
        by_length.setdefault(max(_SHORTEST, 1 << (len(ids) - 1).bit_length()), []).append(number)
    for length, numbers in by_length.items():
        for start in range(0, len(numbers), AT_ONCE):
            rows = numbers[start : start + AT_ONCE]
            padded = np.full((AT_ONCE, length), pad_id, np.int32)
            lengths = np.ones(AT_ONCE, np.int32)
            for row, number in enumerate(rows):
                lengths[row] = len(documents[number])
                padded[row, : lengths[row]] = documents[number]
            yield rows, padded, lengths


@functools.partial(jax.jit, static_argnums=0)
def _mean_router_inputs(
    build: Build, params: dict, ids: Int[Array, "B S"], lengths: Int[Array, "B"]
) -> Float[Array, "B L D"]:
    """What lies beyond a document's end is not seen, because attention is causal, and not counted."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    inputs = build(params).trace(ids, positions, jnp.zeros_like(ids)).router_inputs.astype(jnp.float32)
    counted = (positions < lengths[:, None]).astype(jnp.float32)
    return jnp.einsum("lbsd,bs->bld", inputs, counted / lengths[:, None])

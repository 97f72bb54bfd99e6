"""The stage `flexolmo embed-domain`: a vector that says where an owner's text lies, for its router row to begin at.

It is a mean over documents, of what the anchor's routers see or of what an encoder makes of them, or a vector that
somebody has computed already.

Axis legend: `N` documents, `K` vectors (one for each layer of the anchor, or one), `D` width of the anchor.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from flexolmo_jax import terminal
from flexolmo_jax.domain.encoders import Encode, anchor_encoder, text_encoder
from flexolmo_jax.domain.private_mean import PrivateMean
from flexolmo_jax.domain.sampling import sample_of
from flexolmo_jax.domain.vectors import cosine, project, read_vector
from flexolmo_jax.errors import UserError
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.store import manifest
from flexolmo_jax.store.directories import complete_directory, refuse_existing


class Embedding(NamedTuple):
    """Where the owner's text lies, and public text, and what is promised about the first."""

    own: Float[np.ndarray, "K D"]
    public: Float[np.ndarray, "K D"]
    privacy: dict[str, float | str] | str


def embed_domain(
    *,
    anchor: Path,
    out: Path,
    mesh: MeshConfig,
    text: Path | None = None,
    public_text: Path | None = None,
    encoder: Path | None = None,
    vector: Path | None = None,
    public_vector: Path | None = None,
    documents: int = 1000,
    tokens: int = 512,
    projection_seed: int = 0,
    privacy: PrivateMean | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes `out/embedding.npy`, and public text's embedding beside it: float32 [D], or [L, D] of the anchor's own.

    Args:
      anchor: directory of the anchor. It gives the width and, unless there is an `encoder` or a `vector`, the vectors:
        its mean router inputs in every layer.
      out: directory to write: `embedding.npy`, `public_embedding.npy`, and `embedding.json` with what is reported.
      mesh: how the devices are arranged that the anchor lies on.
      text: the owner's corpus; documents of its training split are read.
      public_text: public corpus, likewise.
      encoder: directory of a sentence-transformers model or a Hugging Face encoder.
      vector: in place of `text`, a `.npy` file of a vector that embeds the owner's text already.
      public_vector: the same of public text.
      documents: at most so many documents of each corpus are read.
      tokens: at most so many tokens of a document are read by the anchor; an encoder has its own limit.
      projection_seed: of the orthogonal map to the anchor's width from any other.
      privacy: makes the owner's mean differentially private; None does not.
      overwrite: whether an existing `out` is replaced.

    Returns:
      What to report: `embedding` and `public_embedding`, where they are; their `shape`; `source`, which is "anchor",
      "encoder" or "vector"; `cosine_to_public`, one for each layer or one; `privacy`, what is promised, or "none".

    Raises:
      UserError: a setting, a file, a corpus, the anchor or the encoder cannot be used; nothing is left behind.
    """
    for name, value in (("documents", documents), ("tokens", tokens)):
        if value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")
    if privacy is not None:
        privacy.check(documents)
    refuse_existing(out, overwrite=overwrite)
    width = manifest.read(anchor, "anchor").model.width
    given = {"--text": text, "--public_text": public_text, "--vector": vector, "--public_vector": public_vector}
    if vector is not None and public_vector is not None and text is None and public_text is None:
        if encoder is not None or privacy is not None:
            raise UserError("a vector that is given leaves nothing to encode or to make private: give text instead")
        source, embedding = "vector", _from_files(vector, public_vector, width, projection_seed)
    elif text is not None and public_text is not None and vector is None and public_vector is None:
        source = "anchor" if encoder is None else "encoder"
        encode = anchor_encoder(anchor, tokens, mesh) if encoder is None else text_encoder(encoder)
        by = {"by": encoder or anchor, "text": text, "public text": public_text}
        terminal.banner("embed-domain", by | {"width": width, "out": out})
        own_texts, public_texts = sample_of(text, documents), sample_of(public_text, documents)
        if privacy is not None and len(own_texts) < documents:
            terminal.say(
                f"{text} has fewer than {documents:,} documents, which draws its private mean towards the public one: "
                "a smaller number of --documents does not, if it is not chosen by looking at the text"
            )
        embedding = _from_texts(encode, own_texts, public_texts, width, projection_seed, privacy, documents)
    else:
        found = ", ".join(name for name, value in given.items() if value is not None) or "neither"
        raise UserError(f"give --text and --public_text, or --vector and --public_vector, but not {found}")
    return _write(embedding, source, out, overwrite=overwrite)


def _from_files(vector: Path, public_vector: Path, width: int, seed: int) -> Embedding:
    own, public = read_vector(vector), read_vector(public_vector)
    if own.shape != public.shape:
        raise UserError(
            f"{vector} holds {len(own):,} numbers, but {public_vector} {len(public):,}: they do not compare"
        )
    own, public = project(np.stack([own, public]), width, seed)
    return Embedding(own[None], public[None], "none")


def _from_texts(
    encode: Encode,
    own_texts: Sequence[str],
    public_texts: Sequence[str],
    width: int,
    seed: int,
    privacy: PrivateMean | None,
    documents: int,
) -> Embedding:
    own, public = encode(own_texts), encode(public_texts)
    if not (np.all(np.isfinite(own)) and np.all(np.isfinite(public))):
        raise UserError("the encoder gives values that are not finite")
    if own.shape[-1] > width:  # before noise is added, because noise is the louder the wider the space it fills
        own, public = np.split(project(np.concatenate([own, public]), width, seed), [len(own)])
    mean: np.ndarray = own.mean(axis=0)
    promised: dict[str, float | str] | str = "none"
    if privacy is not None:
        mean, promised = privacy.mean(own, public, documents)
        terminal.banner("private mean", promised)
    mean, public_mean = project(np.stack([mean, public.mean(axis=0)]), width, seed)
    return Embedding(mean, public_mean, promised)


def _write(embedding: Embedding, source: str, out: Path, *, overwrite: bool) -> dict[str, Any]:
    one = len(embedding.own) == 1
    facts = {
        "source": source,
        "shape": embedding.own.shape[one:],
        "cosine_to_public": [round(float(each), 6) for each in cosine(embedding.own, embedding.public)],
        "privacy": embedding.privacy,
    }
    files = {"embedding": "embedding.npy", "public_embedding": "public_embedding.npy"}
    with complete_directory(out, overwrite=overwrite) as partial:
        for file, vectors in zip(files.values(), (embedding.own, embedding.public), strict=True):
            np.save(partial / file, vectors[0] if one else vectors)
        (partial / "embedding.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return {name: out / file for name, file in files.items()} | facts

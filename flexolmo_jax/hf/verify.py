"""The proof that an export is the model it was made from: both programs' logits on the same tokens."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf.config import MIXTURE_WITH_BIAS
from flexolmo_jax.hf.export import MODELING, modeling_code
from flexolmo_jax.hf.source import read_hf_config
from flexolmo_jax.infer import load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far two models' predictions of the next token lie apart.

    Attributes:
      max_difference: largest absolute difference of two logits.
      kl: mean Kullback-Leibler divergence from ours to theirs, in nats per token.
      argmax_agreement: share of tokens after which both predict the same token.
      tokens: number of tokens compared.
    """

    max_difference: float
    kl: float
    argmax_agreement: float
    tokens: int


def verify_hf(hf_directory: Path, against_checkpoint: Path, tokens: Int[np.ndarray, "B S"] | None = None) -> Comparison:
    """Compares what transformers makes of a Hugging Face directory with our model, both in float32.

    Args:
      hf_directory: an export; our model is asked for the experts and the top-k that its `config.json` states.
      against_checkpoint: the anchor or merged model it shall equal.
      tokens: ids of documents of equal length; None takes 4 rows of 64 ids at random, always the same.

    Raises:
      UserError: transformers is not installed, a directory is not what it should be, or weights are missing or
        left over.
    """
    shape = read_hf_config(hf_directory)
    theirs = load_transformers(hf_directory)
    ours = load(against_checkpoint)
    if ours.config.vocab_size != shape.config.vocab_size:
        raise UserError(
            f"{hf_directory} has {shape.config.vocab_size} vocabulary entries, but {against_checkpoint} has "
            f"{ours.config.vocab_size}"
        )
    if shape.names is None and shape.experts != len(ours.names):
        raise UserError(
            f"{hf_directory} has {shape.experts} experts without names, but {against_checkpoint} has {len(ours.names)}"
        )
    if tokens is None:
        tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (4, 64))
    # Row by row, because two float64 copies of the logits of a large vocabulary add up.
    rows = []
    for row in np.asarray(tokens)[:, None]:
        logits = np.asarray(ours(jnp.asarray(row), experts=shape.names, top_k=shape.top_k))
        rows.append(compare(logits[0], transformers_logits(theirs, row)[0]))
    return Comparison(
        max_difference=max(row.max_difference for row in rows),
        kl=float(np.mean([row.kl for row in rows])),
        argmax_agreement=float(np.mean([row.argmax_agreement for row in rows])),
        tokens=sum(row.tokens for row in rows),
    )


def compare(ours: Float[np.ndarray, "S V"], theirs: Float[np.ndarray, "S V"]) -> Comparison:
    """Compares two sets of logits of the same tokens."""
    a, b = _log_softmax(ours), _log_softmax(theirs)
    return Comparison(
        max_difference=float(np.max(np.abs(ours - theirs))),
        kl=float(np.mean(np.sum(np.exp(a) * (a - b), axis=-1))),
        argmax_agreement=float(np.mean(np.argmax(ours, axis=-1) == np.argmax(theirs, axis=-1))),
        tokens=len(ours),
    )


def load_transformers(directory: Path) -> Any:
    """The transformers model in a local directory, in float32 and in evaluation mode.

    Raises:
      UserError: transformers or torch is not installed, or the files lack a weight or hold one too many.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(
            f"comparing with transformers needs {error.name}: install it with pip install 'flexolmo_jax[hf]'"
        ) from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=_brings_our_code(directory),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load {directory}: {str(error).splitlines()[0]}") from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(
                f"transformers finds {kind.replace('_', ' ')} in {directory}: {sorted(map(str, info[kind]))[0]}"
            )
    return model.eval()


def _brings_our_code(directory: Path) -> bool:
    """Whether the model needs the class that our export writes. No other code of a directory is ever run.

    Raises:
      UserError: it needs that class, but the file is not the one that this version writes.
    """
    if read_hf_config(directory).architecture != MIXTURE_WITH_BIAS:
        return False
    file = directory / f"{MODELING}.py"
    if not file.is_file() or file.read_text(encoding="utf-8", errors="replace") != modeling_code():
        raise UserError(f"{file} is not the code that this version of flexolmo_jax exports, so it is not run")
    return True


def transformers_logits(model: Any, tokens: Int[np.ndarray, "B S"]) -> Float[np.ndarray, "B S V"]:
    """Float32 logits of a transformers model for whole documents."""
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(tokens, dtype=torch.long)).logits.float().numpy()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))

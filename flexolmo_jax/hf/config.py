"""The two configurations of one model: our `ModelConfig` and Hugging Face's `config.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.model import ModelConfig

DENSE = "Olmo2ForCausalLM"
MIXTURE = "FlexOlmoForCausalLM"
MIXTURE_WITH_BIAS = "FlexOlmoBiasForCausalLM"
"""The class in `modeling_flex_olmo_bias.txt`, which an export with custom code brings along."""

MODEL_TYPES = {DENSE: "olmo2", MIXTURE: "flex_olmo", MIXTURE_WITH_BIAS: "flex_olmo_bias"}

EXPERT_NAMES = "expert_names"
"""Our own key in `config.json`: the experts' names in order. Transformers keeps it and makes no use of it."""

MAX_POSITIONS = 4096
"""`max_position_embeddings` of a model that was trained here. Rotary positions need no table, so it is advice to
serving programs alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfShape:
    """What a `config.json` says about a model.

    Attributes:
      architecture: `DENSE`, `MIXTURE` or `MIXTURE_WITH_BIAS`.
      config: shape of the model; it never claims a bias channel.
      experts: number of experts.
      names: their names in order, if the file has them.
      top_k: experts per token; 1 for a dense model.
      tied: whether the head is the embedding.
    """

    architecture: str
    config: ModelConfig
    experts: int
    names: tuple[str, ...] | None
    top_k: int
    tied: bool


def to_hf(
    config: ModelConfig,
    names: Sequence[str],
    top_k: int,
    *,
    architecture: str,
    dtype: str,
    tied: bool,
    text_side: Mapping[str, Any],
) -> dict[str, Any]:
    """The contents of `config.json`.

    Args:
      config: shape of the model.
      names: names of its experts, in order.
      top_k: experts per token.
      architecture: the class that shall load it; see `HfShape`.
      dtype: what to load it in.
      tied: whether the head is the embedding.
      text_side: `max_position_embeddings` and the ids of special tokens.
    """
    content = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        # Transformers 5 reads the first of these two, its predecessor and vLLM's older releases the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "dtype": dtype,
        EXPERT_NAMES: list(names),
        **text_side,
    }
    if architecture != DENSE:
        content |= {
            "num_experts": len(names),
            "num_experts_per_tok": top_k,
            "norm_topk_prob": config.normalize_top_k,
        }
    return content


def from_hf(content: Mapping[str, Any], source: str) -> HfShape:
    """What our model must look like to be the one that `config.json` describes.

    Args:
      content: the parsed file.
      source: how to call the file in errors.

    Raises:
      UserError: a field is missing or malformed, or asks for something that this package's blocks do not do.
    """
    listed = content.get("architectures")
    architecture = str(listed[0]) if isinstance(listed, list) and listed else "nothing"
    if architecture not in MODEL_TYPES:
        raise UserError(f"{source} describes {architecture}, but only {DENSE} and {MIXTURE} can be read")
    _refuse_variants(content, source)
    try:
        heads = content["num_attention_heads"]
        config = ModelConfig(
            vocab_size=content["vocab_size"],
            width=content["hidden_size"],
            hidden=content["intermediate_size"],
            layers=content["num_hidden_layers"],
            heads=heads,
            kv_heads=content.get("num_key_value_heads") or heads,
            rope_theta=float(_rope(content).get("rope_theta") or content["rope_theta"]),
            norm_epsilon=float(content["rms_norm_eps"]),
            normalize_top_k=bool(content.get("norm_topk_prob", False)),
        )
        experts, top_k = 1, 1
        if architecture != DENSE:
            experts, top_k = int(content["num_experts"]), int(content["num_experts_per_tok"])
    except KeyError as error:
        raise UserError(f"{source} has no field {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{source} holds a field of the wrong type: {error}") from error
    if not 1 <= top_k <= experts:
        raise UserError(f"{source} sends each token to {top_k} of {experts} experts")
    if content.get("head_dim") not in (None, config.head_width):
        raise UserError(f"{source} has head_dim {content['head_dim']}, but hidden_size / heads is {config.head_width}")
    names = content.get(EXPERT_NAMES)
    if names is not None and (not isinstance(names, list) or len(set(map(str, names))) != experts):
        raise UserError(f"{source} has {experts} experts, which {EXPERT_NAMES} {names} does not name one by one")
    return HfShape(
        architecture=architecture,
        config=config,
        experts=experts,
        names=None if names is None else tuple(map(str, names)),
        top_k=top_k,
        tied=bool(content.get("tie_word_embeddings", False)),
    )


def _rope(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters of the rotary positions, under whichever name this version of the file has them."""
    return content.get("rope_parameters") or content.get("rope_scaling") or {}


def _refuse_variants(content: Mapping[str, Any], source: str) -> None:
    rope = _rope(content)
    if not isinstance(rope, Mapping):
        raise UserError(f"{source} holds rotary parameters that are not an object, but {rope!r}")
    found = {
        "hidden_act": (content.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(content.get("attention_bias", False)), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for field, (value, supported) in found.items():
        if value != supported:
            raise UserError(f"{source} has {field} {value!r}, but only {supported!r} can be read")

"""Checkpoints of OLMo-core, as its `unshard_checkpoint(…, use_safetensors=True)` writes them: only ever read.

Beside the safetensors, in one file or a folder of them, lies the experiment's `config.json`. The other output of that
function, `model.pt`, is a pickle, which runs code when it is opened, and is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf.config import DENSE, MIXTURE, HfShape
from flexolmo_jax.hf.names import Piece
from flexolmo_jax.model import ModelConfig
from flexolmo_jax.model.partition import LeafPath

_BLOCKS = {"reordered_norm": DENSE, "moe_reordered_norm": MIXTURE}

_ATTENTION: dict[str, LeafPath] = {"w_q": ("q",), "w_k": ("k",), "w_v": ("v",), "w_out": ("o",)}
_NORMS: dict[str, LeafPath] = {
    "attention.q_norm.weight": ("attention", "q_norm"),
    "attention.k_norm.weight": ("attention", "k_norm"),
    "attention_norm.weight": ("attention_norm",),
    "feed_forward_norm.weight": ("ffn_norm",),
}
_FEED_FORWARD = {"w1": "gate", "w2": "down", "w3": "up"}

BIAS = "feed_forward_moe.router.expert_bias"
"""FlexOlmo's own router has it, [E - 1, 1], for every expert but the public one; OLMo-core's has not."""


def is_experiment(content: Mapping[str, Any]) -> bool:
    """Whether this is the `config.json` of an OLMo-core experiment, not of a Hugging Face model."""
    return isinstance(content.get("model"), Mapping) and "architectures" not in content


def from_experiment(content: Mapping[str, Any], source: str) -> HfShape:
    """What our model must look like to be the one that an experiment's `config.json` describes.

    Raises:
      UserError: a field is missing or malformed, or asks for something that this package's blocks do not do.
    """
    model = content["model"]
    try:
        block = model["block"]
        if block.get("name") not in _BLOCKS:
            raise UserError(
                f"{source} has blocks of kind {block.get('name')!r}, but only {sorted(_BLOCKS)} can be read"
            )
        if model.get("block_overrides"):
            raise UserError(f"{source} has block_overrides, but only models whose blocks are all alike can be read")
        attention, norm = block["attention"], block["layer_norm"]
        if not attention.get("qk_norm"):
            raise UserError(f"{source} has no qk_norm, which every OLMo 2 block has")
        if (attention.get("rope") or {}).get("scaling") or attention.get("sliding_window"):
            raise UserError(f"{source} scales its rotary positions or slides its window, which cannot be read")
        architecture = _BLOCKS[block["name"]]
        moe = block["feed_forward_moe"] if architecture == MIXTURE else None
        router = (moe.get("router") or {}) if moe else {}
        if router.get("gating_function", "softmax") != "softmax":
            raise UserError(f"{source} has gating_function {router['gating_function']!r}, not 'softmax'")
        if moe and moe.get("shared_mlp"):
            raise UserError(f"{source} has a shared_mlp, which a FlexOlmo model has not")
        if (normalize := router.get("normalize_expert_weights")) not in (None, 1, 1.0):
            raise UserError(f"{source} has normalize_expert_weights {normalize!r}, but only 1.0 or none can be read")
        heads = attention["n_heads"]
        config = ModelConfig(
            vocab_size=model["vocab_size"],
            width=model["d_model"],
            hidden=(moe or block["feed_forward"])["hidden_size"],
            layers=model["n_layers"],
            heads=heads,
            kv_heads=attention.get("n_kv_heads") or heads,
            rope_theta=float((attention.get("rope") or {}).get("theta", 500_000)),
            norm_epsilon=float(norm["eps"]),
            normalize_top_k=normalize is not None,
        )
        experts = int(moe["num_experts"]) if moe else 1
        top_k = int(router.get("top_k", 1))
    except KeyError as error:
        raise UserError(f"{source} has no field {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{source} holds a field of the wrong type: {error}") from error
    if not 1 <= top_k <= experts:
        raise UserError(f"{source} sends each token to {top_k} of {experts} experts")
    return HfShape(architecture=architecture, config=config, experts=experts, names=None, top_k=top_k, tied=False)


def pieces(config: ModelConfig, experts: Sequence[str], *, dropless: bool, biases: bool) -> Iterator[Piece]:
    """Every tensor of a model with these experts; a dense one has one expert.

    Args:
      config: shape of the model.
      experts: names of the experts.
      dropless: whether the experts are of OLMo-core's dropless kind, whose gate and up are stored as [out, in].
      biases: whether the routers have FlexOlmo's bias.
    """
    yield Piece("embeddings.weight", ("anchor", "embed"))
    for layer in range(config.layers):
        prefix = f"blocks.{layer}."
        for tensor, path in _ATTENTION.items():
            yield Piece(f"{prefix}attention.{tensor}.weight", ("anchor", "attention", *path), layer, transposed=True)
        for tensor, path in _NORMS.items():
            yield Piece(prefix + tensor, ("anchor", *path), layer)
        if len(experts) == 1:
            for tensor, leaf in _FEED_FORWARD.items():
                path = ("experts", experts[0], leaf)
                yield Piece(f"{prefix}feed_forward.{tensor}.weight", path, layer, transposed=True)
        else:
            yield from _mixture(f"{prefix}feed_forward_moe.", layer, config, experts, dropless=dropless)
            for row, name in enumerate(experts[1:] if biases else ()):
                yield Piece(prefix + BIAS, ("router", name, "bias"), layer, rows=(row, row + 1))
    yield Piece("lm_head.norm.weight", ("anchor", "final_norm"))
    yield Piece("lm_head.w_out.weight", ("anchor", "head"), transposed=True)


def _mixture(
    prefix: str, layer: int, config: ModelConfig, experts: Sequence[str], *, dropless: bool
) -> Iterator[Piece]:
    """One tensor holds all experts, one below the other, and the router's rows lie end to end in a vector."""
    for number, name in enumerate(experts):
        router = number * config.width, (number + 1) * config.width
        yield Piece(f"{prefix}router.weight", ("router", name, "row"), layer, rows=router)
        for tensor, leaf in _FEED_FORWARD.items():
            transposed = dropless and leaf != "down"
            height = config.hidden if transposed or leaf == "down" else config.width
            rows = number * height, (number + 1) * height
            yield Piece(
                f"{prefix}experts.mlp.{tensor}", ("experts", name, leaf), layer, rows=rows, transposed=transposed
            )

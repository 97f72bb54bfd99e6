"""The name map between the paths of our schema and the tensor names that Hugging Face models have on disk.

Our leaves are stacked over layers and hold matrices as [in, out]; Hugging Face has one tensor per layer and matrix, as
[out, in], and the router's rows of all experts as one tensor [E, D]. A `Piece` says which part of which tensor is which
part of which leaf, so that export and import walk the same list in opposite directions. OLMo-core's names, which are
only read, are in `olmo_core.py`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flexolmo_jax.model.partition import LeafPath

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Piece(NamedTuple):
    """One part of a tensor that is one part of a leaf.

    Attributes:
      tensor: name of the tensor in a safetensors file.
      path: the leaf in our schema.
      layer: index along the leaf's first axis, or None for the whole leaf.
      rows: first and last but one index along the tensor's first axis, or None for the whole tensor.
      transposed: whether the two sides hold the same matrix transposed.
    """

    tensor: str
    path: LeafPath
    layer: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False


_ATTENTION: dict[str, LeafPath] = {
    "self_attn.q_proj.weight": ("attention", "q"),
    "self_attn.k_proj.weight": ("attention", "k"),
    "self_attn.v_proj.weight": ("attention", "v"),
    "self_attn.o_proj.weight": ("attention", "o"),
}
_NORMS: dict[str, LeafPath] = {
    "self_attn.q_norm.weight": ("attention", "q_norm"),
    "self_attn.k_norm.weight": ("attention", "k_norm"),
    "post_attention_layernorm.weight": ("attention_norm",),
    "post_feedforward_layernorm.weight": ("ffn_norm",),
}
_FEED_FORWARD = {"gate_proj.weight": "gate", "up_proj.weight": "up", "down_proj.weight": "down"}


def dense_pieces(layers: int, expert: str) -> Iterator[Piece]:
    """Every tensor of an `Olmo2ForCausalLM` whose feed-forward networks are this expert's."""
    yield Piece(EMBED, ("anchor", "embed"))
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield from _attention(prefix, layer)
        yield from _feed_forward(f"{prefix}mlp.", expert, layer)
    yield from _top()


def mixture_pieces(layers: int, experts: Sequence[str], *, biases: bool = False) -> Iterator[Piece]:
    """Every tensor of a `FlexOlmoForCausalLM` with these experts, in this order.

    The rows of one router tensor follow each other. Router biases have a tensor only in the model class that an export
    with custom code brings along, and a place for the public expert's too.
    """
    yield Piece(EMBED, ("anchor", "embed"))
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield from _attention(prefix, layer)
        for row, name in enumerate(experts):
            yield Piece(f"{prefix}mlp.gate.weight", ("router", name, "row"), layer, rows=(row, row + 1))
        for row, name in enumerate(experts if biases else ()):
            yield Piece(f"{prefix}mlp.gate.bias", ("router", name, "bias"), layer, rows=(row, row + 1))
        for row, name in enumerate(experts):
            yield from _feed_forward(f"{prefix}mlp.experts.{row}.", name, layer)
    yield from _top()


def _attention(prefix: str, layer: int) -> Iterator[Piece]:
    for tensor, path in _ATTENTION.items():
        yield Piece(prefix + tensor, ("anchor", *path), layer, transposed=True)
    for tensor, path in _NORMS.items():
        yield Piece(prefix + tensor, ("anchor", *path), layer)


def _feed_forward(prefix: str, expert: str, layer: int) -> Iterator[Piece]:
    for tensor, leaf in _FEED_FORWARD.items():
        yield Piece(prefix + tensor, ("experts", expert, leaf), layer, transposed=True)


def _top() -> Iterator[Piece]:
    yield Piece("model.norm.weight", ("anchor", "final_norm"))
    yield Piece(HEAD, ("anchor", "head"), transposed=True)

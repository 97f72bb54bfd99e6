"""The shape of a model: what must agree between an anchor and every contribution made for it."""

import dataclasses

from flexolmo_jax.errors import UserError

PUBLIC = "public"
"""Name of the expert that belongs to the anchor. It comes first in every model and its router row has no bias."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of an OLMo 2 block stack with named experts.

    Attributes:
      vocab_size: rows of the embedding, padding rows included.
      width: size of the residual stream (D).
      hidden: hidden size of each expert's feed-forward network (F).
      layers: number of blocks (L).
      heads: query heads; `width` is a multiple of it.
      kv_heads: key and value heads; divides `heads`.
      rope_theta: base of the rotary frequencies.
      norm_epsilon: added to the mean square in RMSNorm.
      normalize_top_k: whether the weights of the chosen experts are rescaled to sum to one.
      bias_channel: whether residual channel 0 is reserved to be exactly 1 in every layer, so that a router bias can be
        folded into a router row on export.
    """

    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    rope_theta: float = 500_000.0
    norm_epsilon: float = 1e-6
    normalize_top_k: bool = False
    bias_channel: bool = False

    def __post_init__(self):
        for field in ("vocab_size", "width", "hidden", "layers", "heads", "kv_heads"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"ModelConfig.{field} must be a positive integer, but it is {value!r}")
        if self.width % self.heads:
            raise UserError(f"ModelConfig.width is {self.width}, which {self.heads} heads do not divide evenly")
        if self.head_width % 2:
            raise UserError(f"ModelConfig.width / heads is {self.head_width}, but rotary positions need an even number")
        if self.heads % self.kv_heads:
            raise UserError(f"ModelConfig.heads is {self.heads}, which {self.kv_heads} kv_heads do not divide evenly")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    def num_params(self, experts: int = 1) -> int:
        """Exact number of parameters of a model with so many experts, public one, router rows and biases included."""
        return self._shared_params() + experts * self._expert_params() + (experts - 1) * self.layers

    def num_active_params(self, top_k: int, experts: int) -> int:
        """Parameters that one token's forward pass uses: everything but the experts it was not sent to."""
        return self.num_params(experts) - (experts - min(top_k, experts)) * self.layers * self._ffn_params()

    def _ffn_params(self) -> int:
        return 3 * self.width * self.hidden

    def _expert_params(self) -> int:
        return self.layers * (self._ffn_params() + self.width)

    def _shared_params(self) -> int:
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_width + self.width + self.kv_width
        return 2 * self.vocab_size * self.width + self.layers * (attention + 2 * self.width) + self.width

"""What becomes of the router biases of a model in an export: Hugging Face's FlexOlmo router has none."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf.fold_bias import BiasFold, fold_on_text
from flexolmo_jax.model import bias_channel
from flexolmo_jax.model.partition import LeafPath, unflatten
from flexolmo_jax.store.manifest import Manifest
from flexolmo_jax.store.stored import StoredLeaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handled:
    """What was done about the biases.

    Attributes:
      kept: whether the export has them as such, in a model class of its own.
      dropped: largest size of a bias that was left out.
      folded: what folding them by regression left and did.
    """

    kept: bool = False
    dropped: float = 0.0
    folded: BiasFold | None = None


def handle_biases(
    leaves: dict[LeafPath, StoredLeaf | np.ndarray],
    manifest: Manifest,
    names: Sequence[str],
    directory: Path,
    *,
    fold: Path | None,
    drop: bool,
    custom_code: bool,
    top_k: int,
    encode: Callable[[str], list[int]],
) -> Handled:
    """Puts rows and biases that can be exported in place of the leaves on disk.

    Args:
      leaves: opened leaves; the router's are replaced by arrays where they must change.
      manifest: of the model.
      names: the experts to export.
      directory: of the model.
      fold: public text to fold the biases on.
      drop: whether to leave the biases out.
      custom_code: whether to keep the biases, for a model class that has them.
      top_k: experts per token of the export.
      encode: from a text to its ids.

    Raises:
      UserError: a bias would be lost and nothing was said about it, or too much was said.
    """
    wishes = {"--fold-bias": fold is not None, "--drop-bias": drop, "--custom-code": custom_code}
    if sum(wishes.values()) > 1:
        raise UserError(f"give one of {', '.join(flag for flag, given in wishes.items() if given)}, not several")
    biases = {
        name: np.minimum(np.asarray(read_leaf(leaves["router", name, "bias"]), np.float32), 0.0)
        for name in names
        if ("router", name, "bias") in leaves
    }
    largest, expert = max(((-float(bias.min()), name) for name, bias in biases.items()), default=(0.0, ""))
    if largest == 0.0:
        return Handled()
    if manifest.model.bias_channel:
        _fold_into_channel(leaves, biases, directory)
        return Handled()
    if custom_code:
        zero = np.zeros(manifest.model.layers, np.float32)
        leaves |= {("router", name, "bias"): biases.get(name, zero) for name in names}
        return Handled(kept=True)
    if fold is not None:
        folded, rows = fold_on_text(directory, fold, biases, names, top_k, encode)
        leaves |= {("router", name, "row"): row for name, row in rows.items()}
        return Handled(folded=folded)
    if drop:
        return Handled(dropped=largest)
    raise UserError(
        f"{directory} has a router bias of size up to {largest:.4g} (expert {expert!r}), which Hugging Face's router "
        "lacks and this anchor has no bias channel to fold into: give --fold-bias PUBLIC_TEXT to fold it "
        "approximately, --custom-code to bring a model class that has it, or --drop-bias to leave it out"
    )


def _fold_into_channel(
    leaves: dict[LeafPath, StoredLeaf | np.ndarray], biases: Mapping[str, np.ndarray], directory: Path
) -> None:
    # A bias folded into a channel that is not exactly 1 would silently export another model.
    channel: dict[LeafPath, Any] = {
        path: read_leaf(leaf)[..., :1] for path, leaf in leaves.items() if path in bias_channel.PINNED
    }
    if not bias_channel.is_pinned(unflatten(channel)):
        raise UserError(f"{directory} says that it reserves a bias channel, but channel 0 of its anchor is in use")
    for name, bias in biases.items():
        # In float32, as the router adds it: a row in bfloat16 would round the bias.
        row = jnp.asarray(read_leaf(leaves["router", name, "row"]), jnp.float32)
        leaves["router", name, "row"] = np.asarray(bias_channel.fold(row, jnp.asarray(bias)))


def read_leaf(leaf: StoredLeaf | np.ndarray) -> np.ndarray:
    """A whole leaf, checked against its digest if it is on disk."""
    return leaf.read() if isinstance(leaf, StoredLeaf) else leaf

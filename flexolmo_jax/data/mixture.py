"""Mixtures: prepared texts that are read at rates of their own."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grain

from flexolmo_jax.data.files import replacing
from flexolmo_jax.data.packing import Rows, TextRows
from flexolmo_jax.data.tokens import FORMAT_VERSION, MANIFEST, TokenSource, open_split, read_manifest
from flexolmo_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Prepared texts and how much of each is read.

    Attributes:
      rates: by the directory of a prepared text, how much of it is read; only their proportions matter.
    """

    rates: Mapping[str, float]

    def __post_init__(self):
        for part, rate in self.rates.items():
            if not (math.isfinite(rate) and rate >= 0):
                raise UserError(f"the rate of {part} is {rate}, but a rate is a number of at least 0")
        if not sum(self.rates.values()) > 0:
            raise UserError("the rates of the mixture sum to zero: give at least one part a rate above 0")

    @property
    def shares(self) -> dict[str, float]:
        """The rates of the parts that are read at all, so that they sum to one."""
        whole = sum(self.rates.values())
        return {part: rate / whole for part, rate in self.rates.items() if rate > 0}

    def write(self, out: Path, *, overwrite: bool = False) -> None:
        """Writes the mixture as a prepared text of its own, which names its parts relative to itself.

        Raises:
          UserError: a part is no prepared text, their tokenizers differ, or `out` holds something else.
        """
        within = {Path(part).name for part in self.shares if Path(part).parent == out} | {MANIFEST}
        if out.exists() and (out.is_file() or {entry.name for entry in out.iterdir()} - within):
            raise UserError(f"{out} exists already and is no mixture: give another --out")
        if (out / MANIFEST).exists() and not overwrite:
            raise UserError(f"{out} holds another mixture: give another --out, or --overwrite to replace it")
        manifests = {part: read_manifest(Path(part)) for part in self.shares}
        (first, one), *others = manifests.items()
        for part, other in others:
            if other["vocabulary"] != one["vocabulary"]:
                raise UserError(f"{part} and {first} were prepared with different tokenizers, so they cannot be mixed")
        parts = [{"path": os.path.relpath(part, out), "rate": share} for part, share in self.shares.items()]
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": "mixture",
            "name": out.name,
            "vocabulary": one["vocabulary"],
            "parts": parts,
        }
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / MANIFEST) as partial:
            partial.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


class MixedRows:
    """Rows of several sources, mixed at their rates: an endless pattern, of which one element follows the next.

    Its length is that of as much of the pattern as it takes to have seen every part once.

    Attributes:
      parts: the sources and their rates, which sum to one.
    """

    def __init__(self, parts: Sequence[tuple[TextRows, float]]):
        self.parts = tuple((rows, rate) for rows, rate in parts if rate > 0)
        self._length = max(math.ceil(len(rows) / rate) for rows, rate in self.parts)
        endless = [grain.MapDataset.source(rows).repeat() for rows, _ in self.parts]
        self._mixed = grain.MapDataset.mix(endless, weights=[rate for _, rate in self.parts])

    @property
    def padding(self) -> float:
        """Share of the rows' tokens that is padding."""
        return sum(rate * rows.padding for rows, rate in self.parts)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Rows:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._mixed[index]


def open_rows(prepared: Path, split: str, pack: Callable[[TokenSource], TextRows]) -> TextRows:
    """The rows of a split of a prepared text or a mixture.

    Args:
      prepared: what `prepare` returned.
      split: name of the split.
      pack: puts the documents of one text into rows.

    Raises:
      UserError: there is no prepared text, or a part of a mixture is missing or empty.
    """
    manifest = read_manifest(prepared)
    if manifest["kind"] == "prepared":
        return pack(open_split(prepared, split))
    parts = []
    for part in manifest["parts"]:
        directory = Path(os.path.normpath(prepared / part["path"]))
        if len(rows := open_rows(directory, split, pack)) == 0:
            raise UserError(f"{directory}, a part of the mixture {prepared}, has no rows in its {split} split")
        parts.append((rows, part["rate"]))
    return MixedRows(parts)

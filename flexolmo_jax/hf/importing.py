"""Reading models of other programs: in memory, or streamed into an anchor, contributions and a merged model."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import companions
from flexolmo_jax.hf.shards import FOLDER
from flexolmo_jax.hf.source import Source, open_source
from flexolmo_jax.hf.tensors import megabytes
from flexolmo_jax.model import PUBLIC, ModelConfig
from flexolmo_jax.model.partition import LeafPath, belongs_to_anchor, belongs_to_expert, unflatten
from flexolmo_jax.store import assembly, checkpoint, contribution
from flexolmo_jax.store.directories import refuse_existing
from flexolmo_jax.store.layout import LeafLayout, is_stacked
from flexolmo_jax.store.manifest import ExpertRecord, Manifest, read
from flexolmo_jax.store.resumable import Parts, refuse_losing, resumable_directory
from flexolmo_jax.store.stored import PIECE_BYTES, StoredLeaf, stored_leaves
from flexolmo_jax.terminal import Progress

PUBLIC_ROW: LeafPath = ("router", PUBLIC, "row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfModel:
    """A model that was read from a Hugging Face directory.

    Attributes:
      config: shape of the model; it has a bias channel if the weights have one.
      names: its experts, in order, `public` first.
      top_k: its experts per token.
      params: nested dict of NumPy arrays under the paths of the schema, in the dtypes of the files.
    """

    config: ModelConfig
    names: tuple[str, ...]
    top_k: int
    params: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """What an import wrote.

    Attributes:
      anchor: directory of the anchor; None if the given one serves.
      contributions: directory of each contribution, by the name of its expert.
      merged: directory of the merged model; None for a dense model.
      fingerprint: of the anchor.
      proven: whether the shared half was compared with a given anchor, value by value.
      array_bytes: size of all arrays.
    """

    anchor: Path | None
    contributions: dict[str, Path]
    merged: Path | None
    fingerprint: str
    proven: bool
    array_bytes: int


def read_hf(directory: Path, *, names: Sequence[str] | None = None) -> HfModel:
    """Reads a model into memory. See `open_source` for what it can be, its arguments and its errors."""
    source = open_source(directory, names)
    leaves = {}
    for path in source.leaves:
        parts = [part for _, part in source.parts(path)]
        leaves[path] = np.stack(parts) if is_stacked(path) else parts[0]
    return HfModel(config=source.config, names=source.names, top_k=source.top_k, params=unflatten(leaves))


def import_hf(
    directory: str | Path,
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    anchor: str | Path | None = None,
    owner: str = "",
    licence: str = "",
    overwrite: bool = False,
) -> Import:
    """Streams a model of another program into our schema, one layer of one matrix in memory at a time.

    A dense model becomes `out/anchor`. A mixture becomes `out/anchor`, one `out/contributions/NAME` for every further
    expert, and `out/merged`, whose files are links to theirs where the file system can link.

    With `anchor`, the mixture's shared half is first compared with that anchor, and the contributions are made for it.
    An anchor that came from a dense model has a public router row of zeros; it is completed by the mixture's row, and
    `out/anchor` is then the completed one.

    Args:
      directory: an `Olmo2ForCausalLM`, a `FlexOlmoForCausalLM` or an OLMo-core checkpoint, on this machine.
      out: directory to write; it appears complete or not at all, and a killed import goes on where it stopped.
      names: names for the experts in order, `public` first; None takes those that our export noted, else `public`,
        `expert-1`, …
      anchor: an anchor of ours that the shared half must equal.
      owner: whom the contributions name as their owner.
      licence: under which the contributions are given.
      overwrite: whether an existing `out` is replaced.

    Raises:
      UserError: the model cannot be read, differs from `anchor`, or `out` exists or cannot be written.
    """
    directory, out = Path(directory), Path(out)
    given = None if anchor is None else Path(anchor)
    refuse_existing(out, overwrite=overwrite)
    refuse_losing(directory, out)
    base = None
    if given is not None:
        refuse_losing(given, out)
        base = read(given, "anchor")
        checkpoint.check_leaves(given, base)
    source = open_source(directory, names)
    tokenizer = companions.tokenizer_id(directory)
    if base is not None:
        _check_same_shape(source, base, tokenizer)
    plan = {
        "import": str(directory.absolute()),
        "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in _files(directory)},
        "names": source.names,
        "anchor": base and [str(given), base.arrays],
        "record": [owner, licence],
    }
    record = ExpertRecord(name="", owner=owner, licence=licence)
    size = sum(leaf.layout.nbytes for leaf in source.leaves.values())
    with (
        resumable_directory(out, plan, overwrite=overwrite) as parts,
        Progress("import-hf, MB", total=megabytes(size)) as progress,
    ):
        writing = _Writing(source, parts, progress, tokenizer)
        if base is None or given is None:
            manifest, home = writing.anchor(), parts.directory / "anchor"
        else:
            manifest, home = writing.proven_anchor(given, base)
        for name in source.names[1:]:
            writing.contribution(manifest, record, name)
        if source.names[1:]:
            writing.merged(manifest, home, source.names[1:])
    return Import(
        anchor=out / "anchor" if (out / "anchor").is_dir() else None,
        contributions={name: out / "contributions" / name for name in source.names[1:]},
        merged=out / "merged" if source.names[1:] else None,
        fingerprint=manifest.anchor,
        proven=base is not None,
        array_bytes=size,
    )


@dataclasses.dataclass(frozen=True)
class _Foreign:
    """A leaf that comes out of another program's files; see `assembly.Source`."""

    source: Source
    path: LeafPath
    advance: Callable[[int], None]

    @property
    def layout(self) -> LeafLayout:
        return self.source.leaves[self.path].layout

    @property
    def identity(self) -> str:
        # Which files these are is part of the import's plan.
        return repr(self.source.leaves[self.path].pieces)

    @property
    def memory(self) -> int:
        """One part as it was read, one transposed and one being written; a whole leaf where it is one part."""
        return 3 * self.layout.nbytes // (self.layout.shape[0] if is_stacked(self.path) else 1)

    def put(self, state: Path, memory: int) -> str:
        return self.layout.write(state, self._blocks())

    def _blocks(self) -> Iterator[np.ndarray]:
        for _, part in self.source.parts(self.path):
            flat = np.asarray(part, order="C").reshape(-1).view(np.uint8)
            yield from (flat[start : start + PIECE_BYTES] for start in range(0, len(flat), PIECE_BYTES))
            self.advance(part.nbytes)


class _Writing:
    """The artefacts of one import on their way to disk."""

    def __init__(self, source: Source, parts: Parts, progress: Progress, tokenizer: str):
        self._source = source
        self._parts = parts
        self._progress = progress
        self._tokenizer = tokenizer
        self._bytes = 0

    def anchor(self) -> Manifest:
        """Writes the anchor that the model contains."""
        return self._write_anchor(
            {path: self._foreign(path) for path in filter(belongs_to_anchor, self._source.leaves)}
        )

    def proven_anchor(self, given: Path, base: Manifest) -> tuple[Manifest, Path]:
        """The manifest and directory of the given anchor, or of the same one completed by a public router row.

        Raises:
          UserError: names the first tensor that differs, and by how much.
        """
        ours = stored_leaves(given, base)
        bare = not np.any(ours[PUBLIC_ROW].read())
        lacks_row = bare and any(np.any(part) for _, part in self._source.parts(PUBLIC_ROW))
        if self._parts.earlier("proven") is None:
            for path, leaf in ours.items():
                if path != PUBLIC_ROW or not lacks_row:
                    self._compare(path, leaf, given)
            self._parts.finish("proven", True)
        if not lacks_row:
            if base.model != self._source.config:
                raise UserError(f"{self._source.directory} is {self._source.config}, but {given} is {base.model}")
            return base, given
        others: dict[LeafPath, assembly.Source] = {path: assembly.Linked(leaf) for path, leaf in ours.items()}
        completed = self._write_anchor(others | {PUBLIC_ROW: self._foreign(PUBLIC_ROW)})
        return completed, self._parts.directory / "anchor"

    def contribution(self, anchor: Manifest, record: ExpertRecord, name: str) -> Manifest:
        """Writes the contribution of one expert."""

        def manifest(described: dict) -> Manifest:
            return dataclasses.replace(
                anchor,
                kind="contribution",
                experts=(dataclasses.replace(record, name=name),),
                arrays=described,
                top_k=self._source.top_k,
                format_version=Manifest.format_version,
            )

        paths = [path for path in self._source.leaves if belongs_to_expert(path, name)]
        home = self._parts.directory / "contributions" / name
        return self._assemble(home, {path: self._foreign(path) for path in paths}, manifest)

    def merged(self, anchor: Manifest, home: Path, names: Sequence[str]) -> None:
        """Puts the parts together without another copy of their bytes."""
        leaves, records = stored_leaves(home, anchor), list(anchor.experts)
        for name in names:
            part = contribution.examine(self._parts.directory / "contributions" / name, anchor)
            leaves |= part.leaves
            records.append(part.record)

        def manifest(described: dict) -> Manifest:
            return dataclasses.replace(
                anchor,
                kind="merged",
                experts=tuple(records),
                arrays=described,
                top_k=self._source.top_k,
                format_version=Manifest.format_version,
            )

        merged = self._parts.directory / "merged"
        self._assemble(merged, {path: assembly.LinkedUnread(leaf) for path, leaf in leaves.items()}, manifest)
        companions.keep(self._source.directory, merged)

    def _write_anchor(self, sources: Mapping[LeafPath, assembly.Source]) -> Manifest:
        def manifest(described: dict) -> Manifest:
            return Manifest(
                kind="anchor",
                model=self._source.config,
                experts=(ExpertRecord(name=PUBLIC),),
                anchor=checkpoint.anchor_fingerprint(described),
                arrays=described,
                top_k=1,
                tokenizer=self._tokenizer,
            )

        home = self._parts.directory / "anchor"
        written = self._assemble(home, sources, manifest)
        companions.keep(self._source.directory, home)
        return written

    def _assemble(
        self, home: Path, sources: Mapping[LeafPath, assembly.Source], manifest: Callable[[dict], Manifest]
    ) -> Manifest:
        """Writes an artefact, unless an interrupted run of the same plan did."""
        if home.exists():
            for left in home.parent.glob(f".{home.name}.*"):  # It was killed between its last two steps.
                shutil.rmtree(left)
            return read(home)
        home.parent.mkdir(exist_ok=True)
        # One writer: another would read and transpose while this one waits for the same processors.
        budget = max(source.memory for source in sources.values())
        return assembly.assemble(home, sources, manifest, memory_budget=budget, writers=1)

    def _foreign(self, path: LeafPath) -> _Foreign:
        return _Foreign(self._source, path, self._advance)

    def _compare(self, path: LeafPath, ours: StoredLeaf, anchor: Path) -> None:
        for layer, (tensor, theirs) in enumerate(self._source.parts(path)):
            mine = ours.read_layer(layer) if is_stacked(path) else ours.read()
            if mine.tobytes() != theirs.tobytes():
                a, b = mine.astype(np.float32), theirs.astype(np.float32)
                if differing := int(np.count_nonzero(a != b)):
                    raise UserError(
                        f"the shared half of {self._source.directory} is not {anchor}: {tensor} differs in "
                        f"{differing:,} of {a.size:,} values, by up to {float(np.max(np.abs(a - b))):.4g}"
                    )

    def _advance(self, count: int) -> None:
        self._bytes += count
        self._progress.update(megabytes(self._bytes))


def _check_same_shape(source: Source, base: Manifest, tokenizer: str) -> None:
    if len(source.names) == 1:
        raise UserError(f"{source.directory} is a dense model, which is an anchor itself: give no --anchor")
    for field in dataclasses.fields(ModelConfig):
        # What a dense model cannot know, and what only its values tell, is compared later.
        if field.name not in ("normalize_top_k", "bias_channel"):
            theirs, ours = getattr(source.config, field.name), getattr(base.model, field.name)
            if theirs != ours:
                raise UserError(f"{source.directory} has {field.name} {theirs}, but the anchor has {ours}")
    if tokenizer not in (base.tokenizer, companions.UNKNOWN):
        raise UserError(f"{source.directory} has the tokenizer {tokenizer}, but the anchor has {base.tokenizer}")


def _files(directory: Path) -> list[Path]:
    """The files of a model: the plan of an import changes if one of them does."""
    found = [*directory.glob("*"), *(directory / FOLDER).glob("*")]
    return sorted(file for file in found if file.suffix in (".safetensors", ".json") and file.is_file())

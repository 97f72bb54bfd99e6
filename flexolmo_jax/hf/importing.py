"""Reading models of other programs: in memory, or streamed into an anchor, contributions and a merged model."""

import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.hf import companions
from flexolmo_jax.hf.export import megabytes
from flexolmo_jax.hf.shards import FOLDER
from flexolmo_jax.hf.source import Source, open_source
from flexolmo_jax.model import PUBLIC, ModelConfig
from flexolmo_jax.model.partition import LeafPath, Predicate, belongs_to_anchor, belongs_to_expert, unflatten
from flexolmo_jax.store import arrays, checkpoint
from flexolmo_jax.store.assembly import LinkedUnread
from flexolmo_jax.store.directories import refuse_existing
from flexolmo_jax.store.layout import STATE, LeafLayout, is_stacked
from flexolmo_jax.store.manifest import ExpertRecord, Manifest, read
from flexolmo_jax.store.resumable import Parts, refuse_losing, resumable_directory
from flexolmo_jax.store.stored import StoredLeaf, stored_leaves
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
    size = sum(leaf.nbytes for leaf in source.leaves.values())
    with (
        resumable_directory(out, plan, overwrite=overwrite) as parts,
        Progress("import-hf, MB", total=megabytes(size)) as progress,
    ):
        writing = _Writing(source, parts, progress, tokenizer)
        if base is None or given is None:
            manifest, home = writing.anchor(), parts.directory / "anchor"
        else:
            manifest, home = writing.proven_anchor(given, base)
        contributions = {name: writing.contribution(manifest, record, name) for name in source.names[1:]}
        if contributions:
            writing.merged(manifest, home, contributions)
    return Import(
        anchor=out / "anchor" if (out / "anchor").is_dir() else None,
        contributions={name: out / "contributions" / name for name in contributions},
        merged=out / "merged" if contributions else None,
        fingerprint=manifest.anchor,
        proven=base is not None,
        array_bytes=size,
    )


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
        home = self._parts.directory / "anchor"
        described = self._write(home, belongs_to_anchor)
        return self._finish_anchor(home, described)

    def proven_anchor(self, given: Path, base: Manifest) -> tuple[Manifest, Path]:
        """The manifest and directory of the given anchor, or of the same one completed by a public router row.

        Raises:
          UserError: names the first tensor that differs, and by how much.
        """
        ours = arrays.open_leaves(given / checkpoint.ARRAYS)
        bare = not np.any(arrays.read(ours[PUBLIC_ROW]))
        lacks_row = bare and any(np.any(part) for _, part in self._source.parts(PUBLIC_ROW))
        if self._parts.earlier("proven") is None:
            for path in filter(belongs_to_anchor, self._source.leaves):
                if path != PUBLIC_ROW or not lacks_row:
                    self._compare(path, ours[path], given)
            self._parts.finish("proven", True)
        if not lacks_row:
            if base.model != self._source.config:
                raise UserError(f"{self._source.directory} is {self._source.config}, but {given} is {base.model}")
            return base, given
        home = self._parts.directory / "anchor"
        described = self._write(home, lambda path: path == PUBLIC_ROW, links=given, linked=base)
        return self._finish_anchor(home, base.arrays | described), home

    def contribution(self, anchor: Manifest, record: ExpertRecord, name: str) -> Manifest:
        """Writes the contribution of one expert."""
        home = self._parts.directory / "contributions" / name
        described = self._write(home, lambda path: belongs_to_expert(path, name))
        manifest = dataclasses.replace(
            anchor,
            kind="contribution",
            experts=(dataclasses.replace(record, name=name),),
            arrays=described,
            top_k=self._source.top_k,
        )
        manifest.write(home)
        return manifest

    def merged(self, anchor: Manifest, home: Path, contributions: dict[str, Manifest]) -> None:
        """Puts the parts together without another copy of their bytes."""
        merged = self._parts.directory / "merged"
        described, experts = dict(anchor.arrays), list(anchor.experts)
        origins = {home: anchor}
        for name, manifest in contributions.items():
            origins[self._parts.directory / "contributions" / name] = manifest
            described |= manifest.arrays
            (record,) = manifest.experts
            experts.append(dataclasses.replace(record, contribution=arrays.fingerprint(manifest.arrays)))
        _make_anew(merged)
        arrays.outline(merged / checkpoint.ARRAYS, _paths(described))
        for origin, manifest in origins.items():
            _link(origin, manifest, merged, _paths(manifest.arrays))
        companions.keep(self._source.directory, merged)
        dataclasses.replace(
            anchor, kind="merged", experts=tuple(experts), arrays=described, top_k=self._source.top_k
        ).write(merged)

    def _finish_anchor(self, home: Path, described: dict[str, Any]) -> Manifest:
        manifest = Manifest(
            kind="anchor",
            model=self._source.config,
            experts=(ExpertRecord(name=PUBLIC),),
            anchor=checkpoint.anchor_fingerprint(described),
            arrays=described,
            top_k=1,
            tokenizer=self._tokenizer,
        )
        companions.keep(self._source.directory, home)
        manifest.write(home)
        return manifest

    def _write(
        self, home: Path, wanted: Predicate, links: Path | None = None, linked: Manifest | None = None
    ) -> dict[str, Any]:
        """Writes the wanted leaves into a new artefact, beside links to those of another; returns their digests."""
        paths = [path for path in self._source.leaves if wanted(path)]
        key = str(home.relative_to(self._parts.directory))
        if self._parts.earlier(key) is None:
            others = [path for path in _paths(linked.arrays) if path not in paths] if linked else []
            _make_anew(home)
            arrays.outline(home / checkpoint.ARRAYS, [*paths, *others])
            if links is not None and linked is not None:
                _link(links, linked, home, others)
            self._parts.finish(key, "begun")
        return {"/".join(path): self._leaf(f"{key}:{'/'.join(path)}", home, path) for path in paths}

    def _leaf(self, key: str, home: Path, path: LeafPath) -> dict[str, Any]:
        """Writes one leaf, unless an interrupted run wrote it whole; returns what the manifest says of it."""
        leaf = self._source.leaves[path]
        layout = LeafLayout(path, tuple(leaf.shape), leaf.dtype.name)
        described = self._parts.earlier(key)
        if described is None or not _is_written(StoredLeaf(home, layout, described["sha256"])):
            state = home / checkpoint.ARRAYS / STATE
            shutil.rmtree(state / layout.directory, ignore_errors=True)
            described = arrays.describe(layout.shape, layout.dtype, layout.write(state, self._blocks(path)))
            self._parts.finish(key, described)
        else:
            self._advance(leaf.nbytes)
        return described

    def _blocks(self, path: LeafPath) -> Iterator[np.ndarray]:
        """The bytes of a leaf of the source, layer by layer."""
        for _, part in self._source.parts(path):
            yield np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            self._advance(part.nbytes)

    def _compare(self, path: LeafPath, ours: Any, anchor: Path) -> None:
        for layer, (tensor, theirs) in enumerate(self._source.parts(path)):
            mine = arrays.read(ours[layer] if is_stacked(path) else ours)
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


def _paths(described: Mapping[str, Any]) -> list[LeafPath]:
    return [tuple(name.split("/")) for name in described]


def _is_written(leaf: StoredLeaf) -> bool:
    try:
        leaf.check_files()
        leaf.verify()
    except (UserError, OSError):
        return False
    return True


def _link(origin: Path, manifest: Manifest, target: Path, paths: Iterable[LeafPath]) -> None:
    """Puts leaves of one artefact into another without another copy of their bytes, where the file system can."""
    leaves = stored_leaves(origin, manifest)
    for path in paths:
        LinkedUnread(leaves[path]).put(target / checkpoint.ARRAYS / STATE, memory=0)


def _make_anew(directory: Path) -> None:
    """Makes a directory, without what an interrupted run left of it."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)

"""The manifest beside every artefact's arrays: what it is, what it was made from, and the digest of every leaf."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.model.config import PUBLIC, ModelConfig

FORMAT_VERSION = 1
FILE = "manifest.json"
KINDS = ("anchor", "contribution", "merged")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRecord:
    """Where one expert of a model comes from.

    Attributes:
      name: the expert's name.
      owner: who trained it, in the owner's own words; empty for the public expert.
      contribution: fingerprint of the contribution's arrays; empty for the public expert.
      tokens_seen: tokens of training, of both the owner's and public text.
      licence: licence id or text under which the expert is contributed.
      privacy: "none", or the (epsilon, delta) guarantee that its training gives.
    """

    name: str
    owner: str = ""
    contribution: str = ""
    tokens_seen: int = 0
    licence: str = ""
    privacy: str = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds.

    Attributes:
      kind: "anchor", "contribution" or "merged".
      model: shape of the model.
      experts: the experts in the order of the model, `public` first; a contribution lists its own alone.
      anchor: fingerprint of the anchor's arrays.
      arrays: shape, dtype and SHA-256 of every leaf, by its path.
      top_k: experts per token that the artefact was trained or validated with.
      tokenizer: name of the vocabulary.
      gin: the operative configuration of the job that made it.
      implementation: the implementation of `mix_experts` that the job ran; empty in a merge.
      router_tuned_on: owners whose proxies a router tuning saw; empty for a strict merge.
      format_version: of this schema.
    """

    kind: str
    model: ModelConfig
    experts: tuple[ExpertRecord, ...]
    anchor: str
    arrays: dict[str, dict[str, Any]]
    top_k: int
    tokenizer: str = "bytes"
    gin: str = ""
    implementation: str = ""
    router_tuned_on: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    def write(self, directory: Path) -> None:
        (directory / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n")


def read(directory: Path, *kinds: str) -> Manifest:
    """Reads and checks the manifest of an artefact of one of these kinds (any, if none is given).

    Raises:
      UserError: it is missing, malformed, of another format version or of another kind.
    """
    file = directory / FILE
    wanted = " or ".join(kinds) or "model of ours"
    if not file.is_file():
        raise UserError(f"{directory} is not {_article(wanted)}: it has no {FILE}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{file} has format version {version!r}, but this program reads {FORMAT_VERSION}")
        content["model"] = ModelConfig(**content["model"])
        content["experts"] = tuple(ExpertRecord(**expert) for expert in content["experts"])
        content["router_tuned_on"] = tuple(content["router_tuned_on"])
        manifest = Manifest(**content)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{file} is not a manifest that this program can read: {error}") from error
    if manifest.kind not in (kinds or KINDS):
        raise UserError(f"{directory} is {_article(manifest.kind)}, but {_article(wanted)} is needed here")
    if manifest.kind != "contribution" and (not manifest.names or manifest.names[0] != PUBLIC):
        raise UserError(f"{file} must list the expert {PUBLIC!r} first")
    return manifest


def _article(kind: str) -> str:
    return f"an {kind}" if kind.startswith("anchor") else f"a {kind}"

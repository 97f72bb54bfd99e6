"""Arguments of stages: what one is, how its text is read, and those that several stages have."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flag:
    """One argument of a stage.

    Attributes:
      name: `--out`, or `CHECKPOINT` for an argument that is known by its place.
      help: what it means.
      fills: the parameter of the stage's function.
      settings: more settings for `argparse.ArgumentParser.add_argument`.
    """

    name: str
    help: str
    fills: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


class Pairs(argparse.Action):
    """Gathers `NAME=VALUE` arguments into one dict from name to path."""

    def __call__(self, parser, namespace, values, option_string=None):
        name, equals, value = str(values).partition("=")
        if not (name and equals and value):
            raise argparse.ArgumentError(self, f"{values!r} is not NAME=VALUE")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), name: Path(value)})


def names(text: str) -> tuple[str, ...]:
    """The names in a text such as `public,math`."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def number_of_bytes(text: str) -> int:
    """The bytes in a text such as `512MiB` or `1048576`."""
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        return int(float(text.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 512MiB") from error


def required(**settings: Any) -> dict[str, Any]:
    return {"type": Path, "required": True, **settings}


OUT = Flag("--out", "directory to write", "out", {"type": Path})
OVERWRITE = Flag("--overwrite", "replace what is there", "overwrite", {"action": "store_true"})
EXPERTS = Flag(
    "--experts", "names of the permitted experts, such as public,math (default: all)", "experts", {"type": names}
)
TOP_K = Flag("--top_k", "experts per token (default: the model's own)", "top_k", {"type": int})
ANCHOR = Flag("--anchor", "directory of the anchor", "anchor", {"type": Path})
TEXT = Flag("--text", "the owner's corpus: a directory or a file", "text", {"type": Path})
PUBLIC_TEXT = Flag("--public_text", "public corpus", "public_text", {"type": Path})
ENCODER = Flag(
    "--encoder",
    "directory of a sentence-transformers model or a Hugging Face encoder, to embed documents with",
    "encoder",
    {"type": Path},
)
CONTRIBUTION_HELP = "directory of a contribution; repeat it for more"
CHECKPOINT = Flag("CHECKPOINT", "directory of an anchor or a merged model", "checkpoint", {"type": Path})
CONTRIBUTION = Flag("DIR", "directory of a contribution", "contribution", {"type": Path})
ITS_ANCHOR = Flag("--anchor", "directory of the anchor that it was made for", "anchor", required())
SIGNED_BY = Flag("--signed-by", "public key that must have signed it (PEM, Ed25519)", "signed_by", {"type": Path})
REQUIRED_OUT = dataclasses.replace(OUT, settings=required())

BEAM = Flag(
    "--beam",
    "do it as an Apache Beam pipeline with these arguments, such as --beam=--runner=FlinkRunner",
    "beam",
)

"""The stages of the command line: what each is for, which function it calls and which flags fill its parameters.

Importing this module imports none of the functions, so that `flexolmo --help` answers at once.
"""

import argparse
import dataclasses
import importlib
from collections.abc import Callable
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
      summary: one line for `flexolmo --help`.
      function: `module:function` that it calls; what that returns is reported.
      flags: its arguments.
      gin: whether `--gin_file` and `--gin.NAME=VALUE` can fill the parameters that flags leave open.
      shows: the one entry of the report that is printed where `--json` is not given; None prints the short entries.
    """

    summary: str
    function: str
    flags: tuple[Flag, ...]
    gin: bool = False
    shows: str | None = None

    def load(self) -> Callable[..., Any]:
        """Imports the function, and with it what it needs."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


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


def _required(**settings: Any) -> dict[str, Any]:
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
REQUIRED_OUT = dataclasses.replace(OUT, settings=_required())

STAGES: dict[str, Stage] = {
    "pretrain": Stage(
        summary="train an anchor on public text",
        function="flexolmo_jax.train.pretrain:pretrain",
        flags=(OUT, OVERWRITE),
        gin=True,
    ),
    "train-expert": Stage(
        summary="train one owner's expert beside a frozen anchor and write the contribution",
        function="flexolmo_jax.train.expert:train_expert",
        flags=(OUT, OVERWRITE),
        gin=True,
    ),
    "tune-router": Stage(
        summary="tune the router of a merged model on proxies: makes a derived model",
        function="flexolmo_jax.train.router:tune_router",
        flags=(OUT, OVERWRITE),
        gin=True,
    ),
    "embed-domain": Stage(
        summary="embed an owner's text as one vector, for its router row to begin at",
        function="flexolmo_jax.domain:embed_domain",
        flags=(
            ANCHOR,
            TEXT,
            PUBLIC_TEXT,
            ENCODER,
            Flag("--vector", "in place of text: .npy file of a vector that embeds it", "vector", {"type": Path}),
            Flag("--public_vector", "the same of public text", "public_vector", {"type": Path}),
            Flag("--documents", "most documents to read of each (default: 1000)", "documents", {"type": int}),
            OUT,
            OVERWRITE,
        ),
        gin=True,
    ),
    "select-proxies": Stage(
        summary="choose the public documents that resemble an owner's text, to tune a router on",
        function="flexolmo_jax.domain:select_proxies",
        flags=(
            TEXT,
            PUBLIC_TEXT,
            dataclasses.replace(ANCHOR, help="directory of an anchor, to embed documents with (default: n-grams)"),
            ENCODER,
            OUT,
            OVERWRITE,
        ),
        gin=True,
    ),
    "merge": Stage(
        summary="merge an anchor and contributions into one model",
        function="flexolmo_jax.commands:merge",
        flags=(
            ANCHOR,
            Flag(
                "--contribution",
                f"{CONTRIBUTION_HELP}, in the order the experts shall have",
                "contributions",
                {"type": Path, "action": "append"},
            ),
            OUT,
            Flag("--top_k", "experts per token that the model shall use (default: all)", "top_k", {"type": int}),
            OVERWRITE,
        ),
        gin=True,
    ),
    "evaluate": Stage(
        summary="measure held-out bits per byte, exact match and routing of models",
        function="flexolmo_jax.evaluate:evaluate",
        flags=(
            Flag("CHECKPOINT", "directories of anchors and merged models", "checkpoints", {"type": Path, "nargs": "*"}),
            Flag(
                "--corpus",
                "name of a domain and its corpus, such as math=corpora/math; repeat it for more",
                "corpora",
                {"action": Pairs},
            ),
            Flag("--contribution", CONTRIBUTION_HELP, "contributions", {"type": Path, "action": "append"}),
            OUT,
            EXPERTS,
            TOP_K,
            OVERWRITE,
        ),
        gin=True,
    ),
    "generate": Stage(
        summary="continue a prompt",
        function="flexolmo_jax.commands:generate",
        flags=(
            CHECKPOINT,
            Flag("--prompt", "text to continue", "prompt", {"required": True}),
            EXPERTS,
            TOP_K,
            Flag("--max_new_tokens", "most tokens to add (default: 128)", "max_new_tokens", {"type": int}),
        ),
        shows="text",
    ),
    "export-hf": Stage(
        summary="write a model as a Hugging Face directory",
        function="flexolmo_jax.commands:export_hf",
        flags=(
            CHECKPOINT,
            REQUIRED_OUT,
            dataclasses.replace(EXPERTS, help="names of the experts to export, such as public,math (default: all)"),
            TOP_K,
            Flag(
                "--drop-bias",
                "leave out a router bias that the Hugging Face model cannot hold, instead of stopping",
                "drop_bias",
                {"action": "store_true"},
            ),
            OVERWRITE,
        ),
    ),
    "verify-hf": Stage(
        summary="compare the logits of a Hugging Face directory with those of a checkpoint",
        function="flexolmo_jax.commands:verify_hf",
        flags=(
            Flag("HF_DIR", "Hugging Face directory", "hf_directory", {"type": Path}),
            Flag("--against", "directory of the model that it was exported from", "against", _required()),
        ),
    ),
    "inspect": Stage(
        summary="say what a directory of ours holds",
        function="flexolmo_jax.commands:inspect",
        flags=(Flag("DIR", "directory of an anchor, a contribution or a merged model", "directory", {"type": Path}),),
    ),
    "corpora": Stage(
        summary="make the built-in corpora out of what Python itself carries",
        function="flexolmo_jax.commands:corpora",
        flags=(REQUIRED_OUT, OVERWRITE),
    ),
    "demo": Stage(
        summary="walk the whole road on this machine: anchor, three owners, merge, choice, export",
        function="flexolmo_jax.demo:demo",
        flags=(REQUIRED_OUT,),
    ),
}

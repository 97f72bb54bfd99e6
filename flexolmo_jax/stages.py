"""The stages of the command line: what each is for, which function it calls and which flags fill its parameters.

Importing this module imports none of the functions, so that `flexolmo --help` answers at once.
"""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexolmo_jax.flags import (
    ANCHOR,
    BEAM,
    CHECKPOINT,
    CONTRIBUTION,
    CONTRIBUTION_HELP,
    ENCODER,
    EXPERTS,
    ITS_ANCHOR,
    OUT,
    OVERWRITE,
    PUBLIC_TEXT,
    REQUIRED_OUT,
    SIGNED_BY,
    TEXT,
    TOP_K,
    Flag,
    Pairs,
    names,
    number_of_bytes,
    required,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
      summary: one line for `flexolmo --help`.
      function: `module:function` that it calls; what that returns is reported.
      flags: its arguments.
      gin: whether `--gin_file` and `--gin.NAME=VALUE` can fill the parameters that flags leave open.
      beside: other stages, whose gin files this one may be given too: what only they have is checked and passed over.
      shows: the one entry of the report that is printed where `--json` is not given; None prints the short entries.
    """

    summary: str
    function: str
    flags: tuple[Flag, ...]
    gin: bool = False
    beside: tuple[str, ...] = ()
    shows: str | None = None

    def load(self) -> Callable[..., Any]:
        """Imports the function, and with it what it needs."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


STAGES: dict[str, Stage] = {
    "prepare": Stage(
        summary="turn an owner's text into token shards, or write down a mixture of such",
        function="flexolmo_jax.data.stage:prepare",
        flags=(OUT, BEAM, OVERWRITE),
        gin=True,
    ),
    "prepare-seqio": Stage(
        summary="turn a task or mixture of SeqIO's registries into token shards",
        function="flexolmo_jax.data.stage:prepare_seqio",
        flags=(
            Flag("MODULE:NAME", "the module that registers it, and its name", "registered"),
            REQUIRED_OUT,
            Flag("--workers", "processes (default: one for every core)", "workers", {"type": int}),
            BEAM,
            OVERWRITE,
        ),
    ),
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
        summary="merge an anchor and contributions into one model, or change the experts of a merged one",
        function="flexolmo_jax.commands:merge",
        flags=(
            ANCHOR,
            Flag(
                "--contribution",
                f"{CONTRIBUTION_HELP}, in the order the experts shall have",
                "contributions",
                {"type": Path, "action": "append"},
            ),
            Flag("--model", "merged model to change, in place of --anchor", "model", {"type": Path}),
            Flag("--add", "contribution to add to --model", "add", {"type": Path, "action": "append"}),
            Flag("--remove", "name of an expert to leave out of --model", "remove", {"action": "append"}),
            Flag(
                "--replace",
                "contribution to put in the place of the expert of its name",
                "replace",
                {"type": Path, "action": "append"},
            ),
            OUT,
            Flag("--top_k", "experts per token that the model shall use (default: all)", "top_k", {"type": int}),
            Flag(
                "--signed-by",
                "name of an expert and the public key that must have signed it, such as math=math.pub; repeat it",
                "signed_by",
                {"action": Pairs},
            ),
            Flag(
                "--memory-budget",
                "memory for arrays, such as 512MiB (default: 1GiB)",
                "memory_budget",
                {"type": number_of_bytes},
            ),
            Flag("--writers", "threads that write (default: one per processor)", "writers", {"type": int}),
            Flag(
                "--no-verify",
                "trust that the arrays were verified before, and do not read them through",
                "verify",
                {"action": "store_false"},
            ),
            OVERWRITE,
        ),
        gin=True,
    ),
    "contribution verify": Stage(
        summary="check a contribution as a merge would: manifest, files, digests, values",
        function="flexolmo_jax.commands:verify_contribution",
        flags=(CONTRIBUTION, ITS_ANCHOR, SIGNED_BY),
    ),
    "contribution keys": Stage(
        summary="make a pair of keys to sign contributions with",
        function="flexolmo_jax.commands:create_keys",
        flags=(
            Flag("FILE", "file for the private key; the public one goes to FILE.pub", "private_key", {"type": Path}),
        ),
    ),
    "contribution sign": Stage(
        summary="sign a contribution, so that a merge can tell who made it",
        function="flexolmo_jax.commands:sign_contribution",
        flags=(
            CONTRIBUTION,
            Flag("--key", "private key (PEM, Ed25519)", "private_key", required()),
        ),
    ),
    "contribution compress": Stage(
        summary="write a contribution as a difference of low rank to the public expert",
        function="flexolmo_jax.commands:compress_contribution",
        flags=(
            CONTRIBUTION,
            ITS_ANCHOR,
            Flag("--rank", "rank of every matrix's difference", "rank", {"type": int}),
            Flag(
                "--energy",
                "in place of --rank: the smallest rank that keeps this share of every difference's squared norm",
                "energy",
                {"type": float},
            ),
            Flag("--text", "corpus on which to measure what the compression costs", "text", {"type": Path}),
            REQUIRED_OUT,
            OVERWRITE,
        ),
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
            Flag("--dtype", "float32 or bfloat16 (default: as the model is)", "dtype", {"type": str}),
            Flag(
                "--fold-bias",
                "public text to fold a router bias on that the Hugging Face model cannot hold, approximately",
                "fold_bias",
                {"type": Path, "metavar": "PUBLIC_TEXT"},
            ),
            Flag("--drop-bias", "leave such a bias out", "drop_bias", {"action": "store_true"}),
            Flag(
                "--custom-code",
                "bring a model class that has the bias; it loads with trust_remote_code alone",
                "custom_code",
                {"action": "store_true"},
            ),
            Flag(
                "--max-shard-size",
                "largest safetensors file, such as 500MB (default: 2GiB)",
                "max_shard_bytes",
                {"type": number_of_bytes, "metavar": "SIZE"},
            ),
            Flag(
                "--tokenizer",
                "directory that holds the model's tokenizer, if the model does not carry it",
                "tokenizer",
                {"type": Path, "metavar": "DIR"},
            ),
            OVERWRITE,
        ),
    ),
    "import-hf": Stage(
        summary="read a local OLMo 2 or FlexOlmo model into an anchor and contributions",
        function="flexolmo_jax.commands:import_hf",
        flags=(
            Flag(
                "HF_DIR", "Hugging Face directory, or OLMo-core checkpoint in safetensors", "directory", {"type": Path}
            ),
            REQUIRED_OUT,
            Flag("--names", "names for its experts in order, such as public,math", "names", {"type": names}),
            Flag("--anchor", "anchor of ours that its shared half must equal", "anchor", {"type": Path}),
            Flag("--owner", "who trained the experts", "owner", {"type": str}),
            Flag("--licence", "under which the experts are given", "licence", {"type": str}),
            OVERWRITE,
        ),
    ),
    "verify-hf": Stage(
        summary="compare the logits of a Hugging Face directory with those of a checkpoint",
        function="flexolmo_jax.commands:verify_hf",
        flags=(
            Flag("HF_DIR", "Hugging Face directory", "hf_directory", {"type": Path}),
            Flag("--against", "directory of the model that it was exported from", "against", required()),
        ),
    ),
    "inspect": Stage(
        summary="say what a directory of ours holds, without reading its arrays",
        function="flexolmo_jax.commands:inspect",
        flags=(
            Flag("DIR", "directory of an anchor, a contribution or a merged model", "directory", {"type": Path}),
            Flag("--against", "another such directory: say which arrays differ", "against", {"type": Path}),
        ),
    ),
    "corpora": Stage(
        summary="make the built-in corpora out of what Python itself carries",
        function="flexolmo_jax.commands:corpora",
        flags=(REQUIRED_OUT, OVERWRITE),
    ),
    "plan": Stage(
        summary="say what a job needs on a topology, without having it: memory, work, traffic, time",
        function="flexolmo_jax.plan:plan",
        flags=(
            Flag("JOB", "pretrain, train-expert, tune-router, forward or generate", "job"),
            Flag("--topology", "chips and their shape, such as v5p:4x4x4, v5e:16x16 or h100:64", "topology"),
            Flag("--experts", "experts of the model, the public one included", "experts", {"type": int}),
            TOP_K,
            Flag("--new_tokens", "for generate: tokens added to each row (default: 128)", "new_tokens", {"type": int}),
            Flag(
                "--search",
                "look for the fastest layout, mesh, accumulation and remat policy (or batch) that fit",
                "search",
                {"action": "store_true"},
            ),
            Flag("--price", "US dollars for a chip and an hour, to estimate the cost", "price", {"type": float}),
            dataclasses.replace(OUT, help="directory to write plan.json and plan.png to"),
            OVERWRITE,
        ),
        gin=True,
        beside=("pretrain", "train-expert", "tune-router"),
        shows="verdict",
    ),
    "demo": Stage(
        summary="walk the whole road on this machine: anchor, three owners, merge, choice, export",
        function="flexolmo_jax.demo:demo",
        flags=(REQUIRED_OUT,),
    ),
}

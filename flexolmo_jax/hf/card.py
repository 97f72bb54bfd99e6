"""The model card of an export: whose experts are in it, under which licences, and how to have one taken out."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexolmo_jax.hf.config import DENSE, MIXTURE_WITH_BIAS
from flexolmo_jax.model import PUBLIC
from flexolmo_jax.store.manifest import ExpertRecord, Manifest

if TYPE_CHECKING:
    from flexolmo_jax.hf.router_bias import Handled

_LONGEST_CELL = 200


def model_card(
    manifest: Manifest, names: Sequence[str], top_k: int, *, architecture: str, dtype: str, handled: "Handled"
) -> str:
    """The text of `README.md`.

    Owners' and licences' words come from contributions, so they are shown as plain text and nothing else.
    """
    records = {record.name: record for record in manifest.experts}
    exported = [records[name] for name in names]
    parameters = manifest.model.num_params(len(names))
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- flexolmo_jax\n---",
        f"# {_title(names)}",
        f"{_sentence(architecture, names, top_k)} It has {parameters:,} parameters in {dtype} and was exported by "
        "flexolmo_jax. Its files' digests are in `SHA256SUMS` (`sha256sum --check SHA256SUMS`).",
        "## Experts and their owners",
        _table(exported),
    ]
    if left_out := [name for name in manifest.names if name not in names]:
        sections.append(f"The model that it was exported from also has: {', '.join(map(_plain, left_out))}.")
    if any(record.name != PUBLIC for record in exported):
        sections += ["## How to opt out", _opting_out(manifest, names)]
    if note := _bias_note(handled, architecture):
        sections += ["## Router bias", note]
    return "\n\n".join(sections) + "\n"


def _title(names: Sequence[str]) -> str:
    return f"FlexOlmo model of the experts {', '.join(names)}" if len(names) > 1 else f"Dense model: {names[0]}"


def _sentence(architecture: str, names: Sequence[str], top_k: int) -> str:
    if architecture == DENSE:
        return f"This is an `{DENSE}` whose feed-forward networks are those of the expert {names[0]}."
    return (
        f"This is a `{architecture}`: a mixture of {len(names)} experts that were trained apart, each token using "
        f"{top_k} of them."
    )


def _table(records: Sequence[ExpertRecord]) -> str:
    rows = [["expert", "owner", "licence", "tokens seen", "privacy", "contribution"]]
    rows += [
        [
            record.name,
            record.owner or ("–" if record.name == PUBLIC else "not stated"),
            record.licence or "not stated",
            f"{record.tokens_seen:,}" if record.tokens_seen else "not stated",
            record.privacy,
            record.contribution[:12] or "–",
        ]
        for record in records
    ]
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _opting_out(manifest: Manifest, names: Sequence[str]) -> str:
    remaining = names[:-1] or [PUBLIC]
    text = (
        "An owner who withdraws is left out of the next export. Nothing is retrained, and the other experts' weights "
        f"do not change; without {names[-1]}, for example:\n\n"
        f"    flexolmo export-hf MODEL --out OUT --experts {','.join(remaining)}"
    )
    if manifest.router_tuned_on:
        tuned = ", ".join(_plain(name) for name in manifest.router_tuned_on)
        text += (
            f"\n\nThe router of this model was tuned on text chosen by {tuned}, so leaving one of them out of an "
            "export leaves a trace in the router rows: merge again without that owner instead."
        )
    return text


def _bias_note(handled: "Handled", architecture: str) -> str:
    if architecture == MIXTURE_WITH_BIAS:
        return (
            "The router has a bias, which transformers' own class has not. Load the model with "
            "`trust_remote_code=True`, which runs `modeling_flex_olmo_bias.py` from this directory."
        )
    if handled.folded is not None:
        fold = handled.folded
        return (
            f"The router biases were folded into the router rows approximately. On {fold.tokens:,} tokens of held-out "
            f"public text the loss is {fold.loss_folded:.4f} nats per token, {fold.loss:.4f} with exact biases and "
            f"{fold.loss_dropped:.4f} without any."
        )
    if handled.dropped:
        return f"Router biases of size up to {handled.dropped:.4g} were left out, so this is not quite the same model."
    return ""


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: one line, nothing that makes a link, a cell or HTML."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    shown = line if len(line) <= _LONGEST_CELL else line[: _LONGEST_CELL - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]<>()#!|&~])", r"\\\1", shown)

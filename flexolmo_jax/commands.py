"""The stages with plain flags: each calls the library and returns what there is to report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def merge(
    *, anchor: Path, contributions: Sequence[Path], out: Path, top_k: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """See `flexolmo_jax.merge.merge`."""
    from flexolmo_jax.merge import merge as merge_into

    manifest = merge_into(anchor, contributions, out, top_k=top_k, overwrite=overwrite)
    return {"merged": out, "experts": manifest.names, "top_k": manifest.top_k, "anchor": manifest.anchor}


def generate(
    *,
    checkpoint: Path,
    prompt: str,
    experts: Sequence[str] | None = None,
    top_k: int | None = None,
    max_new_tokens: int = 128,
) -> dict[str, Any]:
    """Continues a prompt greedily, up to an end of text."""
    import jax.numpy as jnp

    from flexolmo_jax.data import vocabulary
    from flexolmo_jax.errors import UserError
    from flexolmo_jax.infer import load

    ids = jnp.array([vocabulary.encode(prompt)], jnp.int32)
    if not ids.size:
        raise UserError("--prompt is empty: give at least one character")
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {max_new_tokens}, but must be at least 1")
    model = load(checkpoint)
    lengths = jnp.array([ids.shape[1]], jnp.int32)
    (new,) = model.generate(ids, lengths, max_new_tokens=max_new_tokens, experts=experts, top_k=top_k)
    return {
        "text": prompt + vocabulary.decode(new.tolist()),
        "prompt": prompt,
        "experts": experts or model.names,
        "top_k": model.check_top_k(top_k),
    }


def export_hf(
    *,
    checkpoint: Path,
    out: Path,
    experts: Sequence[str] | None = None,
    top_k: int | None = None,
    dtype: str | None = None,
    fold_bias: Path | None = None,
    drop_bias: bool = False,
    custom_code: bool = False,
    max_shard_bytes: int | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """See `flexolmo_jax.hf.export_hf`."""
    from flexolmo_jax.hf import export_hf as export

    written = export(
        checkpoint,
        out,
        experts=experts,
        top_k=top_k,
        dtype=dtype,
        fold_bias=fold_bias,
        drop_bias=drop_bias,
        custom_code=custom_code,
        **({} if max_shard_bytes is None else {"max_shard_bytes": max_shard_bytes}),
        tokenizer=tokenizer,
        overwrite=overwrite,
    )
    return {"exported": out, **dataclasses.asdict(written)}


def import_hf(
    *,
    directory: Path,
    out: Path,
    names: Sequence[str] | None = None,
    anchor: Path | None = None,
    owner: str = "",
    licence: str = "",
    overwrite: bool = False,
) -> dict[str, Any]:
    """See `flexolmo_jax.hf.import_hf`."""
    from flexolmo_jax.hf import import_hf as read_into

    written = read_into(directory, out, names=names, anchor=anchor, owner=owner, licence=licence, overwrite=overwrite)
    facts = {name: value for name, value in dataclasses.asdict(written).items() if value is not None}
    return {"imported": directory, **facts, "experts": tuple(written.contributions)}


def verify_hf(*, hf_directory: Path, against: Path) -> dict[str, Any]:
    """See `flexolmo_jax.hf.verify_hf`."""
    from flexolmo_jax.hf import verify_hf as verify

    return dataclasses.asdict(verify(hf_directory, against))


def inspect(*, directory: Path) -> dict[str, Any]:
    """What the manifest of an anchor, a contribution or a merged model says, without reading its arrays."""
    from flexolmo_jax.store.manifest import read

    manifest = read(directory)
    experts = len(manifest.experts)
    facts: dict[str, Any] = {"kind": manifest.kind, "experts": manifest.names, "top_k": manifest.top_k}
    if manifest.kind != "contribution":
        facts["parameters"] = manifest.model.num_params(experts)
        facts["active_parameters"] = manifest.model.num_active_params(manifest.top_k, experts)
    return facts | {
        "anchor": manifest.anchor,
        "tokenizer": manifest.tokenizer,
        "router_tuned_on": manifest.router_tuned_on,
        "model": dataclasses.asdict(manifest.model),
        "records": [dataclasses.asdict(record) for record in manifest.experts],
        "gin": manifest.gin,
    }


def corpora(*, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Makes the built-in corpora, one directory each, under `out`."""
    from flexolmo_jax.data.builtin import build
    from flexolmo_jax.store.directories import complete_directory

    with complete_directory(out, overwrite=overwrite) as partial:
        made = build(partial)
    return {name: out / directory.relative_to(partial) for name, directory in made.items()}

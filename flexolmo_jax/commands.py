"""The stages with plain flags: each calls the library and returns what there is to report."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError


def merge(
    *,
    out: Path,
    anchor: Path | None = None,
    contributions: Sequence[Path] = (),
    model: Path | None = None,
    add: Sequence[Path] = (),
    remove: Sequence[str] = (),
    replace: Sequence[Path] = (),
    top_k: int | None = None,
    signed_by: Mapping[str, Path] | None = None,
    memory_budget: int | None = None,
    writers: int | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """See `flexolmo_jax.merge.merge` and, for `model`, `flexolmo_jax.merge.revise`."""
    from flexolmo_jax.merge import merge as merge_into
    from flexolmo_jax.merge import revise

    if anchor is not None and model is not None:
        raise UserError("merge takes either --anchor, with contributions, or --model, with what to change in it")
    options: dict[str, Any] = {
        "top_k": top_k,
        "signed_by": signed_by,
        "memory_budget": memory_budget,
        "writers": writers,
        "verify": verify,
        "overwrite": overwrite,
    }
    if anchor is not None:
        if add or remove or replace:
            raise UserError("--add, --remove and --replace change a merged --model; to an --anchor go --contribution")
        manifest = merge_into(anchor, contributions, out, **options)
    elif model is not None:
        if contributions:
            raise UserError("--contribution goes with an --anchor; --add it to a merged --model")
        manifest = revise(model, out, add=add, remove=remove, replace=replace, **options)
    else:
        raise UserError("merge needs either --anchor, with contributions, or --model, with what to change in it")
    return {"merged": out, "experts": manifest.names, "top_k": manifest.top_k, "anchor": manifest.anchor}


def verify_contribution(*, contribution: Path, anchor: Path, signed_by: Path | None = None) -> dict[str, Any]:
    """Checks a contribution as a merge would."""
    from flexolmo_jax.store import contribution as contributions
    from flexolmo_jax.store.manifest import read

    checked = contributions.verify(contribution, read(anchor, "anchor"), signed_by=signed_by)
    record = checked.record
    return {
        "contribution": contribution,
        "expert": record.name,
        "owner": record.owner,
        "licence": record.licence,
        "rank": "full" if record.rank is None else record.rank,
        "arrays": len(checked.leaves),
        "bytes": sum(leaf.layout.nbytes for leaf in checked.leaves.values()),
        "fingerprint": record.contribution,
        "signed_by": record.signed_by or "not asked",
    }


def create_keys(*, private_key: Path) -> dict[str, Any]:
    """Makes a pair of keys to sign contributions with."""
    from flexolmo_jax.store import signing

    public = signing.create_keys(private_key)
    return {"private": private_key, "public": public, "fingerprint": signing.fingerprint(signing.read_public(public))}


def sign_contribution(*, contribution: Path, private_key: Path) -> dict[str, Any]:
    """Signs a contribution's manifest, and through its digests every array."""
    from flexolmo_jax.store import signing
    from flexolmo_jax.store.manifest import read

    read(contribution, "contribution")
    return {"signed": contribution, "signed_by": signing.sign(contribution, private_key)}


def compress_contribution(
    *,
    contribution: Path,
    anchor: Path,
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    text: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a contribution as a difference of low rank, and says what it costs on `text`."""
    from flexolmo_jax.store.compression import compress

    if (rank is None) == (energy is None):
        raise UserError("compress needs either --rank or --energy")
    compressed = compress(contribution, anchor, out, rank=rank, energy=energy, overwrite=overwrite)
    facts: dict[str, Any] = {"compressed": out, **dataclasses.asdict(compressed)}
    if text is not None:
        from flexolmo_jax.evaluate.compression import bits_per_byte_of_contributions

        before, after = bits_per_byte_of_contributions(anchor, [contribution, out], text)
        facts |= {"bits_per_byte_before": before, "bits_per_byte_after": after, "bits_per_byte_lost": after - before}
    return facts


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

    from flexolmo_jax.infer import load

    if not prompt:
        raise UserError("--prompt is empty: give at least one character")
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {max_new_tokens}, but must be at least 1")
    model = load(checkpoint)
    ids = jnp.array(model.vocabulary.encode([prompt]), jnp.int32)
    lengths = jnp.array([ids.shape[1]], jnp.int32)
    (new,) = model.generate(ids, lengths, max_new_tokens=max_new_tokens, experts=experts, top_k=top_k)
    return {
        "text": prompt + model.vocabulary.decode(new.tolist()),
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


def inspect(*, directory: Path, against: Path | None = None) -> dict[str, Any]:
    """What an anchor, a contribution or a merged model is, without reading its arrays."""
    from flexolmo_jax.store.inspection import array_differences, describe

    if against is None:
        return describe(directory)
    found = array_differences(directory, against)
    return {"directory": directory, "against": against, "differing": len(found), "first": found[:20]}


def corpora(*, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Makes the built-in corpora, one directory each, under `out`."""
    from flexolmo_jax.data.builtin import build
    from flexolmo_jax.store.directories import complete_directory

    with complete_directory(out, overwrite=overwrite) as partial:
        made = build(partial)
    return {name: out / directory.relative_to(partial) for name, directory in made.items()}

"""What a directory of ours is and how two of them differ, from the manifests alone: no array is read."""

import dataclasses
from pathlib import Path
from typing import Any

from flexolmo_jax.model.partition import LeafPath
from flexolmo_jax.store import arrays, signing
from flexolmo_jax.store.checkpoint import layouts
from flexolmo_jax.store.difference import differences
from flexolmo_jax.store.layout import LeafLayout
from flexolmo_jax.store.manifest import read


def describe(directory: Path) -> dict[str, Any]:
    """Kind, experts, sizes, shapes and fingerprints of an anchor, a contribution or a merged model.

    Raises:
      UserError: the directory is none of these.
    """
    manifest = read(directory)
    leaves = layouts(manifest)
    experts = len(manifest.experts)
    facts: dict[str, Any] = {"kind": manifest.kind, "experts": manifest.names, "top_k": manifest.top_k}
    if manifest.kind != "contribution":
        facts["parameters"] = manifest.model.num_params(experts)
        facts["active_parameters"] = manifest.model.num_active_params(manifest.top_k, experts)
    return facts | {
        "bytes": sum(leaf.nbytes for leaf in leaves.values()),
        "dtypes": sorted({leaf.dtype for leaf in leaves.values()}),
        "fingerprint": arrays.fingerprint(manifest.arrays),
        "anchor": manifest.anchor,
        "signed": (directory / signing.SIGNATURE).is_file(),
        "tokenizer": manifest.tokenizer,
        "router_tuned_on": manifest.router_tuned_on,
        "format_version": manifest.format_version,
        "model": dataclasses.asdict(manifest.model),
        "records": [
            dataclasses.asdict(record) | {"bytes": _expert_bytes(leaves, record.name)} for record in manifest.experts
        ],
        "arrays": {
            leaf.name: {"shape": leaf.shape, "dtype": leaf.dtype, "bytes": leaf.nbytes} for leaf in leaves.values()
        },
        "gin": manifest.gin,
    }


def array_differences(first: Path, second: Path) -> list[str]:
    """Which arrays of two directories differ, by path: in shape, dtype or digest, or in being there at all.

    Raises:
      UserError: a directory is none of ours.
    """
    described = [
        {
            path: f"{leaf['dtype']} {leaf['shape']} with digest {leaf['sha256'][:12]}…"
            for path, leaf in read(directory).arrays.items()
        }
        for directory in (first, second)
    ]
    return differences(*described)


def _expert_bytes(leaves: dict[LeafPath, LeafLayout], name: str) -> int:
    return sum(leaf.nbytes for path, leaf in leaves.items() if path[0] in ("experts", "router") and path[1] == name)

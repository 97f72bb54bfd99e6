"""What a job does not train."""

from flexolmo_jax.model.partition import flatten, is_matrix, unflatten


def in_compute_dtype(params: dict, dtype) -> dict:
    """Frozen parameters as they are computed with: matrices and the embedding in `dtype`, the rest as it is."""
    flat = flatten(params)
    return unflatten({p: leaf.astype(dtype) if is_matrix(p) or p[-1] == "embed" else leaf for p, leaf in flat.items()})

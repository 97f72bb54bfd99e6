"""Near-duplicates: documents that share most of their runs of five tokens, found by MinHash and banding.

Source: Broder, "On the resemblance and containment of documents" (1997); the library is datasketch.
"""

from collections.abc import Sequence

import numpy as np

PERMUTATIONS = 128
_SCHEME = "affine32"
"""datasketch's name of the family of hash functions; signatures of another family do not compare."""
_SHINGLE = 5
"""Tokens in a run; of shorter documents the whole is one run."""

Key = tuple[int, int, int]
"""Rank of a document's split, the held-out ones first, and the two halves of its digest."""


def signature(ids: np.ndarray) -> np.ndarray:
    """MinHash of a document's runs of tokens: uint32 [PERMUTATIONS]."""
    from datasketch import MinHash

    minhash = MinHash(PERMUTATIONS, seed=1, hashfunc=int, scheme=_SCHEME)
    minhash.update_batch(_shingles(ids).tolist())
    return minhash.hashvalues.astype(np.uint32)


def near_duplicates(keys: Sequence[Key], signatures: np.ndarray, threshold: float) -> set[Key]:
    """The documents to leave out so that no two of the rest are near-duplicates.

    Documents are taken in the order of their keys, and one that resembles an earlier one is left out. So the result
    depends on the documents alone, and where held-out splits rank first, none of their documents has a twin in
    training.

    Args:
      keys: of each document; one that occurs again is the same document.
      signatures: uint32 [documents, PERMUTATIONS], in the same order.
      threshold: least share of common runs (Jaccard similarity, as the signatures estimate it) that makes a duplicate.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: dict[Key, np.ndarray] = {}
    left_out: set[Key] = set()
    for row in sorted(range(len(keys)), key=keys.__getitem__):
        key, values = keys[row], signatures[row]
        if key in kept or key in left_out:
            continue
        minhash = MinHash(PERMUTATIONS, seed=1, hashvalues=values, scheme=_SCHEME)
        if any(np.mean(values == kept[other]) >= threshold for other in index.query(minhash)):
            left_out.add(key)
        else:
            index.insert(key, minhash)
            kept[key] = values
    return left_out


def _shingles(ids: np.ndarray) -> np.ndarray:
    """A 32-bit hash of every run of tokens."""
    wide = ids.astype(np.uint64)
    length = min(_SHINGLE, len(wide))
    mixed = np.zeros(len(wide) - length + 1, np.uint64)
    for offset in range(length):
        mixed = mixed * np.uint64(6_364_136_223_846_793_005) + wide[offset : offset + len(mixed)] + np.uint64(1)
    mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32))

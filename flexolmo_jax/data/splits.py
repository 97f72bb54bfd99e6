"""Which split a document belongs to, by a stable hash of its text."""

import hashlib

import numpy as np

SPLITS = ("train", "validation", "test")
HELD_OUT_PERCENT = 8
"""Of all documents, the share that goes to validation, and again to test."""


def digest_of(content: str | np.ndarray) -> bytes:
    """SHA-256 of a text in UTF-8, or of token ids where the text is not known.

    Raises:
      UnicodeEncodeError: the text holds half of a surrogate pair.
    """
    return hashlib.sha256(content.encode() if isinstance(content, str) else content.astype("<u4").tobytes()).digest()


def split_of_digest(digest: bytes) -> str:
    """The split of the document with this digest."""
    bucket = int.from_bytes(digest[:8], "big") % 100
    if bucket < HELD_OUT_PERCENT:
        return "test"
    return "validation" if bucket < 2 * HELD_OUT_PERCENT else "train"


def split_of(key: str) -> str:
    """The split that a text with this key belongs to: a function of the key alone."""
    return split_of_digest(digest_of(key))

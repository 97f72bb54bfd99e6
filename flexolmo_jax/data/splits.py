"""Which split a text belongs to, by a stable hash."""

import hashlib

SPLITS = ("train", "validation", "test")
HELD_OUT_PERCENT = 8
"""Of all documents, the share that goes to validation, and again to test."""


def split_of(key: str) -> str:
    """The split that a text with this key belongs to: a function of the key alone."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    if bucket < HELD_OUT_PERCENT:
        return "test"
    return "validation" if bucket < 2 * HELD_OUT_PERCENT else "train"

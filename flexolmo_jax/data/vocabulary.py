"""Byte vocabulary: the ids of SeqIO's `ByteVocabulary`, for hosts that must not import TensorFlow."""

from collections.abc import Iterable

PAD_ID = 0
EOS_ID = 1
_FIRST_BYTE = 3
VOCAB_SIZE = 256 + _FIRST_BYTE


def encode(text: str) -> list[int]:
    """Ids of the UTF-8 bytes, without EOS."""
    return [byte + _FIRST_BYTE for byte in text.encode()]


def decode(ids: Iterable[int]) -> str:
    """The text of the byte ids up to the first EOS; ill-formed UTF-8 shows as U+FFFD."""
    data = bytearray()
    for token in ids:
        if token == EOS_ID:
            break
        if _FIRST_BYTE <= token < VOCAB_SIZE:
            data.append(token - _FIRST_BYTE)
    return data.decode(errors="replace")

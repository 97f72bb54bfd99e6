"""Which documents of a corpus are read, decided by a hash of each document's text and by nothing else."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from pathlib import Path

from flexolmo_jax.data.documents import split_texts
from flexolmo_jax.errors import UserError


def document_id(text: str) -> str:
    """What everybody who has the document calls it: the first 16 hexadecimal digits of its text's SHA-256."""
    return hashlib.sha256(_bytes(text)).hexdigest()[:16]


def hashed(text: str, purpose: bytes) -> int:
    """A uniform 64-bit number that depends on the text and on what it is for."""
    return int.from_bytes(hashlib.blake2b(_bytes(text), digest_size=8, person=purpose).digest(), "big")


def sample(texts: Iterable[str], count: int) -> list[str]:
    """The `count` documents with the smallest hashes, or all of them where there are fewer.

    One more document, or one fewer, changes at most one of those chosen, wherever in the corpus it stands. Choosing by
    position would let one document shift all others, and a mean over them could then not be made private.
    """
    return heapq.nsmallest(count, texts, key=lambda text: hashed(text, b"sample"))


def training_documents(corpus: Path) -> Iterator[str]:
    """The documents that a corpus has to train on, blank ones left out.

    Raises:
      UserError: the corpus is missing or unreadable.
    """
    return (text for text in split_texts(corpus, "train") if text.strip())


def sample_of(corpus: Path, count: int) -> list[str]:
    """A sample of a corpus's training documents.

    Raises:
      UserError: the corpus is missing or unreadable, or has no such document.
    """
    texts = sample(training_documents(corpus), count)
    if not texts:
        raise UserError(f"the corpus {corpus} has no document to train on")
    return texts


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")

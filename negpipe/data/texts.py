"""Identity of texts: the meaning of "the same text" and "the same normalized text"."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negpipe.data.arrays import Hashes


def normalize(text: str) -> str:
    """Unicode NFKC, case-folded, runs of whitespace as one space, stripped."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def text_id(text: str) -> str:
    """The id of a text without one: 32 hex digits of its digest."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def ids_of(digested: Hashes) -> list[str]:
    """`text_id` of texts, from their `digests`."""
    every = digested.astype("<u8").tobytes().hex()
    return [every[at : at + 32] for at in range(0, len(every), 32)]


def digests(texts: pa.Array | Iterable[str]) -> Hashes:
    """128-bit digests, (n, 2) uint64: equal exactly if the texts are equal."""
    return _joined(_encoded(texts), 16).reshape(-1, 2)


def hashes(texts: pa.Array | Iterable[str]) -> Hashes:
    """64-bit digests, (n,) uint64: two of 100 million different texts collide with a chance of 3 in 10,000."""
    return _joined(_encoded(texts), 8)


def normalized_hashes(texts: pa.Array) -> Hashes:
    """`hashes` of texts after `normalize`; the texts must be stripped."""
    # NFKC does not change ASCII, where case is only lower or upper; printable whitespace is spaces.
    normal = _encoded(pc.ascii_lower(texts))
    printable = pc.ascii_is_printable(texts).to_numpy(zero_copy_only=False)
    others = np.flatnonzero(~printable | [b"  " in text for text in normal])
    for at, text in zip(others.tolist(), texts.take(pa.array(others)).to_pylist(), strict=True):
        normal[at] = normalize(text).encode()
    return _joined(normal, 8)


def _encoded(texts: pa.Array | Iterable[str]) -> list[bytes]:
    if isinstance(texts, pa.Array | pa.ChunkedArray):
        encoded: list[bytes] = texts.cast(pa.large_binary()).to_numpy(zero_copy_only=False).tolist()
        return encoded
    return [text.encode() for text in texts]


def _joined(texts: list[bytes], size: int) -> Hashes:
    """Concatenated digests of `size` bytes."""
    blake2b = hashlib.blake2b
    return np.frombuffer(b"".join([blake2b(text, digest_size=size).digest() for text in texts]), dtype="<u8")

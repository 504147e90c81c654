"""Bytes as tokens: the vocabulary that every text in the project uses."""

from __future__ import annotations

import numpy as np

BOUNDARY = 256
"""The token that starts every document, and the one that its last byte is to be followed by."""

VOCABULARY = 257
"""Number of tokens: the 256 bytes and `BOUNDARY`."""

IGNORE = -100
"""The label of a token that has no next token; losses leave it out (the default of torch's cross entropy)."""


def encode(text: str) -> np.ndarray:
    """Turn text into its UTF-8 bytes as tokens, without a boundary.

    Returns an int64 array [bytes]. Lone surrogates (what Python makes of file names that are no UTF-8) go back to
    the bytes they stand for.
    """
    return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), dtype=np.uint8).astype(np.int64)


def decode(tokens: np.ndarray) -> str:
    """Turn tokens [T] (any integer type) back into text: boundaries are dropped, bytes that are no UTF-8 become U+FFFD.

    Raises ValueError for a token outside the vocabulary.
    """
    values = np.asarray(tokens, dtype=np.int64).reshape(-1)
    outside = values[(values < 0) | (values >= VOCABULARY)]
    if outside.size:
        raise ValueError(f"tokens: got {outside[0]}, expected 0 to {VOCABULARY - 1}")
    return values[values != BOUNDARY].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

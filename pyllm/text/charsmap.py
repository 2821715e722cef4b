"""Checks sentencepiece's compiled normalisation, which the `tokenizers` library follows without looking."""

from __future__ import annotations

import numpy as np


def check(charsmap: bytes) -> None:
    """Raises ValueError unless every walk through the map stays in it.

    The map: the length of a double-array trie (darts-clone), its units of 4 bytes, the texts that its leaves point to.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or size % 4 or not 0 < size <= len(charsmap) - 4:
        raise ValueError("the normalisation is truncated or malformed")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4)
    texts = np.frombuffer(charsmap, np.uint8, offset=4 + size)
    try:
        texts.tobytes().decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("the normalisation's texts are no UTF-8") from None
    letters = np.arange(1, 256, dtype=np.int64)
    seen = np.zeros(len(units), bool)
    bases = _children(np.zeros(1, np.int64), units)
    while len(bases):
        # A state's 255 next letters lie in its block of 256 units.
        if (bases | 255).max() >= len(units):
            raise ValueError("the normalisation points outside of itself")
        bases = np.unique(bases[~seen[bases]])
        seen[bases] = True
        following = []
        for some in np.array_split(bases, len(bases) // 4096 + 1):
            places = some[:, None] ^ letters
            found = places[(units[places] & 0x800000FF) == letters]
            states = _children(found, units)
            leaves = states[(units[found] >> 8 & 1) == 1]
            if len(states) and (states | 255).max() >= len(units):
                raise ValueError("the normalisation points outside of itself")
            starts = (units[leaves] & 0x7FFFFFFF).astype(np.int64)
            if len(starts) and (starts.max() >= len(texts) or (texts[starts] >> 6 == 2).any()):
                raise ValueError("the normalisation points outside of its texts")
            following.append(states)
        bases = np.concatenate(following)


def _children(places: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Where the states behind these units begin."""
    unit = units[places].astype(np.int64)
    return places ^ ((unit >> 10) << ((unit & 512) >> 6))

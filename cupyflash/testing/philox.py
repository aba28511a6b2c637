"""Philox 4x32-10, the counter-based generator of Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3".

Which weights dropout keeps is a function of the seed and of a pair's place, so it does not depend on who computes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]  # 32-bit words, in 64 bits so that a product of two fits

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # what the two key words grow by from round to round
ROUNDS = 10
LOW, HALF = np.uint64(2**32 - 1), np.uint64(32)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Words, Words, Words, Words]:
    """Four random words of four counter words and two key words: integers below 2**32, arrays broadcast."""
    a, b, c, d = (np.asarray(word, np.uint64) for word in counter)
    left, right = (np.asarray(word, np.uint64) for word in key)
    for _ in range(ROUNDS):
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = (second >> HALF) ^ b ^ left, second & LOW, (first >> HALF) ^ d ^ right, first & LOW
        left, right = (left + WEYL[0]) & LOW, (right + WEYL[1]) & LOW
    return a, b, c, d


def keeps(dropout: float, seed: int, b: Any, h: Any, i: Any, j: Any) -> npt.NDArray[np.bool_]:
    """Whether dropout keeps the pair (i, j) of head h of entry b; integer arrays that broadcast."""
    words = philox((j // 4, i, h, b), (seed % 2**32, seed // 2**32))
    word = np.choose(j % 4, np.broadcast_arrays(*words))
    return np.asarray(word >= np.uint64(int(dropout * 2**32)))

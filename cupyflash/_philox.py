"""Philox 4x32-10, the counter-based generator of dropout: Salmon et al. (2011), "Parallel random numbers".

Four 32-bit words for each counter and key, whoever asks for them and in whatever order: dropout that depends on a
pair's place alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # numpy.ndarray

ROUNDS = 10
PIECE = 2**13  # counters at a time: half the time for each pair that arrays beyond the second cache take
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85  # what the key words are raised by from round to round
_LOW, _BITS = np.uint64(2**32 - 1), np.uint64(32)


def philox(counter: tuple[Any, Any, Any, Any], seed: int) -> tuple[Array, Array, Array, Array]:
    """The four words that belong to each counter: uint64 arrays of numbers below 2**32.

    Parameters
    ----------
    counter : four integers or integer arrays below 2**32
        The counter's words, which broadcast together. What depends on few of them is computed for few.
    seed : int
        The key's words: seed mod 2**32, seed // 2**32.
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    key = [seed % 2**32, seed // 2**32]
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> _BITS) ^ (c1 ^ np.uint64(key[0]))
        c2 = (product0 >> _BITS) ^ (c3 ^ np.uint64(key[1]))
        c1, c3 = product1 & _LOW, product0 & _LOW
        key = [(word + step) % 2**32 for word, step in zip(key, WEYL, strict=True)]
    return c0, c1, c2, c3


def dropped(keys: slice, rows: slice, head: int, batch: int, seed: int, dropout: float) -> Array:
    """(keys, rows): which pairs lose their weight. Word j % 4 of counter (j // 4, i, head, batch) decides on pair i, j.

    Parameters
    ----------
    keys, rows : slice
        Ranges of j and i.
    """
    begin, end, count = keys.start // 4, -(-keys.stop // 4), rows.stop - rows.start
    below = np.empty((end - begin, 4, count), bool)
    threshold = np.uint64(int(dropout * 2**32))
    i, step = np.arange(rows.start, rows.stop), max(1, PIECE // max(1, count))
    for first in range(begin, end, step):
        groups = np.arange(first, min(first + step, end))
        for word, words in enumerate(philox((groups[:, None], i, head, batch), seed)):
            np.less(words, threshold, out=below[first - begin : first - begin + len(groups), word])
    return below.reshape(-1, count)[keys.start - 4 * begin : keys.stop - 4 * begin]

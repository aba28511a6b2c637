"""Gradients of a score function's arguments on the CPU path.

Each tile adds up its own sums, in float64; those of all tiles are added in the order of the tiles, whoever is through
first. So the bits do not depend on the number of workers, whatever the indices are.
"""

from __future__ import annotations

import threading

import numpy as np

from ._cpu_blocks import Array
from ._options import Options
from ._score_args import GRADIENT_ARGS, argument_name
from ._terms import float_args, terms_of
from ._trace_terms import ArgTerm

Sums = dict[int, Array]  # by an argument's place


class ScoreGradients:
    """The gradients that one call asks for, and the sums of the tiles that are through."""

    def __init__(self, options: Options, gradients: dict[str, Array]) -> None:
        assert options.score is not None
        self.uses: tuple[ArgTerm, ...] = tuple(term.use for term in terms_of(options.score))
        self._gradients = {n: gradients[argument_name(GRADIENT_ARGS, n)] for n in float_args(options)}
        self._total, self._waiting, self._next, self._lock = self.begin(), dict[int, Sums](), 0, threading.Lock()

    def begin(self) -> Sums:
        """Sums of nothing."""
        return {n: np.zeros(x.shape) for n, x in self._gradients.items()}

    def end(self, number: int, sums: Sums) -> None:
        """Take the sums of a tile, each tile's once; tiles are numbered from 0."""
        with self._lock:
            self._waiting[number] = sums
            while (ended := self._waiting.pop(self._next, None)) is not None:
                for n, x in ended.items():
                    self._total[n] += x
                self._next += 1

    def store(self) -> None:
        """Round the sums of all tiles once."""
        for n, x in self._total.items():
            self._gradients[n][...] = x


def add_use(sums: Array, index: tuple[Array, ...], terms: Array) -> None:
    """Add each pair's term (keys, rows) where its index leads to; indices that repeat a number have strides of 0."""
    same = tuple(axis for axis in (0, 1) if all(x.strides[axis] == 0 or x.shape[axis] == 1 for x in index))
    part = np.add.reduce(terms, axis=same, dtype=np.float64)
    place = tuple(x[tuple(0 if axis in same else slice(None) for axis in (0, 1))] for x in index)
    if len(same) == 2:
        sums[place] += part
    else:
        np.add.at(sums, place, part)

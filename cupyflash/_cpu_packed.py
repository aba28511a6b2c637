"""Packed sequences on the CPU path: an axis of sequences over rows that lie one behind the other, without a copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ._cpu_blocks import Array, Index
from ._options import PLAIN
from ._problem import Problem

# The side whose offsets a tensor's rows follow, and how many axes it has from its rows on.
_ROWS = {
    "q": ("q", 2), "out": ("q", 2), "dout": ("q", 2), "dq": ("q", 2), "lse": ("q", 1), "dlse": ("q", 1),
    "k": ("k", 2), "v": ("k", 2), "dk": ("k", 2), "dv": ("k", 2),
}  # fmt: skip


class Packed:
    """(*heads, rows[, columns]) as (sequences, *heads, longest[, columns]), as far as `_cpu_blocks.at` needs it.

    An element of it, one head of one sequence, has the rows of that sequence and no others.
    """

    def __init__(self, x: Array, offsets: Array, longest: int, core: int) -> None:
        heads = x.ndim - core
        self._x, self._offsets = x, offsets
        self.shape = (len(offsets) - 1, *x.shape[:heads], longest, *x.shape[heads + 1 :])
        self.ndim = len(self.shape)

    def __getitem__(self, index: Index) -> Array:
        sequence, *heads = index
        own: Index = (*heads, slice(int(self._offsets[sequence]), int(self._offsets[sequence + 1])))
        return self._x[own]

    def __setitem__(self, index: Index, value: Array) -> None:
        own = self[index]
        own[...] = value[: len(own)]


def unpack(problem: Problem, tensors: dict[str, Array], beside: dict[str, Array]) -> dict[str, Any]:
    """The tensors with an axis of sequences; those that have one as they are."""
    longest = {"q": problem.seqlen_q, "k": problem.seqlen_k}
    found: dict[str, Any] = dict(tensors)
    for name, x in tensors.items():
        if name in _ROWS:
            side, core = _ROWS[name]
            found[name] = Packed(x, beside[f"cu_seqlens_{side}"], longest[side], core)
    return found


def clear_rest(results: dict[str, Array], beside: dict[str, Array]) -> None:
    """Write the rows of results behind the last sequence: 0, and -inf where they are lse."""
    for name, x in results.items():
        if name in _ROWS:
            side, core = _ROWS[name]
            rest = slice(int(beside[f"cu_seqlens_{side}"][-1]), None)
            behind = x[..., rest, :] if core == 2 else x[..., rest]
            behind[...] = -np.inf if name == "lse" else 0


def sequences(problem: Problem, beside: dict[str, Array]) -> Iterator[tuple[Problem, slice, slice]]:
    """Each sequence of a plain packed problem as a problem of its own, with its rows and its keys."""
    q_offset: Any = beside.get("q_offsets", problem.q_offset)
    offsets = np.broadcast_to(q_offset, problem.batch_shape)
    cu_q, cu_k = (beside[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    for b, offset in enumerate(offsets.tolist()):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        seqlens = rows.stop - rows.start, keys.stop - keys.start
        yield _alone(problem, *seqlens, seqlens[1] - seqlens[0] if problem.bottom_right else offset), rows, keys


@lru_cache(maxsize=4096)
def _alone(problem: Problem, seqlen_q: int, seqlen_k: int, q_offset: int) -> Problem:
    """One sequence of a packed problem that has no other options."""
    return replace(
        problem,
        batch_shape=(),
        leading=tuple((name, ()) for name, _ in problem.leading),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        q_offset=q_offset,
        options=PLAIN,
        bottom_right=False,
    )

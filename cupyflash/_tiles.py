"""What the tile tables of all families share: widths, and how a row is found. Pure data and arithmetic.

Batch and heads are not asked, so that they can't change an entry's bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ._problem import Problem

# Widths that kernels are compiled for; a run-time width is padded with zeros in shared memory.
WIDTHS = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256)
MAX_THREADS = 1024
# Kernels that walk rows and keep nothing in shared memory.
ROW_KERNELS = {"bwd_delta": (64, 4), "bwd_finish": (32, 4)}  # block_m, warps

_R = TypeVar("_R", bound=Any)


def padded(width: int) -> int:
    """The width that a kernel is compiled for."""
    return next(w for w in WIDTHS if w >= width)


def padded_widths(problem: Problem) -> tuple[int, int]:
    """The widths of q and k, and of v, that a kernel is compiled for."""
    return padded(problem.head_dim), padded(problem.head_dim_v)


def first_row(table: tuple[tuple[int, int, _R], ...], problem: Problem, length: int) -> _R:
    """The first row that is for a problem's widths, mask and length; the last rows are for all."""
    return next(
        row
        for largest, largest_v, row in table
        if problem.head_dim <= largest
        and problem.head_dim_v <= largest_v
        and row.causal in (None, problem.causal)
        and (row.longest is None or length <= row.longest)
    )


def equal_sections(heads: int, most: int) -> int:
    """How many of ``heads`` run side by side: sections of equal size, of at most so many."""
    count = -(-heads // most)
    return max(1, -(-heads // max(1, count)))

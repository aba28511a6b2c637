"""What both directions of the CPU path are made of: exponentials, the grid of cells, tiles cut into blocks of keys."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from ._options import PLAIN
from ._problem import Problem

Array = Any  # numpy.ndarray
Index = tuple[Any, ...]


class Exponential(NamedTuple):
    """exp and log in the base that NumPy computes fastest, and what turns natural logarithms into it."""

    exp: Any
    log: Any
    per_nat: float  # log(e) in this base
    # exp(floor) is just a normal number; below, NumPy is 10 to 300 times slower (subnormals). Of no axes, in the dtype.
    floor: Array


def _exponential(dtype: type) -> Exponential:
    """Base 2, unless NumPy has vector code on this machine for exp and none for exp2 (x86 without AVX-512)."""
    if _vectorised("exp", dtype) and not _vectorised("exp2", dtype):
        return _natural(dtype)
    return Exponential(np.exp2, np.log2, math.log2(math.e), np.asarray(float(np.finfo(dtype).minexp), dtype))


def _vectorised(name: str, dtype: type) -> bool:
    if name == "exp2" and sys.platform != "linux":
        return False  # vector code for exp2 is Intel's SVML, which NumPy links on Linux only
    try:
        from numpy.lib.introspect import opt_func_info  # NumPy 2

        targets = opt_func_info(func_name=f"^{name}$", signature=np.dtype(dtype).name)
    except (ImportError, AttributeError):
        return True
    return any("baseline" not in kind["current"] for kinds in targets.values() for kind in kinds.values())


def _natural(dtype: type) -> Exponential:
    return Exponential(np.exp, np.log, 1.0, np.asarray(math.ceil(float(np.finfo(dtype).minexp) * math.log(2)), dtype))


EXPONENTIALS = {np.dtype(t): _exponential(t) for t in (np.float32, np.float64)}
NATURAL = {np.dtype(t): _natural(t) for t in (np.float32, np.float64)}


def exponential(problem: Problem) -> Exponential:
    """The exponential of a problem's logits.

    Base e where something is added to them: the lowest float32, which often stands for minus infinity in a bias,
    would overflow in other units, and rows that see nothing else would become empty.
    """
    return (NATURAL if problem.options.changes_logits else EXPONENTIALS)[problem.accumulator]


def exponentiate(base: Exponential, x: Array) -> None:
    """exp in place; what underflows becomes the smallest normal number, which no sum of a softmax can feel."""
    np.maximum(x, base.floor, out=x)
    base.exp(x, x)


def ones_row(count: int, dtype: np.dtype) -> Array:
    """A row of ones: a product with it is the fastest sum over keys."""
    ones = ONES[dtype]
    return ones[:, :count] if count <= ones.shape[1] else np.ones((1, count), dtype)


ONES = {dtype: np.ones((1, 1024), dtype) for dtype in EXPONENTIALS}


def pack(x: Array, dtype: np.dtype) -> Array:
    """x as BLAS always gets it."""
    return x if is_packed(x, dtype) else np.array(x, dtype, order="C")


def is_packed(x: Array, dtype: np.dtype) -> bool:
    """Whether each matrix of x is contiguous, aligned, of the accumulator's type.

    NumPy's own flag ignores the strides of axes of length 1, but not so its choice between BLAS and loops.
    """
    itemsize = dtype.itemsize
    return x.dtype == dtype and x.strides[-2:] == (x.shape[-1] * itemsize, itemsize) and bool(x.flags.aligned)


# ---------------------------------------------------------------------------------------------------------- cells


class Cells:
    """The grid of independent problems: leading axes, then heads, or (kv head, query head of its group).

    With groups, k and v broadcast along the last axis, exactly as they may along leading axes.
    """

    def __init__(self, problem: Problem, beside: dict[str, Array]) -> None:
        self.problem = problem
        self.is_plain = problem.options == PLAIN
        self.group = problem.num_heads // problem.num_heads_k
        heads = (problem.num_heads,) if self.group == 1 else (problem.num_heads_k, self.group)
        self.shape = problem.batch_shape + heads
        self.q_offset: Any = problem.q_offset
        if problem.q_offset is None and "q_offsets" in beside:
            self.q_offset = beside["q_offsets"].reshape(beside["q_offsets"].shape + (1,) * len(heads))
        self.q_lens, self.kv_lens = beside.get("q_lens"), beside.get("kv_lens")

    def rows(self, x: Array) -> Array:
        """(..., heads, rows, columns) as (cells, rows, columns), for q, out, dout, dq."""
        if self.group == 1:
            return x
        return x.reshape(*x.shape[:-3], self.problem.num_heads_k, self.group, *x.shape[-2:])

    def row_values(self, x: Array) -> Array:
        """(..., heads, rows) as (cells, rows), for lse and dlse."""
        return x if self.group == 1 else x.reshape(*x.shape[:-2], -1, self.group, x.shape[-1])

    def keys(self, x: Array) -> Array:
        """(..., heads, keys, columns) as (cells, keys, columns), for k, v, dk, dv."""
        return x if self.group == 1 else x[..., None, :, :]

    def pairs(self, x: Array) -> Array:
        """(..., heads or 1, rows, keys) as (cells, rows, keys), for dbias."""
        return x[..., None, :, :] if x.shape[-3] == 1 and self.group > 1 else self.rows(x)

    def offset(self, index: Index) -> Any:
        """The diagonal's offset in a cell (an int), or in a slice of cells (an array)."""
        if self.problem.q_offset is not None:
            return self.problem.q_offset
        part = at(self.q_offset, index, 0)
        return int(part) if part.ndim == 0 else part

    def entry(self, cell: Index) -> tuple[Index, int]:
        """A cell's batch entry, an index into batch_shape, and its query head."""
        lead, (head, *member) = cell[: len(self.problem.batch_shape)], cell[len(self.problem.batch_shape) :]
        return lead, head * self.group + sum(member)

    def sight(self, cell: Index) -> Sight:
        """What the lengths and the diagonal of a cell let its rows see."""
        problem, options, offset = self.problem, self.problem.options, self.offset(cell)
        high = offset if problem.causal else None
        if self.is_plain:
            return Sight(problem.seqlen_q, problem.seqlen_k, offset, None, high)
        entry, _ = self.entry(cell)
        rows = problem.seqlen_q if self.q_lens is None else int(self.q_lens[entry])
        keys = problem.seqlen_k if self.kv_lens is None else int(self.kv_lens[entry])
        if problem.bottom_right:
            offset = keys - rows
        low = None if options.window_left is None else offset - options.window_left
        if problem.causal:
            high = offset
        elif options.window_right is not None:
            high = offset + options.window_right
        return Sight(rows, keys, offset, low, high)


def at(x: Array, index: Index, core: int) -> Array:
    """x[index], where x may lack leading axes or have length 1 along them; its last `core` axes are kept."""
    return x[own_index(x, index, core)]


def own_index(x: Array, index: Index, core: int) -> Index:
    """The index of the element of x, or the slice, that broadcasting puts at `index`."""
    lead = x.ndim - core
    return tuple(
        i if n > 1 else slice(None) if isinstance(i, slice) else 0
        for i, n in zip(index[len(index) - lead :], x.shape, strict=False)
    )


def chunks(shape: Sequence[int], weight: int, most: int) -> Iterator[Index]:
    """Slices that cover a grid of cells in order, each of at most `most` in weight, or of one cell."""
    axis, inner = len(shape), weight
    while axis > 0 and inner * shape[axis - 1] <= most:
        axis -= 1
        inner *= shape[axis]
    steps = [1] * axis
    if axis > 0:
        steps[-1] = max(1, most // inner)
    ranges = [[slice(i, i + step) for i in range(0, n, step)] for n, step in zip(shape, steps, strict=False)]
    for index in product(*ranges):
        yield (*index, *[slice(None)] * (len(shape) - axis))


def beyond_diagonal(problem: Problem, offset: Any) -> Array | None:
    """Which (key, row) pairs of whole cells the diagonal hides; None where it hides nothing."""
    if not problem.causal:
        return None
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    if isinstance(offset, int):
        return None if offset >= seqlen_k - 1 else behind_diagonal(seqlen_k, seqlen_q, max(offset, -seqlen_q))
    diagonal = np.arange(seqlen_q) + np.clip(offset, -seqlen_q, seqlen_k)[..., None]  # (cells, rows)
    return np.arange(seqlen_k)[:, None] > diagonal[..., None, :]


def behind_diagonal(keys: int, rows: int, offset: int) -> Array:
    """(keys, rows): key j lies behind the diagonal of row i, j > i + offset."""
    return np.greater.outer(np.arange(keys), np.arange(offset, rows + offset))


def _hidden_by_place(keys: int, rows: int, low: int | None, high: int | None) -> Array:
    """(keys, rows): key j lies outside i + low to i + high."""
    hidden = np.zeros((keys, rows), bool) if high is None else behind_diagonal(keys, rows, high)
    if low is not None:
        hidden |= np.less.outer(np.arange(keys), np.arange(low, rows + low))
    return hidden


# ------------------------------------------------------------------------------------------------ blocks of a tile


class Sight(NamedTuple):
    """A cell's rows and keys, and which of these row i sees by its place: from i + low to i + high, None: no bound.

    Its diagonal meets key i + offset.
    """

    rows: int
    keys: int
    offset: int
    low: int | None
    high: int | None


class KeyBlock(NamedTuple):
    """Keys n_begin to n_end of a tile. Of its rows only those from `first` to `last` see some, the first `cut` not all.

    They are packed together with what else begins at `panel`.
    """

    panel: int
    n_begin: int
    n_end: int
    first: int
    last: int
    cut: int


def key_blocks(m_begin: int, m_end: int, sight: Sight, block_n: int) -> list[KeyBlock]:
    """The key blocks that rows m_begin to m_end see: whole ones, and half blocks along the diagonals.

    Where there are diagonals, blocks lie on a grid of block_n, so that tiles of a cell have them in common.
    """
    _, keys, _, low, high = sight
    if low is None and high is None:
        return [KeyBlock(begin, begin, end, 0, m_end - m_begin, 0) for begin, end in even(keys, block_n)]
    begin = 0 if low is None else max(0, m_begin + low)
    end = keys if high is None else min(keys, m_end + high)  # row m_end - 1 sees keys up to m_end - 1 + high
    half, blocks = -(-block_n // 2), []
    for panel in range(begin // block_n * block_n, end, block_n):
        panel_end = min(panel + block_n, end)
        pieces: tuple[tuple[int, int], ...] = ((panel, panel_end),)
        is_end = panel_end in (panel + block_n, keys)
        if not is_end or _key_block(panel, panel, panel_end, m_begin, m_end, sight)[3:] != (0, m_end - m_begin, 0):
            pieces = (max(panel, begin), min(panel + half, end)), (max(panel + half, begin), panel_end)
        blocks += [_key_block(panel, *piece, m_begin, m_end, sight) for piece in pieces if piece[0] < piece[1]]
    return [block for block in blocks if block.first < block.last]


def _key_block(panel: int, n_begin: int, n_end: int, m_begin: int, m_end: int, sight: Sight) -> KeyBlock:
    """Which rows of a tile see which of some keys."""
    first, last, cut = 0, m_end - m_begin, 0
    if sight.high is not None:
        first = max(0, n_begin - sight.high - m_begin)
    if sight.low is not None:
        last = min(last, n_end - sight.low - m_begin)
    if sight.high is not None:  # the first row that sees the last key ends them
        cut = max(0, min(last, n_end - 1 - sight.high - m_begin) - first)
    if sight.low is not None and m_begin + last - 1 + sight.low > n_begin:
        cut = last - first  # the last rows are
    return KeyBlock(panel, n_begin, n_end, first, last, cut)


def even(length: int, block: int) -> list[tuple[int, int]]:
    """Ranges that cover `length`, as few as blocks of at most `block` allow, and about equal.

    Multiples of 256 are avoided: rows of that length fall on few cache sets, which costs BLAS 5 to 10 percent.
    """
    if length <= block:
        return [(0, length)] if length else []
    count = -(-length // block)
    size = -(-length // count) + 15 & ~15
    size = min(block, size + 16 if size % 256 == 0 else size)
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


class Workspace:
    """What a worker of either direction holds: packed keys [k 1], values v or [v 1], and the last masks."""

    def __init__(self, problem: Problem, block_n: int, one_more: int) -> None:
        accumulator = problem.accumulator
        self.base = exponential(problem)
        self.k_buffer = np.ones((block_n, problem.head_dim + 1), accumulator)
        self.v_buffer = np.ones((block_n, problem.head_dim_v + one_more), accumulator)
        self.head_dim, self.head_dim_v = problem.head_dim, problem.head_dim_v
        self.masks: dict[tuple[int, int, int | None, int | None], Array] = {}

    def load_keys(self, k: Array, v: Array) -> None:
        """Pack one block."""
        self.k, self.v = self.k_buffer[: len(k)], self.v_buffer[: len(v)]
        packed = self.k[:, : self.head_dim]
        packed[...] = k
        self.v[:, : self.head_dim_v] = v
        self.longest = longest(packed)

    def kept_by_place(self, block: KeyBlock, m_begin: int, sight: Sight) -> Array | None:
        """(keys, cut): which pairs of a block's cut rows their place keeps; mostly the same as some time ago."""
        if not block.cut:
            return None
        step = m_begin + block.first - block.n_begin
        low, high = (None if bound is None else bound + step for bound in (sight.low, sight.high))
        shape = block.n_end - block.n_begin, block.cut, low, high
        if shape not in self.masks:
            if len(self.masks) == 4:
                self.masks.clear()
            self.masks[shape] = kept_bits(~_hidden_by_place(*shape), self.k_buffer.dtype)
        return self.masks[shape]

    def exponentiate(self, x: Array, below: float) -> None:
        """exp in place of logarithms that lie above -below, by Cauchy and Schwarz; NaN is no bound."""
        if below < -self.base.floor:
            self.base.exp(x, out=x)
        else:
            exponentiate(self.base, x)


def kept_bits(seen: Array, dtype: np.dtype) -> Array:
    """All bits set where a pair is seen, none elsewhere, in integers as wide as the accumulator.

    They select without a branch for each pair, whatever it holds: 2 to 40 times as fast as copyto with ``where``.
    """
    return np.negative(seen.view(np.int8), dtype=BITS[dtype])


BITS: dict[np.dtype, Any] = {np.dtype(np.float32): np.dtype(np.int32), np.dtype(np.float64): np.dtype(np.int64)}


def select(x: Array, kept: Array | None) -> None:
    """0 in place of what is not kept in the first columns of x, as many as there are of ``kept``."""
    if kept is not None:
        bits = x.view(kept.dtype)[:, : kept.shape[1]]
        np.bitwise_and(bits, kept, out=bits)


def bury(x: Array, kept: Array | None) -> None:
    """-inf in place of what `select` would clear."""
    if kept is not None:
        select(x, kept)
        lowest = np.asarray(-np.inf, x.dtype).view(kept.dtype)
        bits = x.view(kept.dtype)[:, : kept.shape[1]]
        np.bitwise_or(bits, np.bitwise_and(~kept, lowest), out=bits)


def longest(x: Array) -> float:
    """The largest length of a row of x."""
    return math.sqrt(np.einsum("md,md->m", x, x).max())


def transpose(x: Array, out: Array) -> None:
    """out = x^T, in pieces that stay in the first cache."""
    for i in range(0, len(x), 64):
        out[:, i : i + 64] = x[i : i + 64].T


def front(buffer: Array, *shape: int) -> Array:
    """The beginning of a flat buffer as a contiguous array."""
    return buffer[: math.prod(shape)].reshape(shape)

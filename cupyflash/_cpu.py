"""The CPU path: blocked online softmax on NumPy and BLAS, forward and backward.

One tile is block_m query rows against block_n keys. Its logits live transposed, keys down and queries across,
so that maxima and sums over keys run along memory rows (three times as fast in NumPy as sums within rows):

    forward, a tile of rows, for each block of keys      backward, the same loop
      p^T      = exp([k 1] [q -row_max]^T)                 p^T  = exp([k 1] [q -lse]^T)
      row_sum += sum over keys of p^T                      dv  += p^T dout
      acc_o   += (p^T)^T v                                 ds^T = p^T * ([v 1] [dout -delta]^T)
                                                           dk  += ds^T q,  dq += (ds^T)^T k

What a row subtracts rides along as one more column of the product, so it costs no pass over the tile. exp is exp2
where NumPy has it vectorised, and scale * log2(e) is folded into q when its block is packed. q, k, v, dout are
packed block by block into contiguous arrays of the accumulator, so the bits of a result do not depend on the
strides of its inputs; neither do they on batch or heads, as every cell (batch entry and head) is computed alone.

Laws of the forward. row_max is the largest of some logits that the row sees: of the first PROBE keys where all rows
see those, of the first block with a visible key elsewhere. It is raised, and the row's sums are rescaled, only when
a block's sum exceeds LIMIT: p may grow as large as LIMIT, which costs no accuracy and saves the search for maxima.
Until a row has seen a key, its row_max and its sums are 0; after that its row_sum is about 1 or more, because p is
exp(0) where the maximum was found. Hidden logits are discarded by selection.

Laws of the backward. dk and dv of one kv head are summed in float32 (float64) in one order: batch entries and heads
in C order, query tiles within them, whatever the number of workers. Tiles run at the same time, but a tile adds to
a range of keys only after every tile before it in that order is through with it.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from ._arrays import ArraySpec
from ._problem import Problem
from ._workers import check_variable, run, worker_count

Array = Any  # numpy.ndarray
Index = tuple[Any, ...]

PROBE = 16  # keys whose largest logit is a row's first row_max
LIMIT = 2.0**24  # of a row's sum over one block; sums of v overflow float32 where |v| > 2**(127 - 24) / Sk
CHUNK = 2**15  # numbers that the one-block path makes at a time in one thread: 128 KiB of float32
FEW = 2**17  # the same in each of several threads, who take turns with the interpreter; fewer logits take no threads
MANY = 2**18  # the logits and their gradients that the backward makes at a time: 1 MiB of float32, half of a common L2
# OpenBLAS computes a product of at most this volume (a matrix-vector product of this size) in one thread anyway.
SINGLE_THREAD_GEMM = 2**18
SINGLE_THREAD_GEMV = 2**13


class Exponential(NamedTuple):
    """exp and log in the base that NumPy computes fastest, and what turns natural logarithms into it."""

    exp: Any
    log: Any
    per_nat: float  # log(e) in this base
    # exp(floor) is just a normal number; below, NumPy is 10 to 300 times slower (subnormals). Of no axes, in the dtype.
    floor: Array


def _exponential(dtype: type) -> Exponential:
    """Base 2, unless NumPy has vector code on this machine for exp and none for exp2 (x86 without AVX-512)."""
    octaves = float(np.finfo(dtype).minexp)
    if _vectorised("exp", dtype) and not _vectorised("exp2", dtype):
        return Exponential(np.exp, np.log, 1.0, np.asarray(math.ceil(octaves * math.log(2)), dtype))
    return Exponential(np.exp2, np.log2, math.log2(math.e), np.asarray(octaves, dtype))


def _vectorised(name: str, dtype: type) -> bool:
    if name == "exp2" and sys.platform != "linux":
        return False  # vector code for exp2 is Intel's SVML, which NumPy links on Linux only
    try:
        from numpy.lib.introspect import opt_func_info  # NumPy 2

        targets = opt_func_info(func_name=f"^{name}$", signature=np.dtype(dtype).name)
    except (ImportError, AttributeError):
        return True
    return any("baseline" not in kind["current"] for kinds in targets.values() for kind in kinds.values())


EXPONENTIALS = {np.dtype(t): _exponential(t) for t in (np.float32, np.float64)}


# ---------------------------------------------------------------------------------------------------------- tiles


# (backward, causal, bytes of the accumulator): query rows, keys. The remarks are speeds relative to torch's kernel
# in CPU time of one thread, d = 64, S = 2048 (float64: 1024), on an AVX-512 Xeon that others used too.
TILES = {
    (False, False, 4): (832, 256),  # 0.87; 1040 x 256 0.86, 512 x 512 0.86, 688 x 352 0.85, 464 x 512 0.85
    (False, True, 4): (1040, 256),  # 0.85; 512 x 256 0.85, 1040 x 320 0.84, 688 x 256 0.83, 1040 x 512 0.78
    (True, False, 4): (688, 256),  # 0.81; 464 x 352 0.80, 336 x 352 0.77, 256 x 256 0.76
    (True, True, 4): (688, 256),  # 0.85; 464 x 352 0.82, 336 x 352 0.81, 256 x 256 0.80
    (False, False, 8): (688, 176),  # 0.75; 832 x 128 0.73, 464 x 256 0.72, 240 x 256 0.70
    (False, True, 8): (688, 176),  # not tried against others
    (True, False, 8): (464, 256),  # 0.74; 688 x 128 0.73, 240 x 352 0.72, 240 x 256 0.70
    (True, True, 8): (464, 256),  # not tried against others
}
FEW_ROWS = 256, 1024  # up to so many rows, so many keys: the 20 us of a block's Python need work to hide behind
SHORT_CAUSAL = 128, 256  # above the one and up to the other: halves of keys are 1.2 times as fast as one block


def tile(problem: Problem, backward: bool) -> tuple[int, int]:
    """Query rows and keys of a tile: a function of dtype, one cell's shape and options, never of batch or heads."""
    block_m, block_n = TILES[backward, problem.causal, problem.accumulator.itemsize]
    if problem.causal and SHORT_CAUSAL[0] < problem.seqlen_k <= SHORT_CAUSAL[1]:
        return block_m, SHORT_CAUSAL[0]
    return block_m, FEW_ROWS[1] if problem.seqlen_q <= FEW_ROWS[0] else block_n


# ---------------------------------------------------------------------------------------------------- entry points


def forward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    beside: dict[str, Array],
    out: Array,
    lse: Array | None,
    block_m: int,
    block_n: int,
) -> Small | None:
    """Write out, and lse unless it is None; all arrays canonical, (*leading, heads, rows, columns).

    ``beside`` holds what `_options` names, and "q_offsets" where each entry has its own.

    Returns what calls with arrays of the same layout can run again, where that is worth it.
    """
    check_variable()
    cells, size = _prepared(problem, block_m, block_n)
    if size is _Size.EMPTY:
        out[...] = 0
        if lse is not None:
            lse[...] = -np.inf
        return None
    if problem.q_offset is None:
        cells = _Cells(problem, beside["q_offsets"])
    if cells.group > 1:
        q, k, v, out = cells.rows(q), cells.keys(k), cells.keys(v), cells.rows(out)
        lse = None if lse is None else cells.row_values(lse)
    if size is _Size.ONE_CHUNK:
        packed = all(_is_packed(x, problem.accumulator) for x in (q, k, v, out))
        compute = _OneBlockForward(problem, keeps=False, packed=packed)
        with np.errstate(all="ignore"):
            compute(q, k, v, cells.q_offset, out, lse)
        if cells.group > 1 or not problem.comes_canonical or problem.q_offset is None:
            return None
        return Small(compute, problem.q_offset)
    call = _ForwardCall(cells, q, k, v, out, lse, block_m, block_n)
    if size is _Size.BLOCKED:
        run(lambda: _ForwardWorker(call), call.tasks())
    elif size is _Size.FEW_CHUNKS:
        worker = call.chunk_worker()
        with np.errstate(all="ignore"):
            for chunk in _chunks(cells.shape, _weight(problem), CHUNK):
                worker(chunk)
    else:
        run(call.chunk_worker, list(_chunks(cells.shape, _weight(problem), FEW)))
    return None


def backward(
    problem: Problem,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dlse: Array | None,
    beside: dict[str, Array],
    gradients: dict[str, Array],
    block_m: int,
    block_n: int,
) -> None:
    """Write the gradients that are given: "dq", "dk", "dv"; canonical, in their inputs' own shapes."""
    check_variable()
    if 0 in (problem.seqlen_k, problem.seqlen_q, problem.batch):
        for gradient in gradients.values():
            gradient[...] = 0
        return
    cells = _Cells(problem, beside.get("q_offsets"))
    call = _BackwardCall(
        cells,
        *(cells.rows(dout), cells.rows(q), cells.keys(k), cells.keys(v), cells.rows(out), cells.row_values(lse)),
        dlse=None if dlse is None else cells.row_values(dlse),
        gradients={
            name: side(gradients[name])
            for name, side in (("dq", cells.rows), ("dk", cells.keys), ("dv", cells.keys)) if name in gradients
        },
        block_m=min(block_m, problem.seqlen_q),
        block_n=min(block_n, problem.seqlen_k),
    )  # fmt: skip
    if problem.seqlen_q > block_m or problem.seqlen_k > block_n:
        run(lambda: _BackwardWorker(call), call.tasks(), call.fail)
        return
    chunks = call.chunks()
    if len(chunks) == 1 and _is_single_threaded(problem):
        with np.errstate(all="ignore"):
            call.one_block(chunks[0])
    else:
        run(lambda: call.one_block, chunks)


# ---------------------------------------------------------------------------------------------------------- cells


class _Cells:
    """The grid of independent problems: leading axes, then heads, or (kv head, query head of its group).

    With groups, k and v broadcast along the last axis, exactly as they may along leading axes.
    """

    def __init__(self, problem: Problem, q_offset: Array | None) -> None:
        self.problem = problem
        self.group = problem.num_heads // problem.num_heads_k
        heads = (problem.num_heads,) if self.group == 1 else (problem.num_heads_k, self.group)
        self.shape = problem.batch_shape + heads
        self.q_offset: Any = problem.q_offset
        if problem.q_offset is None and q_offset is not None:
            self.q_offset = q_offset.reshape(q_offset.shape + (1,) * len(heads))

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

    def offset(self, index: Index) -> Any:
        """The diagonal's offset in a cell (an int), or in a slice of cells (an array)."""
        if self.problem.q_offset is not None:
            return self.problem.q_offset
        part = _at(self.q_offset, index, 0)
        return int(part) if part.ndim == 0 else part


def _at(x: Array, index: Index, core: int) -> Array:
    """x[index], where x may lack leading axes or have length 1 along them; its last `core` axes are kept."""
    return x[_own(x, index, core)]


def _own(x: Array, index: Index, core: int) -> Index:
    """The index of the element of x, or the slice, that broadcasting puts at `index`."""
    lead = x.ndim - core
    return tuple(
        i if n > 1 else slice(None) if isinstance(i, slice) else 0
        for i, n in zip(index[len(index) - lead :], x.shape, strict=False)
    )


def _chunks(shape: Sequence[int], weight: int, most: int) -> Iterator[Index]:
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


class _Size(Enum):
    """How the forward goes about a problem."""

    EMPTY = auto()
    ONE_CHUNK = auto()  # one chunk holds all cells, and BLAS uses one thread for each, limited or not
    FEW_CHUNKS = auto()  # too few for threads to pay
    CHUNKS = auto()  # one block holds each cell
    BLOCKED = auto()


@lru_cache(maxsize=4096)
def _prepared(problem: Problem, block_m: int, block_n: int) -> tuple[_Cells, _Size]:
    """What a forward need not find out again; the cells lack the offsets of an array."""
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    logits = problem.batch * problem.num_heads * seqlen_q * seqlen_k
    if 0 in (seqlen_q, seqlen_k, problem.batch):
        size = _Size.EMPTY
    elif seqlen_q > block_m or seqlen_k > block_n:
        size = _Size.BLOCKED
    else:
        weight = problem.batch * problem.num_heads * _weight(problem)
        size = _Size.ONE_CHUNK if weight <= CHUNK else _Size.FEW_CHUNKS
        if logits > FEW or not _is_single_threaded(problem):
            size = _Size.CHUNKS
    return _Cells(problem, None), size


def _weight(problem: Problem) -> int:
    """Numbers of a cell in the larger one of the arrays that the one-block forward makes: scaled q, and logits."""
    return problem.seqlen_q * max(problem.seqlen_k, problem.head_dim)


def _is_single_threaded(problem: Problem) -> bool:
    """Whether BLAS computes each product, and the sums over keys, in one thread without being told to."""
    sizes = (problem.seqlen_q, problem.seqlen_k, problem.head_dim, problem.head_dim_v)
    logits = sizes[0] * sizes[1]
    volume = logits * max(sizes[2:])
    return logits <= SINGLE_THREAD_GEMV and volume <= (SINGLE_THREAD_GEMV if min(sizes) == 1 else SINGLE_THREAD_GEMM)


# ------------------------------------------------------------------------------------------------ one-block forward


class _OneBlockForward:
    """All keys of any number of cells at once, without packing what is packed already.

    It keeps its memory from call to call, unless several threads may call it; ``packed`` says that q, k, v and out are
    known to need no packing.
    """

    def __init__(self, problem: Problem, keeps: bool = True, packed: bool = False) -> None:
        self.problem, self.keeps, self.packed = problem, keeps, packed
        self.accumulator, self.base = problem.accumulator, EXPONENTIALS[problem.accumulator]
        with np.errstate(all="ignore"):  # it may overflow, as products with it may
            self.factor = np.asarray(problem.scale * self.base.per_nat).astype(self.accumulator)
        self.ones = _ones(problem.seqlen_k, self.accumulator)
        self.raises = problem.seqlen_q * problem.seqlen_k > 64  # fewer subnormals cost less than to raise them
        self.fewer_weights = problem.seqlen_k <= problem.head_dim_v  # than values: divide what there is less of
        self.shapes: Any = None
        self.q: Array = None
        self.p_t: Array = None

    def __call__(self, q: Array, k: Array, v: Array, offset: Any, out: Array | None, lse: Array | None) -> Array:
        """Out of cells side by side, which may be broadcast along leading axes; None asks for a new array."""
        problem, accumulator, base = self.problem, self.accumulator, self.base
        if self.keeps:
            if self.shapes != (q.shape, k.shape):  # chunks of one shape share their memory
                self.shapes, self.q, self.p_t = (q.shape, k.shape), None, None
            q = self.q = np.multiply(q, self.factor, out=self.q, dtype=accumulator, order="C")
        elif self.packed:
            q = np.multiply(q, self.factor)
        else:
            q = np.multiply(q, self.factor, dtype=accumulator, order="C")
        if not self.packed:
            k, v = _packed(k, accumulator), _packed(v, accumulator)
        p_t = np.matmul(k, q.swapaxes(-1, -2), out=self.p_t)  # (cells, keys, rows): logits
        if self.keeps:
            self.p_t = p_t
        hidden = _hidden(problem, offset) if problem.causal else None
        if problem.seqlen_k == 1 and hidden is None:
            return self._one_key(p_t, v, out, lse)
        if hidden is not None:  # with offsets of its own, every cell, even where q and k are broadcast
            p_t = np.where(hidden, accumulator.type(-np.inf), p_t)
        row_max = np.maximum.reduce(p_t, -2, keepdims=True)
        np.subtract(p_t, row_max, p_t)
        if self.raises:
            _exponentiate(base, p_t)
        else:
            base.exp(p_t, p_t)
        if hidden is not None:
            np.copyto(p_t, 0, where=hidden)
        some_empty = not row_max.item(row_max.argmin()) > -np.inf  # NaN, which comes first, may hide a row without keys
        if some_empty:
            np.copyto(p_t, 0, where=row_max == -np.inf)
        row_sum = np.matmul(self.ones, p_t)
        if lse is not None:
            log_sum = base.log(row_sum)
            log_sum += row_max  # -inf + -inf in empty rows
            np.divide(log_sum[..., 0, :], base.per_nat, out=lse)
        if some_empty:
            row_sum[row_sum == 0] = 1
        if self.fewer_weights:
            np.divide(p_t, row_sum, p_t)
        acc_o = np.matmul(p_t.swapaxes(-1, -2), v, out=out if self.packed or _is_packed(out, accumulator) else None)
        if not self.fewer_weights:
            acc_o /= row_sum.swapaxes(-1, -2)
        if out is None or acc_o is out:
            return acc_o
        out[...] = acc_o
        return out

    def _one_key(self, logits: Array, v: Array, out: Array | None, lse: Array | None) -> Array:
        """A single visible key has weight 1, unless its logit is -inf, which counts as masked, or NaN or +inf."""
        no_key = logits == -np.inf if not logits.item(logits.argmin()) > -np.inf else None
        nothing = np.subtract(logits, logits)  # 0, or NaN
        out = np.add(v, nothing.swapaxes(-1, -2), out=out)
        if lse is not None:
            logits += nothing
            np.divide(logits[..., 0, :], self.base.per_nat, out=lse)
        if no_key is not None:
            np.copyto(out, 0, where=no_key.swapaxes(-1, -2))
            if lse is not None:
                np.copyto(lse, -np.inf, where=no_key[..., 0, :])
        return out


@dataclass(frozen=True)
class Small:
    """A forward of one chunk, ready for calls of one signature, from any thread."""

    compute: _OneBlockForward
    offset: int
    results: tuple[ArraySpec, ...] = ()  # out, and lse where it is wanted

    def run(self, tensors: dict[str, Array]) -> dict[str, Array]:
        """All tensors of the call, out and lse among them."""
        if len(self.results) > 1 or not self.compute.packed:  # else the last product makes out
            for name, shape, dtype in self.results:
                tensors[name] = np.empty(shape, dtype)
        q, k, v, out, lse = tensors["q"], tensors["k"], tensors["v"], tensors.get("out"), tensors.get("lse")
        with np.errstate(all="ignore"):
            tensors["out"] = self.compute(q, k, v, self.offset, out, lse)
        return tensors


def _exponentiate(base: Exponential, x: Array) -> None:
    """exp in place; what underflows becomes the smallest normal number, which no sum of a softmax can feel."""
    np.maximum(x, base.floor, out=x)
    base.exp(x, x)


def _ones(count: int, dtype: np.dtype) -> Array:
    """A row of ones: a product with it is the fastest sum over keys."""
    ones = ONES[dtype]
    return ones[:, :count] if count <= ones.shape[1] else np.ones((1, count), dtype)


ONES = {dtype: np.ones((1, 1024), dtype) for dtype in EXPONENTIALS}


def _packed(x: Array, dtype: np.dtype) -> Array:
    """x as BLAS always gets it."""
    return x if _is_packed(x, dtype) else np.array(x, dtype, order="C")


def _is_packed(x: Array, dtype: np.dtype) -> bool:
    """Whether each matrix of x is contiguous, aligned, of the accumulator's type.

    NumPy's own flag ignores the strides of axes of length 1, but not so its choice between BLAS and loops.
    """
    itemsize = dtype.itemsize
    return x.dtype == dtype and x.strides[-2:] == (x.shape[-1] * itemsize, itemsize) and bool(x.flags.aligned)


def _hidden(problem: Problem, offset: Any) -> Array | None:
    """Which (key, row) pairs of whole cells the diagonal hides; None where it hides nothing."""
    if not problem.causal:
        return None
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    if isinstance(offset, int):
        return None if offset >= seqlen_k - 1 else _behind_diagonal(seqlen_k, seqlen_q, max(offset, -seqlen_q))
    diagonal = np.arange(seqlen_q) + np.clip(offset, -seqlen_q, seqlen_k)[..., None]  # (cells, rows)
    return np.arange(seqlen_k)[:, None] > diagonal[..., None, :]


def _behind_diagonal(keys: int, rows: int, offset: int) -> Array:
    """(keys, rows): key j lies behind the diagonal of row i, j > i + offset."""
    return np.greater.outer(np.arange(keys), np.arange(offset, rows + offset))


# ------------------------------------------------------------------------------------------------ blocks of a tile


class _KeyBlock(NamedTuple):
    """Keys n_begin to n_end of a tile; rows before `first` see none of them, the next `cut` rows not all.

    They are packed together with what else begins at `panel`.
    """

    panel: int
    n_begin: int
    n_end: int
    first: int = 0
    cut: int = 0


def _key_blocks(m_begin: int, m_end: int, offset: int | None, seqlen_k: int, block_n: int) -> list[_KeyBlock]:
    """The key blocks that rows m_begin to m_end see: whole ones, then half blocks along the diagonal.

    Causal ones lie on a grid of block_n, so that tiles of a cell have them in common.
    """
    if offset is None:
        return [_KeyBlock(begin, begin, end) for begin, end in _even(seqlen_k, block_n)]
    end = max(0, min(seqlen_k, m_end + offset))  # row m_end - 1 sees keys up to m_end - 1 + offset
    full = max(0, min(end, m_begin + offset + 1))
    whole = full if full == seqlen_k else full // block_n * block_n
    blocks = [_KeyBlock(n, n, min(n + block_n, whole)) for n in range(0, whole, block_n)]
    half = -(-block_n // 2)
    for panel, shift in product(range(whole, end, block_n), (0, half)):
        n_begin, n_end = panel + shift, min(panel + (shift + half if shift == 0 else block_n), end)
        if n_begin >= n_end:
            continue
        first = max(0, n_begin - offset - m_begin)
        last_cut = min(m_end, n_end - 1 - offset)  # the first row that sees the whole block
        blocks.append(_KeyBlock(panel, n_begin, n_end, first, max(0, last_cut - m_begin - first)))
    return blocks


def _even(length: int, block: int) -> list[tuple[int, int]]:
    """Ranges that cover `length`, as few as blocks of at most `block` allow, and about equal.

    Multiples of 256 are avoided: rows of that length fall on few cache sets, which costs BLAS 5 to 10 percent.
    """
    if length <= block:
        return [(0, length)] if length else []
    count = -(-length // block)
    size = -(-length // count) + 15 & ~15
    size = min(block, size + 16 if size % 256 == 0 else size)
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


class _Workspace:
    """What a worker of either direction holds: packed keys [k 1], values v or [v 1], and the last masks."""

    def __init__(self, problem: Problem, block_n: int, one_more: int) -> None:
        accumulator = problem.accumulator
        self.base = EXPONENTIALS[accumulator]
        self.k_buffer = np.ones((block_n, problem.head_dim + 1), accumulator)
        self.v_buffer = np.ones((block_n, problem.head_dim_v + one_more), accumulator)
        self.head_dim, self.head_dim_v = problem.head_dim, problem.head_dim_v
        self.masks: dict[tuple[int, int, int], Array] = {}

    def load_keys(self, k: Array, v: Array) -> None:
        """Pack one block."""
        self.k, self.v = self.k_buffer[: len(k)], self.v_buffer[: len(v)]
        packed = self.k[:, : self.head_dim]
        packed[...] = k
        self.v[:, : self.head_dim_v] = v
        self.longest = _longest(packed)

    def hidden(self, block: _KeyBlock, m_begin: int, offset: int | None) -> Array | None:
        """(keys, cut): which pairs of a block's cut rows the diagonal hides; mostly the same as some time ago."""
        if not block.cut or offset is None:
            return None
        shape = (block.n_end - block.n_begin, block.cut, m_begin + block.first + offset - block.n_begin)
        if shape not in self.masks:
            if len(self.masks) == 4:
                self.masks.clear()
            self.masks[shape] = _behind_diagonal(*shape)
        return self.masks[shape]

    def exponentiate(self, x: Array, below: float) -> None:
        """exp in place of logarithms that lie above -below, by Cauchy and Schwarz; NaN is no bound."""
        if below < -self.base.floor:
            self.base.exp(x, out=x)
        else:
            _exponentiate(self.base, x)


def _longest(x: Array) -> float:
    """The largest length of a row of x."""
    return math.sqrt(np.einsum("md,md->m", x, x).max())


def _transpose(x: Array, out: Array) -> None:
    """out = x^T, in pieces that stay in the first cache."""
    for i in range(0, len(x), 64):
        out[:, i : i + 64] = x[i : i + 64].T


def _part(buffer: Array, *shape: int) -> Array:
    """The beginning of a flat buffer as a contiguous array."""
    return buffer[: math.prod(shape)].reshape(shape)


# ------------------------------------------------------------------------------------------------- blocked forward


class _Tile(NamedTuple):
    """Rows m_begin to m_end of a cell, which is `lead` followed by `last`."""

    last: int
    m_begin: int
    m_end: int


class _ForwardTask(NamedTuple):
    """Tiles that read the same key blocks, so that these are packed once."""

    lead: Index
    tiles: tuple[_Tile, ...]


class _ForwardCall(NamedTuple):
    """What the workers of one call share."""

    cells: _Cells
    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array | None
    block_m: int
    block_n: int

    def chunk_worker(self) -> Callable[[Index], None]:
        """A worker for slices of the grid of cells, each of which takes one block."""
        compute = _OneBlockForward(self.cells.problem)

        def worker(index: Index) -> None:
            q, k, v, out = (_at(x, index, 2) for x in (self.q, self.k, self.v, self.out))
            compute(q, k, v, self.cells.offset(index), out, None if self.lse is None else _at(self.lse, index, 1))

        return worker

    def most(self, rows: int) -> int:
        """The tiles of a task, by their rows: a worker keeps q and sums of all of them, which 1.25 MiB shall hold."""
        problem = self.cells.problem
        row = (problem.head_dim + problem.head_dim_v + 4) * problem.accumulator.itemsize
        return max(1, min(4, 5 * 2**18 // (row * rows)))

    def tasks(self) -> list[_ForwardTask]:
        """Tasks of many tiles, then of fewer, the last ones long before short, so that all workers end together.

        Who computes a tile changes none of its bits.
        """
        *outer, inner = self.cells.shape
        blocks = _even(self.cells.problem.seqlen_q, self.block_m)[::-1]
        shared = all(x.ndim < 3 or x.shape[-3] == 1 for x in (self.k, self.v))  # by the heads of a group
        lasts = [range(inner)] if shared else [range(i, i + 1) for i in range(inner)]
        left, most, workers = math.prod(self.cells.shape) * len(blocks), self.most(blocks[-1][1]), worker_count()
        tasks = []
        for lead, heads in product(np.ndindex(*outer), lasts):
            tiles = tuple(_Tile(last, *block) for block, last in product(blocks, heads))
            while tiles:
                count = max(1, min(most, len(tiles), left // workers))
                tasks.append(_ForwardTask(lead, tiles[:count]))
                tiles, left = tiles[count:], left - count
        return sorted(tasks, key=lambda task: (-len(task.tiles), -task.tiles[0].m_end))


class _Rows:
    """One tile's query rows: [q -row_max]^T, acc_o, row_sum."""

    def __init__(self, problem: Problem, block_m: int) -> None:
        accumulator = problem.accumulator
        self.base = EXPONENTIALS[accumulator]
        self.scale = problem.scale * self.base.per_nat
        self.packed_buffer = np.empty((block_m, problem.head_dim), accumulator)
        self.q_buffer = np.empty((problem.head_dim + 1) * block_m, accumulator)
        self.acc_buffer = np.empty((block_m, problem.head_dim_v), accumulator)
        self.sum_buffer = np.empty(block_m, accumulator)

    def load(self, q: Array) -> None:
        """Begin with rows that have seen no key."""
        count, head_dim = q.shape
        packed = self.packed_buffer[:count]
        np.multiply(q, self.scale, out=packed, dtype=packed.dtype)
        self.longest = _longest(packed)
        self.q_t = _part(self.q_buffer, head_dim + 1, count)
        _transpose(packed, self.q_t[:-1])
        self.acc_o, self.row_sum = self.acc_buffer[:count], self.sum_buffer[:count]
        self.q_t[-1], self.acc_o[...], self.row_sum[...] = 0, 0, 0
        self.unseen: Array | None = np.ones(count, bool)  # rows without a row_max; None: there are none
        self.highest = 0.0  # the largest |row_max|

    def guess_maximum(self, k: Array) -> None:
        """Take row_max from a few keys that every row sees, for the rows whose logits there are finite."""
        top = np.maximum.reduce(np.matmul(k, self.q_t), axis=0)
        found = np.isfinite(top)
        self.unseen = None if found.all() else ~found
        if self.unseen is not None:
            top[self.unseen] = 0
        np.negative(top, out=self.q_t[-1])
        self.highest = float(np.abs(top).max())

    def raise_maximum(self, s_t: Array, first: int, rising: Array) -> Array | None:
        """Move row_max of the rows marked `rising` to where this block has it, and rescale their sums.

        Returns which rows have no logit but -inf here, None if there are none: their weights are 0, not exp(floor).
        """
        top = np.maximum.reduce(s_t, axis=0)
        step = np.where(rising & (top > -np.inf), top, 0)  # a row that sees nothing finite stays at 0
        s_t -= step
        self.q_t[-1, first:] -= step
        fall = self.base.exp(-np.maximum(step, 0))  # sums of rows whose maximum falls are 0
        self.row_sum[first:] *= fall
        self.acc_o[first:] *= fall[:, None]
        self.highest = float(np.abs(self.q_t[-1]).max())
        nothing = top == -np.inf
        return nothing if nothing.any() else None

    def add(self, first: int, block_sum: Array, values: Array) -> None:
        """Add a block's sums to the rows from `first` on; rows with a sum have seen a key."""
        row_sum, acc_o = (self.row_sum[first:], self.acc_o[first:]) if first else (self.row_sum, self.acc_o)
        np.add(row_sum, block_sum, out=row_sum)
        np.add(acc_o, values, out=acc_o)
        if self.unseen is not None:
            self.unseen[first:] &= block_sum == 0
            if not self.unseen.any():
                self.unseen = None

    def store(self, out: Array, lse: Array | None) -> None:
        """Divide once, round once."""
        if lse is not None:
            log_sum = self.base.log(self.row_sum, dtype=np.float64) - self.q_t[-1]
            lse[...] = log_sum / self.base.per_nat
        self.row_sum[self.row_sum == 0] = 1  # rows that see no key
        row_sum = self.row_sum[:, None]
        if out.dtype == self.acc_o.dtype:
            np.divide(self.acc_o, row_sum, out=out)
        else:
            out[...] = np.divide(self.acc_o, row_sum, out=self.acc_o)


class _ForwardWorker(_Workspace):
    """One thread's workspace and loop."""

    def __init__(self, call: _ForwardCall) -> None:
        problem, self.call = call.cells.problem, call
        block_m, block_n = min(call.block_m, problem.seqlen_q), min(call.block_n, problem.seqlen_k)
        super().__init__(problem, block_n, one_more=0)
        self.scores = np.empty(block_n * block_m, problem.accumulator)
        self.values = np.empty((block_m, problem.head_dim_v), problem.accumulator)
        self.rows: list[_Rows] = []
        self.block_m = block_m

    def __call__(self, task: _ForwardTask) -> None:
        call, problem = self.call, self.call.cells.problem
        while len(self.rows) < len(task.tiles):
            self.rows.append(_Rows(problem, self.block_m))
        first_cell = (*task.lead, task.tiles[0].last)
        k, v = _at(call.k, first_cell, 2), _at(call.v, first_cell, 2)
        offset = call.cells.offset(first_cell) if problem.causal else None
        steps: dict[int, list[tuple[_Rows, int, _KeyBlock]]] = {}
        for rows, (last, m_begin, m_end) in zip(self.rows, task.tiles, strict=False):
            rows.load(_at(call.q, (*task.lead, last), 2)[m_begin:m_end])
            for block in _key_blocks(m_begin, m_end, offset, problem.seqlen_k, call.block_n):
                steps.setdefault(block.panel, []).append((rows, m_begin, block))
        for panel, tiles in sorted(steps.items()):
            end = max(block.n_end for _, _, block in tiles)
            self.load_keys(k[panel:end], v[panel:end])
            for rows, m_begin, block in tiles:
                if block.n_begin == block.first == block.cut == 0:
                    rows.guess_maximum(self.k[:PROBE])
                keys = slice(block.n_begin - panel, block.n_end - panel)
                self.absorb(rows, keys, block.first, self.hidden(block, m_begin, offset))
        for rows, (last, m_begin, m_end) in zip(self.rows, task.tiles, strict=False):
            cell = (*task.lead, last)
            lse = None if call.lse is None else _at(call.lse, cell, 1)[m_begin:m_end]
            rows.store(_at(call.out, cell, 2)[m_begin:m_end], lse)

    def absorb(self, rows: _Rows, keys: slice, first: int, hidden: Array | None) -> None:
        """Take some of the loaded keys into the sums of the rows from `first` on.

        A row whose sum exceeds LIMIT begins the block again with its maximum raised; what the others do does not
        depend on it.
        """
        k, v, q_t = self.k[keys], self.v[keys], rows.q_t[:, first:]
        count = q_t.shape[1]
        p_t = self.scores[: len(k) * count].reshape(-1, count)
        rising = None if rows.unseen is None else rows.unseen[first:]
        nothing = None
        while True:
            np.matmul(k, q_t, out=p_t)  # logits less row_max
            if rising is not None:
                if hidden is not None:
                    np.copyto(p_t[:, : hidden.shape[1]], -np.inf, where=hidden)
                nothing = rows.raise_maximum(p_t, first, rising)
            block_sum = self.weigh(rows, p_t, hidden, nothing)
            if block_sum.item(block_sum.argmax()) <= LIMIT:  # NaN would be the one that is found
                break
            over = block_sum > LIMIT
            if rising is not None:
                over &= ~rising
            if not over.any():  # NaN and inf stay what they are
                break
            rising = over if rising is None else rising | over
        rows.add(first, block_sum, np.matmul(p_t.T, v, out=self.values[:count]))

    def weigh(self, rows: _Rows, p_t: Array, hidden: Array | None, nothing: Array | None) -> Array:
        """p^T in place of its logarithm; its sums over keys."""
        self.exponentiate(p_t, rows.longest * self.longest + rows.highest)
        if hidden is not None:
            np.copyto(p_t[:, : hidden.shape[1]], 0, where=hidden)
        if nothing is not None:
            np.copyto(p_t, 0, where=nothing)
        return np.matmul(_ones(len(p_t), p_t.dtype), p_t)[0]


# -------------------------------------------------------------------------------------------------------- backward


class _BackwardCall:
    """What the workers of one call share."""

    def __init__(
        self,
        cells: _Cells,
        dout: Array,
        q: Array,
        k: Array,
        v: Array,
        out: Array,
        lse: Array,
        dlse: Array | None,
        gradients: dict[str, Array],
        block_m: int,
        block_n: int,
    ) -> None:
        self.cells, self.problem = cells, cells.problem
        self.dout, self.q, self.k, self.v, self.out, self.lse, self.dlse = dout, q, k, v, out, lse, dlse
        self.gradients, self.block_m, self.block_n = gradients, block_m, block_n
        self.base = EXPONENTIALS[self.problem.accumulator]
        self.moved, self.failed = threading.Condition(), False
        self.summed = [  # axes along which some gradient is a sum
            axis for axis, n in enumerate(cells.shape) if n > 1 and any(map(self._lacks(axis), gradients.values()))
        ]
        self.sums = {name for name, x in gradients.items() if any(self._lacks(axis)(x) for axis in self.summed)}
        self.chain_shape = tuple(1 if axis in self.summed else n for axis, n in enumerate(cells.shape))

    def fail(self) -> None:
        """Wake the tiles that wait for one that will not come."""
        with self.moved:
            self.failed = True
            self.moved.notify_all()

    def _lacks(self, axis: int) -> Callable[[Array], bool]:
        """Whether an array is broadcast along an axis of the grid of cells that is longer than 1."""
        from_end = len(self.cells.shape) - axis + 2  # rows and columns follow
        return lambda x: x.ndim < from_end or x.shape[-from_end] == 1

    def cells_of(self, chain: Index) -> Iterator[Index]:
        """The cells of a chain, or of a slice of chains, in C order: those that add to the same gradients."""
        for summed in product(*(range(self.cells.shape[axis]) for axis in self.summed)):
            cell = list(chain)
            for axis, i in zip(self.summed, summed, strict=True):
                cell[axis] = slice(i, i + 1) if isinstance(cell[axis], slice) else i
            yield tuple(cell)

    # ------------------------------------------------------------------------------------------------- one block

    def chunks(self) -> list[Index]:
        """Slices of the grid of chains."""
        return list(_chunks(self.chain_shape, 2 * self.problem.seqlen_q * self.problem.seqlen_k, MANY))

    def one_block(self, chains: Index) -> None:
        """The gradients of a slice of chains: side by side, but the cells of each one after another."""
        totals: dict[tuple[str, Any], Array] = {}
        for cell in self.cells_of(chains):
            for name, part in self.one_block_cell(cell).items():
                own = _own(self.gradients[name], cell, 2)
                if name not in self.sums:
                    self.gradients[name][own] = part
                    continue
                key = name, tuple((i.start, i.stop) for i in own)
                totals[key] = totals[key] + part if key in totals else part
        for (name, own), total in totals.items():
            self.gradients[name][tuple(slice(*i) for i in own)] = total

    def one_block_cell(self, cell: Index) -> dict[str, Array]:
        """The gradients of one slice of cells, without sums over broadcast axes."""
        problem, base, accumulator = self.problem, self.base, self.problem.accumulator
        q = np.multiply(_at(self.q, cell, 2), problem.scale * base.per_nat, dtype=accumulator, order="C")
        k, v = (_packed(_at(x, cell, 2), accumulator) for x in (self.k, self.v))
        dout = np.array(_at(self.dout, cell, 2), accumulator, order="C")
        lse, delta, empty = self.row_values(cell, slice(None), dout)
        if empty is not None:
            q, dout[empty] = np.where(empty[..., None], 0, q), 0
        p_t = np.matmul(k, q.swapaxes(-1, -2)) - lse[..., None, :]  # (cells, keys, rows)
        _exponentiate(base, p_t)
        hidden = _hidden(problem, self.cells.offset(cell))
        if hidden is not None:
            np.copyto(p_t, 0, where=hidden)
        gradients = {"dv": np.matmul(p_t, dout)} if "dv" in self.gradients else {}
        if gradients.keys() == self.gradients.keys():
            return gradients
        ds_t = np.matmul(v, dout.swapaxes(-1, -2))
        ds_t -= delta[..., None, :]
        ds_t *= p_t
        if hidden is not None:
            np.copyto(ds_t, 0, where=hidden)
        if "dk" in self.gradients:
            gradients["dk"] = np.matmul(ds_t, q) / base.per_nat
        if "dq" in self.gradients:
            gradients["dq"] = np.matmul(ds_t.swapaxes(-1, -2), k) * problem.scale
            if empty is not None:
                gradients["dq"][empty] = 0
        return gradients

    def row_values(self, cell: Index, rows: slice, dout: Array) -> tuple[Array, Array, Array | None]:
        """lse in the base's units, delta, and which rows see no key (None: all do), whose lse and delta are 0."""
        lse = np.array(_at(self.lse, cell, 1)[..., rows], order="C")
        delta = np.add.reduce(dout * _at(self.out, cell, 2)[..., rows, :], axis=-1)
        if self.dlse is not None:
            delta -= _at(self.dlse, cell, 1)[..., rows]
        empty = lse == -np.inf
        lse *= self.base.per_nat
        if not empty.any():
            return lse, delta, None
        lse[empty], delta[empty] = 0, 0
        return lse, delta, empty

    # ---------------------------------------------------------------------------------------------------- blocked

    def tasks(self) -> list[_BackwardTask]:
        """Every tile of every chain, in the order in which a chain adds them up; causal tiles long ones first."""
        blocks = _even(self.problem.seqlen_q, self.block_m)
        tasks = []
        for index in np.ndindex(*self.chain_shape):
            chain = _Chain(self, len(blocks) * math.prod(self.cells.shape[axis] for axis in self.summed))
            tiles = product(self.cells_of(index), blocks[::-1])
            tasks += [_BackwardTask(chain, turn, cell, *block) for turn, (cell, block) in enumerate(tiles)]
        return tasks


class _BackwardTask(NamedTuple):
    """Rows m_begin to m_end of a cell, which add to their chain's sums in their turn."""

    chain: _Chain
    turn: int
    cell: Index
    m_begin: int
    m_end: int


class _Chain:
    """The sums of cells that share gradients, and whose turn it is to add to them.

    A tile goes through its keys in ascending order and says how far it is. Another one may add to keys below n_end
    when every tile before it is through with them. Tasks start in the order of their turns, so the first of those
    under way waits for nobody.
    """

    def __init__(self, call: _BackwardCall, turns: int) -> None:
        self.call = call
        self.sums: dict[tuple[str, Index], Array] = {}
        self.progress = [0] * turns  # keys that each tile is through with
        self.first = 0  # all tiles before this one have ended

    def wait(self, turn: int, n_end: int) -> None:
        """Return when every earlier tile is through with the keys before n_end."""
        call = self.call
        with call.moved:
            while not call.failed and min(self.progress[self.first : turn], default=n_end) < n_end:
                call.moved.wait()
            if call.failed:
                raise _Abandoned

    def advance(self, turn: int, n_end: int) -> None:
        """Say that this tile is through with the keys before n_end; the last one to end stores the sums."""
        with self.call.moved:
            self.progress[turn] = n_end
            while self.first < len(self.progress) and self.progress[self.first] == _END:
                self.first += 1
            self.call.moved.notify_all()
            ended = n_end == _END and self.first == len(self.progress)
        if ended:
            self.store()

    def sum(self, name: str, cell: Index) -> Array:
        """The sums of one gradient array that a cell adds to."""
        gradient = self.call.gradients[name]
        key = name, _own(gradient, cell, 2)
        with self.call.moved:
            if key not in self.sums:
                self.sums[key] = np.zeros(gradient.shape[-2:], self.call.problem.accumulator)
            return self.sums[key]

    def store(self) -> None:
        """Round the sums once, and let go of them."""
        factors = {"dq": self.call.problem.scale, "dk": 1 / self.call.base.per_nat, "dv": 1.0}
        for (name, own), total in self.sums.items():
            total *= factors[name]
            self.call.gradients[name][own] = total
        self.sums.clear()


_END = sys.maxsize


class _Abandoned(Exception):
    """A tile that this one waits for will not come: the call has failed elsewhere."""


class _BackwardWorker(_Workspace):
    """One thread's workspace and loop."""

    def __init__(self, call: _BackwardCall) -> None:
        problem, self.call = call.problem, call
        super().__init__(problem, call.block_n, one_more=1)
        block_m, block_n, d, dv = call.block_m, call.block_n, problem.head_dim, problem.head_dim_v
        accumulator = problem.accumulator
        self.q_buffer, self.dout_buffer = np.empty((block_m, d), accumulator), np.empty((block_m, dv), accumulator)
        self.q_t_buffer = np.empty((d + 1) * block_m, accumulator)
        self.dout_t_buffer = np.empty((dv + 1) * block_m, accumulator)
        self.p_buffer, self.ds_buffer = (np.empty(block_n * block_m, accumulator) for _ in range(2))
        self.dk_buffer, self.dv_buffer = np.empty((block_n, d), accumulator), np.empty((block_n, dv), accumulator)
        self.dq_buffer, self.dq_part = (np.empty((block_m, d), accumulator) for _ in range(2))

    def __call__(self, task: _BackwardTask) -> None:
        call, (chain, turn, cell, m_begin, m_end) = self.call, task
        k, v = _at(call.k, cell, 2), _at(call.v, cell, 2)
        self.load_rows(cell, slice(m_begin, m_end))
        sums: dict[str, Array] = {x: chain.sum(x, cell) for x in ("dk", "dv") if x in call.gradients}
        offset = call.cells.offset(cell) if call.problem.causal else None
        for block in _key_blocks(m_begin, m_end, offset, call.problem.seqlen_k, call.block_n):
            keys = slice(block.n_begin, block.n_end)
            self.load_keys(k[keys], v[keys])
            parts = self.differentiate(block.first, self.hidden(block, m_begin, offset))
            if parts:
                chain.wait(turn, block.n_end)
                for name, part in parts.items():
                    sums[name][keys] += part
                chain.advance(turn, block.n_end)
        self.store_rows(task)
        chain.advance(turn, _END)

    def load_rows(self, cell: Index, rows: slice) -> None:
        """Pack [q -lse]^T and [dout -delta]^T, and both once more as they are; rows that see no key become 0."""
        call, count = self.call, rows.stop - rows.start
        self.q, self.dout = self.q_buffer[:count], self.dout_buffer[:count]
        scale = call.problem.scale * self.base.per_nat
        np.multiply(_at(call.q, cell, 2)[rows], scale, out=self.q, dtype=self.q.dtype)
        self.dout[...] = _at(call.dout, cell, 2)[rows]
        lse, delta, self.empty = call.row_values(cell, rows, self.dout)
        if self.empty is not None:
            self.q[self.empty], self.dout[self.empty] = 0, 0
        self.q_t = _part(self.q_t_buffer, self.head_dim + 1, count)
        self.dout_t = _part(self.dout_t_buffer, self.head_dim_v + 1, count)
        for x, x_t, less in ((self.q, self.q_t, lse), (self.dout, self.dout_t, delta)):
            _transpose(x, x_t[:-1])
            np.negative(less, out=x_t[-1])
        self.longest_q, self.highest = _longest(self.q), float(np.abs(lse).max())
        self.dq = self.dq_buffer[:count]
        self.dq[...] = 0

    def differentiate(self, first: int, hidden: Array | None) -> dict[str, Array]:
        """What the rows from `first` on and the loaded keys add to dk and dv; dq is added to at once."""
        names, q_t = self.call.gradients.keys(), self.q_t[:, first:]
        keys, rows = len(self.k), q_t.shape[1]
        parts = {}
        p_t = np.matmul(self.k, q_t, out=_part(self.p_buffer, keys, rows))
        self.exponentiate(p_t, self.longest_q * self.longest + self.highest)
        if hidden is not None:
            np.copyto(p_t[:, : hidden.shape[1]], 0, where=hidden)
        if "dv" in names:
            parts["dv"] = np.matmul(p_t, self.dout[first:], out=self.dv_buffer[:keys])
        if names == {"dv"}:
            return parts
        ds_t = np.matmul(self.v, self.dout_t[:, first:], out=_part(self.ds_buffer, keys, rows))
        ds_t *= p_t
        if hidden is not None:
            np.copyto(ds_t[:, : hidden.shape[1]], 0, where=hidden)
        if "dk" in names:
            parts["dk"] = np.matmul(ds_t, self.q[first:], out=self.dk_buffer[:keys])
        if "dq" in names:
            self.dq[first:] += np.matmul(ds_t.T, self.k[:, :-1], out=self.dq_part[:rows])
        return parts

    def store_rows(self, task: _BackwardTask) -> None:
        """Write dq, or add it up in turn where q is broadcast."""
        call, rows = self.call, slice(task.m_begin, task.m_end)
        if "dq" not in call.gradients:
            return
        if self.empty is not None:
            self.dq[self.empty] = 0
        if "dq" in call.sums:
            task.chain.wait(task.turn, _END)
            task.chain.sum("dq", task.cell)[rows] += self.dq
            return
        self.dq *= call.problem.scale
        _at(call.gradients["dq"], task.cell, 2)[rows] = self.dq

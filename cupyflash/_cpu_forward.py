"""The CPU path's forward: all keys at once where they are few, block by block otherwise. The laws stand in `_cpu`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from ._arrays import ArraySpec
from ._cpu_blocks import (
    EXPONENTIALS,
    Array,
    Cells,
    Index,
    KeyBlock,
    Sight,
    Workspace,
    at,
    beyond_diagonal,
    bury,
    even,
    exponential,
    exponentiate,
    front,
    is_packed,
    key_blocks,
    longest,
    ones_row,
    pack,
    select,
    transpose,
)
from ._cpu_logits import CellArrays, Logits, Pairs
from ._problem import Problem
from ._workers import worker_count

PROBE = 16  # keys whose largest logit is a row's first row_max
LIMIT = 2.0**24  # of a row's sum over one block; sums of v overflow float32 where |v| > 2**(127 - 24) / Sk

# ------------------------------------------------------------------------------------------------ one-block forward


class OneBlockForward:
    """All keys of any number of cells at once, without packing what is packed already.

    It keeps its memory from call to call, unless several threads may call it; ``packed`` says that q, k, v and out are
    known to need no packing.
    """

    def __init__(self, problem: Problem, keeps: bool = True, packed: bool = False) -> None:
        self.problem, self.keeps, self.packed = problem, keeps, packed
        self.accumulator, self.base = problem.accumulator, EXPONENTIALS[problem.accumulator]
        with np.errstate(all="ignore"):  # it may overflow, as products with it may
            self.factor = np.asarray(problem.scale * self.base.per_nat).astype(self.accumulator)
        self.ones = ones_row(problem.seqlen_k, self.accumulator)
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
            k, v = pack(k, accumulator), pack(v, accumulator)
        p_t = np.matmul(k, q.swapaxes(-1, -2), out=self.p_t)  # (cells, keys, rows): logits
        if self.keeps:
            self.p_t = p_t
        hidden = beyond_diagonal(problem, offset) if problem.causal else None
        if problem.seqlen_k == 1 and hidden is None:
            return self._one_key(p_t, v, out, lse)
        if hidden is not None:  # with offsets of its own, every cell, even where q and k are broadcast
            p_t = np.where(hidden, accumulator.type(-np.inf), p_t)
        row_max = np.maximum.reduce(p_t, -2, keepdims=True)
        np.subtract(p_t, row_max, p_t)
        if self.raises:
            exponentiate(base, p_t)
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
        acc_o = np.matmul(p_t.swapaxes(-1, -2), v, out=out if self.packed or is_packed(out, accumulator) else None)
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

    compute: OneBlockForward
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


class ForwardCall(NamedTuple):
    """What the workers of one call share."""

    cells: Cells
    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array | None
    block_m: int
    block_n: int
    logits: Logits | None = None  # where there are options

    def chunk_worker(self) -> Callable[[Index], None]:
        """A worker for slices of the grid of cells, each of which takes one block."""
        compute = OneBlockForward(self.cells.problem)

        def worker(index: Index) -> None:
            q, k, v, out = (at(x, index, 2) for x in (self.q, self.k, self.v, self.out))
            compute(q, k, v, self.cells.offset(index), out, None if self.lse is None else at(self.lse, index, 1))

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
        blocks = even(self.cells.problem.seqlen_q, self.block_m)[::-1]
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
    """One tile's query rows: [q -row_max]^T, acc_o, row_sum; and what its cell reads of the options' arrays."""

    cell: CellArrays

    def __init__(self, problem: Problem, block_m: int) -> None:
        accumulator = problem.accumulator
        self.base = exponential(problem)
        self.scale = problem.scale * self.base.per_nat
        self.packed_buffer = np.empty((block_m, problem.head_dim), accumulator)
        self.q_buffer = np.empty((problem.head_dim + 1) * block_m, accumulator)
        self.acc_buffer = np.empty((block_m, problem.head_dim_v), accumulator)
        self.sum_buffer = np.empty(block_m, accumulator)

    def load(self, q: Array) -> None:
        """Begin with rows that have seen no key."""
        self.count, head_dim = q.shape
        count = self.count
        packed = self.packed_buffer[:count]
        np.multiply(q, self.scale, out=packed, dtype=packed.dtype)
        self.longest = longest(packed)
        self.q_t = front(self.q_buffer, head_dim + 1, count)
        transpose(packed, self.q_t[:-1])
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

    def raise_maximum(self, s_t: Array, part: slice, rising: Array) -> Array | None:
        """Move row_max of the rows marked `rising` to where this block has it, and rescale their sums.

        Returns which rows have no logit but -inf here, None if there are none: their weights are 0, not exp(floor).
        """
        top = np.maximum.reduce(s_t, axis=0)
        step = np.where(rising & (top > -np.inf), top, 0)  # a row that sees nothing finite stays at 0
        if self.unseen is None:
            np.maximum(step, 0, out=step)
        else:  # only the first maximum may lie below 0
            np.maximum(step, 0, out=step, where=~self.unseen[part])
        s_t -= step
        self.q_t[-1, part] -= step
        fall = self.base.exp(-np.maximum(step, 0))  # sums of rows whose maximum falls are 0
        self.row_sum[part] *= fall
        self.acc_o[part] *= fall[:, None]
        self.highest = float(np.abs(self.q_t[-1]).max())
        nothing = top == -np.inf
        return nothing if nothing.any() else None

    def add(self, part: slice, block_sum: Array, values: Array) -> None:
        """Add a block's sums to some of the rows; rows with a sum have seen a key."""
        row_sum, acc_o = self.row_sum[part], self.acc_o[part]
        np.add(row_sum, block_sum, out=row_sum)
        np.add(acc_o, values, out=acc_o)
        if self.unseen is not None:
            self.unseen[part] &= block_sum == 0
            if not self.unseen.any():
                self.unseen = None

    def store(self, out: Array, lse: Array | None, sink: float | None = None, keep_probability: float = 1.0) -> None:
        """Divide once, round once; ``keep_probability`` is that dropout keeps a weight."""
        if lse is not None:
            log_sum = self.base.log(self.row_sum, dtype=np.float64) - self.q_t[-1]
            log_sum /= self.base.per_nat
            lse[...] = log_sum if sink is None else np.logaddexp(log_sum, sink)
        if sink is not None:  # one more term, which has no value
            self.row_sum += self.base.exp(sink * self.base.per_nat + self.q_t[-1].astype(np.float64))
        if keep_probability != 1:
            self.row_sum *= keep_probability
        self.row_sum[self.row_sum == 0] = 1  # rows that see no key
        row_sum = self.row_sum[:, None]
        if out.dtype == self.acc_o.dtype:
            np.divide(self.acc_o, row_sum, out=out)
        else:
            out[...] = np.divide(self.acc_o, row_sum, out=self.acc_o)


class ForwardWorker(Workspace):
    """One thread's workspace and loop."""

    def __init__(self, call: ForwardCall) -> None:
        problem, self.call = call.cells.problem, call
        block_m, block_n = min(call.block_m, problem.seqlen_q), min(call.block_n, problem.seqlen_k)
        super().__init__(problem, block_n, one_more=0)
        self.scores = np.empty(block_n * block_m, problem.accumulator)
        self.values = np.empty((block_m, problem.head_dim_v), problem.accumulator)
        self.rows: list[_Rows] = []
        self.block_m = block_m
        self.pairs = None if call.logits is None else Pairs(call.logits, block_m, block_n)
        options = problem.options
        self.adds, self.keep_probability = options.changes_logits, 1 - options.dropout
        self.guesses = not options.changes_logits and not options.hides_pairs

    def __call__(self, task: _ForwardTask) -> None:
        call = self.call
        first_cell = (*task.lead, task.tiles[0].last)
        k, v = at(call.k, first_cell, 2), at(call.v, first_cell, 2)
        sight = call.cells.sight(first_cell)
        steps: dict[int, list[tuple[_Rows, int, KeyBlock]]] = {}
        for rows, m_begin, block in self.load_rows(task, sight):
            steps.setdefault(block.panel, []).append((rows, m_begin, block))
        for panel, tiles in sorted(steps.items()):
            end, loaded = max(block.n_end for _, _, block in tiles), False
            for rows, m_begin, block in tiles:
                kept, part = self.kept_by_place(block, m_begin, sight), slice(block.first, block.last)
                if self.pairs is not None:
                    seen = self.pairs.look(rows.cell, m_begin, part, slice(block.n_begin, block.n_end), kept)
                    if seen is None:
                        continue
                    kept, part = self.pairs.kept, seen
                if not loaded:
                    self.load_keys(k[panel:end], v[panel:end])
                    loaded = True
                keys = slice(block.n_begin - panel, block.n_end - panel)
                if self.guesses and block.n_begin == block.first == block.cut == 0 and block.last == rows.count:
                    rows.guess_maximum(self.k[keys][:PROBE])
                self.absorb(rows, keys, part, kept)
        self.store_rows(task, sight)

    def load_rows(self, task: _ForwardTask, sight: Sight) -> Iterator[tuple[_Rows, int, KeyBlock]]:
        """Begin with the rows of a task's tiles; yield the key blocks that each tile sees."""
        call = self.call
        while len(self.rows) < len(task.tiles):
            self.rows.append(_Rows(call.cells.problem, self.block_m))
        for rows, (last, m_begin, m_end) in zip(self.rows, task.tiles, strict=False):
            cell, m_end = (*task.lead, last), min(m_end, sight.rows)
            if m_end <= m_begin:
                continue
            rows.load(at(call.q, cell, 2)[m_begin:m_end])
            if call.logits is not None:
                rows.cell = call.logits.cell(cell)
            for block in key_blocks(m_begin, m_end, sight, call.block_n):
                yield rows, m_begin, block

    def store_rows(self, task: _ForwardTask, sight: Sight) -> None:
        """Write out and lse, also of rows that the cell has not."""
        call = self.call
        for rows, (last, m_begin, m_end) in zip(self.rows, task.tiles, strict=False):
            cell, end = (*task.lead, last), max(m_begin, min(m_end, sight.rows))
            out, lse = at(call.out, cell, 2), None if call.lse is None else at(call.lse, cell, 1)
            if end > m_begin:
                sink = None if call.logits is None else rows.cell.sink
                rows.store(out[m_begin:end], None if lse is None else lse[m_begin:end], sink, self.keep_probability)
            if end < m_end:
                out[end:m_end] = 0
                if lse is not None:
                    lse[end:m_end] = -np.inf

    def absorb(self, rows: _Rows, keys: slice, part: slice, kept: Array | None) -> None:
        """Take some of the loaded keys into the sums of some of the rows.

        A row whose sum exceeds LIMIT begins the block again with its maximum raised; what the others do does not
        depend on it.
        """
        k, v, q_t = self.k[keys], self.v[keys], rows.q_t[:, part]
        count = q_t.shape[1]
        p_t = self.scores[: len(k) * count].reshape(-1, count)
        rising = None if rows.unseen is None else rows.unseen[part]
        if self.adds:  # what is added to logits may rise from block to block
            rising = np.ones(count, bool)
        nothing = None
        while True:
            self.score(k, q_t, p_t)
            if self.pairs is not None:
                kept = self.pairs.kept  # a score function may hide some
            if rising is not None:
                bury(p_t, kept)
                nothing = rows.raise_maximum(p_t, part, rising)
            block_sum = self.weigh(rows, p_t, kept, nothing)
            if block_sum.item(block_sum.argmax()) <= LIMIT:  # NaN would be the one that is found
                break
            over = block_sum > LIMIT
            if rising is not None:
                over &= ~rising
            if not over.any():  # NaN and inf stay what they are
                break
            rising = over if rising is None else rising | over
        if self.pairs is not None:
            select(p_t, self.pairs.undropped())
        rows.add(part, block_sum, np.matmul(p_t.T, v, out=self.values[:count]))

    def score(self, k: Array, q_t: Array, p_t: Array) -> None:
        """Logits less row_max, which the product carries unless something is done to it first."""
        if not self.adds or self.pairs is None:
            np.matmul(k, q_t, out=p_t)
            return
        np.matmul(k[:, :-1], q_t[:-1], out=p_t)
        self.pairs.finish(p_t)
        p_t += q_t[-1]

    def weigh(self, rows: _Rows, p_t: Array, kept: Array | None, nothing: Array | None) -> Array:
        """p^T in place of its logarithm; its sums over keys."""
        self.exponentiate(p_t, math.inf if self.adds else rows.longest * self.longest + rows.highest)
        select(p_t, kept)
        if nothing is not None:
            np.copyto(p_t, 0, where=nothing)
        return np.matmul(ones_row(len(p_t), p_t.dtype), p_t)[0]

"""The CPU path's backward: chains of tiles that add to the same sums in one order. The laws stand in `_cpu`."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from ._cpu_blocks import (
    Array,
    Cells,
    Index,
    Sight,
    Workspace,
    at,
    beyond_diagonal,
    chunks,
    even,
    exponential,
    exponentiate,
    front,
    key_blocks,
    longest,
    own_index,
    pack,
    select,
    transpose,
)
from ._cpu_logits import CellArrays, Logits, Pairs, Slopes
from ._cpu_score import ScoreGradients, Sums, add_use

MANY = 2**18  # the logits and their gradients that the backward makes at a time: 1 MiB of float32, half of a common L2

# -------------------------------------------------------------------------------------------------------- backward


class BackwardCall:
    """What the workers of one call share."""

    def __init__(
        self,
        cells: Cells,
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
        logits: Logits | None = None,
    ) -> None:
        self.cells, self.problem = cells, cells.problem
        self.dout, self.q, self.k, self.v, self.out, self.lse, self.dlse = dout, q, k, v, out, lse, dlse
        self.gradients, self.block_m, self.block_n, self.logits = gradients, block_m, block_n, logits
        self.sink_terms: Array | None = None  # (cells, rows), where dsinks is asked for
        self.score: ScoreGradients | None = None  # where dscore_args is asked for
        self.base = exponential(self.problem)
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
        return list(chunks(self.chain_shape, 2 * self.problem.seqlen_q * self.problem.seqlen_k, MANY))

    def one_block(self, chains: Index) -> None:
        """The gradients of a slice of chains: side by side, but the cells of each one after another."""
        totals: dict[tuple[str, Any], Array] = {}
        for cell in self.cells_of(chains):
            for name, part in self.one_block_cell(cell).items():
                own = own_index(self.gradients[name], cell, 2)
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
        q = np.multiply(at(self.q, cell, 2), problem.scale * base.per_nat, dtype=accumulator, order="C")
        k, v = (pack(at(x, cell, 2), accumulator) for x in (self.k, self.v))
        dout = np.array(at(self.dout, cell, 2), accumulator, order="C")
        lse, delta, empty = self.row_values(cell, slice(None), dout)
        if empty is not None:
            q, dout[empty] = np.where(empty[..., None], 0, q), 0
        p_t = np.matmul(k, q.swapaxes(-1, -2)) - lse[..., None, :]  # (cells, keys, rows)
        exponentiate(base, p_t)
        hidden = beyond_diagonal(problem, self.cells.offset(cell))
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
        lse = np.array(at(self.lse, cell, 1)[..., rows], order="C")
        delta = np.add.reduce(dout * at(self.out, cell, 2)[..., rows, :], axis=-1)
        if self.dlse is not None:
            delta -= at(self.dlse, cell, 1)[..., rows]
        empty = lse == -np.inf
        lse *= self.base.per_nat
        if not empty.any():
            return lse, delta, None
        lse[empty], delta[empty] = 0, 0
        return lse, delta, empty

    # ---------------------------------------------------------------------------------------------------- blocked

    def tasks(self) -> list[_BackwardTask]:
        """Every tile of every chain, in the order in which a chain adds them up; causal tiles long ones first."""
        blocks = even(self.problem.seqlen_q, self.block_m)
        tasks: list[_BackwardTask] = []
        for index in np.ndindex(*self.chain_shape):
            chain = _Chain(self, len(blocks) * math.prod(self.cells.shape[axis] for axis in self.summed))
            tiles = product(self.cells_of(index), blocks[::-1])
            for turn, (cell, block) in enumerate(tiles):
                tasks.append(_BackwardTask(chain, turn, cell, *block, len(tasks)))
        return tasks


class _BackwardTask(NamedTuple):
    """Rows m_begin to m_end of a cell, which add to their chain's sums in their turn."""

    chain: _Chain
    turn: int
    cell: Index
    m_begin: int
    m_end: int
    number: int  # among all of the call


class _Chain:
    """The sums of cells that share gradients, and whose turn it is to add to them.

    A tile goes through its keys in ascending order and says how far it is. Another one may add to keys below n_end
    when every tile before it is through with them. Tasks start in the order of their turns, so the first of those
    under way waits for nobody.
    """

    def __init__(self, call: BackwardCall, turns: int) -> None:
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
        """The sums of one gradient array that a cell adds to; those of bias lie as tiles do, rows along memory."""
        gradient = self.call.gradients[name]
        key = name, own_index(gradient, cell, 2)
        with self.call.moved:
            if key not in self.sums:
                shape, accumulator = gradient.shape[-2:], self.call.problem.accumulator
                as_tiles = name == "dbias"
                self.sums[key] = np.zeros(shape[::-1], accumulator).T if as_tiles else np.zeros(shape, accumulator)
            return self.sums[key]

    def store(self) -> None:
        """Round the sums once, and let go of them."""
        factors = {"dq": self.call.problem.scale, "dk": 1 / self.call.base.per_nat}
        for (name, own), total in self.sums.items():
            total *= factors.get(name, 1.0)
            self.call.gradients[name][own] = total
        self.sums.clear()


_END = sys.maxsize


class _Abandoned(Exception):
    """A tile that this one waits for will not come: the call has failed elsewhere."""


class BackwardWorker(Workspace):
    """One thread's workspace and loop."""

    cell: CellArrays  # where there are options
    score_sums: Sums  # of the tile, where dscore_args is asked for

    def __init__(self, call: BackwardCall) -> None:
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
        self.pairs = None if call.logits is None else Pairs(call.logits, block_m, block_n)
        self.adds, self.keep_probability = problem.options.changes_logits, 1 - problem.options.dropout
        self.dbias = _BiasGradient(call) if "dbias" in call.gradients else None
        if self.pairs is not None and call.score is not None:
            self.pairs.uses = call.score.uses

    def __call__(self, task: _BackwardTask) -> None:
        call, (chain, turn, cell, m_begin, m_end, number) = self.call, task
        sight = call.cells.sight(cell)
        self.count = max(0, min(m_end, sight.rows) - m_begin)
        sums: dict[str, Array] = {x: chain.sum(x, cell) for x in ("dk", "dv") if x in call.gradients}
        if self.dbias is not None:
            self.dbias.begin(task, self.count)
        if self.count:
            self.load_rows(cell, slice(m_begin, m_begin + self.count))
        if call.score is not None:
            self.score_sums = call.score.begin()
        if self.count and (call.gradients or call.score is not None):
            self.add_keys(task, sight, sums)
        self.store_rows(task)
        if call.score is not None:
            call.score.end(number, self.score_sums)
        chain.advance(turn, _END)

    def add_keys(self, task: _BackwardTask, sight: Sight, sums: dict[str, Array]) -> None:
        """Go through the keys that the loaded rows see, and add to the chain's sums in turn."""
        call, (chain, turn, cell, m_begin, *_) = self.call, task
        k, v = at(call.k, cell, 2), at(call.v, cell, 2)
        blocks = key_blocks(m_begin, m_begin + self.count, sight, call.block_n)
        if blocks and blocks[0].n_begin > 0:
            chain.advance(turn, blocks[0].n_begin)
        for block in blocks:
            keys, part = slice(block.n_begin, block.n_end), slice(block.first, block.last)
            kept = self.kept_by_place(block, m_begin, sight)
            if self.pairs is not None:
                seen = self.pairs.look(self.cell, m_begin, part, keys, kept)
                if seen is None:
                    continue
                kept, part = self.pairs.kept, seen
            self.load_keys(k[keys], v[keys])
            parts = self.differentiate(part, kept)
            if parts:
                chain.wait(turn, block.n_end)
                for name, term in parts.items():
                    if name == "dbias" and self.dbias is not None:
                        self.dbias.add(term, slice(m_begin + part.start, m_begin + part.stop), keys)
                    else:
                        sums[name][keys] += term
                chain.advance(turn, block.n_end)

    def load_rows(self, cell: Index, rows: slice) -> None:
        """Pack [q -lse]^T and [dout -delta]^T, and both once more as they are; rows that see no key become 0."""
        call, count = self.call, rows.stop - rows.start
        self.q, self.dout = self.q_buffer[:count], self.dout_buffer[:count]
        scale = call.problem.scale * self.base.per_nat
        np.multiply(at(call.q, cell, 2)[rows], scale, out=self.q, dtype=self.q.dtype)
        self.dout[...] = at(call.dout, cell, 2)[rows]
        lse, delta, self.empty = call.row_values(cell, rows, self.dout)
        if call.logits is not None:
            self.load_options(call.logits, cell, rows, lse, delta)
        if self.empty is not None:
            self.q[self.empty], self.dout[self.empty] = 0, 0
        self.q_t = front(self.q_t_buffer, self.head_dim + 1, count)
        self.dout_t = front(self.dout_t_buffer, self.head_dim_v + 1, count)
        for x, x_t, less in ((self.q, self.q_t, lse), (self.dout, self.dout_t, delta)):
            transpose(x, x_t[:-1])
            np.negative(less, out=x_t[-1])
        self.longest_q, self.highest = longest(self.q), float(np.abs(lse).max())
        self.dq = self.dq_buffer[:count]
        self.dq[...] = 0

    def load_options(self, logits: Logits, cell: Index, rows: slice, lse: Array, delta: Array) -> None:
        """What a cell reads; the sink's part of its gradient; weights that dropout keeps grow, in dout."""
        self.cell = logits.cell(cell)
        if self.call.sink_terms is not None and self.cell.sink is not None:
            weight = self.base.exp(self.cell.sink * self.base.per_nat - lse)
            np.multiply(weight, -delta, out=self.call.sink_terms[cell][rows])
        if self.keep_probability != 1:
            self.dout *= 1 / self.keep_probability

    def weigh(self, part: slice, kept: Array | None, slope: bool) -> tuple[Array, Array | None, Slopes]:
        """p^T of some rows and the loaded keys, what is kept of it, and, if asked for, the slopes of the logits."""
        q_t, slopes = self.q_t[:, part], Slopes(None, None)
        p_t = front(self.p_buffer, len(self.k), q_t.shape[1])
        if self.adds and self.pairs is not None:
            np.matmul(self.k[:, :-1], q_t[:-1], out=p_t)
            slopes = self.pairs.finish(p_t, slope)
            if self.empty is not None and slopes.score is not None:
                self.pairs.hide(~self.empty[part])  # a function of their products, which are 0 now, may be anything
            kept = self.pairs.kept
            p_t += q_t[-1]
            exponentiate(self.base, p_t)
        else:
            np.matmul(self.k, q_t, out=p_t)
            self.exponentiate(p_t, self.longest_q * self.longest + self.highest)
        select(p_t, kept)
        return p_t, kept, slopes

    def differentiate(self, part: slice, kept: Array | None) -> dict[str, Array]:
        """What some of the rows and the loaded keys add to dk, dv and dbias; dq is added to at once."""
        names, parts = self.call.gradients.keys(), {}
        scores = self.call.score is not None
        p_t, kept, slopes = self.weigh(part, kept, slope=scores or bool({"dq", "dk", "dbias"} & names))
        keys, rows = p_t.shape
        undropped = None if self.pairs is None else self.pairs.undropped()
        if "dv" in names:
            weights = p_t if undropped is None else np.bitwise_and(p_t.view(undropped.dtype), undropped).view(p_t.dtype)
            parts["dv"] = np.matmul(weights, self.dout[part], out=self.dv_buffer[:keys])
        if names == {"dv"} and not scores:
            return parts
        ds_t, dout_t = front(self.ds_buffer, keys, rows), self.dout_t[:, part]
        if undropped is None:
            np.matmul(self.v, dout_t, out=ds_t)
        else:
            np.matmul(self.v[:, :-1], dout_t[:-1], out=ds_t)
            select(ds_t, undropped)
            ds_t += dout_t[-1]
        ds_t *= p_t
        if scores:
            self.add_uses(ds_t, kept)
        if slopes.score is not None:
            ds_t *= slopes.score
        select(ds_t, kept)
        if self.dbias is not None and (dbias := self.dbias.part(ds_t, part)) is not None:
            parts["dbias"] = dbias
        if slopes.cap is not None:
            ds_t = np.multiply(ds_t, slopes.cap, out=slopes.cap)
        if "dk" in names:
            parts["dk"] = np.matmul(ds_t, self.q[part], out=self.dk_buffer[:keys])
        if "dq" in names:
            self.dq[part] += np.matmul(ds_t.T, self.k[:, :-1], out=self.dq_part[:rows])
        return parts

    def add_uses(self, ds_t: Array, kept: Array | None) -> None:
        """What the loaded pairs add to the gradients of score_args, from what they have behind the function."""
        assert self.pairs is not None
        for use, (index, slope) in zip(self.pairs.uses, self.pairs.use_slopes, strict=True):
            terms = ds_t * slope
            select(terms, kept)
            add_use(self.score_sums[use.argument], index, terms)

    def store_rows(self, task: _BackwardTask) -> None:
        """Write dq, or add it up in turn where q is broadcast; the same with what bias has for each row."""
        if self.dbias is not None:
            self.dbias.end(task)
        if "dq" not in self.call.gradients:
            return
        chain, end = task.chain, task.m_begin + self.count
        if self.count and self.empty is not None:
            self.dq[self.empty] = 0
        if "dq" in self.call.sums:
            total = chain.sum("dq", task.cell)
            if self.count:
                chain.wait(task.turn, _END)
                total[task.m_begin : end] += self.dq
            return
        dq = at(self.call.gradients["dq"], task.cell, 2)
        dq[end : task.m_end] = 0
        if self.count:
            self.dq *= self.call.problem.scale
            dq[task.m_begin : end] = self.dq


class _BiasGradient:
    """What one tile after another adds to dbias, each element being a sum along all axes along which bias is broadcast.

    Rows that share their bias are summed up in each block. Keys that do are first summed up over the tile, as tiles
    take turns at keys; the tile adds them when it ends.
    """

    def __init__(self, call: BackwardCall) -> None:
        self.gradient = call.gradients["dbias"]
        self.one_row, self.one_key = (n == 1 for n in self.gradient.shape[-2:])
        self.alone = "dbias" not in call.sums and not self.one_row  # no two tiles add to the same element
        self.buffer = np.empty(call.block_m, call.problem.accumulator)

    def begin(self, task: _BackwardTask, count: int) -> None:
        """Begin with the first rows of a tile."""
        self.total = at(self.gradient, task.cell, 2) if self.alone else task.chain.sum("dbias", task.cell)
        self.row_sums = self.buffer[:count]
        self.row_sums[...] = 0

    def part(self, ds_t: Array, part: slice) -> Array | None:
        """What a block has for `add`, (keys, rows or 1); None where it waits for the tile's end."""
        if self.one_key:
            self.row_sums[part] += np.add.reduce(ds_t, axis=0)
            return None
        return np.add.reduce(ds_t, axis=1, keepdims=True) if self.one_row else ds_t

    def add(self, part: Array, rows: slice, keys: slice) -> None:
        """Add a block's part, in turn."""
        total = self.total.T[keys, slice(None) if self.one_row else rows]
        if self.alone:
            total[...] = part  # over 0
        else:
            total += part

    def end(self, task: _BackwardTask) -> None:
        """Add what the tile has for each row, in turn."""
        if not self.one_key or not len(self.row_sums):
            return
        rows = slice(task.m_begin, task.m_begin + len(self.row_sums))
        if self.alone:
            self.total[rows, 0] = self.row_sums
            return
        task.chain.wait(task.turn, _END)
        self.total[slice(None) if self.one_row else rows, 0] += (
            np.add.reduce(self.row_sums) if self.one_row else self.row_sums
        )

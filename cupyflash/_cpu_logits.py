"""What the options make of a block of scaled products, for the forward and the backward of the CPU path alike.

    s = softcap * tanh(scale * q.k / softcap) - slope * |diagonal - key| + bias, a function of it, hidden pairs,
    dropped weights

Blocks lie as everywhere on the CPU path: keys down, queries across. Arrays that are broadcast along queries or keys
stay one row or one column. All of it is in natural units: see `_cpu_blocks.exponential`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._cpu_blocks import Array, Cells, Index, Sight, front, kept_bits
from ._functions import args_of
from ._philox import dropped
from ._trace_terms import ArgTerm

PIECE = 32  # rows of bias and mask that are turned at a time


class Slopes(NamedTuple):
    """What a logit's gradient is multiplied by on its way back; None: by 1."""

    score: Array | None  # behind the bias
    cap: Array | None  # before it


class CellArrays(NamedTuple):
    """What one cell reads of the arrays beside q, k, v; bias and mask (rows or 1, keys or 1)."""

    sight: Sight
    batch: int  # the entry's index in the flattened leading axes
    head: int
    bias: Array | None
    mask: Array | None
    slope: float
    sink: float | None
    q_segments: Array | None
    kv_segments: Array | None


class Logits:
    """The options of one call, for all its workers."""

    def __init__(self, cells: Cells, beside: dict[str, Array]) -> None:
        self.cells, self.problem, self.options = cells, cells.problem, cells.problem.options
        self.beside = {name: _lean(x) if name in ("bias", "mask") else x for name, x in beside.items()}
        self.accumulator = self.problem.accumulator
        self.seed = int(beside["seed"]) if "seed" in beside else 0
        self.softcap = self._softcap()
        self.score_args, self.mask_args = args_of("score_args", beside), args_of("mask_args", beside)

    def _softcap(self) -> Array | None:
        """The softcap as a number that products can be divided by; None where it caps nothing.

        One whose square overflows differs from none by less than rounding, and quotients with it would underflow.
        """
        softcap, limits = self.options.softcap, np.finfo(self.accumulator)
        if softcap is None or softcap >= 2.0 ** (limits.maxexp // 2):
            return None
        return np.asarray(max(softcap, float(limits.tiny)), self.accumulator)

    def cell(self, cell: Index) -> CellArrays:
        """What one cell reads."""
        entry, head = self.cells.entry(cell)
        beside, pair = self.beside, (*entry, head)
        batch = int(np.ravel_multi_index(entry, self.problem.batch_shape)) if entry else 0
        return CellArrays(
            self.cells.sight(cell),
            batch,
            head,
            bias=beside["bias"][pair] if "bias" in beside else None,
            mask=beside["mask"][pair] if "mask" in beside else None,
            slope=float(beside["alibi_slopes"][pair]) if "alibi_slopes" in beside else 0.0,
            sink=float(beside["sinks"][pair]) if "sinks" in beside else None,
            q_segments=beside["q_segments"][entry] if "q_segments" in beside else None,
            kv_segments=beside["kv_segments"][entry] if "kv_segments" in beside else None,
        )


class Pairs:
    """The pairs of one block after another, in the hands of one worker.

    `look` comes first, then `finish` turns its scaled products into logits, as often as they are computed.

    Attributes
    ----------
    kept : integer array (keys, count), or None
        The pairs of the block's first `count` rows that are visible, as `_cpu_blocks.select` wants them; None: all.
    use_slopes : list of (index arrays, array)
        After `finish`, for each of ``uses``: the elements, and the score's slopes with respect to them, (keys, rows).
    """

    def __init__(self, logits: Logits, block_m: int, block_n: int) -> None:
        self.logits, self.accumulator = logits, logits.accumulator
        size, options = block_m * block_n, logits.options
        self.bias_buffer = np.empty(size if options.bias is not None else 0, self.accumulator)
        self.mask_buffer = np.empty(size if options.mask is not None else 0, bool)
        self.distances = np.empty(size if options.alibi_slopes is not None else 0, self.accumulator)
        self.slopes = np.empty(size if logits.softcap is not None else 0, self.accumulator)
        self.uses: tuple[ArgTerm, ...] = ()  # of score_args, whose slopes are asked for too
        self.kept: Array | None = None
        self.bias_t: Array | None = None  # (keys or 1, rows or 1)

    def look(self, cell: CellArrays, m_begin: int, part: slice, keys: slice, by_place: Array | None) -> slice | None:
        """The part of a tile's rows, from the first to the last, that see any of these keys; None if no row does.

        The tile begins at m_begin; ``by_place`` (keys, count) is what the diagonals keep of the part's first rows.
        """
        self.cell, self.keys, self.kept, self.bias_t = cell, keys, None, None
        self.rows = self._rows_of_segments(slice(m_begin + part.start, m_begin + part.stop))
        if self.rows.start == self.rows.stop:
            return None
        seen: Array | None = None  # (keys or 1, rows or 1)
        bias, function = self._bias_of_something(), self._mask_function()
        for visible in (self._inside_mask(), self._same_segment(), bias, function):
            if visible is not None:
                seen = visible if seen is None else seen & visible
        if seen is not None:
            found = np.flatnonzero(np.logical_or.reduce(seen, axis=0))
            if not found.size:
                return None
            if seen.shape[1] > 1:
                seen = self._narrow(seen, int(found[0]), int(found[-1]) + 1)
        shift = self.rows.start - m_begin - part.start
        return self._keep(seen, None if by_place is None else by_place[:, shift:], m_begin)

    def _narrow(self, seen: Array, first: int, last: int) -> Array:
        """Look at some of the rows only."""
        self.rows = slice(self.rows.start + first, self.rows.start + last)
        if self.bias_t is not None and self.bias_t.shape[1] > 1:
            self.bias_t = self.bias_t[:, first:last]
        return seen[:, first:last]

    def _keep(self, seen: Array | None, by_place: Array | None, m_begin: int) -> slice | None:
        """Set `kept`; return the rows' part of the tile."""
        keys, rows = self.keys.stop - self.keys.start, self.rows.stop - self.rows.start
        if by_place is not None:
            by_place = by_place[:, :rows]
        self.kept = by_place
        if seen is not None and not seen.all():
            self.kept = kept_bits(np.broadcast_to(seen, (keys, rows)), self.accumulator)
            if by_place is not None:
                self.kept[:, : by_place.shape[1]] &= by_place
                if not self.kept.any():
                    return None
        return slice(self.rows.start - m_begin, self.rows.stop - m_begin)

    def _rows_of_segments(self, rows: slice) -> slice:
        """The rows whose segments lie between the lowest and the highest of the keys, from the first to the last."""
        if self.cell.q_segments is None or self.cell.kv_segments is None:
            return rows
        q_ids, kv_ids = self.cell.q_segments[rows], self.cell.kv_segments[self.keys]
        found = np.flatnonzero((q_ids >= kv_ids.min()) & (q_ids <= kv_ids.max()))
        return slice(rows.start + int(found[0]), rows.start + int(found[-1]) + 1) if found.size else slice(0, 0)

    def _same_segment(self) -> Array | None:
        if self.cell.q_segments is None or self.cell.kv_segments is None:
            return None
        return np.equal.outer(self.cell.kv_segments[self.keys], self.cell.q_segments[self.rows])

    def _inside_mask(self) -> Array | None:
        if self.cell.mask is None:
            return None
        return _block(self.cell.mask, self.rows, self.keys, self.mask_buffer)

    def _bias_of_something(self) -> Array | None:
        """Load the block of bias; where it is -inf, pairs are hidden."""
        if self.cell.bias is None:
            return None
        self.bias_t = _block(self.cell.bias, self.rows, self.keys, self.bias_buffer)
        something = self.bias_t != -np.inf
        return None if something.all() else something

    def _mask_function(self) -> Array | None:
        function = self.logits.options.mask_function
        if function is None:
            return None
        return function.numpy(*self._positions(), self.logits.mask_args, self.accumulator)

    def _positions(self) -> tuple[int, int, Array, Array]:
        """Entry, head, query and key of a block's pairs, as functions get them."""
        i, j = (np.arange(part.start, part.stop, dtype=np.int32) for part in (self.rows, self.keys))
        return self.cell.batch, self.cell.head, i, j[:, None]

    def hide(self, visible: Array) -> None:
        """Keep no other pairs, (keys or 1, rows or 1), than these."""
        if visible.all():
            return
        shape = self.keys.stop - self.keys.start, self.rows.stop - self.rows.start
        before, self.kept = self.kept, kept_bits(np.broadcast_to(visible, shape), self.accumulator)
        if before is not None:
            self.kept[:, : before.shape[1]] &= before

    def finish(self, s_t: Array, differentiate: bool = False) -> Slopes:
        """Make logits of scaled products, in place; return what is not 1 of their slopes, if asked for.

        The slope of the softcap is that of the capped product: 1 - (capped / softcap)^2. A score function may hide
        pairs: `kept` knows it then.
        """
        softcap, slopes = self.logits.softcap, None
        if softcap is not None:
            np.divide(s_t, softcap, out=s_t)
            np.tanh(s_t, out=s_t)
            if differentiate:
                slopes = np.multiply(s_t, s_t, out=front(self.slopes, *s_t.shape))
                np.subtract(self.accumulator.type(1), slopes, out=slopes)
            np.multiply(s_t, softcap, out=s_t)
        if self.logits.options.alibi_slopes is not None:
            s_t += self._alibi(*s_t.shape)
        if self.bias_t is not None:
            s_t += self.bias_t
        return Slopes(self._score(s_t, differentiate), slopes)

    def _score(self, s_t: Array, differentiate: bool) -> Array | None:
        """Take logits through the score function; its slope, where it is asked for.

        A logit of -inf is hidden, before and after: what the function makes of it counts for nothing.
        """
        function, slopes = self.logits.options.score, None
        if function is None:
            return None
        pairs = (s_t, *self._positions(), self.logits.score_args)
        self.use_slopes = [function.arg_slope(use, *pairs) for use in self.uses] if differentiate else []
        scores, slopes = function.with_slope(*pairs) if differentiate else (function.numpy(*pairs), None)
        seen = (s_t != -np.inf) & (scores != -np.inf)
        s_t[...] = scores
        self.hide(seen)
        return slopes

    def _alibi(self, keys: int, rows: int) -> Array:
        """-slope * |diagonal - key|, the distances counted from the block's corner: exact as long as they are short."""
        diagonal = np.arange(rows) + (self.rows.start + self.cell.sight.offset - self.keys.start)
        distances, key = front(self.distances, keys, rows), np.arange(keys, dtype=self.accumulator)
        np.subtract(key[:, None], diagonal.astype(self.accumulator), out=distances)
        np.abs(distances, out=distances)
        return np.multiply(distances, self.accumulator.type(-self.cell.slope), out=distances)

    def undropped(self) -> Array | None:
        """(keys, rows): the pairs whose weights dropout leaves, in the form of `kept`; None: all."""
        if not self.logits.options.dropout:
            return None
        cell, logits = self.cell, self.logits
        lost = dropped(self.keys, self.rows, cell.head, cell.batch, logits.seed, logits.options.dropout)
        return kept_bits(~lost, self.accumulator)


def _lean(x: Array) -> Array:
    """An array of pairs that is broadcast along rows or keys as one row or one key."""
    return x[..., : 1 if x.strides[-2] == 0 else None, : 1 if x.strides[-1] == 0 else None]


def _block(x: Array, rows: slice, keys: slice, buffer: Array) -> Array:
    """The transpose of a block of pairs, (keys or 1, rows or 1), packed into a buffer of any type."""
    part = x[rows if x.shape[0] > 1 else slice(None), keys if x.shape[1] > 1 else slice(None)]
    packed = front(buffer, *part.shape[::-1])
    for i in range(0, len(part), PIECE):  # packed rows first: rows of large powers of 2 share few cache sets
        packed[:, i : i + PIECE] = part[i : i + PIECE].astype(packed.dtype, order="C").T
    return packed

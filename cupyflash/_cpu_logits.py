"""What the options make of a block of scaled products, for the forward and the backward of the CPU path alike.

    s = softcap * tanh(scale * q.k / softcap) - slope * |diagonal - key| + bias, hidden pairs, dropped weights

Blocks lie as everywhere on the CPU path: keys down, queries across. Arrays that are broadcast along queries or keys
stay one row or one column. All of it is in natural units: see `_cpu_blocks.exponential`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._cpu_blocks import Array, Cells, Index, Sight, front, transpose
from ._philox import dropped


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
    hidden : array (keys, count) of bool, or None
        Which pairs of the block's first `count` rows are hidden; None: none of any row.
    """

    def __init__(self, logits: Logits, block_m: int, block_n: int) -> None:
        self.logits, self.accumulator = logits, logits.accumulator
        size, options = block_m * block_n, logits.options
        self.bias_buffer = np.empty(size if options.bias is not None else 0, self.accumulator)
        self.mask_buffer = np.empty(size if options.mask is not None else 0, bool)
        self.distances = np.empty(size if options.alibi_slopes is not None else 0, self.accumulator)
        self.slopes = np.empty(size if logits.softcap is not None else 0, self.accumulator)
        self.hidden: Array | None = None
        self.bias_t: Array | None = None  # (keys or 1, rows or 1)

    def look(self, cell: CellArrays, rows: slice, keys: slice, by_place: Array | None) -> bool:
        """Whether any pair of these ranges is visible; ``by_place`` (keys, count) is what the diagonals hide."""
        self.cell, self.rows, self.keys = cell, rows, keys
        hidden: Array | None = None  # (keys or 1, rows or 1)
        for part in (self._outside_mask(), self._other_segment(), self._bias_of_nothing()):
            if part is not None:
                hidden = part if hidden is None else hidden | part
        self.hidden = by_place
        if hidden is None:
            return True
        shape = keys.stop - keys.start, rows.stop - rows.start
        if by_place is None:
            self.hidden = np.broadcast_to(hidden, shape)
        else:
            self.hidden = np.array(np.broadcast_to(hidden, shape))
            self.hidden[:, : by_place.shape[1]] |= by_place
        return not self.hidden.all()

    def _outside_mask(self) -> Array | None:
        if self.cell.mask is None:
            return None
        seen = _block(self.cell.mask, self.rows, self.keys, self.mask_buffer)
        return None if seen.all() else ~seen

    def _other_segment(self) -> Array | None:
        if self.cell.q_segments is None or self.cell.kv_segments is None:
            return None
        q_ids, kv_ids = self.cell.q_segments[self.rows], self.cell.kv_segments[self.keys]
        q_range, kv_range = ((int(ids.min()), int(ids.max())) for ids in (q_ids, kv_ids))
        if q_range[1] < kv_range[0] or kv_range[1] < q_range[0]:
            return np.ones((1, 1), bool)
        return np.not_equal.outer(kv_ids, q_ids) if q_range != kv_range or q_range[0] != q_range[1] else None

    def _bias_of_nothing(self) -> Array | None:
        """Load the block of bias; where it is -inf, pairs are hidden."""
        if self.cell.bias is None:
            return None
        self.bias_t = _block(self.cell.bias, self.rows, self.keys, self.bias_buffer)
        nothing = self.bias_t == -np.inf
        return nothing if nothing.any() else None

    def finish(self, s_t: Array, differentiate: bool = False) -> Array | None:
        """Make logits of scaled products, in place; return the slope of the softcap if asked for and if there is one.

        The slope is that of the capped product: 1 - (capped / softcap)^2.
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
        return slopes

    def _alibi(self, keys: int, rows: int) -> Array:
        """-slope * |diagonal - key|, the distances counted from the block's corner: exact as long as they are short."""
        diagonal = np.arange(rows) + (self.rows.start + self.cell.sight.offset - self.keys.start)
        distances, key = front(self.distances, keys, rows), np.arange(keys, dtype=self.accumulator)
        np.subtract(key[:, None], diagonal.astype(self.accumulator), out=distances)
        np.abs(distances, out=distances)
        return np.multiply(distances, self.accumulator.type(-self.cell.slope), out=distances)

    def dropped(self) -> Array | None:
        """(keys, rows): which weights dropout takes away; None: none."""
        if not self.logits.options.dropout:
            return None
        cell, logits = self.cell, self.logits
        return dropped(self.keys, self.rows, cell.head, cell.batch, logits.seed, logits.options.dropout)


def _lean(x: Array) -> Array:
    """An array of pairs that is broadcast along rows or keys as one row or one key."""
    return x[..., : 1 if x.strides[-2] == 0 else None, : 1 if x.strides[-1] == 0 else None]


def _block(x: Array, rows: slice, keys: slice, buffer: Array) -> Array:
    """The transpose of a block of pairs, (keys or 1, rows or 1), packed into a buffer of any type."""
    part = x[rows if x.shape[0] > 1 else slice(None), keys if x.shape[1] > 1 else slice(None)]
    packed = front(buffer, *part.shape[::-1])
    transpose(part, packed)
    return packed

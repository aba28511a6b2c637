"""Decoding on the CPU path: new rows to the cache, turned rows, and keys that lie in pages as if they lay in line."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._cpu_blocks import Array, Index
from ._decoding import Decoding


def append_and_turn(decoding: Decoding, inputs: dict[str, Array]) -> Array:
    """Write k_new and v_new, where there are any, behind each entry's rows; return q, turned where it is to be.

    ``inputs["kv_lens"]`` counts the new rows.
    """
    q, total = inputs["q"], inputs["kv_lens"]
    rows = total[:, None] - q.shape[2] + np.arange(q.shape[2])  # (batch, T): the keys that queries sit on
    turned = {name: inputs[name] for name in ("q", "k_new") if name in inputs}
    if decoding.rotary_dim:
        turned = {name: turn(x, inputs["cos"], inputs["sin"], rows, decoding) for name, x in turned.items()}
    if decoding.appends:
        for cache, new in ((inputs["k"], turned["k_new"]), (inputs["v"], inputs["v_new"])):
            by_row = new.swapaxes(1, 2)  # (batch, T, Hk, D)
            if decoding.page_size:
                pages = np.take_along_axis(inputs["page_table"], rows // decoding.page_size, axis=1)
                cache[pages, rows % decoding.page_size] = by_row
            else:
                cache[np.arange(len(q))[:, None], :, rows] = by_row
    return turned["q"]


def turn(x: Array, cos: Array, sin: Array, positions: Array, decoding: Decoding) -> Array:
    """Rows of x (batch, heads, T, D) at positions (batch, T), turned in the accumulator's type and rounded once.

    A position that does not exist belongs to a query that sees no key; it is turned anyhow.
    """
    accumulator = np.float64 if x.dtype == np.float64 else np.float32
    positions = np.clip(positions, 0, decoding.positions - 1)
    c, s = (table[positions][:, None].astype(accumulator) for table in (cos, sin))  # (batch, 1, T, pairs)
    half, width = decoding.rotary_dim // 2, decoding.rotary_dim
    first = slice(0, width, 2) if decoding.interleaved else slice(0, half)
    second = slice(1, width, 2) if decoding.interleaved else slice(half, width)
    result = np.array(x)
    a, b = x[..., first].astype(accumulator), x[..., second].astype(accumulator)
    with np.errstate(all="ignore"):
        result[..., first] = a * c - b * s
        result[..., second] = b * c + a * s
    return result


class Paged:
    """A paged cache as (batch, heads, [1,] capacity, columns), as far as `_cpu_blocks.at` needs it.

    An element of it, one head of one entry, hands out slices of rows, which it gathers.
    """

    def __init__(self, cache: Array, table: Array, group: int) -> None:
        _, page_size, heads, columns = cache.shape
        self._cache, self._table = cache, table
        between = () if group == 1 else (1,)  # the query heads that share a kv head
        self.shape = (len(table), heads, *between, table.shape[1] * page_size, columns)
        self.ndim = len(self.shape)

    def __getitem__(self, index: Index) -> Any:
        batch, head, *_ = index
        return _PagedRows(self._cache[:, :, head], self._table[batch])


class _PagedRows:
    """Rows of one head of one entry: (pages, page_size, columns) and its row of the page table."""

    def __init__(self, cache: Array, table: Array) -> None:
        self._cache, self._table = cache, table

    def __getitem__(self, rows: slice) -> Array:
        j = np.arange(rows.start, rows.stop)
        size = self._cache.shape[1]
        return self._cache[self._table[j // size], j % size]

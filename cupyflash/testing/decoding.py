"""The specification of decoding: what the cache holds afterwards, and the attention that it leads to, dense."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import bounds, reference
from .reference import Array, working_type


class Seen(NamedTuple):
    """What attention sees of a decoding call."""

    q: Array  # turned, rounded to its dtype
    k: Array  # (batch, Hk, capacity, D); 0 where an entry has no row
    v: Array
    kv_lens: Array  # with new rows


def in_line(cache: Array, page_table: Array | None, lens: Array) -> Array:
    """The rows that entries have, (batch, Hk, capacity, columns), 0 behind them."""
    if page_table is None:
        rows = np.array(cache)
    else:
        size = cache.shape[1]
        shape = (len(page_table), cache.shape[2], page_table.shape[1] * size, cache.shape[3])
        rows = np.zeros(shape, cache.dtype)
        for b, j in np.ndindex(shape[0], shape[2]):
            if j < lens[b]:
                rows[b, :, j] = cache[page_table[b, j // size], j % size]
    for b, n in enumerate(lens):
        rows[b, :, n:] = 0
    return rows


def turned(x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool) -> Array:
    """Rows of x (batch, heads, T, D), as complex numbers, times exp(i angle) of each position, in the working type."""
    work = working_type(x.dtype)
    pairs = cos.shape[1]
    y = x.astype(work)
    columns = np.arange(2 * pairs).reshape(pairs, 2) if interleaved else np.arange(2 * pairs).reshape(2, pairs).T
    clipped = np.clip(positions, 0, len(cos) - 1)
    for n, (a, b) in enumerate(columns):
        c, s = (table.astype(work)[clipped, n][:, None] for table in (cos, sin))  # (batch, 1, T)
        y[..., a], y[..., b] = c * x[..., a].astype(work) - s * x[..., b].astype(work), c * x[..., b].astype(
            work
        ) + s * x[..., a].astype(work)
    return y


def turn_limit(x: Array, cos: Array, sin: Array) -> Array:
    """How far a turned row may lie from the exact one: two products and a sum, and one rounding to x's dtype.

    A number next to the middle between two of its dtype may go to either.
    """
    work = working_type(x.dtype)
    size = abs(x.astype(work)).max(axis=-1, keepdims=True) * 2 * max(1.0, float(abs(cos).max()), float(abs(sin).max()))
    a = bounds.arithmetic(x.dtype)
    return np.asarray(4 * a.u * size + bounds.stored(size, size * 0, x.dtype, a) + a.tiny)


def seen(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    kv_lens: npt.ArrayLike,
    *,
    page_table: Array | None = None,
    k_new: Array | None = None,
    v_new: Array | None = None,
    rotary: Any = None,
) -> Seen:
    """The cache in line with its new rows behind the old ones, and turned queries."""
    batch, _, rows, _ = q.shape
    lens = np.broadcast_to(np.asarray(kv_lens, np.int64), (batch,))
    k, v = in_line(k_cache, page_table, lens), in_line(v_cache, page_table, lens)
    total = lens if k_new is None else lens + rows
    places = total[:, None] - rows + np.arange(rows)
    if rotary is not None:
        cos, sin, interleaved = rotary
        q = turned(q, cos, sin, places, interleaved).astype(q.dtype)
        if k_new is not None:
            k_new = turned(k_new, cos, sin, places, interleaved).astype(k_new.dtype)
    if k_new is not None and v_new is not None:
        for b in range(batch):
            k[b, :, lens[b] : total[b]], v[b, :, lens[b] : total[b]] = k_new[b], v_new[b]
    return Seen(q, k, v, total)


def check(
    this: Seen, out: Array, lse: Array | None, *, turned_by: Array | float = 0.0, merged: int = 1,
    p_dtype: npt.DTypeLike | None = None, p_parts: int = 1, block_n: int = bounds.SMALLEST_BLOCK, **options: Any,
) -> bounds.Report:  # fmt: skip
    """Compare results with the specification's, which sees what is in ``this``.

    Parameters
    ----------
    turned_by : float or array, broadcasts to q's rows
        How far turned queries (and keys) may lie from those in ``this``. A logit is off by at most e = |scale| sum_d
        (turned_by |k_d| + |q_d| turned_by + turned_by^2), and so out by exp(2 e) - 1 times the largest |v|, lse by e.
    merged : int
        How many partial results are merged: each rounds its lse, u (|lse| + 1), and its weight as `merging` has it.
    """
    q, k, v, lens = this
    meaning = {"causal": True, "kv_lens": lens, **options}
    chains = bounds.longest_chains(q, k, v, block_n=block_n)
    want, limit = bounds.forward_limits(
        q, k, v, out_dtype=out.dtype, chains=chains, p_dtype=p_dtype, p_parts=p_parts, **meaning
    )
    pairs = reference.pairs(q, k, v, **meaning)
    a = bounds.arithmetic(q.dtype)
    off = np.zeros(want.lse.shape, want.lse.dtype)
    if np.any(turned_by):
        by = np.broadcast_to(np.asarray(turned_by), (*want.lse.shape, 1))
        queries, keys = abs(pairs.q).sum(-1, keepdims=True), abs(pairs.k).sum(-1)[..., None, :]
        each = by * keys + queries * by.max(initial=0) + by**2 * q.shape[-1]
        off = abs(pairs.scale) * np.where(pairs.visible, each, 0).max(axis=-1, initial=0)
    if merged > 1:
        size = np.where(want.lse == -np.inf, 0, abs(want.lse))
        off = off + a.u * (2 * size + 2 * merged + 16)
    largest = abs(pairs.v).max(axis=-2, keepdims=True, initial=0)
    more = np.minimum(np.expm1(2 * off)[..., None], 2) * largest
    lse_more = np.where(want.lse == -np.inf, 0, off)
    worst = [bounds.compare("out", out, want.out, limit.out + more)]
    if lse is not None:
        worst.append(bounds.compare("lse", lse, want.lse, limit.lse + lse_more))
    return bounds.Report(tuple(worst))

"""The specification: dense attention and its gradients, one equation a line.

Everything else in this project is checked against this page. It forms every logit, so that nothing is hidden
in an algorithm, and it computes in a *working type* that is wider than what it judges: float64 for 16-bit and
float32 inputs, ``numpy.longdouble`` for float64 inputs.

Forward, for query row i of one head, with o_i = out and the sum over the keys j that row i sees:

    s_ij  = scale * q_i . k_j                        the logits
    lse_i = log sum_j exp(s_ij)                      -inf where the row sees no key
    p_ij  = exp(s_ij - lse_i)                        0 where the row sees no key
    o_i   = sum_j p_ij v_j

Backward, given the cotangents do_i = dout of o_i and dl_i = dlse of lse_i:

    delta_i = do_i . o_i - dl_i                      dl_i is not read where the row sees no key
    dp_ij   = do_i . v_j
    ds_ij   = p_ij (dp_ij - delta_i)
    dq_i    = scale * sum_j ds_ij k_j
    dk_j    = scale * sum_i ds_ij q_i                over the rows of every query head that reads k_j
    dv_j    =         sum_i p_ij do_i

`forward` and `backward` take NumPy arrays of any dtype and return arrays of the working type. ``rows=`` and
``keys=`` evaluate only the named query rows (out, lse, dq) or keys (dk, dv), in memory that grows with S: row
i of the forward needs every key but no other row, and column j of the backward, given lse, needs every row
but no other key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Index = npt.ArrayLike | None


class Forward(NamedTuple):
    """What `forward` returns: ``out`` in q's layout, ``lse`` always (..., heads, rows)."""

    out: Array
    lse: Array


class Gradients(NamedTuple):
    """What `backward` returns: each gradient in its input's shape and layout, None where not asked for."""

    dq: Array | None
    dk: Array | None
    dv: Array | None


# ------------------------------------------------------------------------------------------------ conventions


def working_type(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The type the reference computes in: wider than the accumulator of what it judges."""
    return np.dtype(np.longdouble if np.dtype(dtype) == np.float64 else np.float64)


def is_wide_enough(dtype: npt.DTypeLike) -> bool:
    """Whether the working type is wider than the accumulator (on some machines longdouble is float64)."""
    accumulator = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    return bool(np.finfo(working_type(dtype)).eps < np.finfo(accumulator).eps)


def canonical(array: Array, layout: str, work: npt.DTypeLike, index: Index = None) -> Array:
    """`array`, or positions `index` of its sequence axis, as (..., heads, seqlen, dim) in type `work`."""
    if array.ndim == 2:
        array = array[None]  # (S, D) is one head
    elif layout == "shd":
        array = array.swapaxes(-2, -3)
    return np.asarray(array if index is None else array[..., np.asarray(index), :]).astype(work)


def canonical_rows(array: Array, work: npt.DTypeLike, index: Index = None) -> Array:
    """`array` of one number a query row (lse, dlse) as (..., heads, seqlen) in the working type."""
    array = array[None] if array.ndim == 1 else array
    return np.asarray(array if index is None else array[..., np.asarray(index)]).astype(work)


def as_user(array: Array, ndim: int, layout: str) -> Array:
    """The inverse of `canonical`: (..., heads, seqlen, dim) in the layout of an array of `ndim` axes."""
    if ndim == 2:
        return array.reshape(array.shape[-2:])
    return array.swapaxes(-2, -3) if layout == "shd" else array


def sum_to(array: Array, shape: Sequence[int]) -> Array:
    """Sum over the axes along which an input of `shape` was broadcast: the transpose of broadcasting."""
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    stretched = tuple(axis for axis, length in enumerate(shape) if length == 1 != array.shape[axis])
    return np.asarray(array.sum(axis=stretched, keepdims=True))


def heads_to(array: Array, num_heads: int) -> Array:
    """Repeat kv heads: query head h reads kv head h // (Hq // Hk)."""
    return np.repeat(array, num_heads // max(array.shape[-3], 1), axis=-3)


def heads_from(array: Array, num_heads_k: int) -> Array:
    """Sum over the query heads of each kv head: the transpose of `heads_to`."""
    *batch, num_heads, seqlen, dim = array.shape
    group = num_heads // max(num_heads_k, 1)
    return np.asarray(array.reshape(*batch, num_heads_k, group, seqlen, dim).sum(axis=-3))


# -------------------------------------------------------------------------------------------------- equations


@dataclass(frozen=True)
class Pairs:
    """All pairs of the query rows i with the keys j: the matrix that only a specification may hold."""

    q: Array  # (..., Hq, rows, D)
    k: Array  # (..., Hq, keys, D), kv heads repeated
    v: Array  # (..., Hq, keys, Dv)
    scale: Any  # of the working type
    visible: Array  # broadcasts to (..., Hq, rows, keys)

    def logits(self) -> Array:
        """s_ij, -inf where row i does not see key j (by selection, so that what is masked can't spread)."""
        s = self.scale * (self.q @ self.k.swapaxes(-1, -2))
        return np.where(self.visible, s, -np.inf)

    def magnitude(self) -> Array:
        """|scale| * sum_d |q_d k_d|: what rounding errors of a logit are proportional to; 0 where masked."""
        s = abs(self.scale) * (abs(self.q) @ abs(self.k).swapaxes(-1, -2))
        return np.where(self.visible, s, 0)


def pairs(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    q_offset: npt.ArrayLike | None = None,
    layout: str = "hsd",
    rows: Index = None,
    keys: Index = None,
) -> Pairs:
    """Lay out the inputs, resolve the options, and say which row sees which key."""
    work = working_type(q.dtype)
    seqlen_q, seqlen_k = (a.shape[-3 if layout == "shd" and a.ndim > 2 else -2] for a in (q, k))
    i, j = positions(seqlen_q, rows)[:, None], positions(seqlen_k, keys)[None, :]
    num_heads = 1 if q.ndim == 2 else q.shape[-2 if layout == "shd" else -3]

    diagonal = i + offsets(q_offset, causal, seqlen_q, seqlen_k)
    visible = np.ones((i.size, j.size), bool)
    if causal:
        visible = visible & (j <= diagonal)
    return Pairs(
        q=canonical(q, layout, work, rows),
        k=heads_to(canonical(k, layout, work, keys), num_heads),
        v=heads_to(canonical(v, layout, work, keys), num_heads),
        scale=work.type(1) / np.sqrt(work.type(q.shape[-1])) if scale is None else work.type(scale),
        visible=visible,
    )


def positions(length: int, index: Index) -> npt.NDArray[np.int64]:
    """The positions `index` along an axis of `length`, or all of them."""
    every = np.arange(length, dtype=np.int64)
    return every if index is None else every[np.asarray(index)]


def offsets(q_offset: npt.ArrayLike | None, causal: bool | str, seqlen_q: int, seqlen_k: int) -> Any:
    """off of the diagonal d_i = i + off, (..., 1, 1, 1) where each batch entry has its own."""
    if q_offset is not None:
        return np.asarray(q_offset, np.int64)[..., None, None, None]
    return 0 if causal == "top_left" else seqlen_k - seqlen_q


def softmax(s: Array) -> tuple[Array, Array]:
    """p and lse of the logits: p is 0 and lse is -inf where a row sees no key."""
    row_max = s.max(axis=-1, keepdims=True, initial=-np.inf)
    e = np.exp(s - np.where(row_max == -np.inf, 0, row_max))  # -inf - -inf would be NaN
    total = e.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = row_max + np.log(total)
    return e / np.where(total == 0, 1, total), lse[..., 0]


def weights(s: Array, lse: Array) -> Array:
    """p_ij from the logits and a given lse; 0 in rows whose lse says that they see no key."""
    return np.where(lse == -np.inf, 0, np.exp(s - np.where(lse == -np.inf, 0, lse)))


def forward(q: Array, k: Array, v: Array, *, rows: Index = None, **options: Any) -> Forward:
    """out and lse, dense, in the working type; only of the query rows `rows`, if given.

    Parameters
    ----------
    q, k, v : numpy.ndarray
        As for `cupyflash.attention`.
    rows : array_like of int, optional
        Positions along the query axis; the result has only these, in this order.
    **options
        ``scale``, ``causal``, ``q_offset``, ``layout``: as for `cupyflash.attention`.
    """
    this = pairs(q, k, v, rows=rows, **options)
    p, lse = softmax(this.logits())
    out = p @ this.v
    lse = np.broadcast_to(lse, out.shape[:-1])
    return Forward(as_user(out, q.ndim, options.get("layout", "hsd")), lse[0] if q.ndim == 2 else lse)


def backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
    wrt: Sequence[str] = ("q", "k", "v"),
    rows: Index = None,
    keys: Index = None,
    **options: Any,
) -> Gradients:
    """The gradients, dense, in the working type, from the same `out` and `lse` as the function under test.

    Parameters
    ----------
    dout, q, k, v, out, lse, dlse : numpy.ndarray
        As for `cupyflash.attention_backward`.
    wrt : sequence of {"q", "k", "v"}
        Which gradients to evaluate.
    rows, keys : array_like of int, optional
        dq only at these query positions; dk and dv only at these keys.
    **options
        ``scale``, ``causal``, ``q_offset``, ``layout``: as for `cupyflash.attention`.
    """
    layout = options.get("layout", "hsd")
    arguments = (dout, q, k, v, out, lse, dlse)
    dq = dk = dv = None
    if "q" in wrt:
        this = differentials(*arguments, rows=rows, **options)
        dq = gradient(this.scale * (this.ds @ this.k), q, layout)
    if "k" in wrt or "v" in wrt:
        this = differentials(*arguments, keys=keys, **options)
        dk = gradient(this.scale * (this.ds.swapaxes(-1, -2) @ this.q), k, layout) if "k" in wrt else None
        dv = gradient(this.p.swapaxes(-1, -2) @ this.dout, v, layout) if "v" in wrt else None
    return Gradients(dq, dk, dv)


@dataclass(frozen=True)
class Differentials(Pairs):
    """The pairs, and what the backward knows of them."""

    dout: Array  # (..., Hq, rows, Dv)
    out: Array  # (..., Hq, rows, Dv)
    lse: Array  # (..., Hq, rows, 1)
    dlse: Array  # (..., Hq, rows, 1), 0 where it is not read
    p: Array  # (..., Hq, rows, keys)
    gap: Array  # dp_ij - delta_i
    ds: Array  # (..., Hq, rows, keys)


def differentials(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dlse: Array | None,
    *,
    rows: Index = None,
    keys: Index = None,
    **options: Any,
) -> Differentials:
    """Everything that the gradients are sums of."""
    this = pairs(q, k, v, rows=rows, keys=keys, **options)
    layout, work = options.get("layout", "hsd"), this.q.dtype
    do, o = (canonical(a, layout, work, rows) for a in (dout, out))
    log_sum = canonical_rows(lse, work, rows)[..., None]
    seen = this.visible & (log_sum != -np.inf)

    d_log_sum = np.zeros_like(log_sum) if dlse is None else canonical_rows(dlse, work, rows)[..., None]
    d_log_sum = np.where(log_sum == -np.inf, 0, d_log_sum)  # by selection, whatever it holds there
    delta = (do * o).sum(axis=-1, keepdims=True) - d_log_sum
    p = weights(this.logits(), log_sum)
    gap = do @ this.v.swapaxes(-1, -2) - delta
    return Differentials(
        **vars(this),
        dout=do,
        out=o,
        lse=log_sum,
        dlse=d_log_sum,
        p=p,
        gap=gap,
        ds=np.where(seen, p * gap, 0),
    )


def gradient(array: Array, of: Array, layout: str) -> Array:
    """`array` for each query head, summed to the heads, the leading axes and the layout of the input `of`."""
    batch, num_heads = (of.shape[:-3], of.shape[-2 if layout == "shd" else -3]) if of.ndim > 2 else ((), 1)
    array = heads_from(array, num_heads)
    return as_user(sum_to(array, (*batch, *array.shape[-3:])), of.ndim, layout)


# ------------------------------------------------------------------------------- the ideal 16-bit computation


def ideal_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    out_dtype: npt.DTypeLike | None = None,
    rows: Index = None,
    **options: Any,
) -> Array:
    """What 16-bit tensor cores allow at best: P and the result rounded once each, all else exact.

    P is rounded before it is normalised, as exp(s - rowmax), so that its largest entry is exactly 1.
    `out_dtype` is what the result is stored as, q's dtype if not given.
    """
    this = pairs(q, k, v, rows=rows, **options)
    s = this.logits()
    row_max = s.max(axis=-1, keepdims=True, initial=-np.inf)
    e = np.exp(s - np.where(row_max == -np.inf, 0, row_max))
    total = e.sum(axis=-1, keepdims=True)
    out = (rounded(e, q.dtype) @ this.v) / np.where(total == 0, 1, total)
    out = rounded(out, q.dtype if out_dtype is None else out_dtype)
    return as_user(out, q.ndim, options.get("layout", "hsd"))


def ideal_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
    **options: Any,
) -> Gradients:
    """What 16-bit tensor cores allow at best: P, dS and the results rounded once each, all else exact."""
    layout = options.get("layout", "hsd")
    this = differentials(dout, q, k, v, out, lse, dlse, **options)
    p, ds = rounded(this.p, q.dtype), rounded(this.ds, q.dtype)
    dq = gradient(this.scale * (ds @ this.k), q, layout)
    dk = gradient(this.scale * (ds.swapaxes(-1, -2) @ this.q), k, layout)
    dv = gradient(p.swapaxes(-1, -2) @ this.dout, v, layout)
    return Gradients(*(rounded(a, q.dtype) for a in (dq, dk, dv)))


def rounded(array: Array, dtype: npt.DTypeLike) -> Array:
    """`array` rounded to `dtype`, in its own type; beyond the range it is inf, as in hardware."""
    with np.errstate(over="ignore"):
        return np.asarray(array.astype(dtype).astype(array.dtype))

"""The specification: dense attention and its gradients, one equation a line.

Everything else in this project is checked against this page. It forms every logit, so that nothing is hidden
in an algorithm, and it computes in a *working type* that is wider than what it judges: float64 for 16-bit and
float32 inputs, ``numpy.longdouble`` for float64 inputs.

Forward, for query row i of one head, with o_i = out and the sums over the keys j that row i sees:

    t_ij  = scale * q_i . k_j
    u_ij  = softcap * tanh(t_ij / softcap) - slope |d_i - j| + bias_ij      d_i: row i's diagonal
    s_ij  = score(u_ij, b, h, i, j)                  the logits; a u_ij of -inf is hidden whatever it becomes
    lse_i = log (exp(sink) + sum_j exp(s_ij))        -inf where the row has neither a key nor a sink
    p_ij  = exp(s_ij - lse_i)                        0 there
    o_i   = sum_j kept_ij p_ij v_j                   kept_ij: 0 or 1 / (1 - dropout); 1 without dropout

Backward, given the cotangents do_i = dout of o_i and dl_i = dlse of lse_i:

    delta_i = do_i . o_i - dl_i                      dl_i is not read where lse_i is -inf
    dp_ij   = kept_ij do_i . v_j
    ds_ij   = p_ij (dp_ij - delta_i)
    du_ij   = ds_ij score'(u_ij, b, h, i, j)
    dt_ij   = du_ij (1 - tanh(t_ij / softcap)^2)
    dq_i    = scale * sum_j dt_ij k_j
    dk_j    = scale * sum_i dt_ij q_i                over the rows of every query head that reads k_j
    dv_j    =         sum_i kept_ij p_ij do_i
    dbias   =         du                             summed over the axes along which bias was broadcast
    darg    =         sum_ij ds_ij dscore/darg       over the pairs whose score reads that element of score_args
    dsink   =       - sum_i exp(sink - lse_i) delta_i        over the rows of every entry

`forward` and `backward` take NumPy arrays of any dtype and return arrays of the working type. ``rows=`` and
``keys=`` evaluate only the named query rows (out, lse, dq) or keys (dk, dv), in memory that grows with S: row
i of the forward needs every key but no other row, and column j of the backward, given lse, needs every row
but no other key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import functions
from .philox import keeps

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
    dbias: Array | None = None
    dsinks: Array | None = None
    dscore_args: tuple[Array | None, ...] | None = None  # one for each argument, None for those that are no floats


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
class ScoreAt:
    """A score function at all pairs."""

    function: Callable[..., Any]
    pairs: tuple[Array, ...]  # b, h, i, j
    args: tuple[Any, ...]  # floats of the working type

    def value(self, u: Array) -> Array:
        """s_ij."""
        return np.broadcast_to(self.function(u, *self.pairs, *self.args), u.shape)

    def slope(self, u: Array) -> Array:
        """The derivative with respect to u_ij, of a function that the specification knows."""
        return np.broadcast_to(functions.known(self.function).slope(u, *self.pairs, *self.args), u.shape)

    def uses(self, u: Array) -> tuple[functions.Use, ...]:
        """Where float arguments are used, and the derivatives with respect to them."""
        return functions.known(self.function).uses(u, *self.pairs, *self.args)

    def bend(self) -> Any:
        """How fast the slope changes at most."""
        return functions.known(self.function).bend(*self.args)


@dataclass(frozen=True)
class Pairs:
    """All pairs of the query rows i with the keys j: the matrix that only a specification may hold.

    What lies beyond an entry's lengths is 0 here, whatever the arrays hold.
    """

    q: Array  # (..., Hq, rows, D)
    k: Array  # (..., Hq, keys, D), kv heads repeated
    v: Array  # (..., Hq, keys, Dv)
    scale: Any  # of the working type, as softcap
    softcap: Any  # None: no cap
    row: Array  # (..., 1, rows, 1): whether the entry has this row
    visible: Array  # broadcasts to (..., Hq, rows, keys), as the next four
    distance: Array  # d_i - j
    alibi: Array  # what is added to a logit, 0 where the pair is hidden
    bias: Array  # likewise
    kept: Array  # dropout's factor of a weight: 0 or 1 / (1 - dropout)
    sink: Array  # broadcasts to (..., Hq, rows, 1); -inf: no sink
    score: ScoreAt | None

    def products(self) -> Array:
        """t_ij, before the cap."""
        return np.asarray(self.scale * (self.q @ self.k.swapaxes(-1, -2)))

    def logits(self) -> Array:
        """s_ij, -inf where row i does not see key j."""
        u = self.unscored()
        if self.score is None:
            return u
        return np.where(u == -np.inf, u, self.score.value(np.where(u == -np.inf, 0, u)))

    def score_uses(self) -> tuple[functions.Use, ...]:
        """Where the score function uses float arguments; slopes are any numbers where the pair is hidden."""
        if self.score is None:
            return ()
        u = self.unscored()
        return self.score.uses(np.where(u == -np.inf, 0, u))

    def score_slope(self) -> Any:
        """The derivative of the score function, of any number where the pair is hidden."""
        if self.score is None:
            return 1
        u = self.unscored()
        return self.score.slope(np.where(u == -np.inf, 0, u))

    def unscored(self) -> Array:
        """u_ij, -inf where row i does not see key j (by selection, so that what is masked can't spread)."""
        s = self.products()
        if self.softcap is not None:
            s = self.softcap * np.tanh(s / self.softcap)
        return np.where(self.visible, s + self.alibi + self.bias, -np.inf)

    def slope(self) -> Any:
        """The derivative of the cap: of u_ij with respect to t_ij."""
        return 1 if self.softcap is None else 1 - np.tanh(self.products() / self.softcap) ** 2

    def magnitude(self) -> Array:
        """|scale| sum_d |q_d k_d| + |alibi| + |bias| + softcap: what errors of u_ij are proportional to; 0 if hidden.

        The cap is there because an implementation's tanh may be wrong by a few roundings of 1.
        """
        s = self.product_magnitude() + abs(self.alibi) + abs(self.bias)
        return np.where(self.visible, s if self.softcap is None else s + self.softcap, 0)

    def product_magnitude(self) -> Array:
        """|scale| sum_d |q_d k_d|, of hidden pairs too."""
        return np.asarray(abs(self.scale) * (abs(self.q) @ abs(self.k).swapaxes(-1, -2)))


def pairs(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    mask: Array | Callable[..., Any] | None = None,
    mask_args: tuple[Any, ...] = (),
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    score: Callable[..., Any] | None = None,
    score_args: tuple[Any, ...] = (),
    q_lens: npt.ArrayLike | None = None,
    kv_lens: npt.ArrayLike | None = None,
    q_offset: npt.ArrayLike | None = None,
    segment_ids: tuple[Array, Array] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    layout: str = "hsd",
    rows: Index = None,
    keys: Index = None,
) -> Pairs:
    """Lay out the inputs, resolve the options, and say which row sees which key."""
    work = working_type(q.dtype)
    seqlen_q, seqlen_k = (a.shape[-3 if layout == "shd" and a.ndim > 2 else -2] for a in (q, k))
    i, j = positions(seqlen_q, rows)[:, None], positions(seqlen_k, keys)[None, :]
    num_heads = 1 if q.ndim == 2 else q.shape[-2 if layout == "shd" else -3]

    q_len, kv_len = lengths(q_lens, seqlen_q), lengths(kv_lens, seqlen_k)
    distance = i + offsets(q_offset, causal, q_len, kv_len) - j
    row, key = i < q_len, j < kv_len
    visible = row & key
    left, right = (None, None) if window is None else window
    if causal:
        visible = visible & (distance >= 0)
    if left is not None:
        visible = visible & (distance <= left)
    if right is not None:
        visible = visible & (-distance <= right)
    b, h = cells(np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3]), num_heads)
    if callable(mask):
        visible = visible & mask(b, h, i, j, *mask_args)
    elif mask is not None:
        visible = visible & part(mask, rows, keys)
    if segment_ids is not None:
        q_ids, kv_ids = (np.asarray(ids)[..., None, :] for ids in segment_ids)
        visible = visible & (part(q_ids, None, rows)[..., None] == part(kv_ids, None, keys)[..., None, :])

    added = alibi = np.zeros((1, 1), work)
    if bias is not None:
        added = part(bias, rows, keys).astype(work)
        visible = visible & (added != -np.inf)
    if alibi_slopes is not None:
        alibi = -np.asarray(alibi_slopes, work)[..., None, None] * abs(distance)
    kept = np.ones((1, 1), work)
    if dropout:
        kept = keeps(dropout, int(seed) % 2**64, b, h, i, j) / (1 - work.type(dropout))
    sink = np.full((1, 1, 1), -np.inf, work) if sinks is None else np.asarray(sinks, work)[:, None, None]
    return Pairs(
        q=np.where(row, canonical(q, layout, work, rows), 0),
        k=np.where(key.swapaxes(-1, -2), heads_to(canonical(k, layout, work, keys), num_heads), 0),
        v=np.where(key.swapaxes(-1, -2), heads_to(canonical(v, layout, work, keys), num_heads), 0),
        scale=work.type(1) / np.sqrt(work.type(q.shape[-1])) if scale is None else work.type(scale),
        softcap=None if softcap is None else work.type(softcap),
        row=row,
        visible=visible,
        distance=distance,
        alibi=np.where(visible, alibi, 0),
        bias=np.where(visible, added, 0),
        kept=kept,
        sink=np.where(row, sink, -np.inf),
        score=None if score is None else ScoreAt(score, (b, h, i, j), tuple(working(x, work) for x in score_args)),
    )


def working(x: Any, work: npt.DTypeLike) -> Any:
    """An argument of a function: floats in the working type."""
    x = np.asarray(x)
    return x if x.dtype.kind in "biu" else x.astype(work)


def positions(length: int, index: Index) -> npt.NDArray[np.int64]:
    """The positions `index` along an axis of `length`, or all of them."""
    every = np.arange(length, dtype=np.int64)
    return every if index is None else every[np.asarray(index)]


def lengths(lens: npt.ArrayLike | None, seqlen: int) -> npt.NDArray[np.int64]:
    """The length of each entry's sequence, (..., 1, 1, 1)."""
    return np.asarray(seqlen if lens is None else lens).astype(np.int64)[..., None, None, None]


def offsets(q_offset: npt.ArrayLike | None, causal: bool | str, q_len: Any, kv_len: Any) -> Any:
    """off of the diagonal d_i = i + off, (..., 1, 1, 1) where each batch entry has its own."""
    if q_offset is not None:
        return np.asarray(q_offset, np.int64)[..., None, None, None]
    return 0 if causal == "top_left" else kv_len - q_len


def cells(batch: tuple[int, ...], num_heads: int) -> tuple[Array, Array]:
    """The number b of each batch entry, (*batch, 1, 1, 1), and of each head, (Hq, 1, 1)."""
    entries = np.arange(int(np.prod(batch)), dtype=np.int64)
    return entries.reshape(*batch, 1, 1, 1), np.arange(num_heads)[:, None, None]


def part(array: Array, rows: Index, keys: Index) -> Array:
    """Positions of the last two axes of an array that is broadcast to all pairs: those of its own, not stretched."""
    array = np.asarray(array)
    for axis, index in ((-2, rows), (-1, keys)):
        if index is not None and array.ndim >= -axis and array.shape[axis] > 1:
            array = np.take(array, np.asarray(index), axis=axis)
    return array


def softmax(s: Array, sink: Any = -np.inf) -> tuple[Array, Array]:
    """p and lse of the logits: p is 0 and lse is -inf where a row has no key and no sink."""
    row_max = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    top = np.where(row_max == -np.inf, 0, row_max)  # -inf - -inf would be NaN
    e = np.exp(s - top)
    total = e.sum(axis=-1, keepdims=True) + np.exp(sink - top)
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
        Those of `cupyflash.attention` that say what to compute.
    """
    this = pairs(q, k, v, rows=rows, **options)
    p, lse = softmax(this.logits(), this.sink)
    out = (this.kept * p) @ this.v
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
    wrt: Sequence[str] | None = None,
    rows: Index = None,
    keys: Index = None,
    **options: Any,
) -> Gradients:
    """The gradients, dense, in the working type, from the same `out` and `lse` as the function under test.

    Parameters
    ----------
    dout, q, k, v, out, lse, dlse : numpy.ndarray
        As for `cupyflash.attention_backward`.
    wrt : sequence of {"q", "k", "v", "bias", "sinks", "score_args"}, optional
        Which gradients to evaluate; None: of all that is given.
    rows, keys : array_like of int, optional
        dq only at these query positions; dk and dv only at these keys; dbias only at both, along axes that bias has
        itself. dsinks and dscore_args are always whole.
    **options
        Those of `cupyflash.attention` that say what to compute.
    """
    layout, bias, sinks = options.get("layout", "hsd"), options.get("bias"), options.get("sinks")
    arguments = (dout, q, k, v, out, lse, dlse)
    if wrt is None:
        wrt = differentiable(bias, sinks, options.get("score_args", ()))
    dscore_args = None
    dq = dk = dv = dbias = dsinks = None
    if "q" in wrt:
        this = differentials(*arguments, rows=rows, **options)
        dq = gradient(this.scale * (this.dt @ this.k), q, layout)
    if "k" in wrt or "v" in wrt:
        this = differentials(*arguments, keys=keys, **options)
        dk = gradient(this.scale * (this.dt.swapaxes(-1, -2) @ this.q), k, layout) if "k" in wrt else None
        dv = gradient((this.kept * this.p).swapaxes(-1, -2) @ this.dout, v, layout) if "v" in wrt else None
    if "bias" in wrt and bias is not None:
        own_rows, own_keys = own_axes(bias, rows, keys)
        this = differentials(*arguments, rows=own_rows, keys=own_keys, **options)
        dbias = sum_to(this.du, part(bias, rows, keys).shape)
    if "sinks" in wrt and sinks is not None:
        this = differentials(*arguments, keys=NO_KEYS, **options)
        dsinks = sum_to(-(weights(this.sink, this.lse) * this.delta).sum(axis=(-2, -1)), sinks.shape)
    if "score_args" in wrt:
        this = differentials(*arguments, **options)
        terms = [np.where(this.seen, this.ds * use.slope, 0) for use in this.score_uses()]
        dscore_args = sum_uses(this, terms, options["score_args"])
    return Gradients(dq, dk, dv, dbias, dsinks, dscore_args)


def sum_uses(this: Pairs, terms: Sequence[Array], score_args: tuple[Any, ...]) -> tuple[Array | None, ...]:
    """For each float argument, the sums of each use's terms, (..., Hq, rows, keys), at the elements used."""
    sums = tuple(np.zeros(np.shape(x), this.q.dtype) if is_float(x) else None for x in score_args)
    for use, term in zip(this.score_uses(), terms, strict=True):
        total = sums[use.argument]
        assert total is not None
        if use.at:
            np.add.at(total, tuple(np.broadcast_to(x, term.shape) for x in use.at), term)
        else:
            total += term.sum()
    return sums


def is_float(x: Any) -> bool:
    """Whether an argument of a function has a gradient."""
    return np.asarray(x).dtype.kind not in "biu"


NO_KEYS = np.zeros(0, np.int64)


def differentiable(bias: Array | None, sinks: Array | None, score_args: tuple[Any, ...] = ()) -> tuple[str, ...]:
    """What there are gradients of, by name."""
    given = tuple(name for name, x in (("bias", bias), ("sinks", sinks)) if x is not None)
    return ("q", "k", "v", *given, *(("score_args",) if any(map(is_float, score_args)) else ()))


def own_axes(bias: Array, rows: Index, keys: Index) -> tuple[Index, Index]:
    """The rows and keys that a part of dbias needs: all of them along an axis that bias is stretched along."""
    shape = (1, 1, *bias.shape)
    return rows if shape[-2] > 1 else None, keys if shape[-1] > 1 else None


@dataclass(frozen=True)
class Differentials(Pairs):
    """The pairs, and what the backward knows of them."""

    dout: Array  # (..., Hq, rows, Dv)
    out: Array  # (..., Hq, rows, Dv)
    lse: Array  # (..., Hq, rows, 1)
    dlse: Array  # (..., Hq, rows, 1), 0 where it is not read
    delta: Array  # (..., Hq, rows, 1)
    p: Array  # (..., Hq, rows, keys)
    gap: Array  # dp_ij - delta_i
    seen: Array  # where ds is not 0 by selection
    ds: Array  # (..., Hq, rows, keys)

    @property
    def dt(self) -> Array:
        """The gradient of t_ij."""
        return np.where(self.seen, self.du * self.slope(), 0)

    @property
    def du(self) -> Array:
        """The gradient of u_ij."""
        return np.where(self.seen, self.ds * self.score_slope(), 0)


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
    do, o = (np.where(this.row, canonical(a, layout, work, rows), 0) for a in (dout, out))
    log_sum = np.where(this.row, canonical_rows(lse, work, rows)[..., None], -np.inf)

    d_log_sum = np.zeros_like(log_sum) if dlse is None else canonical_rows(dlse, work, rows)[..., None]
    d_log_sum = np.where(log_sum == -np.inf, 0, d_log_sum)  # by selection, whatever it holds there
    delta = (do * o).sum(axis=-1, keepdims=True) - d_log_sum
    s = this.logits()
    p = weights(s, log_sum)
    gap = this.kept * (do @ this.v.swapaxes(-1, -2)) - delta
    seen = (s != -np.inf) & (log_sum != -np.inf)
    return Differentials(
        **vars(this),
        dout=do,
        out=o,
        lse=log_sum,
        dlse=d_log_sum,
        delta=delta,
        p=p,
        gap=gap,
        seen=seen,
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
    row_max = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), this.sink)
    top = np.where(row_max == -np.inf, 0, row_max)
    e = np.exp(s - top)
    total = e.sum(axis=-1, keepdims=True) + np.exp(this.sink - top)
    out = ((this.kept * rounded(e, q.dtype)) @ this.v) / np.where(total == 0, 1, total)
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
    """What 16-bit tensor cores allow at best: P, dS and the results rounded once each, all else exact.

    dS is rounded where it meets q and k, which is behind the cap; dbias and dsinks meet neither.
    """
    layout, bias, sinks = options.get("layout", "hsd"), options.get("bias"), options.get("sinks")
    this = differentials(dout, q, k, v, out, lse, dlse, **options)
    p, dt = this.kept * rounded(this.p, q.dtype), rounded(this.dt, q.dtype)
    exact = backward(dout, q, k, v, out, lse, dlse=dlse, wrt=("bias", "sinks"), **options)
    return Gradients(
        dq=rounded(gradient(this.scale * (dt @ this.k), q, layout), q.dtype),
        dk=rounded(gradient(this.scale * (dt.swapaxes(-1, -2) @ this.q), k, layout), k.dtype),
        dv=rounded(gradient(p.swapaxes(-1, -2) @ this.dout, v, layout), v.dtype),
        dbias=None if bias is None or exact.dbias is None else rounded(exact.dbias, bias.dtype),
        dsinks=None if sinks is None or exact.dsinks is None else rounded(exact.dsinks, sinks.dtype),
    )


def rounded(array: Array, dtype: npt.DTypeLike) -> Array:
    """`array` rounded to `dtype`, in its own type; beyond the range it is inf, as in hardware."""
    with np.errstate(over="ignore"):
        return np.asarray(array.astype(dtype).astype(array.dtype))

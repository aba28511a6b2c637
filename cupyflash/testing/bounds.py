"""How far a result may lie from the specification: bounds, their derivations, and checks that use them.

u is the unit roundoff of the accumulator (2**-24 for 16-bit and float32 inputs, 2**-53 for float64): one
operation returns x (1 + e), |e| <= u. The bounds hold on any data, for any order of summation, as long as no
intermediate overflows the accumulator (q . k without the scale is one). They are limits for each element; a
check reports the largest error / limit, which is at most 1 where the promise is kept.

N_d, N_k, N_q count the roundings that one term can pass on its way through a sum over the head dimension,
over keys, over query rows: one for each addition that follows another. The sums of an online softmax pass
`RESCALE` more for each key block, since they are multiplied by exp(old maximum - new maximum).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from . import reference
from .reference import Array, Index, Pairs

# One exponential is wrong by at most 4 u relative to itself: ex2.approx.ftz.f32 promises 2**-22, CUDA's and
# NumPy's float64 ones less. A test holds NumPy's exp and exp2 to it.
EXP = 4
# A rescale multiplies, 1 u, by an exponential, EXP u.
RESCALE = 1 + EXP
# tanh is wrong by at most 6 u absolutely: as 1 - 2 / (exp(2 |x|) + 1) by EXP u / 2 of the exponential at worst, 1 u
# of the sum, 2 u of the division, and 1 u more. NumPy's own is closer. A test holds both to it.
TANH = 6
# Roundings of a logit beyond a plain one's where a cap, slopes or a bias make it: see forward_limits, backward_limits.
EXTRA, EXTRA_BACKWARD = 6, 2
# Of a score function's slope, in u and of slope + 1: that of the named functions, whose worst has the square of a tanh.
SLOPE = 16
SMALLEST_BLOCK = 16  # keys; no family takes fewer at a time


class Chains(NamedTuple):
    """The longest chains of roundings in sums over the head dimension, keys and query rows."""

    d: int  # N_d
    k: int  # N_k, and in the forward `rescale` besides
    q: int  # N_q
    rescale: int
    term: int = 1  # of dbias and dsinks, for each term of their sums


#: On independent random elements rounding errors cancel as often as they add: no N, the constants stay.
RANDOM = Chains(0, 0, 0, 0, 0)


def longest_chains(
    q: Array,
    k: Array,
    v: Array,
    layout: str = "hsd",
    *,
    backward: bool = False,
    block_n: int = SMALLEST_BLOCK,
) -> Chains:
    """What no order of summation exceeds: every sum one term after another.

    A gradient also adds up the query heads of a group, and the batch entries that share its input.
    """
    seqlen_q, seqlen_k = (a.shape[-3 if layout == "shd" and a.ndim > 2 else -2] for a in (q, k))
    num_heads, num_heads_k = (1 if a.ndim == 2 else a.shape[-2 if layout == "shd" else -3] for a in (q, k))
    entries = [max(1, math.prod(a.shape[:-3])) for a in (q, k, v)]
    batch = math.prod(np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])) if backward else 1
    return Chains(
        d=max(q.shape[-1], v.shape[-1]),
        k=seqlen_k * max(1, batch // entries[0]),
        q=seqlen_q * (num_heads // max(num_heads_k, 1)) * max(1, batch // min(entries[1:])),
        rescale=RESCALE * math.ceil(seqlen_k / block_n),
    )


# -------------------------------------------------------------------------------------------------- roundings


# On the CPU a probability below the smallest normal number is raised to exp of a whole number in the base
# that NumPy computes fastest, 2 or e: to at most e times that number.
FLOOR = 3


@dataclass(frozen=True)
class Arithmetic:
    """The accumulator's roundoff, and `FLOOR` times its smallest normal number, below which numbers mean little.

    GPUs take subnormals as 0, and the CPU raises probabilities: either way an error of at most `tiny`.
    """

    u: float
    tiny: float

    def grow(self, count: Any) -> Any:
        """The relative error of `count` roundings: (1 + u)**count - 1 <= expm1(count u).

        Exponent errors are counted in u as well, and exp turns them into exactly this. exp(300) stands for
        all that is larger: it promises nothing, and products with it are finite.
        """
        return np.expm1(np.minimum(count * self.u, 300))


def arithmetic(dtype: npt.DTypeLike) -> Arithmetic:
    """The arithmetic of the accumulator for inputs of `dtype`."""
    info = np.finfo(np.float64 if np.dtype(dtype) == np.float64 else np.float32)
    return Arithmetic(u=float(info.eps) / 2, tiny=FLOOR * float(info.tiny))


def finfo(dtype: npt.DTypeLike) -> Any:
    """`numpy.finfo`, for bfloat16 too."""
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def half_ulp(magnitude: Array, dtype: npt.DTypeLike) -> Array:
    """The error of rounding numbers of at most `magnitude` to `dtype`; float32 subnormals may become 0."""
    info = finfo(dtype)
    lowest = int(info.minexp) + 1
    exponent = np.where(magnitude == 0, lowest, np.maximum(np.frexp(magnitude)[1], lowest))  # < 2**exponent
    return np.asarray(np.ldexp(np.ones_like(magnitude), exponent - 2 - int(info.nmant))) + flushed(dtype)


# Before they become sums of two numbers of float16's range, P is multiplied by the first of these, and dS by at most
# the last, or by so much that the largest becomes the second at least: see `backward_limits`.
P_FACTOR, LARGEST_DS, LARGEST_FACTOR = 2.0**12, 2.0**14, 2.0**60


def relative(magnitude: Array, dtype: npt.DTypeLike, parts: int = 1, factor: Any = 1) -> Array:
    """The same for numbers that are rounded times an unknown factor of at least ``factor``.

    Of two ``parts`` the second is what rounding to the first one loses, rounded likewise: at most half an ulp of x,
    exactly so or of a smaller exponent, where half an ulp is half as large.
    """
    info = finfo(dtype)
    half, least = float(info.eps) / 2, float(info.smallest_subnormal) / 2
    lost = half if parts == 1 else half**2 / 2
    return np.asarray(magnitude * lost + least / factor + flushed(dtype))


def has_narrow_range(dtype: npt.DTypeLike) -> bool:
    """Whether numbers that an accumulator holds may lie beyond those of a type, or below."""
    return int(finfo(dtype).minexp) > int(np.finfo(np.float32).minexp)


def flushed(dtype: npt.DTypeLike) -> float:
    """What storing as `dtype` may lose to flushing: float16 keeps subnormals, bfloat16 is half a float32."""
    return 0.0 if np.dtype(dtype) == np.float16 else float(finfo(dtype).tiny)


def stored(exact: Array, limit: Array, dtype: npt.DTypeLike, a: Arithmetic) -> Any:
    """What results within `limit` of `exact` lose where `dtype` is narrower than the accumulator of their sums."""
    return half_ulp(abs(exact) + limit, dtype) if float(finfo(dtype).eps) > 2 * a.u else 0


# ---------------------------------------------------------------------------------------------------- forward


def forward_limits(
    q: Array,
    k: Array,
    v: Array,
    *,
    out_dtype: npt.DTypeLike,
    chains: Chains,
    p_dtype: npt.DTypeLike | None = None,
    p_parts: int = 1,
    rows: Index = None,
    **options: Any,
) -> tuple[reference.Forward, reference.Forward]:
    """The specification's (out, lse) and the limits of their errors.

    A logit. T_i is the largest over visible j of |scale| sum_d |q_d k_d|; the row maximum is no larger. A dot
    product to which the maximum may belong as one more term, in any order, is wrong by (N_d + 2) u 2 T_i (its
    additions and one product); the scale times log2(e) is rounded and multiplied, 2 u T_i. A maximum
    subtracted later costs no more: rounded twice, 2 u T_i, and the difference, 2 u T_i. Together at most (2
    N_d + 6) u T_i, and 2 to spare: an error e = (8 + 2 N_d) u T_i in the exponent.

    p_j = exp(s_j - m) / sum_l exp(s_l - m). An error of the maximum m cancels, because one m serves both. The
    numerator is off by a factor within exp(+-e) and EXP u, and on its way through the sum N_k u, a product 1
    u; so is the denominator; division and the multiplication by it 3 u. So out is a sum of p_j v_j, each off
    by

        R = exp(2 e + (2 EXP + 2 N_k + 4) u) - 1,    |err out| <= R sum_j p_j |v_j|,

    in first order u sum_j p_j |v_j| (12 + 2 N_k + 2 (8 + 2 N_d) T_i). Whatever e is, the result is an average
    of v: |err out| <= 2 max |v|, up to the roundings of sums.

    P rounded to 16 bits for tensor cores is off by a relative half ulp, or half a subnormal: exp(s - m) <= 1
    is divided by a sum of at least 1, so absolute errors do not grow. The denominator is not rounded. As the sum of
    two such numbers it is off by half the square of a relative half ulp, or half a subnormal of the second, which
    is float16's over `P_FACTOR`. Then a key brings two terms to the numerator, so N_k counts there twice: 3 N_k in
    R in place of 2 N_k.

    lse = m + log(sum): e, N_k u and EXP u from the sum; the logarithm, wrong by EXP u absolutely and 2 u
    |log| (|log| <= |lse| + T_i, and e has 2 u T_i to spare); conversion from base 2, 2 u; the last sum, 1 u.
    Together e + u (N_k + 8 + 5 |lse|).

    What is smaller than `tiny` may be taken as 0 (inputs, products, sums), or a p as `tiny`: in a logit it
    costs at most tiny (1 + |scale|) (D + sum |q| + sum |k| + sum |q k|), in the result tiny (1 + Sk) (1 + max
    |v|).

    A cap, slopes, a bias. T_i is the largest of X_ij + C + A_ij + B_ij: X = |scale| sum_d |q_d k_d|, C =
    softcap, A = |alibi|, B = |bias|. The bias is rounded when it is loaded and twice when it is converted to
    base 2, 3 u B; slope and distance likewise, and multiplied, 5 u A; two sums, 2 u (2 T) where the maximum is
    in one of them. With the maximum riding along in the dot product: (N_d + 2) u (X + T) + 2 u X + 4 u T,
    at most (2 N_d + 10) u T in all. A cap forbids that: the dot product, (N_d + 1) u X, scale and division by
    the cap, 2 u X each, and the slope of the cap is at most 1; tanh, TANH u C; times the cap, 2 u C; two sums,
    base 2 and the maximum, 2 u T each: at most (N_d + 11) u T, of C 14 u. So e = (14 + 2 N_d) u T_i, 2 to
    spare: `EXTRA` more than above. What is flushed costs `tiny` of bias, slope (times the distance) and tanh
    (times the cap).

    A sink is one more term of the sum, after one more rescale, with a logit of size |sink|: T_i counts it. Its
    product with v does not exist, so |err out| stays a part of sum_j p_j |v_j|.

    Dropout takes weights away from out, not from the sum, and multiplies by 1 / (1 - dropout), rounded: 2 u.

    A score function. Of u_ij, wrong by e_ij = (12 + 2 N_d) u X_ij in what is X_ij + C + A_ij + B_ij without it, it
    makes s_ij, wrong by G_ij e_ij, where G_ij is its steepest slope between u_ij and what stands for it: |score'|
    + e_ij times the largest |score''|. What it computes itself is wrong by a few u of s_ij, and of what it has
    added to u_ij or taken away, at most |s_ij| + G_ij X_ij. T_i is the largest G_ij X_ij + |s_ij|: two of the 14
    and all of those of |s_ij|, which base 2 and the maximum do not need, are for that.
    """
    this = reference.pairs(q, k, v, rows=rows, **options)
    p, lse = reference.softmax(this.logits(), this.sink)
    out = (this.kept * p) @ this.v
    lse = np.broadcast_to(lse, out.shape[:-1])

    a, seqlen_k, chain = arithmetic(q.dtype), this.k.shape[-2], chains.k + chains.rescale
    sink = np.where(this.sink == -np.inf, 0, abs(this.sink))
    if sink.any():
        chain += 1 + RESCALE
    roundings = 8 + 2 * chains.d + (EXTRA if makes_logits(options) else 0)
    sizes, lost = logit_sizes(this, roundings, a)
    size = np.maximum(sizes.max(axis=-1, keepdims=True, initial=0), sink)  # T_i
    exponent = roundings * size + lost.max(axis=-1, keepdims=True, initial=0) / a.u
    drops = options.get("dropout", 0) > 0
    spread = (this.kept * p) @ abs(this.v)  # sum_j p_j |v_j|
    largest = abs(this.v).max(axis=-2, keepdims=True, initial=0) / (1 - options.get("dropout", 0))
    sums = 2 * EXP + 2 * chain + (p_parts - 1) * chains.k + 4 + 2 * drops
    limit = np.minimum(a.grow(2 * exponent + sums) * spread, (2 + a.grow(sums)) * largest)
    limit = limit + a.tiny * (1 + seqlen_k) * (1 + largest)
    if p_dtype is not None:
        limit = limit + (this.kept * relative(p, p_dtype, p_parts, _p_factor(p_dtype, p_parts))) @ abs(this.v)
    limit = limit + stored(out, limit, out_dtype, a)
    log_size = np.where(lse == -np.inf, 0, abs(lse))
    exponent = np.broadcast_to(exponent[..., 0], lse.shape)
    lse_limit = a.u * (exponent + chain + 2 * EXP + 5 * log_size) + a.tiny

    layout, single = options.get("layout", "hsd"), q.ndim == 2
    user = [reference.as_user(x, q.ndim, layout) for x in (out, limit)]
    logs = [x[0] if single else x for x in (lse, lse_limit)]
    return reference.Forward(user[0], logs[0]), reference.Forward(user[1], logs[1])


def _p_factor(p_dtype: npt.DTypeLike, p_parts: int) -> float:
    """What P is multiplied by before it is rounded."""
    return P_FACTOR if p_parts > 1 and has_narrow_range(p_dtype) else 1.0


def makes_logits(options: dict[str, Any]) -> bool:
    """Whether a logit is more than a scaled product."""
    return any(options.get(name) is not None for name in ("softcap", "alibi_slopes", "bias", "score"))


def logit_sizes(this: Pairs, roundings: int, a: Arithmetic) -> tuple[Array, Array]:
    """What errors of a pair's logit are proportional to, and what flushing costs it (see `forward_limits`)."""
    size, lost = this.magnitude(), flushed_logit(this, a)
    if this.score is None:
        return size, lost
    s = this.logits()
    steepest = abs(this.score_slope()) + this.score.bend() * unscored_errors(this, roundings, a)
    sizes = np.where(s == -np.inf, 0, steepest * size + abs(np.where(s == -np.inf, 0, s)))
    return sizes, a.tiny + (1 + steepest) * lost


def unscored_errors(this: Pairs, roundings: int, a: Arithmetic) -> Array:
    """Limits of the errors of u_ij."""
    return np.asarray(a.u * roundings * this.magnitude() + flushed_logit(this, a))


def flushed_logit(this: Pairs, a: Arithmetic) -> Array:
    """What a logit can lose when everything below `tiny` is taken as 0 (see `forward_limits`)."""
    q, k = abs(this.q), abs(this.k).swapaxes(-1, -2)
    total = (1 + abs(this.scale)) * (q.shape[-1] + q.sum(-1, keepdims=True) + k.sum(-2, keepdims=True) + q @ k)
    beside = (0 if this.softcap is None else this.softcap) + (this.bias != 0) + np.where(this.alibi == 0, 0, 1) * (
        1 + abs(this.distance)
    )
    return np.asarray(a.tiny * (total + beside))


# --------------------------------------------------------------------------------------------------- backward


def backward_limits(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
    chains: Chains,
    out_dtype: npt.DTypeLike | None = None,
    p_dtype: npt.DTypeLike | None = None,
    p_parts: int = 1,
    rows: Index = None,
    keys: Index = None,
    **options: Any,
) -> tuple[reference.Gradients, reference.Gradients]:
    """The specification's gradients, from the same out and lse, and the limits of their errors.

    They are stored in their input's dtype; `out_dtype` says otherwise.

    Each pair has one logit and nothing is normalised, so T_ij = |scale| sum_d |q_d k_d| of the pair itself
    counts.

    p = exp(s - lse): a dot product to which lse may belong as one more term, (N_d + 2) u (T_ij + |lse|); the
    scale, 2 u T_ij; lse converted to base 2, 2 u |lse|; or lse subtracted later, u (T_ij + |lse|); EXP u. A
    factor within 1 +- r, r = exp(u ((8 + N_d) T_ij + (8 + N_d) |lse_i| + EXP)) - 1.

    ds = p (dp - delta): dp is wrong by (N_d + 1) u A_ij, A_ij = sum_d |dout_d v_d|; delta by (N_d + 2) u B_i,
    B_i = sum_d |dout_d out_d| + |dlse|; the difference and the product by 1 u each. So

        |err ds| <= p (r + 2 u) |dp - delta| + p (1 + r) (N_d + 4) u (A + B)  =: E_ij,

    and, as every sum is off by N + 3 roundings (its additions, a product, the scale and its rounding),

        |err dq_i| <= |scale| sum_j (E_ij + (N_k + 3) u (|ds_ij| + E_ij)) |k_j|,   dk likewise over i with
        |q_i|, |err dv_j| <= sum_i (r + (N_q + 3) u (1 + r)) p_ij |dout_i|.

    P and dS rounded to 16 bits add half an ulp of theirs each, the rounded result half an ulp of its own.
    As sums of two such numbers they add half the square of a relative half ulp, or half a subnormal of the second:
    P's over `P_FACTOR` where the type is float16. dS is multiplied by a power of 2 then, which falls with the
    largest |dS| that a thread block has met: so that this one is at least `LARGEST_DS` where it made the power
    fall, and below twice that. So half a subnormal is at most 2^-39 of the largest |dS| of the kv head, or 2^-85,
    as the power is 2^60 at most. Each pair brings two terms to the sums of dq, dk and dv, whose N count twice.
    What is flushed to 0 costs at most `tiny` (1 + |scale|) times the number of terms times the factors beside
    it.

    A cap, slopes, a bias: T_ij as in `forward_limits`. lse in the dot product: (N_d + 2) u (X + |lse|) + 2 u X
    + 2 u |lse|, 5 u A, 3 u B, two sums, 2 u (T + |lse|): within (8 + N_d) u still. With a cap: (N_d + 5) u X +
    (TANH + 2) u C + 2 u T for two sums, 2 u T for base 2 (not of C, whose factor has it), 2 u |lse|, and u (T
    + |lse|): at most (10 + N_d) u (T_ij + |lse_i|), `EXTRA_BACKWARD` more.

    The slope of the cap, 1 - tanh^2 with tanh = c / C from a rounded c: tanh is wrong by ((N_d + 5) X / C +
    TANH + 4) u, its square by twice that, of which the slope 2 tanh (1 - tanh^2) <= 1 leaves X once; 2 u for
    the square and the difference. So dt = ds slope is wrong by

        |err dt| <= E_ij slope + (|ds| + E_ij) (((N_d + 5) X_ij / C + 2 TANH + 10) u + u),

    and stands for ds in dq and dk, where it is what is rounded to 16 bits.

    A score function: T_ij as in `forward_limits`, and, as there, (14 + N_d) u. Its slope is wrong by the largest
    |score''| times the error of u_ij, and by 16 u (|score'| + 1) of its own arithmetic, twice that of a tanh and
    its square. du = ds score' stands for ds in dbias and before the cap:

        |err du| <= E_ij |score'| + (|ds| + E_ij) (|err score'| + u |score'|).

    Dropout: A_ij times kept_ij, 2 u more in dp_ij and in the weights of dv. dbias sums ds over n pairs and
    dsinks over n rows: n + 2 roundings, if one term after another, and one more in a narrower dtype. A term of
    dsinks is p = exp(sink - lse), wrong by a factor 1 +- r with r of 6 u (|sink| + |lse|) and EXP u, times
    delta, wrong by (N_d + 3) u B_i.

    Arguments of a score function: a term is ds times the slope by the element, whose error is that of score' with
    the slope's own bend, so |err| <= E_ij |slope| + (|ds| + E_ij) (|err slope| + u |slope|); a sum of n such terms,
    in any order, n + 2 roundings. They are checked where neither rows nor keys are given.
    """
    layout, a = options.get("layout", "hsd"), arithmetic(q.dtype)
    bias, sinks = options.get("bias"), options.get("sinks")
    arguments = (dout, q, k, v, out, lse, dlse)
    sharing = 1 + math.prod(np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3]))

    def total(values: Array, error: Array, factor: Array, chain: int, like: Array) -> tuple[Array, Array]:
        """The sums values @ factor, as the gradient of `like`, and their limits."""
        error = error + a.grow(p_parts * chain + 3) * (abs(values) + error) + a.tiny * scale_1
        exact, limit = (reference.gradient(x, like, layout) for x in (values @ factor, error @ (abs(factor) + a.tiny)))
        limit = limit + a.tiny * sharing * (1 + values.shape[-1])
        return exact, limit + stored(exact, limit, like.dtype if out_dtype is None else out_dtype, a)

    def spread(values: Array, error: Array, shape: tuple[int, ...], like: Array) -> tuple[Array, Array]:
        """Sums over the axes along which `like`, of which a part has this shape, was broadcast."""
        terms = values.size // max(math.prod(shape), 1)
        error = error + a.grow(chains.term * terms + 2) * (abs(values) + error) + a.tiny
        exact, limit = (reference.sum_to(x, shape) for x in (values, error))
        return exact, limit + stored(exact, limit, like.dtype if out_dtype is None else out_dtype, a)

    parts = None if p_dtype is None else Parts(p_dtype, p_parts)
    if parts is not None and p_parts > 1 and has_narrow_range(parts.dtype):
        everything = reference.differentials(*arguments, **options)
        parts = parts._replace(largest_ds=_largest_ds(everything, k, layout, chains, a))
    this = reference.differentials(*arguments, rows=rows, **options)
    scale, scale_1 = this.scale, 1 + abs(this.scale)
    dq = total(scale * this.dt, abs(scale) * pair_limits(this, chains, a, parts).dt, this.k, chains.k, q)
    this = reference.differentials(*arguments, keys=keys, **options)
    errors = pair_limits(this, chains, a, parts)
    weight, dt, p_error, dt_error = (x.swapaxes(-1, -2) for x in (this.kept * this.p, this.dt, errors.p, errors.dt))
    dk = total(scale * dt, abs(scale) * dt_error, this.q, chains.q, k)
    dv = total(weight, p_error, this.dout, chains.q, v)
    dbias: tuple[Array | None, Array | None] = (None, None)
    dsinks = dbias
    if bias is not None:
        own_rows, own_keys = reference.own_axes(bias, rows, keys)
        this = reference.differentials(*arguments, rows=own_rows, keys=own_keys, **options)
        shape = reference.part(bias, rows, keys).shape
        dbias = spread(this.du, pair_limits(this, chains, a, None).du, shape, bias)
    if sinks is not None:
        this = reference.differentials(*arguments, keys=reference.NO_KEYS, **options)
        values, error = (x.sum(axis=-1) for x in sink_limits(this, chains, a))
        dsinks = spread(values.swapaxes(-1, -2), error.swapaxes(-1, -2), sinks.shape, sinks)
    dscore_args: tuple[Any, Any] = (None, None)
    if rows is None and keys is None and options.get("score_args"):
        this = reference.differentials(*arguments, **options)
        dscore_args = use_limits(this, chains, a, options["score_args"], out_dtype)
    exact, limit = zip(dq, dk, dv, dbias, dsinks, dscore_args, strict=True)
    return reference.Gradients(*exact), reference.Gradients(*limit)


class Parts(NamedTuple):
    """What P and dS are on their way to the gradients: rounded to `dtype`, or sums of two such numbers."""

    dtype: npt.DTypeLike
    number: int
    largest_ds: Any = 0  # of a kv head; asked for where there are two, of a narrow range

    def lost_p(self, values: Array) -> Array:
        """What P of such values loses."""
        return relative(values, self.dtype, self.number, _p_factor(self.dtype, self.number))

    def lost_ds(self, values: Array) -> Array:
        """What dS of such values loses."""
        factor = 1.0
        if self.number > 1 and has_narrow_range(self.dtype):
            factor = LARGEST_DS / np.maximum(self.largest_ds, LARGEST_DS / LARGEST_FACTOR)
        return relative(values, self.dtype, self.number, factor)


def _largest_ds(this: reference.Differentials, k: Array, layout: str, chains: Chains, a: Arithmetic) -> Array:
    """The largest |dS| of each kv head with its error, as (..., Hq, 1, 1): no thread block meets larger ones."""
    size = (abs(this.dt) + pair_limits(this, chains, a, None).dt).max(axis=(-1, -2), keepdims=True, initial=0)
    num_heads_k = 1 if k.ndim == 2 else k.shape[-2 if layout == "shd" else -3]
    group = size.shape[-3] // max(num_heads_k, 1)
    of_group = size.reshape(*size.shape[:-3], num_heads_k, group, 1, 1).max(axis=-3, keepdims=True, initial=0)
    return np.asarray(np.broadcast_to(of_group, (*of_group.shape[:-3], group, 1, 1)).reshape(size.shape))


class PairLimits(NamedTuple):
    """Limits of the errors of a pair's numbers."""

    p: Array  # of kept_ij p_ij
    ds: Array
    du: Array
    dt: Array


def pair_limits(this: reference.Differentials, chains: Chains, a: Arithmetic, parts: Parts | None) -> PairLimits:
    """Limits of the errors of p_ij, du_ij and dt_ij (see `backward_limits`)."""
    log_size = np.where(this.lse == -np.inf, 0, abs(this.lse))
    drops = 2 if (this.kept != 1).any() else 0
    extra = 0 if this.softcap is None else EXTRA_BACKWARD
    roundings = 8 + chains.d + (extra if this.score is None else EXTRA)
    sizes, flush = logit_sizes(this, roundings, a)
    r = a.grow(roundings * (sizes + log_size) + EXP + flush / a.u)
    p_error = np.where(this.seen, r * this.p + a.tiny, 0)

    dout, out, v = abs(this.dout), abs(this.out), abs(this.v)
    terms = this.kept * (dout @ v.swapaxes(-1, -2)) + (dout * out).sum(-1, keepdims=True) + abs(this.dlse)  # A + B
    lost = v.shape[-1] + (dout + out).sum(-1, keepdims=True) + v.sum(-1)[..., None, :]
    inner = a.grow(chains.d + 4 + drops) * terms + a.tiny * lost * (1 + this.kept)
    ds_error = (p_error + 2 * a.u * this.p) * abs(this.gap) + (this.p + p_error) * inner + a.tiny
    du_error = ds_error
    if this.score is not None:
        slope = abs(this.score_slope())
        slope_error = this.score.bend() * unscored_errors(this, roundings, a) + SLOPE * a.u * (slope + 1)
        du_error = ds_error * slope + (abs(this.ds) + ds_error) * (slope_error + a.u * slope) + a.tiny
    dt_error = du_error
    if this.softcap is not None:
        slope = ((chains.d + 5) * this.product_magnitude() / this.softcap + 2 * TANH + 11) * a.u
        dt_error = du_error * this.slope() + (abs(this.du) + du_error) * slope + a.tiny
    weight_error = this.kept * (p_error + drops * a.u * (this.p + p_error))
    if parts is not None:
        weight_error = weight_error + this.kept * parts.lost_p(this.p + p_error)
        dt_error = dt_error + parts.lost_ds(abs(this.dt) + dt_error)
    return PairLimits(*(np.where(this.seen, x, 0) for x in (weight_error, ds_error, du_error, dt_error)))


def use_limits(
    this: reference.Differentials, chains: Chains, a: Arithmetic, score_args: tuple[Any, ...], out_dtype: Any
) -> tuple[tuple[Array | None, ...], tuple[Array | None, ...]]:
    """dscore_args, and the limits of their errors (see `backward_limits`)."""
    roundings = 8 + chains.d + EXTRA
    ds_error, u_error = pair_limits(this, chains, a, None).ds, unscored_errors(this, roundings, a)
    values, errors = [], []
    for use in this.score_uses():
        slope = abs(use.slope)
        slope_error = use.bend * u_error + SLOPE * a.u * (slope + 1)
        value = np.where(this.seen, this.ds * use.slope, 0)
        error = ds_error * slope + (abs(this.ds) + ds_error) * (slope_error + a.u * slope) + a.tiny
        error = error + a.grow(chains.term * value.size + 2) * (abs(value) + error) + a.tiny
        values.append(value)
        errors.append(np.where(this.seen, error, 0))
    exact, limit = (reference.sum_uses(this, x, score_args) for x in (values, errors))
    types = [np.asarray(x).dtype if out_dtype is None else out_dtype for x in score_args]
    both = zip(exact, limit, types, strict=True)
    return exact, tuple(None if x is None or y is None else y + stored(x, y, t, a) for x, y, t in both)


def sink_limits(this: reference.Differentials, chains: Chains, a: Arithmetic) -> tuple[Array, Array]:
    """The terms of dsinks, (..., Hq, rows, 1), and the limits of their errors (see `backward_limits`)."""
    p = reference.weights(this.sink, this.lse)
    size = np.where(p == 0, 0, abs(np.where(this.sink == -np.inf, 0, this.sink)) + abs(this.lse))
    r = a.grow(6 * size + EXP)
    inner = a.grow(chains.d + 3) * ((abs(this.dout) * abs(this.out)).sum(-1, keepdims=True) + abs(this.dlse))
    lost = a.tiny * (1 + abs(this.delta))
    return -p * this.delta, p * r * abs(this.delta) + p * (1 + r) * inner + lost


# ----------------------------------------------------------------------------------------------------- checks


class Worst(NamedTuple):
    """The element of one result with the largest error / limit."""

    name: str
    ratio: float
    at: tuple[int, ...]
    got: float
    want: float
    limit: float

    def __str__(self) -> str:
        place = ", ".join(map(str, self.at))
        return (
            f"{self.name}[{place}] = {self.got:.9g}, specification {self.want:.9g}: "
            f"error {abs(self.got - self.want):.3g}, limit {self.limit:.3g}, ratio {self.ratio:.3g}"
        )


@dataclass(frozen=True)
class Report:
    """The worst element of each result that was checked."""

    worst: tuple[Worst, ...]

    @property
    def ratio(self) -> float:
        """The largest error / limit of all results."""
        return max((w.ratio for w in self.worst), default=0.0)

    @property
    def ok(self) -> bool:
        """Whether every element is within its limit."""
        return self.ratio <= 1

    def __str__(self) -> str:
        return "\n".join(("  " if w.ratio <= 1 else "! ") + str(w) for w in self.worst) or "nothing to check"

    def __add__(self, other: Report) -> Report:
        return Report(self.worst + other.worst)


def compare(name: str, got: Array, want: Array, limit: Array, where: npt.ArrayLike = True) -> Worst:
    """The element with the largest |got - want| / limit; NaN where a number is wanted counts as infinite.

    A result that overflows its dtype may be inf where the limit reaches beyond the largest number.
    """
    if got.shape != want.shape:
        raise AssertionError(f"{name}.shape={got.shape}, the specification's is {want.shape}")
    if got.size == 0:
        return Worst(name, 0.0, (), 0.0, 0.0, 0.0)
    largest = float(finfo(got.dtype).max)
    got = got.astype(want.dtype)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        beyond = np.isinf(got) & (np.sign(got) * want + limit >= largest)
        error = np.where((got == want) | beyond, 0, abs(got - want))
        ratio = np.where(error == 0, 0, error / limit)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    ratio = np.where(np.broadcast_to(where, ratio.shape), ratio, 0)
    index = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    at = tuple(int(i) for i in index)
    return Worst(name, float(ratio[index]), at, float(got[index]), float(want[index]), float(limit[index]))


def check_forward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None = None,
    *,
    chain_d: int | None = None,
    chain_k: int | None = None,
    block_n: int = SMALLEST_BLOCK,
    random: bool = False,
    p_dtype: npt.DTypeLike | None = None,
    p_parts: int = 1,
    rows: Index = None,
    where: npt.ArrayLike = True,
    **options: Any,
) -> Report:
    """Compare out and lse with the specification.

    Parameters
    ----------
    q, k, v, out, lse : numpy.ndarray
        The inputs and what the function under test returned.
    chain_d, chain_k, block_n : int, optional
        The plan's N_d, N_k and keys of a block; the longest chains and the smallest block if not given.
    random : bool
        Use the limits for independent random elements, which hold no N (`RANDOM`).
    p_dtype : dtype, optional
        Allow P to be rounded to this type once, as 16-bit tensor cores need it.
    p_parts : int
        2: allow it to be the sum of two numbers of that type instead.
    rows : array_like of int, optional
        Check only these query positions.
    where : array_like of bool
        Check only these rows of out and lse; broadcasts to lse's shape.
    **options
        Those of the call that say what to compute.
    """
    layout = options.get("layout", "hsd")
    chains = longest_chains(q, k, v, layout, block_n=block_n)
    given = {name: n for name, n in (("d", chain_d), ("k", chain_k)) if n is not None}
    want, limit = forward_limits(
        q, k, v, out_dtype=out.dtype, chains=RANDOM if random else chains._replace(**given),
        p_dtype=p_dtype, p_parts=p_parts, rows=rows, **options,
    )  # fmt: skip
    shd = layout == "shd" and q.ndim > 2
    where = np.broadcast_to(where, want.lse.shape)
    where_out = (where.swapaxes(-1, -2) if shd else where)[..., None]
    worst = [_compare_part("out", out, {-3 if shd else -2: rows}, want.out, limit.out, where_out)]
    if lse is not None:
        worst.append(_compare_part("lse", lse, {-1: rows}, want.lse, limit.lse, where))
    return Report(tuple(worst))


def check_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    gradients: Sequence[Array | None],
    *,
    dlse: Array | None = None,
    chain_d: int | None = None,
    chain_k: int | None = None,
    chain_q: int | None = None,
    random: bool = False,
    p_dtype: npt.DTypeLike | None = None,
    p_parts: int = 1,
    rows: Index = None,
    keys: Index = None,
    **options: Any,
) -> Report:
    """Compare the gradients that are not None with the specification from the same out and lse.

    Parameters are those of `check_forward`, and ``rows`` for dq, ``keys`` for dk and dv, both for dbias,
    ``chain_q`` for N_q. `gradients` are dq, dk, dv and, if there are more, dbias, dsinks and
    dscore_args.
    """
    layout = options.get("layout", "hsd")
    chains = longest_chains(q, k, v, layout, backward=True)
    given = {name: n for name, n in (("d", chain_d), ("k", chain_k), ("q", chain_q)) if n is not None}
    want, limit = backward_limits(
        dout, q, k, v, out, lse, dlse=dlse,
        chains=RANDOM if random else chains._replace(**given),
        p_dtype=p_dtype, p_parts=p_parts, rows=rows, keys=keys, **options,
    )  # fmt: skip
    axis = -3 if layout == "shd" and q.ndim > 2 else -2
    parts: tuple[dict[int, Index], ...] = ({axis: rows}, {axis: keys}, {axis: keys})
    if (bias := options.get("bias")) is not None:
        own_rows, own_keys = reference.own_axes(bias, rows, keys)
        parts = (*parts, {-2: own_rows, -1: own_keys})
    else:
        parts = (*parts, {})
    compared: list[Any] = list(zip(want._fields[:5], (*gradients, None, None), want, limit, (*parts, {}), strict=False))
    if len(gradients) > 5 and gradients[5] is not None and want.dscore_args is not None:
        assert limit.dscore_args is not None
        args = zip(gradients[5], want.dscore_args, limit.dscore_args, strict=True)
        compared += [(f"dscore_args[{n}]", *of_arg, {}) for n, of_arg in enumerate(args)]
    return Report(
        tuple(
            _compare_part(name, got, index, exact, most)
            for name, got, exact, most, index in compared
            if got is not None and exact is not None and most is not None
        )
    )


def check_ideal(name: str, got: Array, want: Array, limit: Array, ideal: Array, rms: float = 1.1) -> Report:
    """Compare 16-bit results, as a whole, with the ideal 16-bit computation (`reference.ideal_forward`).

    The largest error is at most the ideal's largest plus half an ulp of the largest result plus the largest
    `limit`; the root mean square at most `rms` times the ideal's plus that of `limit`. `limit` is that of
    `forward_limits` or `backward_limits` without `p_dtype`. Both sides are random for a few elements, so this
    says something about large arrays only.
    """
    error, lost = (abs(x.astype(want.dtype) - want).ravel() for x in (got, ideal))
    most = lost.max() + half_ulp(abs(want).max(), got.dtype) + limit.max()
    mean, mean_most = np.sqrt((error**2).mean()), rms * np.sqrt((lost**2).mean()) + np.sqrt((limit**2).mean())
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(error)), want.shape))
    largest = Worst(
        f"{name}, largest error", float(error.max() / most), at, float(got[at]), float(want[at]), float(most)
    )
    return Report(
        (
            largest,
            Worst(f"{name}, RMS error", float(mean / mean_most), (), float(mean), 0.0, float(mean_most)),
        )
    )


def _compare_part(
    name: str, got: Array, parts: dict[int, Index], want: Array, limit: Array, where: npt.ArrayLike = True
) -> Worst:
    """`compare` the named positions of `got` along axes; the worst element is named by its place in `got`."""
    taken = {axis: np.asarray(index) for axis, index in parts.items() if index is not None}
    for axis, positions in taken.items():
        got = np.take(got, positions, axis=axis)
    worst = compare(name, got, want, limit, where)
    at = list(worst.at)
    if at:
        for axis, positions in taken.items():
            at[axis] = int(positions[at[axis]])
    return worst._replace(at=tuple(at))

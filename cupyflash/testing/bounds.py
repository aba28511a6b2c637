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
SMALLEST_BLOCK = 16  # keys; no family takes fewer at a time


class Chains(NamedTuple):
    """The longest chains of roundings in sums over the head dimension, keys and query rows."""

    d: int  # N_d
    k: int  # N_k, and in the forward `rescale` besides
    q: int  # N_q
    rescale: int


#: On independent random elements rounding errors cancel as often as they add: no N, the constants stay.
RANDOM = Chains(0, 0, 0, 0)


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


def relative(magnitude: Array, dtype: npt.DTypeLike) -> Array:
    """The same for numbers that are rounded times an unknown factor of at least 1."""
    info = finfo(dtype)
    return magnitude * (float(info.eps) / 2) + float(info.smallest_subnormal) / 2 + flushed(dtype)


def flushed(dtype: npt.DTypeLike) -> float:
    """What storing as `dtype` may lose to flushing: float16 keeps subnormals, bfloat16 is half a float32."""
    return 0.0 if np.dtype(dtype) == np.float16 else float(finfo(dtype).tiny)


def narrows(dtype: npt.DTypeLike) -> bool:
    """Whether results of `dtype` are rounded once more than the accumulator that they were summed in."""
    return np.dtype(dtype).itemsize == 2


# ---------------------------------------------------------------------------------------------------- forward


def forward_limits(
    q: Array,
    k: Array,
    v: Array,
    *,
    out_dtype: npt.DTypeLike,
    chains: Chains,
    p_dtype: npt.DTypeLike | None = None,
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
    is divided by a sum of at least 1, so absolute errors do not grow. The denominator is not rounded.

    lse = m + log(sum): e, N_k u and EXP u from the sum; the logarithm, wrong by EXP u absolutely and 2 u
    |log| (|log| <= |lse| + T_i, and e has 2 u T_i to spare); conversion from base 2, 2 u; the last sum, 1 u.
    Together e + u (N_k + 8 + 5 |lse|).

    What is smaller than `tiny` may be taken as 0 (inputs, products, sums), or a p as `tiny`: in a logit it
    costs at most tiny (1 + |scale|) (D + sum |q| + sum |k| + sum |q k|), in the result tiny (1 + Sk) (1 + max
    |v|).
    """
    this = reference.pairs(q, k, v, rows=rows, **options)
    p, lse = reference.softmax(this.logits())
    out = p @ this.v
    lse = np.broadcast_to(lse, out.shape[:-1])

    a, seqlen_k, chain = arithmetic(q.dtype), this.k.shape[-2], chains.k + chains.rescale
    size = this.magnitude().max(axis=-1, keepdims=True, initial=0)  # T_i
    exponent = (8 + 2 * chains.d) * size + flushed_logit(this, a).max(axis=-1, keepdims=True, initial=0) / a.u
    spread = p @ abs(this.v)  # sum_j p_j |v_j|
    largest = abs(this.v).max(axis=-2, keepdims=True, initial=0)
    sums = 2 * EXP + 2 * chain + 4
    limit = np.minimum(a.grow(2 * exponent + sums) * spread, (2 + a.grow(sums)) * largest)
    limit = limit + a.tiny * (1 + seqlen_k) * (1 + largest)
    if p_dtype is not None:
        limit = limit + relative(p, p_dtype) @ abs(this.v)
    if narrows(out_dtype):
        limit = limit + half_ulp(abs(out) + limit, out_dtype)
    log_size = np.where(lse == -np.inf, 0, abs(lse))
    exponent = np.broadcast_to(exponent[..., 0], lse.shape)
    lse_limit = a.u * (exponent + chain + 2 * EXP + 5 * log_size) + a.tiny

    layout, single = options.get("layout", "hsd"), q.ndim == 2
    user = [reference.as_user(x, q.ndim, layout) for x in (out, limit)]
    logs = [x[0] if single else x for x in (lse, lse_limit)]
    return reference.Forward(user[0], logs[0]), reference.Forward(user[1], logs[1])


def flushed_logit(this: Pairs, a: Arithmetic) -> Array:
    """What a logit can lose when everything below `tiny` is taken as 0 (see `forward_limits`)."""
    q, k = abs(this.q), abs(this.k).swapaxes(-1, -2)
    total = q.shape[-1] + q.sum(-1, keepdims=True) + k.sum(-2, keepdims=True) + q @ k
    return np.asarray(a.tiny * (1 + abs(this.scale)) * total)


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
    What is flushed to 0 costs at most `tiny` (1 + |scale|) times the number of terms times the factors beside
    it.
    """
    layout, a = options.get("layout", "hsd"), arithmetic(q.dtype)
    arguments = (dout, q, k, v, out, lse, dlse)
    sharing = 1 + math.prod(np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3]))

    def total(values: Array, error: Array, factor: Array, chain: int, like: Array) -> tuple[Array, Array]:
        """The sums values @ factor, as the gradient of `like`, and their limits."""
        error = error + a.grow(chain + 3) * (abs(values) + error) + a.tiny * scale_1
        exact, limit = (reference.gradient(x, like, layout) for x in (values @ factor, error @ (abs(factor) + a.tiny)))
        limit = limit + a.tiny * sharing * (1 + values.shape[-1])
        stored = like.dtype if out_dtype is None else out_dtype
        return exact, limit + half_ulp(abs(exact) + limit, stored) if narrows(stored) else limit

    this = reference.differentials(*arguments, rows=rows, **options)
    scale, scale_1 = this.scale, 1 + abs(this.scale)
    _, ds_error = pair_limits(this, chains, a, p_dtype)
    dq = total(scale * this.ds, abs(scale) * ds_error, this.k, chains.k, q)
    this = reference.differentials(*arguments, keys=keys, **options)
    p, ds, p_error, ds_error = (x.swapaxes(-1, -2) for x in (this.p, this.ds, *pair_limits(this, chains, a, p_dtype)))
    dk = total(scale * ds, abs(scale) * ds_error, this.q, chains.q, k)
    dv = total(p, p_error, this.dout, chains.q, v)
    return reference.Gradients(dq[0], dk[0], dv[0]), reference.Gradients(dq[1], dk[1], dv[1])


def pair_limits(
    this: reference.Differentials, chains: Chains, a: Arithmetic, p_dtype: npt.DTypeLike | None
) -> tuple[Array, Array]:
    """Limits of the errors of p_ij and ds_ij (see `backward_limits`)."""
    seen = this.visible & (this.lse != -np.inf)
    log_size = np.where(this.lse == -np.inf, 0, abs(this.lse))
    r = a.grow((8 + chains.d) * (this.magnitude() + log_size) + EXP + flushed_logit(this, a) / a.u)
    p_error = np.where(seen, r * this.p + a.tiny, 0)

    dout, out, v = abs(this.dout), abs(this.out), abs(this.v)
    terms = dout @ v.swapaxes(-1, -2) + (dout * out).sum(-1, keepdims=True) + abs(this.dlse)  # A_ij + B_i
    lost = v.shape[-1] + (dout + out).sum(-1, keepdims=True) + v.sum(-1)[..., None, :]
    inner = a.grow(chains.d + 4) * terms + a.tiny * lost
    ds_error = (p_error + 2 * a.u * this.p) * abs(this.gap) + (this.p + p_error) * inner + a.tiny
    if p_dtype is not None:
        p_error = p_error + relative(this.p + p_error, p_dtype)
        ds_error = ds_error + relative(abs(this.ds) + ds_error, p_dtype)
    return np.where(seen, p_error, 0), np.where(seen, ds_error, 0)


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
    rows : array_like of int, optional
        Check only these query positions.
    where : array_like of bool
        Check only these rows of out and lse; broadcasts to lse's shape.
    **options
        ``scale``, ``causal``, ``q_offset``, ``layout`` of the call.
    """
    layout = options.get("layout", "hsd")
    chains = longest_chains(q, k, v, layout, block_n=block_n)
    given = {name: n for name, n in (("d", chain_d), ("k", chain_k)) if n is not None}
    want, limit = forward_limits(
        q, k, v, out_dtype=out.dtype, chains=RANDOM if random else chains._replace(**given),
        p_dtype=p_dtype, rows=rows, **options,
    )  # fmt: skip
    shd = layout == "shd" and q.ndim > 2
    where = np.broadcast_to(where, want.lse.shape)
    where_out = (where.swapaxes(-1, -2) if shd else where)[..., None]
    worst = [_compare_part("out", out, rows, -3 if shd else -2, want.out, limit.out, where_out)]
    if lse is not None:
        worst.append(_compare_part("lse", lse, rows, -1, want.lse, limit.lse, where))
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
    rows: Index = None,
    keys: Index = None,
    **options: Any,
) -> Report:
    """Compare dq, dk, dv, those that are not None, with the specification from the same out and lse.

    Parameters are those of `check_forward`, and ``rows`` for dq, ``keys`` for dk and dv, ``chain_q`` for N_q.
    """
    layout = options.get("layout", "hsd")
    chains = longest_chains(q, k, v, layout, backward=True)
    given = {name: n for name, n in (("d", chain_d), ("k", chain_k), ("q", chain_q)) if n is not None}
    want, limit = backward_limits(
        dout, q, k, v, out, lse, dlse=dlse,
        chains=RANDOM if random else chains._replace(**given),
        p_dtype=p_dtype, rows=rows, keys=keys, **options,
    )  # fmt: skip
    axis = -3 if layout == "shd" and q.ndim > 2 else -2
    return Report(
        tuple(
            _compare_part(name, got, index, axis, exact, most)
            for name, got, exact, most, index in zip(
                want._fields, gradients[:3], want, limit, (rows, keys, keys), strict=True
            )
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
    name: str, got: Array, part: Index, axis: int, want: Array, limit: Array, where: npt.ArrayLike = True
) -> Worst:
    """`compare` the positions `part` of `got` along `axis`; the worst element is named by its place in `got`."""
    if part is None:
        return compare(name, got, want, limit, where)
    positions = np.asarray(part)
    worst = compare(name, np.take(got, positions, axis=axis), want, limit, where)
    at = list(worst.at)
    if at:
        at[axis] = int(positions[at[axis]])
    return worst._replace(at=tuple(at))

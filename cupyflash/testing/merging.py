"""The specification of merged parts, and how far a merged result may lie from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .bounds import EXP, arithmetic, stored
from .reference import Array, Forward, working_type


def merge(outs: Sequence[Array], lses: Sequence[Array]) -> Forward:
    """out and lse of canonical parts, (..., rows, columns) and (..., rows), in the working type."""
    work = working_type(outs[0].dtype)
    logs = np.stack([x.astype(work) for x in lses])
    top = logs.max(axis=0)
    top = np.where(top == -np.inf, 0, top)  # -inf - -inf would be NaN
    weights = np.exp(logs - top)
    total = weights.sum(axis=0)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    shares = weights / np.where(total == 0, 1, total)
    values = np.stack([x.astype(work) for x in outs])
    return Forward((shares[..., None] * np.where(shares[..., None] == 0, 0, values)).sum(axis=0), lse)


def merge_limits(outs: Sequence[Array], lses: Sequence[Array], out_dtype: npt.DTypeLike, fan: int = 8) -> Forward:
    """Limits of the errors of out and lse.

    With d_n = lse_n - (the largest lse): the difference is rounded, u |d_n|, and multiplied by a rounded log2(e), 2 u
    |d_n|; the exponential, EXP u. A weight is off by r_n = u (3 |d_n| + EXP), the sum of N of them by the mean of r_n
    and N u more; a quotient, two products and N sums bring N + 4. So

        |err out| <= sum_n w_n |out_n| (exp(r_n + sum_m w_m r_m + (2 N + 4) u) - 1),
        |err lse| <= sum_m w_m r_m + u (N + EXP + 3 log N + |lse|), the logarithm among it.

    More than `fan` parts may be merged in levels, of which each rounds its lse: 2 u |lse| of a weight, and lse's own
    limit. What is smaller than `tiny` may be taken as 0.
    """
    a = arithmetic(outs[0].dtype)
    want = merge(outs, lses)
    count = len(outs)
    levels = max(1, math.ceil(math.log(count, fan))) if count > 1 else 1
    logs = np.stack([x.astype(want.lse.dtype) for x in lses])
    top = np.where(logs.max(axis=0) == -np.inf, 0, logs.max(axis=0))
    seen = logs != -np.inf
    d = np.where(seen, abs(np.where(seen, logs, 0) - top), 0)
    lse = np.where(want.lse == -np.inf, 0, want.lse)
    w = np.where(seen, np.exp(np.where(seen, logs, 0) - lse), 0)
    r = 3 * d + EXP
    mean = (w * r).sum(axis=0)
    lse_limit = a.u * levels * (mean + count + EXP + 3 * math.log(count) + abs(lse) + 1) + a.tiny
    more = (levels - 1) * (2 * abs(lse) + mean + 2 * count + EXP) + 2 * count + 4
    used = [np.where(there[..., None], x, 0) for x, there in zip(outs, seen, strict=True)]
    sizes = np.stack([abs(x.astype(w.dtype)) for x in used])
    limit = (w[..., None] * sizes * a.grow(r + mean + more)[..., None]).sum(axis=0)
    limit = limit + a.tiny * (1 + count) * (1 + sizes.max(axis=0))
    return Forward(limit + stored(want.out, limit, out_dtype, a), lse_limit)

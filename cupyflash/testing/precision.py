"""How exact results are beside IEEE arithmetic: data sets that hurt, the truth, and two ways to measure an error.

On NumPy or CuPy arrays, which `xp` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]


class Inputs(NamedTuple):
    """q and dout of (..., rows, head_dim), k and v of (..., keys, head_dim)."""

    q: Any
    k: Any
    v: Any
    dout: Any


class DataSet(NamedTuple):
    """What becomes of standard normal numbers.

    ``change`` takes them, a function that draws more of a shape, and the array library.
    """

    change: Callable[[Inputs, Callable[[Shape], Any], Any], Inputs]
    causal: bool = False


def _channels(x: Inputs, _: Callable[[Shape], Any], xp: Any) -> Inputs:
    ahead = xp.arange(x.q.shape[-1])
    small, large = xp.where(ahead == 3, 1e-3, 1), xp.where(ahead == 3, 1e3, 1)
    sizes = xp.where(ahead == 5, 1e4, xp.where(ahead == 6, 1e-4, 1))
    return x._replace(q=x.q * small, k=x.k * large, v=x.v * sizes)


def _row_of_v(factor: float) -> DataSet:
    def change(x: Inputs, _: Callable[[Shape], Any], xp: Any) -> Inputs:
        row = xp.arange(x.v.shape[-2])[:, None]
        return x._replace(v=xp.where(row == 17, factor, 1) * x.v, k=xp.where(row == 40, 1e-5, 1) * x.k)

    return DataSet(change, causal=True)


def _log_normal(x: Inputs, normal: Callable[[Shape], Any], xp: Any) -> Inputs:
    q, k, v = (0.5 * a * xp.exp(1.5 * normal(a.shape)) for a in (x.q, x.k, x.v))
    return x._replace(q=q, k=k, v=v)


DATA_SETS = {
    "normal": DataSet(lambda x, *_: x),
    "sharp scores": DataSet(lambda x, *_: x._replace(q=4 * x.q)),
    "positive values": DataSet(lambda x, *_: x._replace(v=abs(x.v))),
    "log-normal elements": DataSet(_log_normal),
    "outlier channels": DataSet(_channels),
    "one value row of 1e6": _row_of_v(1e6),
    "one value row of 1e9": _row_of_v(1e9),
    "one value row of 1e12": _row_of_v(1e12),
    "tiny and huge": DataSet(lambda x, *_: Inputs(1e-20 * x.q, 1e20 * x.k, 1e-25 * x.v, 1e25 * x.dout)),
}


def draw(
    name: str, seed: int, lead: Shape, rows: int, keys: int, head_dim: int, dtype: npt.DTypeLike, xp: Any = np
) -> Inputs:
    """Arrays (*lead, rows or keys, head_dim) of a data set; the same for the same seed and array library."""
    rng = xp.random.default_rng(100 * seed + list(DATA_SETS).index(name))
    x = Inputs(*(rng.standard_normal((*lead, n, head_dim)) for n in (rows, keys, keys, rows)))
    changed = DATA_SETS[name].change(x, rng.standard_normal, xp)
    with np.errstate(over="ignore"):  # `fits` says so
        return Inputs(*(a.astype(dtype) for a in changed))


def fits(x: Inputs) -> bool:
    """Whether a dtype has room for what a data set holds."""
    return all(bool(abs(a.astype(np.float64)).max() < np.inf) and bool((a != 0).any()) for a in x)


class Truth(NamedTuple):
    """lse; out and the gradients, and for each element the sum of the sizes of what it is a sum of."""

    lse: Any
    right: dict[str, Any]
    sizes: dict[str, Any]


def truth(
    x: Inputs, causal: bool, kv_lens: Any = None, xp: Any = np, dtype: npt.DTypeLike = np.float64
) -> Truth:
    """Unfused; out is 0 and lse -inf in rows that see nothing. ``kv_lens`` has the axes of (..., rows, keys), or 1."""
    q, k, v, dout = (a.astype(dtype) for a in x)
    scale = np.sqrt(np.asarray(q.shape[-1], dtype))[()]
    p, lse = _softmax(q @ _t(k) / scale, causal, kv_lens, xp)
    if kv_lens is not None:
        seen = xp.arange(k.shape[-2])[:, None] < kv_lens
        k, v = xp.where(seen, k, 0), xp.where(seen, v, 0)
    out = p @ v
    ds = p * (dout @ _t(v) - (dout * out).sum(-1, keepdims=True))
    size = p * (abs(dout) @ _t(abs(v)) + abs(dout * out).sum(-1, keepdims=True))
    right = {"out": out, "dq": ds @ k / scale, "dk": _t(ds) @ q / scale, "dv": _t(p) @ dout}
    sizes = {"out": p @ abs(v), "dq": size @ abs(k) / scale, "dk": _t(size) @ abs(q) / scale, "dv": _t(p) @ abs(dout)}
    return Truth(lse, right, sizes)


def unfused_out(x: Inputs, causal: bool, xp: Any = np) -> Any:
    """In the inputs' own arithmetic, by the matrix products of NumPy or CuPy."""
    q, k, v = x[:3]
    return _softmax(q @ _t(k) * q.dtype.type(q.shape[-1] ** -0.5), causal, None, xp)[0] @ v


def _t(x: Any) -> Any:
    return x.swapaxes(-1, -2)


def _softmax(s: Any, causal: bool, kv_lens: Any, xp: Any) -> tuple[Any, Any]:
    """Weights, 0 in rows that see nothing, and lse. Causal: bottom-right of each entry's own keys."""
    rows, keys = s.shape[-2:]
    i, j = xp.arange(rows)[:, None], xp.arange(keys)
    last = keys if kv_lens is None else kv_lens
    visible = j < last if not causal else (j < last) & (j <= i + last - rows)
    s = xp.where(visible, s, s.dtype.type(-np.inf))
    top = s.max(-1, keepdims=True)
    top = xp.where(top > -np.inf, top, s.dtype.type(0))
    p = xp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    lse = xp.where(total > 0, xp.log(xp.where(total > 0, total, 1)) + top, s.dtype.type(-np.inf))
    return p / xp.where(total > 0, total, 1), lse[..., 0]


def errors(
    got: Any, right: Any, size: Any, unit: float = 2.0**-23, smallest: float = 2.0**-126, axes: Any = None
) -> tuple[Any, Any]:
    """In the Frobenius norm, relative; the worst element's, in units of its size. ``axes``: those of one entry.

    Results that are next to nothing beside what they are sums of, a gradient of rows that see one key, say, count as
    2**-6 of it; sizes as 2**-64 of the largest, since probabilities end at the smallest number, and at least as
    ``smallest``, the smallest normal number of the results' dtype.
    """
    wrong, tiny = abs(got.astype(right.dtype) - right), np.finfo(right.dtype).tiny
    norm, norm_of_sizes = ((x**2).sum(axes) ** 0.5 for x in (right, size))
    least = (size.max(axes, keepdims=True) * size.dtype.type(2.0**-64)).clip(smallest)
    relative = (wrong**2).sum(axes) ** 0.5 / (norm.clip(norm_of_sizes * 2.0**-6) + tiny)
    return relative, (wrong / size.clip(least)).max(axes) / unit

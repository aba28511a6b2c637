"""How exact float32 is beside IEEE float32: data sets that hurt, the truth, and two ways to measure an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Inputs(NamedTuple):
    """(heads, rows, head_dim) each."""

    q: Array
    k: Array
    v: Array
    dout: Array


class DataSet(NamedTuple):
    change: Callable[[Inputs, np.random.Generator], Inputs]  # of standard normal numbers
    causal: bool = False


def _channels(x: Inputs, _: np.random.Generator) -> Inputs:
    ahead = np.arange(x.q.shape[-1])
    small, large = np.where(ahead == 3, 1e-3, 1), np.where(ahead == 3, 1e3, 1)
    sizes = np.where(ahead == 5, 1e4, np.where(ahead == 6, 1e-4, 1))
    return x._replace(q=x.q * small, k=x.k * large, v=x.v * sizes)


def _row_of_v(factor: float) -> DataSet:
    def change(x: Inputs, _: np.random.Generator) -> Inputs:
        row = np.arange(x.v.shape[1])[:, None]
        return x._replace(v=np.where(row == 17, factor, 1) * x.v, k=np.where(row == 40, 1e-5, 1) * x.k)

    return DataSet(change, causal=True)


def _log_normal(x: Inputs, rng: np.random.Generator) -> Inputs:
    q, k, v = (0.5 * a * np.exp(1.5 * rng.standard_normal(a.shape)) for a in (x.q, x.k, x.v))
    return x._replace(q=q, k=k, v=v)


DATA_SETS = {
    "normal": DataSet(lambda x, _: x),
    "sharp scores": DataSet(lambda x, _: x._replace(q=4 * x.q)),
    "positive values": DataSet(lambda x, _: x._replace(v=np.abs(x.v))),
    "log-normal elements": DataSet(_log_normal),
    "outlier channels": DataSet(_channels),
    "one value row of 1e6": _row_of_v(1e6),
    "one value row of 1e9": _row_of_v(1e9),
    "one value row of 1e12": _row_of_v(1e12),
    "tiny and huge": DataSet(lambda x, _: Inputs(1e-20 * x.q, 1e20 * x.k, 1e-25 * x.v, 1e25 * x.dout)),
}


def draw(name: str, seed: int, heads: int, rows: int, keys: int, head_dim: int) -> Inputs:
    """Of a data set, in float32."""
    rng = np.random.default_rng([seed, list(DATA_SETS).index(name)])
    shapes = [(heads, n, head_dim) for n in (rows, keys, keys, rows)]
    changed = DATA_SETS[name].change(Inputs(*(rng.standard_normal(shape) for shape in shapes)), rng)
    return Inputs(*(x.astype(np.float32) for x in changed))


NAMES = ("out", "dq", "dk", "dv")


class Truth(NamedTuple):
    """Out and the gradients, and for each element the sum of the sizes of what it is a sum of."""

    right: dict[str, Any]
    sizes: dict[str, Any]


def truth(x: Inputs, causal: bool, xp: Any = np) -> Truth:
    """Unfused, in float64."""
    q, k, v, dout = (xp.asarray(a).astype(np.float64) for a in x)
    scale = q.shape[-1] ** -0.5
    p = _softmax(scale * q @ _t(k), causal, xp)
    out = p @ v
    ds = p * (dout @ _t(v) - (dout * out).sum(-1, keepdims=True))
    size = p * (abs(dout) @ _t(abs(v)) + abs(dout * out).sum(-1, keepdims=True))
    right = {"out": out, "dq": scale * ds @ k, "dk": scale * _t(ds) @ q, "dv": _t(p) @ dout}
    sizes = {"out": p @ abs(v), "dq": scale * size @ abs(k), "dk": scale * _t(size) @ abs(q), "dv": _t(p) @ abs(dout)}
    return Truth(right, sizes)


def unfused_out(x: Inputs, causal: bool, xp: Any = np) -> Any:
    """In IEEE float32, by the matrix products of NumPy or CuPy."""
    q, k, v = (xp.asarray(a) for a in x[:3])
    return _softmax(q @ _t(k) * np.float32(q.shape[-1] ** -0.5), causal, xp) @ v


def _t(x: Any) -> Any:
    return x.swapaxes(-1, -2)


def _softmax(s: Any, causal: bool, xp: Any) -> Any:
    if causal:
        rows, keys = s.shape[-2:]
        s = xp.where(xp.asarray(np.tri(rows, keys, keys - rows, dtype=bool)), s, s.dtype.type(-np.inf))
    p = xp.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def errors(got: Any, right: Any, size: Any) -> tuple[float, float]:
    """Of the whole array in the Frobenius norm, relative; the worst element's, in units of 2**-23 of its size."""
    wrong = got.astype(np.float64) - right
    return float((wrong**2).sum() ** 0.5 / (right**2).sum() ** 0.5), float((abs(wrong) / size).max() * 2.0**23)

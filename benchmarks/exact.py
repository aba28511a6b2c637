"""Attention and its gradients in float64 on the device, for the errors of what is timed.

The equations of cupyflash/testing/reference.py, for one head, over blocks of queries so that memory grows with S.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from cupyflash._program.contenders import Arrays
from cupyflash._program.workload import Workload, numpy_dtype

NAMES = {"forward": ("out",), "backward": ("dq", "dk", "dv")}
NUMBERS = 2**24  # of one matrix of weights: 128 MiB


def attention(q: Any, k: Any, v: Any, dout: Any, *, causal: bool, xp: Any, numbers: int = NUMBERS) -> dict[str, Any]:
    """out, dq, dk, dv of one head: float64 arrays (seqlen, columns)."""
    q, k, v, dout = (x.astype(xp.float64) for x in (q, k, v, dout))
    scale, seqlen = 1 / math.sqrt(q.shape[1]), q.shape[0]
    found = {"out": xp.zeros_like(v), "dq": xp.zeros_like(q), "dk": xp.zeros_like(k), "dv": xp.zeros_like(v)}
    rows = max(1, numbers // seqlen)
    for first in range(0, seqlen, rows):
        last = min(first + rows, seqlen)
        i, j = slice(first, last), slice(0, last if causal else seqlen)  # queries, and the keys that any of them sees
        s = scale * (q[i] @ k[j].T)
        if causal:
            s = xp.where(xp.arange(first, last)[:, None] >= xp.arange(last), s, -xp.inf)
        p = xp.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        out = p @ v[j]
        ds = p * (dout[i] @ v[j].T - (dout[i] * out).sum(axis=1, keepdims=True))
        found["out"][i], found["dq"][i] = out, scale * (ds @ k[j])
        found["dk"][j] += scale * (ds.T @ q[i])
        found["dv"][j] += p.T @ dout[i]
    return found


class Exact:
    """Errors of a workload's results against float64, over its first and its last head."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._workload: Workload | None = None
        self._wanted: dict[tuple[int, int], dict[str, Any]] = {}

    def rms(self, workload: Workload, arrays: Arrays, direction: str, results: dict[str, Any]) -> dict[str, float]:
        """The root of the mean squared error of each result of a direction."""
        wanted = self._of(workload, arrays)
        return {name: self._rms(name, results[name], wanted) for name in NAMES[direction]}

    def _of(self, workload: Workload, arrays: Arrays) -> dict[tuple[int, int], dict[str, Any]]:
        """What is right, kept because the directions of a workload follow each other."""
        if workload != self._workload:
            self._workload, self._wanted = None, {}
            heads = dict.fromkeys(((0, 0), (workload.batch - 1, workload.heads - 1)))
            self._wanted = {
                head: attention(*(x[head] for x in arrays), causal=workload.causal, xp=self._xp) for head in heads
            }
            self._workload = workload
        return self._wanted

    def _rms(self, name: str, result: Any, wanted: dict[tuple[int, int], dict[str, Any]]) -> float:
        squares = [((wide(result[head], self._xp) - want[name]) ** 2).mean() for head, want in wanted.items()]
        return math.sqrt(sum(float(x) for x in squares) / len(squares))


def wide(x: Any, xp: Any) -> Any:
    """The numbers of a bfloat16 array of CuPy, NumPy, torch or JAX in float64."""
    kind = type(x).__module__.partition(".")[0]
    if kind == "torch":  # the bits, because not every DLPack takes bfloat16
        x = xp.from_dlpack(x.view(sys.modules["torch"].int16)).view(numpy_dtype("bfloat16"))
    elif kind.startswith("jax"):
        jax = sys.modules["jax"]
        bits = jax.block_until_ready(jax.lax.bitcast_convert_type(x, jax.numpy.uint16))
        x = xp.from_dlpack(bits).view(numpy_dtype("bfloat16"))
    return x.astype(xp.float64)

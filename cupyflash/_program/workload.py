"""One attention problem to time: sizes, numbers, and how many floating-point operations it counts for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .._problem import DTYPES

DIRECTIONS = ("forward", "backward")
DTYPE_NAMES = tuple(dtype.name for dtype in DTYPES)


@dataclass(frozen=True)
class Workload:
    """Self-attention of (batch, heads, seqlen, head_dim) arrays of standard normal numbers."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of q, k, v, out."""
        return (self.batch, self.heads, self.seqlen, self.head_dim)

    @property
    def scale(self) -> float:
        """The default factor on q k^T."""
        return 1 / math.sqrt(self.head_dim)

    def flops(self, direction: str) -> float:
        """Operations by convention: a multiply-add is two, causal counts half, the backward 2.5 forwards."""
        forward = 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        return forward * (0.5 if self.causal else 1) * (2.5 if direction == "backward" else 1)

    def score_bytes(self) -> int:
        """Size of the matrix of logits that unfused attention keeps in memory."""
        return self.batch * self.heads * self.seqlen**2 * numpy_dtype(self.dtype).itemsize

    def arrays(self, xp: Any) -> tuple[Any, Any, Any, Any]:
        """q, k, v, dout of the array library `xp`; the same numbers each time."""
        parts = normals(4 * math.prod(self.shape)).reshape(4, *self.shape)
        q, k, v, dout = (xp.asarray(part.astype(numpy_dtype(self.dtype))) for part in parts)
        return q, k, v, dout

    def __str__(self) -> str:
        heads = f"{self.batch * self.heads} head{'s' if self.batch * self.heads > 1 else ''}"
        causal = ", causal" if self.causal else ""
        return f"{heads}, {self.seqlen} queries and keys, width {self.head_dim}, {self.dtype}{causal}"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name, bfloat16 too."""
    return next(dtype for dtype in DTYPES if dtype.name == name)


@lru_cache(maxsize=1)
def normals(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """That many standard normal numbers, kept because workloads of one benchmark often have one size."""
    return np.random.default_rng(20).standard_normal(count, np.float32)

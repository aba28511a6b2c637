"""One attention problem to time: sizes, numbers, and how many floating-point operations it counts for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .._arrays import DTYPES

DIRECTIONS = ("forward", "backward")
DTYPE_NAMES = tuple(dtype.name for dtype in DTYPES)


@dataclass(frozen=True)
class Workload:
    """Self-attention of (batch, heads, seqlen, head_dim) arrays of normal numbers; v may have its own width."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False
    head_dim_v: int | None = None  # None: as head_dim

    @property
    def width_v(self) -> int:
        """Columns of v and out."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of q and k."""
        return (self.batch, self.heads, self.seqlen, self.head_dim)

    @property
    def shape_v(self) -> tuple[int, int, int, int]:
        """Shape of v and out."""
        return (self.batch, self.heads, self.seqlen, self.width_v)

    @property
    def scale(self) -> float:
        """The default factor on q k^T."""
        return 1 / math.sqrt(self.head_dim)

    def flops(self, direction: str) -> float:
        """Operations by convention: a multiply-add is two, causal counts half; 2 products forward and 5 backward."""
        widths = 3 * self.head_dim + 2 * self.width_v if direction == "backward" else self.head_dim + self.width_v
        return 2.0 * self.batch * self.heads * self.seqlen**2 * widths * (0.5 if self.causal else 1)

    def score_bytes(self) -> int:
        """Size of the matrix of logits that unfused attention keeps in memory."""
        return self.batch * self.heads * self.seqlen**2 * numpy_dtype(self.dtype).itemsize

    def arrays(self, xp: Any) -> tuple[Any, Any, Any, Any]:
        """q, k, v, dout of the array library `xp`; the same numbers each time."""
        shapes = (self.shape, self.shape, self.shape_v, self.shape_v)
        parts = np.split(normals(sum(map(math.prod, shapes))), np.cumsum([math.prod(shape) for shape in shapes[:3]]))
        q, k, v, dout = (
            xp.asarray(part.reshape(shape).astype(numpy_dtype(self.dtype)))
            for part, shape in zip(parts, shapes, strict=True)
        )
        return q, k, v, dout

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"head_dim_v": self.width_v}

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

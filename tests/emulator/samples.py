"""Small kernels in the manner of families to come, which test the checker: each with its launch and its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .golden import HERE, Tensor, inline_text, tensor_map

_FLOAT16, _FLOAT32 = 6, 7  # CUtensorMapDataType


def text(name: str) -> str:
    return inline_text(HERE / "samples" / f"{name}.cu")


def _kernel(xp: Any, name: str, shared: int) -> Any:
    kernel = xp.RawModule(code=text(name)).get_function(f"sample_{name}")
    kernel.max_dynamic_shared_size_bytes = max(shared, 48 * 1024)
    return kernel


def sm80(xp: Any, seed: int) -> None:
    """cp.async, ldmatrix, mma.sync: a ragged product of two blocks."""
    r = np.random.default_rng(seed)
    rows, depth = 64 + int(r.integers(1, 64)), 64
    a, b = (r.integers(-4, 5, (n, depth)).astype(np.float16) for n in (rows, 64))
    device = [xp.asarray(x) for x in (a, b)]
    out, sums = xp.empty((rows, 64)), xp.empty(rows)
    shared = 2 * 2 * 64 * 24 * 2 + 256 + 64 * 68 * 4
    _kernel(xp, "sm80", shared)((2,), (128,), (*device, out, sums, np.int32(rows)), shared_mem=shared)
    answer = a.astype(np.float32) @ b.astype(np.float32).T
    np.testing.assert_array_equal(out.get(), answer)
    np.testing.assert_array_equal(sums.get(), answer.sum(1))


def sm90(xp: Any, seed: int) -> None:
    """TMA, mbarriers, wgmma: (a b^T) c over a few turns, ragged."""
    r = np.random.default_rng(seed)
    rows, turns = 128 + int(r.integers(1, 128)), 3 + int(r.integers(2))
    keys = 64 * turns - int(r.integers(0, 40))
    a, b, c = (r.integers(-2, 3, (n, 64)).astype(np.float16) for n in (rows, keys, keys))
    device = [xp.asarray(x) for x in (a, b, c)]
    out = xp.empty((rows, 64))
    maps = [
        tensor_map(xp, Tensor(x, _FLOAT16, (64, len(x)), (128,), (64, 64), 3), d)
        for x, d in zip((a, b, c), device, strict=True)
    ]
    maps.append(tensor_map(xp, Tensor(np.empty(0), _FLOAT32, (64, rows), (256,), (32, 64), 3), out))
    shared = 3 * 2 * 8192 + 2 * 2 * 8192 + 40
    _kernel(xp, "sm90", shared + 984)((2,), (384,), (*maps, np.int32(turns)), shared_mem=shared + 984)
    scores = a.astype(np.float32) @ b.astype(np.float32).T
    np.testing.assert_array_equal(out.get(), scores @ c.astype(np.float32))


def ordered(xp: Any, seed: int) -> None:
    """Tickets, flags between blocks, bulk reductions: a sum in a fixed order."""
    r = np.random.default_rng(seed)
    blocks = 1 + int(r.integers(1, 7))
    x = r.standard_normal((blocks, 64)).astype(np.float32)
    total, log, state = xp.zeros(64), xp.empty(blocks), xp.zeros(2, np.int32)
    _kernel(xp, "ordered", 512)((blocks,), (64,), (xp.asarray(x), total, log, state), shared_mem=512)
    partial = np.add.accumulate(np.concatenate([np.zeros((1, 64), np.float32), 2 * x]), dtype=np.float32)
    np.testing.assert_array_equal(total.get(), partial[-1])
    np.testing.assert_array_equal(log.get(), partial[:-1, 0])


SAMPLES: dict[str, Callable[[Any, int], None]] = {"sm80": sm80, "sm90": sm90, "ordered": ordered}

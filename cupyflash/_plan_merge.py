"""Plans of `combine` and `combine_backward`, which merge partial results. Pure: nothing runs."""

from __future__ import annotations

import numpy as np

from ._compile import Spec
from ._params_merge import MOST_ARRAYS
from ._plan import KernelPlan, grid

WARPS = 4  # of a thread block, if its rows have fewer
MOST_BLOCKS = 2**16  # of kernels whose blocks go on to further rows


def merge_kernel(
    kernel: str, part: np.dtype, output: np.dtype, accumulator: np.dtype, rows: int, row_warps: int = 1, width: int = 16
) -> KernelPlan:
    """combine or combine_backward for so many rows, each of which has ``row_warps`` warps.

    Where it has several, no row is wider than ``width``.
    """
    warps = max(WARPS, row_warps)
    spec = Spec(
        kernel=kernel, element=part, output=output, accumulator=accumulator, gradient=part, head_dim=16,
        head_dim_v=width, dim_chunk=16, block_m=warps // row_warps, block_n=16, num_stages=2, num_warps=warps,
        causal=False,
    )  # fmt: skip
    gradients = part_names("douts", MOST_ARRAYS) + part_names("dlses", MOST_ARRAYS)
    return KernelPlan(
        spec=spec,
        grid=grid(rows, spec.block_m, 1) if kernel == "combine" else min(MOST_BLOCKS, -(-rows // WARPS)),
        threads=32 * warps,
        smem=warps * width * accumulator.itemsize if row_warps > 1 else 0,
        writes=("out", "lse") if kernel == "combine" else gradients,
    )


def part_names(side: str, count: int) -> tuple[str, ...]:
    """Names of the first tensors of a side of MergeParams."""
    return tuple(f"{side}_{n}" for n in range(count))

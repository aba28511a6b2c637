"""Plans of the sm80 family for float64."""

from __future__ import annotations

import numpy as np

from . import _tiles_f64 as _tiles
from ._block_map import KEY_MAP, map_arrays, map_bytes, mapped
from ._plan import Device, KernelPlan, Plan, Tile, grid, plan_of, spec_of
from ._problem import Problem

FLOAT64 = np.dtype(np.float64)
# Compute capabilities whose tensor cores multiply float64 faster than FMA does, or as fast; on the others since 8.0 they
# have a thirtieth of the multiprocessor's rate or less.
WITH_FLOAT64_CORES = frozenset({80, 90, 100})


def why_not_f64(device: Device) -> str | None:
    """Why float64 does not run on a card's tensor cores, or None."""
    if device.arch in WITH_FLOAT64_CORES:
        return None
    those = ", ".join(f"{arch / 10}" for arch in sorted(WITH_FLOAT64_CORES))
    return f"float64 on compute capability {device.arch / 10}: tensor cores for it are those of {those}"


def plan_f64(problem: Problem, device: Device, tile: Tile, copies: tuple[str, ...]) -> Plan:
    """One kernel, one thread block for each tile of queries."""
    row = _tiles.choose_double(problem, tile, device.smem)
    widths = _tiles.double_widths(row, problem.head_dim, problem.head_dim_v)
    kernel = KernelPlan(
        spec=spec_of("fwd_f64", problem, row, widths, max(widths)),
        grid=grid(problem.seqlen_q, row.block_m, problem.num_heads * problem.batch),
        threads=32 * row.warps,
        smem=_tiles.double_smem_bytes(row, *widths),
        writes=("out", "lse"),
    )
    kernels = mapped(problem, kernel, (KEY_MAP,))
    maps = map_arrays(problem, kernels)
    return plan_of(
        "sm80", device.name, problem, False, (row.block_m, row.block_n),
        kernels=kernels, copies=copies, maps=maps, workspace=map_bytes(maps),
    )  # fmt: skip

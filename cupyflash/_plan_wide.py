"""Plans for float64 and float32 on tensor cores: of the sm80 family, and the float32 forward of sm90."""

from __future__ import annotations

import numpy as np

from . import _tiles_wide as _tiles
from ._arrays import ArraySpec
from ._block_map import KEY_MAP, map_arrays, map_bytes, mapped
from ._plan import (
    Blocks,
    Device,
    KernelPlan,
    Plan,
    Tile,
    finishing,
    grid,
    partials,
    plan_of,
    sinks_kernel,
    spec_of,
    workspace,
)
from ._plan_simt import bias_kernel_simt, score_tile_simt
from ._plan_tensor_cores import backward_maps, backward_spec, backward_writes, preparation, temporaries_of
from ._problem import Problem
from ._terms import partial_of, score_kernels
from ._tiles import padded_widths

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
# Compute capabilities with tensor cores for float64 that are worth it; the others since 8.0 have little float64 at all.
WITH_FLOAT64_CORES = frozenset({80, 90, 100})
# A step of a product of float32 numbers in parts, whose error counts as that of so many additions: docs/numerics.md.
STEP = 16


def is_wide(problem: Problem) -> bool:
    """Whether the numbers are wider than tensor cores' 16 bits."""
    return problem.dtype in (FLOAT32, FLOAT64)


def _not_asked(problem: Problem) -> str:
    return f'float32, precision={problem.precision!r}: tensor cores multiply its parts with precision="highest"'


def why_not_wide(problem: Problem, device: Device, backward: bool) -> str | None:
    """Why float64, or float32, does not run on a card's tensor cores, or None."""
    if problem.dtype == FLOAT64 and device.arch not in WITH_FLOAT64_CORES:
        those = ", ".join(f"{arch / 10}" for arch in sorted(WITH_FLOAT64_CORES))
        return f"float64 on compute capability {device.arch / 10}: tensor cores for it are those of {those}"
    if problem.dtype == FLOAT32 and problem.precision != "highest":
        return _not_asked(problem)
    width = max(problem.head_dim, problem.head_dim_v)
    widest = _tiles.widest_backward(problem.dtype.itemsize, device.smem)
    if backward and width > widest:
        return f"{problem.dtype}, backward, head width {width}: dk and dv fit a thread block up to {widest}"
    return None


def _shortest(problem: Problem) -> int:
    return STEP if problem.dtype == FLOAT32 else 0


def _forward_plan(
    family: str, problem: Problem, device: Device, row: Blocks, kernel: KernelPlan, copies: tuple[str, ...]
) -> Plan:
    kernels = mapped(problem, kernel, (KEY_MAP,))
    maps = map_arrays(problem, kernels)
    return plan_of(
        family, device.name, problem, False, (row.block_m, row.block_n), _shortest(problem),
        kernels=kernels, copies=copies, maps=maps, workspace=map_bytes(maps),
    )  # fmt: skip


def plan_wide(problem: Problem, device: Device, tile: Tile, copies: tuple[str, ...]) -> Plan:
    """One kernel, one thread block for each tile of queries."""
    row = _tiles.choose_wide(problem, tile, device.smem)
    widths = _tiles.wide_widths(problem, row.sharers)
    kernel = KernelPlan(
        spec=spec_of("fwd_wide", problem, row, widths, max(widths), min_blocks=row.min_blocks),
        grid=grid(problem.seqlen_q, row.block_m, problem.num_heads * problem.batch),
        threads=32 * row.warps,
        smem=_tiles.wide_smem_bytes(row, problem),
        writes=("out", "lse"),
    )
    return _forward_plan("sm80", problem, device, row, kernel, copies)


def why_not_parts(problem: Problem, backward: bool) -> str | None:
    """Why wgmma does not multiply the parts of float32 numbers, or None."""
    if problem.precision != "highest":
        return _not_asked(problem)
    width = max(problem.head_dim, problem.head_dim_v)
    if backward:
        return "float32, backward: it is made of mma.sync"
    if width > _tiles.WIDEST_PARTS:
        return f"float32, head width {width}: outputs, twice, fit registers up to {_tiles.WIDEST_PARTS}"
    return None


def plan_parts(problem: Problem, device: Device, tile: Tile, copies: tuple[str, ...]) -> Plan:
    """The sm90 family's one kernel for float32, one thread block for each tile of queries."""
    row = _tiles.choose_parts(problem, tile, device.smem)
    widths = padded_widths(problem)
    kernel = KernelPlan(
        spec=spec_of("fwd_parts_sm90", problem, row, widths, max(widths)),
        grid=grid(problem.seqlen_q, row.block_m, problem.num_heads * problem.batch),
        threads=32 * row.warps,
        smem=_tiles.parts_smem_bytes(row, problem),
        writes=("out", "lse"),
    )
    return _forward_plan("sm90", problem, device, row, kernel, copies)


def plan_wide_backward(
    problem: Problem, device: Device, tile: Tile, wrt: frozenset[str], copies: tuple[str, ...]
) -> Plan:
    """bwd_delta prepares, bwd_wide computes, one thread block for each block of keys; bwd_finish sums partials.

    In a fixed order, whether or not one is asked for.
    """
    row = _tiles.choose_wide_backward(problem, tile, device.smem)
    widths = _tiles.wide_widths(problem)
    heads_k = problem.num_heads_k * problem.batch
    main = KernelPlan(
        spec=backward_spec("bwd_wide", problem, row, wrt, True, widths),
        grid=grid(problem.seqlen_k, row.block_n, heads_k),
        threads=32 * row.warps,
        smem=_tiles.wide_backward_smem_bytes(row, problem),
        writes=backward_writes(wrt),
        section=_tiles.wide_backward_section(row, heads_k),
    )
    *first, main = mapped(problem, main, backward_maps(wrt))
    kernels = (*first, preparation(problem, row, wrt, True), main)
    if "bias" in wrt:
        kernels += mapped(problem, bias_kernel_simt(problem, device, tile), (KEY_MAP,))
    if "sinks" in wrt:
        kernels += (sinks_kernel(problem),)
    zeroed: tuple[ArraySpec, ...] = ()
    if "score_args" in wrt:
        tile_of_score = score_tile_simt(problem, device)
        kernels += score_kernels(problem, *tile_of_score)
        zeroed = (partial_of(problem, tile_of_score[0]),)
    kernels += finishing(problem, wrt)
    maps = map_arrays(problem, kernels)
    temporaries = temporaries_of(problem, row, wrt, 1, row.block_m * widths[0])
    return plan_of(
        "sm80", device.name, problem, True, (row.block_m, row.block_n), _shortest(problem),
        kernels=kernels, copies=copies, maps=maps, temporaries=temporaries, zeroed=zeroed,
        workspace=workspace(problem, temporaries, partials(problem, wrt)) + map_bytes(maps + zeroed),
    )  # fmt: skip

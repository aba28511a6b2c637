"""Plans of the sm80 family: 16-bit types on every GPU since Ampere; float32 and float64 with kernels of their own."""

from __future__ import annotations

from dataclasses import replace

from . import _tiles_sm80 as _tiles
from ._block_map import KEY_MAP, mapped
from ._plan import Device, KernelPlan, Plan, Tile, grid, spec_of
from ._plan_tensor_cores import (
    backward_maps,
    backward_plan,
    backward_spec,
    backward_writes,
    preparation,
    temporaries_of,
    tensor_core_plan,
    why_not_tensor_cores,
)
from ._plan_wide import is_wide, plan_wide, plan_wide_backward, why_not_wide
from ._problem import Problem
from ._tiles import padded_widths


def why_not_sm80(problem: Problem, device: Device, backward: bool) -> str | None:
    """Why this family does not take a problem, or None."""
    if device.arch < 80:
        return f"{device.name} has compute capability {device.arch / 10}: mma.sync of these shapes came with 8.0"
    if is_wide(problem):
        return why_not_wide(problem, device, backward)
    return why_not_tensor_cores(problem, "mma.sync")


def plan_sm80(problem: Problem, device: Device, tile: Tile, copies: tuple[str, ...]) -> Plan:
    """One kernel, one thread block for each tile of queries."""
    if is_wide(problem):
        return plan_wide(problem, device, tile, copies)
    row = _tiles.choose_ampere("fwd_sm80", problem, tile, device.smem)
    widths = padded_widths(problem)
    pack = _tiles.packs_heads(row, problem)
    heads, rows = problem.num_heads, problem.seqlen_q
    if pack:
        heads, rows = problem.num_heads_k, rows * (heads // problem.num_heads_k)
    kernel = KernelPlan(
        spec=spec_of(
            "fwd_sm80", problem, row, widths, max(widths),
            overlap=row.overlap, min_blocks=row.min_blocks, q_held=row.q_held, pack_heads=pack,
            split_p=problem.splits_p,
        ),
        grid=grid(rows, row.block_m, heads * problem.batch),
        threads=32 * row.warps,
        smem=_tiles.ampere_smem_bytes(row, *widths),
        writes=("out", "lse"),
    )  # fmt: skip
    return tensor_core_plan("sm80", problem, device, row, mapped(problem, kernel, (KEY_MAP,)), copies)


def plan_sm80_backward(
    problem: Problem,
    device: Device,
    tile: Tile,
    wrt: frozenset[str],
    copies: tuple[str, ...],
    deterministic: bool,
) -> Plan:
    """bwd_delta prepares, bwd_sm80 computes, one thread block for each block of keys; bwd_finish sums partials."""
    if is_wide(problem):
        return plan_wide_backward(problem, device, tile, wrt, copies)
    row = _tiles.choose_ampere_backward(problem, tile, device.smem)
    widths = padded_widths(problem)
    heads_k = problem.num_heads_k * problem.batch
    jobs = grid(problem.seqlen_k, row.block_n, heads_k)
    main = KernelPlan(
        spec=replace(backward_spec("bwd_sm80", problem, row, wrt, deterministic), split_p=problem.splits_p),
        grid=jobs,
        threads=32 * row.warps,
        smem=_tiles.ampere_backward_smem_bytes(row, *widths, _tiles.part_bytes(problem, row)),
        writes=backward_writes(wrt),
        section=_tiles.ampere_backward_section(row, heads_k),
    )
    *maps, main = mapped(problem, main, backward_maps(wrt))
    kernels = (*maps, preparation(problem, row, wrt, deterministic), main)
    temporaries = temporaries_of(problem, row, wrt, 1 if deterministic else row.warps, row.block_m * widths[0])
    return backward_plan("sm80", problem, device, row, wrt, kernels, temporaries, copies)

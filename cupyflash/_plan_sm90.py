"""Plans of the sm90 family: 16-bit types on Hopper; the float32 forward with a kernel of its own."""

from __future__ import annotations

from dataclasses import replace

from . import _tiles_sm90 as _tiles
from ._block_map import KEY_MAP, mapped
from ._plan import MAX_GRID, Device, KernelPlan, Plan, Tile, grid, spec_of
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
from ._plan_wide import FLOAT32, plan_parts, why_not_parts
from ._problem import Problem
from ._tiles import padded_widths

# Whether entries have lengths of their own here. The kernels can, and the emulator runs them. But the maps of such
# entries begin before their array (_tma.by_entry_length), and on an H200 a copy of Q by one of them was an illegal
# address where the array was the first in its memory. Until a map never begins outside, sm80 takes these calls.
TAKES_LENGTHS = False


def why_not_sm90(problem: Problem, device: Device, backward: bool) -> str | None:
    """Why the Hopper family does not take a problem, or None."""
    if device.arch != 90:
        return f"{device.name} has compute capability {device.arch / 10}: TMA and wgmma are those of 9.0"
    if problem.dtype == FLOAT32:
        return why_not_parts(problem, backward)
    if problem.options.lens and not TAKES_LENGTHS:
        return "q_lens, kv_lens, packed sequences: their tensor maps begin before the arrays, which TMA may refuse"
    if problem.splits_p:
        return "precision='highest': P and dS in two parts would not fit its registers and shared memory"
    return why_not_tensor_cores(problem, "wgmma")


def plan_sm90(
    problem: Problem, device: Device, tile: Tile, copies: tuple[str, ...], unmapped: tuple[str, ...]
) -> Plan:
    """One kernel, of thread blocks that work on one tile of queries after another; ``unmapped`` is copied for TMA."""
    if problem.dtype == FLOAT32:  # without TMA
        return plan_parts(problem, device, tile, copies)
    copies += unmapped
    row = _tiles.choose_hopper("fwd_sm90", problem, tile, device.smem)
    widths = padded_widths(problem)
    all_heads = problem.num_heads * problem.batch
    tiles, blocks = _tiles_of(problem, "q", row.block_m), device.sms * row.min_blocks
    if tiles > MAX_GRID - 2 * blocks:  # a block's next index stays within 32 bits
        raise ValueError(f"{tiles} tiles: the sm90 family takes at most {MAX_GRID - 2 * blocks}")
    # Tiles go to whoever is free, not in a fixed order.
    tickets = problem.options.packed is not None or (tiles > blocks and (row.sections or problem.options.lens))
    kernel = KernelPlan(
        spec=spec_of(
            "fwd_sm90", problem, row, widths, max(widths),
            q_stages=row.q_stages, overlap=row.overlap, take_turns=row.take_turns, min_blocks=row.min_blocks,
        ),
        grid=min(tiles, blocks),
        threads=32 * row.warps,
        smem=_tiles.hopper_smem_bytes(row, *widths),
        writes=("out", "lse", "tickets") if tickets else ("out", "lse"),
        boxes=(("q", 64), ("k", row.block_n), ("v", row.block_n)),
        section=_tiles.section(row, problem, all_heads),
    )  # fmt: skip
    return tensor_core_plan("sm90", problem, device, row, mapped(problem, kernel, (KEY_MAP,)), copies)


def plan_sm90_backward(
    problem: Problem,
    device: Device,
    tile: Tile,
    wrt: frozenset[str],
    copies: tuple[str, ...],
    deterministic: bool,
) -> Plan:
    """bwd_delta prepares, bwd_sm90 computes; in arrival order bwd_dq_sm90 rounds dq; bwd_finish sums partials."""
    row = _tiles.choose_hopper_backward(problem, tile, device.smem)
    deterministic = deterministic or not row.arrival
    heads_k = problem.num_heads_k * problem.batch
    jobs = _tiles_of(problem, "k", row.block_n)
    if jobs > MAX_GRID - 4 * device.sms:  # tickets stay within 32 bits
        raise ValueError(f"{jobs} blocks of keys: the sm90 family takes at most {MAX_GRID - 4 * device.sms}")
    main = KernelPlan(
        spec=backward_spec("bwd_sm90", problem, row, wrt, deterministic),
        grid=min(jobs, device.sms),
        threads=32 * row.warps,
        smem=_tiles.hopper_backward_smem_bytes(row, *padded_widths(problem)),
        writes=backward_writes(wrt),
        boxes=(("q", row.block_m), ("k", row.block_n), ("v", row.block_n), ("dout", row.block_m)),
        section=_tiles.backward_section(row, problem, deterministic, heads_k),
    )
    *maps, main = mapped(problem, main, backward_maps(wrt))
    kernels = [*maps, preparation(problem, row, wrt, deterministic, rounding=not deterministic), main]
    if "q" in wrt and not deterministic:
        kernels.append(_sm90_rounding(problem, row, wrt))
    temporaries = temporaries_of(problem, row, wrt, 1, _tiles.dq_numbers(row, *padded_widths(problem)))
    return backward_plan("sm90", problem, device, row, wrt, tuple(kernels), temporaries, copies)


def _tiles_of(problem: Problem, name: str, block: int) -> int:
    """How many blocks of the rows of "q" or "k" there are, of packed sequences at most."""
    heads, longest, _ = problem.tail(name)
    blocks = grid(longest, block, heads * problem.batch)
    if problem.options.packed is None:
        return blocks
    return min(blocks, (problem.rows_of(name) // block + problem.batch) * heads)


def _sm90_rounding(problem: Problem, row: _tiles.HopperBackwardRow, wrt: frozenset[str]) -> KernelPlan:
    """bwd_dq_sm90: dq from its sums."""
    warps = 8
    spec = backward_spec("bwd_dq_sm90", problem, row, wrt, False)
    return KernelPlan(
        spec=replace(spec, gradient=problem.dtype, num_warps=warps, causal=False, want_dk=True, want_dv=True),
        grid=grid(problem.seqlen_q, row.block_m, problem.num_heads * problem.batch),
        threads=32 * warps,
        smem=0,
        writes=("dq",),
    )

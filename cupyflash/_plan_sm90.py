"""Plans of the sm90 family: 16-bit types on Hopper."""

from __future__ import annotations

from dataclasses import replace

from . import _tiles_sm90 as _tiles
from ._compile import Spec
from ._plan import MAX_GRID, Device, KernelPlan, Plan, Tile, chains, grid, sign
from ._plan_backward import backward_plan, backward_spec, keyed, preparation, temporaries_of
from ._problem import Problem
from ._tiles import padded_widths


def why_not_sm90(problem: Problem, device: Device) -> str | None:
    """Why the Hopper family does not take a problem, or None."""
    if device.arch != 90:
        return f"{device.name} has compute capability {device.arch / 10}: TMA and wgmma are those of 9.0"
    if problem.dtype.itemsize != 2:
        return f"{problem.dtype}: wgmma multiplies float16 and bfloat16"
    if problem.precision is not None:
        return f"precision={problem.precision!r}: P is rounded once for the tensor cores"
    return None


def plan_sm90(problem: Problem, device: Device, tile: Tile, copies: tuple[str, ...]) -> Plan:
    row = _tiles.choose_hopper("fwd_sm90", problem, tile, device.smem)
    widths = padded_widths(problem)
    all_heads = problem.num_heads * problem.batch
    tiles = grid(problem.seqlen_q, row.block_m, all_heads)
    if tiles > MAX_GRID - 2 * device.sms:  # a block's next index stays within 32 bits
        raise ValueError(f"{tiles} tiles: the sm90 family takes at most {MAX_GRID - 2 * device.sms}")
    spec = Spec(
        kernel="fwd_sm90",
        element=problem.dtype,
        output=problem.out_dtype,
        accumulator=problem.accumulator,
        gradient=problem.dtype,
        head_dim=widths[0],
        head_dim_v=widths[1],
        dim_chunk=max(widths),
        block_m=row.block_m,
        block_n=row.block_n,
        num_stages=row.stages,
        num_warps=row.warps,
        causal=problem.causal,
        scale_sign=sign(problem.scale),
        q_stages=row.q_stages,
        overlap=row.overlap,
        take_turns=row.take_turns,
    )
    tickets = row.sections and tiles > device.sms  # tiles go to whoever is free, not in a fixed order
    kernel = KernelPlan(
        spec=spec,
        grid=min(tiles, device.sms),
        threads=32 * row.warps,
        smem=_tiles.hopper_smem_bytes("fwd_sm90", row, *widths),
        writes=("out", "lse", "tickets") if tickets else ("out", "lse"),
        boxes=(("q", 64), ("k", row.block_n), ("v", row.block_n)),
        section=_tiles.section(row, problem, all_heads),
    )
    chain_d, chain_k, chain_q = chains(problem, False)
    return Plan(
        family="sm90",
        device=device.name,
        direction="forward",
        block_m=row.block_m,
        block_n=row.block_n,
        kernels=(kernel,),
        copies=copies,
        chain_d=chain_d,
        chain_k=chain_k,
        chain_q=chain_q,
        rounds_p=True,
    )


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
    jobs = grid(problem.seqlen_k, row.block_n, heads_k)
    if jobs > MAX_GRID - 4 * device.sms:  # tickets stay within 32 bits
        raise ValueError(f"{jobs} blocks of keys: the sm90 family takes at most {MAX_GRID - 4 * device.sms}")
    main = KernelPlan(
        spec=backward_spec("bwd_sm90", problem, row, wrt, deterministic),
        grid=min(jobs, device.sms),
        threads=32 * row.warps,
        smem=_tiles.hopper_backward_smem_bytes(row, *padded_widths(problem)),
        writes=(*keyed(wrt), *(("dq", "dq_sums", "semaphores") if "q" in wrt else ()), "tickets"),
        boxes=(("q", row.block_m), ("k", row.block_n), ("v", row.block_n), ("dout", row.block_m)),
        section=_tiles.backward_section(row, problem, deterministic, heads_k),
    )
    kernels = [preparation(problem, row, wrt, deterministic, rounding=not deterministic), main]
    if "q" in wrt and not deterministic:
        kernels.append(_sm90_rounding(problem, row, wrt))
    temporaries = temporaries_of(problem, row, wrt, 1, _tiles.dq_numbers(row, *padded_widths(problem)))
    return backward_plan("sm90", problem, device, row, wrt, tuple(kernels), temporaries, copies)


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

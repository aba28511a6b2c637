"""Plans of the sm90 family: 16-bit types on Hopper."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from . import _tiles_sm90 as _tiles
from ._arrays import ArraySpec
from ._compile import Spec
from ._plan import MAX_GRID, Device, KernelPlan, Plan, Tile, by_entry, chains, grid, row_kernel, sign, workspace
from ._problem import Problem
from ._tiles import ROW_KERNELS, padded_widths


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
    keyed = tuple(f"d{name}" for name in ("k", "v") if name in wrt)
    main = KernelPlan(
        spec=_sm90_backward_spec("bwd_sm90", problem, row, wrt, deterministic),
        grid=min(jobs, device.sms),
        threads=32 * row.warps,
        smem=_tiles.hopper_backward_smem_bytes(row, *padded_widths(problem)),
        writes=(*keyed, *(("dq", "dq_sums", "semaphores") if "q" in wrt else ()), "tickets"),
        boxes=(("q", row.block_m), ("k", row.block_n), ("v", row.block_n), ("dout", row.block_m)),
        section=_tiles.backward_section(row, problem, deterministic, heads_k),
    )
    kernels = [_sm90_preparation(problem, row, wrt, deterministic), main]
    if "q" in wrt and not deterministic:
        kernels.append(_sm90_rounding(problem, row, wrt))
    partial = [name for name in sorted(wrt) if by_entry(problem, wrt, name)]
    kernels += [row_kernel("bwd_finish", problem, (f"d{name}",)) for name in partial]
    temporaries = _sm90_temporaries(problem, row, wrt)
    chain_d, chain_k, chain_q = chains(problem, True)
    return Plan(
        family="sm90",
        device=device.name,
        direction="backward",
        block_m=row.block_m,
        block_n=row.block_n,
        kernels=tuple(kernels),
        workspace=workspace(problem, temporaries, partial),
        copies=copies,
        chain_d=chain_d,
        chain_k=chain_k,
        chain_q=chain_q,
        rounds_p=True,
        temporaries=temporaries,
    )


def _sm90_backward_spec(
    kernel: str, problem: Problem, row: _tiles.HopperBackwardRow, wrt: frozenset[str], deterministic: bool
) -> Spec:
    head_dim, head_dim_v = padded_widths(problem)
    return Spec(
        kernel=kernel,
        element=problem.dtype,
        output=problem.out_dtype,
        accumulator=problem.accumulator,
        gradient=problem.accumulator if by_entry(problem, wrt, "k") else problem.dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dim_chunk=max(head_dim, head_dim_v),
        block_m=row.block_m,
        block_n=row.block_n,
        num_stages=row.stages,
        num_warps=row.warps,
        causal=problem.causal,
        scale_sign=sign(problem.scale),
        gradient_q=problem.accumulator if by_entry(problem, wrt, "q") else problem.dtype,
        deterministic=deterministic,
        want_dq="q" in wrt,
        want_dk="k" in wrt,
        want_dv="v" in wrt,
    )


def _sm90_preparation(
    problem: Problem, row: _tiles.HopperBackwardRow, wrt: frozenset[str], deterministic: bool
) -> KernelPlan:
    """bwd_delta over the query tiles of the main kernel; where there is none it still sets the tickets to 0."""
    warps = ROW_KERNELS["bwd_delta"][1]
    by_tile = _sm90_backward_spec("bwd_delta", problem, row, wrt, deterministic)
    # Less than the main kernel is compiled for: one preparation serves many of them.
    spec = replace(
        by_tile, gradient=problem.dtype, head_dim=16, head_dim_v=16, dim_chunk=16, block_n=16, num_stages=2,
        num_warps=warps, scale_sign=1, want_dq=True, want_dk=True, want_dv=True,
    )  # fmt: skip
    tiles = grid(problem.seqlen_q, row.block_m, problem.num_heads * problem.batch)
    ordered = ("semaphores", "dq" if deterministic else "dq_sums") if "q" in wrt else ()
    return KernelPlan(
        spec=spec,
        grid=tiles or problem.batch,
        threads=32 * warps,
        smem=0,
        writes=("delta", "exponents", "tickets", *ordered),
    )


def _sm90_rounding(problem: Problem, row: _tiles.HopperBackwardRow, wrt: frozenset[str]) -> KernelPlan:
    """bwd_dq_sm90: dq from its sums."""
    warps = 8
    spec = _sm90_backward_spec("bwd_dq_sm90", problem, row, wrt, False)
    return KernelPlan(
        spec=replace(spec, gradient=problem.dtype, num_warps=warps, causal=False, want_dk=True, want_dv=True),
        grid=grid(problem.seqlen_q, row.block_m, problem.num_heads * problem.batch),
        threads=32 * warps,
        smem=0,
        writes=("dq",),
    )


def _sm90_temporaries(
    problem: Problem, row: _tiles.HopperBackwardRow, wrt: frozenset[str]
) -> tuple[ArraySpec, ...]:
    heads, tiles = problem.num_heads, -(-problem.seqlen_q // row.block_m)
    numbers, integers = problem.accumulator, np.dtype(np.int32)
    rows = [(name, (heads, tiles * row.block_m), numbers) for name in ("delta", "exponents")]
    always = (*rows, ("tickets", (), integers))
    if "q" not in wrt:
        return always
    of_tile = _tiles.dq_numbers(row, *padded_widths(problem))
    return (*always, ("semaphores", (heads, tiles), integers), ("dq_sums", (heads, tiles, of_tile), numbers))

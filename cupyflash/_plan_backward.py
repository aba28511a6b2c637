"""What plans of the backwards on tensor cores share: one pass over the scores, dq added up in a fixed order."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from ._arrays import ArraySpec
from ._compile import Spec
from ._plan import Device, KernelPlan, Plan, by_entry, chains, grid, row_kernel, sign, workspace
from ._problem import Problem
from ._tiles import ROW_KERNELS, padded_widths


class Row(Protocol):
    """What is asked of a row of a tile table."""

    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def warps(self) -> int: ...


def keyed(wrt: frozenset[str]) -> tuple[str, ...]:
    """The gradients that belong to keys."""
    return tuple(f"d{name}" for name in ("k", "v") if name in wrt)


def backward_spec(kernel: str, problem: Problem, row: Row, wrt: frozenset[str], deterministic: bool) -> Spec:
    """The Spec of a kernel that computes gradients, or takes part in it."""
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


def preparation(
    problem: Problem, row: Row, wrt: frozenset[str], deterministic: bool, rounding: bool = False
) -> KernelPlan:
    """bwd_delta over the query tiles of the main kernel; where there is none it still sets the tickets to 0.

    It writes dq of tiles that no key block meets, unless a kernel behind the main one writes all of it (``rounding``).
    """
    warps = ROW_KERNELS["bwd_delta"][1]
    by_tile = backward_spec("bwd_delta", problem, row, wrt, deterministic)
    # Less than the main kernel is compiled for: one preparation serves many of them.
    spec = replace(
        by_tile, gradient=problem.dtype, head_dim=16, head_dim_v=16, dim_chunk=16, block_n=16, num_stages=2,
        num_warps=warps, scale_sign=1, want_dq=True, want_dk=True, want_dv=True,
    )  # fmt: skip
    tiles = grid(problem.seqlen_q, row.block_m, problem.num_heads * problem.batch)
    of_dq = ("semaphores", *(() if rounding else ("dq",)), *(() if deterministic else ("dq_sums",)))
    return KernelPlan(
        spec=spec,
        grid=tiles or problem.batch,
        threads=32 * warps,
        smem=0,
        writes=("delta", "exponents", "tickets", *(of_dq if "q" in wrt else ())),
    )


def temporaries_of(
    problem: Problem, row: Row, wrt: frozenset[str], semaphores: int, numbers: int
) -> tuple[ArraySpec, ...]:
    """Temporary arrays; of each query tile so many semaphores, and numbers of dq before it is whole."""
    heads, tiles = problem.num_heads, -(-problem.seqlen_q // row.block_m)
    accumulator, integers = problem.accumulator, np.dtype(np.int32)
    rows = [(name, (heads, tiles * row.block_m), accumulator) for name in ("delta", "exponents")]
    always = (*rows, ("tickets", (), integers))
    if "q" not in wrt:
        return always
    return (
        *always,
        ("semaphores", (heads, tiles * semaphores), integers),
        ("dq_sums", (heads, tiles, numbers), accumulator),
    )


def backward_plan(
    family: str,
    problem: Problem,
    device: Device,
    row: Row,
    wrt: frozenset[str],
    kernels: tuple[KernelPlan, ...],
    temporaries: tuple[ArraySpec, ...],
    copies: tuple[str, ...],
) -> Plan:
    """The plan that runs these kernels, and then sums what was computed for each batch entry alone."""
    partial = [name for name in sorted(wrt) if by_entry(problem, wrt, name)]
    chain_d, chain_k, chain_q = chains(problem, True)
    return Plan(
        family=family,
        device=device.name,
        direction="backward",
        block_m=row.block_m,
        block_n=row.block_n,
        kernels=(*kernels, *(row_kernel("bwd_finish", problem, (f"d{name}",)) for name in partial)),
        workspace=workspace(problem, temporaries, partial),
        copies=copies,
        chain_d=chain_d,
        chain_k=chain_k,
        chain_q=chain_q,
        rounds_p=True,
        temporaries=temporaries,
    )

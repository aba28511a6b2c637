"""What plans of the families on tensor cores share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ._arrays import ArraySpec
from ._block_map import KEY_MAP, QUERY_MAP, map_arrays, map_bytes, mapped
from ._compile import Spec
from ._plan import (
    FEATURES_OFF,
    Blocks,
    Device,
    KernelPlan,
    Plan,
    bias_kernel,
    by_entry,
    by_tile,
    finishing,
    grid,
    keyed,
    partials,
    plan_of,
    sinks_kernel,
    spec_of,
    workspace,
)
from ._problem import Problem
from ._terms import partial_of, score_kernels
from ._tiles import ROW_KERNELS, padded_widths
from ._tiles_sm80 import bias_row, bias_smem_bytes, score_row, score_smem_bytes


def why_not_tensor_cores(problem: Problem, instruction: str) -> str | None:
    """Why tensor cores do not take a problem, whatever the card, or None."""
    if problem.dtype.itemsize != 2:
        return f"{problem.dtype}: {instruction} multiplies float16 and bfloat16"
    return None


def tensor_core_plan(
    family: str, problem: Problem, device: Device, row: Blocks, kernels: tuple[KernelPlan, ...],
    copies: tuple[str, ...], backward: bool = False, workspace: int = 0, **more: Any,
) -> Plan:  # fmt: skip
    """A plan whose P, and dS, are rounded for tensor cores: once, or in two parts."""
    maps = map_arrays(problem, kernels)
    return plan_of(
        family, device.name, problem, backward, (row.block_m, row.block_n), kernels=kernels, copies=copies,
        rounds_p=True, p_parts=2 if problem.splits_p else 1, maps=maps, workspace=workspace + map_bytes(maps), **more,
    )  # fmt: skip


# ------------------------------------------------- the backward: one pass over the scores, dq added up in a fixed order


def backward_writes(wrt: frozenset[str]) -> tuple[str, ...]:
    """What the main kernel writes."""
    return (*keyed(wrt), *(("dq", "dq_sums", "semaphores") if "q" in wrt else ()), "tickets")


def backward_spec(
    kernel: str, problem: Problem, row: Blocks, wrt: frozenset[str], deterministic: bool,
    widths: tuple[int, int] | None = None,
) -> Spec:  # fmt: skip
    """The Spec of a kernel that computes gradients, or takes part in it; ``widths`` where they are padded further."""
    widths = widths or padded_widths(problem)
    return spec_of(
        kernel, problem, row, widths, max(widths),
        gradient=problem.accumulator if by_entry(problem, wrt, "k") else problem.dtype,
        gradient_q=problem.accumulator if by_entry(problem, wrt, "q") else problem.dtype,
        deterministic=deterministic, want_dq="q" in wrt, want_dk="k" in wrt, want_dv="v" in wrt,
    )  # fmt: skip


def preparation(
    problem: Problem, row: Blocks, wrt: frozenset[str], deterministic: bool, rounding: bool = False
) -> KernelPlan:
    """bwd_delta over the query tiles of the main kernel; where there is none it still sets the tickets to 0.

    It writes dq of tiles that no key block meets, unless a kernel behind the main one writes all of it (``rounding``).
    """
    warps = ROW_KERNELS["bwd_delta"][1]
    by_tile = backward_spec("bwd_delta", problem, row, wrt, deterministic)
    # Less than the main kernel is compiled for: one preparation serves many of them.
    spec = replace(
        by_tile, gradient=problem.dtype, head_dim=16, head_dim_v=16, dim_chunk=16, block_n=16, num_stages=2,
        num_warps=warps, scale_sign=1, want_dq=True, want_dk=True, want_dv=True, **FEATURES_OFF,
    )  # fmt: skip
    if "q" in wrt and not rounding and problem.options.hides_pairs:  # it reads the map of the main kernel's blocks
        hides = {name: getattr(by_tile, name) for name in ("has_mask", "mask_function", "segments")}
        spec = replace(spec, block_n=row.block_n, **hides)
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
    problem: Problem, row: Blocks, wrt: frozenset[str], semaphores: int, numbers: int
) -> tuple[ArraySpec, ...]:
    """Temporary arrays; of each query tile so many semaphores, and numbers of dq before it is whole."""
    block_m, accumulator, integers = row.block_m, problem.accumulator, np.dtype(np.int32)
    rows = [(name, by_tile(problem, block_m, block_m), accumulator) for name in ("delta", "exponents")]
    tickets = () if problem.options.packed is None else problem.batch_shape
    always = (*rows, ("tickets", tickets, integers))
    if "q" not in wrt:
        return always
    return (
        *always,
        ("semaphores", by_tile(problem, block_m, semaphores), integers),
        ("dq_sums", by_tile(problem, block_m, 1, numbers), accumulator),
    )


def backward_maps(wrt: frozenset[str]) -> tuple[str, ...]:
    """The maps that the main kernel reads: of dq's key blocks where there is dq."""
    return (QUERY_MAP, KEY_MAP) if "q" in wrt else (QUERY_MAP,)


def backward_plan(
    family: str,
    problem: Problem,
    device: Device,
    row: Blocks,
    wrt: frozenset[str],
    kernels: tuple[KernelPlan, ...],
    temporaries: tuple[ArraySpec, ...],
    copies: tuple[str, ...],
) -> Plan:
    """The plan that runs these kernels, and then sums what was computed for each batch entry alone."""
    if "bias" in wrt:
        kernels += mapped(problem, _bias_kernel(problem), (KEY_MAP,))
    if "sinks" in wrt:
        kernels += (sinks_kernel(problem),)
    zeroed: tuple[ArraySpec, ...] = ()
    if "score_args" in wrt:
        tile_of_score = _score_tile(problem)
        kernels += score_kernels(problem, *tile_of_score)
        zeroed = (partial_of(problem, tile_of_score[0]),)
    return tensor_core_plan(
        family, problem, device, row, (*kernels, *finishing(problem, wrt)), copies, backward=True,
        workspace=workspace(problem, temporaries, partials(problem, wrt)) + map_bytes(zeroed),
        temporaries=temporaries, zeroed=zeroed,
    )  # fmt: skip


def _bias_kernel(problem: Problem) -> KernelPlan:
    """bwd_bias_sm80: dbias, for both families. Its tile fits every card since Ampere."""
    widths = padded_widths(problem)
    row = bias_row(*widths)
    spec = spec_of("bwd_bias_sm80", problem, row, widths, max(widths))
    return bias_kernel("bwd_bias_sm80", problem, spec, bias_smem_bytes(row, *widths))


def _score_tile(problem: Problem) -> tuple[Spec, int]:
    """The Spec of bwd_score_sm80, but for its term, and its shared memory; the tile is that of bwd_bias_sm80."""
    widths = padded_widths(problem)
    row = score_row(*widths)
    return spec_of("bwd_score_sm80", problem, row, widths, max(widths)), score_smem_bytes(row, *widths)

"""From a Problem and a Device to a Plan: which family, which tile, which kernels, how large. Pure: nothing runs.

Tiles are chosen without batch or heads, so that an entry's bits do not depend on its batch.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from . import _cpu
from ._plan import Device, Plan, Tile, plan_of, rest_kernel
from ._plan_simt import plan_simt
from ._plan_sm80 import plan_sm80, plan_sm80_backward, why_not_sm80
from ._plan_sm90 import plan_sm90, plan_sm90_backward, why_not_sm90
from ._problem import Problem

GPU_FAMILIES = ("sm90", "sm80", "simt")  # fastest first
CPU_FAMILY = "cpu"
MAX_HEAD_DIM = 256
MAX_SEQLEN = 2**31 - 1 - 1024  # kernels count rows in 32 bits, up to a tile beyond the end


def check_family(family: object, on_gpu: bool) -> None:
    """ValueError unless ``family`` can run where the arrays lie."""
    here = GPU_FAMILIES if on_gpu else (CPU_FAMILY,)
    if family is None or family in here:
        return
    arrays = "CuPy arrays" if on_gpu else "NumPy arrays"
    if family in (*GPU_FAMILIES, CPU_FAMILY):
        raise ValueError(f"family={family!r} with {arrays}: {arrays} run on {' or '.join(map(repr, here))}")
    raise ValueError(f"family={family!r}: families are {', '.join(map(repr, (*GPU_FAMILIES, CPU_FAMILY)))}")


def check_tile(tile: object) -> Tile:
    """The tile of ``tile=``, all None where there is none; TypeError if it is no Tile."""
    if tile is None:
        return _PLANNERS_TILE
    if isinstance(tile, Tile):
        return tile
    raise TypeError(f"tile={tile!r}: tile is a cupyflash.Tile or None")


_PLANNERS_TILE = Tile()


def plan_cpu(problem: Problem, family: object, tile: object, wrt: frozenset[str] | None) -> Plan:
    """The plan of a NumPy call: forward where ``wrt`` is None, else the backward for these gradients."""
    check_family(family, on_gpu=False)
    return _plan_cpu(problem, check_tile(tile), wrt is not None)


@lru_cache(maxsize=4096)
def _plan_cpu(problem: Problem, tile: Tile, backward: bool) -> Plan:
    for name in ("stages", "warps"):
        if getattr(tile, name) is not None:
            raise ValueError(f"Tile({name}={getattr(tile, name)}) with NumPy arrays: the CPU has block sizes only")
    block_m, block_n = _cpu.tile(problem, backward)
    return plan_of(CPU_FAMILY, "cpu", problem, backward, (tile.block_m or block_m, tile.block_n or block_n))


def plan_gpu(
    problem: Problem,
    device: Device,
    family: object,
    tile: object,
    wrt: frozenset[str] | None,
    copies: tuple[str, ...] = (),
    unmapped: tuple[str, ...] = (),
    deterministic: bool = True,
) -> Plan:
    """The plan of a GPU call: forward where ``wrt`` is None, else the backward for these gradients.

    ``copies`` are the inputs that no family reads in place, ``unmapped`` those that TMA does not, with the reason.
    Without ``deterministic`` the backward may add in the order of arrival.
    """
    check_family(family, on_gpu=True)
    return _plan_gpu(problem, device, family, check_tile(tile), wrt, copies, unmapped, deterministic)


@lru_cache(maxsize=4096)
def _plan_gpu(
    problem: Problem,
    device: Device,
    family: object,
    tile: Tile,
    wrt: frozenset[str] | None,
    copies: tuple[str, ...],
    unmapped: tuple[str, ...],
    deterministic: bool,
) -> Plan:
    check_gpu_limits(problem)
    chosen, declined = _choose_family(problem, device, family, wrt is not None)
    if chosen == "simt":
        plan = plan_simt(problem, device, tile, wrt, copies)
    elif chosen == "sm80":
        plan = (
            plan_sm80(problem, device, tile, copies)
            if wrt is None
            else plan_sm80_backward(problem, device, tile, wrt, copies, deterministic)
        )
    else:
        plan = (
            plan_sm90(problem, device, tile, copies, unmapped)
            if wrt is None
            else plan_sm90_backward(problem, device, tile, wrt, copies + unmapped, deterministic)
        )
    if problem.options.packed is not None:
        plan = replace(plan, kernels=(rest_kernel(problem, wrt), *plan.kernels))
    tuned = tuple(f"{step.name}: a tile that tune() has kept" for step in plan.kernels if tile.row(step.name))
    return replace(plan, declined=declined, notes=plan.notes + tuned)


def _choose_family(
    problem: Problem, device: Device, family: object, backward: bool
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The fastest family that takes a problem, or the one that the caller wants; and why faster ones do not."""
    declined: tuple[tuple[str, str], ...] = ()
    for name, why_not in (("sm90", why_not_sm90), ("sm80", why_not_sm80)):
        why = why_not(problem, device, backward)
        if why is None and family in (None, name):
            return name, declined
        if family == name:
            raise ValueError(f"family={name!r}: {why}")
        if why is not None:
            declined += ((name, why),)
    return "simt", declined


def check_gpu_limits(problem: Problem) -> None:
    """ValueError where a problem is beyond what kernels can address."""
    for name, width in (("q", problem.head_dim), ("v", problem.head_dim_v)):
        if width > MAX_HEAD_DIM:
            raise ValueError(f"{name}.shape[-1]={width}: the GPU families take head widths from 1 to {MAX_HEAD_DIM}")
    rows = problem.options.packed or (problem.seqlen_q, problem.seqlen_k)
    for name, length in zip("qk", map(max, rows, (problem.seqlen_q, problem.seqlen_k)), strict=True):
        if length > MAX_SEQLEN:
            raise ValueError(f"{name} has {length} rows: the GPU families take at most {MAX_SEQLEN}")

"""From a Problem and a Device to a Plan: which family, which tile, which kernels, how large. Pure: nothing runs.

Tiles are chosen without batch or heads, so that an entry's bits do not depend on its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from . import _cpu, _tiles
from ._arrays import ArraySpec
from ._compile import Spec
from ._problem import Problem

GPU_FAMILIES = ("sm90", "simt")  # fastest first
CPU_FAMILY = "cpu"
MAX_HEAD_DIM = 256
MAX_SEQLEN = 2**31 - 1 - 1024  # kernels count rows in 32 bits, up to a tile beyond the end
MAX_GRID = 2**31 - 1


@dataclass(frozen=True)
class Tile:
    """Block sizes for one call, in place of the planner's; None leaves a field to the planner.

    Parameters
    ----------
    block_m, block_n : int, optional
        Query rows and keys of one tile.
    stages, warps : int, optional
        GPU only: buffers that loads run ahead in, and warps of a thread block.
    """

    block_m: int | None = None
    block_n: int | None = None
    stages: int | None = None
    warps: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "stages", "warps"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Tile({name}={value!r}): {name} is an integer or None")
            if value < 1:
                raise ValueError(f"Tile({name}={value}): {name} is at least 1")

    def row(self, kernel: str) -> Any:
        """The whole row of the tile table for a kernel: a Tile has none, Rows may."""
        return None


@dataclass(frozen=True)
class Rows(Tile):
    """Whole rows for some kernels, in place of the table's: candidates, and the winners that ``tune`` has kept."""

    rows: tuple[tuple[str, _tiles.Row], ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: every call of a tuned problem looks up its plan."""
        return hash(self.rows)

    def row(self, kernel: str) -> Any:
        """The row for a kernel, or None, where the table's counts."""
        return dict(self.rows).get(kernel)


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    name: str
    arch: int  # 90 for compute capability 9.0
    smem: int  # bytes of shared memory that one thread block may have, opted in
    sms: int  # multiprocessors


_KB = 1024
DEVICES = {
    f"sm_{arch}": Device(f"sm_{arch}", arch, smem * _KB, sms)
    for arch, smem, sms in (
        (60, 48, 56), (61, 48, 28), (62, 48, 2), (70, 96, 80), (72, 96, 8), (75, 64, 68), (80, 163, 108), (86, 99, 82),
        (87, 163, 16), (89, 99, 128), (90, 227, 132), (100, 227, 148), (103, 227, 148), (110, 227, 20),
        (120, 99, 170), (121, 99, 48),
    )
}  # fmt: skip


@dataclass(frozen=True)
class KernelPlan:
    """One kernel of a plan."""

    spec: Spec
    grid: int
    threads: int
    smem: int
    writes: tuple[str, ...]
    boxes: tuple[tuple[str, int], ...] = ()  # tensors that come by TMA, and the rows of one copy
    section: int = 1  # persistent kernels: how many heads run side by side

    @property
    def name(self) -> str:
        """The kernel's name: that of its file and entry point."""
        return self.spec.kernel


@dataclass(frozen=True)
class Plan:
    """How one call will run.

    Attributes
    ----------
    family : str
        "cpu", or the kernel family.
    device : str
    kernels : tuple of KernelPlan
        In launch order; empty on the CPU.
    block_m, block_n : int
        Query rows and keys of a tile.
    workspace : int
        Bytes of temporary device memory.
    copies : tuple of str
        Inputs that the family can't read in place, with the reason.
    declined : tuple of (str, str)
        Faster families, and why they were passed over.
    chain_d, chain_k, chain_q : int
        Longest chains of dependent additions over head width, keys and queries, for error bounds.
    rounds_p : bool
        P, and in the backward dS, are rounded once to q's dtype, for tensor cores.
    """

    family: str
    device: str
    direction: str
    block_m: int
    block_n: int
    kernels: tuple[KernelPlan, ...] = ()
    workspace: int = 0
    copies: tuple[str, ...] = ()
    declined: tuple[tuple[str, str], ...] = ()
    chain_d: int = 0
    chain_k: int = 0
    chain_q: int = 0
    notes: tuple[str, ...] = field(default=())
    rounds_p: bool = False
    # Temporary arrays of the backward: name, axes behind the leading ones, dtype. Partial sums come beside them.
    temporaries: tuple[ArraySpec, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.direction} on {self.device}, family {self.family}",
            f"  tile        {self.block_m} queries x {self.block_n} keys",
        ]
        for step in self.kernels:
            spec = step.spec
            lines.append(
                f"  kernel      {step.name}: {step.grid} blocks of {step.threads} threads, "
                f"tile {spec.block_m} x {spec.block_n}, widths {spec.head_dim}/{spec.head_dim_v} in chunks of "
                f"{spec.dim_chunk}, {step.smem} bytes of shared memory, writes {', '.join(step.writes)}"
            )
        lines.append(f"  workspace   {self.workspace} bytes")
        lines += [f"  copy        {text}" for text in self.copies] or ["  copies      none"]
        lines += [f"  not {name:<7} {why}" for name, why in self.declined]
        lines.append(
            f"  chains      {self.chain_d} additions over the head width, {self.chain_k} over keys"
            + (f", {self.chain_q} over queries" if self.chain_q else "")
        )
        lines += [f"  note        {text}" for text in self.notes]
        return "\n".join(lines)


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
    chain_d, chain_k, chain_q = _chains(problem, backward)
    return Plan(
        family=CPU_FAMILY,
        device="cpu",
        direction="backward" if backward else "forward",
        block_m=tile.block_m or block_m,
        block_n=tile.block_n or block_n,
        chain_d=chain_d,
        chain_k=chain_k,
        chain_q=chain_q,
    )


def _chains(problem: Problem, backward: bool) -> tuple[int, int, int]:
    """Longest chains of dependent additions over the head width, keys and queries; no zero padding is counted."""
    if not backward:
        return problem.head_dim, problem.seqlen_k, 0
    sharers = problem.batch if problem.broadcast else 1
    queries = problem.seqlen_q * (problem.num_heads // problem.num_heads_k) * sharers
    return max(problem.head_dim, problem.head_dim_v), problem.seqlen_k * sharers, queries


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
    plan = _plan_family(problem, device, family, tile, wrt, copies, unmapped, deterministic)
    tuned = tuple(f"{step.name}: a tile that tune() has kept" for step in plan.kernels if tile.row(step.name))
    return replace(plan, notes=plan.notes + tuned) if tuned else plan


def _plan_family(
    problem: Problem,
    device: Device,
    family: object,
    tile: Tile,
    wrt: frozenset[str] | None,
    copies: tuple[str, ...],
    unmapped: tuple[str, ...],
    deterministic: bool,
) -> Plan:
    _check_gpu_limits(problem)
    why = _why_not_sm90(problem, device)
    if why is None and family in (None, "sm90"):
        if wrt is None:
            return _plan_sm90(problem, device, tile, copies + unmapped)
        return _plan_sm90_backward(problem, device, tile, wrt, copies + unmapped, deterministic)
    if family == "sm90":
        raise ValueError(f"family='sm90': {why}")
    plan = _plan_simt(problem, device, tile, wrt, copies)
    return plan if why is None else replace(plan, declined=(("sm90", why),))


def _why_not_sm90(problem: Problem, device: Device) -> str | None:
    """Why the Hopper family does not take a problem, or None."""
    if device.arch != 90:
        return f"{device.name} has compute capability {device.arch / 10}: TMA and wgmma are those of 9.0"
    if problem.dtype.itemsize != 2:
        return f"{problem.dtype}: wgmma multiplies float16 and bfloat16"
    if problem.precision is not None:
        return f"precision={problem.precision!r}: P is rounded once for the tensor cores"
    return None


def _plan_sm90(problem: Problem, device: Device, tile: Tile, copies: tuple[str, ...]) -> Plan:
    row = _tiles.choose_hopper("fwd_sm90", problem, tile, device.smem)
    widths = _padded_widths(problem)
    all_heads = problem.num_heads * problem.batch
    tiles = _grid(problem.seqlen_q, row.block_m, all_heads)
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
        scale_sign=_sign(problem.scale),
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
    chain_d, chain_k, chain_q = _chains(problem, False)
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


def _plan_sm90_backward(
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
    jobs = _grid(problem.seqlen_k, row.block_n, heads_k)
    if jobs > MAX_GRID - 4 * device.sms:  # tickets stay within 32 bits
        raise ValueError(f"{jobs} blocks of keys: the sm90 family takes at most {MAX_GRID - 4 * device.sms}")
    keyed = tuple(f"d{name}" for name in ("k", "v") if name in wrt)
    main = KernelPlan(
        spec=_sm90_backward_spec("bwd_sm90", problem, row, wrt, deterministic),
        grid=min(jobs, device.sms),
        threads=32 * row.warps,
        smem=_tiles.hopper_backward_smem_bytes(row, *_padded_widths(problem)),
        writes=(*keyed, *(("dq", "dq_sums", "semaphores") if "q" in wrt else ()), "tickets"),
        boxes=(("q", row.block_m), ("k", row.block_n), ("v", row.block_n), ("dout", row.block_m)),
        section=_tiles.backward_section(row, problem, deterministic, heads_k),
    )
    kernels = [_sm90_preparation(problem, row, wrt, deterministic), main]
    if "q" in wrt and not deterministic:
        kernels.append(_sm90_rounding(problem, row, wrt))
    partial = [name for name in sorted(wrt) if _by_entry(problem, wrt, name)]
    kernels += [_row_kernel("bwd_finish", problem, (f"d{name}",)) for name in partial]
    temporaries = _sm90_temporaries(problem, row, wrt)
    chain_d, chain_k, chain_q = _chains(problem, True)
    return Plan(
        family="sm90",
        device=device.name,
        direction="backward",
        block_m=row.block_m,
        block_n=row.block_n,
        kernels=tuple(kernels),
        workspace=_workspace(problem, temporaries, partial),
        copies=copies,
        chain_d=chain_d,
        chain_k=chain_k,
        chain_q=chain_q,
        rounds_p=True,
        temporaries=temporaries,
    )


def _padded_widths(problem: Problem) -> tuple[int, int]:
    head_dim, head_dim_v = (next(w for w in _tiles.WIDTHS if w >= d) for d in (problem.head_dim, problem.head_dim_v))
    return head_dim, head_dim_v


def _sm90_backward_spec(
    kernel: str, problem: Problem, row: _tiles.HopperBackwardRow, wrt: frozenset[str], deterministic: bool
) -> Spec:
    head_dim, head_dim_v = _padded_widths(problem)
    return Spec(
        kernel=kernel,
        element=problem.dtype,
        output=problem.out_dtype,
        accumulator=problem.accumulator,
        gradient=problem.accumulator if _by_entry(problem, wrt, "k") else problem.dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dim_chunk=max(head_dim, head_dim_v),
        block_m=row.block_m,
        block_n=row.block_n,
        num_stages=row.stages,
        num_warps=row.warps,
        causal=problem.causal,
        scale_sign=_sign(problem.scale),
        gradient_q=problem.accumulator if _by_entry(problem, wrt, "q") else problem.dtype,
        deterministic=deterministic,
        want_dq="q" in wrt,
        want_dk="k" in wrt,
        want_dv="v" in wrt,
    )


def _sm90_preparation(
    problem: Problem, row: _tiles.HopperBackwardRow, wrt: frozenset[str], deterministic: bool
) -> KernelPlan:
    """bwd_delta over the query tiles of the main kernel; where there is none it still sets the tickets to 0."""
    warps = _tiles.ROW_KERNELS["bwd_delta"][1]
    by_tile = _sm90_backward_spec("bwd_delta", problem, row, wrt, deterministic)
    # Less than the main kernel is compiled for: one preparation serves many of them.
    spec = replace(
        by_tile, gradient=problem.dtype, head_dim=16, head_dim_v=16, dim_chunk=16, block_n=16, num_stages=2,
        num_warps=warps, scale_sign=1, want_dq=True, want_dk=True, want_dv=True,
    )  # fmt: skip
    tiles = _grid(problem.seqlen_q, row.block_m, problem.num_heads * problem.batch)
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
        grid=_grid(problem.seqlen_q, row.block_m, problem.num_heads * problem.batch),
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
    of_tile = _tiles.dq_numbers(row, *_padded_widths(problem))
    return (*always, ("semaphores", (heads, tiles), integers), ("dq_sums", (heads, tiles, of_tile), numbers))


def _workspace(problem: Problem, temporaries: tuple[ArraySpec, ...], partial: list[str]) -> int:
    """Bytes of the temporaries, and of gradients that are written for each batch entry."""
    numbers = sum(math.prod(problem.tail(name)) for name in partial) * problem.accumulator.itemsize
    return problem.batch * (numbers + sum(math.prod(tail) * dtype.itemsize for _, tail, dtype in temporaries))


def _sign(scale: float) -> int:
    return (scale > 0) - (scale < 0)


def _plan_simt(
    problem: Problem, device: Device, tile: Tile, wrt: frozenset[str] | None, copies: tuple[str, ...]
) -> Plan:
    temporaries: tuple[ArraySpec, ...] = ()
    if wrt is None:
        kernels = [_main_kernel("fwd_simt", problem, device, tile, ("out", "lse"))]
        workspace = 0
    else:
        kernels = [_row_kernel("bwd_delta", problem, ("delta",))]
        keyed = tuple(f"d{name}" for name in ("k", "v") if name in wrt)
        if keyed:
            kernels.append(_main_kernel("bwd_simt_dkdv", problem, device, tile, keyed))
        if "q" in wrt:
            kernels.append(_main_kernel("bwd_simt_dq", problem, device, tile, ("dq",)))
        partial = [name for name in sorted(wrt) if _by_entry(problem, wrt, name)]
        kernels += [_row_kernel("bwd_finish", problem, (f"d{name}",)) for name in partial]
        temporaries = (("delta", (problem.num_heads, problem.seqlen_q), problem.accumulator),)
        workspace = _workspace(problem, temporaries, partial)
    main = kernels[0] if wrt is None else kernels[1]
    chain_d, chain_k, chain_q = _chains(problem, wrt is not None)
    return Plan(
        family="simt",
        device=device.name,
        direction="forward" if wrt is None else "backward",
        block_m=main.spec.block_m,
        block_n=main.spec.block_n,
        kernels=tuple(kernels),
        workspace=workspace,
        copies=copies,
        chain_d=chain_d,
        chain_k=chain_k,
        chain_q=chain_q,
        temporaries=temporaries,
    )


def _check_gpu_limits(problem: Problem) -> None:
    for name, width in (("q", problem.head_dim), ("v", problem.head_dim_v)):
        if width > MAX_HEAD_DIM:
            raise ValueError(f"{name}.shape[-1]={width}: the GPU families take head widths from 1 to {MAX_HEAD_DIM}")
    for name, length in (("q", problem.seqlen_q), ("k", problem.seqlen_k)):
        if length > MAX_SEQLEN:
            raise ValueError(f"{name} has {length} rows: the GPU families take at most {MAX_SEQLEN}")


def _main_kernel(kernel: str, problem: Problem, device: Device, tile: Tile, writes: tuple[str, ...]) -> KernelPlan:
    """A kernel with a row of the tile table, or with the tile that the caller wants."""
    accumulator = problem.accumulator.itemsize
    row, head_dim, head_dim_v = _choose_row(kernel, problem, device, tile)
    keyed = kernel in _tiles.KEYED
    rows, block = (problem.seqlen_k, row.block_n) if keyed else (problem.seqlen_q, row.block_m)
    heads = problem.num_heads_k if keyed else problem.num_heads
    by_entry = _by_entry(problem, frozenset(name[1:] for name in writes), writes[0][1:])
    return KernelPlan(
        spec=_spec(
            kernel, problem, head_dim, head_dim_v, row,
            gradient=problem.accumulator if by_entry else problem.dtype, causal=problem.causal,
            scale_sign=_sign(problem.scale),
        ),
        grid=_grid(rows, block, heads * problem.batch),
        threads=32 * row.warps,
        smem=_tiles.smem_bytes(kernel, row, head_dim, head_dim_v, accumulator),
        writes=writes,
    )  # fmt: skip


def _choose_row(
    kernel: str, problem: Problem, device: Device, tile: Tile
) -> tuple[_tiles.TileRow, int, int]:
    """The first row of the table that fits, with the caller's tile in its place; and the padded widths."""
    accumulator = problem.accumulator.itemsize
    width = max(problem.head_dim, problem.head_dim_v)
    wanted = {name: n for name in ("block_m", "block_n", "stages", "warps") if (n := getattr(tile, name)) is not None}
    refused = ""
    if (own := tile.row(kernel)) is not None:
        return own, *(_tiles.padded_width(d, own.dim_chunk) for d in (problem.head_dim, problem.head_dim_v))
    for largest, table_row in _tiles.TABLE[kernel, accumulator]:
        if width > largest:
            continue
        row = replace(table_row, **wanted)
        head_dim, head_dim_v = (_tiles.padded_width(d, row.dim_chunk) for d in (problem.head_dim, problem.head_dim_v))
        why = _tiles.check_row(kernel, row, head_dim, head_dim_v, accumulator, device.smem)
        if why is None:
            return row, head_dim, head_dim_v
        refused = why
    raise ValueError(
        f"{tile} does not fit {kernel} on {device.name} (head widths {problem.head_dim}, {problem.head_dim_v}, "
        f"{problem.dtype}): {refused}"
    )


def _row_kernel(kernel: str, problem: Problem, writes: tuple[str, ...]) -> KernelPlan:
    """A kernel that walks rows: no tile to choose, no shared memory."""
    block_m, warps = _tiles.ROW_KERNELS[kernel]
    name = writes[0]
    if name == "delta":
        grid = _grid(problem.seqlen_q, block_m, problem.num_heads * problem.batch)
    else:
        heads, rows, _ = problem.tail(name[1:])
        grid = _grid(rows, block_m, heads * math.prod(dict(problem.leading)[name[1:]]))
    row = _tiles.TileRow(block_m, 16, warps, 16, "")
    # bwd_finish rounds: what it stores has the input's dtype.
    return KernelPlan(
        spec=_spec(kernel, problem, 16, 16, row, gradient=problem.dtype, causal=False),
        grid=grid,
        threads=32 * warps,
        smem=0,
        writes=writes,
    )


def _spec(
    kernel: str,
    problem: Problem,
    head_dim: int,
    head_dim_v: int,
    row: _tiles.TileRow,
    *,
    gradient: np.dtype,
    causal: bool,
    scale_sign: int = 1,
) -> Spec:
    return Spec(
        kernel=kernel,
        element=problem.dtype,
        output=problem.out_dtype,
        accumulator=problem.accumulator,
        gradient=gradient,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dim_chunk=row.dim_chunk,
        block_m=row.block_m,
        block_n=row.block_n,
        num_stages=row.stages,
        num_warps=row.warps,
        causal=causal,
        scale_sign=scale_sign,
    )


def _by_entry(problem: Problem, wrt: frozenset[str], name: str) -> bool:
    """Whether a gradient is written for each batch entry first, because its input is shared by several.

    dk and dv come from one kernel, which stores both in one type: where one is, both are.
    """
    together = {"k", "v"} & wrt if name in ("k", "v") else {name}
    return bool(together & problem.broadcast)


def _grid(rows: int, block: int, entries: int) -> int:
    grid = -(-rows // block) * entries
    if grid > MAX_GRID:
        raise ValueError(f"{grid} thread blocks of {block} rows for {entries} heads: a launch has at most {MAX_GRID}")
    return grid

"""What a plan is, and what plans of all families are made with. Pure: nothing runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from . import _tiles
from ._arrays import ArraySpec
from ._compile import FLOAT32, Spec
from ._options import Options, Side
from ._problem import Problem

if TYPE_CHECKING:
    from ._rows import Row

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

    def given(self, *names: str) -> dict[str, Any]:
        """The fields that are not left to the planner, by name; of those named, or of all."""
        wanted = names or ("block_m", "block_n", "stages", "warps")
        return {name: n for name in wanted if (n := getattr(self, name)) is not None}

    def row(self, kernel: str) -> Any:
        """The whole row of the tile table for a kernel: a Tile has none, Rows may."""
        return None


@dataclass(frozen=True)
class Rows(Tile):
    """Whole rows for some kernels, in place of the table's: candidates, and the winners that ``tune`` has kept."""

    rows: tuple[tuple[str, Row], ...] = ()

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
    entries: tuple[int, ...] | None = None  # leading axes, then heads, that it walks; None: those of the call
    sums: bool = False  # over leading axes of the call that it does not walk
    reads: tuple[str, ...] | None = None  # tensors that it gets beside what it writes; None: all there are

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
        P, and in the backward dS, are rounded to q's dtype, for tensor cores.
    p_parts : int
        Of how many numbers of that dtype each of them is the sum then: a key, or a query, adds so many terms.
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
    p_parts: int = 1
    # Temporary arrays of the backward: name, axes behind the leading ones, dtype. Partial sums come beside them.
    temporaries: tuple[ArraySpec, ...] = ()
    # Those of blocks that single pairs are hidden in, with all their axes.
    maps: tuple[ArraySpec, ...] = ()
    zeroed: tuple[ArraySpec, ...] = ()  # likewise: temporaries of the backward that start at 0

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
        if self.p_parts > 1:
            lines.append(f"  P and dS    the sum of {self.p_parts} numbers of q's dtype")
        lines += [f"  note        {text}" for text in self.notes]
        return "\n".join(lines)


def chains(problem: Problem, backward: bool) -> tuple[int, int, int]:
    """Longest chains of dependent additions over the head width, keys and queries; no zero padding is counted."""
    if not backward:
        return problem.head_dim, problem.seqlen_k, 0
    sharers = problem.batch if problem.broadcast else 1
    queries = problem.seqlen_q * (problem.num_heads // problem.num_heads_k) * sharers
    return max(problem.head_dim, problem.head_dim_v), problem.seqlen_k * sharers, queries


class Blocks(Protocol):
    """What every row of a tile table has."""

    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def warps(self) -> int: ...


def spec_of(
    kernel: str, problem: Problem, row: Blocks, widths: tuple[int, int], dim_chunk: int, **options: Any
) -> Spec:
    """A kernel for a problem's types and mask, with a row of a tile table; ``options`` are fields of Spec."""
    fields: dict[str, Any] = {
        "gradient": problem.dtype, "causal": problem.causal, "scale_sign": sign(problem.scale),
        **feature_fields(problem.options), **options,
    }  # fmt: skip
    return Spec(
        kernel=kernel,
        element=problem.dtype,
        output=problem.out_dtype,
        accumulator=problem.accumulator,
        head_dim=widths[0],
        head_dim_v=widths[1],
        dim_chunk=dim_chunk,
        block_m=row.block_m,
        block_n=row.block_n,
        num_stages=row.stages,
        num_warps=row.warps,
        **fields,
    )


def feature_fields(options: Options) -> dict[str, Any]:
    """The fields of Spec that options turn on."""
    fields: dict[str, Any] = {
        "window": options.window, "lens": options.lens, "packed": options.packed is not None,
        "softcap": options.softcap is not None, "segments": options.segments, "dropout": options.dropout > 0,
    }  # fmt: skip
    if options.changes_logits:
        fields["scale_sign"] = 1  # the scale is not split
    sides = (
        ("alibi", "slope", options.alibi_slopes), ("has_bias", "bias", options.bias), ("sinks", "sink", options.sinks)
    )  # fmt: skip
    for flag, dtype, side in sides:
        if side is not None:
            fields |= {flag: True, dtype: side.dtype}
    if options.mask is not None:
        fields["has_mask"] = True
    if options.score is not None:
        fields |= {"has_score": True, "score_text": options.score.cuda}
    if options.mask_function is not None:
        fields |= {"mask_function": True, "mask_text": options.mask_function.cuda}
    return fields


# What Spec holds of single pairs, where a kernel does not ask for it.
FEATURES_OFF: dict[str, Any] = {
    "softcap": False, "alibi": False, "slope": FLOAT32, "has_bias": False, "bias": FLOAT32, "has_mask": False,
    "segments": False, "sinks": False, "sink": FLOAT32, "dropout": False, "has_score": False, "score_text": "",
    "mask_function": False, "mask_text": "",
}  # fmt: skip


def plan_of(
    family: str, device: str, problem: Problem, backward: bool, blocks: tuple[int, int], shortest: int = 0, **more: Any
) -> Plan:
    """A plan with blocks of (queries, keys), and the chains of the problem; ``more`` are fields of Plan.

    ``shortest`` is what a chain counts at least, where sums have errors that no number of terms explains.
    """
    chain_d, chain_k, chain_q = (max(n, shortest if n else 0) for n in chains(problem, backward))
    return Plan(
        family=family,
        device=device,
        direction="backward" if backward else "forward",
        block_m=blocks[0],
        block_n=blocks[1],
        chain_d=chain_d,
        chain_k=chain_k,
        chain_q=chain_q,
        **more,
    )


def keyed(wrt: frozenset[str]) -> tuple[str, ...]:
    """The gradients that belong to keys."""
    return tuple(f"d{name}" for name in ("k", "v") if name in wrt)


def row_kernel(kernel: str, problem: Problem, writes: tuple[str, ...]) -> KernelPlan:
    """A kernel that walks rows: no tile to choose, no shared memory."""
    block_m, warps = _tiles.ROW_KERNELS[kernel]
    name = writes[0]
    gradient = problem.dtype
    if name == "delta":
        blocks = grid(problem.seqlen_q, block_m, problem.num_heads * problem.batch)
    elif name == "dsinks":
        blocks, gradient = problem.num_heads, side(problem.options.sinks).dtype
    elif name == "dbias":
        shape = problem.bias_shape
        blocks, gradient = grid(shape[-2], block_m, math.prod(shape[:-2])), side(problem.options.bias).dtype
    else:
        heads, rows, _ = problem.tail(name[1:])
        blocks = grid(rows, block_m, heads * math.prod(dict(problem.leading)[name[1:]]))
    # bwd_finish rounds: what it stores has the input's dtype.
    return KernelPlan(
        spec=Spec(
            kernel=kernel,
            element=problem.dtype,
            output=problem.out_dtype,
            accumulator=problem.accumulator,
            gradient=gradient,
            head_dim=16,
            head_dim_v=16,
            dim_chunk=16,
            block_m=block_m,
            block_n=16,
            num_stages=2,
            num_warps=warps,
            causal=False,
            lens=problem.options.lens and name == "delta",
            packed=problem.options.packed is not None and name == "delta",
        ),
        grid=blocks,
        threads=32 * warps,
        smem=0,
        writes=writes,
    )


def sinks_kernel(problem: Problem) -> KernelPlan:
    """bwd_sinks: dsinks of each entry."""
    warps = 8
    spec = Spec(
        kernel="bwd_sinks", element=problem.dtype, output=problem.out_dtype, accumulator=problem.accumulator,
        gradient=problem.accumulator, head_dim=16, head_dim_v=16, dim_chunk=16, block_m=16, block_n=16, num_stages=2,
        num_warps=warps, causal=False, lens=problem.options.lens, packed=problem.options.packed is not None,
        sinks=True, sink=side(problem.options.sinks).dtype,
    )  # fmt: skip
    return KernelPlan(
        spec=spec,
        grid=problem.num_heads * problem.batch,
        threads=32 * warps,
        smem=32 * warps * problem.accumulator.itemsize,
        writes=("dsinks",),
    )


def rest_kernel(problem: Problem, wrt: frozenset[str] | None) -> KernelPlan:
    """packed_rest: results in rows behind the last packed sequence. Few blocks: mostly there are no such rows."""
    warps = 8
    spec = Spec(
        kernel="packed_rest", element=problem.dtype, output=problem.out_dtype, accumulator=problem.accumulator,
        gradient=problem.dtype, head_dim=16, head_dim_v=16, dim_chunk=16, block_m=16, block_n=16, num_stages=2,
        num_warps=warps, causal=False, lens=True, packed=True,
    )  # fmt: skip
    writes = ("out", "lse") if wrt is None else tuple(f"d{name}" for name in ("q", "k", "v") if name in wrt)
    rows = max(problem.options.packed or (0, 0)) if writes else 0
    return KernelPlan(spec=spec, grid=min(64, grid(rows, warps, 1)), threads=32 * warps, smem=0, writes=writes)


def bias_sums(problem: Problem) -> tuple[bool, bool, bool]:
    """Whether dbias is a sum over rows, over columns, and, inside its kernel, over heads.

    What has no rows or no columns of its own is written for each head of each entry first: it is small.
    """
    *_, heads, rows, columns = problem.bias_shape
    sum_rows, sum_cols = rows != problem.seqlen_q, columns != problem.seqlen_k
    return sum_rows, sum_cols, heads != problem.num_heads and not (sum_rows or sum_cols)


def bias_kernel(kernel: str, problem: Problem, spec: Spec, smem: int) -> KernelPlan:
    """bwd_bias_*, whose tile is the Spec's: dbias, or what it is the sum of."""
    sum_rows, sum_cols, sum_heads = bias_sums(problem)
    *lead, heads, _, _ = problem.bias_shape
    apart = sum_rows or sum_cols
    tiles = grid(1 if sum_rows else problem.seqlen_q, spec.block_m, 1)
    tiles *= grid(1 if sum_cols else problem.seqlen_k, spec.block_n, 1)
    entries = problem.num_heads * problem.batch if apart else heads * math.prod(lead)
    gradient = problem.accumulator if apart else side(problem.options.bias).dtype
    spec = replace(
        spec, kernel=kernel, gradient=gradient, sum_rows=sum_rows, sum_cols=sum_cols, sum_heads=sum_heads
    )  # fmt: skip
    return KernelPlan(
        spec=spec,
        grid=grid(tiles, 1, entries),
        threads=32 * spec.num_warps,
        smem=smem,
        writes=("dbias",),
        entries=None if apart else (*lead, problem.num_heads),
        sums=not apart,
    )


def finishing(problem: Problem, wrt: frozenset[str]) -> tuple[KernelPlan, ...]:
    """The sums of gradients that are written for each batch entry first."""
    return tuple(row_kernel("bwd_finish", problem, (f"d{name}",)) for name in sorted(partials(problem, wrt)))


def partials(problem: Problem, wrt: frozenset[str]) -> frozenset[str]:
    """Which of the gradients in ``wrt`` are written for each batch entry first."""
    names: set[str] = {name for name in ("q", "k", "v") if name in wrt and by_entry(problem, wrt, name)}
    if "bias" in wrt and any(bias_sums(problem)[:2]):
        names.add("bias")
    return frozenset(names | ({"sinks"} & wrt))


def side(found: Side | None) -> Side:
    """A Side that the problem has."""
    assert found is not None
    return found


def by_tile(problem: Problem, block_m: int, rows: int, *columns: int) -> tuple[int, ...]:
    """The axes of a temporary that has so many rows for each query tile of each head, behind the leading ones.

    Packed sequences have no leading ones, but tiles behind the heads: as many as they can need at most, whatever their
    lengths. Sequence n, which begins at row r, has those from r // 2**tile_shift(block_m) + n on.
    """
    packed, heads = problem.options.packed, problem.num_heads
    if packed is None:
        return (heads, -(-problem.seqlen_q // block_m) * rows, *columns)
    return (heads, (packed[0] >> tile_shift(block_m)) + problem.batch, rows, *columns)


def tile_shift(block_m: int) -> int:
    """Log2 of the largest power of 2 that is no more than a tile's rows."""
    return block_m.bit_length() - 1


def workspace(problem: Problem, temporaries: tuple[ArraySpec, ...], partial: Iterable[str]) -> int:
    """Bytes of the temporaries, and of gradients that are written for each batch entry."""
    sizes = {"sinks": problem.num_heads, "bias": problem.num_heads * math.prod(problem.bias_shape[-2:])}
    sizes |= {name: math.prod(problem.tail(name)) for name in ("q", "k", "v")}
    bytes_ = sum(sizes[name] for name in partial) * problem.accumulator.itemsize
    lead = problem.batch if problem.options.packed is None else 1
    return problem.batch * bytes_ + lead * sum(math.prod(tail) * dtype.itemsize for _, tail, dtype in temporaries)


def sign(scale: float) -> int:
    """-1, 0 or 1."""
    return (scale > 0) - (scale < 0)


def by_entry(problem: Problem, wrt: frozenset[str], name: str) -> bool:
    """Whether a gradient is written for each batch entry first, because its input is shared by several.

    dk and dv come from one kernel, which stores both in one type: where one is, both are.
    """
    together = {"k", "v"} & wrt if name in ("k", "v") else {name}
    return bool(together & problem.broadcast)


def grid(rows: int, block: int, entries: int) -> int:
    """How many tiles of ``block`` rows there are in all heads of all entries."""
    blocks = -(-rows // block) * entries
    if blocks > MAX_GRID:
        raise ValueError(f"{blocks} thread blocks of {block} rows for {entries} heads: a launch has at most {MAX_GRID}")
    return blocks

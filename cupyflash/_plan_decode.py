"""Plans of decoding: which kernel, which tile, how keys are split. Pure: nothing runs.

How long a split is depends on dtype, widths and how many rows an entry may have, never on the batch, so that an entry's
bits do not either; unless the caller wants a GPU filled whatever its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ._arrays import ArraySpec
from ._compile import FLOAT32, Spec
from ._decoding import Decoding
from ._plan import Device, KernelPlan, Plan, Tile, feature_fields, grid, plan_of, sign
from ._plan_merge import MOST_BLOCKS, merge_kernel
from ._plan_merge import WARPS as COMBINE_WARPS
from ._problem import Problem
from ._tiles import padded_widths

# Keys of a split, and how many splits at most: then they are longer. Not measured yet: 256 keys of 8 kv heads make 256
# blocks of an entry of 8192 rows, two for each multiprocessor of an H200.
SPLIT_LENGTH, MOST_SPLITS = 256, 512
FEWEST_KEYS = 64  # of a split that batch_invariant=False makes
FILL = 2  # thread blocks for each multiprocessor that it wants


@dataclass(frozen=True)
class DecodeSpec(Spec):
    """What a decoding kernel is compiled for beside all that others are."""

    paged: bool = False
    appends: bool = False
    splits: bool = False
    turns: bool = False
    interleaved: bool = False
    angle: np.dtype = FLOAT32


@dataclass(frozen=True)
class DecodePlan(Plan):
    """How one decoding call will run.

    Attributes
    ----------
    split_length, num_splits : int
        Keys of a split, and splits of an entry that has all the rows it may have.
    results : tuple of ArraySpec
        Temporary arrays: partial results, turned queries.
    """

    split_length: int = 0
    num_splits: int = 1
    results: tuple[ArraySpec, ...] = ()

    def __str__(self) -> str:
        lines = super().__str__().splitlines()
        text = f"{self.num_splits} of {self.split_length} keys each" if self.num_splits > 1 else "none"
        lines.insert(2, f"  splits      {text}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DecodeRow:
    """Sizes of a tile: (query, head) pairs, keys of a warp's block, slots of a warp's ring, warps."""

    block_m: int
    block_n: int
    stages: int
    warps: int


def decode_row_simt(accumulator: int) -> DecodeRow:
    """8 rows of float32, 4 of float64: what registers hold of the widest heads."""
    return DecodeRow(block_m=8 if accumulator == 4 else 4, block_n=32, stages=2, warps=4)


def decode_smem_simt(row: DecodeRow, head_dim: int, head_dim_v: int, accumulator: int) -> int:
    """sizeof(Smem) of decode_simt."""
    own = row.block_m * (32 + 2 + head_dim_v + 16 // accumulator)
    return (row.block_m * head_dim + row.warps * own) * accumulator


def plan_decode(
    problem: Problem, decoding: Decoding, device: Device, family: object, tile: Tile, copies: tuple[str, ...]
) -> DecodePlan:
    """decode_append where rows are new or turned, decode_*, and combine where keys are split."""
    if tile != Tile():
        raise ValueError(f"{tile} with CuPy arrays: decode has one tile for each width on a GPU")
    if family not in (None, "simt"):
        raise ValueError(f"family={family!r}: decode has kernels of the family 'simt'")
    widths, heads_k = padded_widths(problem), problem.num_heads_k
    rows = problem.seqlen_q * (problem.num_heads // heads_k)
    accumulator = problem.accumulator.itemsize
    row = decode_row_simt(accumulator)
    smem = decode_smem_simt(row, *widths, accumulator)
    tiles = grid(rows, row.block_m, heads_k * problem.batch)
    length, count = split_keys(problem, decoding, device, row, tiles)
    spec = _spec("decode_simt", problem, decoding, row, widths, count > 1)
    writes = ("partial", "partial_lse") if count > 1 else ("out", "lse")
    kernels = [KernelPlan(spec, grid(tiles, 1, count), 32 * row.warps, smem, writes)]
    if decoding.appends or decoding.rotary_dim:
        kernels.insert(0, _append(problem, decoding))
    if count > 1:
        kernels.append(combine_of(problem, count))
    results = _temporaries(problem, decoding, count)
    base = plan_of(
        "simt", device.name, problem, False, (row.block_m, row.block_n), kernels=tuple(kernels), copies=copies,
        workspace=sum(map(_bytes, results)),
    )  # fmt: skip
    given = {f.name: getattr(base, f.name) for f in fields(base)}
    return DecodePlan(**given, split_length=length, num_splits=count, results=results)


def split_keys(
    problem: Problem, decoding: Decoding, device: Device, row: DecodeRow, tiles: int
) -> tuple[int, int]:
    """Keys of a split, and how many splits an entry has that is as long as it may be."""
    longest, unit = max(problem.seqlen_k, 1), row.block_n * row.warps  # a block of keys for each warp
    if decoding.num_splits is not None:
        length = -(-longest // decoding.num_splits)
    elif decoding.batch_invariant:
        length = max(SPLIT_LENGTH, -(-longest // MOST_SPLITS))
    else:
        wanted = min(MOST_SPLITS, max(1, -(-FILL * device.sms // max(tiles, 1))))
        length = max(FEWEST_KEYS, -(-longest // wanted))
    length = -(-length // unit) * unit
    return length, -(-longest // length)


def _spec(
    kernel: str, problem: Problem, decoding: Decoding, row: DecodeRow, widths: tuple[int, int], splits: bool
) -> DecodeSpec:
    options: dict[str, Any] = {"scale_sign": sign(problem.scale), **feature_fields(problem.options)}
    return DecodeSpec(
        kernel=kernel, element=problem.dtype, output=problem.out_dtype, accumulator=problem.accumulator,
        gradient=problem.dtype, head_dim=widths[0], head_dim_v=widths[1], dim_chunk=max(widths), block_m=row.block_m,
        block_n=row.block_n, num_stages=row.stages, num_warps=row.warps, causal=True,
        paged=decoding.page_size > 0, appends=decoding.appends, splits=splits, **options,
    )  # fmt: skip


def _append(problem: Problem, decoding: Decoding) -> KernelPlan:
    """decode_append: a warp for each row of each head."""
    warps, heads = 4, 2 * problem.num_heads_k if decoding.appends else 0
    turns = decoding.rotary_dim > 0
    heads += problem.num_heads if turns else 0
    spec = DecodeSpec(
        kernel="decode_append", element=problem.dtype, output=problem.dtype, accumulator=problem.accumulator,
        gradient=problem.dtype, head_dim=16, head_dim_v=16, dim_chunk=16, block_m=16, block_n=16, num_stages=2,
        num_warps=warps, causal=True, lens=True, paged=decoding.page_size > 0, appends=decoding.appends, turns=turns,
        interleaved=decoding.interleaved, angle=np.dtype(decoding.angle),
    )  # fmt: skip
    rows = problem.batch * heads * problem.seqlen_q
    writes = ("k", "v") if decoding.appends else ()
    return KernelPlan(
        spec, min(MOST_BLOCKS, grid(rows, warps, 1)), 32 * warps, 0, (*writes, *(("q_turned",) if turns else ()))
    )


def combine_of(problem: Problem, count: int) -> KernelPlan:
    """combine of as many partial results as there are splits: a thread block for each row."""
    rows = problem.batch * problem.num_heads * problem.seqlen_q
    accumulator, width = problem.accumulator, padded_widths(problem)[1]
    return merge_kernel("combine", accumulator, problem.out_dtype, accumulator, rows, COMBINE_WARPS, width)


def _temporaries(problem: Problem, decoding: Decoding, count: int) -> tuple[ArraySpec, ...]:
    shape = (problem.batch, problem.num_heads, problem.seqlen_q)
    found: list[ArraySpec] = []
    if count > 1:
        found.append(("partial", (count, *shape, problem.head_dim_v), problem.accumulator))
        found.append(("partial_lse", (count, *shape), problem.accumulator))
    if decoding.rotary_dim:
        found.append(("q_turned", (*shape, problem.head_dim), problem.dtype))
    return tuple(found)


def _bytes(array: ArraySpec) -> int:
    _, shape, dtype = array
    return math.prod(shape) * dtype.itemsize

"""Plans of decoding: which kernel, which tile, how keys are split. Pure: nothing runs.

How long a split is depends on dtype, widths, how many rows an entry may have and how many it has, never on the batch,
so that an entry's bits do not either; unless the caller wants a GPU filled whatever its batch. The batch decides only
how many thread blocks share the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from ._arrays import ArraySpec
from ._compile import FLOAT32, Spec
from ._decoding import ONE_SPLIT, Decoding, Splits
from ._plan import Device, KernelPlan, Plan, Tile, feature_fields, grid, plan_of, sign
from ._plan_merge import MOST_BLOCKS, merge_kernel
from ._plan_tensor_cores import why_not_tensor_cores
from ._problem import Problem
from ._tiles import padded_widths

# Keys of a split at least, and how many splits at most. Reckoned, not measured. A thread block of decode_sm80 has 64 KB
# under way at width 128: one for each multiprocessor keeps an H200's memory busy, and 512 keys make 128 of one entry of
# 8192 rows and 8 kv heads. Partial results are written and read again: for 4 heads that share a kv head, 1.6% of the
# bytes of 512 keys; for 4 queries of each, 6%. decode_simt has less under way. Of 128 parts each warp of combine goes
# through 16, for a few microseconds after the tens that their keys take.
SPLIT_LENGTH, MOST_SPLITS = {"sm80": 512, "simt": 256}, 128
FEWEST_KEYS, MOST_TO_FILL = 64, 512  # of a split, and splits, where batch_invariant=False fills a card
FILL, WAVES = 2, 4  # thread blocks that a multiprocessor runs side by side, and one after another where there are many
COMBINE_WARPS = 8  # of a row


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
    splits : Splits
    results : tuple of ArraySpec
        Temporary arrays: partial results, turned queries.
    """

    splits: Splits = ONE_SPLIT
    results: tuple[ArraySpec, ...] = ()

    def __str__(self) -> str:
        lines = super().__str__().splitlines()
        length, count, blocks = self.splits
        text = f"{count}, of at least {length} keys, by {blocks} thread blocks" if count > 1 else "none"
        lines.insert(2, f"  splits      {text}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DecodeRow:
    """Sizes of a tile: (query, head) pairs, keys of a warp's block, slots of a warp's ring, warps."""

    block_m: int
    block_n: int
    stages: int
    warps: int


def decode_row_sm80(head_dim: int, head_dim_v: int, rows: int, smem: int) -> DecodeRow:
    """The largest of a few tiles that fits. None was measured; smaller rings let more thread blocks share a card."""
    widest = max(head_dim, head_dim_v)
    block_m = 32 if rows > 16 and widest <= 128 else 16
    block_n = 32 if widest <= 64 else 16
    for stages, warps in ((3, 4), (2, 4), (2, 2)):
        row = DecodeRow(block_m, block_n, stages, warps)
        if decode_smem_sm80(row, head_dim, head_dim_v) <= smem // 2 or (stages, warps) == (2, 2):
            return row
    raise AssertionError("the last one is taken")


def decode_smem_sm80(row: DecodeRow, head_dim: int, head_dim_v: int) -> int:
    """sizeof(Smem) of decode_sm80."""
    ring = row.stages * row.block_n * (head_dim + head_dim_v) * 2
    outputs = row.block_m * (head_dim_v + 4) * 4
    warp = -(-max(ring, outputs) // 128) * 128
    total = row.block_m * head_dim * 2 + row.warps * (warp + 2 * row.block_m * 4)
    return -(-total // 128) * 128


def decode_row_simt(accumulator: int) -> DecodeRow:
    """8 rows of float32, 4 of float64: what registers hold of the widest heads."""
    return DecodeRow(block_m=8 if accumulator == 4 else 4, block_n=32, stages=2, warps=4)


def decode_smem_simt(row: DecodeRow, head_dim: int, head_dim_v: int, accumulator: int) -> int:
    """sizeof(Smem) of decode_simt."""
    own = row.block_m * (32 + 2 + head_dim_v + 16 // accumulator)
    return (row.block_m * head_dim + row.warps * own) * accumulator


@lru_cache(maxsize=4096)
def plan_decode(
    problem: Problem, decoding: Decoding, device: Device, family: object, tile: Tile, copies: tuple[str, ...]
) -> DecodePlan:
    """decode_append where rows are new or turned, decode_*, and combine where keys are split."""
    if tile != Tile():
        raise ValueError(f"{tile} with CuPy arrays: decode has one tile for each width on a GPU")
    why = _why_not_sm80(problem, device)
    if family == "sm90":
        raise ValueError("family='sm90': decode has kernels of the families 'sm80' and 'simt'")
    if family == "sm80" and why is not None:
        raise ValueError(f"family='sm80': {why}")
    chosen = "simt" if family == "simt" or why is not None else "sm80"
    widths, heads_k = padded_widths(problem), problem.num_heads_k
    rows = problem.seqlen_q * (problem.num_heads // heads_k)
    accumulator = problem.accumulator.itemsize
    if chosen == "sm80":
        row = decode_row_sm80(*widths, rows, device.smem)
        smem = decode_smem_sm80(row, *widths)
    else:
        row = decode_row_simt(accumulator)
        smem = decode_smem_simt(row, *widths, accumulator)
    tiles = grid(rows, row.block_m, heads_k * problem.batch)
    splits = split_keys(problem, decoding, device, row, tiles, SPLIT_LENGTH[chosen])
    count = splits.number
    spec = _spec(f"decode_{chosen}", problem, decoding, row, widths, count > 1)
    writes = ("partial", "partial_lse") if count > 1 else ("out", "lse")
    kernels = [KernelPlan(spec, grid(tiles, 1, splits.blocks), 32 * row.warps, smem, writes)]
    if decoding.appends or decoding.rotary_dim:
        kernels.insert(0, _append(problem, decoding))
    if count > 1:
        kernels.append(combine_of(problem, count))
    results = _temporaries(problem, decoding, count)
    base = plan_of(
        chosen, device.name, problem, False, (row.block_m, row.block_n), kernels=tuple(kernels), copies=copies,
        declined=_declined(device, why), workspace=sum(map(_bytes, results)),
        rounds_p=chosen == "sm80", p_parts=2 if chosen == "sm80" and problem.splits_p else 1,
    )  # fmt: skip
    given = {f.name: getattr(base, f.name) for f in fields(base)}
    return DecodePlan(**given, splits=splits, results=results)


def _declined(device: Device, why_not_sm80: str | None) -> tuple[tuple[str, str], ...]:
    """Families that were passed over, and why."""
    if why_not_sm80 is not None:
        return (("sm80", why_not_sm80),)
    if device.arch == 90:
        return (("sm90", "wgmma multiplies 64 rows at a time, decoding has few; memory is what it waits for"),)
    return ()


def _why_not_sm80(problem: Problem, device: Device) -> str | None:
    if device.arch < 80:
        return f"{device.name} has compute capability {device.arch / 10}: mma.sync of these shapes came with 8.0"
    return why_not_tensor_cores(problem, "mma.sync")


def split_keys(
    problem: Problem, decoding: Decoding, device: Device, row: DecodeRow, tiles: int, split_length: int
) -> Splits:
    """Splits of keys, for an entry that is as long as it may be; how many thread blocks share those of a tile."""
    longest, unit = max(problem.seqlen_k, 1), row.block_n * row.warps  # a block of keys for each warp
    fill = FILL * device.sms
    if decoding.num_splits is not None:
        least, most = unit, decoding.num_splits
    elif decoding.batch_invariant:
        least, most = split_length, MOST_SPLITS
    else:
        least, most = FEWEST_KEYS, min(MOST_TO_FILL, max(1, -(-fill // max(tiles, 1))))
    length = -(-least // unit) * unit
    count = min(most, -(-longest // length))
    turns = max(1, count * tiles // (WAVES * fill))  # splits of a thread block
    return Splits(length, count, -(-count // turns))


def _spec(
    kernel: str, problem: Problem, decoding: Decoding, row: DecodeRow, widths: tuple[int, int], splits: bool
) -> DecodeSpec:
    held = widths[0] // 16 if kernel == "decode_sm80" and widths[0] <= 128 and row.block_m == 16 else 0
    options: dict[str, Any] = {"scale_sign": sign(problem.scale), **feature_fields(problem.options)}
    return DecodeSpec(
        kernel=kernel, element=problem.dtype, output=problem.out_dtype, accumulator=problem.accumulator,
        gradient=problem.dtype, head_dim=widths[0], head_dim_v=widths[1], dim_chunk=max(widths), block_m=row.block_m,
        block_n=row.block_n, num_stages=row.stages, num_warps=row.warps, causal=True, q_held=held,
        paged=decoding.page_size > 0, appends=decoding.appends, splits=splits,
        split_p=problem.splits_p and kernel == "decode_sm80", **options,
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
        found.append(("partial_lse", (*shape, count), problem.accumulator))
    if decoding.rotary_dim:
        found.append(("q_turned", (*shape, problem.head_dim), problem.dtype))
    return tuple(found)


def _bytes(array: ArraySpec) -> int:
    _, shape, dtype = array
    return math.prod(shape) * dtype.itemsize

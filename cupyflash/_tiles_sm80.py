"""The tile table of the sm80 family: block sizes and the form of the main loop. Pure data and arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ._tiles import MAX_THREADS, equal_sections, first_row, padded, padded_widths

if TYPE_CHECKING:
    from ._plan import Tile
    from ._problem import Problem


FLOAT16 = np.dtype(np.float16)


@dataclass(frozen=True)
class AmpereRow:
    """One tile of the sm80 forward: block sizes, buffers, and which form of the main loop.

    A warp owns ``block_m / warps`` queries, 16 or more. What it reads of K and V from shared memory serves all of
    them, so that 32 need half the reads of 16. ``q_held`` is how many of Q's steps of 16 columns stay in registers; the
    others are read again for each block of keys. ``card`` is the shared memory, in KiB, that a thread block must be
    able to have for the row to be worth it: usually so much that ``min_blocks`` of them share a multiprocessor.
    Where P is ``split`` its second part wants registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int  # of K and V together
    min_blocks: int  # thread blocks on a multiprocessor that the registers must suffice for
    q_held: int
    overlap: bool  # of the softmax of one block with the products of the next, inside a warp
    remark: str
    card: int = 0
    causal: bool | None = None  # which problems the row is for; None: both
    longest: int | None = None  # keys
    split: bool | None = None  # which problems the row is for: those with P in two parts, or in one; None: both


_R = TypeVar("_R", "AmpereRow", "AmpereBackwardRow")

# kernel -> (largest width of q and k, of v, row): the first that fits. Remarks: FlashAttention-2's time to ours on an
# H200, or an H100 where it says so, as torch calls it, at 4096 queries; bfloat16, 16384 rows, 2048 columns in all.
AMPERE_TABLE: dict[str, tuple[tuple[int, int, AmpereRow], ...]] = {
    "fwd_sm80": (
        (64, 64, AmpereRow(128, 128, 4, 3, 2, 0, False, "1.14, causal 1.13; 96 keys 1.07", card=163)),
        (64, 64, AmpereRow(128, 64, 4, 4, 2, 4, False, "0.90, causal 0.92 on an H100")),
        (96, 96, AmpereRow(128, 64, 4, 4, 2, 2, False, "not measured", card=163)),
        (64, 128, AmpereRow(128, 64, 4, 3, 2, 1, False, "not measured", card=163)),
        (128, 128, AmpereRow(128, 64, 4, 4, 2, 1, False, "not measured; 2 steps held spill", card=227, split=True)),
        (128, 128, AmpereRow(128, 32, 4, 4, 2, 2, False, "not measured; 64 keys spill on sm_80", card=163, split=True)),
        (128, 128, AmpereRow(128, 64, 4, 4, 2, 3, False, "1.09, causal 1.22; 2 steps held spill more", card=227)),
        (128, 128, AmpereRow(128, 64, 4, 3, 2, 2, False, "not measured", card=163)),
        (128, 128, AmpereRow(64, 64, 4, 2, 2, 8, False, "not measured; two blocks just fit")),
        (192, 128, AmpereRow(128, 32, 4, 3, 2, 2, False, "not measured; 64 keys spill", card=227)),
        (192, 192, AmpereRow(64, 64, 4, 2, 2, 4, False, "not measured")),
        (256, 256, AmpereRow(64, 64, 4, 2, 2, 4, False, "not measured; 8 steps held spill", split=True)),
        (256, 256, AmpereRow(64, 64, 4, 2, 2, 12, False, "not measured; none held, on an H100: 0.89, causal 1.00")),
    ),
}
# Queries, warps, overlap: what fwd_sm80 is tried with.
AMPERE_FORMS = ((128, 4, False), (128, 4, True), (64, 4, False), (64, 4, True), (256, 8, False), (128, 8, True))


def choose_ampere(kernel: str, problem: Problem, tile: Tile, smem: int) -> AmpereRow:
    """The first row that is for a problem and a card, with the caller's tile in its place; or ValueError."""
    own: AmpereRow | None = tile.row(kernel)
    if own is not None:
        return own
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    row = _fitted(first_row(_rows_for(AMPERE_TABLE[kernel], problem, smem), problem, problem.seqlen_k), head_dim)
    wanted = tile.given()
    if wanted:  # what is left of the row must not stand in the way: the plain form, one block
        row = replace(row, **wanted, min_blocks=1, q_held=0, overlap=False)
        if "warps" not in wanted:  # 16 or 32 queries each, the table's number of warps if it can be
            choices = (row.warps, row.block_m // 32, row.block_m // 16)
            fits = (n for n in choices if n >= 2 and n % 2 == 0 and row.block_m in (16 * n, 32 * n))
            row = replace(row, warps=next(fits, row.warps))
    why = check_ampere(row, head_dim, head_dim_v, smem)
    if why is not None:
        raise ValueError(f"{tile} does not fit {kernel} (head widths {head_dim}, {head_dim_v}): {why}")
    return row


def check_ampere(row: AmpereRow, head_dim: int, head_dim_v: int, smem: int) -> str | None:
    """Why a tile can't run, or None."""
    threads = 32 * row.warps
    if row.warps % 2 or threads > MAX_THREADS:
        return f"warps={row.warps}: it is even, and at most {MAX_THREADS // 32}"
    if row.block_m % (16 * row.warps):
        return f"block_m={row.block_m}: with warps={row.warps} it is a multiple of {16 * row.warps}, 16 for each"
    if row.block_n % 16 or not 16 <= row.block_n <= 256:
        return f"block_n={row.block_n}: it is a multiple of 16 up to 256"
    if row.stages < 2:
        return f"stages={row.stages}: one tile is worked on while the next arrives, so at least 2"
    d, dv = padded(head_dim), padded(head_dim_v)
    if row.q_held > d // 16:
        return f"q_held={row.q_held}: {d} columns are {d // 16} steps"
    needed = ampere_smem_bytes(row, d, dv)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    # acc_o and acc_s, twice the latter where the next scores are computed beside P; Q as far as it stays.
    fragments = row.block_m // (16 * row.warps)
    words = fragments * (dv // 2 + row.block_n // 2 * (2 if row.overlap else 1) + 4 * row.q_held)
    room = min(255, 65536 // (threads * row.min_blocks)) - 24
    if words > room:
        return f"its accumulators need {words} registers a thread: there is room for {room}"
    return None


def ampere_smem_bytes(row: AmpereRow, head_dim: int, head_dim_v: int) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel."""
    tiles = row.block_m * head_dim + row.stages * row.block_n * max(head_dim, head_dim_v)
    return 2 * tiles + 128


def packs_heads(row: AmpereRow, problem: Problem) -> bool:
    """Whether the heads that share a kv head share tiles: where that saves a quarter, and no option knows heads."""
    options = problem.options
    if options.changes_logits or options.hides_pairs or options.sinks is not None or options.dropout:
        return False
    group = problem.num_heads // problem.num_heads_k if problem.num_heads_k else 1
    apart, packed = group * -(-problem.seqlen_q // row.block_m), -(-group * problem.seqlen_q // row.block_m)
    return group > 1 and 4 * packed <= 3 * apart


def ampere_candidates(kernel: str, problem: Problem, smem: int) -> Iterator[AmpereRow]:
    """The rows of the table that hold the heads; then each form with the three longest blocks of keys.

    Each with as much of Q in registers as they hold, and with none; as many buffers as leave room for the other blocks
    of a multiprocessor, up to four.
    """
    widths = problem.head_dim, problem.head_dim_v
    d, dv = padded_widths(problem)
    for largest, largest_v, row in AMPERE_TABLE[kernel]:
        if problem.head_dim <= largest and problem.head_dim_v <= largest_v:
            yield _fitted(replace(row, remark="", card=0, causal=None, longest=None, split=None), problem.head_dim)
    for block_m, warps, overlap in AMPERE_FORMS:
        for min_blocks in (3, 2, 1):
            form = AmpereRow(block_m, 16, warps, 2, min_blocks, 0, overlap, "")
            blocks = (replace(form, block_n=n) for n in range(128, 16, -16))
            room = (smem + 1024) // min_blocks - 1024
            for row in [row for row in blocks if check_ampere(row, *widths, room) is None][:2]:
                stages = max(n for n in (2, 3, 4) if ampere_smem_bytes(replace(row, stages=n), d, dv) <= room)
                held = (replace(row, stages=stages, q_held=n) for n in range(d // 16, -1, -1))
                yield next(row for row in held if check_ampere(row, *widths, room) is None)
                yield replace(row, stages=stages)


def _rows_for(table: tuple[tuple[int, int, _R], ...], problem: Problem, smem: int) -> tuple[tuple[int, int, _R], ...]:
    """The rows that are worth it where a thread block may have ``smem`` bytes, for P in as many parts as it is."""
    return tuple(
        entry for entry in table if smem >= entry[2].card * 1024 and entry[2].split in (None, problem.splits_p)
    )


def _fitted(row: AmpereRow, head_dim: int) -> AmpereRow:
    """The row for a head that may have fewer steps than it holds."""
    return replace(row, q_held=min(row.q_held, -(-head_dim // 16)))


@dataclass(frozen=True)
class AmpereBackwardRow:
    """One tile of the sm80 backward.

    Two warps share ``block_n / (warps / 2)`` keys, 16 or more. ``heads`` are the kv heads that run side by side: too
    few, and the key blocks of one head queue up; too many, and their Q, dO and dq leave L2. ``card`` as in AmpereRow.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    heads: int
    remark: str
    card: int = 0
    causal: bool | None = None  # which problems the row is for; None: both
    longest: int | None = None  # queries
    split: bool | None = None  # which problems the row is for: those with P and dS in two parts, or in one; None: both


# (largest width of q and k, of v, row): the first that fits. Remarks as above, at the row's longest length or at 4096.
AMPERE_BACKWARD_TABLE: tuple[tuple[int, int, AmpereBackwardRow], ...] = (
    (64, 64, AmpereBackwardRow(128, 128, 8, 2, 32, "1.12, causal 0.99; 64 queries 0.83, 0.87", card=227, split=False)),
    (64, 64, AmpereBackwardRow(64, 128, 8, 2, 32, "0.83, causal 0.87", card=163)),
    (64, 64, AmpereBackwardRow(32, 128, 8, 2, 32, "0.45 on an H100, before order was kept by one lane")),
    (96, 96, AmpereBackwardRow(48, 128, 8, 2, 8, "not measured; 64 queries spill", card=227)),
    (128, 128, AmpereBackwardRow(64, 128, 8, 2, 32, "1024: 1.12, 1.03, 8 heads", card=227, longest=2048, split=False)),
    (128, 128, AmpereBackwardRow(64, 128, 8, 2, 8, "1.07, causal 1.05", card=227, split=False)),
    (128, 128, AmpereBackwardRow(32, 128, 8, 2, 8, "not measured", card=163)),
    (128, 128, AmpereBackwardRow(32, 64, 8, 2, 8, "not measured")),
    # P and dS in two parts: rows with more queries spill.
    (192, 192, AmpereBackwardRow(64, 64, 8, 2, 8, "not measured", card=227, split=True)),
    (192, 192, AmpereBackwardRow(32, 64, 8, 2, 8, "not measured", card=163, split=True)),
    (256, 256, AmpereBackwardRow(16, 64, 8, 2, 8, "not measured", card=163, split=True)),
    (256, 256, AmpereBackwardRow(64, 64, 8, 2, 16, "H100: 1.12; 8 heads 1.11", card=227, causal=False, longest=1024)),
    (256, 256, AmpereBackwardRow(64, 64, 8, 2, 8, "H100: 0.92; 16 heads 0.80", card=227, causal=False)),
    (256, 256, AmpereBackwardRow(64, 64, 8, 2, 32, "H100: 0.96; 8 heads 0.91", card=227)),
    (256, 256, AmpereBackwardRow(32, 64, 8, 2, 8, "not measured", card=163)),
    (256, 256, AmpereBackwardRow(16, 32, 4, 2, 8, "not measured")),
)


def choose_ampere_backward(problem: Problem, tile: Tile, smem: int) -> AmpereBackwardRow:
    """The first row that is for a problem and a card, with the caller's tile in its place; or ValueError."""
    own: AmpereBackwardRow | None = tile.row("bwd_sm80")
    if own is not None:
        return own
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    row = first_row(_rows_for(AMPERE_BACKWARD_TABLE, problem, smem), problem, problem.seqlen_q)
    row = replace(row, **tile.given())
    why = check_ampere_backward(row, head_dim, head_dim_v, smem, part_bytes(problem, row))
    if why is not None:
        raise ValueError(f"{tile} does not fit bwd_sm80 (head widths {head_dim}, {head_dim_v}): {why}")
    return row


def check_ampere_backward(
    row: AmpereBackwardRow, head_dim: int, head_dim_v: int, smem: int, parts: int = 0
) -> str | None:
    """Why a tile can't run, or None; ``parts`` are the bytes for second parts."""
    if row.warps % 4 or not 4 <= row.warps <= 16:
        return f"warps={row.warps}: it is 4, 8, 12 or 16, two for each group of keys"
    if row.block_n % (8 * row.warps):
        return f"block_n={row.block_n}: with warps={row.warps} it is a multiple of {8 * row.warps}, 16 for two warps"
    most = min(256, 32 * row.warps)
    if row.block_m % 16 or not 16 <= row.block_m <= most:
        return f"block_m={row.block_m}: with warps={row.warps} it is a multiple of 16 up to {most}"
    if row.stages != 2:
        return f"stages={row.stages}: there are 2, one tile worked on while the next arrives"
    d, dv = padded(head_dim), padded(head_dim_v)
    needed = ampere_backward_smem_bytes(row, d, dv, parts)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    fragments, groups = row.block_n // (8 * row.warps), row.warps // 2
    part = 64 if row.block_m % 64 == 0 else row.block_m
    barriers, most = groups * (fragments if part == row.block_m else row.block_m // part), 12
    if barriers > most:
        hands = f"with block_n={row.block_n} and warps={row.warps} P changes hands at {barriers} barriers"
        return f"block_m={row.block_m}: {hands}, and there are {most}"
    # dk or dv beside scores of a part, and these rounded, one fragment after the other.
    words = fragments * (max(d, dv) // 2 + part // 2) + part // 4
    room = min(255, 65536 // (32 * row.warps)) - 24
    if words > room:
        return f"its accumulators need {words} registers a thread: there is room for {room}"
    return None


def ampere_backward_smem_bytes(row: AmpereBackwardRow, head_dim: int, head_dim_v: int, parts: int = 0) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel; ``parts`` are the bytes for second parts."""
    m, n, both = row.block_m, row.block_n, head_dim + head_dim_v
    job = 208
    return 2 * (n * both + 2 * m * both + n * m) + 4 * n * m + -(-(16 * m + 8 + job) // 128) * 128 + parts


def part_bytes(problem: Problem, row: AmpereBackwardRow) -> int:
    """What the second part of dS takes, where there is one, and for float16 the numbers that keep dS in its range."""
    if not problem.splits_p:
        return 0
    return 2 * row.block_m * row.block_n + (128 if problem.dtype == FLOAT16 else 0)


def ampere_backward_section(row: AmpereBackwardRow, heads_k: int) -> int:
    """How many kv heads run side by side. It changes the order of jobs, never the bits."""
    return equal_sections(heads_k, row.heads)


def ampere_backward_candidates(problem: Problem) -> Iterator[AmpereBackwardRow]:
    """The rows of the table that hold the heads, and other blocks, each with several numbers of heads side by side."""
    for largest, largest_v, row in AMPERE_BACKWARD_TABLE:
        if problem.head_dim <= largest and problem.head_dim_v <= largest_v:
            yield replace(row, remark="", card=0, causal=None, longest=None, split=None)
    for block_m in (32, 64, 128):
        for block_n, warps in ((64, 8), (128, 8), (192, 12)):
            for heads in (4, 8, 16, 32, 64):
                yield AmpereBackwardRow(block_m, block_n, warps, 2, heads, "")


# ------------------------------------------------------------------------------------------------------------ dbias


def bias_row(head_dim: int, head_dim_v: int) -> AmpereRow:
    """The tile of bwd_bias_sm80: with 99 KB a thread block has room for Q, dO, K and V of it."""
    if max(head_dim, head_dim_v) <= 128:
        return AmpereRow(64, 128, 4, 2, 1, 0, False, "not compared")
    return AmpereRow(64, 32, 4, 2, 1, 0, False, "not compared")


def score_row(head_dim: int, head_dim_v: int) -> AmpereRow:
    """The tile of bwd_score_sm80, whose diagonals of tiles begin at one distance: no more keys than queries."""
    return AmpereRow(64, 64 if max(head_dim, head_dim_v) <= 128 else 32, 4, 2, 1, 0, False, "not compared")


def score_smem_bytes(row: AmpereRow, head_dim: int, head_dim_v: int) -> int:
    """Shared memory of bwd_score_sm80, whose tile of pairs lies where Q, K, dO and V lay."""
    tiles = 2 * (row.block_m + row.block_n) * (head_dim + head_dim_v)
    return max(tiles, 4 * row.block_m * (row.block_n + 4)) + 2 * row.block_m * 4


def bias_smem_bytes(row: AmpereRow, head_dim: int, head_dim_v: int) -> int:
    """Shared memory of bwd_bias_sm80: sizeof(Smem) in the kernel."""
    return 2 * (row.block_m + row.block_n) * (head_dim + head_dim_v) + 2 * row.block_m * 4

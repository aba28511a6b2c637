"""The tile table of the simt family: block sizes for each kernel, with what was measured. Pure data and arithmetic.

The planner takes the first row of a kernel whose accumulator, width and shared memory fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ._tiles import MAX_THREADS, padded

if TYPE_CHECKING:
    from ._problem import Problem

KEYED = frozenset({"bwd_simt_dkdv"})  # kernels whose threads own keys; the others' own queries


@dataclass(frozen=True)
class TileRow:
    """One choice: block sizes, warps, and how many columns of Q, K, V lie in shared memory at a time.

    ``card`` is the shared memory, in KiB, that a thread block must be able to have for the row to be worth it:
    usually so much that two blocks share a multiprocessor, one computing while the other waits.
    """

    block_m: int
    block_n: int
    warps: int
    dim_chunk: int
    remark: str
    stages: int = 2
    card: int = 0


# (kernel, bytes of the accumulator) -> (largest padded width, row), best first.
#
# A thread multiplies fragments of R x C numbers: R = rows / (4 * warps), C = columns / 8. It reads R + C vectors of 16
# bytes for R * C * 4 FMAs (float32; R * C * 2 in float64, at half the rate), and such a read takes a multiprocessor 2
# cycles; 128 FMA lanes take R * C * 4 * 32 / 128 cycles. "LDS" in a remark is shared memory's share of the FMAs' time,
# for scores / for outputs: 8 x 8 50 %, 8 x 4 or 4 x 8 75 %, 4 x 4 100 %, 2 x 4 150 %. Above 100 % it is the limit.
# TFLOP/s: H200, S = 4096, full attention, of the products that the kernel does (dq 3, dkdv 4), measured before loads
# ran ahead of the products.
TABLE: dict[tuple[str, int], tuple[tuple[int, TileRow], ...]] = {
    ("fwd_simt", 4): (
        (32, TileRow(128, 64, 4, 32, "LDS 50 / 75 %; softmax weighs more the narrower the head", card=163)),
        (32, TileRow(128, 32, 4, 32, "LDS 75 / 75 %; 46 KB")),
        (64, TileRow(128, 32, 4, 64, "36.9 TFLOP/s; LDS 75 / 50 %; (128, 64) 36.4", card=163)),
        (64, TileRow(64, 32, 4, 64, "33.4 TFLOP/s on H200; LDS 100 / 75 %; 44 KB")),
        (96, TileRow(128, 32, 4, 96, "LDS 75 / 42 %", card=227)),
        (128, TileRow(64, 32, 4, 128, "32.6 TFLOP/s; LDS 100 / 62 %", card=163)),
        (192, TileRow(64, 32, 4, 192, "LDS 100 / 58 %; 2 blocks just fit", card=227)),
        (160, TileRow(64, 32, 4, 32, "LDS 100 / 100 %; 37 KB")),
        (256, TileRow(64, 32, 4, 64, "LDS 100 / 75 %", card=163)),
        (256, TileRow(32, 32, 4, 64, "LDS 150 / 125 %; 40 KB")),
    ),
    ("fwd_simt", 8): (
        (32, TileRow(64, 32, 4, 32, "LDS 100 / 100 %", card=163)),
        (64, TileRow(64, 32, 4, 64, "14.8 TFLOP/s; LDS 100 / 75 %; (128, 64, 8 warps) 15.2", card=227)),
        (64, TileRow(32, 32, 4, 64, "13.8 TFLOP/s on H200; LDS 150 / 125 %", card=163)),
        (128, TileRow(64, 32, 8, 128, "13.2 TFLOP/s; LDS 150 / 112 %; 1 block", card=163)),
        (160, TileRow(32, 32, 4, 32, "LDS 150 / 150 %; 44 KB")),
        (256, TileRow(32, 32, 4, 64, "LDS 150 / 125 %; accumulators fill the registers", card=163)),
        (256, TileRow(32, 32, 4, 32, "LDS 150 / 150 %; 44 KB")),
    ),
    ("bwd_simt_dq", 4): (
        (32, TileRow(128, 64, 4, 32, "LDS 50 / 75 %", card=227)),
        (64, TileRow(128, 32, 4, 64, "40.2 TFLOP/s; LDS 75 / 50 %", card=227)),
        (128, TileRow(64, 32, 4, 128, "35.8 TFLOP/s; LDS 100 / 62 %; 2 blocks just fit", card=227)),
        (64, TileRow(64, 32, 4, 64, "35.2 TFLOP/s on H200; LDS 100 / 75 %", card=163)),
        (160, TileRow(64, 32, 4, 32, "LDS 100 / 100 %; 37 KB")),
        (256, TileRow(64, 32, 4, 64, "LDS 100 / 75 %", card=163)),
        (256, TileRow(32, 32, 4, 64, "LDS 150 / 125 %; 40 KB")),
    ),
    ("bwd_simt_dq", 8): (
        (32, TileRow(64, 32, 4, 32, "LDS 100 / 100 %", card=163)),
        (64, TileRow(32, 32, 4, 64, "16.1 TFLOP/s; LDS 150 / 125 %", card=163)),
        (128, TileRow(64, 32, 8, 128, "15.2 TFLOP/s; LDS 150 / 112 %; 1 block", card=227)),
        (160, TileRow(32, 32, 4, 32, "LDS 150 / 150 %; 44 KB")),
        (256, TileRow(32, 32, 4, 64, "LDS 150 / 125 %", card=163)),
        (256, TileRow(32, 32, 4, 32, "LDS 150 / 150 %; 44 KB")),
    ),
    ("bwd_simt_dkdv", 4): (
        (32, TileRow(64, 128, 4, 32, "LDS 50 / 75 %", card=227)),
        (80, TileRow(64, 64, 4, 80, "34.8 TFLOP/s; LDS 75 / 75 %; (128, 128, 8 warps) 36.0, 1 block", card=227)),
        (128, TileRow(32, 64, 4, 128, "34.1 TFLOP/s; LDS 100 / 62 %; 2 blocks just fit", card=227)),
        (64, TileRow(32, 64, 4, 64, "34.2 TFLOP/s on H200; LDS 100 / 75 %", card=163)),
        (96, TileRow(32, 64, 4, 32, "LDS 100 / 100 %; 37 KB")),
        (128, TileRow(32, 64, 4, 64, "LDS 100 / 75 %", card=163)),
        (128, TileRow(32, 32, 4, 64, "LDS 150 / 125 %; 40 KB")),
        (160, TileRow(32, 32, 4, 80, "LDS 150 / 120 %: dk and dv of 32 keys fill the registers; 47 KB")),
        (256, TileRow(64, 32, 4, 64, "LDS 125 / 125 %: dk and dv of 32 keys fill the registers", card=163)),
        (256, TileRow(32, 32, 4, 64, "LDS 150 / 125 %; 40 KB")),
    ),
    ("bwd_simt_dkdv", 8): (
        (32, TileRow(32, 64, 4, 32, "LDS 100 / 100 %", card=163)),
        (64, TileRow(64, 64, 8, 64, "16.3 TFLOP/s; LDS 125 / 125 %; 1 block", card=227)),
        (64, TileRow(32, 32, 4, 64, "15.1 TFLOP/s on H200; LDS 150 / 125 %", card=163)),
        (128, TileRow(32, 64, 8, 128, "16.5 TFLOP/s; LDS 150 / 112 %; 1 block", card=227)),
        (96, TileRow(32, 32, 4, 32, "LDS 150 / 150 %; 44 KB")),
        (128, TileRow(32, 32, 8, 64, "LDS 250 / 225 %: dk and dv fill the registers of 8 warps", card=96)),
        (256, TileRow(32, 32, 8, 32, "LDS 250 / 250 %; 44 KB")),
        (256, TileRow(16, 32, 8, 32, "37 KB, where dS has weights of its own")),
    ),
}
# It owns a tile of dbias, not rows: none of these were compared. The last ones fit 48 KB, what every card has.
TABLE |= {
    ("bwd_bias_simt", 4): (
        (256, TileRow(64, 64, 8, 32, "not compared", card=64)),
        (256, TileRow(64, 32, 8, 32, "38 KB")),
    ),
    ("bwd_bias_simt", 8): ((256, TileRow(32, 32, 4, 32, "44 KB")),),
    ("bwd_score_simt", 4): ((256, TileRow(64, 64, 8, 32, "36 KB")),),
    ("bwd_score_simt", 8): ((256, TileRow(32, 32, 4, 32, "26 KB")),),
}


def padded_width(width: int, dim_chunk: int) -> int:
    """The width a kernel is compiled for: the next of WIDTHS, or whole chunks where one chunk does not hold it."""
    return padded(width) if padded(width) <= dim_chunk else -(-width // dim_chunk) * dim_chunk


def smem_bytes(
    kernel: str, row: TileRow, head_dim: int, head_dim_v: int, accumulator: int, apart: bool = False
) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel, which it calls SMEM_BYTES.

    ``apart``: what dS is a multiple of is not the P that dv is made of.
    """
    pad, entry = 16 // accumulator, 16

    def tile(rows: int, cols: int) -> int:
        return rows * (cols + pad) * accumulator

    chunk, chunk_v = min(head_dim, row.dim_chunk), min(head_dim_v, row.dim_chunk)
    m, n = row.block_m, row.block_n
    if kernel == "fwd_simt":
        chunks_of_q = 1 if chunk == head_dim else 2
        return chunks_of_q * tile(m, chunk) + tile(m, n) + 2 * tile(n, max(chunk, chunk_v)) + entry
    if kernel == "bwd_bias_simt":
        return tile(m, n) + 2 * tile(m, max(chunk, chunk_v)) + 2 * tile(n, max(chunk, chunk_v)) + 4 * m * accumulator
    if kernel == "bwd_score_simt":
        return tile(m, n) + tile(m, max(chunk, chunk_v)) + tile(n, max(chunk, chunk_v)) + 2 * m * accumulator
    scores = (2 if apart else 1) * tile(n, m) if kernel in KEYED else tile(m, n)
    return scores + 2 * tile(m, max(chunk, chunk_v)) + 2 * tile(n, max(chunk, chunk_v)) + 2 * m * accumulator + entry


def register_words(kernel: str, row: TileRow, head_dim: int, head_dim_v: int, accumulator: int) -> int:
    """32-bit registers that a thread's accumulators take: 8 lanes share a row, 4 rows a warp."""
    owned, met = (row.block_n, row.block_m) if kernel in KEYED else (row.block_m, row.block_n)
    rows = owned // (4 * row.warps)
    scores = met // 8
    outputs = {
        "fwd_simt": head_dim_v, "bwd_simt_dq": head_dim, "bwd_simt_dkdv": head_dim + head_dim_v, "bwd_bias_simt": met,
        "bwd_score_simt": met,
    }  # fmt: skip
    return rows * (scores + outputs[kernel] // 8) * accumulator // 4


def check_row(
    kernel: str, row: TileRow, head_dim: int, head_dim_v: int, accumulator: int, smem: int, apart: bool = False
) -> str | None:
    """Why a tile can't run with ``smem`` bytes of shared memory a block, or None."""
    threads = 32 * row.warps
    if threads > MAX_THREADS:
        return f"warps={row.warps} are {threads} threads: a thread block has at most {MAX_THREADS}"
    if row.stages != 2:
        return f"stages={row.stages}: the simt family has 2, one worked on while the other is filled"
    owned, met = ("block_n", "block_m") if kernel in KEYED else ("block_m", "block_n")
    if getattr(row, owned) % (4 * row.warps):
        return f"{owned}={getattr(row, owned)}: with warps={row.warps} it is a multiple of {4 * row.warps}"
    if getattr(row, met) % 8:
        return f"{met}={getattr(row, met)}: it is a multiple of 8"
    if smem < row.card * 1024:
        return f"a thread block has {smem} bytes of shared memory: this row is for cards with {row.card * 1024}"
    needed = smem_bytes(kernel, row, head_dim, head_dim_v, accumulator, apart)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    words = register_words(kernel, row, head_dim, head_dim_v, accumulator)
    room = min(255, 65536 // threads) - 32  # addresses, operands and the rows' maxima and sums take the rest
    if words > room:
        return f"its accumulators need {words} registers a thread: {threads} threads leave room for {room}"
    return None


def simt_candidates(kernel: str, problem: Problem) -> Iterator[TileRow]:
    """The rows of the table that hold the heads."""
    width = max(problem.head_dim, problem.head_dim_v)
    for largest, row in TABLE.get((kernel, problem.accumulator.itemsize), ()):
        if width <= largest:
            yield replace(row, card=0, remark="")

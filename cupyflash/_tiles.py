"""The tile table: block sizes for each kernel, with what was measured. Pure data and arithmetic.

The planner takes the first row of a kernel whose accumulator, width and shared memory fit. Batch and heads are not
asked, so that they can't change an entry's bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ._plan import Tile
    from ._problem import Problem

# Widths that kernels are compiled for; a run-time width is padded with zeros in shared memory.
WIDTHS = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256)
MAX_THREADS = 1024
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
    ),
}
# Kernels that walk rows and keep nothing in shared memory.
ROW_KERNELS = {"bwd_delta": (64, 4), "bwd_finish": (32, 4)}  # block_m, warps


def padded_width(width: int, dim_chunk: int) -> int:
    """The width a kernel is compiled for: the next of WIDTHS, or whole chunks where one chunk does not hold it."""
    padded = next(w for w in WIDTHS if w >= width)
    return padded if padded <= dim_chunk else -(-width // dim_chunk) * dim_chunk


def smem_bytes(kernel: str, row: TileRow, head_dim: int, head_dim_v: int, accumulator: int) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel, which it calls SMEM_BYTES."""
    pad, entry = 16 // accumulator, 16

    def tile(rows: int, cols: int) -> int:
        return rows * (cols + pad) * accumulator

    chunk, chunk_v = min(head_dim, row.dim_chunk), min(head_dim_v, row.dim_chunk)
    m, n = row.block_m, row.block_n
    if kernel == "fwd_simt":
        chunks_of_q = 1 if chunk == head_dim else 2
        return chunks_of_q * tile(m, chunk) + tile(m, n) + 2 * tile(n, max(chunk, chunk_v)) + entry
    scores = tile(n, m) if kernel in KEYED else tile(m, n)
    return scores + 2 * tile(m, max(chunk, chunk_v)) + 2 * tile(n, max(chunk, chunk_v)) + 2 * m * accumulator + entry


def register_words(kernel: str, row: TileRow, head_dim: int, head_dim_v: int, accumulator: int) -> int:
    """32-bit registers that a thread's accumulators take: 8 lanes share a row, 4 rows a warp."""
    owned, met = (row.block_n, row.block_m) if kernel in KEYED else (row.block_m, row.block_n)
    rows = owned // (4 * row.warps)
    scores = met // 8
    outputs = {"fwd_simt": head_dim_v, "bwd_simt_dq": head_dim, "bwd_simt_dkdv": head_dim + head_dim_v}
    return rows * (scores + outputs[kernel] // 8) * accumulator // 4


def check_row(kernel: str, row: TileRow, head_dim: int, head_dim_v: int, accumulator: int, smem: int) -> str | None:
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
    needed = smem_bytes(kernel, row, head_dim, head_dim_v, accumulator)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    words = register_words(kernel, row, head_dim, head_dim_v, accumulator)
    room = min(255, 65536 // threads) - 32  # addresses, operands and the rows' maxima and sums take the rest
    if words > room:
        return f"its accumulators need {words} registers a thread: {threads} threads leave room for {room}"
    return None


# ------------------------------------------------------------------------------------------------------------- Hopper


@dataclass(frozen=True)
class HopperRow:
    """One tile of the sm90 forward: block sizes, buffers, and which form of the main loop."""

    block_m: int
    block_n: int
    stages: int
    q_stages: int
    overlap: bool  # of products and softmax inside a warpgroup; else between warpgroups only
    take_turns: bool
    remark: str
    causal: bool | None = None  # which problems the row is for; None: both
    longest: int | None = None  # keys
    sections: bool = False  # causal: heads in sections whose K and V fit L2, not all side by side

    @property
    def warps(self) -> int:
        """Of a thread block: a warpgroup for every 64 queries, and the one that sends for tiles."""
        return 4 * (1 + self.block_m // 64)


# kernel -> (largest width of q and k, of v, row): the first that fits. Remarks: cuDNN's time to ours on an H100, at the
# row's longest length or at 16384, and the next best. bfloat16, 16384 rows and 2048 columns over all heads.
HOPPER_TABLE: dict[str, tuple[tuple[int, int, HopperRow], ...]] = {
    "fwd_sm90": (
        (64, 64, HopperRow(192, 128, 2, 2, False, False, "0.99; (128, 256) 0.98", causal=False, longest=1024)),
        (64, 48, HopperRow(192, 160, 2, 2, False, False, "192 keys spill where v has 33 to 48 columns", causal=False)),
        (64, 64, HopperRow(192, 192, 2, 2, False, False, "1.08; (192, 128) 1.08", causal=False, longest=2048)),
        (64, 64, HopperRow(192, 192, 2, 1, False, False, "1.25; two Q buffers 1.23", causal=False)),
        (64, 64, HopperRow(192, 128, 3, 2, False, False, "0.90; two stages 0.90", longest=1024, sections=True)),
        (64, 64, HopperRow(192, 192, 2, 1, False, False, "1.22 at 8192; all heads side by side 1.21", sections=True)),
        (128, 128, HopperRow(128, 128, 2, 2, True, False, "0.98; in turns 0.95", causal=False, longest=512)),
        (128, 128, HopperRow(128, 128, 2, 1, True, True, "1.12; 160 keys 1.11", causal=False, longest=4096)),
        (128, 128, HopperRow(128, 128, 2, 1, True, True, "1.12; (192, 128) 1.09", longest=2048, sections=True)),
        (128, 128, HopperRow(128, 128, 2, 1, True, True, "1.18; in sections 1.14", causal=True, longest=4096)),
        (128, 128, HopperRow(128, 160, 2, 1, True, True, "1.17, causal 1.27; 128 keys 1.15, 1.28; (192, 128) 1.16")),
        (192, 128, HopperRow(128, 128, 2, 1, True, True, "not compared")),
        (192, 192, HopperRow(128, 96, 2, 1, True, True, "not compared")),
        (256, 256, HopperRow(128, 64, 2, 1, True, True, "1.03; 80 keys 1.01", causal=False, longest=512)),
        (256, 256, HopperRow(128, 64, 2, 1, True, False, "1.02; all heads side by side 0.96", causal=True, longest=2048,
                             sections=True)),
        (256, 256, HopperRow(128, 80, 2, 1, True, False, "1.21, causal 1.37; in turns 1.19, 1.35")),
    ),
}
_R = TypeVar("_R", "HopperRow", "HopperBackwardRow")
# Of K and V of a section. H100, causal: 1024 and 2048 keys run up to 9 % faster with 32 than with 12 MiB, 512 keys up
# to 9 % faster with 12 than with 32, since what is read once then alternates with what is read again.
SECTION_BYTES, SHORT_SECTION_BYTES = 2**25, 12 * 2**20


def choose_hopper(kernel: str, problem: Problem, tile: Tile, smem: int) -> HopperRow:
    """The first row that is for a problem, with the caller's tile in its place; ValueError where that can't run."""
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    if (own := tile.row(kernel)) is not None:
        return own  # type: ignore[no-any-return]
    row = _first_row(HOPPER_TABLE[kernel], problem, problem.seqlen_k)
    wanted = {name: n for name in ("block_m", "block_n", "stages") if (n := getattr(tile, name)) is not None}
    if wanted:
        row = replace(row, **wanted)
        row = replace(row, overlap=row.block_m < 192, take_turns=row.take_turns and row.block_m == 128)
    why = check_hopper(kernel, row, head_dim, head_dim_v, smem)
    if why is None and tile.warps not in (None, row.warps):
        why = f"warps={tile.warps}: block_m={row.block_m} has {row.warps}, 4 for every 64 rows and 4 that load"
    if why is not None:
        raise ValueError(f"{tile} does not fit {kernel} (head widths {head_dim}, {head_dim_v}): {why}")
    return row


def _first_row(table: tuple[tuple[int, int, _R], ...], problem: Problem, length: int) -> _R:
    """The first row that is for a problem's widths, mask and length; the last rows are for all."""
    return next(
        row
        for largest, largest_v, row in table
        if problem.head_dim <= largest
        and problem.head_dim_v <= largest_v
        and row.causal in (None, problem.causal)
        and (row.longest is None or length <= row.longest)
    )


def check_hopper(kernel: str, row: HopperRow, head_dim: int, head_dim_v: int, smem: int) -> str | None:
    """Why a tile can't run, or None."""
    if row.block_m not in (64, 128, 192):
        return f"block_m={row.block_m}: it is 64, 128 or 192, a warpgroup for every 64 rows"
    if row.block_n % 16 or not 16 <= row.block_n <= 256:
        return f"block_n={row.block_n}: it is a multiple of 16 up to 256"
    if row.stages < 2:
        return f"stages={row.stages}: one block of keys is worked on while the next arrives, so at least 2"
    widths = [next(w for w in WIDTHS if w >= d) for d in (head_dim, head_dim_v)]
    needed = hopper_smem_bytes(kernel, row, *widths)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    # acc_o and acc_s; P beside them where the next scores are computed while it is an operand.
    words = widths[1] // 2 + row.block_n // 2 + (row.block_n // 4 if row.overlap else 0)
    room = (160 if row.block_m == 192 else 240) - 24
    if words > room:
        return f"its accumulators need {words} registers a thread: there is room for {room}"
    return None


def hopper_smem_bytes(kernel: str, row: HopperRow, head_dim: int, head_dim_v: int) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel. Rows of tiles are whole chunks of 64 columns."""
    d, dv = (-(-width // 64) * 128 for width in (head_dim, head_dim_v))  # bytes of a row
    tiles = row.q_stages * row.block_m * d + row.stages * row.block_n * (d + dv)
    rings = 16 * (row.block_m // 64 * row.q_stages + 2 * row.stages) + 32
    return tiles + -(-rings // 1024) * 1024


def section(row: HopperRow, problem: Problem, all_heads: int) -> int:
    """How many heads a section of the tile list has (TileWalk). It changes the order of tiles, never their bits."""
    if not problem.causal:
        return 1
    if not row.sections:
        return max(1, all_heads)
    group = problem.num_heads // problem.num_heads_k if problem.num_heads_k else 1
    head = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    fit = max(1, (SHORT_SECTION_BYTES if problem.seqlen_k <= 512 else SECTION_BYTES) * group // max(1, head))
    count = -(-all_heads // fit)
    return max(1, -(-all_heads // max(1, count)))  # sections of equal size


@dataclass(frozen=True)
class HopperBackwardRow:
    """One tile of the sm90 backward, whose warps and form of the main loop follow from the head widths.

    ``heads`` are the kv heads that run side by side in a fixed order: too few, and the key blocks of one head queue up;
    too many, and their Q, dO and dq leave L2.
    """

    block_m: int
    block_n: int
    stages: int
    heads: int
    arrival: bool  # dq is added up in the order of arrival where the call permits it; else in the fixed order still
    remark: str
    causal: bool | None = None  # which problems the row is for; None: both
    longest: int | None = None  # queries

    @property
    def warps(self) -> int:
        """Of a thread block: two warpgroups that compute and one that sends for tiles."""
        return 12


# (largest width of q and k, of v, row): the first that fits. Remarks: cuDNN's time to ours on an H100 at the row's
# longest length, or at 16384, in a fixed order / in the order of arrival, and the next best.
HOPPER_BACKWARD_TABLE: tuple[tuple[int, int, HopperBackwardRow], ...] = (
    (64, 64, HopperBackwardRow(128, 128, 2, 32, False, "1.15 / 1.05; 96 queries 1.10", causal=False, longest=1024)),
    (64, 64, HopperBackwardRow(128, 128, 2, 16, False, "1.12 / 1.10; 96 queries 1.05", causal=False, longest=2048)),
    (64, 64, HopperBackwardRow(128, 128, 2, 16, False, "1.06 / 1.17; 96 queries 1.03", causal=False, longest=8192)),
    (64, 64, HopperBackwardRow(128, 128, 2, 8, False, "1.08 / 1.21; 32 heads 1.03", causal=False)),
    (64, 64, HopperBackwardRow(128, 128, 2, 128, False, "1.27 / 0.97; 64 heads 1.23", longest=512)),
    (64, 64, HopperBackwardRow(128, 128, 2, 64, False, "1.15 / 1.10; 32 heads 1.14", longest=2048)),
    (64, 64, HopperBackwardRow(128, 128, 2, 32, False, "1.14 / 1.22; 16 heads 1.08")),
    (128, 128, HopperBackwardRow(64, 128, 2, 16, False, "1.12 / 1.04; 80 queries 1.11", causal=False, longest=2048)),
    (128, 128, HopperBackwardRow(64, 128, 2, 8, False, "1.16 / 1.14; 80 queries 1.16", causal=False, longest=4096)),
    (128, 128, HopperBackwardRow(80, 128, 2, 8, False, "1.05 / 1.12; 64 queries 1.01 / 1.04", causal=False)),
    (128, 128, HopperBackwardRow(64, 128, 2, 32, False, "1.25 / 0.92; 16 heads 1.24", longest=512)),
    (128, 128, HopperBackwardRow(64, 128, 2, 16, False, "1.14 / 1.11; 80 queries 1.12", longest=4096)),
    (128, 128, HopperBackwardRow(80, 128, 2, 16, False, "1.11 / 1.14; 64 queries 1.09 / 1.08")),
    (256, 256, HopperBackwardRow(64, 64, 2, 16, False, "1.21 / 1.04; 8 heads 1.20", causal=False, longest=512)),
    (256, 256, HopperBackwardRow(64, 64, 2, 8, False, "1.11 / 1.05; 16 heads 1.02", causal=False, longest=1024)),
    (256, 256, HopperBackwardRow(64, 64, 2, 4, True, "1.03 / 1.11; 8 heads 0.65", causal=False)),
    (256, 256, HopperBackwardRow(64, 64, 2, 32, False, "1.05 / 0.93; 16 heads 0.96", longest=512)),
    (256, 256, HopperBackwardRow(64, 64, 2, 16, False, "0.95 / 0.95; 8 heads 0.82", longest=1024)),
    (256, 256, HopperBackwardRow(64, 64, 2, 16, True, "0.94 / 1.01; 8 heads 0.87", longest=2048)),
    (256, 256, HopperBackwardRow(64, 64, 2, 8, True, "0.94 / 1.04; 4 heads 0.93")),
)
ARRIVAL_BYTES = 2**24  # of Q, dO and dq's sums: what heads side by side may take of L2 in arrival order


def is_wide(head_dim: int, head_dim_v: int) -> bool:
    """Whether a block of keys has 64 of them, and warpgroups share out columns (WIDE in kernels/gradients_sm90.cuh)."""
    return max(head_dim, head_dim_v) > 128


def choose_hopper_backward(problem: Problem, tile: Tile, smem: int) -> HopperBackwardRow:
    """The first row that is for a problem, with the caller's tile in its place; ValueError where that can't run."""
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    if (own := tile.row("bwd_sm90")) is not None:
        return own  # type: ignore[no-any-return]
    wanted = {name: n for name in ("block_m", "block_n", "stages") if (n := getattr(tile, name)) is not None}
    row = replace(_first_row(HOPPER_BACKWARD_TABLE, problem, problem.seqlen_q), **wanted)
    why = check_hopper_backward(row, head_dim, head_dim_v, smem)
    if why is None and tile.warps not in (None, row.warps):
        why = f"warps={tile.warps}: it has {row.warps}, 8 that compute and 4 that load"
    if why is not None:
        raise ValueError(f"{tile} does not fit bwd_sm90 (head widths {head_dim}, {head_dim_v}): {why}")
    return row


def check_hopper_backward(row: HopperBackwardRow, head_dim: int, head_dim_v: int, smem: int) -> str | None:
    """Why a tile can't run, or None."""
    wide = is_wide(head_dim, head_dim_v)
    if row.block_n != (64 if wide else 128):
        return f"block_n={row.block_n}: it is 128, 64 for each warpgroup; 64 where a head is wider than 128"
    if wide and row.block_m != 64:
        return f"block_m={row.block_m}: it is 64 where a head is wider than 128"
    if row.block_m % 16 or not 16 <= row.block_m <= 256:
        return f"block_m={row.block_m}: it is a multiple of 16 up to 256"
    if row.stages < 2:
        return f"stages={row.stages}: one block of queries is worked on while the next arrives, so at least 2"
    d, dv = (next(w for w in WIDTHS if w >= width) for width in (head_dim, head_dim_v))
    needed = hopper_backward_smem_bytes(row, d, dv)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    # dk and dv beside S and dP, or beside dq and the rounded dS.
    m = row.block_m
    if wide:
        words = (_share(d) + _share(dv)) // 2 + max(m // 2, _share(d) // 2 + m // 8)
    else:
        words = (d + dv) // 2 + max(m, (m if d > 64 else m // 2) // 2 + m // 2)
    if words > 240 - 32:
        return f"its accumulators need {words} registers a thread: there is room for {240 - 32}"
    return None


def _share(columns: int) -> int:
    """The larger share of a tile's columns, in whole chunks of 64: first_share() in kernels/gradients_sm90.cuh."""
    return min(columns, -(-columns // 128) * 64)


def dq_numbers(row: HopperBackwardRow, head_dim: int, head_dim_v: int) -> int:
    """Float32 numbers of a tile of dq while it is added up: DQ_NUMBERS in kernels/gradients_sm90.cuh."""
    if is_wide(head_dim, head_dim_v):
        return row.block_m * head_dim
    return 128 * (row.block_m if head_dim > 64 else row.block_m // 2)


def hopper_backward_smem_bytes(row: HopperBackwardRow, head_dim: int, head_dim_v: int) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel. Rows of tiles are whole chunks of 64 columns."""
    d, dv = (-(-width // 64) * 128 for width in (head_dim, head_dim_v))  # bytes of a row
    m, n, stages = row.block_m, row.block_n, row.stages
    scores = (2 if is_wide(head_dim, head_dim_v) else 1) * 2 * m * n
    tiles = n * (d + dv) + stages * (m * (d + dv) + scores)
    job, leave, barriers = 60, 24, 2 * (1 + 1) + (2 + 2 + 3) * stages + 2 * 2
    rest = 2 * stages * m * 4 + 8 * barriers + 2 * job + stages * leave
    return tiles + -(-rest // 1024) * 1024


def backward_section(row: HopperBackwardRow, problem: Problem, ordered: bool, heads_k: int) -> int:
    """How many kv heads run side by side. It changes the order of jobs, never the bits of a fixed order."""
    if ordered:
        heads = row.heads
    else:
        group = problem.num_heads // problem.num_heads_k if problem.num_heads_k else 1
        head = group * problem.seqlen_q * (4 * problem.head_dim + 2 * (problem.head_dim + problem.head_dim_v))
        heads = max(1, ARRIVAL_BYTES // max(1, head))
    count = -(-heads_k // heads)
    return max(1, -(-heads_k // max(1, count)))  # sections of equal size


# --------------------------------------------------------------------------------------------------------- candidates

Row = TileRow | HopperRow | HopperBackwardRow
_CHOICE = frozenset({"remark", "card", "causal", "longest"})  # fields that say when a row is chosen, not what it does


def tiled_kernels() -> frozenset[str]:
    """The kernels that have tiles to choose from."""
    return frozenset({*HOPPER_TABLE, "bwd_sm90"}) | {kernel for kernel, _ in TABLE}


def row_fields(row: Row) -> dict[str, int | bool]:
    """What a row does to its kernel, by name: what the tuner keeps."""
    return {f.name: getattr(row, f.name) for f in fields(row) if f.name not in _CHOICE}


def make_row(kernel: str, values: object) -> Row:
    """The row with these fields; ValueError unless they are all of them, each an integer or a truth value."""
    kind: type[Row] = {"fwd_sm90": HopperRow, "bwd_sm90": HopperBackwardRow}.get(kernel, TileRow)
    kinds = {f.name: {"int": int, "bool": bool}[str(f.type)] for f in fields(kind) if f.name not in _CHOICE}
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        raise ValueError(f"a tile of {kernel} has the fields {', '.join(kinds)}, not {values!r}")
    for name, wanted in kinds.items():
        if type(values[name]) is not wanted or (wanted is int and values[name] < 1):
            raise ValueError(f"{name}={values[name]!r}: it is {'true or false' if wanted is bool else 'at least 1'}")
    return kind(**values, remark="")


def _why_not(kernel: str, row: Row, problem: Problem, smem: int) -> str | None:
    """Why a row can't run a problem where a thread block may have ``smem`` bytes, or None. The card may be any."""
    head_dim, head_dim_v, accumulator = problem.head_dim, problem.head_dim_v, problem.accumulator.itemsize
    if isinstance(row, HopperRow):
        return check_hopper(kernel, row, head_dim, head_dim_v, smem)
    if isinstance(row, HopperBackwardRow):
        return check_hopper_backward(row, head_dim, head_dim_v, smem)
    padded, padded_v = (padded_width(d, row.dim_chunk) for d in (head_dim, head_dim_v))
    return check_row(kernel, replace(row, card=0), padded, padded_v, accumulator, smem)


def candidates(kernel: str, problem: Problem, smem: int) -> tuple[Row, ...]:
    """The rows that are worth timing for a problem; none for a kernel that has nothing to choose."""
    rows: Iterable[Row]
    if kernel in HOPPER_TABLE:
        rows = _hopper_candidates(kernel, problem, smem)
    elif kernel == "bwd_sm90":
        rows = _hopper_backward_candidates(problem)
    else:
        width = max(problem.head_dim, problem.head_dim_v)
        table = TABLE.get((kernel, problem.accumulator.itemsize), ())
        rows = (replace(row, card=0, remark="") for largest, row in table if width <= largest)
    return tuple(dict.fromkeys(row for row in rows if _why_not(kernel, row, problem, smem) is None))


def _hopper_candidates(kernel: str, problem: Problem, smem: int) -> Iterator[HopperRow]:
    """The rows of the table that hold the heads; then each form of the main loop with the three longest blocks of keys.

    Long blocks ask for fewer turns and barriers, up to the registers that the softmax has; a third stage pays only
    where it costs no keys. Sections are the table's: they are a matter of length alone.
    """
    sections = _first_row(HOPPER_TABLE[kernel], problem, problem.seqlen_k).sections
    for largest, largest_v, row in HOPPER_TABLE[kernel]:
        if problem.head_dim <= largest and problem.head_dim_v <= largest_v:
            yield replace(row, remark="", causal=None, longest=None, sections=sections)
    for block_m, overlap, take_turns in HOPPER_FORMS:
        for q_stages in (2, 1):
            form = HopperRow(block_m, 16, 2, q_stages, overlap, take_turns, "", sections=sections)
            blocks = (replace(form, block_n=n) for n in range(256, 48, -16))
            fits = [row for row in blocks if _why_not(kernel, row, problem, smem) is None][:3]
            yield from fits
            yield from (replace(row, stages=3) for row in fits[:1])


def _hopper_backward_candidates(problem: Problem) -> Iterator[HopperBackwardRow]:
    """Every block of queries, with every number of heads side by side that has paid on some problem."""
    own = _first_row(HOPPER_BACKWARD_TABLE, problem, problem.seqlen_q)
    yield replace(own, remark="", causal=None, longest=None)
    for block_m in (64, 80, 96, 128):
        for heads in (4, 8, 16, 32, 64, 128):
            yield HopperBackwardRow(block_m, own.block_n, 2, heads, own.arrival, "")


# Rows of queries, overlap, take_turns: what fwd_sm90 has been run with. Three warpgroups have no registers to overlap.
HOPPER_FORMS = ((64, True, False), (128, True, True), (128, True, False), (128, False, False), (192, False, False))

"""The tile table: block sizes for each kernel, with what was measured. Pure data and arithmetic.

The planner takes the first row of a kernel whose accumulator, width and shared memory fit. Batch and heads are not
asked, so that they can't change an entry's bits.
"""

from __future__ import annotations

from dataclasses import dataclass

# Widths that kernels are compiled for; a run-time width is padded with zeros in shared memory.
WIDTHS = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256)
MAX_THREADS = 1024
KEYED = frozenset({"bwd_simt_dkdv"})  # kernels whose threads own keys; the others' own queries


@dataclass(frozen=True)
class TileRow:
    """One choice: block sizes, warps, and how many columns of Q, K, V lie in shared memory at a time."""

    block_m: int
    block_n: int
    warps: int
    dim_chunk: int
    remark: str
    stages: int = 1


# (kernel, bytes of the accumulator) -> (largest padded width, row), best first. TFLOP/s count the products that the
# kernel itself does (4 of the forward's 2 halves, dq 3, dkdv 4), H200, S = 4096, full attention, at the class's width.
# All rows: no spills on any architecture. A product of 8-wide fragments reads 16 vectors of 16 bytes for 256 FMAs
# (float32), so shared memory and FMA units finish together; smaller fragments wait for shared memory.
TABLE: dict[tuple[str, int], tuple[tuple[int, TileRow], ...]] = {
    ("fwd_simt", 4): (
        (64, TileRow(128, 32, 4, 64, "36.9 TFLOP/s, 2 blocks an SM")),
        (64, TileRow(64, 32, 4, 64, "33.4 TFLOP/s; fits 48 KB")),
        (128, TileRow(64, 32, 4, 128, "32.6 TFLOP/s")),
        (256, TileRow(64, 32, 8, 64, "fits 48 KB")),
    ),
    ("fwd_simt", 8): (
        (64, TileRow(64, 32, 4, 64, "14.8 TFLOP/s")),
        (128, TileRow(64, 32, 4, 64, "14.1 TFLOP/s")),
        (256, TileRow(64, 32, 8, 64, "")),
        (256, TileRow(32, 32, 8, 32, "fits 48 KB")),
    ),
    ("bwd_simt_dq", 4): (
        (64, TileRow(128, 32, 4, 64, "40.2 TFLOP/s")),
        (64, TileRow(64, 32, 4, 64, "35.2 TFLOP/s")),
        (128, TileRow(64, 32, 4, 128, "35.8 TFLOP/s")),
        (256, TileRow(64, 32, 8, 64, "")),
        (256, TileRow(64, 32, 8, 32, "fits 48 KB")),
    ),
    ("bwd_simt_dq", 8): (
        (64, TileRow(32, 32, 4, 64, "16.1 TFLOP/s")),
        (128, TileRow(64, 32, 8, 128, "15.2 TFLOP/s")),
        (128, TileRow(32, 32, 4, 64, "10.7 TFLOP/s")),
        (256, TileRow(32, 32, 8, 64, "")),
        (256, TileRow(32, 32, 8, 32, "fits 48 KB")),
    ),
    ("bwd_simt_dkdv", 4): (
        (64, TileRow(64, 64, 4, 64, "34.8 TFLOP/s, 2 blocks an SM")),
        (64, TileRow(64, 32, 4, 64, "31.5 TFLOP/s")),
        (128, TileRow(32, 64, 4, 128, "34.1 TFLOP/s")),
        (256, TileRow(32, 32, 4, 64, "fits 48 KB")),
    ),
    ("bwd_simt_dkdv", 8): (
        (64, TileRow(32, 32, 4, 64, "15.1 TFLOP/s")),
        (128, TileRow(32, 64, 8, 128, "16.5 TFLOP/s")),
        (128, TileRow(32, 32, 4, 64, "12.5 TFLOP/s")),
        (256, TileRow(32, 32, 8, 64, "")),
        (256, TileRow(32, 32, 8, 32, "fits 48 KB")),
    ),
}
# Kernels that walk rows and keep nothing in shared memory.
ROW_KERNELS = {"bwd_delta": (64, 4), "bwd_finish": (32, 4)}  # block_m, warps


def padded_width(width: int, dim_chunk: int) -> int:
    """The width a kernel is compiled for: the next of WIDTHS, or whole chunks where one chunk does not hold it."""
    padded = next(w for w in WIDTHS if w >= width)
    return padded if padded <= dim_chunk else -(-width // dim_chunk) * dim_chunk


def smem_bytes(kernel: str, row: TileRow, head_dim: int, head_dim_v: int, accumulator: int) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel."""
    pad = 16 // accumulator

    def tile(rows: int, cols: int) -> int:
        return rows * (cols + pad) * accumulator

    chunk, chunk_v = min(head_dim, row.dim_chunk), min(head_dim_v, row.dim_chunk)
    m, n = row.block_m, row.block_n
    if kernel == "fwd_simt":
        return tile(m, chunk) + tile(n, chunk) + tile(n, chunk_v) + tile(m, n)
    scores = tile(n, m) if kernel in KEYED else tile(m, n)
    return tile(m, chunk) + tile(m, chunk_v) + tile(n, chunk) + tile(n, chunk_v) + scores + 2 * m * accumulator


def register_words(kernel: str, row: TileRow, head_dim: int, head_dim_v: int, accumulator: int) -> int:
    """32-bit registers that a thread's accumulators take: 8 lanes share a row, 4 rows a warp."""
    owned, met = (row.block_n, row.block_m) if kernel in KEYED else (row.block_m, row.block_n)
    rows = owned // (4 * row.warps)
    scores = met // 8
    outputs = {"fwd_simt": head_dim_v, "bwd_simt_dq": head_dim + met, "bwd_simt_dkdv": head_dim + head_dim_v}
    return rows * (scores + outputs[kernel] // 8) * accumulator // 4


def check_row(kernel: str, row: TileRow, head_dim: int, head_dim_v: int, accumulator: int, smem: int) -> str | None:
    """Why a tile can't run with ``smem`` bytes of shared memory a block, or None."""
    threads = 32 * row.warps
    if threads > MAX_THREADS:
        return f"warps={row.warps} are {threads} threads: a thread block has at most {MAX_THREADS}"
    if row.stages != 1:
        return f"stages={row.stages}: the simt family has 1 stage"
    owned, met = ("block_n", "block_m") if kernel in KEYED else ("block_m", "block_n")
    if getattr(row, owned) % (4 * row.warps):
        return f"{owned}={getattr(row, owned)}: with warps={row.warps} it is a multiple of {4 * row.warps}"
    if getattr(row, met) % 8:
        return f"{met}={getattr(row, met)}: it is a multiple of 8"
    needed = smem_bytes(kernel, row, head_dim, head_dim_v, accumulator)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    words = register_words(kernel, row, head_dim, head_dim_v, accumulator)
    room = min(255, 65536 // threads) - 32  # addresses, operands and the rows' maxima and sums take the rest
    if words > room:
        return f"its accumulators need {words} registers a thread: {threads} threads leave room for {room}"
    return None

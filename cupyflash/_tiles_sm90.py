"""The tile tables of the sm90 family: block sizes and the form of the main loop. Pure data and arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ._tiles import equal_sections, first_row, padded

if TYPE_CHECKING:
    from ._plan import Tile
    from ._problem import Problem


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
    min_blocks: int = 1  # thread blocks that share a multiprocessor, and so its registers

    @property
    def warps(self) -> int:
        """Of a thread block: a warpgroup for every 64 queries, and the one that sends for tiles."""
        return 4 * (1 + self.block_m // 64)


# kernel -> (largest width of q and k, of v, row): the first that fits. Remarks: cuDNN's time to ours on an H200, at the
# row's longest length or at 16384, and the next best. bfloat16, 16384 rows and 2048 columns over all heads.
HOPPER_TABLE: dict[str, tuple[tuple[int, int, HopperRow], ...]] = {
    "fwd_sm90": (
        (64, 64, HopperRow(128, 64, 3, 2, False, False, "1.01; one block of (128, 128) 1.00, of (192, 128) 0.97",
                           causal=False, longest=512, min_blocks=2)),
        (64, 64, HopperRow(128, 128, 3, 2, True, False, "1.04; two stages 1.03; two blocks 1.00", causal=False,
                           longest=1024)),
        (64, 48, HopperRow(192, 160, 2, 2, False, False, "192 keys spill where v has 33 to 48 columns", causal=False)),
        (64, 64, HopperRow(192, 192, 2, 2, False, False, "1.13; one Q buffer 1.09", causal=False, longest=2048)),
        (64, 64, HopperRow(192, 192, 2, 1, False, False, "1.20", causal=False)),
        (64, 64, HopperRow(128, 64, 3, 2, False, False, "1.05; two stages 1.04; one block of (192, 128) 1.00",
                           longest=1024, sections=True, min_blocks=2)),
        (64, 64, HopperRow(192, 192, 2, 1, False, False, "1.22; two blocks of (128, 80) 1.10 at 4096", sections=True)),
        (128, 128, HopperRow(128, 128, 2, 2, True, False, "1.06; in turns 1.04", causal=False, longest=512)),
        (128, 128, HopperRow(128, 128, 2, 1, True, True, "1.13; 160 keys 1.13", causal=False, longest=4096)),
        (128, 128, HopperRow(128, 128, 2, 1, True, True, "1.17; 160 keys 1.16", longest=2048, sections=True)),
        (128, 128, HopperRow(128, 128, 2, 1, True, True, "1.24; 160 keys 1.23", causal=True, longest=4096)),
        (128, 128, HopperRow(128, 160, 2, 1, True, True, "1.16, causal 1.32; 128 keys 1.12, 1.31", longest=2**16)),
        (128, 128, HopperRow(128, 160, 2, 1, True, True, "131072 keys, causal: all heads side by side 1.25 of its time",
                             sections=True)),
        (192, 128, HopperRow(128, 128, 2, 1, True, True, "not compared")),
        (192, 192, HopperRow(128, 96, 2, 1, True, True, "not compared")),
        (256, 256, HopperRow(128, 64, 2, 1, True, True, "1.10; 80 keys 1.09", causal=False, longest=512)),
        (256, 256, HopperRow(128, 80, 2, 1, True, False, "1.18; in turns 1.19", causal=False)),
        (256, 256, HopperRow(128, 64, 2, 1, True, False, "1.11; 80 keys 1.10", longest=1024, sections=True)),
        (256, 256, HopperRow(128, 80, 2, 1, True, True, "1.41; without turns 1.40; in sections 1.19")),
    ),
}
# Rows for options. Remarks: ours to the full forward of 16384 keys without a window, on an H200, for window=(1024, 0)
# and (1024, 1024); or, at 4096 keys, to the same call without the option, and the next best.
WINDOW_ROWS = (
    (64, 64, HopperRow(192, 128, 2, 2, False, False, "0.112, 0.163; 128 x 128 in turns 0.108, 0.175")),
    (128, 128, HopperRow(128, 128, 2, 1, True, True, "0.108, 0.159; 160 keys 0.117, 0.168")),
)
# Of pairs: what is added to a logit, looked up or drawn for each, which takes registers.
PAIR_ROWS = (
    (64, 64, HopperRow(128, 128, 2, 1, False, False, "bias 2.25, ALiBi 1.79, dropout 5.2; (192, 192) 5.6, 2.2, 6.0")),
    (128, 128, HopperRow(128, 128, 2, 1, False, False, "bias 2.28, ALiBi 1.75, dropout 5.1; in turns 2.5, 1.9, 5.3")),
    (192, 128, HopperRow(128, 96, 2, 1, False, False, "not compared")),
    (256, 256, HopperRow(128, 64, 2, 1, False, False, "dropout 3.4, bias 2.1; 80 keys overlapped 3.7, 1.95")),
)
# Of masks and segments, whose main loop walks a map of blocks.
MAP_ROWS = ((64, 64, HopperRow(128, 128, 2, 1, True, True, "eight blocks along the diagonal 0.24; (192, 192) 1.3")),)
# Of K and V of a section. H100, causal: 1024 and 2048 keys run up to 9 % faster with 32 than with 12 MiB, 512 keys up
# to 9 % faster with 12 than with 32, since what is read once then alternates with what is read again. H200: where one
# head is more than L2 holds (131072 keys), 128 MiB are 2 to 3 % faster than a head at a time.
SECTION_BYTES, SHORT_SECTION_BYTES, LONG_SECTION_BYTES = 2**25, 12 * 2**20, 2**27


def choose_hopper(kernel: str, problem: Problem, tile: Tile, smem: int) -> HopperRow:
    """The first row that is for a problem, with the caller's tile in its place; ValueError where that can't run."""
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    own: HopperRow | None = tile.row(kernel)
    if own is not None:
        return own
    row = first_row(_rows_for(kernel, problem), problem, problem.seqlen_k)
    wanted = tile.given("block_m", "block_n", "stages")
    if wanted:
        row = replace(row, **wanted)
        row = replace(row, overlap=row.block_m < 192, take_turns=row.take_turns and row.block_m == 128, min_blocks=1)
    why = check_hopper(row, head_dim, head_dim_v, smem)
    if why is None and tile.warps not in (None, row.warps):
        why = f"warps={tile.warps}: block_m={row.block_m} has {row.warps}, 4 for every 64 rows and 4 that load"
    if why is not None:
        raise ValueError(f"{tile} does not fit {kernel} (head widths {head_dim}, {head_dim_v}): {why}")
    return row


def _rows_for(kernel: str, problem: Problem) -> tuple[tuple[int, int, HopperRow], ...]:
    """The table for a problem's options."""
    options = problem.options
    if options.asks_of_pairs:
        return PAIR_ROWS
    first = (*(WINDOW_ROWS if options.window else ()), *(MAP_ROWS if options.hides_pairs else ()))
    return (*first, *HOPPER_TABLE[kernel])


def check_hopper(row: HopperRow, head_dim: int, head_dim_v: int, smem: int) -> str | None:
    """Why a tile can't run, or None."""
    if row.block_m not in (64, 128, 192):
        return f"block_m={row.block_m}: it is 64, 128 or 192, a warpgroup for every 64 rows"
    if row.block_n % 16 or not 16 <= row.block_n <= 256:
        return f"block_n={row.block_n}: it is a multiple of 16 up to 256"
    if row.stages < 2:
        return f"stages={row.stages}: one block of keys is worked on while the next arrives, so at least 2"
    if row.min_blocks not in (1, 2) or (row.min_blocks == 2 and row.block_m != 128):
        return f"min_blocks={row.min_blocks}: it is 1, or 2 of 128 queries"
    d, dv = padded(head_dim), padded(head_dim_v)
    needed, most = hopper_smem_bytes(row, d, dv), (smem + 1024) // row.min_blocks - 1024
    if needed > most:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {most}"
    # acc_o and acc_s; P beside them where the next scores are computed while it is an operand.
    words = dv // 2 + row.block_n // 2 + (row.block_n // 4 if row.overlap else 0)
    room = (104 if row.min_blocks == 2 else 160 if row.block_m == 192 else 240) - 24
    if words > room:
        return f"its accumulators need {words} registers a thread: there is room for {room}"
    return check_product(max(row.block_n // 2, dv // 2 + 4), row.warps * row.min_blocks)


def check_product(words: int, warps: int) -> str | None:
    """Why a kernel can't have a product with so many registers where that many warps share a multiprocessor, or None.

    ``words`` are a thread's operands of one wgmma: accumulators, a number for every two columns, and four of P where it
    is the left one. ptxas wants 26 registers beside them, and for one instruction it counts those that a thread has at
    entry, not what setmaxnreg adds (C7602, in NVRTC 12.9 as in 13.0). With 512 threads those are 128: the scores of 192
    keys, 96 + 26, compile, and those of 208, 104 + 26, do not.
    """
    at_entry = min(255, 65536 // (32 * warps) // 8 * 8)
    if words + 26 > at_entry:
        return f"a product needs {words} + 26 registers a thread: {32 * warps} threads begin with {at_entry}"
    return None


def hopper_smem_bytes(row: HopperRow, head_dim: int, head_dim_v: int) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel. Rows of tiles are whole chunks of 64 columns."""
    d, dv = (-(-width // 64) * 128 for width in (head_dim, head_dim_v))  # bytes of a row
    tiles = row.q_stages * row.block_m * d + row.stages * row.block_n * (d + dv)
    rings = 16 * (row.block_m // 64 * row.q_stages + 2 * row.stages) + 32
    return tiles + -(-rings // 1024) * 1024


def section(row: HopperRow, problem: Problem, all_heads: int) -> int:
    """How many heads a section of the tile list has (TileWalk), or packed sequences (PackedWalk).

    It changes the order of tiles, never their bits.
    """
    if not problem.causal or problem.options.packed is not None:
        return 1
    if not row.sections:
        return max(1, all_heads)
    group = problem.num_heads // problem.num_heads_k if problem.num_heads_k else 1
    head = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    keys = problem.seqlen_k
    most = SHORT_SECTION_BYTES if keys <= 512 else SECTION_BYTES if keys <= 2**16 else LONG_SECTION_BYTES
    fit = max(1, most * group // max(1, head))
    return equal_sections(all_heads, fit)


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


# (largest width of q and k, of v, row): the first that fits. Remarks: cuDNN's time to ours on an H200 at the row's
# longest length, or at 16384, in a fixed order / in the order of arrival, and the next best.
HOPPER_BACKWARD_TABLE: tuple[tuple[int, int, HopperBackwardRow], ...] = (
    (64, 64, HopperBackwardRow(128, 128, 2, 128, False, "1.39 / 1.26; 64 heads 1.39", causal=False, longest=512)),
    (64, 64, HopperBackwardRow(128, 128, 2, 64, False, "1.32 / 1.31; 32 heads 1.31", causal=False, longest=1024)),
    (64, 64, HopperBackwardRow(128, 128, 2, 32, True, "1.16 / 1.22; 16 heads 1.16", causal=False, longest=4096)),
    (64, 64, HopperBackwardRow(128, 128, 2, 8, True, "1.12 / 1.13; 16 heads 1.09", causal=False)),
    (64, 64, HopperBackwardRow(128, 128, 2, 128, False, "1.48 / 1.23; 64 heads 1.43", longest=512)),
    (64, 64, HopperBackwardRow(128, 128, 2, 64, False, "1.38 / 1.30; 128 heads 1.34", longest=1024)),
    (64, 64, HopperBackwardRow(128, 128, 2, 64, True, "1.18 / 1.27; 32 heads 1.18")),
    (128, 128, HopperBackwardRow(64, 128, 2, 16, False, "1.11 / 1.11; 32 heads 1.12", causal=False, longest=1024)),
    (128, 128, HopperBackwardRow(64, 128, 2, 16, True, "0.98 / 1.07; 8 heads 0.98", causal=False)),
    (128, 128, HopperBackwardRow(64, 128, 2, 16, False, "1.17 / 1.16; 8 heads 1.15", longest=2048)),
    (128, 128, HopperBackwardRow(64, 128, 2, 16, True, "1.03 / 1.13; 32 heads 1.04")),
    (256, 256, HopperBackwardRow(64, 64, 2, 32, False, "1.30 / 1.21; 16 heads 1.28", causal=False, longest=512)),
    (256, 256, HopperBackwardRow(64, 64, 2, 16, False, "1.20 / 1.19; 8 heads 1.16", causal=False, longest=1024)),
    (256, 256, HopperBackwardRow(64, 64, 2, 8, True, "1.13 / 1.16; 4 heads 1.10", causal=False, longest=2048)),
    (256, 256, HopperBackwardRow(64, 64, 2, 4, True, "1.06 / 1.10; 8 heads 0.83", causal=False)),
    (256, 256, HopperBackwardRow(64, 64, 2, 32, False, "1.15 / 1.14; 16 heads 1.06", longest=1024)),
    (256, 256, HopperBackwardRow(64, 64, 2, 16, True, "1.02 / 1.13; 8 heads 0.98", longest=4096)),
    (256, 256, HopperBackwardRow(64, 64, 2, 8, True, "0.98 / 1.06; 16 heads 0.99, at 8192 0.87 instead of 0.94")),
)
ARRIVAL_BYTES = 2**24  # of Q, dO and dq's sums: what heads side by side may take of L2 in arrival order


def is_wide(head_dim: int, head_dim_v: int) -> bool:
    """Whether a block of keys has 64 of them, and warpgroups share out columns (WIDE in kernels/gradients_sm90.cuh)."""
    return max(head_dim, head_dim_v) > 128


def choose_hopper_backward(problem: Problem, tile: Tile, smem: int) -> HopperBackwardRow:
    """The first row that is for a problem, with the caller's tile in its place; ValueError where that can't run."""
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    own: HopperBackwardRow | None = tile.row("bwd_sm90")
    if own is not None:
        return own
    wanted = tile.given("block_m", "block_n", "stages")
    row = replace(first_row(HOPPER_BACKWARD_TABLE, problem, problem.seqlen_q), **wanted)
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
    d, dv = padded(head_dim), padded(head_dim_v)
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
    job, leave, barriers = 60, 8, 2 * (1 + 1) + (2 + 2 + 3) * stages + 2 * 2
    rest = 2 * stages * m * 4 + 8 * barriers + 2 * job + stages * leave
    return tiles + -(-rest // 1024) * 1024


def backward_section(row: HopperBackwardRow, problem: Problem, ordered: bool, heads_k: int) -> int:
    """How many kv heads run side by side, or packed sequences. It changes the order of jobs, never the bits of a fixed
    order."""
    if ordered:
        heads = row.heads
    else:
        group = problem.num_heads // problem.num_heads_k if problem.num_heads_k else 1
        head = group * problem.seqlen_q * (4 * problem.head_dim + 2 * (problem.head_dim + problem.head_dim_v))
        heads = max(1, ARRIVAL_BYTES // max(1, head))
    if problem.options.packed is not None:
        return packed_section(heads // max(1, problem.num_heads_k))
    return equal_sections(heads_k, heads)


def packed_section(sequences: int) -> int:
    """How many packed sequences run side by side, all heads of each: a power of 2, of a warp's 32 at most."""
    return 1 << max(1, min(sequences, 32)).bit_length() - 1


def hopper_candidates(kernel: str, problem: Problem, smem: int) -> Iterator[HopperRow]:
    """The rows of the table that hold the heads; then each form of the main loop with the three longest blocks of keys.

    Long blocks ask for fewer turns and barriers, up to the registers that the softmax has; a third stage pays only
    where it costs no keys. Sections are the table's: they are a matter of length alone.
    """
    sections = first_row(HOPPER_TABLE[kernel], problem, problem.seqlen_k).sections
    widths = problem.head_dim, problem.head_dim_v
    for largest, largest_v, row in HOPPER_TABLE[kernel]:
        if problem.head_dim <= largest and problem.head_dim_v <= largest_v:
            yield replace(row, remark="", causal=None, longest=None, sections=sections)
    for block_m, overlap, take_turns, min_blocks in HOPPER_FORMS:
        for q_stages in (2, 1):
            form = HopperRow(
                block_m, 16, 2, q_stages, overlap, take_turns, "", sections=sections, min_blocks=min_blocks
            )
            blocks = (replace(form, block_n=n) for n in range(256, 48, -16))
            fits = [row for row in blocks if check_hopper(row, *widths, smem) is None][:3]
            yield from fits
            deeper = (replace(row, stages=3) for row in fits[:1])
            yield from (row for row in deeper if check_hopper(row, *widths, smem) is None)


def hopper_backward_candidates(problem: Problem) -> Iterator[HopperBackwardRow]:
    """Every block of queries, with every number of heads side by side that has paid on some problem."""
    own = first_row(HOPPER_BACKWARD_TABLE, problem, problem.seqlen_q)
    yield replace(own, remark="", causal=None, longest=None)
    for block_m in (64, 80, 96, 128):
        for heads in (4, 8, 16, 32, 64, 128):
            yield HopperBackwardRow(block_m, own.block_n, 2, heads, own.arrival, "")


# Rows of queries, overlap, take_turns, thread blocks side by side: what fwd_sm90 has been run with. Three consumers on
# a multiprocessor have no registers to overlap, nor have four.
HOPPER_FORMS = (
    (64, True, False, 1), (128, True, True, 1), (128, True, False, 1), (128, False, False, 1), (128, False, False, 2),
    (192, False, False, 1),
)  # fmt: skip

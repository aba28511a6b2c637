"""The tile tables of float64 on tensor cores: block sizes. Pure data and arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from ._tiles import MAX_THREADS, WIDTHS, equal_sections, first_row, padded

if TYPE_CHECKING:
    from ._plan import Tile
    from ._problem import Problem


@dataclass(frozen=True)
class DoubleRow:
    """One tile of the float64 forward.

    A warp owns 16 queries; where ``block_m`` is less than 16 for each warp, several share them, and each owns a part
    of the columns of out. ``card`` is the shared memory, in KiB, that a thread block must be able to have.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int  # of K and V together
    remark: str
    min_blocks: int = 1  # thread blocks on a multiprocessor that the registers must suffice for
    card: int = 0
    causal: bool | None = None  # which problems the row is for; None: both
    longest: int | None = None  # keys

    @property
    def sharers(self) -> int:
        """Warps that share 16 queries."""
        return 16 * self.warps // self.block_m


# (largest width of q and k, of v, row): the first that fits. Remarks: TFLOP/s on an H200, S = 4096.
#
# A product of a warp takes 16 cycles of a multiprocessor, and reads 8 cycles' worth of the right operand from shared
# memory, or 16 for two products; of Q another 16, shared by block_n / 8 products. Two warps a scheduler, so 8, hide
# what the one waits for behind the other.
DOUBLE_TABLE: tuple[tuple[int, int, DoubleRow], ...] = (
    (64, 64, DoubleRow(128, 64, 8, 4, "40; 48 keys 39, 32 keys 37, 80 keys 38", card=227)),
    (64, 64, DoubleRow(128, 32, 8, 4, "not measured")),
    (96, 96, DoubleRow(128, 32, 8, 4, "not measured", card=227)),
    (96, 96, DoubleRow(128, 32, 8, 2, "not measured")),
    (128, 128, DoubleRow(128, 32, 8, 3, "45, causal 43; 16 keys 42", card=227)),
    (128, 128, DoubleRow(128, 16, 8, 2, "not measured")),
    (160, 160, DoubleRow(128, 16, 8, 3, "not measured", card=227)),
    (192, 192, DoubleRow(64, 32, 8, 2, "not measured", card=227)),
    (192, 192, DoubleRow(64, 16, 8, 2, "not measured")),
    (256, 256, DoubleRow(64, 16, 8, 3, "not measured; S twice", card=227)),
    (256, 256, DoubleRow(32, 16, 4, 3, "not measured; S twice")),
)


def choose_double(problem: Problem, tile: Tile, smem: int) -> DoubleRow:
    """The first row that is for a problem and a card, with the caller's tile in its place; or ValueError."""
    own: DoubleRow | None = tile.row("fwd_f64")
    if own is not None:
        return own
    row = first_row(_for_card(DOUBLE_TABLE, smem), problem, problem.seqlen_k)
    names = ("block_m", "block_n", "stages", "warps")
    wanted = {name: n for name in names if (n := getattr(tile, name)) is not None}
    row = replace(row, **wanted, min_blocks=1) if wanted else row
    if "block_m" in wanted and "warps" not in wanted:
        # The table's number if it can be, else one for 16 queries, or two.
        choices = (row.warps, row.block_m // 16, row.block_m // 8)
        widths = problem.head_dim, problem.head_dim_v
        fits = (n for n in choices if check_double(replace(row, warps=n), *widths, smem) is None)
        row = replace(row, warps=next(fits, row.warps))
    why = check_double(row, problem.head_dim, problem.head_dim_v, smem)
    if why is not None:
        raise ValueError(
            f"{tile} does not fit fwd_f64 (head widths {problem.head_dim}, {problem.head_dim_v}): {why}"
        )
    return row


def double_widths(row: DoubleRow, head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The widths that a kernel is compiled for: of v such that each of the sharing warps has steps of 16 columns."""
    step = 16 * row.sharers
    return padded(head_dim), next(w for w in WIDTHS if w >= head_dim_v and w % step == 0)


def double_smem_bytes(row: DoubleRow, head_dim: int, head_dim_v: int) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel."""
    powers, rows = 64 * 8 * (4 if max(head_dim, head_dim_v) > 96 else 16), 128
    return 8 * (row.block_m * head_dim + row.stages * row.block_n * max(head_dim, head_dim_v)) + powers + rows


def why_not_rows(row: DoubleRow) -> str | None:
    """Why queries can't be dealt out to the warps like this, or None."""
    if row.warps % 2 or not 2 <= row.warps <= MAX_THREADS // 32:
        return f"warps={row.warps}: it is even, and at most {MAX_THREADS // 32}"
    sharers = [n for n in (1, 2) if row.block_m == 16 * row.warps // n]
    if not sharers:
        wanted = f"{16 * row.warps} or {8 * row.warps}"
        return f"block_m={row.block_m}: with warps={row.warps} it is {wanted}, 16 for one warp or for two"
    return None


def check_double(row: DoubleRow, head_dim: int, head_dim_v: int, smem: int) -> str | None:
    """Why a tile can't run, or None."""
    why = why_not_rows(row)
    if why is not None:
        return why
    if row.block_n % 16 or not 16 <= row.block_n <= 256:
        return f"block_n={row.block_n}: it is a multiple of 16 up to 256"
    if row.stages < 2:
        return f"stages={row.stages}: one tile is worked on while the next arrives, so at least 2"
    d, dv = double_widths(row, head_dim, head_dim_v)
    needed = double_smem_bytes(row, d, dv)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    words = dv // row.sharers + row.block_n  # acc_o and acc_s
    room = min(255, 65536 // (32 * row.warps * row.min_blocks)) - 72
    if words > room:
        return f"its accumulators need {words} registers a thread: there is room for {room}"
    return None


def double_candidates(problem: Problem) -> Iterator[DoubleRow]:
    """The rows of the table that hold the heads; then blocks of 128 and 64 queries with every number of keys."""
    for largest, largest_v, row in DOUBLE_TABLE:
        if problem.head_dim <= largest and problem.head_dim_v <= largest_v:
            yield replace(row, remark="", card=0)
    for block_m in (128, 64):
        for block_n in (64, 48, 32, 16):
            for stages in (2, 3, 4, 5, 6):
                yield DoubleRow(block_m, block_n, 8, stages, "")
    for block_n, stages in ((64, 2), (48, 2), (32, 4), (16, 6)):
        yield DoubleRow(64, block_n, 4, stages, "", 2)


@dataclass(frozen=True)
class DoubleBackwardRow:
    """One tile of the float64 backward.

    Two warps share ``block_n / (warps / 2)`` keys, 16 or more. ``heads`` are the kv heads that run side by side: too
    few, and the key blocks of one head queue up; too many, and their Q, dO and dq leave L2. ``card`` as in DoubleRow.
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


_R = TypeVar("_R", "DoubleRow", "DoubleBackwardRow")

# (largest width of q and k, of v, row): the first that fits.
DOUBLE_BACKWARD_TABLE: tuple[tuple[int, int, DoubleBackwardRow], ...] = (
    (64, 64, DoubleBackwardRow(32, 96, 12, 2, 16, "35, causal 33; 64 keys and 8 warps 31", card=227)),
    (64, 64, DoubleBackwardRow(32, 64, 8, 2, 16, "31 on an H200")),
    (96, 96, DoubleBackwardRow(16, 64, 8, 2, 8, "not measured")),
    (128, 128, DoubleBackwardRow(16, 64, 8, 2, 8, "33, causal 32", card=227)),
    (128, 128, DoubleBackwardRow(16, 32, 4, 2, 8, "not measured")),
)
WIDEST_BACKWARD = 128


def choose_double_backward(problem: Problem, tile: Tile, smem: int) -> DoubleBackwardRow:
    """The first row that is for a problem and a card, with the caller's tile in its place; or ValueError."""
    own: DoubleBackwardRow | None = tile.row("bwd_f64")
    if own is not None:
        return own
    row = first_row(_for_card(DOUBLE_BACKWARD_TABLE, smem), problem, problem.seqlen_q)
    names = ("block_m", "block_n", "stages", "warps")
    wanted = {name: n for name in names if (n := getattr(tile, name)) is not None}
    row = replace(row, **wanted)
    if "block_n" in wanted and "warps" not in wanted:  # the table's number if it can be, else two for 16 keys
        warps = row.warps if row.block_n % (8 * row.warps) == 0 else max(2, row.block_n // 8)
        row = replace(row, warps=warps)
    why = check_double_backward(row, problem.head_dim, problem.head_dim_v, smem)
    if why is not None:
        widths = f"{problem.head_dim}, {problem.head_dim_v}"
        raise ValueError(f"{tile} does not fit bwd_f64 (head widths {widths}): {why}")
    return row


def check_double_backward(row: DoubleBackwardRow, head_dim: int, head_dim_v: int, smem: int) -> str | None:
    """Why a tile can't run, or None."""
    if row.warps % 2 or not 2 <= row.warps <= 24:
        return f"warps={row.warps}: it is even and at most 24, two for each group of keys"
    if row.block_n % (8 * row.warps):
        return f"block_n={row.block_n}: with warps={row.warps} it is a multiple of {8 * row.warps}, 16 for two warps"
    most = min(256, 16 * row.warps)
    if row.block_m % 16 or not 16 <= row.block_m <= most:
        return f"block_m={row.block_m}: with warps={row.warps} it is a multiple of 16 up to {most}"
    if row.stages != 2:
        return f"stages={row.stages}: there are 2, one tile worked on while the next arrives"
    d, dv = padded(head_dim), padded(head_dim_v)
    needed = double_backward_smem_bytes(row, d, dv)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    # dk or dv beside scores.
    words = row.block_n // (8 * row.warps) * (max(d, dv) + row.block_m)
    room = min(255, 65536 // (32 * row.warps)) - 48
    if words > room:
        return f"its accumulators need {words} registers a thread: there is room for {room}"
    return None


def double_backward_smem_bytes(row: DoubleBackwardRow, head_dim: int, head_dim_v: int) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel."""
    m, n, both = row.block_m, row.block_n, head_dim + head_dim_v
    powers, job = 64 * 2 * 8, 240
    return 8 * (n * both + 2 * m * both + n * m) + -(-(32 * m + powers + 8 + job) // 128) * 128


def double_backward_section(row: DoubleBackwardRow, heads_k: int) -> int:
    """How many kv heads run side by side. It changes the order of jobs, never the bits."""
    return equal_sections(heads_k, row.heads)


def double_backward_candidates(problem: Problem) -> Iterator[DoubleBackwardRow]:
    """The rows of the table that hold the heads, and other blocks, each with several numbers of heads side by side."""
    for largest, largest_v, row in DOUBLE_BACKWARD_TABLE:
        if problem.head_dim <= largest and problem.head_dim_v <= largest_v:
            yield replace(row, remark="", card=0)
    for block_m in (16, 32, 48):
        for block_n, warps in ((64, 8), (96, 12), (128, 8)):
            for heads in (4, 8, 16, 32):
                yield DoubleBackwardRow(block_m, block_n, warps, 2, heads, "")


def _for_card(table: tuple[tuple[int, int, _R], ...], smem: int) -> tuple[tuple[int, int, _R], ...]:
    """The rows that are worth it where a thread block may have ``smem`` bytes."""
    return tuple(entry for entry in table if smem >= entry[2].card * 1024)

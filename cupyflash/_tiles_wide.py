"""The tile tables of float64 and float32 on tensor cores: block sizes. Pure data and arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from ._tiles import MAX_THREADS, WIDTHS, equal_sections, first_row, padded

if TYPE_CHECKING:
    from ._plan import Tile
    from ._problem import Problem


@dataclass(frozen=True)
class WideRow:
    """One tile of the forward.

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


# (largest width of q and k, of v, row), by the bytes of a number: the first that fits.
#
# float64; remarks: TFLOP/s on an H200, S = 4096. A product of a warp takes 16 cycles of a multiprocessor, and reads 8
# cycles' worth of the right operand from shared memory, or 16 for two products; of Q another 16, shared by block_n / 8
# products. Two warps a scheduler, so 8, hide what the one waits for behind the other.
#
# float32, not measured: to split four numbers of a right operand and to add up their products takes a warp 26
# instructions, the six products 48 cycles of an A100's tensor cores.
WIDE_TABLE: dict[int, tuple[tuple[int, int, WideRow], ...]] = {
    8: (
        (64, 64, WideRow(128, 64, 8, 4, "40; 48 keys 39, 32 keys 37, 80 keys 38", card=227)),
        (64, 64, WideRow(128, 32, 8, 4, "not measured")),
        (96, 96, WideRow(128, 32, 8, 4, "not measured", card=227)),
        (96, 96, WideRow(128, 32, 8, 2, "not measured")),
        (128, 128, WideRow(128, 32, 8, 3, "45, causal 43; 16 keys 42", card=227)),
        (128, 128, WideRow(128, 16, 8, 2, "not measured")),
        (160, 160, WideRow(128, 16, 8, 3, "not measured", card=227)),
        (192, 192, WideRow(64, 32, 8, 2, "not measured", card=227)),
        (192, 192, WideRow(64, 16, 8, 2, "not measured")),
        (256, 256, WideRow(64, 16, 8, 3, "not measured; S twice", card=227)),
        (256, 256, WideRow(32, 16, 4, 3, "not measured; S twice")),
    ),
    4: (
        (64, 64, WideRow(64, 64, 4, 3, "not measured", 2, card=163)),
        (64, 64, WideRow(64, 32, 4, 4, "not measured", 2)),
        (96, 96, WideRow(128, 32, 8, 4, "not measured; 64 keys spill")),
        (128, 128, WideRow(128, 32, 8, 3, "not measured; 64 keys, or 4 slots, spill on some", card=163)),
        (128, 128, WideRow(128, 32, 8, 2, "not measured")),
        (192, 192, WideRow(128, 16, 8, 4, "not measured; 32 keys spill", card=163)),
        (192, 192, WideRow(64, 16, 4, 4, "not measured")),
        (256, 256, WideRow(64, 32, 8, 3, "not measured; S twice; 128 queries of 16 keys spill", card=163)),
        (256, 256, WideRow(32, 16, 4, 4, "not measured; S twice")),
    ),
}


def panel(problem: Problem) -> int:
    """The columns of eight chunks of 16 bytes."""
    return 128 // problem.dtype.itemsize


def padded_to(width: int, step: int) -> int:
    """The least width of a kernel that is a multiple of ``step``."""
    return next(w for w in WIDTHS if w >= width and w % step == 0)


def choose_wide(problem: Problem, tile: Tile, smem: int) -> WideRow:
    """The first row that is for a problem and a card, with the caller's tile in its place; or ValueError."""
    own: WideRow | None = tile.row("fwd_wide")
    if own is not None:
        return own
    row = first_row(_for_card(WIDE_TABLE[problem.dtype.itemsize], smem), problem, problem.seqlen_k)
    wanted = tile.given()
    row = replace(row, **wanted, min_blocks=1) if wanted else row
    if "block_m" in wanted and "warps" not in wanted:
        # The table's number if it can be, else one for 16 queries, or two.
        choices = (row.warps, row.block_m // 16, row.block_m // 8)
        fits = (n for n in choices if check_wide(replace(row, warps=n), problem, smem) is None)
        row = replace(row, warps=next(fits, row.warps))
    why = check_wide(row, problem, smem)
    if why is not None:
        raise ValueError(
            f"{tile} does not fit fwd_wide (head widths {problem.head_dim}, {problem.head_dim_v}): {why}"
        )
    return row


def wide_widths(problem: Problem, sharers: int = 1) -> tuple[int, int]:
    """The widths that a kernel is compiled for: of v such that each of the sharing warps has whole panels."""
    step = panel(problem)
    return padded_to(problem.head_dim, step), padded_to(problem.head_dim_v, step * sharers)


def wide_smem_bytes(row: WideRow, problem: Problem) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel."""
    d, dv = wide_widths(problem, row.sharers)
    numbers = row.block_m * d + row.stages * row.block_n * max(d, dv)
    powers = 64 * 8 * (4 if max(d, dv) > 96 else 16) if problem.dtype.itemsize == 8 else 0
    return problem.dtype.itemsize * numbers + powers + 128


def why_not_rows(row: WideRow) -> str | None:
    """Why queries can't be dealt out to the warps like this, or None."""
    if row.warps % 2 or not 2 <= row.warps <= MAX_THREADS // 32:
        return f"warps={row.warps}: it is even, and at most {MAX_THREADS // 32}"
    sharers = [n for n in (1, 2) if row.block_m == 16 * row.warps // n]
    if not sharers:
        wanted = f"{16 * row.warps} or {8 * row.warps}"
        return f"block_m={row.block_m}: with warps={row.warps} it is {wanted}, 16 for one warp or for two"
    return None


def check_wide(row: WideRow, problem: Problem, smem: int) -> str | None:
    """Why a tile can't run, or None."""
    why = why_not_rows(row)
    if why is not None:
        return why
    if row.block_n % 16 or not 16 <= row.block_n <= 256:
        return f"block_n={row.block_n}: it is a multiple of 16 up to 256"
    if row.stages < 2:
        return f"stages={row.stages}: one tile is worked on while the next arrives, so at least 2"
    needed = wide_smem_bytes(row, problem)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    _, dv = wide_widths(problem, row.sharers)
    words = (dv // row.sharers + row.block_n) * problem.dtype.itemsize // 8  # acc_o and acc_s
    room = min(255, 65536 // (32 * row.warps * row.min_blocks)) - (72 if problem.dtype.itemsize == 8 else 88)
    if words > room:
        return f"its accumulators need {words} registers a thread: there is room for {room}"
    return None


def wide_candidates(problem: Problem) -> Iterator[WideRow]:
    """The rows of the table that hold the heads; then blocks of 128 and 64 queries with every number of keys."""
    for largest, largest_v, row in WIDE_TABLE[problem.dtype.itemsize]:
        if problem.head_dim <= largest and problem.head_dim_v <= largest_v:
            yield replace(row, remark="", card=0)
    for block_m in (128, 64):
        for block_n in (64, 48, 32, 16):
            for stages in (2, 3, 4, 5, 6):
                yield WideRow(block_m, block_n, 8, stages, "")
    for block_n, stages in ((64, 2), (48, 2), (32, 4), (16, 6)):
        yield WideRow(64, block_n, 4, stages, "", 2)


@dataclass(frozen=True)
class WideBackwardRow:
    """One tile of the backward.

    Two warps share ``block_n / (warps / 2)`` keys, 16 or more. ``heads`` are the kv heads that run side by side: too
    few, and the key blocks of one head queue up; too many, and their Q, dO and dq leave L2. ``card`` as in WideRow.
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


@dataclass(frozen=True)
class PartsRow:
    """One tile of the float32 forward on Hopper: two consumers of 64 queries, and a warpgroup that makes the parts."""

    block_m: int
    block_n: int
    stages: int  # of K and V together
    remark: str
    warps: int = 12
    causal: bool | None = None  # which problems the row is for; None: both
    longest: int | None = None  # keys


# (largest width of q and k, of v, row): the first that fits. Not measured.
PARTS_TABLE: tuple[tuple[int, int, PartsRow], ...] = (
    (64, 64, PartsRow(128, 96, 4, "a prototype's fastest")),
    (128, 128, PartsRow(128, 48, 3, "a prototype's fastest")),
)
WIDEST_PARTS = 128


def choose_parts(problem: Problem, tile: Tile, smem: int) -> PartsRow:
    """The first row that is for a problem, with the caller's tile in its place; or ValueError."""
    own: PartsRow | None = tile.row("fwd_parts_sm90")
    if own is not None:
        return own
    row = first_row(PARTS_TABLE, problem, problem.seqlen_k)
    row = replace(row, **tile.given())
    why = check_parts(row, problem, smem)
    if why is not None:
        widths = f"{problem.head_dim}, {problem.head_dim_v}"
        raise ValueError(f"{tile} does not fit fwd_parts_sm90 (head widths {widths}): {why}")
    return row


def check_parts(row: PartsRow, problem: Problem, smem: int) -> str | None:
    """Why a tile can't run, or None."""
    if (row.block_m, row.warps) != (128, 12):
        return f"block_m={row.block_m}, warps={row.warps}: 128 and 12, two warpgroups of 64 queries and one more"
    if row.block_n % 16 or not 16 <= row.block_n <= 128:
        return f"block_n={row.block_n}: it is a multiple of 16 up to 128"
    if row.stages < 2:
        return f"stages={row.stages}: K and V of a block are in two, so at least 2"
    needed = parts_smem_bytes(row, problem)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    words = padded(problem.head_dim_v) + row.block_n * 3 // 4  # acc_o and acc_pv; the parts of P
    if words > 208 - 24:
        return f"its accumulators need {words} registers a thread: there is room for {208 - 24}"
    return None


def parts_smem_bytes(row: PartsRow, problem: Problem) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel."""
    d, dv = (-(-padded(width) // 64) * 64 for width in (problem.head_dim, problem.head_dim_v))
    return 6 * (row.block_m * d + row.stages * row.block_n * max(d, dv)) + -(-16 * row.stages // 1024) * 1024


def parts_candidates(problem: Problem) -> Iterator[PartsRow]:
    """All numbers of keys, with all numbers of slots."""
    for block_n in (128, 112, 96, 80, 64, 48, 32):
        for stages in (6, 5, 4, 3, 2):
            yield PartsRow(128, block_n, stages, "")


_R = TypeVar("_R", "WideRow", "WideBackwardRow")

# (largest width of q and k, of v, row), by the bytes of a number: the first that fits. float32 is not measured.
WIDE_BACKWARD_TABLE: dict[int, tuple[tuple[int, int, WideBackwardRow], ...]] = {
    8: (
        (64, 64, WideBackwardRow(32, 96, 12, 2, 16, "35, causal 33; 64 keys and 8 warps 31", card=227)),
        (64, 64, WideBackwardRow(32, 64, 8, 2, 16, "31 on an H200")),
        (96, 96, WideBackwardRow(16, 64, 8, 2, 8, "not measured")),
        (128, 128, WideBackwardRow(16, 64, 8, 2, 8, "33, causal 32", card=227)),
        (128, 128, WideBackwardRow(16, 32, 4, 2, 8, "not measured")),
    ),
    4: (
        (64, 64, WideBackwardRow(32, 64, 8, 2, 16, "not measured; 12 warps, or 128 keys, spill")),
        (96, 96, WideBackwardRow(32, 64, 8, 2, 8, "not measured", card=163)),
        (96, 96, WideBackwardRow(16, 64, 8, 2, 8, "not measured")),
        (128, 128, WideBackwardRow(32, 64, 8, 2, 8, "not measured; 12 warps spill", card=163)),
        (128, 128, WideBackwardRow(16, 48, 6, 2, 8, "not measured")),
        (160, 160, WideBackwardRow(16, 64, 8, 2, 8, "not measured; wider heads spill", card=163)),
        (160, 160, WideBackwardRow(16, 32, 4, 2, 8, "not measured")),
    ),
}


def widest_backward(itemsize: int, smem: int) -> int:
    """The widest head whose gradients fit the registers and the shared memory of a card."""
    return max(min(largest, v) for largest, v, _ in _for_card(WIDE_BACKWARD_TABLE[itemsize], smem))


def choose_wide_backward(problem: Problem, tile: Tile, smem: int) -> WideBackwardRow:
    """The first row that is for a problem and a card, with the caller's tile in its place; or ValueError."""
    own: WideBackwardRow | None = tile.row("bwd_wide")
    if own is not None:
        return own
    row = first_row(_for_card(WIDE_BACKWARD_TABLE[problem.dtype.itemsize], smem), problem, problem.seqlen_q)
    wanted = tile.given()
    row = replace(row, **wanted)
    if "block_n" in wanted and "warps" not in wanted:  # the table's number if it can be, else two for 16 keys
        keeps = row.block_n % 16 or row.block_n % (8 * row.warps) == 0
        warps = row.warps if keeps else row.block_n // 8
        row = replace(row, warps=warps)
    why = check_wide_backward(row, problem, smem)
    if why is not None:
        widths = f"{problem.head_dim}, {problem.head_dim_v}"
        raise ValueError(f"{tile} does not fit bwd_wide (head widths {widths}): {why}")
    return row


def check_wide_backward(row: WideBackwardRow, problem: Problem, smem: int) -> str | None:
    """Why a tile can't run, or None."""
    if row.warps % 2 or not 2 <= row.warps <= 24:
        return f"warps={row.warps}: it is even and at most 24, two for each group of keys"
    if row.block_n % (8 * row.warps):
        return f"block_n={row.block_n}: with warps={row.warps} it is a multiple of {8 * row.warps}, 16 for two warps"
    itemsize = problem.dtype.itemsize
    step, most = panel(problem), min(256, 128 // itemsize * row.warps)
    if row.block_m != 16 and (row.block_m % step or not 16 <= row.block_m <= most):
        return f"block_m={row.block_m}: with warps={row.warps} it is 16, or a multiple of {step} up to {most}"
    if row.stages != 2:
        return f"stages={row.stages}: there are 2, one tile worked on while the next arrives"
    needed = wide_backward_smem_bytes(row, problem)
    if needed > smem:
        return f"it needs {needed} bytes of shared memory: a thread block has at most {smem}"
    # dk or dv beside scores.
    words = row.block_n // (8 * row.warps) * (max(wide_widths(problem)) + row.block_m) * itemsize // 8
    room = min(255, 65536 // (32 * row.warps)) - (48 if itemsize == 8 else 88)
    if words > room:
        return f"its accumulators need {words} registers a thread: there is room for {room}"
    return None


def wide_backward_smem_bytes(row: WideBackwardRow, problem: Problem) -> int:
    """Shared memory of a thread block: sizeof(Smem) in the kernel."""
    itemsize, both = problem.dtype.itemsize, sum(wide_widths(problem))
    m, n = row.block_m, row.block_n
    powers, job = (64 * 2 * 8, 240) if itemsize == 8 else (8, 240)
    rest = 4 * m * itemsize + powers + 8 + job
    return itemsize * (n * both + 2 * m * both + n * m) + -(-rest // 128) * 128


def wide_backward_section(row: WideBackwardRow, heads_k: int) -> int:
    """How many kv heads run side by side. It changes the order of jobs, never the bits."""
    return equal_sections(heads_k, row.heads)


def wide_backward_candidates(problem: Problem) -> Iterator[WideBackwardRow]:
    """The rows of the table that hold the heads, and other blocks, each with several numbers of heads side by side."""
    for largest, largest_v, row in WIDE_BACKWARD_TABLE[problem.dtype.itemsize]:
        if problem.head_dim <= largest and problem.head_dim_v <= largest_v:
            yield replace(row, remark="", card=0)
    for block_m in (16, 32, 48):
        for block_n, warps in ((64, 8), (96, 12), (128, 8)):
            for heads in (4, 8, 16, 32):
                yield WideBackwardRow(block_m, block_n, warps, 2, heads, "")


def _for_card(table: tuple[tuple[int, int, _R], ...], smem: int) -> tuple[tuple[int, int, _R], ...]:
    """The rows that are worth it where a thread block may have ``smem`` bytes."""
    return tuple(entry for entry in table if smem >= entry[2].card * 1024)

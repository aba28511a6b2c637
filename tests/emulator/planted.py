"""Bugs on purpose: text patches to real kernels and to samples, and what the checker must say of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .removals import (
    AMPERE_BACKWARD,
    AMPERE_FORWARD,
    DECODE_SIMT,
    DECODE_SM80,
    DOUBLE_BACKWARD,
    DOUBLE_FORWARD,
    HOPPER_FORWARD,
    HOPPER_NARROW,
    PACKED_BACKWARD,
    PACKED_FORWARD,
    PARTS_FORWARD,
    DecodeProblem,
    PackedProblem,
    Problem,
    hopper_backward,
)
from .samples import SAMPLES

RAGGED = Problem("float32", 16, 70, 70)
SEVERAL_BLOCKS = (3, 5)  # seeds of schedules with more than one resident block


@dataclass(frozen=True)
class Planted:
    """One bug.

    Attributes
    ----------
    kernel : str
        A sample's name, or one of the library's kernels.
    old, new : str
        The patch: a pattern and what takes its place, as in ``re.sub``, in the text of the kernel and all its words.
        Samples do not change under others' hands, so that their patches are plain text.
    kinds : tuple of str
        What the report's kind may be; the first one is the usual one, others show under some schedules.
    says : str
        A pattern that the report's text must match.
    problem : Problem
        For the library's kernels: what shows the bug.
    seeds : tuple of int
        For the library's kernels: schedules, each of which shows it.
    """

    name: str
    kernel: str
    old: str
    new: str
    kinds: tuple[str, ...]
    says: str = ""
    problem: Problem | PackedProblem | DecodeProblem = RAGGED
    seeds: tuple[int, ...] = (0, 1)

    def applies(self, text: str) -> bool:
        return self.patch(text) != text

    def patch(self, text: str) -> str:
        if self.kernel in SAMPLES:
            return text.replace(self.old, self.new)
        return re.sub(self.old, self.new, text)


PLANTED = (
    # ---- sm80: cp.async, ldmatrix, shared memory
    Planted("wait left out", "sm80", "cp_async_wait<1>();", "", ("early use",), "cp.async"),
    Planted(
        "wait for one group too few", "sm80", "cp_async_wait<1>();", "cp_async_wait<2>();", ("early use",), "cp.async"
    ),
    Planted(
        "no barrier before the stage is read",
        "sm80",
        "sync_block();        // and of all",
        "//",
        ("race", "early use", "uninitialised"),
        "shared",
    ),
    Planted(
        "no barrier before the refill",
        "sm80",
        "sync_block();  // the stage is read",
        "//",
        ("race", "early use"),
        "shared",
    ),
    Planted(
        "rows across lanes without a barrier",
        "sm80",
        "sync_warp();  // the warp's 16",
        "//",
        ("race", "uninitialised"),
        "shared",
    ),
    Planted(
        "ragged rows stored",
        "sm80",
        "if (row < rows) store_global",
        "store_global",
        ("out of bounds",),
        "out of bounds|write of 16",
    ),
    Planted("ragged rows read", "sm80", "row < rows ? 16 : 0", "16", ("out of bounds",), "read of 16"),
    Planted(
        "shared memory overrun",
        "sm80",
        "smem.row_sum[row] = sum",
        "(&smem.out[63][67])[row] = sum",
        ("out of bounds", "race", "undefined"),
        "",
    ),
    Planted(
        "misaligned vector",
        "sm80",
        "load_shared<4>(&smem.out[row][column])",
        "load_shared<4>(&smem.out[row][column ^ 1])",
        ("misaligned",),
        "16-byte",
    ),
    Planted(
        "misaligned ldmatrix",
        "sm80",
        "[8 * (lane / 16)]));",
        "[4 * (lane / 16)]));",
        ("misaligned", "uninitialised"),
        "ldmatrix|never written",
    ),
    Planted("misaligned cp.async", "sm80", "&tile[row][8 * half]", "&tile[row][4 * half]", ("misaligned",), "cp.async"),
    Planted(
        "collective in a divergent branch",
        "sm80",
        "sum += shuffle_xor(sum, 2);",
        "if (lane < 16) sum += shuffle_xor(sum, 2);",
        ("divergence", "deadlock"),
        "shfl",
    ),
    Planted(
        "barrier in a divergent branch",
        "sm80",
        "sync_warp();  // the warp's 16",
        "if (warp == 0) sync_block(); //",
        ("deadlock", "race", "uninitialised"),
        "",
    ),
    Planted(
        "a warp leaves before the barrier",
        "sm80",
        "const int s = turn % 2;",
        "const int s = turn % 2; if (turn == 2 && warp == 3) return;",
        ("unfinished", "deadlock"),
        "exit",
    ),
    Planted(
        "write to an input",
        "sm80",
        "row_sums[block_index() * 64 + 16 * warp + lane] =",
        "const_cast<unsigned short*>(b)[lane] = row_sums[lane] =",
        ("race between blocks", "race", "write to an input", "uninitialised"),
        "",
    ),
    Planted(
        "padding read as data",
        "sm80",
        "for (int j = 0; j < 8; j += 2) {",
        "for (int j = 0; j < 10; j += 2) {",
        ("race", "out of bounds", "uninitialised", "early use"),
        "",
    ),
    # ---- sm90: TMA, mbarriers, wgmma, proxies
    Planted(
        "no mbarrier fence", "sm90", "fence_mbarrier_init();", "", ("missing mbarrier fence",), "mbarrier at shared"
    ),
    Planted(
        "mbarriers used before they are there",
        "sm90",
        "sync_block();  // the mbarriers are there",
        "//",
        ("race", "mbarrier", "missing mbarrier fence"),
        "mbarrier",
    ),
    Planted(
        "wrong parity for full",
        "sm90",
        "turn / 2 % 2);  // b and c",
        "turn / 2 % 2 ^ 1);  // b and c",
        ("early use", "uninitialised", "deadlock", "early overwrite", "race"),
        "",
    ),
    Planted(
        "wrong parity for empty", "sm90", "turn / 2 % 2 ^ 1);", "turn / 2 % 2);", ("deadlock",), "mbarrier at shared"
    ),
    Planted(
        "wrong byte count",
        "sm90",
        "mbarrier_arrive_expect_tx(full_a, 2 * TILE);",
        "mbarrier_arrive_expect_tx(full_a, 2 * TILE + 16);",
        ("deadlock",),
        "16 bytes are missing",
    ),
    Planted(
        "refill without waiting",
        "sm90",
        "mbarrier_wait(empty + 8 * s, turn / 2 % 2 ^ 1);",
        "",
        ("early overwrite", "early use", "mbarrier", "deadlock"),
        "",
    ),
    Planted(
        "early release",
        "sm90",
        "wgmma_wait<0>();  // out is there, and the stage is read",
        "if (lane == 0) mbarrier_arrive(empty + 8 * s); wgmma_wait<0>(); //",
        ("early overwrite", "early use", "mbarrier", "deadlock"),
        "",
    ),
    Planted(
        "one release for two warpgroups too few",
        "sm90",
        "mbarrier_init(empty + 8 * s, 8);",
        "mbarrier_init(empty + 8 * s, 2);",
        ("early overwrite", "early use", "mbarrier", "deadlock"),
        "",
    ),
    Planted(
        "scores read before their wait",
        "sm90",
        "wgmma_wait<0>();  // scores are there",
        "//",
        ("wgmma registers",),
        "accumulator",
    ),
    Planted(
        "out read before its wait",
        "sm90",
        "wgmma_wait<0>();  // out is there, and the stage is read",
        "//",
        ("wgmma registers", "early overwrite", "unfinished"),
        "",
    ),
    Planted(
        "no fence before the product reads p",
        "sm90",
        "wgmma_fence();  // p and out",
        "//",
        ("missing wgmma fence",),
        "written after the last wgmma.fence",
    ),
    Planted(
        "no proxy fence before the store",
        "sm90",
        "fence_proxy_async_shared();    // the store",
        "//",
        ("missing proxy fence",),
        "asynchronous read",
    ),
    Planted(
        "store before the rows are written",
        "sm90",
        "barrier_sync(1 + group, 128);  // the warpgroup's rows",
        "//",
        ("race", "uninitialised", "missing proxy fence"),
        "shared",
    ),
    Planted(
        "wrong count at a named barrier",
        "sm90",
        "barrier_sync(1 + group, 128);  // the warpgroup's rows",
        "barrier_sync(1 + group, 256); //",
        ("deadlock",),
        "128 of 256",
    ),
    Planted(
        "arrivals that nobody waits for",
        "sm90",
        "barrier_sync(1 + group, 128);  // the warpgroup's rows",
        "barrier_sync(1 + group, 128); barrier_arrive(3, 288); //",
        ("unfinished",),
        "256 of 288 arrivals at barrier 3",
    ),
    Planted(
        "one barrier for both groups",
        "sm90",
        "barrier_sync(1 + group, 128);  // the warpgroup's rows",
        "barrier_sync(1, group ? 128 : 64); //",
        ("barrier", "race", "uninitialised", "deadlock", "missing proxy fence"),
        "",
    ),
    Planted(
        "shared memory left before it is read", "sm90", "bulk_wait_read<0>();", "", ("unfinished",), "may still read"
    ),
    Planted("store not committed", "sm90", "bulk_commit();", "", ("unfinished",), "did not commit"),
    Planted(
        "wrong stride in a descriptor",
        "sm90",
        "descriptor_base(Swizzle::BYTES_128, 8192, 1024)",
        "descriptor_base(Swizzle::BYTES_128, 8192, 4096)",
        ("values", "early use", "uninitialised", "out of bounds", "race", "missing proxy fence"),
        "",
    ),
    Planted(
        "a chunk of the swizzle forgotten",
        "sm90",
        "(column % 32 / 4) ^ (row % 8)",
        "(column % 32 / 4) ^ (row % 4)",
        ("values",),
        "",
    ),
    Planted(
        "wrong row of a", "sm90", "128 * block_index() + 64 * g);", "64 * block_index() + 64 * g);", ("values",), ""
    ),
    Planted(
        "tile not aligned",
        "sm90",
        "shared_address(smem.b[s]), map_b",
        "shared_address(smem.b[s]) + 128, map_b",
        ("misaligned",),
        "aligned",
    ),
    Planted(
        "arrivals beyond the count",
        "sm90",
        "if (lane == 0) mbarrier_arrive(empty + 8 * s);  // this warp",
        "mbarrier_arrive(empty + 8 * s); //",
        ("mbarrier", "early overwrite", "early use", "deadlock"),
        "",
    ),
    # ---- ordered: flags between blocks, atomics, bulk reductions
    Planted(
        "flag without release",
        "ordered",
        "store_release(&state[1], ticket + 1);",
        "atomicExch(&state[1], ticket + 1);",
        ("race between blocks",),
        "sum",
    ),
    Planted(
        "no wait for the turn",
        "ordered",
        "while (load_acquire(&state[1]) != ticket) {}",
        "",
        ("race between blocks",),
        "",
    ),
    Planted(
        "flag before the sum is written",
        "ordered",
        "bulk_wait<0>();  // sum is written",
        "bulk_wait_read<0>();",
        ("race between blocks",),
        "",
    ),
    Planted(
        "no global proxy fence",
        "ordered",
        "fence_proxy_async_shared();  // the reduction",
        "//",
        ("missing proxy fence",),
        "asynchronous read",
    ),
    Planted(
        "waiting for a block that can't run", "ordered", "!= ticket) {", "!= ticket + 1) {", ("deadlock",), "flag at"
    ),
    Planted(
        "plain addition between blocks",
        "ordered",
        "const int ticket = smem.ticket;",
        "const int ticket = smem.ticket; log[0] += 1;",
        ("race between blocks", "race", "uninitialised"),
        "",
    ),
    Planted(
        "part read before it is written",
        "ordered",
        "sync_block();                // all of part",
        "//",
        ("race", "uninitialised", "missing proxy fence"),
        "shared",
    ),
    Planted(
        "ticket read before it is there",
        "ordered",
        "sync_block();  // the ticket",
        "//",
        ("race", "uninitialised"),
        "shared",
    ),
    Planted(
        "division by zero",
        "ordered",
        "const int ticket = smem.ticket;",
        "const int ticket = smem.ticket / (1 - static_cast<int>(blockDim.x) / 64);",
        ("undefined",),
        "division",
    ),
)

_CAUSAL = Problem("float32", 16, 70, 70, (("causal", True),))
_GROUPED = Problem("float32", 16, 33, 40, heads=2, heads_k=1)
_BROADCAST = Problem("float32", 7, 33, 40, batch=(2, 1))
_NARROW = Problem("float32", 7, 33, 40)
_UNALIGNED = Problem("float32", 16, 33, 40, unaligned=True)
# Query 113 = 7 * 16 + 1 is the first one that sees key 127, the last of its block.
_AMPERE = AMPERE_FORWARD[0]
_AMPERE_PACKED = replace(_AMPERE, seqlen_q=20, seqlen_k=40, heads=6)
_AMPERE_GROUPED = replace(_AMPERE, heads_k=1)
_AMPERE_UNALIGNED = replace(_AMPERE, unaligned=True)
_DIAGONAL = hopper_backward(16, 16, ("causal", True), ("q_offset", 14), seqlens=(130, 140))
_WITHOUT_KEYS = hopper_backward(16, 16, ("causal", True), seqlens=(40, 20))
_ARRIVAL = hopper_backward(16, 16, ("deterministic", False))

# In the library's own kernels.
LIBRARY = (
    Planted(
        "rows beyond the end read by vectors", "fwd_simt",
        r"(source \+ ahead, )row < rows_left\)", r"\1true)", ("out of bounds",), "read of 16",
    ),
    Planted(
        "columns beyond the head read", "fwd_simt",
        "row < rows_left && col < cols_left", "row < rows_left", ("out of bounds",), "read of 4", _NARROW,
    ),
    Planted(
        "columns beyond the head stored", "fwd_simt",
        r"if \(col \+ e < col_end\) store_global", "store_global", ("out of bounds", "race"), "write of", _NARROW,
    ),
    Planted(
        "rows beyond the end stored", "fwd_simt",
        r"row < rows_to_write\(params, entry\) - row0\)", "row < BLOCK_M)", ("out of bounds",), "lse",
    ),
    Planted("diagonal off by one", "fwd_simt", "j - i <= q_offset", "j - i < q_offset", ("values",), "", _CAUSAL),
    Planted(
        "another head's keys", "fwd_simt",
        r"(\w+\.head) / \(params\.num_heads / params\.num_heads_k\)", r"\1", ("out of bounds",), "", _GROUPED,
    ),
    Planted(
        "vectors from unaligned memory", "fwd_simt",
        r"is_aligned\(\S*data, 16\)", "true", ("misaligned",), "16", _UNALIGNED,
    ),
    Planted(
        "rows too close in shared memory", "fwd_simt",
        r"at\[ROWS\]\[COLS \+ WIDTH\];", "at[ROWS][COLS + WIDTH - 1];", ("misaligned",), "16",
    ),
    Planted(
        "more shared memory than planned", "fwd_simt",
        r"struct Smem \{", "struct Smem { Accumulator more[64];", ("out of bounds",), "bytes of shared memory",
    ),
    Planted(
        "maximum of fewer lanes", "fwd_simt",
        r"(x = math::max\(x, shuffle_xor\(x, 4\)\);)", r"if (thread_index() % 8 < 4) \1",
        ("divergence", "deadlock"), "shfl|lane",
    ),
    Planted("scores not cleared", "fwd_simt", r"clear\(acc_s\);", "", ("values",), ""),
    Planted("slots not exchanged", "fwd_simt", r"slot \^= 1;", "", ("race", "early use", "early overwrite"), "shared"),
    Planted("every lane stores delta", "bwd_delta", r" \|\| thread_x\(\) != 0\)", ")", ("race",), "delta"),
    Planted(
        "delta before it is there", "bwd_delta",
        r"store_number\(delta, (\w+),", r"if (\1 % 2) store_number(delta, \1,", ("uninitialised",), "delta",
    ),
    Planted(
        "shuffle inside a branch", "bwd_delta",
        r"const (Accumulator whole) = (row_sum_of\(.*?\);)", r"\1 = 0; if (thread_y() % 4 < 2) whole = \2",
        ("divergence", "deadlock"), "lane",
    ),
    Planted(
        "one partial too many", "bwd_finish",
        r"i3 < count\[3\]", "i3 <= count[3]", ("out of bounds",), "partial", _BROADCAST,
    ),
    Planted(
        "gradient stored in its input", "bwd_simt_dq",
        r"rows_of<Gradient>\(params\.dq", "rows_of<Gradient>(params.q", ("write to an input",), r"q\+",
    ),
    Planted(
        "delta of another row", "bwd_simt_dkdv",
        r"delta\[(\w+\.col\(c\))\]", r"delta[\1 ^ 1]", ("values",),
    ),
    # ---- fwd_sm80
    Planted(
        "wait for one group too few", "fwd_sm80",
        r"cp_async_wait<NUM_STAGES - 2>", "cp_async_wait<NUM_STAGES - 1>", ("early use", "uninitialised"), "shared",
        AMPERE_FORWARD[0],
    ),
    Planted(
        "a slot refilled while it is read", "fwd_sm80",
        r"slot == 0 \? NUM_STAGES - 1 : slot - 1", "slot", ("race", "early use", "early overwrite"), "shared",
        AMPERE_FORWARD[0],
    ),
    Planted(
        "values sent for where another block's are due", "fwd_sm80",
        r"PAIR = OVERLAP \? 3 : 1", "PAIR = 1", ("uninitialised", "values", "early use"), "", AMPERE_FORWARD[1],
    ),
    Planted(
        "no swizzle where tiles are written", "fwd_sm80",
        r"first_chunk \^ Tile::turn\(first_row\)", "first_chunk", ("values",), "", AMPERE_FORWARD[0],
    ),
    Planted(
        "rows beyond the end read by cp.async", "fwd_sm80",
        r"inside \? bytes : 0", "bytes", ("out of bounds",), "read of 16", AMPERE_FORWARD[2],
    ),
    Planted(
        "columns beyond the head read by cp.async", "fwd_sm80",
        r"(int bytes = )bytes_inside\(8 \* .*?\);", r"\g<1>16;", ("out of bounds",), "read of 16", AMPERE_FORWARD[0],
    ),
    Planted(
        "four bytes from where two are aligned", "fwd_sm80",
        r"low % 4 == 0 \? 4 : 2", "4", ("misaligned",), "cp.async", _AMPERE_UNALIGNED,
    ),
    Planted(
        "operand not transposed", "fwd_sm80",
        r"ldmatrix_x4_trans\(r, address\)", "ldmatrix_x4(r, address)", ("values",), "", AMPERE_FORWARD[0],
    ),
    Planted(
        "outputs not shrunk", "fwd_sm80",
        r"if \(!warp_any\(softmax\[f\]\.rose\(\)\)\) continue;", "continue;", ("values",), "", AMPERE_FORWARD[1],
    ),
    Planted(
        "packed rows taken for queries", "fwd_sm80",
        r"mask\.row\(tile\.query\((.*?)\), origin\)", r"mask.row(\1, origin)", ("values",), "", _AMPERE_PACKED,
    ),
    Planted(
        "rows of another head stored", "fwd_sm80",
        r"head \+ row % heads", "head + row / heads % heads", ("values", "race between blocks", "race"), "",
        _AMPERE_PACKED,
    ),
    Planted(
        "keys of another head by cp.async", "fwd_sm80",
        r"work\.head / group;", "work.head;", ("out of bounds",), "", _AMPERE_GROUPED,
    ),
    Planted(
        "numbers beyond the end stored", "fwd_sm80",
        r" && query < rows_to_write\(params, tile\.seq\)\)", ")", ("out of bounds",), "lse", AMPERE_FORWARD[2],
    ),
    # ---- fwd_wide, bwd_wide
    Planted(
        "wait for one group too few", "fwd_wide",
        r"cp_async_wait<PAIRED \? AHEAD - 2 : AHEAD - 1>", "cp_async_wait<AHEAD>", ("early use", "uninitialised"),
        "shared", DOUBLE_FORWARD[0],
    ),
    Planted(
        "a slot refilled while it is read", "fwd_wide",
        r"slot \+ NUM_STAGES - tiles : slot - tiles", "slot : slot", ("race", "early use", "early overwrite"), "shared",
        DOUBLE_FORWARD[1],
    ),
    Planted(
        "columns beyond the head read by cp.async", "fwd_wide",
        r"left <= 0 \? 0 : left < 16 \? left : 16", "16", ("out of bounds",), "read of 16", DOUBLE_FORWARD[2],
    ),
    Planted(
        "P taken before it is handed over", "bwd_wide",
        r"barrier_sync\(HANDED_OVER \+ group, 64\)", "barrier_arrive(HANDED_OVER + group, 64)",
        ("race", "uninitialised", "divergence", "deadlock"), "", DOUBLE_BACKWARD[0],
    ),
    Planted(
        "one key block too few waited for", "bwd_wide",
        r"while \(load_acquire\(semaphore\) < below\)", "while (load_acquire(semaphore) < below - 1)",
        ("race between blocks", "uninitialised"), "", DOUBLE_BACKWARD[1], (5, 7, 10),
    ),
    # ---- bwd_sm80
    Planted(
        "the next turn's queries not waited for", "bwd_sm80",
        r"cp_async_wait<0>", "cp_async_wait<1>", ("early use", "uninitialised"), "shared", AMPERE_BACKWARD[0],
    ),
    Planted(
        "P taken before it is handed over", "bwd_sm80",
        r"barrier_sync\((HANDED_OVER .*, 64\);)", r"barrier_arrive(\1",
        ("race", "uninitialised", "divergence", "deadlock"), "", AMPERE_BACKWARD[0],
    ),
    Planted(
        "the block above told before all have added", "bwd_sm80",
        r"barrier_sync\(NEXT_TURN, NUM_THREADS\);  // all have added", "barrier_arrive(NEXT_TURN, NUM_THREADS);  //",
        ("race between blocks", "values"), "", AMPERE_BACKWARD[1],
    ),
    Planted(
        "one key block too few waited for", "bwd_sm80",
        r"< below\)", "< below - 1)",
        ("race between blocks", "uninitialised"), "", AMPERE_BACKWARD[1], (5, 7, 10),
    ),
    Planted(
        "dK of another warp's keys", "bwd_sm80",
        r"% GROUPS \* FRAGMENTS \+ fragment\)", "% GROUPS * FRAGMENTS + (fragment ^ 1))",
        ("values", "out of bounds", "race", "uninitialised"), "", AMPERE_BACKWARD[0],
    ),
    Planted(
        "a last part that is not added", "bwd_sm80",
        r"if \(!first\) add_unit_parts", "if (false) add_unit_parts", ("values",), "", AMPERE_BACKWARD[0],
    ),
    Planted(
        "the largest dS written where that of the part before is read", "bwd_sm80",
        r"largest\[part % 2\]", "largest[0]", ("race",), "shared", AMPERE_BACKWARD[-1],
    ),
    Planted(
        "dK keeps the power of 2 that dS had before", "bwd_sm80",
        r"if \(exponent != before\) multiply_all", "if (false) multiply_all", ("values",), "", AMPERE_BACKWARD[-1],
    ),
    Planted(
        "dQ keeps its power of 2", "bwd_sm80",
        r"restoring\[part\] = power_of_2\(-exponent\)", "restoring[part] = 1", ("values",), "", AMPERE_BACKWARD[-1],
    ),
    # ---- fwd_sm90
    Planted(
        "a reader of a ring not counted", "fwd_sm90",
        r"(&empty\[i\]\), reading_warps)\)", r"\1 - 1)",
        ("early overwrite", "mbarrier", "deadlock", "early use"), "", HOPPER_FORWARD[0],
    ),
    Planted(
        "more bytes announced than come", "fwd_sm90",
        r"ring\.refill\(turn, sizeof tiles\[0\]\)", "ring.refill(turn, sizeof tiles[0] + 16)",
        ("deadlock",), "16 bytes are missing", HOPPER_FORWARD[0],
    ),
    Planted(
        "keys released before the products have read them", "fwd_sm90",
        r"(?s)(const auto await_scores = .*?\{)(.*?)(\n +smem\.k_ring\.release\(turn\);)", r"\1\3\2",
        ("early overwrite",), "asynchronous write of shared", HOPPER_FORWARD[0],
    ),
    Planted(
        "the sender's parity", "fwd_sm90",
        r"(&empty\[turn\.slot\]\), turn\.parity) \^ 1", r"\1", ("deadlock",), "mbarrier", HOPPER_FORWARD[0],
    ),
    Planted(
        "parities of keys never change", "fwd_sm90",
        r"parity \^= 1;", "if (SLOTS != NUM_STAGES) parity ^= 1;",
        ("early use", "early overwrite", "uninitialised", "mbarrier", "deadlock"), "shared", HOPPER_FORWARD[1],
    ),
    Planted(
        "a turn not passed on", "fwd_sm90",
        r"(accumulate_pv\(v_turn\);\s*)pass_turn\(consumer\);", r"\1", ("deadlock",), "of 256", HOPPER_FORWARD[0],
    ),
    Planted(
        "keys of another head by TMA", "fwd_sm90",
        r"work\.head / group\)", "work.head)", ("values",), "", HOPPER_FORWARD[2],
    ),
    Planted(
        "rows beyond the end stored from fragments", "fwd_sm90",
        r"if \(row < row_end\) store_columns", "store_columns", ("out of bounds",), "write of", HOPPER_FORWARD[2],
    ),
    Planted(
        "rows before the first one stored", "fwd_sm90",
        r"return row0 < 0 \? row0 : mask\.seqlen_q;", "return mask.seqlen_q;", ("out of bounds",), "write of",
        HOPPER_FORWARD[1],
    ),
    # ---- fwd_parts_sm90
    Planted(
        "keys beyond the end read", "fwd_parts_sm90",
        r" && row \+ i \* ROW_STEP < row_end - row0", "", ("out of bounds",), "read of", PARTS_FORWARD[0],
    ),
    Planted(
        "sums of blocks not shrunk", "fwd_parts_sm90",
        r"math::fma\(acc_o\[0\]\(r, c\), softmax\.shrink\[r\], (.*?)\);", r"acc_o[0](r, c) + \1;",
        ("values",), "", PARTS_FORWARD[0],
    ),
    Planted(
        "parts handed over by one warp too few", "fwd_parts_sm90",
        r"smem\.ring\.init\(8, 4\)", "smem.ring.init(8, 3)",
        ("race", "early use", "uninitialised", "mbarrier", "deadlock"), "", PARTS_FORWARD[0],
    ),
    Planted(
        "the third part left out", "fwd_parts_sm90",
        r"constexpr int PRODUCTS = 6;", "constexpr int PRODUCTS = 5;", ("values",), "", PARTS_FORWARD[0],
    ),
    # ---- bwd_sm90, and what bwd_delta prepares for it
    Planted(
        "semaphore: one block too few", "bwd_sm90",
        r"while \(load_acquire\((.*?)\) < (.*?)\) \{", r"while (load_acquire(\1) < \2 - 1) {",
        ("race between blocks", "uninitialised"), "dq_sums", HOPPER_NARROW[0], SEVERAL_BLOCKS,
    ),
    Planted(
        "semaphore told before the sums are added", "bwd_sm90",
        r"(mbarrier_wait\(shared_address\(&smem\.order\.added.*?;)(\s*)(add_release\(.*?;)", r"\3\2\1",
        ("race between blocks", "uninitialised"), "dq_sums", HOPPER_NARROW[0], SEVERAL_BLOCKS,
    ),
    Planted(
        "a reader of jobs not counted", "bwd_sm90",
        r"CONSUMER_WARPS \+ \(ORDERED \? 3 : 1\)", "CONSUMER_WARPS + (ORDERED ? 2 : 0)",
        ("race", "mbarrier", "deadlock"), "", HOPPER_NARROW[1],
    ),
    Planted(
        "proxy fence of one lane", "bwd_sm90",
        r"fence_proxy_async_shared\(\);", "if (lane_index() == 0) fence_proxy_async_shared();",
        ("missing proxy fence",), "asynchronous read of shared", HOPPER_NARROW[0],
    ),
    Planted(
        "one buffer of dS for all turns", "bwd_sm90",
        r"scores\.ds\[turn\.slot\]", "scores.ds[0]", ("race", "early overwrite"), "shared", HOPPER_NARROW[0],
    ),
    Planted(
        "swizzle of dS", "bwd_sm90",
        r"eighth \^ row % 8", "eighth ^ row % 4", ("values", "uninitialised"), "", HOPPER_NARROW[0],
    ),
    Planted(
        "diagonal off by one", "bwd_sm90", r"first_query\(last\)", "first_query(last - 1)", ("values",), "", _DIAGONAL,
    ),
    Planted(
        "the tile that the diagonal cuts left out", "bwd_sm90",
        r"seen / BLOCK_M :", "ceil_div(seen, BLOCK_M) :", ("deadlock", "values"), "", _DIAGONAL,
    ),
    Planted(
        "tickets never cleared", "bwd_delta",
        r"clear_tickets\(params\);", ";", ("uninitialised",), "tickets", HOPPER_NARROW[0],
    ),
    Planted(
        "dq without keys not written", "bwd_delta",
        r"if \(blocks\.begin < blocks\.end\) return;", "return;", ("values",), "", _WITHOUT_KEYS,
    ),
    Planted(
        "exponents not padded", "bwd_delta",
        r"store_number\(exponents, m, math::infinity<Accumulator>\(\)\);", "", ("uninitialised",), "exponents",
        HOPPER_NARROW[0],
    ),
    Planted(
        "the last sums not cleared", "bwd_delta",
        r"i < params\.dq_sums\.row_stride", "i + 4 < params.dq_sums.row_stride", ("uninitialised",), "dq_sums",
        _ARRIVAL,
    ),
    Planted(
        "parts of dq that overlap", "bwd_dq_sm90",
        r"DQ_SECOND = (.*?);", "DQ_SECOND = 0;", ("values",), "", _ARRIVAL,
    ),
    # ---- packed sequences on sm90
    Planted(
        "tiles that do not end with their sequence", "fwd_sm90",
        r"first_row\(longest - rows\)", "first_row(0)", ("out of bounds", "values", "uninitialised"), "",
        PACKED_FORWARD,
    ),
    Planted(
        "the end of a sequence one row late", "fwd_sm90",
        r"first_row\(longest - rows\),", "first_row(longest - rows - 1),", ("out of bounds", "values"), "",
        PACKED_FORWARD,
    ),
    Planted(
        "rows of the next sequence written", "bwd_sm90",
        r"return LENS && !PACKED \? params\.seqlen_k : seq\.seqlen_k;", "return params.seqlen_k;",
        ("out of bounds", "race between blocks", "values"), "", PACKED_BACKWARD, SEVERAL_BLOCKS,
    ),
    Planted(
        "the second 32 sequences skipped", "fwd_sm90", r"first \+= 32", "first += 64", ("values",), "", PACKED_FORWARD,
    ),
    Planted(
        "a sequence found that is too short", "bwd_sm90",
        r"blocks > rank \? blocks : 0x7fffffff", "blocks > rank ? 9 : 9",
        ("values", "deadlock", "out of bounds", "race between blocks", "undefined"), "", PACKED_BACKWARD,
    ),
    # ---- decoding
    Planted(
        "heads of another group", "decode_simt", r"head = head_k \* heads;", "head = head_k;",
        ("values", "race between blocks", "uninitialised"), "", DECODE_SIMT[0],
    ),
    Planted(
        "a row of the next page", "decode_simt", r"\(j - place \* page_size\)", "(j - place * page_size + 1)",
        ("values", "out of bounds"), "", DECODE_SIMT[0],
    ),
    Planted(
        "a page as the table has it", "decode_simt", r"clamped_index\((load_global<1>\(pages [^,]*), num_pages\)",
        r"\1", ("out of bounds",), "", DecodeProblem("simt", "float32", wild=True),
    ),
    Planted(
        "a length as it came", "decode_append", r"n < 0 \? 0 : smaller\(n, most\)", "n",
        ("out of bounds",), "", DecodeProblem("simt", "float32", page_size=0, wild=True),
    ),
    Planted(
        "splits that overlap", "decode_simt", r"begin \+ split \* length", "begin + split * (length - 1)",
        ("values",), "", DECODE_SIMT[0],
    ),
    Planted(
        "a sink in every split", "decode_simt", r"SINKS && split == 0", "SINKS", ("values",), "",
        DecodeProblem("simt", "float32", options=(("sinks", (1.0, 2.0, 0.5, 0.0, 3.0, -1.0)),)),
    ),
    Planted(
        "a warp left out of the sum", "decode_simt", r"for \(int warp = 0; warp < NUM_WARPS; \+\+warp\) \{\n\s*if",
        "for (int warp = 1; warp < NUM_WARPS; ++warp) {\n if", ("values",), "", DECODE_SIMT[0],
    ),
    Planted(
        "keys beyond the last one", "decode_sm80", r"send\(slots\[slot\]\.k, keys_end - n_block \* BLOCK_N\)",
        "send(slots[slot].k, BLOCK_N)", ("out of bounds", "values", "uninitialised"), "", DECODE_SM80[0],
    ),
    Planted(
        "rows of a block looked up too late", "decode_sm80", r"cp_async_commit\(\);\n\s*look\(n_block \+ NUM_WARPS\);",
        "cp_async_commit();", ("values",), "", DECODE_SM80[0],
    ),
    Planted(
        "the slot at hand refilled", "decode_sm80", r"slot == 0 \? AHEAD : slot - 1", "slot",
        ("early use", "race", "early overwrite"), "", DECODE_SM80[0],
    ),
    Planted(
        "a block too early", "decode_sm80", r"cp_async_wait<AHEAD>\(\);\n\s*sync_warp",
        "cp_async_wait<AHEAD + 1>();\n sync_warp", ("early use",), "cp.async", DECODE_SM80[0],
    ),
    Planted(
        "P across lanes without a barrier", "decode_simt", r"sync_warp\(\);  // P is written", "",
        ("race", "uninitialised"), "shared", DECODE_SIMT[0],
    ),
    Planted(
        "new rows one too far", "decode_append", r"to = cache\.at\(position\)", "to = cache.at(position + 1)",
        ("values", "out of bounds", "race between blocks", "race"), "", DECODE_SIMT[0],
    ),
    Planted(
        "turned the other way", "decode_append", r"x \* c - y \* s", "x * c + y * s", ("values",), "", DECODE_SIMT[0],
    ),
    Planted(
        "a split forgotten", "combine", r"n = own; n < params\.count; n", "n = own + 1; n < params.count; n",
        ("values",), "", DECODE_SIMT[0],
    ),
)  # fmt: skip

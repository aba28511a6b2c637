"""The CPU path: blocked online softmax on NumPy and BLAS, forward and backward.

One tile is block_m query rows against block_n keys. Its logits live transposed, keys down and queries across,
so that maxima and sums over keys run along memory rows (three times as fast in NumPy as sums within rows):

    forward, a tile of rows, for each block of keys      backward, the same loop
      p^T      = exp([k 1] [q -row_max]^T)                 p^T  = exp([k 1] [q -lse]^T)
      row_sum += sum over keys of p^T                      dv  += p^T dout
      acc_o   += (p^T)^T v                                 ds^T = p^T * ([v 1] [dout -delta]^T)
                                                           dk  += ds^T q,  dq += (ds^T)^T k

What a row subtracts rides along as one more column of the product, so it costs no pass over the tile. exp is exp2
where NumPy has it vectorised, and scale * log2(e) is folded into q when its block is packed. q, k, v, dout are
packed block by block into contiguous arrays of the accumulator, so the bits of a result do not depend on the
strides of its inputs; neither do they on batch or heads, as every cell (batch entry and head) is computed alone.

Laws of the forward. row_max is the largest of some logits that the row sees: of the first PROBE keys where all rows
see those, of the first block with a visible key elsewhere. It is raised, and the row's sums are rescaled, only when
a block's sum exceeds LIMIT: p may grow as large as LIMIT, which costs no accuracy and saves the search for maxima.
Until a row has seen a key, its row_max and its sums are 0; after that its row_sum is about 1 or more, because p is
exp(0) where the maximum was found. Hidden logits are discarded by selection.

Laws of the backward. dk and dv of one kv head are summed in float32 (float64) in one order: batch entries and heads
in C order, query tiles within them, whatever the number of workers. Tiles run at the same time, but a tile adds to
a range of keys only after every tile before it in that order is through with it. dbias is summed in the same order,
where it is a sum; dsinks has a term for each row, and these are added up at the end. dscore_args has sums of each tile,
which are added up in that order of tiles.

Laws of the options. `_cpu_logits` alone knows what makes a logit and who sees whom; it is asked before a block's
product, so that what no row sees costs none, and after it. Where something is done to the products, they can't carry
-row_max or -lse, which are added afterwards, and each block's maxima are looked for. Sinks join when a tile is
stored; dropout takes weights away after they are summed. Only blocks know options; the paths that take whole cells
at once are for plain problems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import lru_cache
from typing import Any

import numpy as np

from ._cpu_backward import BackwardCall, BackwardWorker
from ._cpu_blocks import Array, Cells, chunks, is_packed
from ._cpu_decode import Paged
from ._cpu_forward import ForwardCall, ForwardWorker, OneBlockForward, Small
from ._cpu_logits import Logits
from ._cpu_packed import clear_rest, sequences, unpack
from ._cpu_score import ScoreGradients
from ._options import PLAIN, Options
from ._problem import Problem
from ._score_args import argument_place
from ._workers import check_variable, run

__all__ = ["Small", "backward", "forward", "tile"]

CHUNK = 2**15  # numbers that the one-block path makes at a time in one thread: 128 KiB of float32
FEW = 2**17  # the same in each of several threads, who take turns with the interpreter; fewer logits take no threads
# OpenBLAS computes a product of at most this volume (a matrix-vector product of this size) in one thread anyway.
SINGLE_THREAD_GEMM = 2**18
SINGLE_THREAD_GEMV = 2**13


# ---------------------------------------------------------------------------------------------------------- tiles


# (backward, causal, bytes of the accumulator): query rows, keys. The remarks are speeds relative to torch's kernel
# in CPU time of one thread, d = 64, S = 2048 (float64: 1024), on an AVX-512 Xeon that others used too.
TILES = {
    (False, False, 4): (832, 256),  # 0.87; 1040 x 256 0.86, 512 x 512 0.86, 688 x 352 0.85, 464 x 512 0.85
    (False, True, 4): (1040, 256),  # 0.85; 512 x 256 0.85, 1040 x 320 0.84, 688 x 256 0.83, 1040 x 512 0.78
    (True, False, 4): (688, 256),  # 0.81; 464 x 352 0.80, 336 x 352 0.77, 256 x 256 0.76
    (True, True, 4): (688, 256),  # 0.85; 464 x 352 0.82, 336 x 352 0.81, 256 x 256 0.80
    (False, False, 8): (688, 176),  # 0.75; 832 x 128 0.73, 464 x 256 0.72, 240 x 256 0.70
    (False, True, 8): (688, 176),  # not tried against others
    (True, False, 8): (464, 256),  # 0.74; 688 x 128 0.73, 240 x 352 0.72, 240 x 256 0.70
    (True, True, 8): (464, 256),  # not tried against others
}
FEW_ROWS = 256, 1024  # up to so many rows, so many keys: the 20 us of a block's Python need work to hide behind
SHORT_CAUSAL = 128, 256  # above the one and up to the other: halves of keys are 1.2 times as fast as one block


def tile(problem: Problem, backward: bool) -> tuple[int, int]:
    """Query rows and keys of a tile: a function of dtype, one cell's shape and options, never of batch or heads."""
    block_m, block_n = TILES[backward, problem.causal, problem.accumulator.itemsize]
    if problem.causal and SHORT_CAUSAL[0] < problem.seqlen_k <= SHORT_CAUSAL[1]:
        return block_m, SHORT_CAUSAL[0]
    return block_m, FEW_ROWS[1] if problem.seqlen_q <= FEW_ROWS[0] else block_n


# ---------------------------------------------------------------------------------------------------- entry points


def forward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    beside: dict[str, Array],
    out: Array,
    lse: Array | None,
    block_m: int,
    block_n: int,
) -> Small | None:
    """Write out, and lse unless it is None; all arrays canonical, (*leading, heads, rows, columns).

    ``beside`` holds what `_options` names, and "q_offsets" where each entry has its own.

    Returns what calls with arrays of the same layout can run again, where that is worth it.
    """
    check_variable()
    cells, size = _prepared(problem, block_m, block_n)
    if size is _Size.EMPTY:
        out[...] = 0
        if lse is not None:
            lse[...] = -np.inf
        return None
    if _has_short_sequences(problem):
        _forward_one_by_one(problem, q, k, v, beside, out, lse, block_m, block_n)
        return None
    if beside:
        cells = Cells(problem, beside)
    if "page_table" in beside:
        q, out, lse = cells.rows(q), cells.rows(out), None if lse is None else cells.row_values(lse)
        k, v = (Paged(x, beside["page_table"], cells.group) for x in (k, v))
    elif cells.group > 1:
        q, k, v, out = cells.rows(q), cells.keys(k), cells.keys(v), cells.rows(out)
        lse = None if lse is None else cells.row_values(lse)
    if problem.options.packed is not None:
        q, k, v, out, lse = _unpack_forward(problem, beside, q, k, v, out, lse)
    if size is _Size.ONE_CHUNK:
        packed = all(is_packed(x, problem.accumulator) for x in (q, k, v, out))
        compute = OneBlockForward(problem, keeps=False, packed=packed)
        with np.errstate(all="ignore"):
            compute(q, k, v, cells.q_offset, out, lse)
        if cells.group > 1 or not problem.comes_canonical or problem.q_offset is None:
            return None
        return Small(compute, problem.q_offset)
    logits = None if cells.is_plain else Logits(cells, beside)
    call = ForwardCall(cells, q, k, v, out, lse, block_m, block_n, logits)
    if size is _Size.FEW_BLOCKS:
        _run_here(ForwardWorker(call), call.tasks())
    elif size is _Size.BLOCKED:
        run(lambda: ForwardWorker(call), call.tasks())
    elif size is _Size.FEW_CHUNKS:
        worker = call.chunk_worker()
        with np.errstate(all="ignore"):
            for chunk in chunks(cells.shape, _weight(problem), CHUNK):
                worker(chunk)
    else:
        run(call.chunk_worker, list(chunks(cells.shape, _weight(problem), FEW)))
    return None


def backward(
    problem: Problem,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dlse: Array | None,
    beside: dict[str, Array],
    gradients: dict[str, Array],
    block_m: int,
    block_n: int,
) -> None:
    """Write the gradients that are given: canonical, in their inputs' own shapes, and dscore_args[n]."""
    check_variable()
    if 0 in (problem.seqlen_q, problem.batch) or (problem.seqlen_k == 0 and "dsinks" not in gradients):
        for gradient in gradients.values():
            gradient[...] = 0
        return
    if _has_short_sequences(problem):
        _backward_one_by_one(problem, dout, q, k, v, out, lse, dlse, beside, gradients, block_m, block_n)
        return
    cells = Cells(problem, beside)
    sides = {
        "dout": cells.rows, "q": cells.rows, "k": cells.keys, "v": cells.keys, "out": cells.rows,
        "lse": cells.row_values, "dlse": cells.row_values,
        "dq": cells.rows, "dk": cells.keys, "dv": cells.keys, "dbias": cells.pairs,
    }  # fmt: skip
    given = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": dlse, **gradients}
    x = {name: side(given[name]) for name, side in sides.items() if given.get(name) is not None}
    if problem.options.packed is not None:
        clear_rest({name: y for name, y in x.items() if name in gradients}, beside)
        x = unpack(problem, x, beside)
    call = BackwardCall(
        cells,
        **{name: x.get(name) for name in ("dout", "q", "k", "v", "out", "lse", "dlse")},
        gradients={name: y for name, y in x.items() if name in gradients},
        block_m=min(block_m, problem.seqlen_q),
        block_n=max(1, min(block_n, problem.seqlen_k)),
        logits=None if cells.is_plain else Logits(cells, beside),
    )
    if not cells.is_plain:
        _backward_with_options(call, gradients)
    elif problem.seqlen_q > block_m or problem.seqlen_k > block_n:
        run(lambda: BackwardWorker(call), call.tasks(), call.fail)
    elif len(parts := call.chunks()) == 1 and _is_single_threaded(problem):
        with np.errstate(all="ignore"):
            call.one_block(parts[0])
    else:
        run(lambda: call.one_block, parts)


def _has_short_sequences(problem: Problem) -> bool:
    """Whether packed sequences are plain and so short that each is one chunk: 3 to 6 times as fast as their blocks."""
    packed = problem.options.packed
    return (
        packed is not None
        and problem.options == Options(packed=packed)
        and problem.num_heads * _weight(problem) <= CHUNK
    )


def _forward_one_by_one(
    problem: Problem, q: Array, k: Array, v: Array, beside: dict[str, Array], out: Array, lse: Array | None,
    block_m: int, block_n: int,
) -> None:  # fmt: skip
    """The forward of short packed sequences, as that of each alone."""
    clear_rest({"out": out} | ({} if lse is None else {"lse": lse}), beside)
    for own, rows, keys in sequences(problem, beside):
        own_lse = None if lse is None else lse[:, rows]
        forward(own, q[:, rows], k[:, keys], v[:, keys], {}, out[:, rows], own_lse, block_m, block_n)


def _backward_one_by_one(
    problem: Problem, dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, dlse: Array | None,
    beside: dict[str, Array], gradients: dict[str, Array], block_m: int, block_n: int,
) -> None:  # fmt: skip
    """The backward of short packed sequences, as that of each alone."""
    clear_rest(gradients, beside)
    for own, rows, keys in sequences(problem, beside):
        own_dlse = None if dlse is None else dlse[:, rows]
        into = {name: x[:, rows if name == "dq" else keys] for name, x in gradients.items()}
        backward(
            own, dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, rows], own_dlse, {}, into,
            block_m, block_n,
        )  # fmt: skip


def _unpack_forward(
    problem: Problem, beside: dict[str, Array], q: Array, k: Array, v: Array, out: Array, lse: Array | None
) -> tuple[Any, ...]:
    """Arrays of packed sequences with an axis of sequences; what lies behind the last one is written here."""
    x = {"q": q, "k": k, "v": v, "out": out} | ({} if lse is None else {"lse": lse})
    clear_rest({name: y for name, y in x.items() if name in ("out", "lse")}, beside)
    x = unpack(problem, x, beside)
    return x["q"], x["k"], x["v"], x["out"], x.get("lse")


def _backward_with_options(call: BackwardCall, gradients: dict[str, Array]) -> None:
    """The same, block by block, with the gradients of bias and sinks."""
    if "dbias" in gradients:
        gradients["dbias"][...] = 0  # no tile writes pairs that no row sees
    if "dsinks" in gradients:
        call.sink_terms = np.zeros((*call.cells.shape, call.problem.seqlen_q), call.problem.accumulator)
    if any(argument_place(name) for name in gradients):
        call.score = ScoreGradients(call.problem.options, gradients)
    if _is_small(call.problem):
        _run_here(BackwardWorker(call), call.tasks())
    else:
        run(lambda: BackwardWorker(call), call.tasks(), call.fail)
    if call.sink_terms is not None:
        by_head = call.sink_terms.reshape(-1, call.problem.num_heads, call.problem.seqlen_q)
        gradients["dsinks"][...] = np.add.reduce(by_head, axis=(0, 2), dtype=np.float64)
    if call.score is not None:
        call.score.store()


class _Size(Enum):
    """How the forward goes about a problem."""

    EMPTY = auto()
    ONE_CHUNK = auto()  # one chunk holds all cells, and BLAS uses one thread for each, limited or not
    FEW_CHUNKS = auto()  # too few for threads to pay
    CHUNKS = auto()  # one block holds each cell
    BLOCKED = auto()
    FEW_BLOCKS = auto()  # the same, where threads would not pay


@lru_cache(maxsize=4096)
def _prepared(problem: Problem, block_m: int, block_n: int) -> tuple[Cells, _Size]:
    """What a forward need not find out again; the cells lack the offsets of an array."""
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    if 0 in (seqlen_q, problem.batch) or (seqlen_k == 0 and problem.options.sinks is None):
        size = _Size.EMPTY
    elif problem.options != PLAIN:
        size = _Size.FEW_BLOCKS if _is_small(problem) else _Size.BLOCKED
    elif seqlen_q > block_m or seqlen_k > block_n:
        size = _Size.BLOCKED
    else:
        weight = problem.batch * problem.num_heads * _weight(problem)
        size = _Size.ONE_CHUNK if weight <= CHUNK else _Size.FEW_CHUNKS
        if not _is_small(problem):
            size = _Size.CHUNKS
    return Cells(problem, {}), size


def _weight(problem: Problem) -> int:
    """Numbers of a cell in the larger one of the arrays that the one-block forward makes: scaled q, and logits."""
    return problem.seqlen_q * max(problem.seqlen_k, problem.head_dim)


def _is_small(problem: Problem) -> bool:
    """Whether threads cost more than they bring, and BLAS needs no limit."""
    logits = problem.batch * problem.num_heads * problem.seqlen_q * problem.seqlen_k
    return logits <= FEW and _is_single_threaded(problem)


def _run_here(worker: Callable[[Any], None], tasks: Sequence[Any]) -> None:
    """Do all tasks in this thread."""
    with np.errstate(all="ignore"):
        for task in tasks:
            worker(task)


def _is_single_threaded(problem: Problem) -> bool:
    """Whether BLAS computes each product, and the sums over keys, in one thread without being told to."""
    sizes = (problem.seqlen_q, problem.seqlen_k, problem.head_dim, problem.head_dim_v)
    logits = sizes[0] * sizes[1]
    volume = logits * max(sizes[2:])
    return logits <= SINGLE_THREAD_GEMV and volume <= (SINGLE_THREAD_GEMV if min(sizes) == 1 else SINGLE_THREAD_GEMM)

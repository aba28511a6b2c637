"""Decoding beside a copy and torch, in one run on a GPU: bfloat16, caches of 8192 to 131072 rows, width 128.

    python -m benchmarks.decode --out benchmarks/results/h200-decode.json

Contenders take turns. Each is timed on the device alone: calls are captured in a CUDA graph, which is replayed. What a
call reads is its cache once, keys and values; a copy of both reads and writes them, and says what memory can do. Small
cells take several caches in turn, so that none is found in the GPU's own cache. Beside the plain call stand pages of 16
rows, four queries in place of one, and a step of a generation: a new row, turned, and written into the cache. A table
of its own has the host time of a call that was seen before. Results are compared with float64. The exit code is 1 if
cupyflash failed in a cell. --dry-run needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import facts
from benchmarks.cells import arguments
from cupyflash import Rotary, decode
from cupyflash._program import backend as backends
from cupyflash._program.backend import Backend
from cupyflash._program.contenders import as_torch
from cupyflash._program.terminal import seconds, table
from cupyflash._program.timing import GRAPH, OURS, Samples, graph_clock, host_clock, measure
from cupyflash._program.workload import numpy_dtype

DTYPE, HEAD_DIM, PAGE = "bfloat16", 128, 16
CELLS = ((1, 32, 8, 8192), (1, 32, 8, 131072), (16, 32, 8, 8192), (128, 32, 8, 4096), (64, 32, 32, 4096))
PAGED, FOUR, STEP, COPY = f"{OURS}, pages of {PAGE}", f"{OURS}, 4 queries", f"{OURS}, a step", "copy"
TORCH = {"torch cuDNN": "CUDNN_ATTENTION", "torch flash": "FLASH_ATTENTION"}
ROUNDS, BUDGET, LEAST = 9, 150.0, 0.005
WARM_UP = 2.0
HOST_CALLS = 200
BEYOND_CACHE = 2**28  # bytes of all caches together at least: an H200 keeps 50 MB of what it has read


@dataclass
class DecodeCell(Samples):
    """A batch of entries that fill a cache, and what calls on it took."""

    batch: int = field(kw_only=True)
    heads: int = field(kw_only=True)
    heads_k: int = field(kw_only=True)
    seqlen: int = field(kw_only=True)
    host: dict[str, float] = field(default_factory=dict)  # seconds a call
    error: float | None = None  # the largest of the plain call, beside float64

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return 2 * self.batch * self.heads_k * self.seqlen * HEAD_DIM * numpy_dtype(DTYPE).itemsize

    def speed(self, name: str) -> float:
        """Bytes of the cache a second; a copy moves each twice."""
        return self.nbytes * (2 if name == COPY else 1) / self.seconds(name)

    def __str__(self) -> str:
        return f"{self.batch:>3} x {self.heads}/{self.heads_k} heads x {self.seqlen:>6} rows"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shape = {"batch": self.batch, "heads": self.heads, "heads_k": self.heads_k, "seqlen": self.seqlen}
        contenders: list[dict[str, Any]] = [
            {
                "name": name, "seconds": self.seconds(name), "quartiles": self.spread(name),
                "bytes_per_second": self.speed(name), "samples": samples,
            }
            for name, samples in self.samples.items()
        ]  # fmt: skip
        contenders += [{"name": name, "skipped": reason} for name, reason in self.skipped.items()]
        return shape | {"bytes": self.nbytes, "error": self.error, "host": self.host, "contenders": contenders}


class Call:
    """One of ours, or any call that a CUDA graph can hold."""

    def __init__(self, xp: Any, call: Callable[[], Any]) -> None:
        self.call = call
        self.clock = host_clock if xp is np else graph_clock

    def around(self) -> AbstractContextManager[Any]:
        return nullcontext()


class TorchCall:
    """torch's scaled_dot_product_attention of one query a head, by the SDPBackend of that name."""

    def __init__(self, q: Any, caches: Sequence[Arrays], backend: str) -> None:
        import torch

        self._torch, self._backend = torch, backend
        inputs = [tuple(map(as_torch, (q, x.k, x.v))) for x in caches]
        self._turns = itertools.cycle(inputs)

    def around(self) -> AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, self._backend))

    def call(self) -> Any:
        q, k, v = next(self._turns)
        gqa = q.shape[1] != k.shape[1]
        with warnings.catch_warnings(), self._torch.no_grad():
            warnings.simplefilter("ignore")  # a backend that can't run says so in warnings before it raises
            return self._torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

    def clock(self, call: Callable[[], object], repeats: int) -> float:
        """Seconds a call on the device alone: a captured graph of calls is timed, as ours is."""
        cuda = self._torch.cuda
        count = min(repeats, GRAPH)
        launches = -(-repeats // count)
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            call()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            for _ in range(count):
                call()
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(launches):
            graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / (launches * count)


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = arguments("python -m benchmarks.decode", __doc__, ROUNDS, BUDGET)
    parser.add_argument("--peers", nargs="*", choices=tuple(TORCH), default=list(TORCH))
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("--out says where the JSON goes")
    cells = [DecodeCell("call", batch=b, heads=hq, heads_k=hk, seqlen=s) for b, hq, hk, s in CELLS]
    if args.dry_run:
        peers = ", ".join((COPY, *args.peers))
        print("\n".join(f"{cell}: {cell.nbytes / 1e9:.3f} GB beside {peers}" for cell in cells))
        return 0
    backend = backends.choose("cupy")
    if backend is None:
        return 2
    return run(backend, cells, args)


def run(backend: Backend, cells: Sequence[DecodeCell], args: argparse.Namespace) -> int:
    """Measure cell by cell until the budget is spent; JSON is written after each."""
    began, done = time.monotonic(), []
    place = facts.place(backend)
    for cell in cells:
        if time.monotonic() - began > args.budget:
            print(f"NOT RUN, the budget was spent: {cell}")
            continue
        done.append(cell)
        try:
            fill(cell, backend, args)
            backend.free()
        except Exception as error:
            cell.skip(OURS, error)
        write(args.out, place, done)
        print(f"[{time.monotonic() - began:5.1f} s] {cell}", flush=True)
    print(text(backend, done))
    return int(any(cell.failed for cell in done))


def fill(cell: DecodeCell, backend: Backend, args: argparse.Namespace) -> None:
    """Measure one cell."""
    xp = backend.xp
    calls, q, caches = makers(cell, xp)
    warm(calls[OURS], xp, WARM_UP)
    found: dict[str, Callable[[], Any]] = {name: partial(Call, xp, call) for name, call in calls.items()}
    found |= {name: partial(TorchCall, q, caches, TORCH[name]) for name in args.peers}
    cell.error = error_of(cell, q, caches[0])
    measure(cell, found, host_clock, rounds=args.rounds, least=LEAST)
    for name in (OURS, STEP):
        cell.host[name] = host_time(calls[name], backend)


@dataclass
class Arrays:
    """One cache in line and in pages, the rows of a step, and what the step writes into."""

    k: Any
    v: Any
    pages: list[Any]
    grown: list[Any]


def makers(cell: DecodeCell, xp: Any) -> tuple[dict[str, Callable[[], Any]], Any, list[Arrays]]:
    """What calls ours and the copy; q; the caches, several where one would stay in the GPU's own cache.

    Each call takes the next one.
    """
    dtype, rng = numpy_dtype(DTYPE), xp.random.default_rng(20)
    bits = np.dtype(f"u{dtype.itemsize}")  # what is moved is not looked at

    def drawn(*shape: int) -> Any:
        found = xp.empty(shape, dtype)
        for x in found:  # an entry at a time: numbers are drawn as float32
            x[...] = rng.standard_normal(x.shape, dtype=xp.float32).astype(dtype)
        return found

    b, hq, hk, s = cell.batch, cell.heads, cell.heads_k, cell.seqlen
    order = np.random.default_rng(0).permutation(b * s // PAGE).astype(np.int32)
    page_table = xp.asarray(order.reshape(b, s // PAGE))

    def in_pages(x: Any) -> Any:
        pages = xp.empty((b * s // PAGE, PAGE, hk, HEAD_DIM), bits)
        for n in range(b):
            pages[page_table[n]] = x[n].view(bits).reshape(hk, s // PAGE, PAGE, HEAD_DIM).transpose(1, 2, 0, 3)
        return pages.view(dtype)

    caches = []
    for _ in range(max(1, -(-BEYOND_CACHE // cell.nbytes))):
        k, v = (drawn(b, hk, s, HEAD_DIM) for _ in range(2))
        grown = [x.view(bits).copy().view(dtype) for x in (k, v)]
        caches.append(Arrays(k, v, [in_pages(x) for x in (k, v)], grown))
    q, q4 = drawn(b, hq, 1, HEAD_DIM), drawn(b, hq, 4, HEAD_DIM)
    lens = xp.asarray(np.full(b, s, np.int32))
    before = xp.asarray(np.full(b, s - 1, np.int32))
    k_new, v_new = (drawn(b, hk, 1, HEAD_DIM) for _ in range(2))
    angles = np.arange(s)[:, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    rotary = Rotary(*(xp.asarray(f(angles).astype(np.float32)) for f in (np.cos, np.sin)))
    targets = [xp.empty(caches[0].k.shape, bits) for _ in range(2)]

    def copied(x: Arrays) -> None:
        for target, source in zip(targets, x.grown, strict=True):
            xp.copyto(target, source.view(bits))

    def stepped(x: Arrays) -> Any:
        return decode(q, x.grown[0], x.grown[1], before, k_new=k_new, v_new=v_new, rotary=rotary)

    calls: dict[str, Callable[[Arrays], Any]] = {
        OURS: lambda x: decode(q, x.k, x.v, lens),
        PAGED: lambda x: decode(q, x.pages[0], x.pages[1], lens, page_table=page_table),
        FOUR: lambda x: decode(q4, x.k, x.v, lens),
        STEP: stepped,
        COPY: copied,
    }
    return {name: in_turn(call, caches) for name, call in calls.items()}, q, caches


def in_turn(call: Callable[[Arrays], Any], caches: Sequence[Arrays]) -> Callable[[], Any]:
    """A call that takes the next cache each time."""
    turns = itertools.cycle(caches)
    return lambda: call(next(turns))


def warm(call: Callable[[], Any], xp: Any, least: float) -> None:
    """Work until clocks and temperature have settled."""
    began = time.monotonic()
    clock = host_clock if xp is np else graph_clock
    while time.monotonic() - began < least:
        clock(call, 1)


def host_time(call: Callable[[], Any], backend: Backend) -> float:
    """Seconds that the host spends on a call: the least of five times a few hundred, without waiting for the device."""
    times = []
    for _ in range(5):
        backend.synchronize()
        began = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        times.append((time.perf_counter() - began) / HOST_CALLS)
    backend.synchronize()
    return min(times)


def error_of(cell: DecodeCell, q: Any, cache: Arrays) -> float:
    """The largest error of the last entry, beside float64."""
    out = decode(q, cache.k, cache.v, cell.seqlen)
    got, q, k, v = (
        (x[-1] if isinstance(x, np.ndarray) else x[-1].get()).astype(np.float64) for x in (out, q, cache.k, cache.v)
    )
    group, worst = cell.heads // cell.heads_k, 0.0
    for head in range(cell.heads):
        s = k[head // group] @ q[head, 0] / HEAD_DIM**0.5
        p = np.exp(s - s.max())
        worst = max(worst, float(abs(got[head, 0] - p @ v[head // group] / p.sum()).max()))
    return worst


# ----------------------------------------------------------------------------------------------------- output


def write(path: Path, place: dict[str, Any], cells: Sequence[DecodeCell]) -> None:
    facts.write(path, {"program": "benchmarks/decode.py", **place, "cells": [cell.as_dict() for cell in cells]})


def text(backend: Backend, cells: Sequence[DecodeCell]) -> str:
    """Times, speeds and what they are parts of; host times; what was skipped."""
    names = dict.fromkeys(name for cell in cells for name in cell.samples)
    rows = []
    for cell in cells:
        for name in names:
            if name in cell.samples:
                ratio = f"{cell.ratio(name):.2f}" if OURS in cell.samples else "-"
                part = f"{cell.speed(name) / cell.speed(COPY):.2f}" if COPY in cell.samples else "-"
                rows.append(
                    (str(cell), name, seconds(cell.seconds(name)), f"{cell.speed(name) / 1e9:.0f}", part, ratio)
                )
    parts = [
        f"{backend.device}\ntime, GB/s, part of a copy's, and how many times ours",
        table(("cell", "", "time", "GB/s", "of copy", "x ours"), rows),
        table(("cell", "host time of", ""), [(str(c), name, seconds(t)) for c in cells for name, t in c.host.items()]),
        *(f"{cell}: the largest error is {cell.error:.1e}" for cell in cells if cell.error is not None),
        *(f"{cell}: {name} skipped, {reason}" for cell in cells for name, reason in cell.skipped.items()),
    ]
    return "\n\n".join(parts[:3]) + "\n\n" + "\n".join(parts[3:])


if __name__ == "__main__":
    sys.exit(main())

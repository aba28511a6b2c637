"""One table for the GPU: simt and float64 beside their peers in the same run, and what a call costs the host.

    python -m benchmarks.gpu --out benchmarks/results/h200.json

Every cell is one direction of one problem. Its contenders are warmed up and take turns; CUDA events time them
and the median counts. All cells hold the same number of elements, batch x seqlen = 16384 rows of 1024 columns
over all heads, so that only the length changes. The exit code is 1 if cupyflash failed in a cell; a peer that
can't run is skipped with its reason. --dry-run lists the cells and needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import facts
from benchmarks.cells import arguments, check, memory_of, result_line, too_large, warm_up
from cupyflash._program import backend as backends
from cupyflash._program import host
from cupyflash._program.backend import Backend
from cupyflash._program.contenders import contenders
from cupyflash._program.terminal import seconds, table
from cupyflash._program.timing import OURS, Cell, Clock, Samples, clock_for, measure
from cupyflash._program.workload import DIRECTIONS, DTYPE_NAMES, Workload

ROWS, COLUMNS = 16384, 1024  # batch x seqlen, and heads x head_dim, of every cell
SEQLENS = (1024, 2048, 4096, 8192, 16384)
CAUSAL_SEQLENS = (4096,)
HEAD_DIMS = (64, 128)
#: What each dtype is held against: torch's fastest for it, and attention that keeps all weights in memory.
PEERS = {
    "float32": ("torch mem-eff.", "torch math"),
    "float64": ("unfused CuPy", "torch math"),
    "float16": ("torch flash", "torch cuDNN"),
    "bfloat16": ("torch flash", "torch cuDNN"),
}
FAMILY = "simt"  # of all but what is asked of tensor cores, which goes where the planner sends it
ROUNDS = 5
LIMIT = 3.0  # seconds after which a cell begins no new round
LEAST = 0.005  # seconds of a sample; events are exact to microseconds
BUDGET = 150.0  # seconds after which no new cell begins
WARM_UP = 1.5  # seconds of work before the first cell, so that clocks have settled
HOST_DTYPE = "float32"  # of the calls whose host time is measured


@dataclass
class Run:
    """Everything that one run of this program measured."""

    backend: Backend
    precision: str | None = None  # of float32
    cells: list[Cell] = field(default_factory=list)
    not_run: list[Cell] = field(default_factory=list)
    host: Samples = field(default_factory=lambda: Samples("call"))

    @property
    def failed(self) -> bool:
        """Whether cupyflash failed anywhere."""
        return any(found.failed for found in (*self.cells, self.host))


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    args = parse(argv)
    cells = plan(args.dtypes, args.head_dims, args.seqlens)
    if args.dry_run:
        print("\n".join(map(describe, cells)))
        print(f"{len(cells)} cells")
        return 0
    backend = backends.choose("cupy")
    if backend is None:
        return 2
    print(f"{backend.device}; {len(cells)} cells")
    run = Run(backend, args.precision)
    try:
        measure_all(run, cells, clock_for(backend.xp), rounds=args.rounds, budget=args.budget)
        run.host = host.measure(host.calls(host.workload(HOST_DTYPE), backend.xp), backend)
    finally:
        write(run, args.out)
    print(text(run))
    return 1 if run.failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = arguments("python -m benchmarks.gpu", __doc__, ROUNDS, BUDGET)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPE_NAMES, default=list(PEERS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--precision", choices=("highest",), help="of float32: on tensor cores")
    parser.add_argument("--seqlens", nargs="+", type=int, default=list(SEQLENS), help=f"divisors of {ROWS}")
    args = parser.parse_args(argv)
    check(parser, args, ROWS, COLUMNS)
    return args


def plan(dtypes: Iterable[str], head_dims: Iterable[int], seqlens: Sequence[int]) -> list[Cell]:
    """Every cell; one workload's directions follow each other."""
    return [
        Cell(direction, workload=Workload(ROWS // seqlen, COLUMNS // head_dim, seqlen, head_dim, dtype, causal))
        for dtype in dtypes
        for head_dim in head_dims
        for causal in (False, True)
        for seqlen in seqlens
        if not causal or seqlen in CAUSAL_SEQLENS
        for direction in DIRECTIONS
    ]


def describe(cell: Cell) -> str:
    """A cell in one line."""
    work = cell.workload
    causal = " causal" if work.causal else ""
    return (
        f"{work.dtype:<8} d={work.head_dim:<3} {work.batch:>2} x {work.seqlen:<5} x {work.heads} heads"
        f"{causal} {cell.direction}: {work.flops(cell.direction) / 1e12:.2f} TFLOP beside "
        f"{', '.join(PEERS[work.dtype])}"
    )


# -------------------------------------------------------------------------------------------------- measuring


def measure_all(run: Run, cells: Sequence[Cell], clock: Clock, *, rounds: int, budget: float) -> None:
    """Measure cell by cell until the budget is spent, one printed line each."""
    began = time.monotonic()
    flat: dict[str, Any] = {}  # q, k, v, dout of one dtype; every cell views them in its own shape
    for cell in cells:
        work = cell.workload
        if time.monotonic() - began > budget:
            run.not_run.append(cell)
            continue
        precision = run.precision if work.dtype == "float32" else None
        family = None if work.dtype == "float64" or precision else FAMILY
        if work.dtype not in flat:
            flat = {work.dtype: work.arrays(run.backend.xp)}
            warm_up(work, flat[work.dtype], clock, family, WARM_UP)
        arrays = tuple(x.reshape(work.shape) for x in flat[work.dtype])
        makers = contenders(work, arrays, run.backend.xp, family, precision)
        cell.skipped = too_large(cell, PEERS[work.dtype], memory_of(run.backend))
        names = (OURS, *(name for name in PEERS[work.dtype] if name not in cell.skipped))
        makers = {name: makers[name] for name in names if name in makers}
        run.cells.append(cell)
        try:
            measure(cell, makers, clock, rounds=rounds, limit=LIMIT, least=LEAST)
        finally:
            del makers
            run.backend.free()
        print(f"[{time.monotonic() - began:5.1f} s] {result_line(cell, describe(cell).partition(':')[0])}")


# ----------------------------------------------------------------------------------------------------- output


def write(run: Run, path: Path) -> None:
    """Everything as JSON, also after a failure."""
    found = {
        "program": "benchmarks/gpu.py",
        **facts.place(run.backend),
        "float32_precision": run.precision,
        "cells": [cell.as_dict() for cell in run.cells],
        "not_run": [describe(cell) for cell in run.not_run],
        "host_seconds": {
            name: {"median": run.host.seconds(name), "samples": samples} for name, samples in run.host.samples.items()
        },
        "host_skipped": run.host.skipped,
        "failed": run.failed,
    }
    facts.write(path, found)


def text(run: Run) -> str:
    """The compact table: TFLOP/s of cupyflash, and the fastest peer's time as a multiple of its own."""
    lengths = sorted({cell.workload.seqlen for cell in run.cells})
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    for cell in run.cells:
        work = cell.workload
        key = (work.dtype, str(work.head_dim), "causal" if work.causal else "", cell.direction)
        rows.setdefault(key, {})[work.seqlen] = entry(cell)
    header = ("dtype", "d", "", "direction", *(f"S={n}" for n in lengths))
    speeds = table(header, [(*key, *(row.get(n, "-") for n in lengths)) for key, row in rows.items()])
    host = table(
        ("host time of a call", "median"),
        [(name, seconds(run.host.seconds(name))) for name in run.host.samples]
        + [(name, f"skipped: {why}") for name, why in run.host.skipped.items()],
    )
    parts = [f"{run.backend.device}\nTFLOP/s of cupyflash, time of its fastest peer / its time", speeds, host]
    if run.not_run:
        parts.append(f"NOT RUN, the budget was spent: {len(run.not_run)} cells, from {describe(run.not_run[0])}")
    failed = [describe(cell) for cell in run.cells if cell.failed]
    if run.failed:
        parts.append("FAILED: " + "; ".join(failed or list(run.host.skipped)))
    return "\n\n".join(parts)


def entry(cell: Cell) -> str:
    """One entry of the table."""
    if cell.failed:
        return "FAILED"
    ratios = [cell.ratio(name) for name in cell.samples if name != OURS]
    return f"{cell.speed() / 1e12:.2f} {min(ratios):.2f}x" if ratios else f"{cell.speed() / 1e12:.2f}   -  "


if __name__ == "__main__":
    sys.exit(main())

"""Time cupyflash beside what else is installed, in the same run.

Every contender is warmed up, then they take turns; the median of each one's samples counts. A ratio says how
many times cupyflash's time a peer takes. Speeds count 4 B H S^2 d operations forward, half of that for causal
attention, and 2.5 times as many backward. With --host it is the time that small calls cost their caller.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from .. import explain
from .._planner import CPU_FAMILY, GPU_FAMILIES
from . import backend as backends
from . import host
from .backend import Backend
from .contenders import contenders
from .machine import Machine, first_line
from .terminal import Progress, as_json, named, rate, seconds, table
from .timing import OURS, Cell, Samples, clock_for, measure
from .workload import DIRECTIONS, DTYPE_NAMES, Workload, numpy_dtype

ROUNDS = 5
SEQLENS = {"numpy": (512, 1024, 2048), "cupy": (1024, 2048, 4096, 8192)}
HEADS = {"numpy": 8, "cupy": 32}
LIMIT = {"numpy": 8.0, "cupy": 4.0}  # seconds after which a cell begins no new round


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.add_argument(
        "--family", choices=(CPU_FAMILY, *GPU_FAMILIES),
        help="cpu times NumPy arrays, others CuPy arrays; the best device there is if not given",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES,
        help="float32 if not given, but bfloat16 with --family sm90 or sm80 and for --host on a GPU, if no --precision "
        "is given",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("highest", "ieee"), help="of products, as attention takes it")
    parser.add_argument("--seqlen", type=positive, nargs="+", metavar="S", help="one or more sequence lengths")
    parser.add_argument("--head-dim", type=positive, default=64, metavar="D")
    parser.add_argument("--heads", type=positive, metavar="H", help="8 on NumPy, 32 on CuPy if not given")
    parser.add_argument("--batch", type=positive, default=1, metavar="B")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--direction", choices=(*DIRECTIONS, "both"), default="both")
    parser.add_argument(
        "--rounds", type=positive,
        help=f"samples of each contender, {ROUNDS} if not given, {host.BATCHES} with --host",
    )  # fmt: skip
    parser.add_argument(
        "--host", action="store_true",
        help="what a call costs its caller, who does not wait for the device, with 8 heads, 128 queries and keys, "
        "width 64; sizes and --direction do not count",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """The command."""
    backend = backends.choose({None: None, CPU_FAMILY: "numpy"}.get(args.family, "cupy"))
    if backend is None:
        return 2
    args.dtype = args.dtype or default_dtype(args, backend)
    why_not = refusal(args, backend)
    if why_not is not None:
        print(why_not, file=sys.stderr)
        return 2
    return run_host(args, backend) if args.host else run_cells(args, backend)


def default_dtype(args: argparse.Namespace, backend: Backend) -> str:
    """What --family takes; 16 bits where only the cost of a call on a GPU counts, as most calls there have them."""
    if args.precision is not None:
        return "float32"
    return "bfloat16" if args.family in ("sm90", "sm80") or (args.host and backend.name == "cupy") else "float32"


def directions(args: argparse.Namespace) -> tuple[str, ...]:
    """Those asked for."""
    return DIRECTIONS if args.host or args.direction == "both" else (args.direction,)


def refusal(args: argparse.Namespace, backend: Backend) -> str | None:
    """Why the planner does not take what was asked for, whatever the length, or None."""
    width = host.workload(args.dtype).head_dim if args.host else args.head_dim
    x = backend.xp.empty((1, 1, width), numpy_dtype(args.dtype))
    try:
        for direction in directions(args):
            explain(
                x, x, x, causal=args.causal, family=args.family, precision=args.precision,
                backward=direction == "backward",
            )  # fmt: skip
    except ValueError as error:
        return first_line(error)
    return None


def run_cells(args: argparse.Namespace, backend: Backend) -> int:
    """Time whole calls."""
    cells = [
        Cell(direction, workload=Workload(args.batch, heads, seqlen, args.head_dim, args.dtype, args.causal))
        for heads in (args.heads or HEADS[backend.name],)
        for seqlen in args.seqlen or SEQLENS[backend.name]
        for direction in directions(args)
    ]
    rounds = args.rounds or ROUNDS
    with Progress("bench", len(cells)) as progress:
        for i, cell in enumerate(cells):
            tick = partial(progress.tell, i, f"{cell.direction} {cell.workload.seqlen}")
            fill(cell, backend, args.family, args.precision, rounds=rounds, limit=LIMIT[backend.name], tick=tick)
    print(as_json(as_dict(cells, backend.machine, backend.device)) if args.json else text(cells, backend.device))
    return 1 if any(cell.failed for cell in cells) else 0


def run_host(args: argparse.Namespace, backend: Backend) -> int:
    """Time what calls cost their caller."""
    work = host.workload(args.dtype)
    calls = host.calls(work, backend.xp, args.family, args.precision)
    found = host.measure(calls, backend, args.rounds or host.BATCHES)
    if args.json:
        print(as_json(host_dict(found, work, backend)))
    else:
        print(host_text(found, work, backend))
    return 1 if found.failed else 0


def fill(
    cell: Cell,
    backend: Backend,
    family: str | None,
    precision: str | None,
    *,
    rounds: int,
    limit: float,
    tick: Callable[[str], None],
) -> None:
    """Measure one cell, and leave no memory behind."""
    arrays = cell.workload.arrays(backend.xp)
    makers = contenders(cell.workload, arrays, backend.xp, family, precision)
    measure(cell, makers, clock_for(backend.xp), rounds=rounds, limit=limit, tick=tick)
    del arrays, makers
    backend.free()


# ----------------------------------------------------------------------------------------------------- output


def as_dict(cells: Iterable[Cell], machine: Machine, device: str) -> dict[str, Any]:
    """For JSON."""
    return {
        "command": "bench",
        "device": device,
        "versions": machine.versions,
        "cells": [cell.as_dict() for cell in cells],
    }


def text(cells: Sequence[Cell], device: str) -> str:
    """A table for each group of cells that differ only in length, batch and direction; then the skipped."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        work = cell.workload
        groups.setdefault((work.dtype, work.head_dim, work.heads, work.causal), []).append(cell)
    parts = [f"device  {device}"]
    parts += [group_text(group) for group in groups.values()]
    skipped = {(name, why) for cell in cells for name, why in cell.skipped.items()}
    if skipped:
        parts.append(named((f"{name} skipped", why) for name, why in sorted(skipped)))
    return "\n\n".join(parts)


def group_text(cells: Sequence[Cell]) -> str:
    """One table: speed of cupyflash, then time and ratio of each contender."""
    work = cells[0].workload
    names = list(dict.fromkeys(name for cell in cells for name in cell.samples if name != OURS))
    title = f"{work.dtype}, width {work.head_dim}, {work.heads} heads{', causal' if work.causal else ''}"
    rows = [row(cell, names) for cell in cells]
    return title + "\n" + table(("direction", "batch x seqlen", OURS, "speed", *names), rows)


def row(cell: Cell, names: Sequence[str]) -> list[str]:
    """One line of a table."""
    work = cell.workload
    start = [cell.direction, f"{work.batch} x {work.seqlen}"]
    start += ["failed", ""] if cell.failed else [seconds(cell.seconds()), rate(cell.speed())]
    return start + [peer(cell, name) for name in names]


def peer(cell: Cell, name: str) -> str:
    """A peer's time and its ratio to cupyflash's."""
    if name not in cell.samples:
        return "-"
    ratio = f" {cell.ratio(name):5.2f}x" if OURS in cell.samples else ""
    return seconds(cell.seconds(name)) + ratio


def host_dict(found: Samples, work: Workload, backend: Backend) -> dict[str, Any]:
    """For JSON: a ratio is a call's time as a multiple of that of torch's."""
    return {
        "command": "bench --host",
        "device": backend.device,
        "versions": backend.machine.versions,
        "workload": work.as_dict(),
        "calls": [
            {
                "name": name,
                "seconds": found.seconds(name),
                "quartiles": found.spread(name),
                "ratio_to_torch": found.ratio(name, host.peer(name)) if host.peer(name) in found.samples else None,
                "samples": samples,
            }
            for name, samples in found.samples.items()
        ],
        "skipped": found.skipped,
    }


def host_text(found: Samples, work: Workload, backend: Backend) -> str:
    """The table of host times; then the skipped."""
    what = "host time of a call" if backend.name == "cupy" else "time of a small call, to its end"
    rows = [
        (name, seconds(found.seconds(name)), *map(seconds, found.spread(name)), to_torch(found, name))
        for name in found.samples
    ]
    parts = [f"device  {backend.device}", f"{what}: {work}"]
    parts[-1] += "\n" + table(("", "median", "quartiles", "", "x torch's"), rows)
    if found.skipped:
        parts.append(named((f"{name} skipped", why) for name, why in found.skipped.items()))
    return "\n\n".join(parts)


def to_torch(found: Samples, name: str) -> str:
    """A call's time as a multiple of that of torch's, where torch ran."""
    return f"{found.ratio(name, host.peer(name)):.2f}" if host.peer(name) in found.samples else "-"

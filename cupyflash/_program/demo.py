"""Run attention forward and backward on the best device present, and check it against float64.

Beside it runs unfused attention, which keeps the whole matrix of weights in memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import __version__, explain
from ..testing import bounds
from ..testing.data import to_numpy
from . import backend as backends
from .backend import Backend
from .bench import positive
from .contenders import Contender, Ours, contenders
from .terminal import Progress, as_json, named, rate, ratio, seconds, size, table
from .timing import OURS, Cell, clock_for, measure
from .workload import DIRECTIONS, Workload

SAMPLES = 64  # queries and keys of each head that are checked
ROUNDS = 5
LIMIT = 2.5  # seconds after which a direction begins no new round, so that a slow machine is done in 20 s
SEQLEN = {"numpy": 2048, "cupy": 8192}
HEADS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    backends.add_argument(parser)
    parser.add_argument("--seqlen", type=positive, metavar="S", help="sequence length; what is realistic if not given")


@dataclass
class Result:
    """What the demo found."""

    backend: Backend
    workload: Workload
    cells: tuple[Cell, Cell]
    memory: dict[str, dict[str, int]]  # contender to direction to bytes
    report: bounds.Report

    @property
    def unfused(self) -> str:
        """The peer's name."""
        return next(name for cell in self.cells for name in (*cell.samples, *cell.skipped) if name != OURS)

    @property
    def ok(self) -> bool:
        """Whether all that was checked is right, and all of cupyflash ran."""
        return self.report.ok and not any(cell.failed for cell in self.cells)


def run(args: argparse.Namespace) -> int:
    """The command."""
    backend = backends.choose(args.backend)
    if backend is None:
        return 2
    workload = Workload(1, HEADS, args.seqlen or default_seqlen(backend), 64)
    with Progress("demo", 4 + 2 * ROUNDS) as progress:
        result = compute(backend, workload, progress)
    print(as_json(as_dict(result)) if args.json else text(result))
    return 0 if result.ok else 1


def default_seqlen(backend: Backend) -> int:
    """A realistic length, shorter where half the free memory of a GPU would not hold unfused attention."""
    seqlen = SEQLEN[backend.name]
    if backend.name == "cupy":
        free, _ = backend.xp.cuda.runtime.memGetInfo()
        while seqlen > 512 and 3 * Workload(1, HEADS, seqlen, 64).score_bytes() > free / 2:
            seqlen //= 2
    return seqlen


def compute(backend: Backend, workload: Workload, progress: Progress) -> Result:
    """Check, measure memory, measure time."""
    arrays = workload.arrays(backend.xp)
    progress.to(0, "check against float64")
    report = check(workload, arrays)
    makers = dict(list(contenders(workload, arrays, backend.xp).items())[:2])
    memory: dict[str, dict[str, int]] = {}
    for i, (name, make) in enumerate(makers.items()):
        progress.to(1 + i, f"memory of {name}")
        memory[name] = peak_memory(backend, make)
        backend.free()
    cells = (Cell(DIRECTIONS[0], workload=workload), Cell(DIRECTIONS[1], workload=workload))
    for i, cell in enumerate(cells):
        tick = partial(progress.tell, 3 + i * ROUNDS, f"time of {cell.direction}")
        measure(cell, makers, clock_for(backend.xp), rounds=ROUNDS, limit=LIMIT, tick=tick)
    return Result(backend, workload, cells, memory, report)


def check(workload: Workload, arrays: Sequence[Any]) -> bounds.Report:
    """Compare sampled rows of all five results with float64, by the limits for random numbers."""
    q, k, v, dout = arrays
    ours = Ours(workload, (q, k, v, dout))
    (out, lse), grads = ours.kept, ours.backward()
    rng = np.random.default_rng(1)
    rows, keys = (np.sort(rng.permutation(workload.seqlen)[:SAMPLES]) for _ in range(2))
    block_n = explain(q, k, v, causal=workload.causal).block_n
    q, k, v, dout, out, lse = (to_numpy(x) for x in (q, k, v, dout, out, lse))
    dq, dk, dv = (to_numpy(x) for x in grads[:3])
    options: dict[str, Any] = {"random": True, "rows": rows, "causal": workload.causal}
    forward = bounds.check_forward(q, k, v, out, lse, block_n=block_n, **options)
    backward = bounds.check_backward(dout, q, k, v, out, lse, (dq, dk, dv), keys=keys, **options)
    return forward + backward


def peak_memory(backend: Backend, make: Any) -> dict[str, int]:
    """Bytes held at the peak of each direction; the backward's include what the forward left for it."""
    try:
        contender: Contender = make()
        kept, forward = backend.peak_memory(lambda: contender.kept)  # type: ignore[attr-defined]
        _, backward = backend.peak_memory(contender.backward)
    except Exception:  # `measure` meets it again and reports it
        return {}
    return {"forward": forward, "backward": backward + sum(x.nbytes for x in kept)}


# ----------------------------------------------------------------------------------------------------- output


def as_dict(result: Result) -> dict[str, Any]:
    """For JSON."""
    return {
        "command": "demo",
        "backend": result.backend.name,
        "device": result.backend.device,
        "advice": result.backend.machine.advice,
        "versions": result.backend.machine.versions,
        "cells": [cell.as_dict() for cell in result.cells],
        "memory": result.memory,
        "check": [{**worst._asdict(), "ok": worst.ratio <= 1} for worst in result.report.worst],
        "ok": result.ok,
        "verdict": verdict(result),
    }


def text(result: Result) -> str:
    """The demo for people: where, what, how fast, how exact, and a verdict as the last line."""
    backend, work = result.backend, result.workload
    where = [("cupyflash", __version__), ("runs on", backend.device)]
    if backend.name == "numpy":
        why = backend.machine.advice or backend.machine.cupy.problem or "NumPy was asked for"
        where.append(("no GPU used", why))
    where.append(("job", f"attention and its gradients: {work}"))
    speed = table(("", "time", "speed", "peak memory"), speed_rows(result))
    exact = table(("", "worst error", "its limit", "error / limit"), check_rows(result.report))
    note = f"compared with float64 on {SAMPLES} sampled queries and {SAMPLES} sampled keys of each head:"
    return "\n\n".join((named(where), speed, f"{note}\n{exact}", verdict(result)))


def speed_rows(result: Result) -> list[tuple[str, ...]]:
    """Time, speed and memory of each direction and contender."""
    rows: list[tuple[str, ...]] = []
    for cell in result.cells:
        for name in (OURS, result.unfused):
            label, memory = f"{cell.direction}, {name}", result.memory.get(name, {})
            if name in cell.skipped:
                rows.append((label, "-", "-", "-"))
            else:
                held = size(memory[cell.direction]) if memory else "-"
                rows.append((label, seconds(cell.seconds(name)), rate(cell.speed(name)), held))
    return rows


def check_rows(report: bounds.Report) -> list[tuple[str, ...]]:
    """The worst element of each result."""
    return [(w.name, f"{abs(w.got - w.want):.1e}", f"{w.limit:.1e}", ratio(w.ratio)) for w in report.worst]


def verdict(result: Result) -> str:
    """One line: right or wrong, and what it saves."""
    for cell in result.cells:
        if cell.failed:
            return f"FAILED: the {cell.direction} did not run: {cell.skipped[OURS]}"
    if not result.report.ok:
        worst = max(result.report.worst, key=lambda w: w.ratio)
        return f"FAILED: a result lies outside its error bound: {worst}"
    exact = f"OK: every sampled result is within its error bound (worst: {result.report.ratio:.2f} of it)"
    peer = result.unfused
    why_not = [cell.skipped[peer] for cell in result.cells if peer in cell.skipped]
    if why_not or not all(result.memory.get(name) for name in (OURS, peer)):
        return f"{exact}; {peer} attention did not run: {'; '.join(why_not) or 'out of memory'}"
    faster = [f"{cell.ratio(peer):.1f}" for cell in result.cells]
    smaller = [f"{result.memory[peer][d] / result.memory[OURS][d]:.1f}" for d in DIRECTIONS]
    return (
        f"{exact}; unfused attention takes {faster[0]} times as long forward and {faster[1]} backward, "
        f"and {smaller[0]} and {smaller[1]} times the memory"
    )

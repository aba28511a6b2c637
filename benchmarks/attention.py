"""The tensor-core family beside every peer that is installed, in one run: bfloat16, forward and backward.

    python -m benchmarks.attention --out benchmarks/results/h100-attention.json

Every cell holds batch x seqlen = 16384 rows of heads x head_dim = 2048 columns, so that only the length changes;
beside them stand longer forwards of batch 1, ours alone. Contenders take turns. A cell's verdict is the median over the
rounds of cuDNN's time over ours. Results of both are compared with float64, in two heads of each cell. The exit code
is 1 if cupyflash failed in a cell; a bar that is missed is said, and no failure. --dry-run needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import facts
from benchmarks.cells import arguments, build, check, memory_of, result_line, too_large, warm_up
from benchmarks.exact import Exact
from benchmarks.verdict import ANY_ORDER, REFERENCES, ROWS, SERIES, Bar, Judged, bars, chosen, means, share
from cupyflash import _compile, explain
from cupyflash._program import backend as backends
from cupyflash._program.backend import Backend
from cupyflash._program.contenders import Arrays, Contender, Jax, Ours, contenders
from cupyflash._program.terminal import table
from cupyflash._program.timing import OURS, clock_for, measure, quartiles
from cupyflash._program.workload import DIRECTIONS, Workload, numpy_dtype

COLUMNS = 2048  # heads x head_dim of every cell
DTYPE = "bfloat16"
FAMILY: str | None = "sm90"
HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
LONG = (32768, 131072)
PEERS = ("torch cuDNN", "torch flash", "JAX cuDNN")
#: CuPy 14's products of bfloat16 matrices may fail hard, so that it takes part where it is asked for.
MORE_PEERS = ("unfused CuPy",)
JAX_SEQLENS = (1024, 4096, 16384)  # JAX compiles every shape, which takes longer than to time it
UNFUSED_AT_MOST = 2048  # rows: beyond them it costs more time than all others
ROUNDS, LONG_ROUNDS = 9, 5
LEAST = 0.005  # seconds of a sample; events are exact to microseconds
BUDGET = 150.0
WARM_UP = 2.0


@dataclass
class Run:
    """Everything that one run of this program measured."""

    backend: Backend
    place: dict[str, Any]
    began: float = field(default_factory=time.monotonic)
    clocks: dict[str, str] | None = None  # of the warm chip
    cells: list[Judged] = field(default_factory=list)
    not_run: list[Judged] = field(default_factory=list)

    @property
    def bars(self) -> list[Bar]:
        """What is asked for of all cells, also of those that were not run."""
        return bars([*self.cells, *self.not_run])

    @property
    def failed(self) -> bool:
        """Whether cupyflash failed in a cell."""
        return any(cell.failed for cell in self.cells)

    def log(self, text: str) -> None:
        """Print with the time since the start."""
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    args = parse(argv)
    cells = plan(args.head_dims, args.seqlens, args.directions, args.long)
    if args.dry_run:
        print("\n".join(f"{describe(cell)}: {work_of(cell, args)}" for cell in cells))
        long = sum(cell.long for cell in cells)
        print(f"{len(cells) - long} cells and {long} long ones")
        return 0
    began = time.monotonic()
    backend = backends.choose("cupy")
    if backend is None:
        return 2
    import_modules(("torch", "jax"))  # so that their versions are known, whatever happens later
    run = Run(backend, facts.place(backend), began)
    print(f"{backend.device}; {len(cells)} cells", flush=True)
    try:
        measure_all(run, cells, args)
    finally:
        write(run, args.out)
    print(text(run))
    return 1 if run.failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = arguments("python -m benchmarks.attention", __doc__, ROUNDS, BUDGET)
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--seqlens", nargs="+", type=int, default=list(SEQLENS), help=f"divisors of {ROWS}")
    parser.add_argument("--long", nargs="*", type=int, default=list(LONG), help="lengths of ours alone, batch 1")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--peers", nargs="*", choices=(*PEERS, *MORE_PEERS), default=list(PEERS))
    parser.add_argument("--jax-seqlens", nargs="*", type=int, default=list(JAX_SEQLENS), help="where JAX takes part")
    args = parser.parse_args(argv)
    check(parser, args, ROWS, COLUMNS)
    if any(s <= ROWS for s in args.long):
        parser.error(f"--long takes lengths above {ROWS}")
    return args


def plan(
    head_dims: Iterable[int], seqlens: Iterable[int], directions: Iterable[str], long: Sequence[int]
) -> list[Judged]:
    """Every cell, the long ones last; one workload's directions follow each other."""
    kinds = [(head_dim, causal) for head_dim in head_dims for causal in (False, True)]

    def cell(direction: str, batch: int, seqlen: int, head_dim: int, causal: bool) -> Judged:
        work = Workload(batch, COLUMNS // head_dim, seqlen, head_dim, DTYPE, causal)
        return Judged(direction, workload=work)

    cells = [cell(way, ROWS // n, n, d, causal) for d, causal in kinds for n in seqlens for way in directions]
    if "forward" in directions:
        cells += [cell("forward", 1, n, d, causal) for n in long for d, causal in kinds]
    return cells


def describe(cell: Judged) -> str:
    """A cell in a few words."""
    work = cell.workload
    mask = "causal" if work.causal else "full"
    return f"{cell.direction:<8} d={work.head_dim:<3} {mask:<6} {work.batch:>2} x {work.seqlen:<6} x {work.heads} heads"


def work_of(cell: Judged, args: argparse.Namespace) -> str:
    """A cell's size and contenders, in words."""
    return f"{cell.workload.flops(cell.direction) / 1e12:.2f} TFLOP, {'; '.join((*ours(cell), *peers(cell, args)))}"


def ours(cell: Judged) -> tuple[str, ...]:
    """Which of ours take part."""
    return (OURS, ANY_ORDER) if cell.direction == "backward" else (OURS,)


def peers(cell: Judged, args: argparse.Namespace) -> tuple[str, ...]:
    """Which peers take part."""
    if cell.long:
        return ()
    seqlen = cell.workload.seqlen
    left_out = {name for name in args.peers if name.startswith("unfused") and seqlen > UNFUSED_AT_MOST}
    if seqlen not in args.jax_seqlens:
        left_out.add("JAX cuDNN")
    return tuple(name for name in args.peers if name not in left_out)


# -------------------------------------------------------------------------------------------------- measuring


def import_modules(names: Iterable[str]) -> None:
    """Import what is installed; what is not, or does not import, is skipped where it would take part."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation may raise anything
            print(f"{name} does not take part: {type(error).__name__}: {error}", file=sys.stderr)


def measure_all(run: Run, cells: Sequence[Judged], args: argparse.Namespace) -> None:
    """Measure cell by cell until the budget is spent; JSON is written after each, should this process be killed."""
    flat = numbers(run.backend, max(math.prod(cell.workload.shape) for cell in cells))
    compile_ahead(run, cells, flat)
    heat(run, flat)
    exact = Exact(run.backend.xp)
    for cell in cells:
        if time.monotonic() - run.began > args.budget:
            run.not_run.append(cell)
            continue
        run.cells.append(cell)
        try:
            fill(cell, run.backend, views(flat, cell.workload), exact, args)
            run.backend.free()
        except Exception as error:
            cell.skip(OURS, error)
        run.log(result_line(cell, describe(cell)) + judgement(cell))
        write(run, args.out)


def numbers(backend: Backend, count: int) -> Arrays:
    """q, k, v, dout as flat arrays of normal numbers, made on the device; every cell views them in its own shape."""
    rng = backend.xp.random.default_rng(20)
    q, k, v, dout = (rng.standard_normal(count, dtype=backend.xp.float32).astype(numpy_dtype(DTYPE)) for _ in range(4))
    backend.synchronize()  # JAX reads them on streams of its own
    backend.free()
    return q, k, v, dout


def views(flat: Arrays, work: Workload) -> Arrays:
    """The first numbers of each flat array in a workload's shape."""
    q, k, v, dout = (x[: math.prod(work.shape)].reshape(work.shape) for x in flat)
    return q, k, v, dout


def compile_ahead(run: Run, cells: Iterable[Judged], flat: Arrays) -> None:
    """Compile the cells' kernels side by side into CuPy's cache, since calls would load them one after the other."""
    if run.backend.name != "cupy":
        return
    specs = {spec for cell in cells for spec in specs_of(cell, views(flat, cell.workload))}
    build(run.backend, specs)
    run.log(f"{len(specs)} kernels compiled")


def specs_of(cell: Judged, arrays: Arrays) -> set[_compile.Spec]:
    """The kernels of a cell; none where the planner refuses it, which the cell shows."""
    backward = cell.direction == "backward"
    options: list[dict[str, Any]] = [{}]  # the backward needs a forward first
    if backward:
        options += [{"backward": True, "deterministic": flag} for flag in (True, False)]
    try:
        plans = [explain(*arrays[:3], causal=cell.workload.causal, family=FAMILY, **more) for more in options]
    except ValueError:
        return set()
    return {step.spec for made in plans for step in made.kernels}


def heat(run: Run, flat: Arrays) -> None:
    """Warm the chip up, and ask for its clocks meanwhile."""
    seqlen = min(4096, flat[0].size // COLUMNS)
    work = Workload(1, COLUMNS // 128 or 1, seqlen, min(128, COLUMNS), DTYPE)
    asked = facts.clocks()
    warm_up(work, views(flat, work), clock_for(run.backend.xp), FAMILY, WARM_UP)
    run.clocks = asked()


def fill(cell: Judged, backend: Backend, arrays: Arrays, exact: Exact, args: argparse.Namespace) -> None:
    """Measure one cell, with the errors of ours and of cuDNN."""

    def check(name: str, contender: Contender) -> None:
        known = any(reference in cell.rms for reference in REFERENCES)
        if cell.long or name not in (OURS, ANY_ORDER, *(() if known else REFERENCES)):
            return
        try:
            cell.rms[name] = exact.rms(cell.workload, arrays, cell.direction, contender.results(cell.direction))
        except Exception as error:  # the times count all the same
            cell.unchecked[name] = f"{type(error).__name__}: {error}"
            print(f"{describe(cell)}: errors of {name} are not known: {cell.unchecked[name]}", file=sys.stderr)

    names = peers(cell, args)
    cell.skipped = too_large(cell, names, memory_of(backend))
    makers = makers_of(cell, arrays, backend.xp, [name for name in names if name not in cell.skipped])
    rounds = min(LONG_ROUNDS, args.rounds) if cell.long else args.rounds
    measure(cell, makers, clock_for(backend.xp), rounds=rounds, least=LEAST, ready=check)


def makers_of(cell: Judged, arrays: Arrays, xp: Any, names: Iterable[str]) -> dict[str, Callable[[], Contender]]:
    """What makes the contenders of a cell, ours first."""
    work = cell.workload
    found = contenders(work, arrays, xp, FAMILY)
    found[ANY_ORDER] = lambda: Ours(work, arrays, FAMILY, deterministic=False)
    found["JAX cuDNN"] = lambda: Jax(work, arrays)
    return {name: found[name] for name in (*ours(cell), *names)}


# ----------------------------------------------------------------------------------------------------- output


def write(run: Run, path: Path) -> None:
    """Everything as JSON, also after a failure."""
    found = {
        "program": "benchmarks/attention.py",
        **run.place,
        "clocks_when_warm": run.clocks,
        "means": means(run.cells),
        "bars": [bar.as_dict() for bar in run.bars],
        "cells": [cell.as_dict() for cell in run.cells],
        "not_run": [describe(cell) for cell in run.not_run],
        "failed": run.failed,
    }
    facts.write(path, found)


def judgement(cell: Judged) -> str:
    """A cell's verdicts in words."""
    found = ""
    for name in ours(cell):
        if gains := cell.gains(name):
            low, high = quartiles(gains)
            error = "" if (ratio := cell.error(name)) is None else f", error {ratio:.3f} of its"
            found += f"; {name}: {cell.gain(name):.3f} of {cell.reference} ({low:.3f} to {high:.3f}){error}"
    return found


def text(run: Run) -> str:
    """The tables, means, worst cells and bars."""
    parts = [f"{run.backend.device}\nTFLOP/s, and cuDNN's time over ours"]
    for title, direction, name in SERIES:
        cells = chosen(run.cells, direction)
        if cells:
            parts.append("\n".join((grid(title, cells, name), summary(cells, title, name))))
    long = [cell for cell in run.cells if cell.long]
    if long:
        parts.append(grid("forward above 16k, and its part of the speed at 16k", long, OURS, run.cells))
    parts.append(table(("bar", "found", "wanted", "cells", ""), [row(bar) for bar in run.bars]))
    held_by_jax = sum(cell.reference == "JAX cuDNN" for cell in run.cells)
    if held_by_jax:
        parts.append(f"{held_by_jax} cells are held against JAX's cuDNN, since torch's did not run")
    if run.not_run:
        parts.append(f"NOT RUN, the budget was spent: {len(run.not_run)} cells, from {describe(run.not_run[0])}")
    if run.failed:
        parts.append("FAILED: " + "; ".join(describe(cell) for cell in run.cells if cell.failed))
    return "\n\n".join(parts)


def grid(title: str, cells: Sequence[Judged], name: str, every: Sequence[Judged] = ()) -> str:
    """One table: a row for each width and mask, a column for each length; the share of 16k if given `every` cell."""
    lengths = sorted({cell.workload.seqlen for cell in cells})
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for cell in cells:
        key = (f"d={cell.workload.head_dim}", "causal" if cell.workload.causal else "full")
        ratio = share(cell, every) if cell.long else cell.gain(name)
        rows.setdefault(key, {})[cell.workload.seqlen] = entry(cell, name, ratio)
    body = [(*key, *(found.get(n, "-") for n in lengths)) for key, found in rows.items()]
    return f"{title}\n" + table(("", "", *(f"S={n}" for n in lengths)), body)


def entry(cell: Judged, name: str, ratio: float | None) -> str:
    """One entry of a table."""
    if name not in cell.samples:
        return "FAILED"
    return f"{cell.speed(name) / 1e12:.0f} {'-' if ratio is None else f'{ratio:.2f}'}"


def summary(cells: Sequence[Judged], title: str, name: str) -> str:
    """The means and the worst cell of a table."""
    known = {id(cell): gain for cell in cells if (gain := cell.gain(name)) is not None}
    if not known:
        return "no cuDNN ran beside it"
    averages = ", ".join(f"{key} {value:.3f}" for key, value in means(cells)[title].items())
    worst = min((cell for cell in cells if id(cell) in known), key=lambda cell: known[id(cell)])
    low, high = quartiles(worst.gains(name))
    return f"geometric mean: {averages}\nworst: {describe(worst)}, {known[id(worst)]:.3f} ({low:.3f} to {high:.3f})"


def row(bar: Bar) -> tuple[str, ...]:
    """A bar as a line of a table."""
    found = "-" if bar.found is None else f"{bar.found:.3f}"
    verdict = {None: "not measured", True: "holds", False: "MISSED"}[bar.held]
    return bar.name, found, f"{'<=' if bar.at_most else '>='} {bar.limit:.2f}", f"{bar.cells}/{bar.of}", verdict


if __name__ == "__main__":
    sys.exit(main())

"""What the GPU's tables share: a warm chip, peers that fit into its memory, a line for each cell."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cupyflash import _compile
from cupyflash._program.backend import Backend
from cupyflash._program.contenders import Ours
from cupyflash._program.terminal import seconds, size
from cupyflash._program.timing import Cell, Clock
from cupyflash._program.workload import DIRECTIONS, Workload

#: How many matrices of weights a peer holds at its peak, forward and backward.
MATRICES = {"unfused CuPy": (1, 2), "torch math": (4, 5)}
SHARE = 0.8  # of the device's memory that such peers may fill together, so that cupyflash never waits for memory


def arguments(program: str, about: str | None, rounds: int, budget: float) -> argparse.ArgumentParser:
    """The options that both programs have."""
    parser = argparse.ArgumentParser(
        prog=program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"samples of each contender, {rounds} if not given")
    parser.add_argument("--budget", type=float, default=budget, help="seconds after which no new cell begins")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and stop")
    return parser


def build(backend: Backend, specs: Iterable[_compile.Spec]) -> None:
    """Compile kernels side by side into CuPy's cache, since calls would load them one after the other."""
    device = backend.xp.cuda.Device()

    def build_one(spec: _compile.Spec) -> None:
        try:
            device.use()  # a new thread has no context yet
            backend.xp.RawModule(code=_compile.source(spec), options=_compile.options(spec)).compile()
        except Exception as error:  # the cells that need it show it again
            print(f"{spec.kernel} does not compile: {error}", file=sys.stderr)

    with ThreadPoolExecutor() as pool:
        list(pool.map(build_one, specs))


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, rows: int, columns: int) -> None:
    """Say what is wrong with --seqlens, --head-dims, --rounds and --out, and stop."""
    if any(s < 1 or rows % s for s in args.seqlens) or any(d < 1 or columns % d for d in args.head_dims):
        parser.error(f"sequence lengths divide {rows}, head dims divide {columns}")
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    if args.out is None and not args.dry_run:
        parser.error("--out says where the JSON goes")


def warm_up(workload: Workload, arrays: Any, clock: Clock, family: str | None, least: float) -> None:
    """Work for `least` seconds, until clocks and temperature have settled; a failure here shows up in the cell."""
    began = time.monotonic()
    contender = Ours(workload, arrays, family)
    try:
        while time.monotonic() - began < least:
            clock(contender.forward, 1)
    except Exception as error:
        print(f"warm-up failed: {error}", file=sys.stderr)


def memory_of(backend: Backend) -> float:
    """Bytes of the current device; no limit on NumPy."""
    if backend.name == "numpy":
        return math.inf
    return float(backend.xp.cuda.runtime.memGetInfo()[1])


def too_large(cell: Cell, peers: Iterable[str], memory: float) -> dict[str, str]:
    """The peers whose matrices do not fit into `memory` beside those of the peers before them."""
    skipped: dict[str, str] = {}
    held = 0
    for name in peers:
        needs = MATRICES.get(name, (0, 0))[DIRECTIONS.index(cell.direction)] * cell.workload.score_bytes()
        if held + needs > SHARE * memory:
            skipped[name] = f"its matrices take about {size(needs)}, too much beside the others"
        else:
            held += needs
    return skipped


def result_line(cell: Cell, label: str) -> str:
    """What a cell found."""
    parts = [f"{name} {cell.speed(name) / 1e12:.2f} TFLOP/s ({seconds(cell.seconds(name))})" for name in cell.samples]
    parts += [f"{name} skipped: {why}" for name, why in cell.skipped.items()]
    return f"{label}: {'; '.join(parts)}"

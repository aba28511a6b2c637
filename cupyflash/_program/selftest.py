"""Compute random problems on this machine and compare every result with float64.

Each case draws shapes, dtypes, strides, alignment, options and values from the seed. Float64 is compared with
a wider type where there is one. The report names the worst error of each result as a part of its limit.
"""

from __future__ import annotations

import argparse
import itertools
import math
import secrets
import sys
import time
import traceback
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from .. import Tile
from ..testing import reference
from ..testing.bounds import Worst
from ..testing.cases import run as run_case
from ..testing.data import DTYPES, GPU_STYLES, INPUT_STYLES, Case, random_case, random_pick
from . import backend as backends
from .backend import Backend
from .bench import positive
from .machine import first_line
from .terminal import Progress, as_json, named, ratio, table

SECONDS = 10.0
GROUP = 16  # cases in a row that share what a kernel is compiled for, where compiling takes longer than running
WORK = (
    200_000,
    2_000_000,
    2_000_000,
    20_000_000,
)  # multiplications in the forward; one is drawn for each case
SLOW_WORK = 1_000_000  # the most where the wider type has no BLAS
RESULTS = ("out", "lse", "dq", "dk", "dv")
ENOUGH = 10  # failures after which it stops
SHOWN = 5  # failures that are printed in full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `selftest`."""
    backends.add_argument(parser)
    parser.add_argument("--seconds", type=duration, default=SECONDS, help=f"how long, {SECONDS:.0f} if not given")
    parser.add_argument("--seed", type=natural, help="what the cases are drawn from; a new one if not given")
    parser.add_argument("--case", type=natural, help="only this case of --seed")


def natural(text: str) -> int:
    """An integer of at least 0, for argparse."""
    return positive(str(int(text) + 1)) - 1


def duration(text: str) -> float:
    """A finite number of seconds, for argparse."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not a number of seconds")
    return value


def run(args: argparse.Namespace) -> int:
    """The command."""
    if args.case is not None and args.seed is None:
        print("--case needs the --seed that it belongs to", file=sys.stderr)
        return 2
    backend = backends.choose(args.backend)
    if backend is None:
        return 2
    found = Findings(backend, secrets.randbits(31) if args.seed is None else args.seed)
    if args.case is not None:
        found.try_case(args.case)
        for failure in found.failures:
            print(failure.trace or "", file=sys.stderr)
    else:
        fuzz(found, args.seconds)
    print(as_json(as_dict(found)) if args.json else text(found))
    return 0 if found.ok else 1


def fuzz(found: Findings, limit: float) -> None:
    """Case after case until the time is over, at least one; a backend that breaks many promises is not fit for more."""
    began = time.monotonic()
    with Progress("selftest", limit) as progress:
        for index in itertools.count():
            found.try_case(index)
            spent = time.monotonic() - began
            if spent >= limit or len(found.failures) >= ENOUGH:
                return
            progress.to(spent, f"{index + 1} cases, worst error / limit {ratio(found.ratio)}")


# ------------------------------------------------------------------------------------------------------ cases


class Drawn(NamedTuple):
    """One case, and the block sizes that it asks for instead of the planner's."""

    case: Case
    tile: Tile | None

    def __str__(self) -> str:
        """Python that makes the case again, without what is left at its default."""
        given = [f for f in fields(Case) if getattr(self.case, f.name) != f.default]
        text = ", ".join(f"{f.name}={getattr(self.case, f.name)!r}" for f in given)
        tile = "" if self.tile is None else f", blocks of {self.tile.block_m} queries x {self.tile.block_n} keys"
        return f"Case({text}){tile}"


def draw(seed: int, index: int, backend: str) -> Drawn:
    """Case `index` of a seed: the same on every run, whatever ran before it."""
    rng = np.random.default_rng((seed, index))
    if backend == "numpy":
        # Small blocks make small problems take every path between blocks.
        tile = Tile(*(int(rng.choice((16, 24, 64, 128))) for _ in range(2))) if rng.integers(2) else None
        return Drawn(draw_case(rng, dtype_names(), INPUT_STYLES), tile)
    leader = draw_case(np.random.default_rng((seed, index - index % GROUP)), dtype_names(), GPU_STYLES)
    return Drawn(like(leader, draw_case(rng, (leader.dtype,), GPU_STYLES)), None)


def draw_case(rng: np.random.Generator, dtypes: tuple[str, ...], styles: tuple[str, ...]) -> Case:
    """A random problem of a random size."""
    dtype = str(rng.choice(dtypes))
    work = SLOW_WORK if dtype == "float64" else int(rng.choice(WORK))
    return random_case(random_pick(rng), dtypes=(dtype,), styles=styles, work=work)


def like(leader: Case, case: Case) -> Case:
    """The case with the leader's widths and causality, which are compiled in, cut to its own size."""
    work = max(case.work, SLOW_WORK)
    causal = case.causal if bool(case.causal) == bool(leader.causal) else bool(leader.causal)
    case = replace(case, causal=causal, head_dim=leader.head_dim, head_dim_v=leader.head_dim_v)
    while case.work > work and max(case.seqlen_q, case.seqlen_k) > 1:
        case = replace(case, seqlen_q=-(-case.seqlen_q // 2), seqlen_k=-(-case.seqlen_k // 2))
    return case


def dtype_names() -> tuple[str, ...]:
    """The dtypes that this machine has a wider type for."""
    return tuple(dtype.name for dtype in DTYPES if reference.is_wide_enough(dtype))


# --------------------------------------------------------------------------------------------------- findings


@dataclass
class Failure:
    """A case that broke a promise, and how."""

    index: int
    drawn: Drawn
    text: str
    trace: str | None = None  # where an exception came from


@dataclass
class Findings:
    """The worst of everything that was tried."""

    backend: Backend
    seed: int
    counts: dict[str, int] = field(default_factory=dict)  # by dtype
    worst: dict[str, dict[str, tuple[int, Worst]]] = field(default_factory=dict)  # dtype, result: case, element
    failures: list[Failure] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many cases ran."""
        return sum(self.counts.values())

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return not self.failures

    @property
    def ratio(self) -> float:
        """The largest error / limit."""
        return max((worst.ratio for _, worst in self._all()), default=0.0)

    @property
    def worst_case(self) -> int:
        """The first failure, or the case with the largest error / limit."""
        if self.failures:
            return self.failures[0].index
        return max(self._all(), key=lambda pair: pair[1].ratio)[0]

    def _all(self) -> list[tuple[int, Worst]]:
        return [pair for of_dtype in self.worst.values() for pair in of_dtype.values()]

    def try_case(self, index: int) -> None:
        """Run one case and remember what it shows."""
        drawn = draw(self.seed, index, self.backend.name)
        self.counts[drawn.case.dtype] = self.counts.get(drawn.case.dtype, 0) + 1
        try:
            report = run_case(drawn.case, self.backend.xp, tile=drawn.tile)
        except Exception as error:  # a broken promise or a crash: both are what is looked for
            trace = "".join(traceback.format_exception(error))
            self.failures.append(Failure(index, drawn, f"{type(error).__name__}: {first_line(error)}", trace))
            return
        known = self.worst.setdefault(drawn.case.dtype, {})
        for worst in report.worst:
            if worst.name not in known or worst.ratio > known[worst.name][1].ratio:
                known[worst.name] = index, worst
        if not report.ok:
            self.failures.append(Failure(index, drawn, str(report)))

    def replay(self, index: int) -> str:
        """The command that runs one case again."""
        return f"python -m cupyflash selftest --backend {self.backend.name} --seed {self.seed} --case {index}"


# ----------------------------------------------------------------------------------------------------- output


def as_dict(found: Findings) -> dict[str, Any]:
    """For JSON."""
    return {
        "command": "selftest",
        "backend": found.backend.name,
        "device": found.backend.device,
        "versions": found.backend.machine.versions,
        "seed": found.seed,
        "cases": found.counts,
        "worst": {
            dtype: {name: {"case": index, **worst._asdict()} for name, (index, worst) in known.items()}
            for dtype, known in found.worst.items()
        },
        "worst_case": case_dict(found, found.worst_case),
        "failures": [{**case_dict(found, failure.index), "text": failure.text} for failure in found.failures],
        "ok": found.ok,
    }


def case_dict(found: Findings, index: int) -> dict[str, Any]:
    """One case for JSON."""
    drawn = draw(found.seed, index, found.backend.name)
    return {"case": index, "problem": str(drawn), "replay": found.replay(index)}


def text(found: Findings) -> str:
    """The report for people; the last line is the verdict."""
    count = ", ".join(f"{n} {dtype}" for dtype, n in sorted(found.counts.items()))
    head = [
        ("runs on", found.backend.device),
        ("seed", str(found.seed)),
        ("cases", f"{found.cases} ({count})"),
    ]
    if "float64" not in dtype_names():
        head.append(("left out", "float64: this machine has no wider type to compare it with"))
    parts = [named(head), worst_table(found)]
    parts += [f"case {f.index}: {f.drawn}\n{f.text}" for f in found.failures[:SHOWN]]
    last = [("again", found.replay(found.worst_case))]
    if found.ok:
        last.insert(0, ("worst case", str(draw(found.seed, found.worst_case, found.backend.name))))
    return "\n\n".join((*parts, named(last), verdict(found)))


def worst_table(found: Findings) -> str:
    """For each result and dtype the largest error as a part of its limit, and the case that it is from."""
    dtypes = [dtype for dtype in dtype_names() if dtype in found.worst]
    if not dtypes:
        return "no case ran to its end"

    def entry(dtype: str, name: str) -> str:
        if name not in found.worst[dtype]:
            return "-"
        index, worst = found.worst[dtype][name]
        return f"{ratio(worst.ratio)} ({index})"

    rows = [(name, *(entry(dtype, name) for dtype in dtypes)) for name in RESULTS]
    title = (
        "largest error / limit (case); 16-bit results come near 1, as their limit is hardly more than their rounding"
    )
    return f"{title}\n{table(('', *dtypes), rows)}"


def verdict(found: Findings) -> str:
    """One line: all right or not."""
    if found.ok:
        return f"OK: {found.cases} cases, every result within its error bound (worst: {found.ratio:.2f} of it)"
    return f"FAILED: {len(found.failures)} of {found.cases} cases broke a promise"

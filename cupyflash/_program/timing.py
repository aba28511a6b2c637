"""Fair timing: contenders take turns on a warm machine, samples last long enough, medians count."""

from __future__ import annotations

import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .contenders import Timed
from .machine import first_line
from .workload import Workload

Clock = Callable[[Callable[[], object], int], float]  # (call, repeats) to seconds a call

LEAST = 0.02  # seconds of one sample, so that the clock's own error stays below a percent
OURS = "cupyflash"
GRAPH = 32  # calls that a captured graph holds at most


def host_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds a call, for calls that return when they are done."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def device_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds a call on CuPy's current stream, by CUDA events. On the default stream torch's counts too."""
    import cupy

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3 / repeats


def graph_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds a call of ours on the device alone, however short: a captured graph of calls is timed."""
    import cupy

    cupy.cuda.Device().synchronize()  # what the arrays hold was written on another stream
    stream = cupy.cuda.Stream(non_blocking=True)
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    count = min(repeats, GRAPH)
    launches = -(-repeats // count)
    with stream:
        call()  # compiles, which can't be captured
        stream.begin_capture()
        for _ in range(count):
            call()
        graph = stream.end_capture()
        begin.record()
        for _ in range(launches):
            graph.launch(stream)
        end.record()
        end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3 / (launches * count)


def clock_for(xp: Any) -> Clock:
    """The clock of an array library."""
    return host_clock if xp.__name__ == "numpy" else device_clock


@dataclass
class Samples:
    """Seconds a call of contenders that took turns: the n-th samples of all belong to one round."""

    direction: str  # what was called: "forward" or "backward"; "call" where calls of several kinds are
    samples: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # contender to reason

    def skip(self, name: str, error: Exception) -> None:
        """Take a contender out, with the reason; what stops cupyflash is a defect and is shown in full."""
        self.samples.pop(name, None)
        self.skipped[name] = f"{type(error).__name__}: {first_line(error)}"
        if name.startswith(OURS):
            traceback.print_exception(error, file=sys.stderr)

    def seconds(self, name: str = OURS) -> float:
        """The median."""
        return statistics.median(self.samples[name])

    def ratios(self, name: str, base: str = OURS) -> list[float]:
        """How many times the time of `base` a contender took, by round: neighbours in time share clocks and heat."""
        return [a / b for a, b in zip(self.samples[name], self.samples[base], strict=True)]

    def ratio(self, name: str, base: str = OURS) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios(name, base))

    def quartiles(self, name: str, base: str = OURS) -> tuple[float, float]:
        """The lower and upper quartile of the rounds' ratios."""
        return quartiles(self.ratios(name, base))

    def spread(self, name: str = OURS) -> tuple[float, float]:
        """The lower and upper quartile of the seconds."""
        return quartiles(self.samples[name])

    @property
    def failed(self) -> bool:
        """Whether cupyflash itself could not run."""
        return any(name.startswith(OURS) for name in self.skipped)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one; twice the value where there is one."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


@dataclass
class Cell(Samples):
    """What one direction of one workload took, by contender."""

    workload: Workload = field(kw_only=True)

    def speed(self, name: str = OURS) -> float:
        """Floating-point operations a second."""
        return self.workload.flops(self.direction) / self.seconds(name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        contenders: list[dict[str, Any]] = []
        for name, samples in self.samples.items():
            found: dict[str, Any] = {"name": name, "seconds": self.seconds(name), "flops_per_second": self.speed(name)}
            both = OURS in self.samples
            found["ratio"] = self.ratio(name) if both else None
            found["quartiles"] = self.quartiles(name) if both else None
            contenders.append(found | {"samples": samples})
        contenders += [{"name": name, "skipped": reason} for name, reason in self.skipped.items()]
        return {"workload": self.workload.as_dict(), "direction": self.direction, "contenders": contenders}


def in_turn(names: list[str], turn: int) -> list[str]:
    """The names, another one first in each turn, so that none has the better place."""
    first = turn % max(1, len(names))
    return names[first:] + names[:first]


def measure(
    found: Samples,
    contenders: Mapping[str, Callable[[], Timed]],
    clock: Clock,
    *,
    rounds: int,
    limit: float = math.inf,
    least: float = LEAST,
    tick: Callable[[str], None] = lambda note: None,
    ready: Callable[[str, Timed], None] = lambda name, contender: None,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Build and warm up each contender, then let them take turns, another one first in each round.

    Parameters
    ----------
    found : Samples
        What is filled.
    contenders : mapping of str to callable
        What makes each contender. One that raises while it warms up is skipped with its reason.
    clock : Clock
        For contenders that bring none of their own.
    rounds : int
        Samples of each contender.
    limit : float
        Seconds after which no new round begins; one round is always run.
    least : float
        Seconds that one sample takes at least, by repeated calls.
    tick : callable
        Is told what comes next: once for each contender, then once for each round.
    ready : callable
        Is given the name of each contender that has warmed up, and the contender, before the first round.
    before : callable
        Is called once, when all are warm and the first round follows at once.
    """
    began = time.monotonic()
    warm: dict[str, tuple[Timed, Callable[[], object], int]] = {}
    for name, make in contenders.items():
        tick(name)
        try:
            contender = make()
            call = getattr(contender, found.direction)
            own = getattr(contender, "clock", clock)
            with contender.around():
                own(call, 1)  # compiles, and fills caches
                once = own(call, 1)
                ready(name, contender)
        except Exception as error:  # a peer may lack a library, memory or the dtype
            found.skip(name, error)
        else:
            warm[name] = contender, call, max(1, min(1000, math.ceil(least / max(once, 1e-9))))
    before()
    for turn in range(rounds):
        if turn and time.monotonic() - began > limit:
            break
        tick(f"round {turn + 1}")
        for name in in_turn(list(warm), turn):
            contender, call, repeats = warm[name]
            try:
                with contender.around():
                    seconds = getattr(contender, "clock", clock)(call, repeats)
                found.samples.setdefault(name, []).append(seconds)
            except Exception as error:
                found.skip(name, error)
                del warm[name]
    found.samples = {name: found.samples[name] for name in contenders if name in found.samples}

"""Fair timing: contenders take turns on a warm machine, samples last long enough, medians count."""

from __future__ import annotations

import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .contenders import Contender
from .machine import first_line
from .workload import Workload

Clock = Callable[[Callable[[], object], int], float]  # (call, repeats) to seconds a call

LEAST = 0.02  # seconds of one sample, so that the clock's own error stays below a percent
OURS = "cupyflash"


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


def clock_for(xp: Any) -> Clock:
    """The clock of an array library."""
    return host_clock if xp.__name__ == "numpy" else device_clock


@dataclass
class Cell:
    """What one direction of one workload took, by contender."""

    workload: Workload
    direction: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # contender to reason

    @property
    def failed(self) -> bool:
        """Whether cupyflash itself could not run."""
        return OURS in self.skipped

    def skip(self, name: str, error: Exception) -> None:
        """Take a contender out, with the reason; what stops cupyflash is a defect and is shown in full."""
        self.samples.pop(name, None)
        self.skipped[name] = f"{type(error).__name__}: {first_line(error)}"
        if name == OURS:
            traceback.print_exception(error, file=sys.stderr)

    def seconds(self, name: str = OURS) -> float:
        """The median."""
        return statistics.median(self.samples[name])

    def speed(self, name: str = OURS) -> float:
        """Floating-point operations a second."""
        return self.workload.flops(self.direction) / self.seconds(name)

    def ratio(self, name: str) -> float:
        """How many times cupyflash's time a contender took."""
        return self.seconds(name) / self.seconds()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        contenders: list[dict[str, Any]] = [
            {
                "name": name,
                "seconds": self.seconds(name),
                "flops_per_second": self.speed(name),
                "ratio": self.ratio(name) if OURS in self.samples else None,
                "samples": samples,
            }
            for name, samples in self.samples.items()
        ]
        contenders += [{"name": name, "skipped": reason} for name, reason in self.skipped.items()]
        return {"workload": vars(self.workload), "direction": self.direction, "contenders": contenders}


def measure(
    cell: Cell,
    contenders: Mapping[str, Callable[[], Contender]],
    clock: Clock,
    *,
    rounds: int,
    limit: float = math.inf,
    least: float = LEAST,
    tick: Callable[[str], None] = lambda note: None,
) -> Cell:
    """Fill a cell: build and warm up each contender, then let them take turns.

    Parameters
    ----------
    contenders : mapping of str to callable
        What makes each contender. One that raises while it warms up is skipped with its reason.
    rounds : int
        Samples of each contender.
    limit : float
        Seconds after which no new round begins; one round is always run.
    least : float
        Seconds that one sample takes at least, by repeated calls.
    tick : callable
        Is told what comes next: once for each contender, then once for each round.
    """
    began = time.monotonic()
    ready: dict[str, tuple[Contender, Callable[[], object], int]] = {}
    for name, make in contenders.items():
        tick(name)
        try:
            contender = make()
            call = getattr(contender, cell.direction)
            with contender.around():
                clock(call, 1)  # compiles, and fills caches
                once = clock(call, 1)
        except Exception as error:  # a peer may lack a library, memory or the dtype
            cell.skip(name, error)
        else:
            ready[name] = contender, call, max(1, min(1000, math.ceil(least / max(once, 1e-9))))
    for turn in range(rounds):
        if turn and time.monotonic() - began > limit:
            break
        tick(f"round {turn + 1}")
        for name in list(ready)[:: 1 if turn % 2 == 0 else -1]:
            contender, call, repeats = ready[name]
            try:
                with contender.around():
                    cell.samples.setdefault(name, []).append(clock(call, repeats))
            except Exception as error:
                cell.skip(name, error)
                del ready[name]
    cell.samples = {name: cell.samples[name] for name in contenders if name in cell.samples}
    return cell

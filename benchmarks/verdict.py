"""What the cells of benchmarks.attention say: ratios to cuDNN, errors beside cuDNN's, and which bars hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cupyflash._program.timing import OURS, Cell, quartiles

ROWS = 16384  # batch x seqlen of every cell but the long ones, which are longer
ANY_ORDER = f"{OURS}, any order"
#: What ours is held against: the first of these that ran. JAX's is timed by the host, torch's by the device.
REFERENCES = ("torch cuDNN", "JAX cuDNN")
#: Title, direction, and which of ours.
SERIES = (
    ("forward", "forward", OURS),
    ("backward, any order", "backward", ANY_ORDER),
    ("backward, deterministic", "backward", OURS),
)


@dataclass
class Judged(Cell):
    """A cell, and the RMS errors of what it computed."""

    rms: dict[str, dict[str, float]] = field(default_factory=dict)  # contender to array to error
    unchecked: dict[str, str] = field(default_factory=dict)  # contender to why it has none

    @property
    def long(self) -> bool:
        """Whether it is there for the longest sequences, without peers."""
        return self.workload.seqlen > ROWS

    @property
    def reference(self) -> str | None:
        """The cuDNN that ran."""
        return next((name for name in REFERENCES if name in self.samples), None)

    def gains(self, name: str = OURS) -> list[float]:
        """By round, how many times the time of ours cuDNN took; empty where either did not run."""
        reference = self.reference
        return self.ratios(reference, name) if reference and name in self.samples else []

    def gain(self, name: str = OURS) -> float | None:
        """The median of the gains."""
        return statistics.median(gains) if (gains := self.gains(name)) else None

    def upper(self, name: str = OURS) -> float | None:
        """The upper quartile of the gains."""
        return quartiles(gains)[1] if (gains := self.gains(name)) else None

    def tax(self) -> float | None:
        """By which part the backward in a fixed order takes longer."""
        both = OURS in self.samples and ANY_ORDER in self.samples
        return self.ratio(OURS, ANY_ORDER) - 1 if both else None

    def error(self, name: str = OURS) -> float | None:
        """The largest of the arrays' RMS errors as multiples of cuDNN's."""
        reference = next((name for name in REFERENCES if name in self.rms), None)
        if reference is None or name not in self.rms:
            return None
        return max(error / self.rms[reference][array] for array, error in self.rms[name].items())

    def as_dict(self) -> dict[str, Any]:
        verdicts = {
            name: {"gain": self.gain(name), "quartiles": quartiles(gains), "error": self.error(name)}
            for name in (OURS, ANY_ORDER)
            if (gains := self.gains(name))
        }
        more = {"reference": self.reference, "verdicts": verdicts, "rms": self.rms, "unchecked": self.unchecked}
        return super().as_dict() | more


@dataclass(frozen=True)
class Bar:
    """One thing that is asked for."""

    name: str
    limit: float
    found: float | None  # None: nothing measured
    cells: int  # measured
    of: int
    at_most: bool = False

    @property
    def held(self) -> bool | None:
        """Whether it holds, of the cells that were measured; None where there is none."""
        if self.found is None:
            return None
        return self.found <= self.limit if self.at_most else self.found >= self.limit

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"held": self.held}


Cells = Sequence[Judged]
Reduce = Callable[[Sequence[float]], float]


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def bar(name: str, limit: float, values: Iterable[float | None], reduce: Reduce, at_most: bool = False) -> Bar:
    """A bar on what `reduce` makes of the values, one a cell."""
    values = list(values)
    known = [x for x in values if x is not None]
    return Bar(name, limit, reduce(known) if known else None, len(known), len(values), at_most)


def chosen(
    cells: Cells,
    direction: str,
    head_dims: Sequence[int] = (),
    causal: bool | None = None,
    seqlens: Sequence[int] = (),
) -> list[Judged]:
    """Cells beside peers, by direction, width, mask and length; those not given do not matter."""
    return [
        cell
        for cell in cells
        if cell.direction == direction and not cell.long
        if not head_dims or cell.workload.head_dim in head_dims
        if causal in (None, cell.workload.causal) and (not seqlens or cell.workload.seqlen in seqlens)
    ]


def bars(cells: Cells) -> list[Bar]:
    """All that is asked for."""
    return [*forward_bars(cells), *backward_bars(cells), *tax_bars(cells), *error_bars(cells), *long_bars(cells)]


def forward_bars(cells: Cells) -> list[Bar]:
    """The forward over cuDNN's."""
    every = chosen(cells, "forward")
    found = [
        bar("forward: mean", 1.08, [cell.gain() for cell in every], geometric_mean),
        bar("forward: least upper quartile", 0.97, [cell.upper() for cell in every], min),
    ]
    for name, head_dim, causal, limit in (
        ("d=64", 64, None, 1.13),
        ("d=128 full", 128, False, 1.04),
        ("d=128 causal", 128, True, 1.08),
        ("d=256 full", 256, False, 1.08),
        ("d=256 causal", 256, True, 1.18),
    ):
        group = chosen(cells, "forward", (head_dim,), causal, (8192, 16384))
        found.append(bar(f"forward, {name}, 8k and 16k: least", limit, [cell.gain() for cell in group], min))
    return found


def backward_bars(cells: Cells) -> list[Bar]:
    """The backward over cuDNN's."""
    narrow, wide = chosen(cells, "backward", (64, 128)), chosen(cells, "backward", (256,))
    any_order, fixed = "backward, any order", "backward, deterministic"
    return [
        bar(f"{any_order}, d=64 and 128: mean", 1.12, [cell.gain(ANY_ORDER) for cell in narrow], geometric_mean),
        bar(f"{any_order}, d=64 and 128: least", 1.0, [cell.gain(ANY_ORDER) for cell in narrow], min),
        bar(f"{any_order}, d=256: mean", 1.0, [cell.gain(ANY_ORDER) for cell in wide], geometric_mean),
        bar(f"{fixed}, d=64 and 128: mean", 1.05, [cell.gain() for cell in narrow], geometric_mean),
        bar(f"{fixed}, d=256: mean", 0.95, [cell.gain() for cell in wide], geometric_mean),
    ]


def tax_bars(cells: Cells) -> list[Bar]:
    """What a fixed order costs."""
    return [
        bar(
            f"backward, d=64 and 128 {name}: mean cost of a fixed order",
            limit,
            [cell.tax() for cell in chosen(cells, "backward", (64, 128), causal)],
            statistics.fmean,
            at_most=True,
        )
        for name, causal, limit in (("causal", True, 0.03), ("full", False, 0.10))
    ]


def error_bars(cells: Cells) -> list[Bar]:
    """Errors as multiples of cuDNN's."""
    return [
        bar(
            f"{title}: largest RMS error over cuDNN's",
            1.03,
            [cell.error(name) for cell in chosen(cells, direction)],
            max,
            at_most=True,
        )
        for title, direction, name in SERIES
    ]


def long_bars(cells: Cells) -> list[Bar]:
    """Speed at great length as a part of that at 16k."""
    shares = [share(cell, cells) for cell in cells if cell.long]
    return [bar("forward above 16k: least part of the speed at 16k", 0.95, shares, min)]


def share(cell: Judged, cells: Cells) -> float | None:
    """A long cell's speed as a part of that of the cell of 16384 rows that is otherwise like it."""
    work = cell.workload
    base = next(iter(chosen(cells, cell.direction, (work.head_dim,), work.causal, (ROWS,))), None)
    if base is None or OURS not in cell.samples or OURS not in base.samples:
        return None
    return cell.speed() / base.speed()


def means(cells: Cells) -> dict[str, dict[str, float]]:
    """Geometric means of the gains, by series: over all cells and by head width."""
    groups: dict[str, tuple[int, ...]] = {"all": ()}
    groups |= {f"d={d}": (d,) for d in sorted({cell.workload.head_dim for cell in cells})}
    found: dict[str, dict[str, float]] = {}
    for title, direction, name in SERIES:
        gains = {key: [cell.gain(name) for cell in chosen(cells, direction, dims)] for key, dims in groups.items()}
        known = {key: [x for x in values if x is not None] for key, values in gains.items()}
        found[title] = {key: geometric_mean(values) for key, values in known.items() if values}
    return found

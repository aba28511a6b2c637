"""What the program shows: tables and units on stdout, progress on stderr, JSON for machines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, TextIO


def seconds(value: float) -> str:
    """A duration with its unit, in three digits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 0.9995 or unit == "us":
            return f"{_three_digits(value * factor)} {unit}"
    raise AssertionError("not reached")


def rate(flops_per_second: float) -> str:
    """A speed in GFLOP/s or TFLOP/s."""
    giga = flops_per_second / 1e9
    return f"{_three_digits(giga)} GFLOP/s" if giga < 999.5 else f"{_three_digits(giga / 1e3)} TFLOP/s"


def size(count: float) -> str:
    """A number of bytes in KiB, MiB or GiB."""
    for unit, factor in (("KiB", 2**10), ("MiB", 2**20)):
        if count < 1024 * factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 2**30:.1f} GiB"


def ratio(value: float) -> str:
    """An error as a part of its limit; what is far beyond it may be huge."""
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right; a row may end early."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            (cell.ljust if i == 0 else cell.rjust)(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    )


def named(pairs: Iterable[tuple[str, str]]) -> str:
    """One name and its text a line; lines of a longer text are indented alike."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  " + text.replace("\n", "\n" + " " * (width + 2)) for name, text in pairs)


def as_json(value: Any) -> str:
    """Strict JSON: numbers that JSON lacks become the strings "inf", "-inf", "nan"."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


class Progress:
    """A bar on stderr while something long runs: tqdm's where it is installed, else a plain line.

    Nothing is shown in the first half second, nor where stderr is not a terminal.

    Parameters
    ----------
    what : str
        What runs.
    total : float
        Where it ends, in steps or seconds.
    stream : file, optional
        stderr if not given.
    """

    DELAY = 0.5

    def __init__(self, what: str, total: float, stream: TextIO | None = None) -> None:
        self._what, self._total = what, total
        self._stream = sys.stderr if stream is None else stream
        self._done = 0.0
        self._began = self._shown = time.monotonic()
        self._width = 0
        self._bar = self._tqdm()

    def _tqdm(self) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(
            desc=self._what, total=self._total, file=self._stream, disable=None, leave=False, delay=self.DELAY,
            bar_format="{percentage:3.0f} % |{bar:24}| {desc}",
        )  # fmt: skip

    def to(self, done: float, note: str = "") -> None:
        """Show that `done` of the total is done, and what comes next."""
        step, self._done = done - self._done, done
        if self._bar is not None:
            self._bar.set_description_str(f"{self._what}: {note}", refresh=False)
            self._bar.update(step)
            return
        now = time.monotonic()
        if self._stream.isatty() and now - self._began >= self.DELAY and now - self._shown >= 0.1:
            self._shown = now
            text = f"{self._what}: {100 * done / max(self._total, 1e-9):3.0f} %  {note}"[:79]
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)

    def tell(self, done: float, *notes: str) -> None:
        """The same, with a note of several parts."""
        self.to(done, ", ".join(notes))

    def close(self) -> None:
        """Clear the line."""
        if self._bar is not None:
            self._bar.close()
        elif self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""Tiles that `tune` has found to be fastest: one small JSON file for each, which the planner's caller reads.

A tile is kept for a kernel and a class of problems, on one card and by one version of the library:
``$XDG_CACHE_HOME/cupyflash/tiles/<version>/<card>/<kernel and class>.json``. Each file is written whole and then
moved into place, so that concurrent writers can't lose each other's tiles and readers see no half of one. A class
never holds the batch or the number of heads, so that they can't change an entry's bits.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from . import _rows, _tiles
from ._plan import Rows
from ._version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._plan import Device
    from ._problem import Problem

VARIABLE = "CUPYFLASH_TUNING"
FORMAT = 2


class TuningCacheWarning(UserWarning):
    """A file among the kept tiles is damaged or not ours; it is ignored, and the planner's own tile is used."""


@dataclass(frozen=True)
class ProblemClass:
    """What problems share a tile; lengths are powers of two at or above the real ones."""

    dtype: str
    head_dim: int  # padded
    head_dim_v: int  # padded
    causal: bool
    seqlen_q: int
    seqlen_k: int
    split: bool = False  # P in two parts

    def __str__(self) -> str:
        causal, split = "-causal" if self.causal else "", "-split" if self.split else ""
        return f"{self.dtype}-d{self.head_dim}-v{self.head_dim_v}{causal}{split}-q{self.seqlen_q}-k{self.seqlen_k}"


def class_of(problem: Problem) -> ProblemClass:
    """The class of a problem that the GPU families take."""
    head_dim, head_dim_v = (
        next(w for w in _tiles.WIDTHS if w >= d) for d in (problem.head_dim, problem.head_dim_v)
    )
    seqlen_q, seqlen_k = (1 << max(0, n - 1).bit_length() for n in (problem.seqlen_q, problem.seqlen_k))
    return ProblemClass(
        problem.dtype.name, head_dim, head_dim_v, problem.causal, seqlen_q, seqlen_k, problem.splits_p
    )  # fmt: skip


def enabled() -> bool:
    """Whether tiles are kept and read: ``CUPYFLASH_TUNING`` is 1 or not set; 0 turns both off."""
    text = os.environ.get(VARIABLE, "1")
    if text not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={text!r}: it is 1, or 0, which leaves every tile to the planner")
    return text == "1"


def folder(device: Device) -> Path:
    """Where the tiles of a card lie. Cards of one name may differ in what they have, so that is named too."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"  # the XDG rules ignore relative paths
    return root / "cupyflash" / "tiles" / __version__ / _file_name(card(device))


def card(device: Device) -> str:
    """A card's name, and what tells it from others of that name."""
    return f"{device.name}, sm_{device.arch}, {device.sms} x {device.smem} bytes"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)


# ------------------------------------------------------------------------------------------------------------ reading


def tile(problem: Problem, device: Device) -> Rows | None:
    """The kept rows of a problem's kernels, as a tile to plan with; None where there are none."""
    return _tile(problem, device)


@lru_cache(maxsize=4096)
def _tile(problem: Problem, device: Device) -> Rows | None:
    if max(problem.head_dim, problem.head_dim_v) > max(_tiles.WIDTHS):
        return None  # no GPU family takes it, as the plan will say
    kept = _read(device).get(class_of(problem), {})
    rows = []
    for kernel, row in kept.items():
        if row in _rows.candidates(kernel, problem, device.smem):
            rows.append((kernel, row))
        else:
            _warn(folder(device), ValueError(f"{row} is no tile of {kernel} for {class_of(problem)}"))
    return Rows(rows=tuple(rows)) if rows else None


def forget() -> None:
    """Read the files again when they are next asked for."""
    _tile.cache_clear()
    _read.cache_clear()


@lru_cache(maxsize=64)
def _read(device: Device) -> Mapping[ProblemClass, dict[str, _rows.Row]]:
    """All kept tiles of a card, once in a process."""
    found: dict[ProblemClass, dict[str, _rows.Row]] = {}
    if not enabled():
        return MappingProxyType(found)
    try:
        paths = sorted(folder(device).glob("*.json"))
    except OSError as error:
        _warn(folder(device), error)
        paths = []
    for path in paths:
        try:
            kernel, problems, row = _parse(json.loads(path.read_text(encoding="utf-8")), device)
        except (OSError, ValueError, RecursionError) as error:
            _warn(path, error)
        else:
            found.setdefault(problems, {})[kernel] = row
    return MappingProxyType(found)


def _parse(content: Any, device: Device) -> tuple[str, ProblemClass, _rows.Row]:
    """What a file holds; ValueError where it is not one that `keep` writes for this card and version."""
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    for name, wanted in (("format", FORMAT), ("version", __version__), ("card", card(device))):
        if content.get(name) != wanted:
            raise ValueError(f"{name} is {content.get(name)!r}, not {wanted!r}")
    kernel, problems = content.get("kernel"), content.get("problems")
    if not isinstance(kernel, str) or kernel not in _rows.tiled_kernels():
        raise ValueError(f"kernel {kernel!r} has no tile to choose")
    kinds: dict[str, type] = dict.fromkeys(("head_dim", "head_dim_v", "seqlen_q", "seqlen_k"), int)
    kinds |= {"dtype": str, "causal": bool, "split": bool}
    if not isinstance(problems, dict) or {name: type(x) for name, x in problems.items()} != kinds:
        raise ValueError(f"problems are described by {', '.join(kinds)}, not {problems!r}")
    return kernel, ProblemClass(**problems), _rows.make_row(kernel, content.get("tile"))


def _warn(path: Path, error: Exception) -> None:
    warnings.warn(
        f"{path}: {error or type(error).__name__}; this is ignored, and the planner's own tile is used",
        TuningCacheWarning,
        stacklevel=2,
    )


# ------------------------------------------------------------------------------------------------------------ writing


def keep(kernel: str, problem: Problem, device: Device, row: _rows.Row, facts: dict[str, Any]) -> Path:
    """Keep a row for the class of a problem, with facts about how it was found; the file's path."""
    problems = class_of(problem)
    content = {
        "format": FORMAT,
        "version": __version__,
        "card": card(device),
        "kernel": kernel,
        "problems": asdict(problems),
        "tile": _rows.row_fields(row),
        "facts": facts,
    }
    path = folder(device) / f"{_file_name(f'{kernel}-{problems}')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path

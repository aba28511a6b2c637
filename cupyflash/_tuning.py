"""Time the tiles of a problem on this card and keep the fastest, for later calls and later processes."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import _ready, _rows, _tuned
from ._call import Call
from ._options import Asked
from ._plan import Device, Plan, Rows
from ._tuned import TuningCacheWarning

ROUNDS = 7
FINALISTS = 6  # candidates that take turns after all have been timed once
NEAR = 1.15  # how many times the fastest candidate's first time a finalist may take
GAIN = 0.99  # what part of the planner's own time a winner may take: less than a percent is not worth other bits
TUNED_FOR = frozenset("qkv")  # the gradients of a backward that is timed
LEAST = (0.002, 0.01)  # seconds of a sample, of the first look and of the final


@dataclass(frozen=True)
class TunedKernel:
    """What was found for one kernel.

    Attributes
    ----------
    kernel : str
    problems : str
        The class of problems that the tile is for.
    tile, planned : dict
        The winner, and the tile that the planner chooses by itself.
    seconds, planned_seconds : float
        The median time of both. In the backward it includes the kernels that the one under test needs.
    tried : dict of str to float or str
        Every candidate: seconds of its first sample, or why it did not run.
    path : pathlib.Path or None
        Where the winner is kept; None where ``CUPYFLASH_TUNING=0`` or the file can't be written.
    """

    kernel: str
    problems: str
    tile: dict[str, int | bool]
    planned: dict[str, int | bool]
    seconds: float
    planned_seconds: float
    tried: dict[str, float | str] = field(repr=False)
    path: Path | None = None

    def __str__(self) -> str:
        if self.tile == self.planned:
            gain = "the planner's own tile"
        else:
            gain = f"{100 * (self.planned_seconds / self.seconds - 1):.1f} % faster than the planner's own"
        where = f"kept in {self.path}" if self.path else "not kept"
        ran = sum(isinstance(found, float) for found in self.tried.values())
        return (
            f"{self.kernel}, {self.problems}: {text_of(self.tile)}\n"
            f"  {1e6 * self.seconds:.1f} us, {gain}; {ran} of {len(self.tried)} candidates ran\n  {where}"
        )


@dataclass(frozen=True)
class Tuning:
    """What `tune` returns: one entry for each kernel that has tiles to choose from; prints as a text."""

    device: str
    kernels: tuple[TunedKernel, ...]

    def __str__(self) -> str:
        return "\n".join((f"tuned on {self.device}", *map(str, self.kernels)))


def tune(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    q_offset: Any = None,
    layout: str = "hsd",
    precision: str | None = None,
    family: str | None = None,
    backward: bool = True,
) -> Tuning:
    """Time the tiles that could serve a problem on this card, and keep the fastest for the calls that follow.

    Winners are kept for a class of problems: kernel, dtype, padded head widths, causal or not, and both lengths up to
    the next power of two; never for a batch or a number of heads, on which an entry's bits must not depend. They are
    kept in the user's cache folder, for this card and this version of the library, and later processes read them.
    ``CUPYFLASH_TUNING=0`` turns that off.

    Parameters
    ----------
    q, k, v, scale, causal, q_offset, layout, precision, family
        As for ``attention``, on a GPU. What the arrays hold hardly matters; random numbers take the usual power.
    backward : bool
        Tune the kernels of ``attention_backward`` too.

    Returns
    -------
    Tuning
        What was found, kernel by kernel.

    Raises
    ------
    ValueError
        For NumPy arrays, which have no kernels to tune, and for empty problems; else as for ``attention``.
    TypeError
        As for ``attention``.

    Notes
    -----
    A tuned tile can change the last bits of results, as ``tile=`` does. Calls with ``tile=`` do not use it, and
    ``explain`` says where one is used. A progress bar is shown on a terminal.
    """
    call = Call(
        q, k, v, Asked(scale=scale, causal=causal, q_offset=q_offset, layout=layout, precision=precision)
    )  # fmt: skip
    if call.place is None or call.device is None:
        raise ValueError("q is a NumPy array: tune() times GPU kernels, and on the CPU there is nothing to tune")
    if not call.problem.batch * call.problem.num_heads * call.problem.seqlen_q * call.problem.seqlen_k:
        raise ValueError(f"q.shape={call.inputs['q'].shape}, k.shape={call.inputs['k'].shape}: nothing to time")
    trials = _forward_trials(call, family)
    if backward:
        trials += _backward_trials(call, family)
    from ._program.terminal import Progress  # the program's own tools, which other calls do without

    with Progress("tune", float(len(trials))) as progress:
        found = tuple(
            _tune_kernel(trial, call.device, lambda part, note, i=i: progress.to(i + part, note))  # type: ignore[misc]
            for i, trial in enumerate(trials)
        )
    _tuned.forget()
    _ready.forget()
    return Tuning(call.device.name, found)


def text_of(tile: dict[str, int | bool]) -> str:
    """A row's fields in one line."""
    numbers = f"{tile['block_m']} x {tile['block_n']}"
    rest = [f"{name} {n}" for name, n in tile.items() if type(n) is int and name not in ("block_m", "block_n")]
    rest += [name.replace("_", " ") for name, n in tile.items() if n is True]
    return ", ".join((numbers, *rest))


# ------------------------------------------------------------------------------------------------------------- trials


@dataclass(frozen=True)
class Trial:
    """One kernel to tune: how a call with a given row runs, and which rows there are."""

    kernel: str
    direction: str
    call: Call
    candidates: tuple[_rows.Row, ...]
    planned: _rows.Row
    run: Callable[[Rows], None]


def _forward_trials(call: Call, family: object) -> list[Trial]:
    out, lse = call.allocate(None, None, True)

    def run(rows: Rows) -> None:
        call.forward(call.plan(family, rows), out, lse)

    plan = call.plan(family, Rows())
    return [trial for step in plan.kernels if (trial := _trial(step.name, plan, call, family, run))]


def _backward_trials(call: Call, family: object) -> list[Trial]:
    """A trial for each kernel of the backward with tiles, for the gradients that this kernel writes."""
    out, lse = call.allocate(None, None, True)
    call.forward(call.plan(family, Rows()), out, lse)
    call = copy(call)
    call.inputs = call.inputs | {"dout": out, "out": out, "lse": lse}
    gradients = {f"d{name}": call.empty(x.shape, x.dtype) for name in "qkv" for x in (call.inputs[name],)}
    plan = call.plan(family, Rows(), TUNED_FOR)
    trials = []
    for step in plan.kernels:
        names = frozenset(name[1:] for name in step.writes) & TUNED_FOR

        def run(rows: Rows, names: frozenset[str] = names) -> None:
            call.backward(call.plan(family, rows, names), {f"d{name}": gradients[f"d{name}"] for name in names})

        if trial := _trial(step.name, plan, call, family, run):
            trials.append(trial)
    return trials


def _trial(kernel: str, plan: Plan, call: Call, family: object, run: Callable[[Rows], None]) -> Trial | None:
    """The trial of one kernel of a plan, if there is anything to choose."""
    assert call.device is not None
    rows = _rows.candidates(kernel, call.problem, call.device.smem)
    if not rows:
        return None
    wrt = None if plan.direction == "forward" else TUNED_FOR
    planned = next(row for row in rows if call.plan(family, Rows(rows=((kernel, row),)), wrt).kernels == plan.kernels)
    return Trial(kernel, plan.direction, call, rows, planned, run)


class Contender:
    """A kernel with one of its rows, as `measure` times it."""

    def __init__(self, trial: Trial, row: _rows.Row) -> None:
        self._run, self._rows = trial.run, Rows(rows=((trial.kernel, row),))

    def around(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def forward(self) -> None:
        self._run(self._rows)

    backward = forward


# ------------------------------------------------------------------------------------------------------------- timing


def _tune_kernel(trial: Trial, device: Device, tick: Callable[[float, str], None]) -> TunedKernel:
    """Time every candidate once, then the best few in turns, and keep the winner."""
    from ._program.timing import Samples, graph_clock, measure

    makers = {
        text_of(_rows.row_fields(row)): (lambda row=row: Contender(trial, row)) for row in trial.candidates
    }
    rows = dict(zip(makers, trial.candidates, strict=True))
    planned = text_of(_rows.row_fields(trial.planned))
    first = Samples(trial.direction)
    count = iter(range(len(makers) + 1))

    def told(note: str) -> None:
        tick(0.8 * next(count) / (len(makers) + 1), f"{trial.kernel}, {note}")

    measure(first, makers, graph_clock, rounds=1, least=LEAST[0], tick=told)
    if planned not in first.samples:
        raise RuntimeError(f"{trial.kernel} does not run with the planner's tile: {first.skipped[planned]}")
    final = Samples(trial.direction)
    names = finalists(first, planned)
    measure(final, {name: makers[name] for name in names}, graph_clock, rounds=ROUNDS, least=LEAST[1],
            tick=lambda note: tick(0.9, f"{trial.kernel}, {note}"))  # fmt: skip
    best = winner(final, planned)
    tried: dict[str, float | str] = {name: first.seconds(name) for name in first.samples}
    tried.update(first.skipped)
    found = TunedKernel(
        kernel=trial.kernel,
        problems=str(_tuned.class_of(trial.call.problem)),
        tile=_rows.row_fields(rows[best]),
        planned=_rows.row_fields(trial.planned),
        seconds=final.seconds(best),
        planned_seconds=final.seconds(planned),
        tried=tried,
    )
    return _keep(found, trial, rows[best], device)


def finalists(first: Any, planned: str) -> list[str]:
    """The fastest of a first look, and the planner's own tile."""
    names = sorted(first.samples, key=first.seconds)
    near = [name for name in names if first.seconds(name) <= NEAR * first.seconds(names[0])]
    return list(dict.fromkeys((planned, *near[:FINALISTS])))


def winner(final: Any, planned: str) -> str:
    """The fastest in the rounds' median ratio to the planner's own tile, which stays where the gain is small."""
    best = min(final.samples, key=lambda name: final.ratio(name, planned))
    return str(best) if final.ratio(best, planned) <= GAIN else planned


def _keep(found: TunedKernel, trial: Trial, row: _rows.Row, device: Device) -> TunedKernel:
    """Write the winner down, unless that is turned off; a folder that can't be written costs a warning."""
    if not _tuned.enabled():
        return found
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "shapes": {name: list(trial.call.inputs[name].shape) for name in ("q", "k", "v")},
        "seconds": found.seconds,
        "planned": found.planned,
        "planned_seconds": found.planned_seconds,
    }
    try:
        path = _tuned.keep(trial.kernel, trial.call.problem, device, row, facts)
    except OSError as error:
        text = f"the tile of {trial.kernel} is not kept: {error}"
        warnings.warn(text, TuningCacheWarning, stacklevel=4)
        return found
    return replace(found, path=path)

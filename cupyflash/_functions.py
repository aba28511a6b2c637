"""A call's score and mask function: traced for the arrays that go beside them, which are taken in and checked here."""

from __future__ import annotations

from typing import Any, NamedTuple

from ._arrays import Array
from ._options import Asked
from ._score_args import FUNCTIONS, argument_name, argument_place, check_lengths, is_number, take_args
from ._trace import TracedMask, TracedScore, trace_mask, trace_score


class Functions(NamedTuple):
    """What options hold of them, and the arrays as they came; numbers among these are NumPy arrays without axes.

    Attributes
    ----------
    arrays : dict of str to array
        By name: "score_args[0]" is the first of score_args.
    numbers : frozenset of str
        Those that came as numbers, and so lie nowhere yet.
    """

    score: TracedScore | None
    mask: TracedMask | None
    arrays: dict[str, Array]
    numbers: frozenset[str]


def take_functions(asked: Asked) -> Functions:
    """Trace what is asked for; TypeError or ValueError, with the user's line, where that can't be done."""
    score_args, mask_args = _args("score", asked.score, asked.score_args), _args("mask", asked.mask, asked.mask_args)
    score = None if asked.score is None else trace_score(asked.score, score_args)
    mask = trace_mask(asked.mask, mask_args) if callable(asked.mask) else None
    arrays, numbers = {}, set()
    for args, given, taken in zip(FUNCTIONS, (asked.score_args, asked.mask_args), (score_args, mask_args), strict=True):
        for n, (came, x) in enumerate(zip(given, taken, strict=True)):
            arrays[argument_name(args, n)] = x
            if is_number(came):
                numbers.add(argument_name(args, n))
    return Functions(score, mask, arrays, frozenset(numbers))


def _args(what: str, function: Any, args: Any) -> tuple[Array, ...]:
    """The arrays beside a function; without one there are none."""
    taken = take_args(f"{what}_args", args)
    if taken and not callable(function):
        seen = "None" if function is None else f"a {type(function).__name__}"
        raise TypeError(f"{what}_args has {len(taken)} values and {what} is {seen}: they are for a {what} function")
    return taken


def check_functions(functions: Functions) -> None:
    """ValueError unless every element that a function asks for exists; only for calls that have pairs."""
    for args in FUNCTIONS:
        check_lengths(args, args_of(args, functions.arrays))


def args_of(args: str, beside: dict[str, Array]) -> tuple[Array, ...]:
    """The arrays of score_args or mask_args among others."""
    places = (place for name in beside if (place := argument_place(name)))
    count = sum(of == args for of, _ in places)
    return tuple(beside[argument_name(args, n)] for n in range(count))

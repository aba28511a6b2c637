"""Named score and mask functions, and derivatives written by hand: what cases call and the specification reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Sizes(NamedTuple):
    """What arguments are drawn for."""

    batch: int
    heads: int
    rows: int
    keys: int


class Use(NamedTuple):
    """One use of an element of a float argument, at all pairs.

    ``slope``: the score's derivative with respect to it; ``bend``: the largest absolute value of that slope's own
    derivative with respect to s.
    """

    argument: int
    at: tuple[Any, ...]
    slope: Any
    bend: Any


Draw = Callable[[np.random.Generator, Sizes], tuple[Any, ...]]


@dataclass(frozen=True)
class Score:
    """A score function, its derivative, and what the bounds ask for.

    Attributes
    ----------
    function, slope : callable
        Of (s, b, h, i, j, *args): the score, and its derivative with respect to s, 0 where the score is -inf.
    bend : callable
        Of args: the largest absolute value of the second derivative.
    args : callable
        Arguments for a generator and sizes.
    uses : callable
        Of (s, b, h, i, j, *args): every Use of a float argument.
    """

    function: Callable[..., Any]
    slope: Callable[..., Any]
    bend: Callable[..., Any]
    args: Draw
    uses: Callable[..., tuple[Use, ...]] = lambda *_: ()


SCORES: dict[str, Score] = {}


def known(function: Callable[..., Any]) -> Score:
    """The named score that a function is; ValueError where there is none."""
    for score in SCORES.values():
        if score.function is function:
            return score
    raise ValueError(f"score={function!r}: bounds and gradients are known of cupyflash.testing.functions.SCORES")


def _distance(s: Any, b: Any, h: Any, i: Any, j: Any, slope: Any) -> Any:
    return s + slope[h] * (j - i)


def _relative(s: Any, b: Any, h: Any, i: Any, j: Any, table: Any) -> Any:
    return s + table[h, np.clip(j - i + 4, 0, 8)]


def _square(s: Any, b: Any, h: Any, i: Any, j: Any, factor: Any) -> Any:
    return s * s * factor


def _capped(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return 5 * np.tanh(s / 5)


def _near(s: Any, b: Any, h: Any, i: Any, j: Any, width: Any) -> Any:
    return np.where(abs(i - j) <= width, s, -np.inf)


def _gain(s: Any, b: Any, h: Any, i: Any, j: Any, gain: Any, less: Any) -> Any:
    return s * gain[b, j] - less[i]


def _one(s: Any, *_: Any) -> Any:
    return np.ones_like(s)


def _draw_gain(rng: np.random.Generator, sizes: Sizes) -> tuple[Any, ...]:
    gain = rng.uniform(-1.5, 1.5, (sizes.batch, sizes.keys))
    return gain.astype(ml_dtypes.bfloat16), rng.standard_normal(sizes.rows)


def _straight(*_: Any) -> float:
    return 0.0


SCORES["distance"] = Score(
    _distance, _one, _straight, lambda rng, n: ((2.0 ** -rng.uniform(1, 8, n.heads)).astype(np.float32),),
    lambda s, b, h, i, j, slope: (Use(0, (h,), j - i, 0),),
)
SCORES["relative"] = Score(
    _relative, _one, _straight, lambda rng, n: (rng.standard_normal((n.heads, 9)).astype(np.float16),),
    lambda s, b, h, i, j, table: (Use(0, (h, np.clip(j - i + 4, 0, 8)), 1, 0),),
)
SCORES["square"] = Score(
    _square,
    lambda s, b, h, i, j, factor: 2 * s * factor,
    lambda factor: 2 * abs(factor),
    lambda rng, n: (float(rng.choice([-0.05, 0.02])),),
    lambda s, b, h, i, j, factor: (Use(0, (), s * s, 2 * abs(s)),),
)
SCORES["capped"] = Score(
    _capped, lambda s, b, h, i, j: 1 - np.tanh(s / 5) ** 2, lambda: 0.16, lambda rng, n: ()
)
SCORES["near"] = Score(
    _near,
    lambda s, b, h, i, j, width: np.where(abs(i - j) <= width, np.ones_like(s), 0),
    _straight,
    lambda rng, n: (int(rng.integers(5, 30)),),
)
SCORES["gain"] = Score(
    _gain, lambda s, b, h, i, j, gain, less: s * 0 + gain[b, j], _straight, _draw_gain,
    lambda s, b, h, i, j, gain, less: (Use(0, (b, j), s, 1), Use(1, (i,), -1, 0)),
)


def _bands(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i - j + h) % 7 < 5


def _chosen(b: Any, h: Any, i: Any, j: Any, chosen: Any, every: Any) -> Any:
    return chosen[h, j] | (i % every == 0)


@dataclass(frozen=True)
class MaskFunction:
    """A mask function of (b, h, i, j, *args), and arguments for a generator and sizes."""

    function: Callable[..., Any]
    args: Draw


MASKS: dict[str, MaskFunction] = {
    "bands": MaskFunction(_bands, lambda rng, n: ()),
    "chosen": MaskFunction(_chosen, lambda rng, n: (rng.random((n.heads, n.keys)) < 0.5, 3)),
}

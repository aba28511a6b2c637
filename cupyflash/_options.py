"""What a call asks for beside q, k, v: what else makes a logit, and who sees whom. Read and checked in one place.

Options is hashable and holds no array. The arrays themselves go beside q, k, v under these names, broadcast as views:

    bias, mask                 (*batch_shape, heads, seqlen_q, seqlen_k)
    alibi_slopes, sinks        (*batch_shape, heads)
    q_segments, kv_segments    (*batch_shape, seqlen_q), (*batch_shape, seqlen_k), int64
    q_lens, kv_lens            batch_shape, int64
    cu_seqlens_q, _k           (batch + 1,): where packed sequences begin and end; int64, on a device int32
    seed                       (), uint64
    q_offsets                  broadcasts to batch_shape, int64
    score_args[0], ...         of any shape: what a score function reads, and mask_args[0], ... a mask function
"""

from __future__ import annotations

import math
import numbers
import os
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._arrays import DTYPES, Array, broadcasts_to, take
from ._score_args import is_float

if TYPE_CHECKING:
    from ._trace import TracedMask, TracedScore

MAX_SEED = 2**64
# No diagonal is further from a key, as q_offset lies within 2**62; with q_offset added it still fits 64 bits.
MAX_BOUND = 2**62


@dataclass(frozen=True)
class Side:
    """An array beside q, k, v, as it came."""

    dtype: np.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Options:
    """What changes logits and hides pairs, without the arrays.

    Attributes
    ----------
    window_left, window_right : int or None
        Query row i on diagonal d_i sees keys from d_i - window_left to d_i + window_right; None: no such bound.
        As large as MAX_BOUND: where diagonals may be far, 32 bits don't hold a bound.
    softcap : float or None
        s = softcap * tanh(s / softcap).
    dropout : float
        The probability that a weight is dropped.
    bias, mask, alibi_slopes, sinks : Side or None
    segments, q_lens, kv_lens : bool
        Whether there are arrays of them.
    packed : (int, int) or None
        The rows of q and of k in which all entries lie one behind the other, each of a length of its own.
    score, mask_function : traced function or None
        Equal for functions that do the same with arguments of the same dtypes and ranks.
    score_shapes : tuple of tuple of int
        The shapes of score_args.
    """

    window_left: int | None = None
    window_right: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    bias: Side | None = None
    mask: Side | None = None
    alibi_slopes: Side | None = None
    sinks: Side | None = None
    segments: bool = False
    q_lens: bool = False
    kv_lens: bool = False
    packed: tuple[int, int] | None = None
    score: TracedScore | None = None
    score_shapes: tuple[tuple[int, ...], ...] = ()
    mask_function: TracedMask | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @cached_property
    def window(self) -> bool:
        """Whether the diagonal bounds what a row sees beside what ``causal`` says."""
        return self.window_left is not None or self.window_right is not None

    @cached_property
    def changes_logits(self) -> bool:
        """Whether a logit is more than a scaled product."""
        return any(x is not None for x in (self.softcap, self.alibi_slopes, self.bias, self.score))

    @cached_property
    def weights_apart(self) -> bool:
        """Whether dS is a multiple of something else than the weights that dv is made of."""
        return self.softcap is not None or self.score is not None or self.dropout > 0

    @cached_property
    def hides_pairs(self) -> bool:
        """Whether a pair may be hidden by more than where the sequences end and where the diagonal runs."""
        return self.mask is not None or self.mask_function is not None or self.segments

    @cached_property
    def asks_of_pairs(self) -> bool:
        """Whether something is added to a logit, looked up or drawn for each pair."""
        return any(x is not None for x in (self.alibi_slopes, self.bias, self.score)) or self.dropout > 0

    @cached_property
    def lens(self) -> bool:
        """Whether each batch entry has lengths of its own."""
        return self.q_lens or self.kv_lens or self.packed is not None


PLAIN = Options()
NO_ARGS: tuple[Any, ...] = ()  # Python has one empty tuple
CHECK = "CUPYFLASH_CHECK"


def lengths_are_checked() -> bool:
    """Whether lengths and offsets on a device are looked at, which waits for it: ``CUPYFLASH_CHECK=1``."""
    return os.environ.get(CHECK, "") == "1"


class Asked(NamedTuple):
    """The arguments of a call that say what to compute, as they came."""

    scale: Any = None
    causal: Any = False
    window: Any = None
    softcap: Any = None
    bias: Any = None
    mask: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    q_lens: Any = None
    kv_lens: Any = None
    q_offset: Any = None
    segment_ids: Any = None
    dropout: Any = 0.0
    seed: Any = None
    layout: Any = "hsd"
    precision: Any = None
    score: Any = None
    score_args: Any = ()
    mask_args: Any = ()

    @property
    def is_plain(self) -> bool:
        """Whether nothing is asked for that Options would hold. (Of an array as of a number: no value is looked at.)"""
        (
            _, _, window, softcap, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, _, segment_ids, dropout, seed, _,
            _, score, score_args, mask_args,
        ) = self  # fmt: skip
        return (
            window is softcap is bias is mask is alibi_slopes is sinks is q_lens is kv_lens is segment_ids is seed
            is score is None and score_args is mask_args is NO_ARGS and type(dropout) in (float, int) and dropout == 0
        )  # fmt: skip

    @property
    def differentiable(self) -> tuple[str, ...]:
        """What gradients exist for: q, k, v, and what else is given; of score_args, if one is a float."""
        given = [name for name in ("bias", "sinks") if getattr(self, name) is not None]
        if self.score is not None and isinstance(self.score_args, tuple) and any(map(is_float, self.score_args)):
            given.append("score_args")
        return ("q", "k", "v", *given)

    def arrays(self) -> dict[str, Array]:
        """The arrays among them, taken in, by the names they have inside; lengths and seeds only if arrays."""
        found: dict[str, Any] = {}
        for name in ("bias", "mask", "alibi_slopes", "sinks"):
            x = getattr(self, name)
            if x is not None and not (name == "mask" and callable(x)):
                found[name] = take(name, x)
        if self.segment_ids is not None:
            if not isinstance(self.segment_ids, tuple) or len(self.segment_ids) != 2:
                raise TypeError(f"segment_ids={self.segment_ids!r}: segment_ids is a pair (q_ids, kv_ids) of arrays")
            for i, name in enumerate(("q_segments", "kv_segments")):
                found[name] = take(f"segment_ids[{i}]", self.segment_ids[i])
        return found


@dataclass(frozen=True)
class Shape:
    """What options are checked against."""

    batch: tuple[int, ...]
    num_heads: int
    seqlen_q: int
    seqlen_k: int


def read_window(window: object) -> tuple[int | None, int | None]:
    """Left and right bound."""
    if window is None:
        return None, None
    if not isinstance(window, tuple) or len(window) != 2:
        raise TypeError(f"window={window!r}: window is None or a pair (left, right)")
    for bound in window:
        if bound is not None and (isinstance(bound, (bool, np.bool_)) or not isinstance(bound, (int, np.integer))):
            raise TypeError(f"window={window!r}: left and right are integers of at least 0, or None")
        if bound is not None and bound < 0:
            raise ValueError(f"window={window!r}: left and right count keys to either side, at least 0; or None")
    left, right = (None if bound is None else min(int(bound), MAX_BOUND) for bound in window)
    return left, right


def read_softcap(softcap: object) -> float | None:
    if softcap is None:
        return None
    value = read_real("softcap", softcap)
    if not (0 < value < math.inf):
        raise ValueError(f"softcap={value}: softcap is finite and above 0, or None")
    return value


def read_dropout(dropout: object, seed: object) -> float:
    value = read_real("dropout", dropout)
    if not 0 <= value < 1:
        raise ValueError(f"dropout={value}: dropout is a probability, at least 0 and below 1")
    if value > 0 and seed is None:
        raise ValueError(f"dropout={value} without a seed: pass seed=, an integer, for results that can be repeated")
    return value


def read_seed(seed: Any) -> int | Array | None:
    """An integer in [0, 2**64), or an array without axes of 64-bit integers."""
    if seed is None:
        return None
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, (bool, np.bool_)):
        if not 0 <= int(seed) < MAX_SEED:
            raise ValueError(f"seed={seed}: seed lies between 0 and 2**64 - 1")
        return int(seed)
    dtype = getattr(seed, "dtype", None)
    if not isinstance(dtype, np.dtype) or dtype not in (np.dtype(np.int64), np.dtype(np.uint64)):
        raise TypeError(f"seed={seed!r}: seed is an integer, or an array without axes of int64 or uint64")
    if seed.shape != ():
        raise ValueError(f"seed.shape={seed.shape}: a seed array has no axes")
    return seed


def broadcast_shape(name: str, shape: tuple[int, ...], full: tuple[int, ...], meaning: str) -> None:
    """ValueError unless an array of ``shape`` broadcasts to ``full``."""
    if not broadcasts_to(shape, full):
        raise ValueError(f"{name}.shape={shape} does not broadcast to {meaning} = {full}")


def check_bias(x: Array, shape: Shape) -> Side:
    if x.dtype not in DTYPES:
        raise TypeError(f"bias.dtype={x.dtype}: a bias is float16, bfloat16, float32 or float64")
    _check_pairs("bias", x, shape)
    return Side(x.dtype, x.shape)


def check_mask(x: Array, shape: Shape) -> Side:
    if x.dtype != np.bool_:
        raise TypeError(f"mask.dtype={x.dtype}: a mask is boolean, True where a row may see a key; a float is a bias")
    _check_pairs("mask", x, shape)
    return Side(x.dtype, x.shape)


def _check_pairs(name: str, x: Array, shape: Shape) -> None:
    full = (*shape.batch, shape.num_heads, shape.seqlen_q, shape.seqlen_k)
    broadcast_shape(name, x.shape, full, "(*batch, Hq, Sq, Sk)")


def check_slopes(x: Array, shape: Shape) -> Side:
    if x.dtype not in DTYPES:
        raise TypeError(f"alibi_slopes.dtype={x.dtype}: slopes are float16, bfloat16, float32 or float64")
    broadcast_shape("alibi_slopes", x.shape, (*shape.batch, shape.num_heads), "(*batch, Hq)")
    return Side(x.dtype, x.shape)


def check_sinks(x: Array, shape: Shape) -> Side:
    if x.dtype not in DTYPES:
        raise TypeError(f"sinks.dtype={x.dtype}: sinks are float16, bfloat16, float32 or float64")
    if x.shape != (shape.num_heads,):
        raise ValueError(f"sinks.shape={x.shape}: there is one logit for each query head, shape {(shape.num_heads,)}")
    return Side(x.dtype, x.shape)


def check_segments(q_ids: Array, kv_ids: Array, shape: Shape) -> None:
    sides = (("segment_ids[0]", q_ids, shape.seqlen_q, "Sq"), ("segment_ids[1]", kv_ids, shape.seqlen_k, "Sk"))
    for name, x, length, letter in sides:
        if x.dtype.kind not in "iu":
            raise TypeError(f"{name}.dtype={x.dtype}: segments are numbered by integers")
        broadcast_shape(name, x.shape, (*shape.batch, length), f"(*batch, {letter})")


def check_lens(name: str, x: Any, length: int, batch: tuple[int, ...]) -> None:
    """Shape and type of lengths, and their values where the host knows them."""
    if isinstance(x, (int, np.integer)) and not isinstance(x, (bool, np.bool_)):
        if not 0 <= int(x) <= length:
            raise ValueError(f"{name}={int(x)}: a length lies between 0 and the array's {length} rows")
        return
    dtype = getattr(x, "dtype", None)
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iu":
        raise TypeError(f"{name}={x!r}: lengths are an integer or an integer array over the leading axes")
    broadcast_shape(name, x.shape, batch, "the leading axes")
    known: Any = x if isinstance(x, np.ndarray) or lengths_are_checked() else None
    if known is not None and known.size and (int(known.min()) < 0 or int(known.max()) > length):
        raise ValueError(
            f"{name} holds lengths from {int(known.min())} to {int(known.max())}: "
            f"each lies between 0 and the array's {length} rows"
        )


def read_real(name: str, x: object, kind: str = "a real number") -> float:
    """A float, infinite for an integer or a fraction that is larger than all of them."""
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}={x!r}: {name} is {kind}")
    try:
        return float(x)
    except OverflowError:
        return math.inf if abs(x) == x else -math.inf


def read_options(asked: Asked, arrays: dict[str, Array], shape: Shape, **functions: Any) -> Options:
    """The Options of a call; ValueError or TypeError, with value and rule, where there are none.

    ``functions`` are those fields of Options.
    """
    left, right = read_window(asked.window)
    read_seed(asked.seed)
    if "q_segments" in arrays:
        check_segments(arrays["q_segments"], arrays["kv_segments"], shape)
    for name, lengths, length in (("q_lens", asked.q_lens, shape.seqlen_q), ("kv_lens", asked.kv_lens, shape.seqlen_k)):
        if lengths is not None:
            check_lens(name, lengths, length, shape.batch)
    checks = {"bias": check_bias, "mask": check_mask, "alibi_slopes": check_slopes, "sinks": check_sinks}
    sides: dict[str, Any] = {name: check(arrays[name], shape) for name, check in checks.items() if name in arrays}
    return Options(
        window_left=left,
        window_right=right,
        softcap=read_softcap(asked.softcap),
        dropout=read_dropout(asked.dropout, asked.seed),
        segments="q_segments" in arrays,
        q_lens=asked.q_lens is not None,
        kv_lens=asked.kv_lens is not None,
        **sides,
        **functions,
    )

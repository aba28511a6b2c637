"""Calls like one before: checked and planned once, then found again by their signature.

A signature is all that a call depends on but the numbers in its arrays and where they lie: shapes, strides, dtypes,
alignment, device, options; of score and mask functions what they compute, as traced. What is found runs with new
addresses, for a few microseconds of host time: on CuPy arrays always, on NumPy arrays where the problem is plain and so
small that they count.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ._arrays import Array, ArraySpec, extent, import_cupy, on_device
from ._cpu import Small
from ._functions import Functions, take_functions
from ._launch import Ready
from ._options import MAX_SEED, NO_ARGS, Asked, lengths_are_checked
from ._tma import ALIGNMENT

_KEPT = 4096
# Beside what runs: how far each array reaches around its address, and the addresses that were last found to be apart.
_calls: dict[Any, tuple[Ready | Small, tuple[tuple[int, int], ...], list[list[int]]]] = {}


class Look(NamedTuple):
    """A call's options, as far as calls are found again by them.

    Attributes
    ----------
    options : tuple or None
        What calls with other options differ in; None where a call must be looked at each time.
    arrays : dict of str to array
        The arrays among them, by the names that they have inside.
    numbers : dict of str to NumPy array without axes
        What came as a number and kernels read from memory: a seed, score_args. Copied to the device by each call.
    functions : Functions or None
        The score and mask function, traced, unless this is left to the call.
    """

    options: tuple[Any, ...] | None
    arrays: dict[str, Any]
    numbers: dict[str, np.ndarray]
    functions: Functions | None


_UNKEPT = Look(None, {}, {}, None)


def look(asked: Asked, q: Any) -> Look:
    """What to look for: nothing where numbers are of an unusual type, where kernels do not read an array as it is,
    where lengths are to be checked, and on the host for options whose calls are never kept.
    """
    plain = _plain(asked)
    if plain is None or asked.is_plain:
        return Look(plain, {}, {}, None)
    if type(q) is np.ndarray or not _is_usual(asked) or lengths_are_checked():
        return _UNKEPT
    arrays = _sides(asked)
    numbers: dict[str, np.ndarray] = {}
    functions = None
    if arrays is None or not _add_seed(asked, arrays, numbers):
        return _UNKEPT
    if asked.score is not None or callable(asked.mask) or not asked.score_args is asked.mask_args is NO_ARGS:
        functions = take_functions(asked)
        numbers |= {name: x for name, x in functions.arrays.items() if name in functions.numbers}
        arrays |= {name: x for name, x in functions.arrays.items() if name not in functions.numbers}
    traced = (None, None) if functions is None else (functions.score, functions.mask)
    # A seed, or an argument that a function was traced for, is a number where it is not among the arrays.
    options = (*plain, asked.window, asked.softcap, asked.dropout, *traced, tuple(arrays))
    return Look(options, arrays, numbers, functions)


def _plain(asked: Asked) -> tuple[Any, ...] | None:
    """The options that are no reason to look closer, unless one is of an unusual type."""
    scale, causal, q_offset = asked.scale, asked.causal, asked.q_offset
    if (
        (scale is None or type(scale) is float)
        and (causal is False or causal is True or type(causal) is str)
        and (q_offset is None or type(q_offset) is int)
    ):
        return (scale, causal, q_offset, asked.layout, asked.precision)
    return None


def _is_usual(asked: Asked) -> bool:
    """Whether the numbers among other options have their usual types; what they may be is checked by the first call."""
    window, softcap, segments = asked.window, asked.softcap, asked.segment_ids
    return (
        (window is None or (type(window) is tuple and all(x is None or type(x) is int for x in window)))
        and (softcap is None or type(softcap) is float)
        and type(asked.dropout) in (float, int)
        and (segments is None or (type(segments) is tuple and len(segments) == 2))
    )


def _sides(asked: Asked) -> dict[str, Any] | None:
    """The arrays of options by name; None where integers among them are not what kernels read."""
    q_segments, kv_segments = asked.segment_ids or (None, None)
    integers = {
        "q_segments": q_segments, "kv_segments": kv_segments, "q_lens": asked.q_lens, "kv_lens": asked.kv_lens
    }  # fmt: skip
    if any(x is not None and getattr(x, "dtype", None) != np.int64 for x in integers.values()):
        return None
    sides = {name: getattr(asked, name) for name in ("bias", "mask", "alibi_slopes", "sinks")} | integers
    if callable(asked.mask):
        del sides["mask"]
    return {name: x for name, x in sides.items() if x is not None}


def _add_seed(asked: Asked, arrays: dict[str, Any], numbers: dict[str, np.ndarray]) -> bool:
    """Add the seed to one of the two, where dropout reads it; False for a seed that must be looked at."""
    seed = asked.seed
    is_number = type(seed) is int and 0 <= seed < MAX_SEED
    if asked.dropout == 0:  # an array would not be in the signature
        return is_number or seed is None
    if is_number:
        numbers["seed"] = np.asarray(seed, np.uint64)
    elif getattr(seed, "dtype", None) == np.uint64:
        arrays["seed"] = seed
    else:
        return False
    return True


def signature(
    direction: str, tensors: dict[str, Any], options: tuple[Any, ...] | None, more: tuple[Any, ...]
) -> Any:
    """The signature of a call, or None: without options, or where not all arrays are NumPy's own, or all CuPy's.

    (What lies on the host beside arrays on a device is copied there first, each time.)
    """
    kinds = set(map(type, tensors.values()))
    if options is None or len(kinds) > 1:
        return None
    parts: list[Any] = [direction, options, more]
    kind = kinds.pop()
    if kind is np.ndarray:
        for x in tensors.values():
            parts += x.shape, x.strides, x.dtype, x.flags.aligned
    elif kind.__module__ == "cupy":
        for x in tensors.values():
            memory = x.data
            parts += x.shape, x.strides, x.dtype, memory.ptr % ALIGNMENT, memory.device_id
    else:
        return None
    return tuple(parts)


def run(
    key: Any, tensors: dict[str, Array], outputs: int, numbers: dict[str, np.ndarray], apart: int = 0
) -> dict[str, Array] | None:
    """Run a call that is known, and return all its tensors by name; None where it must be looked at.

    ``tensors`` are those of the signature; the last ``outputs`` of them are written, of which the first ``apart`` are
    known to share no memory with each other. ``numbers`` are those of `look`.
    """
    try:
        kept = _calls.get(key)
    except TypeError:  # an option without a hash
        return None
    if kept is None:
        return None
    ready, extents, known = kept
    if outputs:
        places = [x.data.ptr for x in tensors.values()]
        if places != known[0]:
            if _touch(places, extents, outputs, apart):
                return None
            known[0] = places
    if numbers and isinstance(ready, Ready):
        with on_device(ready.device):
            tensors = tensors | {name: import_cupy().asarray(x) for name, x in numbers.items()}
    return ready.run(tensors)


def _touch(places: list[int], extents: tuple[tuple[int, int], ...], outputs: int, apart: int) -> bool:
    """Whether the memory from an output's first to its last byte reaches into that of another array."""
    spans = [(place + low, place + high) for place, (low, high) in zip(places, extents, strict=True)]
    inputs = len(spans) - outputs
    for i in range(inputs, len(spans)):
        begin, end = spans[i]
        for low, high in spans[: inputs if i < inputs + apart else i]:
            if begin < high and low < end:
                return True
    return False


def keep(key: Any, tensors: dict[str, Array], ready: Ready | Small | None, results: tuple[ArraySpec, ...]) -> None:
    """Keep what a call has made, for calls like it; ``results`` are those that it had to allocate."""
    if key is None or ready is None:
        return
    if len(_calls) >= _KEPT:
        _calls.clear()
    if isinstance(ready, Ready):
        extents = tuple((low - x.data.ptr, high - x.data.ptr) for x in tensors.values() for low, high in (extent(x),))
        _calls[key] = replace(ready, results=results), extents, [[]]
    elif results and results[0][0] == "out":  # NumPy: outputs of the caller's are looked at each time
        _calls[key] = replace(ready, results=results), (), [[]]


def specs(arrays: tuple[tuple[str, Array | None], ...]) -> tuple[ArraySpec, ...]:
    """What makes arrays like these again."""
    return tuple((name, x.shape, x.dtype) for name, x in arrays if x is not None)


def forget() -> None:
    """Look at every call anew: tiles have been tuned."""
    _calls.clear()

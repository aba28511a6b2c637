"""The arrays beside a score or mask function: which are taken, and the struct of kernels/score_args.cuh, packed."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from ._arrays import Array, address, misaligned, take
from ._expression import KINDS

MOST_ARGS, MOST_AXES = 8, 4
_ARRAY = struct.Struct(f"<q{MOST_AXES}q{MOST_AXES}i")  # data, stride[], length[]
FUNCTION_ARGS_BYTES = MOST_ARGS * _ARRAY.size


class Argument(NamedTuple):
    """What a function is traced for: of an array, neither values nor shape."""

    dtype: np.dtype
    ndim: int


def take_args(name: str, args: object) -> tuple[Array, ...]:
    """The arrays of ``name`` (score_args, mask_args); numbers become arrays without axes.

    Raises
    ------
    TypeError, ValueError
        Where they are no tuple of at most 8 arrays of at most 4 axes, of floats, integers or booleans.
    """
    if not isinstance(args, tuple):
        raise TypeError(f"{name}={args!r}: {name} is a tuple of arrays and numbers")
    if len(args) > MOST_ARGS:
        raise ValueError(f"len({name})={len(args)}: there are at most {MOST_ARGS}")
    arrays = tuple(
        np.asarray(x) if isinstance(x, (bool, int, float, np.generic)) else take(f"{name}[{n}]", x)
        for n, x in enumerate(args)
    )
    signature(name, arrays)
    return arrays


def signature(name: str, arrays: tuple[Array, ...]) -> tuple[Argument, ...]:
    """Dtypes and ranks, checked."""
    for n, x in enumerate(arrays):
        if x.dtype not in KINDS:
            raise TypeError(
                f"{name}[{n}].dtype={x.dtype!r}: float16, bfloat16, float32, float64, integers and booleans in the "
                "machine's byte order are taken"
            )
        if x.ndim > MOST_AXES:
            raise ValueError(f"{name}[{n}].shape={x.shape}: there are at most {MOST_AXES} axes")
    return tuple(Argument(x.dtype, x.ndim) for x in arrays)


def check_lengths(name: str, arrays: tuple[Array, ...]) -> None:
    """ValueError if an index can't be clamped into an axis; only for calls that have pairs."""
    for n, x in enumerate(arrays):
        if 0 in x.shape:
            raise ValueError(f"{name}[{n}].shape={x.shape}: an axis without elements can't be indexed")


def pack_args(name: str, arrays: tuple[Array, ...]) -> bytes:
    """FunctionArgs, as a launch carries it. The arrays must live until the launch is over."""
    packed = bytearray(FUNCTION_ARGS_BYTES)
    for n, x in enumerate(arrays):
        reason = misaligned(x)
        if reason is not None:
            raise ValueError(f"{name}[{n}]: {reason}")
        if max(x.shape, default=0) >= 2**31:
            raise ValueError(f"{name}[{n}].shape={x.shape}: an axis has fewer than 2**31 elements")
        rest = MOST_AXES - x.ndim
        strides = (*(s // x.itemsize for s in x.strides), *(0,) * rest)
        _ARRAY.pack_into(packed, n * _ARRAY.size, address(x), *strides, *x.shape, *(1,) * rest)
    return bytes(packed)

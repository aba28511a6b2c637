"""The arrays beside a score or mask function: which are taken, and the struct of kernels/score_args.cuh, packed."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from ._arrays import DTYPES, Array, address, misaligned, take
from ._expression import KINDS

FUNCTIONS = ("score_args", "mask_args")
GRADIENT_ARGS = "dscore_args"  # the gradients of score_args, in whose place kernels find them
MOST_ARGS, MOST_AXES = 8, 4
_ARRAY = struct.Struct(f"<q{MOST_AXES}q{MOST_AXES}i")  # data, stride[], length[]
FUNCTION_ARGS_BYTES = MOST_ARGS * _ARRAY.size


class Argument(NamedTuple):
    """What a function is traced for: of an array, neither values nor shape."""

    dtype: np.dtype
    ndim: int


def argument_name(args: str, n: int) -> str:
    """How the n-th of score_args or mask_args is called."""
    return f"{args}[{n}]"


def argument_place(name: str) -> tuple[str, int] | None:
    """Which of score_args, mask_args or dscore_args, and its place there, has this name; None: another kind."""
    args, bracket, rest = name.partition("[")
    return (args, int(rest[:-1])) if bracket and args in (*FUNCTIONS, GRADIENT_ARGS) else None


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
    arrays = tuple(np.asarray(x) if is_number(x) else take(f"{name}[{n}]", x) for n, x in enumerate(args))
    signature(name, arrays)
    return arrays


def is_number(x: object) -> bool:
    """Whether an argument came as a number, not as an array."""
    return isinstance(x, (bool, int, float, np.generic))


def is_float(x: object) -> bool:
    """Whether an argument, as it came, has a gradient."""
    return (np.asarray(x) if is_number(x) else take("score_args", x)).dtype in DTYPES


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
        if max(x.shape, default=0) >= 2**31:
            raise ValueError(f"{name}[{n}].shape={x.shape}: an axis has fewer than 2**31 elements")


def pack_args(name: str, arrays: tuple[Array, ...]) -> bytes:
    """FunctionArgs, as a launch carries it. The arrays must live until the launch is over."""
    packed = bytearray(FUNCTION_ARGS_BYTES)
    for n, x in enumerate(arrays):
        reason = misaligned(x)
        if reason is not None:
            raise ValueError(f"{name}[{n}]: {reason}")
        strides = tuple(s // x.itemsize for s in x.strides)
        pack_layout(packed, argument_slot(n), x.shape, strides, address(x))
    return bytes(packed)


def argument_slot(n: int) -> int:
    """Where the n-th array lies in FunctionArgs, in bytes; its address comes first."""
    return n * _ARRAY.size


def pack_layout(
    packed: bytearray, at: int, shape: tuple[int, ...], strides: tuple[int, ...], address: int = 0
) -> None:
    """Write one array, with strides in elements, into a struct."""
    rest = MOST_AXES - len(shape)
    _ARRAY.pack_into(packed, at, address, *strides, *(0,) * rest, *shape, *(1,) * rest)

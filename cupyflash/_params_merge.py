"""What a launch of `combine` and `combine_backward` carries: MergeParams of kernels/params_merge.cuh, packed."""

from __future__ import annotations

import itertools
import operator
import struct
from dataclasses import dataclass

from ._params import _TENSOR, BATCH_AXES, Packed, Strides, collapse

MOST_ARRAYS = 8
SIDES = ("outs", "lses", "douts", "dlses")
TENSORS = ("out", "lse", "dout", "dlse", *(f"{side}_{n}" for side in SIDES for n in range(MOST_ARRAYS)))
TAIL_AXES = {name: 2 for name in TENSORS if "lse" in name}  # where they are not 3
_SCALARS = struct.Struct(f"<2q{BATCH_AXES + 6}i")
MERGE_PARAMS_BYTES = len(TENSORS) * _TENSOR.size + _SCALARS.size


@dataclass(frozen=True)
class Stack:
    """Parts that one array has all of, outs_0 and lses_0: elements from one to the next."""

    out_step: int
    lse_step: int


def make_merge_template(
    shape: tuple[int, ...], tensors: tuple[tuple[str, Strides, int], ...], count: int, stack: Stack | None = None
) -> Packed:
    """Pack everything but addresses, for every launch that one call makes.

    Parameters
    ----------
    shape : tuple of int
        Of out: leading axes, heads, rows, columns.
    tensors : tuple of (name, element strides, itemsize)
        Strides as ``element_strides`` gives them.
    count : int
        How many parts there are.
    """
    *lead, heads, rows, columns = shape
    batch, _, strides = collapse(tuple(lead), (1,) * len(lead), {name: s for name, s, _ in tensors})
    outer = max(0, len(batch) - BATCH_AXES)
    pad = BATCH_AXES - (len(batch) - outer)
    packed = bytearray(MERGE_PARAMS_BYTES)
    for name, s in strides.items():
        _TENSOR.pack_into(packed, TENSORS.index(name) * _TENSOR.size, 0, *[0] * pad, *s[outer:])
    _SCALARS.pack_into(
        packed, len(TENSORS) * _TENSOR.size, *((stack.out_step, stack.lse_step) if stack else (0, 0)),
        *(1,) * pad, *batch[outer:], heads, rows, columns, count, stack is not None, 0,
    )  # fmt: skip
    offsets = tuple(
        tuple(itemsize * sum(map(operator.mul, index, strides[name])) for name, _, itemsize in tensors)
        for index in itertools.product(*(range(n) for n in batch[:outer]))
    )
    slots = tuple((name, TENSORS.index(name) * _TENSOR.size // 8) for name, _, _ in tensors)
    return Packed(bytes(packed), slots, offsets)

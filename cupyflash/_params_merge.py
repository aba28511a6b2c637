"""What a launch of `combine` and `combine_backward` carries: MergeParams of kernels/params_merge.cuh, packed."""

from __future__ import annotations

import itertools
import operator
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ._params import _TENSOR, BATCH_AXES, Strides, collapse

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


@dataclass(frozen=True)
class MergeTemplate:
    """A MergeParams struct without its addresses, for every launch that one call makes."""

    packed: bytes
    slots: tuple[tuple[str, int], ...]  # each tensor's name, and where its address goes, in units of 8 bytes
    offsets: tuple[tuple[int, ...], ...]  # for each launch: bytes to add to each tensor's address
    nbytes = MERGE_PARAMS_BYTES

    @property
    def holds_addresses(self) -> bool:
        """As in `Template`."""
        return len(self.offsets) == 1 and not any(self.offsets[0])

    def begin(self, struct: memoryview) -> None:
        """Write all that no launch changes, once, to where launches will read it."""
        struct[:] = self.packed

    def fill(self, words: memoryview, launch: int, addresses: Mapping[str, int]) -> None:
        """Write the addresses of one launch into the struct, as words of 8 bytes."""
        for (name, slot), offset in zip(self.slots, self.offsets[launch], strict=True):
            words[slot] = addresses[name] + offset


def make_merge_template(
    shape: tuple[int, ...], tensors: tuple[tuple[str, Strides, int], ...], count: int, stack: Stack | None = None
) -> MergeTemplate:
    """Pack everything but addresses.

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
    return MergeTemplate(bytes(packed), slots, offsets)

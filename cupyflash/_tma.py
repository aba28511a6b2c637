"""Tensor maps: what a TMA copy needs to know of an array, and which arrays it can't read in place.

A map has five dimensions: column, row, head, the last batch axis, the one before. Batch axes along which an array is
broadcast, and a head axis of stride 0, have length 1 there; the kernel puts coordinate 0.

Entries of lengths of their own end where the map ends, for whatever lies beyond must come as zeros. Row i of an entry
of n rows, of at most R, is row R - n + i of the map, and between head and batch axis there is one more that steps from
row to row: along it the entry has the coordinate of its end. Together these are R rows too far, so that the map begins
R rows before the array. No length is known when a map is made.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from ._arrays import BFLOAT16
from ._params import PARAMS_BYTES, Template
from ._problem import Problem

MAP_BYTES = 128
MAPPED = ("q", "k", "v", "dout")  # the maps of MappedParams in kernels/params_sm90.cuh, in order
MAPPED_PARAMS_BYTES = -(-(len(MAPPED) * MAP_BYTES + PARAMS_BYTES) // 64) * 64
MAP_AXES = 2  # batch axes of a map; of one for entries of lengths of their own there is one
BOX_COLUMNS = 64  # 128 bytes: as wide as the swizzle's rows
ALIGNMENT = 16  # bytes: of the address and of all strides but the columns'
_LARGEST_STRIDE = 2**40
_MAP_WORDS, _PARAMS_WORD = MAP_BYTES // 8, len(MAPPED) * MAP_BYTES // 8  # in words of 8 bytes
_KEPT = 1024  # maps of one tensor of one launch, by address
# CUtensorMapDataType, CUtensorMapSwizzle (128 bytes), CUtensorMapL2promotion (128 bytes)
MAP_TYPES = {np.dtype(np.float16): 6, BFLOAT16: 9}
_SWIZZLE_128, _PROMOTION_128 = 3, 2
_FIVE, _FOUR, _BOX = ctypes.c_uint64 * 5, ctypes.c_uint64 * 4, ctypes.c_uint32 * 5


@dataclass(frozen=True)
class MapLayout:
    """A tensor map without its address.

    Attributes
    ----------
    lengths : tuple of 5 int
        Columns, rows, heads, last batch axis, the one before; 1 along an axis that is broadcast.
    strides : tuple of 4 int
        In bytes, of the same but the columns.
    box_rows : int
        Rows of one copy.
    empty : bool
        There is nothing to copy, wherever the tensor lies.
    before : int
        How many bytes before the tensor the map begins.
    """

    dtype: np.dtype
    lengths: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int]
    box_rows: int
    empty: bool
    before: int = 0


@dataclass(frozen=True)
class MappedTemplate:
    """A MappedParams struct without its addresses, as ``Template`` is for Params."""

    template: Template
    maps: tuple[tuple[str, int, MapLayout], ...]  # tensor, place among the maps, layout
    _made: dict[tuple[int, int], memoryview] = field(default_factory=dict, compare=False)
    nbytes = MAPPED_PARAMS_BYTES
    holds_addresses = False  # maps are made of them

    @property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """For each launch: bytes to add to each tensor's address."""
        return self.template.offsets

    @property
    def slots(self) -> tuple[tuple[str, int], ...]:
        """Each tensor's name, and where its address goes behind the maps."""
        return self.template.slots

    def begin(self, struct: memoryview) -> None:
        """Write all that no launch changes, once, to where launches will read it."""
        self.template.begin(struct[len(MAPPED) * MAP_BYTES :][:PARAMS_BYTES])

    def fill(self, words: memoryview, launch: int, addresses: Mapping[str, int]) -> None:
        """Write the addresses of one launch, and the maps that hold them, into the struct, as words of 8 bytes."""
        template = self.template
        template.fill(words[_PARAMS_WORD:], launch, addresses)
        moved = dict(zip((name for name, _ in template.slots), template.offsets[launch], strict=True))
        for name, place, layout in self.maps:
            address = 0 if layout.empty else addresses[name] + moved[name] - layout.before
            made = self._made.get((place, address))
            if made is None:
                if len(self._made) >= _KEPT:
                    self._made.clear()
                made = self._made[place, address] = memoryview(tensor_map(layout, address)).cast("Q")
            words[place * _MAP_WORDS : (place + 1) * _MAP_WORDS] = made


def map_template(
    problem: Problem, template: Template, dtype: np.dtype, boxes: tuple[tuple[str, int], ...]
) -> MappedTemplate:
    """Beside Params, the maps of the tensors in `boxes`, each with the rows of its box."""
    strides = dict(template.strides)
    maps = []
    for name, box_rows in boxes:
        heads, longest, columns = problem.tail(name)
        rows = problem.rows_of(name)
        layout = map_layout(dtype, (rows, columns), heads, template.batch_shape, strides[name], box_rows)
        if problem.options.lens:
            layout = by_entry_length(layout, longest)
        maps.append((name, MAPPED.index(name), layout))
    return MappedTemplate(template, tuple(maps))


def map_axes(problem: Problem) -> int:
    """How many batch axes the maps of a problem have."""
    return MAP_AXES - 1 if problem.options.lens else MAP_AXES


def by_entry_length(layout: MapLayout, longest: int) -> MapLayout:
    """The map for entries of at most so many rows, which end anywhere among those of ``layout``."""
    columns, rows, heads, entries, _ = layout.lengths
    row, head, entry, _ = layout.strides
    return replace(
        layout, lengths=(columns, max(longest, 1), heads, rows + 1, entries), strides=(row, head, row, entry),
        empty=layout.empty or longest == 0, before=longest * row,
    )  # fmt: skip


def map_layout(
    dtype: np.dtype, rows_and_columns: tuple[int, int], num_heads: int, batch_shape: tuple[int, ...],
    strides: tuple[int, ...], box_rows: int,
) -> MapLayout:  # fmt: skip
    """The map of a tensor whose element strides are (*batch axes, head, row, column), 0 where it is broadcast."""
    rows, columns = rows_and_columns
    axes = (num_heads, *batch_shape[::-1], 1, 1)[: 1 + MAP_AXES]
    steps = (strides[-3], *strides[-4::-1], 0, 0)[: 1 + MAP_AXES]
    itemsize = dtype.itemsize
    counts = [n if step else 1 for n, step in zip(axes, steps, strict=True)]
    # An axis of length 1 is never stepped along, an empty tensor never read: any stride that a map may have will do.
    empty = 0 in (rows, columns, *axes)
    bytes_ = [ALIGNMENT if n <= 1 or empty else step * itemsize for n, step in zip(counts, steps, strict=True)]
    row = ALIGNMENT if rows <= 1 or empty else strides[-2] * itemsize
    outer, inner, head = (max(n, 1) for n in counts[::-1])
    lengths = (max(columns, 1), max(rows, 1), head, inner, outer)
    return MapLayout(dtype, lengths, (row, bytes_[0], bytes_[1], bytes_[2]), box_rows, empty)


def unreadable(shape: tuple[int, ...], strides: tuple[int, ...], address: int, itemsize: int) -> str | None:
    """Why a copy is needed before TMA can read an array (..., rows, columns) with these byte strides, or None."""
    if 0 in shape:
        return None
    if address % ALIGNMENT:
        return f"its address is no multiple of {ALIGNMENT} bytes"
    if shape[-1] > 1 and strides[-1] != itemsize:
        return f"its columns are {strides[-1]} bytes apart, not {itemsize}"
    for axis, (length, stride) in enumerate(zip(shape[:-1], strides[:-1], strict=True)):
        is_row = axis == len(shape) - 2
        if length == 1 or (stride == 0 and not is_row):
            continue
        if stride % ALIGNMENT or not 0 < stride < _LARGEST_STRIDE:
            return f"axis {axis - len(shape)} has a stride of {stride} bytes, not a positive multiple of {ALIGNMENT}"
    return None


def tensor_map(layout: MapLayout, address: int) -> bytes:
    """The 128 bytes of a map; address 0, of an empty tensor, stands for memory that is never read."""
    holder = ctypes.create_string_buffer(MAP_BYTES + 64)
    start = -ctypes.addressof(holder) % 64
    at = ctypes.c_void_p(ctypes.addressof(holder) + start)
    code = encoder()(
        at, MAP_TYPES[layout.dtype], 5, ctypes.c_void_p(address or 2 * MAP_BYTES),
        _FIVE(*layout.lengths), _FOUR(*layout.strides), _BOX(BOX_COLUMNS, layout.box_rows, 1, 1, 1), _BOX(*(1,) * 5),
        0, _SWIZZLE_128, _PROMOTION_128, 0,
    )  # fmt: skip
    if code:
        raise RuntimeError(f"cuTensorMapEncodeTiled refuses {layout} at address {address:#x}: CUresult {code}")
    return holder.raw[start : start + MAP_BYTES]


@lru_cache(maxsize=1)
def encoder() -> Callable[..., int]:
    """cuTensorMapEncodeTiled of the driver."""
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    function: Callable[..., int] = library.cuTensorMapEncodeTiled
    return function

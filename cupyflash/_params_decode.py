"""What a launch of a decoding kernel carries: DecodeParams of kernels/params_decode.cuh, packed."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ._decoding import Decoding, Splits
from ._params import (
    _TENSOR,
    BATCH_AXES,
    PARAMS_BYTES,
    TAIL_AXES,
    Layout,
    Template,
    element_strides,
    make_template,
    scalars,
)
from ._problem import Problem

EXTRAS = ("page_table", "k_new", "v_new", "cos", "sin", "q_turned", "partial", "partial_lse")
_NUMBERS = struct.Struct("<4q8i")
DECODE_PARAMS_BYTES = PARAMS_BYTES + len(EXTRAS) * _TENSOR.size + _NUMBERS.size

@dataclass(frozen=True)
class DecodeTemplate:
    """A DecodeParams struct without its addresses: one launch."""

    template: Template
    packed: bytes  # what lies behind Params
    slots: tuple[tuple[str, int], ...]
    offsets: tuple[tuple[int, ...], ...] = ((),)
    nbytes = DECODE_PARAMS_BYTES
    holds_addresses = True

    def begin(self, struct: memoryview) -> None:
        """Write all that no launch changes, once, to where launches will read it."""
        self.template.begin(struct[:PARAMS_BYTES])
        struct[PARAMS_BYTES:] = self.packed

    def fill(self, words: memoryview, launch: int, addresses: Mapping[str, int]) -> None:
        """Write the addresses into the struct, as words of 8 bytes."""
        for name, slot in self.slots:
            words[slot] = addresses[name]


@lru_cache(maxsize=1024)
def make_decode_template(
    problem: Problem, decoding: Decoding, layouts: tuple[Layout, ...], splits: Splits,
    arguments: tuple[tuple[str, int, tuple[int, ...], tuple[int, ...]], ...] = (),
) -> DecodeTemplate:  # fmt: skip
    """Pack everything but addresses.

    ``layouts`` are canonical: caches (batch, Hk, capacity, D), or (pages, Hk, page_size, D); partial results
    (splits, batch, Hq, T, Dv), and their lse (batch, Hq, T, splits).
    """
    given, packed = [], bytearray(DECODE_PARAMS_BYTES - PARAMS_BYTES)
    slots, page_strides, split_strides = [], {"k": 0, "v": 0}, {"partial": 0, "partial_lse": 0}
    for name, shape, strides, itemsize in layouts:
        steps = tuple(s // itemsize for s in strides)
        if name in EXTRAS:
            if name in split_strides:
                along = 0 if name == "partial" else -1
                split_strides[name] = steps[along]
                steps = steps[1:] if along == 0 else steps[:-1]
            _TENSOR.pack_into(packed, EXTRAS.index(name) * _TENSOR.size, 0, *_four_axes(name, steps))
            slots.append((name, (PARAMS_BYTES + EXTRAS.index(name) * _TENSOR.size) // 8))
            continue
        if name in page_strides and decoding.page_size:
            page_strides[name], shape, strides = steps[0], shape[1:], strides[1:]
        given.append((name, element_strides(shape, strides, itemsize, 1, TAIL_AXES.get(name, 3)), itemsize))
    template = make_template(scalars(problem), problem.batch_shape, tuple(given), arguments=arguments)
    _NUMBERS.pack_into(
        packed, len(EXTRAS) * _TENSOR.size, *page_strides.values(), *split_strides.values(), decoding.page_size,
        decoding.pages, decoding.table_columns, *splits, decoding.rotary_dim // 2, decoding.positions,
    )  # fmt: skip
    return DecodeTemplate(template, bytes(packed), (*template.slots, *slots))


def _four_axes(name: str, steps: tuple[int, ...]) -> tuple[int, ...]:
    """Element strides as Tensor has them: four leading axes, of which the last is the batch; head, row, column."""
    batch = head = column = 0
    if name in ("cos", "sin"):
        row, column = steps
    elif name == "page_table":
        batch, row = steps
    elif name == "partial_lse":
        batch, head, row = steps
    else:
        batch, head, row, column = steps
    return (*(0,) * (BATCH_AXES - 1), batch, head, row, column)

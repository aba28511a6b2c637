"""What a launch carries: the by-value ``Params`` struct of kernels/params.cuh, packed.

Leading axes are collapsed first: neighbours that every array walks as one become one. The struct has room for
``BATCH_AXES`` axes; where more remain (broadcasting that alternates from axis to axis), the outermost are walked
by the host, one launch for each index. All strides are counted in elements, 0 along a broadcast axis.
"""

from __future__ import annotations

import itertools
import math
import operator
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ._problem import Problem
from ._score_args import FUNCTION_ARGS_BYTES, FUNCTIONS, GRADIENT_ARGS, argument_name, argument_slot, pack_layout

BATCH_AXES = 4
TENSORS = (
    "q", "k", "v", "out", "lse", "dout", "dlse", "delta", "dq", "dk", "dv", "partial", "exponents", "dq_sums",
    "semaphores", "q_offsets", "tickets", "bias", "mask", "alibi_slopes", "sinks", "q_segments", "kv_segments",
    "q_lens", "kv_lens", "seed", "dbias", "dsinks", "key_map", "query_map", "cu_seqlens_q", "cu_seqlens_k",
)  # fmt: skip
_TENSOR = struct.Struct(f"<{1 + BATCH_AXES + 3}q")  # data, batch_stride[], head_stride, row_stride, col_stride
_SCALARS = struct.Struct(f"<qdqqqdd{2 * BATCH_AXES + 7}iI4i")  # see Scalars
# Axes after the leading ones, where they are not 3.
TAIL_AXES = {
    "lse": 2, "dlse": 2, "delta": 2, "exponents": 2, "semaphores": 2, "q_offsets": 0, "tickets": 0, "alibi_slopes": 1,
    "sinks": 1, "q_segments": 2, "kv_segments": 2, "q_lens": 0, "kv_lens": 0, "seed": 0, "dsinks": 1,
    "cu_seqlens_q": 1, "cu_seqlens_k": 1,
}  # fmt: skip
# Packed sequences have one leading axis. Along two others that a kernel can walk, an index is a sequence's first query
# or first key: these tensors have their rows along the one or the other.
FIRST_QUERY, FIRST_KEY = 0, 1
_PACKED = dict.fromkeys(("q", "out", "lse", "dout", "dlse", "dq"), FIRST_QUERY)
_PACKED |= dict.fromkeys(("k", "v", "dk", "dv"), FIRST_KEY)
# Along a third it is a sequence's first tile of queries: the leading axis of these temporaries has all of them.
FIRST_TILE = 2
BY_TILE = frozenset({"delta", "exponents", "semaphores", "dq_sums"})
NO_BOUND = 2**62  # of a window
_FIRST_BATCH = len(TENSORS) * _TENSOR.size // 8 + 2  # where it lies, in units of 8 bytes
_FUNCTIONS = -(-(len(TENSORS) * _TENSOR.size + _SCALARS.size) // 8) * 8  # where score_args lies, then mask_args
PARAMS_BYTES = _FUNCTIONS + len(FUNCTIONS) * FUNCTION_ARGS_BYTES

Strides = tuple[int, ...]  # one for each leading axis, then head, row, column
Layout = tuple[str, tuple[int, ...], tuple[int, ...], int]  # name, shape, strides in bytes, itemsize
Argument = tuple[str, int, tuple[int, ...], tuple[int, ...]]  # one of FUNCTIONS, place there, shape, element strides


@dataclass(frozen=True)
class Scalars:
    """The struct's numbers behind its tensors; the order is the struct's."""

    q_offset: int
    scale: float
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    section: int  # persistent kernels: how many heads run side by side
    window_left: int = NO_BOUND
    window_right: int = NO_BOUND
    softcap: float = 0.0
    undropped: float = 1.0
    drop_below: int = 0
    bottom_right: bool = False
    packed: tuple[int, int] | None = None
    tile_shift: int = 0


def scalars(problem: Problem, section: int = 1) -> Scalars:
    """The numbers of a problem as kernels read them."""
    options = problem.options
    left, right = (NO_BOUND if bound is None else bound for bound in (options.window_left, options.window_right))
    return Scalars(
        q_offset=0 if problem.q_offset is None else problem.q_offset,
        scale=problem.scale,
        num_heads=problem.num_heads,
        num_heads_k=problem.num_heads_k,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        section=section,
        window_left=left,
        window_right=right,
        softcap=options.softcap or 0.0,
        undropped=1 / (1 - options.dropout),
        drop_below=int(options.dropout * 2**32),
        bottom_right=problem.bottom_right,
        packed=options.packed,
    )


def element_strides(shape: tuple[int, ...], strides: Strides, itemsize: int, batch_ndim: int, tail: int) -> Strides:
    """Byte strides as element strides, leading axes filled up to batch_ndim with 0, 0 where an axis has length 1.

    ``tail`` axes follow the leading ones: 3 for (head, row, column), 2 for lse, 0 for offsets; filled up to 3.
    """
    elements = tuple(s // itemsize for s in strides)
    lead = len(shape) - tail
    batch = tuple(0 if n == 1 else s for n, s in zip(shape[:lead], elements[:lead], strict=True))
    return (0,) * (batch_ndim - lead) + batch + elements[lead:] + (0,) * (3 - tail)


@dataclass(frozen=True)
class Packed:
    """A struct without its addresses, for every launch that one call makes."""

    packed: bytes
    slots: tuple[tuple[str, int], ...]  # each tensor's name, and where its address goes, in units of 8 bytes
    offsets: tuple[tuple[int, ...], ...]  # for each launch: bytes to add to each tensor's address

    @property
    def nbytes(self) -> int:
        """Of the struct."""
        return len(self.packed)

    @property
    def holds_addresses(self) -> bool:
        """Whether a call makes one launch, whose struct holds the tensors' own addresses and nothing made of them."""
        return len(self.offsets) == 1 and not any(self.offsets[0])

    def begin(self, struct: memoryview) -> None:
        """Write all that no launch changes, once, to where launches will read it."""
        struct[:] = self.packed

    def fill(self, words: memoryview, launch: int, addresses: Mapping[str, int]) -> None:
        """Write the addresses of one launch into the struct, as words of 8 bytes."""
        for (name, slot), offset in zip(self.slots, self.offsets[launch], strict=True):
            words[slot] = addresses[name] + offset


@dataclass(frozen=True)
class Template(Packed):
    """A Params struct without its addresses."""

    batch_shape: tuple[int, ...]  # of one launch, collapsed
    strides: tuple[tuple[str, Strides], ...]  # of each tensor, along these axes, heads, rows and columns
    entries: int  # of one launch, those that it sums over among them

    def fill(self, words: memoryview, launch: int, addresses: Mapping[str, int]) -> None:
        """Write the addresses of one launch, and its first entry where there are several launches."""
        super().fill(words, launch, addresses)
        if len(self.offsets) > 1:
            words[_FIRST_BATCH] = launch * self.entries


@lru_cache(maxsize=4096)
def make_template(
    numbers: Scalars,
    batch_shape: tuple[int, ...],
    tensors: tuple[tuple[str, Strides, int], ...],
    reduce_shape: tuple[int, ...] | None = None,
    axes: int = BATCH_AXES,
    arguments: tuple[Argument, ...] = (),
) -> Template:
    """Pack everything but addresses.

    Parameters
    ----------
    tensors : tuple of (name, element strides, itemsize)
        Strides as ``element_strides`` gives them, with len(batch_shape) leading entries.
    reduce_shape : tuple of int, optional
        For bwd_finish: how many partials are summed along each leading axis.
    axes : int
        How many leading axes one launch walks, at most ``BATCH_AXES``.
    arguments : tuple of ("score_args" or "mask_args", place there, shape, element strides)
        What functions read.
    """
    strides = {name: s for name, s, _ in tensors}
    reduce_shape = (1,) * len(batch_shape) if reduce_shape is None else reduce_shape
    shape, reduce, strides = collapse(batch_shape, reduce_shape, strides)
    outer = max(0, len(shape) - axes)
    if any(n != 1 for n in reduce[:outer]):
        raise ValueError(f"a gradient of leading axes {batch_shape}, summed over {reduce_shape}: {axes} are walked")
    pad = BATCH_AXES - (len(shape) - outer)
    packed = bytearray(PARAMS_BYTES)
    for name, s in strides.items():
        inner = [0] * pad + list(s[outer:])
        if numbers.packed is not None and name in _PACKED:
            inner[_PACKED[name]] = inner[BATCH_AXES + 1]
        if numbers.packed is not None and name in BY_TILE:
            inner[FIRST_TILE], inner[BATCH_AXES - 1] = inner[BATCH_AXES - 1], 0
        _TENSOR.pack_into(packed, TENSORS.index(name) * _TENSOR.size, 0, *inner)
    _SCALARS.pack_into(
        packed, len(TENSORS) * _TENSOR.size, numbers.q_offset, numbers.scale,
        0, numbers.window_left, numbers.window_right, numbers.softcap, numbers.undropped,
        *(1,) * pad, *shape[outer:], *(1,) * pad, *reduce[outer:],
        numbers.num_heads, numbers.num_heads_k, numbers.seqlen_q, numbers.seqlen_k,
        numbers.head_dim, numbers.head_dim_v, numbers.section, numbers.drop_below, numbers.bottom_right,
        *(numbers.packed or (0, 0)), numbers.tile_shift,
    )  # fmt: skip
    for args, n, lengths, steps in arguments:
        pack_layout(packed, _argument(args, n), lengths, steps)
    walks = itertools.product(*(range(n) for n in shape[:outer]))
    offsets = tuple(
        tuple(itemsize * sum(map(operator.mul, index, strides[name])) for name, _, itemsize in tensors)
        + (0,) * len(arguments)
        for index in walks
    )
    slots = tuple((name, TENSORS.index(name) * _TENSOR.size // 8) for name, _, _ in tensors)
    slots += tuple((argument_name(args, n), _argument(args, n) // 8) for args, n, _, _ in arguments)
    inner_strides = tuple((name, s[outer:]) for name, s in strides.items())
    entries = math.prod(shape[outer:]) * math.prod(reduce[outer:])
    return Template(bytes(packed), slots, offsets, shape[outer:], inner_strides, entries)


def _argument(args: str, n: int) -> int:
    """Where the n-th of score_args or mask_args lies, in bytes; a gradient lies where its argument would."""
    args = "score_args" if args == GRADIENT_ARGS else args
    return _FUNCTIONS + FUNCTIONS.index(args) * FUNCTION_ARGS_BYTES + argument_slot(n)


def collapse(
    batch_shape: tuple[int, ...], reduce_shape: tuple[int, ...], strides: Mapping[str, Strides]
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Strides]]:
    """Merge neighbouring leading axes that every tensor walks as one, and drop axes of length 1."""
    axes = [i for i, (n, r) in enumerate(zip(batch_shape, reduce_shape, strict=True)) if n * r != 1]
    merged: list[list[int]] = []
    for axis in axes:
        before = merged[-1][-1] if merged else None
        if before is not None and _one_walk(before, axis, batch_shape, reduce_shape, strides):
            merged[-1].append(axis)
        else:
            merged.append([axis])
    shape = tuple(math.prod(batch_shape[i] for i in group) for group in merged)
    reduce = tuple(math.prod(reduce_shape[i] for i in group) for group in merged)
    tail = len(batch_shape)
    kept = {name: tuple(s[group[-1]] for group in merged) + s[tail:] for name, s in strides.items()}
    return shape, reduce, kept


def _one_walk(
    i: int, j: int, shape: tuple[int, ...], reduce: tuple[int, ...], strides: Mapping[str, Strides]
) -> bool:
    """Whether axes i and j = i's successor act as one axis: strides nest, and both are kept or both summed."""
    if (reduce[i] == 1) == (reduce[j] == 1):
        return all(s[i] == s[j] * shape[j] * reduce[j] for s in strides.values())
    return False

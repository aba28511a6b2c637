"""A call on packed sequences: where each begins, how long the longest is, and the Problem that they make.

Sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1] of the packed array. What the host knows of these offsets is
checked; offsets on a device are not looked at unless somebody must know the longest sequence, and kernels cut them to
what the arrays hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ._arrays import Array, check_beside, import_cupy, is_cupy, on_device, take
from ._call import Call
from ._functions import Functions, args_of
from ._options import Asked, Shape, lengths_are_checked, read_options
from ._problem import pack_problem, read_problem


class Offsets(NamedTuple):
    """cu_seqlens of one side, as they came, and what is known of them."""

    name: str  # of the argument
    given: Array
    known: np.ndarray | None  # the numbers, where the host has them
    longest: int  # the longest sequence, or a bound on it


class PackedCall(Call):
    """q, k, v of packed sequences, with where these begin.

    ``problem`` is that of a batch of sequences, each of lengths of its own; ``Options.packed`` has the rows of the
    packed arrays, which are canonical as (heads, rows, columns).
    """

    def __init__(
        self,
        q: Any,
        k: Any,
        v: Any,
        asked: Asked,
        cu_seqlens: tuple[Any, Any],
        max_seqlens: tuple[Any, Any],
        beside: dict[str, Array] | None = None,
        out: Array | None = None,
        device: object = None,
    ) -> None:
        self._cu_seqlens, self._max_seqlens = cu_seqlens, max_seqlens
        super().__init__(q, k, v, asked, beside=beside, out=out, device=device)

    def _read_problem(
        self, asked: Asked, arrays: dict[str, Array], functions: Functions | None, out_dtype: np.dtype | None
    ) -> None:
        """The problem of the packed arrays, and then that of their sequences."""
        for name in ("q", "k", "v"):
            if len(shape := self.inputs[name].shape) != 3:
                raise ValueError(f"{name}.shape={shape}: packed sequences have 3 axes, (rows, heads, head_dim)")
        q, k = self.inputs["q"], self.inputs["k"]
        rows = read_problem(
            q, k, self.inputs["v"], scale=asked.scale, causal=asked.causal, q_offset=None, layout="shd",
            precision=asked.precision, out_dtype=out_dtype,
        )  # fmt: skip
        given = zip("qk", self._cu_seqlens, self._max_seqlens, (len(q), len(k)), strict=True)
        sides = [read_offsets(*side, self.place) for side in given]
        sizes = [len(side.given) for side in sides]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"cu_seqlens_q has {sizes[0]} numbers, cu_seqlens_k {sizes[1]}: both have one more than sequences"
            )
        batch, seqlens = sizes[0] - 1, (sides[0].longest, sides[1].longest)
        traced: dict[str, Any] = {}
        if functions is not None:
            shapes = tuple(x.shape for x in args_of("score_args", functions.arrays))
            traced = {"score": functions.score, "score_shapes": shapes, "mask_function": functions.mask}
        options = read_options(asked, arrays, Shape((batch,), rows.num_heads, *seqlens), **traced)
        options = replace(options, packed=(len(q), len(k)))
        self.problem = pack_problem(rows, batch, seqlens, asked.causal, asked.q_offset, options)
        self._take_integers(asked, arrays, options)
        if functions is not None:
            self._take_functions(functions, self.problem)
        for side in sides:
            self.inputs[side.name] = _where_it_is_read(side, self.place)

    def beside(self) -> dict[str, Array]:
        """What options bring, and the offsets; for the CPU path lengths too."""
        found = super().beside()
        for name, lens in (("cu_seqlens_q", "q_lens"), ("cu_seqlens_k", "kv_lens")):
            found[name] = self.inputs[name]
            if self.place is None:
                found[lens] = np.diff(found[name])
        return found


def read_offsets(side: str, cu_seqlens: object, max_seqlen: object, total: int, where: int | None) -> Offsets:
    """cu_seqlens of one side ("q" or "k"), whose packed array has ``total`` rows, as far as the host may look at it."""
    name = f"cu_seqlens_{side}"
    x = take(name, cu_seqlens)
    if x.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        raise TypeError(f"{name}.dtype={x.dtype}: offsets are int32 or int64")
    if x.ndim != 1 or not x.size:
        raise ValueError(f"{name}.shape={x.shape}: offsets are one axis of at least one number, the first 0")
    check_beside(name, x, where)
    longest = _read_max(f"max_seqlen_{side}", max_seqlen)
    known: np.ndarray | None = x if isinstance(x, np.ndarray) else None
    if known is None and (longest is None or lengths_are_checked()):
        known = x.get()
    if known is None:
        assert longest is not None
        return Offsets(name, x, None, longest)
    known = known.astype(np.int64)
    found = _check_offsets(name, known, side, total)
    if longest is not None and longest < found:
        raise ValueError(f"max_seqlen_{side}={longest}: the longest sequence of {name} has {found} rows")
    return Offsets(name, x, known, found if longest is None else longest)


def _read_max(name: str, max_seqlen: object) -> int | None:
    if max_seqlen is None:
        return None
    if isinstance(max_seqlen, (bool, np.bool_)) or not isinstance(max_seqlen, (int, np.integer)):
        raise TypeError(f"{name}={max_seqlen!r}: {name} is an integer or None")
    if max_seqlen < 0:
        raise ValueError(f"{name}={int(max_seqlen)}: no sequence is shorter than 0")
    return int(max_seqlen)


def _check_offsets(name: str, known: np.ndarray, side: str, total: int) -> int:
    """The longest sequence; ValueError unless offsets ascend from 0 to at most ``total``."""
    if known[0] != 0:
        raise ValueError(f"{name}[0]={known[0]}: the first sequence begins at row 0")
    lengths = np.diff(known)
    if (lengths < 0).any():
        b = int(np.argmax(lengths < 0))
        raise ValueError(f"{name}[{b}]={known[b]}, {name}[{b + 1}]={known[b + 1]}: offsets do not fall")
    if known[-1] > total:
        raise ValueError(f"{name}[-1]={known[-1]}: {side} has {total} rows ({side}.shape[0])")
    return int(lengths.max(initial=0))


def _where_it_is_read(side: Offsets, where: int | None) -> Array:
    """int64 on the host. On a device int32, the low words of what came: no row that exists has a larger number."""
    if where is None:
        return side.known
    with on_device(where):
        cupy = import_cupy()
        if is_cupy(side.given):
            return cupy.ndarray(side.given.shape, np.int32, side.given.data, side.given.strides)
        return cupy.asarray(side.known, np.int32)

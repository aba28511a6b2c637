"""Partial results over disjoint keys become the result over all of them; and the gradients of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _cpu_merge
from ._arrays import DTYPES, Array, import_cupy, on_device, same_place, take
from ._problem import LAYOUTS, check_output
from ._results import AttentionResult, as_given, split_out


class MergeGradients(NamedTuple):
    """Gradients of ``merge_attention``: tuples with one array for each part."""

    douts: tuple[Any, ...]
    dlses: tuple[Any, ...]


def merge_attention(outs: Any, lses: Any, *, layout: str = "hsd", out: Any = None) -> AttentionResult:
    """Merge results of the same queries over disjoint sets of keys into the result over all these keys.

    Parameters
    ----------
    outs : sequence of arrays, each of shape (..., Hq, Sq, Dv)
        What ``attention(..., return_lse=True)`` gave for each part of the keys: float16, bfloat16, float32 or float64,
        all of one dtype. float32 parts (``attention(..., out=)`` of 16-bit q) lose nothing to rounding. An array with
        one more axis in front is a sequence of its parts. A 2-D array is one head.
    lses : sequence of arrays, each of shape (..., Hq, Sq)
        Their lse, float32 (float64 for float64). A part that has seen no key has lse -inf, and its out is not used.
    layout : "hsd" or "shd"
        Order of the last three axes of each out, as for ``attention``.
    out : array or pair of arrays, optional
        Where to write: out, or (out, lse). out has the dtype of the parts; for 16-bit parts it may be float32, for
        float32 parts float16 or bfloat16. No element is shared with an input.

    Returns
    -------
    AttentionResult
        (out, lse), in the shapes of the parts. A row that no part has seen a key for has out 0 and lse -inf.

    Raises
    ------
    ValueError, TypeError
        Shapes, values and dtypes that do not fit, before anything runs.

    Notes
    -----
    With w_n = exp(lse_n - lse) and lse = log(sum of exp(lse_n)), out is the sum of w_n out_n: the last step of
    FlashDecoding, Dao, Haziza, Massa and Sizov (2023). Each part counts its keys as ``attention`` does: causal, window
    and ALiBi need a ``q_offset`` less the first key of the part; bias, mask and segments their own columns. What knows
    a key by its place in the whole (dropout, score and mask functions) sees another place in a part. ``sinks`` belong
    to one part alone. Parts are added up in their order.

    Examples
    --------
    >>> import numpy as np
    >>> from cupyflash import attention, merge_attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 6, 8))
    >>> parts = [attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 4), slice(4, 6))]
    >>> out, lse = merge_attention(*zip(*parts))
    >>> bool(np.allclose(out, attention(q, k, v)))
    True
    """
    parts = Parts(outs, lses, layout)
    ours, lse = split_out(out)
    inputs = parts.inputs()
    if ours is not None:
        same_place({"outs[0]": parts.outs[0], "out": ours} | ({} if lse is None else {"out[1]": lse}))
        check_output("out", ours, parts.outs[0].shape, parts.out_dtypes(), inputs)
        if lse is not None:
            check_output("out[1] (lse)", lse, parts.lses[0].shape, {parts.accumulator}, {**inputs, "out[0]": ours})
    ours = parts.empty_like(parts.outs[0]) if ours is None else ours
    lse = parts.empty_like(parts.lses[0]) if lse is None else lse
    if parts.place is None:
        _cpu_merge.merge(parts.canonical(parts.outs), parts.lses, parts.canonical((ours,))[0], lse)
    else:
        from . import _launch_merge

        _launch_merge.merge(parts.place, parts.canonical(parts.outs), parts.lses, parts.canonical((ours,))[0], lse)
    result: AttentionResult = as_given(out, ours, lse, True)
    return result


def merge_attention_backward(
    dout: Any, outs: Any, lses: Any, out: Any, lse: Any, *, dlse: Any = None, layout: str = "hsd"
) -> MergeGradients:
    """Gradients of ``merge_attention`` with respect to each part's out and lse.

    With them, ``attention_backward`` of each part (its dout, and its dlse) gives what that of all keys gives.

    Parameters
    ----------
    dout : array, shape of out
        Gradient of a scalar with respect to the merged out, in out's dtype.
    outs, lses, layout
        What ``merge_attention`` was called with.
    out, lse : array
        What it returned; out may be of any dtype that it may be written in.
    dlse : array, shape of lse, optional
        Gradient of the scalar with respect to the merged lse. It is not read where lse is -inf.

    Returns
    -------
    MergeGradients
        (douts, dlses): tuples of new arrays, in the shapes and dtypes of the parts. 0 where a part's lse is -inf.

    Raises
    ------
    ValueError, TypeError
        As for ``merge_attention``.

    Notes
    -----
    dout_n = w_n dout and dlse_n = w_n (dout . out_n - delta), delta = dout . out - dlse.
    """
    parts = Parts(outs, lses, layout)
    beside = {"dout": take("dout", dout), "out": take("out", out), "lse": take("lse", lse)}
    if dlse is not None:
        beside["dlse"] = take("dlse", dlse)
    same_place(parts.inputs() | beside)
    parts.check_results(beside)
    douts = tuple(map(parts.empty_like, parts.outs))
    dlses = tuple(map(parts.empty_like, parts.lses))
    (canonical_dout, canonical_out), given_dlse = parts.canonical((beside["dout"], beside["out"])), beside.get("dlse")
    arguments = (
        canonical_dout, parts.canonical(parts.outs), parts.lses, canonical_out, beside["lse"], given_dlse,
        parts.canonical(douts), dlses,
    )  # fmt: skip
    if parts.place is None:
        _cpu_merge.merge_backward(*arguments)
    else:
        from . import _launch_merge

        _launch_merge.merge_backward(parts.place, *arguments)
    return MergeGradients(douts, dlses)


class Parts:
    """The partial results of one call, checked.

    Attributes
    ----------
    place : int or None
        The CUDA device that holds them; None for host memory.
    """

    def __init__(self, outs: Any, lses: Any, layout: object) -> None:
        if not (isinstance(layout, str) and layout in LAYOUTS):
            raise ValueError(f"layout={layout!r}: layout is {' or '.join(map(repr, LAYOUTS))}")
        self.layout = layout
        self.outs, self.lses = _sequence("outs", outs), _sequence("lses", lses)
        if not self.outs or len(self.outs) != len(self.lses):
            raise ValueError(f"{len(self.outs)} outs and {len(self.lses)} lses: one lse for each, at least one part")
        self.place = same_place(self.inputs())
        first = self.outs[0]
        if first.dtype not in DTYPES:
            raise TypeError(f"outs[0].dtype={first.dtype}: parts are float16, bfloat16, float32 or float64")
        if first.ndim < 2:
            raise ValueError(f"outs[0].ndim={first.ndim}: a part has 2 axes (one head) or more, {LAYOUTS[layout]}")
        self.accumulator = np.dtype(np.float64 if first.dtype == np.float64 else np.float32)
        for n, (x, x_lse) in enumerate(zip(self.outs, self.lses, strict=True)):
            self._check(n, x, x_lse)

    def _check(self, n: int, x: Array, x_lse: Array) -> None:
        first = self.outs[0]
        if x.shape != first.shape:
            raise ValueError(f"outs[{n}].shape={x.shape}, outs[0].shape={first.shape}: parts have one shape")
        if x.dtype != first.dtype:
            raise TypeError(f"outs[{n}].dtype={x.dtype}, outs[0].dtype={first.dtype}: parts share one dtype")
        shape = self.canonical((first,))[0].shape[:-1]
        if x_lse.shape != shape:
            raise ValueError(f"lses[{n}].shape={x_lse.shape}: with outs[0].shape={first.shape} it is {shape}")
        if x_lse.dtype != self.accumulator:
            raise TypeError(f"lses[{n}].dtype={x_lse.dtype}: with outs of {first.dtype} it is {self.accumulator}")

    def check_results(self, beside: dict[str, Array]) -> None:
        """dout, out, lse and dlse against the parts."""
        shape, lse_shape = self.outs[0].shape, self.lses[0].shape
        for name, x in beside.items():
            wanted = lse_shape if "lse" in name else shape
            if x.shape != wanted:
                raise ValueError(f"{name}.shape={x.shape}: these parts give it the shape {wanted}")
            if "lse" in name and x.dtype != self.accumulator:
                raise TypeError(f"{name}.dtype={x.dtype}: with outs of {self.outs[0].dtype} it is {self.accumulator}")
        for name in ("dout", "out"):
            if beside[name].dtype not in self.out_dtypes():
                raise TypeError(f"{name}.dtype={beside[name].dtype}: expected {_names(self.out_dtypes())}")
        dout_dtype, out_dtype = beside["dout"].dtype, beside["out"].dtype
        if dout_dtype != out_dtype:
            raise TypeError(f"dout.dtype={dout_dtype}, out.dtype={out_dtype}: these share one dtype")

    def inputs(self) -> dict[str, Array]:
        """All parts by name."""
        named = {f"outs[{n}]": x for n, x in enumerate(self.outs)}
        return named | {f"lses[{n}]": x for n, x in enumerate(self.lses)}

    def out_dtypes(self) -> set[np.dtype]:
        """What the merged out may be written in."""
        own = self.outs[0].dtype
        return {own} if own == np.float64 else {own, *DTYPES[:3]} if own == np.float32 else {own, np.dtype(np.float32)}

    def canonical(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Outs as (..., heads, rows, columns), or (rows, columns): with the axes of lse, then columns."""
        return tuple(x if self.layout == "hsd" or x.ndim == 2 else x.swapaxes(-3, -2) for x in arrays)

    def empty_like(self, x: Array) -> Array:
        """A new array of x's shape and dtype where the parts lie."""
        if self.place is None:
            return np.empty(x.shape, x.dtype)
        with on_device(self.place):
            return import_cupy().empty(x.shape, x.dtype)


def _sequence(name: str, given: Any) -> tuple[Array, ...]:
    """The arrays of a sequence, or along the first axis of an array."""
    if isinstance(given, (tuple, list)):
        return tuple(take(f"{name}[{n}]", x) for n, x in enumerate(given))
    x = take(name, given)
    if x.ndim == 0:
        raise ValueError(f"{name}.ndim=0: an array of parts has an axis for them in front")
    return tuple(x[n] for n in range(len(x)))


def _names(dtypes: set[np.dtype]) -> str:
    return " or ".join(sorted(map(str, dtypes)))

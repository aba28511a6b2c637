"""From arguments to a Problem: shapes, dtypes and options, read once; every user-facing error about them.

A Problem is hashable and holds no array. ``canonical`` is the one place that knows about 2-D input and layouts:
behind it every array is ``(*leading, heads, rows, columns)``, and lse, dlse are ``(*leading, heads, rows)``.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ._arrays import DTYPES, Array, broadcasts_to, elements_overlap, misaligned, share_memory
from ._options import PLAIN, Options, read_real

LAYOUTS = {"hsd": "(..., heads, seqlen, head_dim)", "shd": "(..., seqlen, heads, head_dim)"}
GRADIENTS = ("q", "k", "v", "bias", "sinks", "score_args")  # what wrt= may name, in AttentionGradients' order


@dataclass(frozen=True)
class Problem:
    """One attention problem, without its arrays.

    Attributes
    ----------
    dtype, out_dtype : numpy.dtype
        Of q, k, v and dout; of out (float32 where ``out=`` asked for it with 16-bit q).
    batch_shape : tuple of int
        The leading axes of q, k, v, broadcast.
    leading : tuple of (str, tuple of int)
        The leading axes of each of q, k, v, as they came.
    single_head : bool
        q, k, v came as 2-D arrays, so results have no head axis.
    q_offset : int or None
        Query row i sits on key i + q_offset. None: one offset for each batch entry, in an array beside.
    options : Options
    bottom_right : bool
        Entries with lengths of their own: q_offset is for entries of full length; in each one the last query that it
        has sits on its last key.
    """

    dtype: np.dtype
    out_dtype: np.dtype
    batch_shape: tuple[int, ...]
    leading: tuple[tuple[str, tuple[int, ...]], ...]
    single_head: bool
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    scale: float
    causal: bool
    q_offset: int | None
    layout: str
    precision: str | None
    options: Options = PLAIN
    bottom_right: bool = False

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: every call looks up what is prepared for its problem."""
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @cached_property
    def accumulator(self) -> np.dtype:
        """What products, softmax and lse are computed in: float64 for float64, float32 for all others."""
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)

    @cached_property
    def splits_p(self) -> bool:
        """Whether P and dS may not be rounded to 16 bits once: tensor cores take them in two parts."""
        return self.dtype.itemsize == 2 and self.precision == "highest"

    @cached_property
    def batch(self) -> int:
        """Number of batch entries: the product of batch_shape."""
        return math.prod(self.batch_shape)

    def tail(self, name: str) -> tuple[int, int, int]:
        """Heads, rows and columns of "q", "k", "v" or "dout"."""
        return {
            "q": (self.num_heads, self.seqlen_q, self.head_dim),
            "k": (self.num_heads_k, self.seqlen_k, self.head_dim),
            "v": (self.num_heads_k, self.seqlen_k, self.head_dim_v),
            "dout": (self.num_heads, self.seqlen_q, self.head_dim_v),
        }[name]

    def rows_of(self, name: str) -> int:
        """Rows of the array "q", "k", "v" or "dout", in which packed sequences lie one behind the other."""
        packed = self.options.packed
        return self.tail(name)[1] if packed is None else packed[name in ("k", "v")]

    @cached_property
    def broadcast(self) -> frozenset[str]:
        """Which of q, k, v are shared by several batch entries, so that their gradients are sums over them."""
        return frozenset(name for name, lead in self.leading if math.prod(lead) != self.batch)

    @cached_property
    def bias_shape(self) -> tuple[int, ...]:
        """The bias's own shape with all axes of (*batch_shape, heads, seqlen_q, seqlen_k); 1 where it is broadcast."""
        shape = () if self.options.bias is None else self.options.bias.shape
        return (1,) * (len(self.batch_shape) + 3 - len(shape)) + shape

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of out and dout, in the user's layout."""
        if self.options.packed is not None:
            return (self.options.packed[0], self.num_heads, self.head_dim_v)
        if self.single_head:
            return (self.seqlen_q, self.head_dim_v)
        if self.layout == "hsd":
            return (*self.batch_shape, self.num_heads, self.seqlen_q, self.head_dim_v)
        return (*self.batch_shape, self.seqlen_q, self.num_heads, self.head_dim_v)

    @cached_property
    def lse_shape(self) -> tuple[int, ...]:
        """Shape of lse and dlse, in every layout."""
        if self.options.packed is not None:
            return (self.num_heads, self.options.packed[0])
        return (self.seqlen_q,) if self.single_head else (*self.batch_shape, self.num_heads, self.seqlen_q)

    @cached_property
    def comes_canonical(self) -> bool:
        """Whether ``canonical`` and ``canonical_lse`` return what they get."""
        return self.layout == "hsd" and not self.single_head

    def canonical(self, x: Array) -> Array:
        """View q, k, v, out, dout or a gradient as (*leading, heads, rows, columns)."""
        if self.single_head:
            return x[None]
        return x if self.layout == "hsd" else x.swapaxes(-3, -2)

    def canonical_lse(self, x: Array) -> Array:
        """View lse or dlse as (*leading, heads, rows)."""
        return x[None] if self.single_head else x


def read_problem(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: object,
    causal: object,
    q_offset: object,
    layout: object,
    precision: object,
    out_dtype: np.dtype | None = None,
) -> Problem:
    """The Problem of q, k, v and options; ValueError or TypeError, with value and rule, where there is none.

    Options are checked when a call with the same ones, of the same types, comes for the first time.
    """
    diagonal = None if q_offset is None else _diagonal(q_offset)
    arguments = (
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, out_dtype, scale, causal, diagonal, layout, precision
    )  # fmt: skip
    try:
        return _read_problem(*arguments)
    except TypeError:  # a wrong option, or one that has no hash
        pass
    return _read_problem.__wrapped__(*arguments)


@lru_cache(maxsize=4096, typed=True)
def _read_problem(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    q_dtype: np.dtype,
    k_dtype: np.dtype,
    v_dtype: np.dtype,
    out_dtype: np.dtype | None,
    scale: object,
    causal: object,
    q_offset: int | tuple[int, ...] | None,
    layout: object,
    precision: object,
) -> Problem:
    scale = None if scale is None else _finite_real("scale", scale)
    causal, layout, precision = _causal(causal), _layout(layout), _precision(precision)
    _check_dtypes({"q": q_dtype, "k": k_dtype, "v": v_dtype})
    _check_precision(precision, q_dtype)
    lead_q, (hq, sq, d) = _split("q", q_shape, layout)
    lead_k, (hk, sk, dk) = _split("k", k_shape, layout)
    lead_v, (hv, sv, dv) = _split("v", v_shape, layout)
    if len({len(q_shape) == 2, len(k_shape) == 2, len(v_shape) == 2}) > 1:
        raise ValueError(
            f"q.ndim={len(q_shape)}, k.ndim={len(k_shape)}, v.ndim={len(v_shape)}: a 2-D array is one head "
            "without a head axis, so q, k, v are all 2-D or none is"
        )
    _check_widths(q_shape, k_shape, v_shape, d, dk, dv)
    if sk != sv:
        raise ValueError(f"k has {sk} rows, v has {sv} (k.shape={k_shape}, v.shape={v_shape}): each key has one value")
    if hk != hv:
        raise ValueError(f"k has {hk} heads, v has {hv} (k.shape={k_shape}, v.shape={v_shape}): they share heads")
    if hk == 0 or hq == 0 or hq % hk:
        raise ValueError(
            f"q has {hq} heads, k and v have {hk} (q.shape={q_shape}, k.shape={k_shape}): the number of query "
            "heads is a positive multiple of the number of key heads"
        )
    try:
        batch_shape = np.broadcast_shapes(lead_q, lead_k, lead_v)
    except ValueError:
        raise ValueError(
            f"leading axes {lead_q} of q, {lead_k} of k and {lead_v} of v do not broadcast together "
            f"(layout {layout!r} is {LAYOUTS[layout]})"
        ) from None
    return Problem(
        dtype=q_dtype,
        out_dtype=q_dtype if out_dtype is None else out_dtype,
        batch_shape=batch_shape,
        leading=(("q", lead_q), ("k", lead_k), ("v", lead_v)),
        single_head=len(q_shape) == 2,
        num_heads=hq,
        num_heads_k=hk,
        seqlen_q=sq,
        seqlen_k=sk,
        head_dim=d,
        head_dim_v=dv,
        scale=1.0 / math.sqrt(d) if scale is None else scale,
        causal=bool(causal),
        q_offset=_resolve_offset(q_offset, causal, sq, sk, batch_shape),
        layout=layout,
        precision=precision,
    )


def pack_problem(
    problem: Problem, batch: int, seqlens: tuple[int, int], causal: object, q_offset: object, options: Options
) -> Problem:
    """The Problem of ``batch`` sequences of at most ``seqlens`` queries and keys, from that of their packed arrays."""
    offset = _resolve_offset(_diagonal(q_offset), _causal(causal), *seqlens, (batch,))
    return replace(
        problem,
        batch_shape=(batch,),
        leading=tuple((name, (batch,)) for name, _ in problem.leading),
        seqlen_q=seqlens[0],
        seqlen_k=seqlens[1],
        q_offset=offset,
        options=options,
        bottom_right=q_offset is None and causal != "top_left",
    )


def _split(name: str, shape: tuple[int, ...], layout: str) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Leading axes and (heads, rows, columns)."""
    if len(shape) == 2:
        return (), (1, shape[0], shape[1])
    if len(shape) < 2:
        raise ValueError(f"{name}.ndim={len(shape)}: {name} has 2 axes (one head) or more, {LAYOUTS[layout]}")
    heads, rows = (shape[-3], shape[-2]) if layout == "hsd" else (shape[-2], shape[-3])
    return shape[:-3], (heads, rows, shape[-1])


def _check_dtypes(dtypes: dict[str, np.dtype]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise TypeError(
                f"{name}.dtype={dtype.str if dtype.byteorder in '<>' else dtype}: attention takes float16, "
                "bfloat16 (ml_dtypes), float32 and float64 in the machine's byte order"
            )
    if len(set(dtypes.values())) > 1:
        text = ", ".join(f"{name}.dtype={dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{text}: these share one dtype; convert with astype")


def _check_widths(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], v_shape: tuple[int, ...], d: int, dk: int, dv: int
) -> None:
    if d != dk:
        raise ValueError(f"q.shape[-1]={d}, k.shape[-1]={dk}: queries and keys have the same width")
    for name, shape in (("q", q_shape), ("v", v_shape)):
        if shape[-1] == 0:
            raise ValueError(f"{name}.shape[-1]=0 ({name}.shape={shape}): the head width is at least 1")


def _finite_real(name: str, x: object) -> float:
    value = read_real(name, x, "a real number or None")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: {name} is finite")
    return value


def _causal(causal: object) -> bool | str:
    if isinstance(causal, (bool, np.bool_)):
        return bool(causal)
    if isinstance(causal, str) and causal == "top_left":
        return "top_left"
    raise ValueError(f'causal={causal!r}: causal is False, True (bottom-right) or "top_left"')


def _layout(layout: object) -> str:
    if isinstance(layout, str) and layout in LAYOUTS:
        return layout
    text = " or ".join(f'"{name}" {axes}' for name, axes in LAYOUTS.items())
    raise ValueError(f"layout={layout!r}: layout is {text}")


def _precision(precision: object) -> str | None:
    if precision is None or (isinstance(precision, str) and precision in ("highest", "ieee")):
        return precision
    raise ValueError(f'precision={precision!r}: precision is None, "highest" or "ieee"')


def _check_precision(precision: str | None, dtype: np.dtype) -> None:
    allowed = {8: (None,), 4: (None, "highest", "ieee"), 2: (None, "highest")}[dtype.itemsize]
    if precision not in allowed:
        raise ValueError(f"precision={precision!r} with {dtype}: {dtype} takes {' or '.join(map(repr, allowed))}")


def _diagonal(q_offset: object) -> int | tuple[int, ...] | None:
    """An integer offset, or the shape of an array of them."""
    if q_offset is None:
        return None
    if isinstance(q_offset, (int, np.integer)) and not isinstance(q_offset, bool):
        value = int(q_offset)
        if abs(value) >= 2**62:
            raise ValueError(f"q_offset={value}: q_offset lies between -2**62 and 2**62")
        return value
    dtype = getattr(q_offset, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind in "iu":
        return tuple(q_offset.shape)  # type: ignore[attr-defined]
    raise TypeError(f"q_offset={q_offset!r}: q_offset is an integer or an integer array over the leading axes")


def _resolve_offset(
    q_offset: int | tuple[int, ...] | None, causal: bool | str, sq: int, sk: int, batch_shape: tuple[int, ...]
) -> int | None:
    if q_offset is not None and causal == "top_left":
        raise ValueError(
            'causal="top_left" together with q_offset: both place the diagonal; pass causal=True with q_offset'
        )
    if q_offset is None:
        return 0 if causal == "top_left" else sk - sq
    if isinstance(q_offset, int):
        return q_offset
    if not broadcasts_to(q_offset, batch_shape):
        raise ValueError(f"q_offset.shape={q_offset} does not broadcast to the leading axes {batch_shape}")
    return None


def check_out(problem: Problem, out: Array, lse: Array | None, inputs: dict[str, Array]) -> None:
    """Check the arrays of ``out=``: shape, dtype, writeable, no element twice, none shared with an input."""
    allowed = {problem.dtype} if problem.dtype.itemsize > 2 else {problem.dtype, np.dtype(np.float32)}
    check_output("out", out, problem.out_shape, allowed, inputs)
    if lse is not None:
        check_output("out[1] (lse)", lse, problem.lse_shape, {problem.accumulator}, {**inputs, "out[0]": out})


def check_gradient_out(name: str, x: Array, like: Array, inputs: dict[str, Array]) -> None:
    """Check one array of ``grads_out=`` against the input that it is the gradient of."""
    check_output(f"grads_out.d{name}", x, like.shape, {like.dtype}, inputs)


def check_output(name: str, x: Array, shape: tuple[int, ...], dtypes: set[np.dtype], inputs: dict[str, Array]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}.shape={x.shape}: this call's result has shape {shape}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}.dtype={x.dtype}: expected {' or '.join(sorted(map(str, dtypes)))}")
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ValueError(f"{name} is read-only (flags.writeable=False): results are written into it")
    if not isinstance(x, np.ndarray) and (why := misaligned(x)):
        raise ValueError(f"{name}: {why}, and kernels write whole elements")
    if elements_overlap(x):
        raise ValueError(f"{name}.strides={x.strides} with shape {x.shape}: two of its elements share memory")
    for other, y in inputs.items():
        if share_memory(x, y):
            raise ValueError(f"{name} shares memory with {other}: a result never overwrites an input")


def check_results(problem: Problem, inputs: dict[str, Array]) -> None:
    """Check dout, out, lse and dlse (where given) of a backward call against the problem of q, k, v."""
    dout, out = inputs["dout"], inputs["out"]
    sums = {name: inputs[name] for name in ("lse", "dlse") if name in inputs}
    shapes: dict[str, tuple[int, ...]] = {"dout": problem.out_shape, "out": problem.out_shape}
    shapes |= dict.fromkeys(sums, problem.lse_shape)
    for name, shape in shapes.items():
        if inputs[name].shape != shape:
            raise ValueError(f"{name}.shape={inputs[name].shape}: q, k, v give {name} the shape {shape}")
    if dout.dtype != problem.dtype:
        raise TypeError(f"dout.dtype={dout.dtype}, q.dtype={problem.dtype}: these share one dtype")
    if out.dtype != problem.dtype and not (problem.dtype.itemsize == 2 and out.dtype == np.float32):
        raise TypeError(f"out.dtype={out.dtype}: expected q's dtype {problem.dtype}, or float32 for 16-bit q")
    for name, x in sums.items():
        if x.dtype != problem.accumulator:
            raise TypeError(f"{name}.dtype={x.dtype}: with q.dtype={problem.dtype} it is {problem.accumulator}")


def read_wrt(wrt: object, given: Container[str] = ("q", "k", "v")) -> frozenset[str]:
    """The inputs whose gradients are asked for, out of those that are given."""
    if wrt is None:
        return frozenset(name for name in GRADIENTS if name in given)
    if isinstance(wrt, str) or not isinstance(wrt, (tuple, list, set, frozenset)):
        raise TypeError(f"wrt={wrt!r}: wrt is None or a tuple of names out of {GRADIENTS}")
    names: list[Any] = list(wrt)
    for name in names:
        if name not in GRADIENTS:
            raise ValueError(f"wrt={wrt!r} holds {name!r}: gradients exist for {GRADIENTS}")
        if name not in given:
            raise ValueError(f"wrt={wrt!r} holds {name!r}, and the call has no {name}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"wrt={wrt!r}: name at least one of {GRADIENTS}, each once")
    return frozenset(names)

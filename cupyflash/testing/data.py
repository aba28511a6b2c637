"""Named data sets, arrays with poison around them, and random problems: what tests and `selftest` draw.

Everything here is a function of a `numpy.random.Generator` or of a `Pick`, so that one seed replays it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .functions import MASKS, SCORES, Sizes
from .reference import sum_to

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Pick = Callable[[int], int]  # pick(n) is an integer in [0, n); 0 is the simplest choice

DTYPES = tuple(np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))


# -------------------------------------------------------------------------------------------- named data sets


class Inputs(NamedTuple):
    """q, k, v and the cotangents dout and dlse of one problem, canonical: (..., heads, seqlen, dim)."""

    q: Array
    k: Array
    v: Array
    dout: Array
    dlse: Array


class Shapes(NamedTuple):
    """The shapes of `Inputs`."""

    q: Shape
    k: Shape
    v: Shape
    dout: Shape

    @property
    def dlse(self) -> Shape:
        return self.dout[:-1]


DataSet = Callable[[np.random.Generator, Shapes], Inputs]
DATA_SETS: dict[str, DataSet] = {}
#: Data sets of independent random elements, on which the bounds without N hold (`bounds.RANDOM`).
RANDOM_SETS = ("normal", "log_normal", "outlier_channels", "large_logits")
#: Data sets that need more range than 16-bit types or float16 have.
WIDE_SETS = ("ranges", "outlier_row", "subnormal")


def named(make: DataSet) -> DataSet:
    """Register a data set under its function's name."""
    DATA_SETS[make.__name__] = make
    return make


def draw(name: str, rng: np.random.Generator, shapes: Shapes, dtype: npt.DTypeLike) -> Inputs:
    """The data set `name`, rounded to `dtype` (dlse to the accumulator's type)."""
    inputs = DATA_SETS[name](rng, shapes)
    log_sum = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    q, k, v, dout = (a.astype(dtype) for a in inputs[:4])
    return Inputs(q, k, v, dout, inputs.dlse.astype(log_sum))


def suits(name: str, dtype: npt.DTypeLike) -> bool:
    """Whether the data set's numbers fit `dtype`."""
    return name not in WIDE_SETS or np.dtype(dtype).itemsize > 2


@named
def normal(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """Standard normal elements."""
    return Inputs(*(rng.standard_normal(shape) for shape in (*shapes, shapes.dlse)))


@named
def zeros(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """q = 0: every visible key has the same weight."""
    return normal(rng, shapes)._replace(q=np.zeros(shapes.q))


@named
def constant(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """Every array one number, so that rounding errors do not cancel in any sum."""
    return Inputs(*(np.full(shape, rng.uniform(0.1, 2)) for shape in (*shapes, shapes.dlse)))


@named
def large_logits(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """Logits of +-1e4: nearly one-hot rows, where errors of a logit are largest."""
    x = normal(rng, shapes)
    return x._replace(q=100 * x.q, k=100 * x.k)


@named
def one_hot(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """Row i gives all its weight to one key: its own k, many times."""
    x = normal(rng, shapes)
    sharp = 40 * x.k / np.maximum(np.linalg.norm(x.k, axis=-1, keepdims=True), 1e-6)
    q = rng.standard_normal(shapes.q)
    if 0 not in shapes.k:
        pick = rng.integers(shapes.k[-2], size=shapes.q[-2])
        q = q * 0.01 + np.broadcast_to(sharp[(0,) * (sharp.ndim - 2)][pick], shapes.q)
    return x._replace(q=q, k=sharp)


@named
def near_ties(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """All keys the same up to a few units in the last place."""
    x = normal(rng, shapes)
    return x._replace(k=np.full(shapes.k, 0.75) * (1 + 1e-3 * rng.integers(-2, 3, shapes.k)))


@named
def rising(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """Logits that grow with the key's index, so that each key block sets a new maximum."""
    x = normal(rng, shapes)
    ramp = np.linspace(0, 4, shapes.k[-2])[:, None]
    return x._replace(q=1 + 0.1 * x.q, k=ramp + 0.1 * x.k)


@named
def falling(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """Logits that fall with the key's index by more than the exponent's range."""
    x = normal(rng, shapes)
    ramp = np.linspace(60, -60, shapes.k[-2])[:, None]
    return x._replace(q=2 + 0.1 * x.q, k=ramp + 0.1 * x.k)


@named
def offset_v(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """Large common offset in v: rounding out loses what delta needs."""
    x = normal(rng, shapes)
    return x._replace(v=1000 + x.v)


@named
def log_normal(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """Elements of widely different sizes."""
    x = normal(rng, shapes)
    return Inputs(*(np.sign(a) * np.exp(rng.standard_normal(a.shape)) for a in x))


@named
def outlier_channels(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """A few columns a thousand times larger or smaller than the others, as in trained models."""
    x = normal(rng, shapes)
    factors = np.where(np.arange(shapes.q[-1]) % 16 == 3, 30.0, np.where(np.arange(shapes.q[-1]) % 16 == 7, 1e-3, 1))
    factors_v = np.where(np.arange(shapes.v[-1]) % 16 == 1, 1e3, np.where(np.arange(shapes.v[-1]) % 16 == 5, 1e-3, 1))
    return x._replace(q=x.q * factors, k=x.k / factors, v=x.v * factors_v)


@named
def float16_limits(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """Elements next to float16's largest and smallest numbers; logits stay moderate."""
    x = normal(rng, shapes)
    big, small = 65504.0, 2.0**-14
    even = np.arange(shapes.q[-1]) % 2 == 0
    q = np.where(even, big * np.sign(x.q), small * x.q)
    k = np.where(even, small / 4 * x.k, 6e4 * np.sign(x.k))
    return x._replace(q=q, k=k, v=big * np.sign(x.v), dout=2.0**-20 * x.dout)


@named
def outlier_row(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """One row of v a million times larger than the others."""
    x = normal(rng, shapes)
    v = x.v.copy()
    v[..., :1, :] *= 1e6
    return x._replace(v=v)


@named
def ranges(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """q tiny, k huge, v tiny: only their products are ordinary."""
    x = normal(rng, shapes)
    return x._replace(q=1e-20 * x.q, k=1e20 * x.k, v=1e-25 * x.v)


@named
def subnormal(rng: np.random.Generator, shapes: Shapes) -> Inputs:
    """v and dout around float32's smallest normal number, where a GPU flushes to zero."""
    x = normal(rng, shapes)
    return x._replace(v=1e-38 * x.v, dout=1e-38 * x.dout)


# ---------------------------------------------------------------------------------- arrays with poison around

POISON = 0xFF  # as every byte: NaN in all four dtypes, wherever an element begins
GUARD = 256  # bytes of poison before and after


@dataclass(frozen=True)
class Style:
    """How an array lies in memory: the order of its axes, its gaps, directions and start."""

    order: str = "C"  # "C": last axis fastest; "F": first axis fastest; "swapped": C, axes -2 and -3 exchanged
    gap: tuple[int, int] = (
        1,
        0,
    )  # elements from one to the next along the fastest axis; elements after each row
    backwards: bool = False
    shift: int = 0  # elements from a multiple of 64 bytes to the array's lowest element
    shift_bytes: int = 0
    repeat: bool = False  # stride 0 along the longest axis


STYLES = {
    "plain": Style(),
    "swapped": Style(order="swapped"),
    "shifted": Style(gap=(1, 1), shift=1),
    "gaps": Style(gap=(2, 3), shift=5),
    "backwards": Style(backwards=True),
    "fortran": Style(order="F", gap=(1, 3)),
    "repeated": Style(repeat=True),
    "misaligned": Style(shift_bytes=1),
}
INPUT_STYLES = tuple(STYLES)
OUTPUT_STYLES = tuple(name for name in STYLES if name != "repeated")
#: A GPU can't load an element that does not lie at a multiple of its size.
GPU_STYLES = tuple(name for name in STYLES if name != "misaligned")


@dataclass(frozen=True)
class Placed:
    """An array inside a buffer full of poison, and what the buffer held at first."""

    array: Any  # numpy.ndarray or cupy.ndarray
    buffer: Any  # the bytes around and between its elements
    before: Array
    inside: Array  # which bytes belong to elements

    @property
    def values(self) -> Array:
        """The elements, as a NumPy array of its own."""
        return np.array(to_numpy(self.array))

    def unwritten(self) -> bool:
        """Whether every byte, inside and outside, is what it was."""
        return bool(np.array_equal(to_numpy(self.buffer), self.before))

    def guards_intact(self) -> bool:
        """Whether every byte that belongs to no element is what it was."""
        return bool(np.array_equal(to_numpy(self.buffer)[~self.inside], self.before[~self.inside]))


def place(values: Array, style: str = "plain", xp: Any = np) -> Placed:
    """Put `values` into poison as `style` says, as a NumPy or CuPy array."""
    this = STYLES[style]
    shape, dtype = values.shape, values.dtype
    strides, lowest, size = _layout(shape, dtype.itemsize, this)
    offset = GUARD + this.shift * dtype.itemsize + this.shift_bytes - lowest
    buffer = _aligned(offset + size + GUARD)
    buffer[:] = POISON
    inside = np.zeros(buffer.shape, bool)
    if values.size:
        np.ndarray((*shape, dtype.itemsize), bool, inside, offset, (*strides, 1))[...] = True
        first = tuple(slice(1) if s == 0 else slice(None) for s in strides)  # what stride 0 repeats
        np.ndarray(shape, dtype, buffer, offset, strides)[...] = values[first]
    held: Any = buffer if xp is np else xp.asarray(buffer)
    if xp is np:
        array = np.ndarray(shape, dtype, held, offset, strides)
    else:
        array = xp.ndarray(shape, dtype, held.data + offset, strides)
    return Placed(array, held, buffer.copy(), inside)


def place_empty(shape: Shape, dtype: npt.DTypeLike, style: str = "plain", xp: Any = np) -> Placed:
    """An output array that holds poison until it is written."""
    poison = np.full(math.prod(shape) * np.dtype(dtype).itemsize, POISON, np.uint8)
    return place(poison.view(dtype).reshape(shape), style, xp)


def to_numpy(array: Any) -> Array:
    """A NumPy array of `array`'s elements; NumPy arrays as they are."""
    return array if isinstance(array, np.ndarray) else np.asarray(array.get())


def _layout(shape: Shape, itemsize: int, style: Style) -> tuple[Shape, int, int]:
    """Strides, the lowest element's offset from element 0, and the bytes from it to the end."""
    axes = list(range(len(shape)))
    if style.order == "F":
        axes.reverse()
    if style.order == "swapped" and len(shape) >= 3:
        axes[-2], axes[-3] = axes[-3], axes[-2]
    strides, stride = [0] * len(shape), style.gap[0] * itemsize
    for count, axis in enumerate(reversed(axes)):
        strides[axis] = stride
        stride = stride * shape[axis] + (style.gap[1] * itemsize if count == 0 else 0)
    if style.repeat and shape:
        strides[int(np.argmax(shape))] = 0
    size = itemsize + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True) if n)
    lowest = 0
    if style.backwards and 0 not in shape:
        lowest = -sum(s * (n - 1) for s, n in zip(strides, shape, strict=True))
        strides = [-s for s in strides]
    return tuple(strides), lowest, size


def _aligned(size: int) -> Array:
    """`size` bytes that begin at a multiple of 64, so that a style's alignment is the same everywhere."""
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size]


# -------------------------------------------------------------------------------------------- random problems

SEQLENS = (1, 2, 3, 5, 8, 16, 17, 0, 31, 33, 64, 65, 100, 127, 129, 200, 257, 400, 513, 1025)
HEAD_DIMS = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    16,
    17,
    32,
    33,
    40,
    63,
    64,
    65,
    80,
    96,
    100,
    128,
    129,
    160,
    200,
    255,
    256,
)
NAMES = tuple(dtype.name for dtype in DTYPES)
WRT = (None, ("q", "k", "v"), ("v",), ("k", "q"), ("q",), ("k",), ("v", "q"))
#: How an array of pairs may broadcast to (*batch, heads, seqlen_q, seqlen_k): see `Case.pair_shape`.
PAIR_KINDS = ("full", "heads", "entries", "pairs", "keys", "rows", "key", "one")
WINDOWS = ((7, None), (None, 5), (20, 3), (0, 0), (None, 0), (0, None), (64, 64), (2**40, 2**40))
SOFTCAPS = (0.7, 5.0, 30.0)


@dataclass(frozen=True)
class Case:
    """One random problem. Its repr is Python that makes it again."""

    seed: int
    dtype: str = "float32"
    data: str = "normal"
    batch: tuple[Shape, Shape, Shape] = ((), (), ())  # leading axes of q, k, v
    num_heads_k: int = 1
    group: int = 1
    seqlen_q: int = 1
    seqlen_k: int = 1
    head_dim: int = 1
    head_dim_v: int = 1
    single_head: bool = False  # 2-D arrays
    layout: str = "hsd"
    causal: bool | str = False
    scale: float | None = None
    q_offset: int | None = None
    offset_shape: Shape | None = None  # an array of offsets of this shape, drawn from the seed
    styles: tuple[str, ...] = ("plain",) * 9  # of q, k, v, dout, out, lse, dq, dk, dv
    out: str | None = None  # None, "array", "pair" or "float32" (a pair)
    dlse: bool = False
    wrt: tuple[str, ...] | None = None
    grads_out: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    bias: str | None = None  # how it broadcasts, one of PAIR_KINDS; its numbers are drawn from the seed, as below
    bias_dtype: str | None = None  # None: q's
    bias_hides: bool = False  # -inf here and there
    mask: str | None = None  # one of PAIR_KINDS, or of MASKS: a function
    score: str | None = None  # one of SCORES
    alibi: str | None = None  # "heads", "entries" or "one": what has slopes of its own
    sinks: str | None = None  # their dtype
    q_lens: str | None = None  # "one": an integer; "entries", "last": an array over all leading axes, over the last
    kv_lens: str | None = None
    segments: str | None = None  # "shared" by all entries, or "entries"
    dropout: float = 0.0
    styles_beside: tuple[str, ...] = ("plain",) * 4  # of bias, mask, dbias, dsinks

    @property
    def shapes(self) -> Shapes:
        """The user's shapes of q, k, v, dout."""
        batch = np.broadcast_shapes(*self.batch)
        heads = self.num_heads_k * self.group
        parts = (
            (self.batch[0], heads, self.seqlen_q, self.head_dim),
            (self.batch[1], self.num_heads_k, self.seqlen_k, self.head_dim),
            (self.batch[2], self.num_heads_k, self.seqlen_k, self.head_dim_v),
            (batch, heads, self.seqlen_q, self.head_dim_v),
        )
        return Shapes(*(self._shape(*part) for part in parts))

    def _shape(self, batch: Shape, heads: int, seqlen: int, dim: int) -> Shape:
        if self.single_head:
            return (seqlen, dim)
        return (*batch, heads, seqlen, dim) if self.layout == "hsd" else (*batch, seqlen, heads, dim)

    @property
    def heads_and_rows(self) -> Shape:
        """How many query heads and query rows there are."""
        return (self.num_heads_k * self.group, self.seqlen_q)

    @property
    def lse_shape(self) -> Shape:
        """The shape of lse and dlse."""
        if self.single_head:
            return (self.seqlen_q,)
        return (*np.broadcast_shapes(*self.batch), *self.heads_and_rows)

    @property
    def work(self) -> int:
        """Multiplications in the two products of the forward."""
        pairs = math.prod(self.lse_shape) * self.seqlen_k
        return pairs * (self.head_dim + self.head_dim_v)

    def inputs(self) -> Inputs:
        """The numbers, in the user's layout; NaN beyond the lengths of all entries that share an array."""
        shapes = self.shapes
        hsd = Shapes(*(self._swap(shape) for shape in shapes))
        inputs = draw(self.data, np.random.default_rng(self.seed), hsd, _dtype(self.dtype))
        if self.q_lens or self.kv_lens:
            inputs = inputs._replace(**{name: self._padded(name, x) for name, x in inputs._asdict().items()})
        q, k, v, dout = (np.ascontiguousarray(a.swapaxes(-2, -3)) if self._swaps else a for a in inputs[:4])
        return Inputs(q, k, v, dout, inputs.dlse.reshape(self.lse_shape))

    def _padded(self, name: str, x: Array) -> Array:
        """x of `inputs`, before any layout, with NaN where no entry has a row or key."""
        if name in Inputs._fields[:4] and self.styles[Inputs._fields.index(name)] == "repeated":
            return x  # what lies there lies elsewhere, too
        used_q, used_k = self.used()
        used = used_k if name in "kv" else used_q
        if self.single_head:
            used = used[0]
        used = used if name == "dlse" else used[..., None]
        shape = tuple(n if own > 1 else 1 for own, n in zip(x.shape[::-1], used.shape[::-1], strict=False))[::-1]
        return np.where(sum_to(used.astype(int), shape) > 0, x, np.array(np.nan, x.dtype))

    def used(self) -> tuple[Array, Array]:
        """Which query rows and which keys each entry has, (*batch, 1, seqlen_q) and (*batch, 1, seqlen_k)."""
        batch = np.broadcast_shapes(*self.batch)
        sides = ((self.lens("q"), self.seqlen_q), (self.lens("k"), self.seqlen_k))
        q_len, kv_len = (np.broadcast_to(n if lens is None else lens, batch)[..., None, None] for lens, n in sides)
        return np.arange(self.seqlen_q) < q_len, np.arange(self.seqlen_k) < kv_len

    @property
    def _swaps(self) -> bool:
        return self.layout == "shd" and not self.single_head

    def _swap(self, shape: Shape) -> Shape:
        return (*shape[:-3], shape[-2], shape[-3], shape[-1]) if self._swaps else shape

    def offsets(self) -> int | npt.NDArray[np.int64] | None:
        """What to pass as q_offset: rows may see nothing, everything, or part."""
        if self.offset_shape is None:
            return self.q_offset
        rng = np.random.default_rng((self.seed, 1))
        near = rng.integers(-self.seqlen_q - 2, self.seqlen_k + 3, self.offset_shape)
        far = rng.choice([-(2**40), 2**40], self.offset_shape)
        share = 0.1 if self.alibi is None else 0  # slopes times 2**40 is more than lse can hold to any use
        return np.asarray(np.where(rng.random(self.offset_shape) < share, far, near), np.int64)

    def options(self) -> dict[str, Any]:
        """The options of the call, without out= and the like: the first four, and what is on."""
        found: dict[str, Any] = {
            "scale": self.scale, "causal": self.causal, "q_offset": self.offsets(), "layout": self.layout
        }  # fmt: skip
        beside = {
            "window": self.window, "softcap": self.softcap, "bias": self._bias(), "mask": self._mask(),
            "alibi_slopes": self._slopes(), "sinks": self._sinks(), "q_lens": self.lens("q"),
            "kv_lens": self.lens("k"), "segment_ids": self._segments(), "dropout": self.dropout or None,
            **self._functions(),
            "seed": int(self._rng(8).integers(2**64, dtype=np.uint64)) if self.dropout else None,
        }  # fmt: skip
        return found | {name: value for name, value in beside.items() if value is not None}

    def _rng(self, stream: int) -> np.random.Generator:
        """Each array has numbers of its own, whatever else is on; 1 is that of offsets."""
        return np.random.default_rng((self.seed, stream))

    def pair_shape(self, kind: str) -> Shape:
        """The shape of an array that broadcasts to all pairs as `kind` says."""
        batch, heads = np.broadcast_shapes(*self.batch), self.num_heads_k * self.group
        rows, keys = self.seqlen_q, self.seqlen_k
        return {
            "full": (*batch, heads, rows, keys),
            "heads": (heads, rows, keys),
            "entries": (*batch, 1, rows, keys),
            "pairs": (rows, keys),
            "keys": (*batch, 1, 1, keys),
            "rows": (heads, rows, 1),
            "key": (keys,),
            "one": (1, 1),
        }[kind]

    def _bias(self) -> Array | None:
        if self.bias is None:
            return None
        rng, shape = self._rng(2), self.pair_shape(self.bias)
        x = rng.standard_normal(shape)
        if self.bias_hides:
            x = np.where(rng.random(shape) < 0.2, -np.inf, x)
        if self.styles_beside[0] != "repeated":
            used_q, used_k = self.used()
            used = used_q[..., :, None] & used_k[..., None, :]
            heads = np.broadcast_to(used, (*used.shape[:-3], self.num_heads_k * self.group, *used.shape[-2:]))
            x = np.where(sum_to(heads.astype(int), shape) > 0, x, np.nan)
        return x.astype(_dtype(self.bias_dtype or self.dtype))

    def _functions(self) -> dict[str, Any]:
        """A score function and a mask function, with arguments."""
        heads, rows = self.heads_and_rows
        sizes = Sizes(math.prod(np.broadcast_shapes(*self.batch)), heads, rows, self.seqlen_k)
        found: dict[str, Any] = {}
        if self.score is not None:
            score = SCORES[self.score]
            found |= {"score": score.function, "score_args": score.args(self._rng(10), sizes)}
        if self.mask in MASKS:
            mask = MASKS[self.mask]
            found |= {"mask": mask.function, "mask_args": mask.args(self._rng(11), sizes)}
        return found

    def _mask(self) -> Array | None:
        """True for some or most; now and then a row, or a key, is hidden altogether."""
        if self.mask is None or self.mask in MASKS:
            return None
        rng, shape = self._rng(3), self.pair_shape(self.mask)
        seen = rng.random(shape) < rng.choice([0.5, 0.95])
        return np.asarray(seen & (rng.random((*shape[:-1], 1)) < 0.9) & (rng.random(shape[-1:]) < 0.9))

    def _slopes(self) -> Array | None:
        if self.alibi is None:
            return None
        heads = (self.num_heads_k * self.group,)
        shape = {"heads": heads, "entries": (*np.broadcast_shapes(*self.batch), *heads), "one": ()}[self.alibi]
        rng = self._rng(4)
        slopes = np.asarray(2.0 ** -rng.uniform(1, 8, shape) * rng.choice([1, 1, 1, -1], shape))
        return slopes.astype(_dtype(str(rng.choice(NAMES))))

    def _sinks(self) -> Array | None:
        if self.sinks is None:
            return None
        return (2 * self._rng(5).standard_normal(self.num_heads_k * self.group)).astype(_dtype(self.sinks))

    def lens(self, side: str) -> int | npt.NDArray[np.int64] | None:
        """The lengths of entries of "q" or "k": most of the array, or, now and then, nothing, one or all of it."""
        kind, seqlen = (self.q_lens, self.seqlen_q) if side == "q" else (self.kv_lens, self.seqlen_k)
        if kind is None:
            return None
        rng, batch = self._rng(6 if side == "q" else 7), np.broadcast_shapes(*self.batch)
        shape = {"one": (), "entries": batch, "last": batch[-1:]}[kind]
        most = rng.integers((seqlen + 1) // 2, seqlen + 1, shape)
        lens = np.where(rng.random(shape) < 0.2, rng.choice([0, min(1, seqlen), seqlen], shape), most)
        return int(lens) if kind == "one" else np.asarray(lens, np.int64)

    def _segments(self) -> tuple[Array, Array] | None:
        """Runs of equal numbers, or numbers in no order; some have no match."""
        if self.segments is None:
            return None
        rng = self._rng(9)
        batch = np.broadcast_shapes(*self.batch) if self.segments == "entries" else ()
        ids = tuple(rng.integers(0, n, (*batch, seqlen)) for n, seqlen in ((2, self.seqlen_q), (3, self.seqlen_k)))
        runs = rng.random() < 0.5
        q_ids, kv_ids = (np.sort(x, axis=-1) if runs else x for x in ids)
        return q_ids.astype(np.int32), kv_ids


def _dtype(name: str) -> np.dtype[Any]:
    return next(dtype for dtype in DTYPES if dtype.name == name)


def random_pick(rng: np.random.Generator) -> Pick:
    """A `Pick` that draws from `rng`."""
    return lambda n: int(rng.integers(n))


def random_case(
    pick: Pick,
    *,
    dtypes: Sequence[str] = NAMES,
    styles: Sequence[str] = INPUT_STYLES,
    work: int = 2_000_000,
    options: bool = False,
) -> Case:
    """Draw a problem. Each choice is one `pick`, the simplest first, so that hypothesis can shrink it.

    Parameters
    ----------
    pick : callable
        ``pick(n)`` is an integer in [0, n).
    dtypes, styles : sequence of str
        What to draw from.
    work : int
        The most multiplications in the forward; sizes are cut until they fit.
    options : bool
        Draw windows, biases, masks and whatever else a call may ask for, too.
    """

    def choose(among: Sequence[Any], simplest: int = 0) -> Any:
        """One of `among`; the first one in `simplest` cases more than its share."""
        return among[max(0, pick(len(among) + simplest) - simplest)]

    dtype = choose(dtypes)
    causal = choose((False, True, "top_left"))
    case = Case(
        seed=pick(2**31),
        dtype=dtype,
        data=choose([name for name in DATA_SETS if suits(name, _dtype(dtype))], simplest=4),
        num_heads_k=1 + pick(3),
        group=choose((1, 2, 3, 5)),
        seqlen_q=choose(SEQLENS),
        seqlen_k=choose(SEQLENS),
        head_dim=choose(HEAD_DIMS),
        head_dim_v=choose(HEAD_DIMS),
        layout=choose(("hsd", "shd")),
        causal=causal,
        scale=choose((None, 0.5, 0.0, -0.3, 1.7)),
        styles=tuple(choose(styles, simplest=4) for _ in range(4))
        + tuple(choose([s for s in styles if s in OUTPUT_STYLES], simplest=4) for _ in range(5)),
        out=choose((None, "array", "pair", "float32") if _dtype(dtype).itemsize == 2 else (None, "array", "pair")),
        dlse=bool(pick(2)),
        wrt=choose(WRT),
        grads_out=bool(pick(2)),
    )
    if case.data == "float16_limits":  # its logits are moderate because columns of q and k match
        case = replace(case, styles=tuple("plain" if s == "repeated" else s for s in case.styles))
    case = _with_batch(case, pick, choose)
    return _cut(_with_options(case, choose, styles) if options else case, work)


def _with_batch(case: Case, pick: Pick, choose: Callable[..., Any]) -> Case:
    """Leading axes that broadcast, a single head, and offsets for them."""
    batch: Shape = choose(((), (2,), (3, 2), (1,), (2, 1, 3), (0,), (4,)), simplest=2)

    def part() -> Shape:
        """`batch` less some leading axes, some lengths 1: what broadcasts to it."""
        start = pick(len(batch) + 1) if pick(3) == 2 else 0
        return tuple(1 if pick(3) == 2 else n for n in batch[start:])

    case = replace(case, batch=(part(), part(), part()))
    if not batch and pick(4) == 3:
        case = replace(case, single_head=True, num_heads_k=1, group=1)
    if case.causal == "top_left" or pick(2) == 0:
        return case
    whole = np.broadcast_shapes(*case.batch)
    if pick(2) and not case.single_head:
        return replace(case, offset_shape=choose((whole, whole[-1:], (1,) * len(whole))))
    far = (0, 1, -1, case.seqlen_k, -case.seqlen_q, -case.seqlen_q + 1, case.seqlen_k + 7, 2**40, -(2**40))
    return replace(case, q_offset=choose((*far, case.seqlen_k - case.seqlen_q + 2)))


def _with_options(case: Case, choose: Callable[..., Any], styles: Sequence[str]) -> Case:
    """The case with options, each of them off in about half of all cases."""
    outputs = [s for s in styles if s in OUTPUT_STYLES]
    lens = (None, "one", "entries", "last")
    case = replace(
        case,
        window=choose((None, *WINDOWS), simplest=6),
        softcap=choose((None, *SOFTCAPS), simplest=2),
        bias=choose((None, *PAIR_KINDS), simplest=6),
        bias_dtype=choose((None, *NAMES)),
        bias_hides=choose((False, True)),
        mask=choose((None, *PAIR_KINDS, *MASKS), simplest=6),
        alibi=choose((None, "heads", "entries", "one"), simplest=2) if abs(case.q_offset or 0) < 2**40 else None,
        sinks=choose((None, *NAMES), simplest=3),
        q_lens=choose(lens, simplest=3),
        kv_lens=choose(lens, simplest=3),
        segments=choose((None, "shared", "entries"), simplest=2),
        dropout=choose((0.0, 0.1, 0.5, 0.9), simplest=3) if case.data != "float16_limits" else 0.0,  # out would be inf
        styles_beside=tuple(choose(among, simplest=4) for among in (styles, styles, outputs, outputs)),
    )
    case = replace(case, score=choose((None, *SCORES), simplest=6))
    also = [name for name in ("bias", "sinks") if getattr(case, name) is not None]
    if case.wrt is None or not also:
        return case
    return replace(case, wrt=choose((case.wrt, *((*case.wrt, name) for name in also), tuple(also))))


def _cut(case: Case, work: int) -> Case:
    """Halve the larger length until the case is small enough."""
    while case.work > work:
        sizes = {name: getattr(case, name) for name in ("seqlen_q", "seqlen_k")}
        if max(sizes.values()) <= 8:
            sizes = {name: getattr(case, name) for name in ("head_dim", "head_dim_v")}
        name = max(sizes, key=sizes.__getitem__)
        case = replace(case, **{name: (sizes[name] + 1) // 2})
    return case

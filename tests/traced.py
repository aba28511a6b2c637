"""Score and mask functions for the tests of tracing, the arrays they look things up in, and a kernel that runs them."""

import functools

import ml_dtypes
import numpy as np
from emulator import golden

from cupyflash._score_args import FUNCTION_ARGS_BYTES, pack_args, take_args
from cupyflash._trace import trace_mask, trace_score

BATCH, HEADS, ROWS, KEYS = 2, 4, 9, 11
_r = np.random.default_rng(5)
# By the names that functions have for them.
ARGS = {
    "slope": _r.standard_normal(HEADS).astype(np.float32),
    "half": _r.standard_normal(KEYS).astype(np.float16)[::-1],
    "brain": _r.standard_normal((ROWS, 3)).astype(ml_dtypes.bfloat16)[:, 1],
    "table": _r.standard_normal((7, HEADS)).T,  # (HEADS, 7) float64
    "four": _r.standard_normal((BATCH, HEADS, ROWS, 2 * KEYS)).astype(np.float32)[..., ::2],
    "number": np.asarray(0.625),
    "count": np.asarray(3, np.int32),
    "ids": _r.integers(-3, 3, KEYS).astype(np.int8),
    "places": np.sort(_r.integers(0, 2**40, KEYS)),
    "bytes": _r.integers(0, 255, KEYS).astype(np.uint8),
    "wide": _r.integers(0, 2**32, KEYS).astype(np.uint32),
    "flags": _r.integers(0, 2, (ROWS, KEYS)).astype(bool),
}


def alibi(s, b, h, i, j, slope):
    return s + slope[h] * (j - i)


def from_head(s, b, h, i, j):
    return s - 2.0 ** (-8 * (h + 1) / 4) * abs(i - j)


def capped(s, b, h, i, j):
    return 30 * np.tanh(s / 30)


def statements(s, b, h, i, j, table):
    distance = np.clip(j - i + 3, 0, 6)
    s *= 0.5
    for power in (1, 2):
        s = s + table[h, distance] * power
    return np.where(j > i, -np.inf, s)


def safe_root(s, b, h, i, j):
    return np.where(s > 0, np.sqrt(np.where(s > 0, s, 1)), 0) + np.where(s > 1e9, np.sqrt(-s), 1.5)


SCORES = [
    alibi,
    from_head,
    capped,
    statements,
    safe_root,
    lambda s, b, h, i, j: s,
    lambda s, b, h, i, j: 0,
    lambda s, b, h, i, j: j - i,
    lambda s, b, h, i, j: -s,
    lambda s, b, h, i, j: +s * np.float32(2) + np.int64(3) - np.asarray(0.25),
    lambda s, b, h, i, j: s * s - 3 / (2 + s * s),
    lambda s, b, h, i, j: s / (1 + j) + (1 + i) / (4 + s * s) + i / (j + 1),
    lambda s, b, h, i, j: s**2 + s**3 / 100 + s**-2 + (s * s) ** 0.5 + s**0 + s**1 + (1 + s * s) ** -0.5,
    lambda s, b, h, i, j: (j - i) ** 2 * s + (j - i) ** 3 + (i + 1.0) ** -1,
    lambda s, b, h, i, j: np.exp(s / 8) + np.exp2(s / 8) + np.log(s * s + 1) + np.sqrt(s * s + 2),
    lambda s, b, h, i, j: np.sin(s) + np.cos(s) * np.tanh(s),
    lambda s, b, h, i, j: np.exp(i / 5) + np.log(j + 1) * s + np.sqrt(b + h),
    lambda s, b, h, i, j: abs(s) + np.abs(s - 1) + abs(j - i) + np.fabs(i - j),
    lambda s, b, h, i, j: np.minimum(s, 2) + np.maximum(s, j) - np.minimum(i, j) + np.maximum(3, i),
    lambda s, b, h, i, j: np.clip(s, -3, 4) + np.clip(s, None, 5) + np.clip(s, a_min=1.5, a_max=9) + np.clip(j, 2, i),
    lambda s, b, h, i, j: s % 3 + s // 3 + s % -0.7 + (j - i) // 3 + (j - i) % 3 + (i - j) // -4 + (i - j) % -4,
    lambda s, b, h, i, j: 7 % (s * s + 1) + 100 // (abs(s) + 1) + 50 % (j + 1) + 50 // (j + 1) + (s + 40) % (2 + s * s),
    lambda s, b, h, i, j: np.floor(s) + np.floor(s * 2) * s + np.floor(j / 2) + np.floor(i),
    lambda s, b, h, i, j: divmod(j - 2 * i, 4)[0] + divmod(17, i + 1)[1] * s,
    lambda s, b, h, i, j: np.where((i >= j) & (j >= i - 4) | ~(h == 2), s, s - 1e4),
    lambda s, b, h, i, j: np.where(np.logical_and(i > 2, j < 5), s, np.where(np.logical_or(b == 1, h), 2 * s, s / 2)),
    lambda s, b, h, i, j: np.where(np.logical_not(i % 2), s, 1) + np.where((i > j) ^ (h > 1), s, 0) + (j <= i) * s,
    lambda s, b, h, i, j: np.where(s != s, 0, s) + np.isnan(s) + np.sign(s) + np.square(s) + np.sign(j - i),
    lambda s, b, h, i, j: s + (i & 3) + (j | 4) + (i ^ j) + ~j,
    lambda s, b, h, i, j, number, count: s * number + count / number - count // 2,
    lambda s, b, h, i, j, half, brain: s * half[j] + brain[i],
    lambda s, b, h, i, j, four: s + four[b, h, i, j] * four[1 - b, h, i, j],
    lambda s, b, h, i, j, table, ids: s + table[h, ids[j] + 3] + table[-1, 2] * ids[j] + table[0, -2],
    lambda s, b, h, i, j, places: s + (places[j] - places[i]) / 2**40 + (places[j] // 7 % 1000 == 3),
    lambda s, b, h, i, j, bytes, wide: s + bytes[j] - 300 + wide[i] / 2**32 + (wide[j] - wide[i]) % 17,
    lambda s, b, h, i, j, flags: np.where(flags[i, j], s, -s) + flags[i, j] + flags[0, j] * s + (flags[i, 0] & (j > 1)),
    lambda s, b, h, i, j, slope: s * np.where(j > i, slope[h], slope[0]) + np.exp(slope[h] * s / 8) * slope[h] ** 2,
    lambda s, b, h, i, j, slope, table: np.tanh(s * slope[h]) / (2 + table[h, j % 7] ** 2) + np.maximum(s, slope[b]),
    lambda s, b, h, i, j, slope: np.where(s > slope[h], s % (slope[h] ** 2 + 1), slope[h] - s // 2) * np.abs(slope[1]),
    lambda s, b, h, i, j: np.float64(1e-30) * s + np.float16(0.5) * s + True * s + s / np.inf,
]  # fmt: skip
# Beyond their arrays; NumPy would raise, or count negative indices from the end.
CLAMPED = [
    lambda s, b, h, i, j, slope: s + slope[j - i] + slope[100 * i] + slope[-100 * j] + slope[2**40] + slope[-7],
    lambda s, b, h, i, j, table, places: s * table[h - 2, j - 3] + table[places[j], places[i] - 2**39],
    lambda s, b, h, i, j, ids: s + (2**30 * (i + 1)) // (j - i) + (j - i) % ids[j] - 2**31 // (1 - 2 * b),
    lambda s, b, h, i, j, places: s + (places[j] * 2**30 > 0) + np.where(-i * 2**29 > -(2**31), 1, 0),
]
MASKS = [
    lambda b, h, i, j: i >= j,
    lambda b, h, i, j: True,
    lambda b, h, i, j, ids: (ids[i] == ids[j]) & ~(j > i) | (i == 0),
    lambda b, h, i, j, flags: flags[i, j],
    lambda b, h, i, j, slope: np.logical_xor(slope[h] * (j - i) < 1.5, b) & (np.exp(slope[h]) != i),
]


def args_of(function, what="score"):
    """The arrays that a function's parameters name, as numbers and arrays come to it."""
    code = function.__code__
    names = code.co_varnames[5 if what == "score" else 4 : code.co_argcount]
    return take_args(f"{what}_args", tuple(ARGS[name] for name in names))


def pairs(count, dtype, seed=0):
    """Logits and positions of as many pairs."""
    r = np.random.default_rng(seed)
    s = (8 * r.standard_normal(count)).astype(dtype)
    return s, *(r.integers(0, n, count).astype(np.int32) for n in (BATCH, HEADS, ROWS, KEYS))


# What a kernel does with function n; Accumulator, Dual, ScoreArgs are known.
_RUN_SCORE = """
  if (pair < count) {{
    const Accumulator s = logits[pair];
    const Dual dual = f{n}::score_function(Dual(s, Accumulator(1)), b, h, i, j, args[{n}]);
    out[({row} + 0) * count + pair] = f{n}::score_function(s, b, h, i, j, args[{n}]);
    out[({row} + 1) * count + pair] = dual.value;
    out[({row} + 2) * count + pair] = dual.slope;
{terms}
  }}"""
_RUN_TERM = """    int index_{term}[4];
    out[{row} * count + pair] = f{n}::score_term_{term}(s, b, h, i, j, args[{n}], index_{term});
    for (int axis = 0; axis < 4; ++axis) out[({row} + 1 + axis) * count + pair] = index_{term}[axis];"""
_RUN_MASK = "\n  if (pair < count) out[{row} * count + pair] = f{n}::mask_function(b, h, i, j, args[{n}]);"
_KERNEL = """#include "dual.cuh"
#include "score_args.cuh"
{functions}
extern "C" __global__ void traced(
    Accumulator* out, const Accumulator* logits, const int* at, const FunctionArgs* args, int count) {{
  const int pair = blockIdx.x * 32 + threadIdx.x;
  const int b = pair < count ? at[pair] : 0, h = pair < count ? at[count + pair] : 0;
  const int i = pair < count ? at[2 * count + pair] : 0, j = pair < count ? at[3 * count + pair] : 0;
{body}
}}
"""


def prelude(accumulator):
    """What a Spec would say."""
    return f"using Accumulator = {accumulator};\nconstexpr int FUNCTION_ARGS_BYTES = {FUNCTION_ARGS_BYTES};\n"


@functools.cache
def program(accumulator, folder):
    """A kernel that runs all functions, and for each the first of its rows of results."""
    functions, body, rows, row = [], [], [], 0
    for n, function in enumerate([*SCORES, *CLAMPED, *MASKS]):
        rows.append(row)
        if function in MASKS:
            functions.append(f"namespace f{n} {{\n{trace_mask(function, args_of(function, 'mask')).cuda}}}")
            body.append(_RUN_MASK.format(n=n, row=row))
            row += 1
            continue
        traced = trace_score(function, args_of(function))
        count = len(traced.arg_terms())
        functions.append(f"namespace f{n} {{\n{traced.cuda}\n{traced.cuda_terms}}}")
        terms = [_RUN_TERM.format(n=n, term=term, row=row + 3 + 5 * term) for term in range(count)]
        body.append(_RUN_SCORE.format(n=n, row=row, terms="\n".join(terms)))
        row += 3 + 5 * count
    path = folder / f"traced_{accumulator}.cu"
    path.write_text(_KERNEL.format(functions="\n".join(functions), body="".join(body)), encoding="utf-8")
    return prelude(accumulator) + golden.inline_text(path), (*rows, row)


def run(xp, accumulator, folder, s, positions):
    """The results of all functions: rows as ``program`` counts them, on a module that answers like CuPy."""
    text, rows = program(accumulator, folder)
    kernel = xp.RawModule(code=text, options=("-std=c++17",)).get_function("traced")
    held = []  # until the launch is over
    packed = b""
    for function in [*SCORES, *CLAMPED, *MASKS]:
        arrays = tuple(on_device(xp, x, held) for x in args_of(function, "mask" if function in MASKS else "score"))
        packed += pack_args("score_args", arrays)
    out = xp.empty((rows[-1], s.size), s.dtype)
    held += [xp.asarray(x) for x in (s, np.stack(positions), np.frombuffer(packed, np.int64))]
    kernel((-(-s.size // 32),), (32,), (out, *held[-3:], np.int32(s.size)))
    return out.get()


def on_device(xp, x, held):
    """x with its strides, where the device is."""
    low = sum(min(0, s * (n - 1)) for s, n in zip(x.strides, x.shape, strict=True))
    span = sum(abs(s) * (n - 1) for s, n in zip(x.strides, x.shape, strict=True)) + x.itemsize
    flat = np.zeros(span, np.uint8)
    np.ndarray(x.shape, x.dtype, flat, -low, x.strides)[...] = x
    held.append(xp.asarray(flat))
    return xp.ndarray(x.shape, x.dtype, held[-1].data + -low, x.strides)

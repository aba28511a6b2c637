# ruff: noqa: E501  (a table is read by its rows)
"""Bad input: an error of the right type, with the value and the rule in its text, before anything runs."""

from __future__ import annotations

import decimal
import fractions

import ml_dtypes
import numpy as np
import pytest

import cupyflash
from cupyflash import AttentionGradients, Tile, attention, attention_backward, attention_vjp, explain, prepare

F32, F64, F16, BF16 = np.float32, np.float64, np.float16, ml_dtypes.bfloat16


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """No error of this file may come after a launch, a compilation or a block of NumPy."""

    def ran(*_, **__):
        pytest.fail("something was compiled or ran before the error")

    from cupyflash import _compile, _cpu, _launch

    for module, names in (
        (_cpu, ("forward", "backward")),
        (_launch, ("forward", "backward", "compile_plan")),
        (_compile, ("load",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, ran)


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


def inputs(**changed):
    """Arguments of a good call, some replaced: q has 4 heads, 5 rows, width 8; k and v 2 heads, 6 rows."""
    return {"q": ones(3, 4, 5, 8), "k": ones(3, 2, 6, 8), "v": ones(3, 2, 6, 7)} | changed


def on(backend, arguments):
    """The arguments with their NumPy arrays on the backend."""
    if backend.name == "numpy":
        return arguments
    plain = (np.dtype(F32), np.dtype(F64), np.dtype(F16), np.dtype(BF16))
    return {n: backend.array(a) if isinstance(a, np.ndarray) and a.dtype in plain else a for n, a in arguments.items()}


def expect(error, words, function, *args, **kwargs):
    """`function` raises exactly `error`, whose text has all of `words`."""
    with pytest.raises((ValueError, TypeError)) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {text}"
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"


# fmt: off
SHAPES = {
    # name: (changes, error, words of the message: the value seen, and the rule)
    "q of no axis": ({"q": ones()}, ValueError, ["q.ndim=0", "2 axes"]),
    "q of one axis": ({"q": ones(8)}, ValueError, ["q.ndim=1", "2 axes"]),
    "k of one axis": ({"k": ones(8)}, ValueError, ["k.ndim=1", "2 axes"]),
    "v of one axis": ({"v": ones(8)}, ValueError, ["v.ndim=1", "2 axes"]),
    "2-D beside 4-D": ({"q": ones(5, 8)}, ValueError, ["q.ndim=2", "k.ndim=4", "2-D"]),
    "2-D beside 3-D": ({"q": ones(5, 8), "k": ones(6, 8), "v": ones(1, 6, 7)}, ValueError, ["v.ndim=3", "2-D"]),
    "widths": ({"k": ones(3, 2, 6, 9)}, ValueError, ["q.shape[-1]=8", "k.shape[-1]=9", "width"]),
    "width 0": ({"q": ones(3, 4, 5, 0), "k": ones(3, 2, 6, 0)}, ValueError, ["q.shape[-1]=0", "at least 1"]),
    "value width 0": ({"v": ones(3, 2, 6, 0)}, ValueError, ["v.shape[-1]=0", "at least 1"]),
    "lengths": ({"v": ones(3, 2, 7, 7)}, ValueError, ["6", "7", "(3, 2, 7, 7)", "key"]),
    "kv heads": ({"v": ones(3, 1, 6, 7)}, ValueError, ["2", "1", "(3, 1, 6, 7)", "heads"]),
    "heads": ({"q": ones(3, 5, 5, 8)}, ValueError, ["5", "2", "(3, 5, 5, 8)", "multiple"]),
    "fewer query heads": ({"q": ones(3, 1, 5, 8)}, ValueError, ["1", "2", "multiple"]),
    "no head": ({"q": ones(3, 0, 5, 8), "k": ones(3, 0, 6, 8), "v": ones(3, 0, 6, 7)}, ValueError, ["0", "positive"]),
    "no kv head": ({"k": ones(3, 0, 6, 8), "v": ones(3, 0, 6, 7)}, ValueError, ["0", "positive"]),
    "leading axes": ({"k": ones(2, 2, 6, 8)}, ValueError, ["(3,)", "(2,)", "broadcast"]),
    "leading axes of v": ({"v": ones(4, 1, 2, 6, 7), "q": ones(3, 3, 4, 5, 8)}, ValueError, ["(4, 1)", "(3, 3)", "broadcast"]),
    "shd heads": ({"layout": "shd", "q": ones(3, 5, 5, 8), "k": ones(3, 6, 2, 8), "v": ones(3, 6, 2, 7)}, ValueError, ["5", "2", "multiple"]),
    "hsd given as shd": ({"layout": "shd"}, ValueError, ["(3, 2, 6, 8)", "multiple"]),
}

DTYPES = {
    "int": ({"q": ones(3, 4, 5, 8, dtype=int)}, TypeError, ["q.dtype=int64", "float16", "float64"]),
    "int k": ({"k": ones(3, 2, 6, 8, dtype=np.int8)}, TypeError, ["k.dtype=int8", "float32"]),
    "bool": ({"v": ones(3, 2, 6, 7, dtype=bool)}, TypeError, ["v.dtype=bool", "float32"]),
    "complex": ({"q": ones(3, 4, 5, 8, dtype=complex)}, TypeError, ["q.dtype=complex128", "float32"]),
    "longdouble": ({"q": ones(3, 4, 5, 8, dtype=np.longdouble)}, TypeError, [f"q.dtype={np.dtype(np.longdouble)}", "float64"]),
    "object": ({"q": ones(3, 4, 5, 8, dtype=object)}, TypeError, ["q.dtype=object", "float32"]),
    "strings": ({"q": np.full((3, 4, 5, 8), "1")}, TypeError, ["q.dtype=<U1", "float32"]),
    "float8": ({"q": ones(3, 4, 5, 8, dtype=ml_dtypes.float8_e4m3fn)}, TypeError, ["q.dtype=float8_e4m3fn", "bfloat16"]),
    "foreign byte order": ({"q": ones(3, 4, 5, 8, dtype=np.dtype(F32).newbyteorder())}, TypeError, ["f4", "byte order"]),
    "structured": ({"q": np.zeros((3, 4, 5, 8), [("x", F32)])}, TypeError, ["q.dtype=", "float32"]),
    "two dtypes": ({"k": ones(3, 2, 6, 8, dtype=F64)}, TypeError, ["q.dtype=float32", "k.dtype=float64", "one dtype"]),
    "two 16-bit dtypes": ({"q": ones(3, 4, 5, 8, dtype=F16), "k": ones(3, 2, 6, 8, dtype=BF16), "v": ones(3, 2, 6, 7, dtype=F16)}, TypeError, ["k.dtype=bfloat16", "v.dtype=float16", "one dtype"]),
}

OBJECTS = {
    "list": ({"q": [[1.0, 2.0]]}, TypeError, ["q is a list", "array"]),
    "tuple": ({"k": ((1.0, 2.0),)}, TypeError, ["k is a tuple", "array"]),
    "string": ({"q": "array"}, TypeError, ["q is a str", "array"]),
    "number": ({"v": 1.0}, TypeError, ["v is a float", "array"]),
    "None": ({"v": None}, TypeError, ["v is a NoneType", "array"]),
    "masked": ({"q": np.ma.ones((3, 4, 5, 8), F32)}, TypeError, ["q is a masked array", "mask"]),
    "memoryview": ({"q": memoryview(ones(5, 8))}, TypeError, ["q is a memoryview", "array"]),
}

OPTIONS = {
    "scale nan": ({"scale": float("nan")}, ValueError, ["scale=nan", "finite"]),
    "scale inf": ({"scale": np.inf}, ValueError, ["scale=inf", "finite"]),
    "scale -inf": ({"scale": -np.inf}, ValueError, ["scale=-inf", "finite"]),
    "scale huge": ({"scale": 10**400}, ValueError, ["scale=", "finite"]),
    "scale str": ({"scale": "1"}, TypeError, ["scale='1'", "real"]),
    "scale complex": ({"scale": 1j}, TypeError, ["scale=1j", "real"]),
    "scale bool": ({"scale": True}, TypeError, ["scale=True", "real"]),
    "scale array": ({"scale": np.ones(3)}, TypeError, ["scale=", "real"]),
    "causal None": ({"causal": None}, ValueError, ["causal=None", "top_left"]),
    "causal 1": ({"causal": 1}, ValueError, ["causal=1", "True"]),
    "causal word": ({"causal": "bottom_left"}, ValueError, ["causal='bottom_left'", "top_left"]),
    "causal array": ({"causal": np.array([True, False])}, ValueError, ["causal=", "top_left"]),
    "layout": ({"layout": "bhsd"}, ValueError, ["layout='bhsd'", "hsd", "shd"]),
    "layout None": ({"layout": None}, ValueError, ["layout=None", "hsd"]),
    "layout list": ({"layout": ["hsd"]}, ValueError, ["layout=['hsd']", "shd"]),
    "precision": ({"precision": "exact"}, ValueError, ["precision='exact'", "highest", "ieee"]),
    "precision high": ({"precision": "high"}, ValueError, ["precision='high'", "highest"]),
    "precision of float64": ({"q": ones(5, 8, dtype=F64), "k": ones(6, 8, dtype=F64), "v": ones(6, 7, dtype=F64), "precision": "ieee"}, ValueError, ["precision='ieee'", "float64", "None"]),
    "precision of float16": ({"q": ones(5, 8, dtype=F16), "k": ones(6, 8, dtype=F16), "v": ones(6, 7, dtype=F16), "precision": "ieee"}, ValueError, ["precision='ieee'", "float16", "highest"]),
    "offset and top left": ({"causal": "top_left", "q_offset": 1}, ValueError, ["top_left", "q_offset"]),
    "offset float": ({"q_offset": 1.0}, TypeError, ["q_offset=1.0", "integer"]),
    "offset bool": ({"q_offset": True}, TypeError, ["q_offset=True", "integer"]),
    "offset list": ({"q_offset": [1, 2, 3]}, TypeError, ["q_offset=[1, 2, 3]", "integer"]),
    "offset huge": ({"q_offset": 2**63}, ValueError, ["9223372036854775808", "q_offset"]),
    "offsets float": ({"q_offset": np.ones(3)}, TypeError, ["q_offset", "integer"]),
    "offsets bool": ({"q_offset": np.ones(3, bool)}, TypeError, ["q_offset", "integer"]),
    "offsets of a wrong shape": ({"q_offset": np.ones(2, int)}, ValueError, ["q_offset.shape=(2,)", "(3,)"]),
    "offsets of too many axes": ({"q_offset": np.ones((2, 3), int)}, ValueError, ["q_offset.shape=(2, 3)", "(3,)"]),
    "offsets of heads": ({"q_offset": np.ones((3, 4), int)}, ValueError, ["q_offset.shape=(3, 4)", "(3,)"]),
    "family": ({"family": "sm91"}, ValueError, ["family='sm91'", "simt"]),
    "family of another kind": ({"family": 3}, ValueError, ["family=3", "simt"]),
    "tile": ({"tile": (64, 64)}, TypeError, ["tile=(64, 64)", "Tile"]),
}
# fmt: on
EVERY = {**SHAPES, **DTYPES, **OBJECTS, **OPTIONS}
ON_GPU = [name for name in EVERY if name not in {**DTYPES, **OBJECTS}]  # CuPy has no such arrays to begin with


@pytest.mark.parametrize("function", [attention, attention_vjp, explain, prepare], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", EVERY)
def test_bad_calls(name, function):
    changes, error, words = EVERY[name]
    expect(error, words, function, **inputs(**changes))


@pytest.mark.parametrize("name", EVERY)
def test_bad_calls_of_the_backward(name):
    changes, error, words = EVERY[name]
    arguments = inputs(**changes)
    dtype = next((a.dtype for a in (arguments["q"],) if isinstance(a, np.ndarray)), np.dtype(F32))
    single = isinstance(arguments["q"], np.ndarray) and arguments["q"].ndim == 2
    beside = {n: ones(*((5, 7) if single else (3, 4, 5, 7)), dtype=dtype) for n in ("dout", "out")}
    lse = ones(*((5,) if single else (3, 4, 5)), dtype=F64 if dtype == F64 else F32)
    if dtype not in (np.dtype(t) for t in (F32, F64, F16, BF16)):
        beside = {n: ones(3, 4, 5, 7) for n in ("dout", "out")}
    expect(error, words, attention_backward, lse=lse, **beside, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_bad_calls_of_cupy_arrays(gpu, name):
    changes, error, words = EVERY[name]
    expect(error, words, attention, **on(gpu, inputs(**changes)))


# ------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Tile(block_m=0), ValueError, ["block_m=0", "at least 1"]),
        (lambda: Tile(block_n=-16), ValueError, ["block_n=-16", "at least 1"]),
        (lambda: Tile(block_m=1.5), TypeError, ["block_m=1.5", "integer"]),
        (lambda: Tile(block_m=True), TypeError, ["block_m=True", "integer"]),
        (lambda: Tile(warps="4"), TypeError, ["warps='4'", "integer"]),
        (lambda: Tile(stages=0), ValueError, ["stages=0", "at least 1"]),
    ],
)
def test_bad_tiles(make, error, words):
    expect(error, words, make)


def test_tiles_that_fit_no_cpu():
    expect(ValueError, ["warps=4", "CPU"], attention, **inputs(tile=Tile(warps=4)))
    expect(ValueError, ["stages=2", "CPU"], attention, **inputs(tile=Tile(64, 64, stages=2)))


def test_families_of_the_other_side():
    expect(ValueError, ["family='simt'", "NumPy"], attention, **inputs(family="simt"))


@pytest.mark.gpu
def test_families_of_the_other_side_on_the_gpu(gpu):
    expect(ValueError, ["family='cpu'", "CuPy"], attention, **on(gpu, inputs(family="cpu")))


def test_tiles_that_fit_no_card():
    """The numbers: what the tile needs and what the card has."""
    with pytest.raises(ValueError, match=r"\d{4,}.*(shared memory|bytes)|(shared memory|bytes).*\d{4,}"):
        explain(**inputs(tile=Tile(block_m=4096, block_n=4096)), device="sm_90")


@pytest.mark.parametrize("width", [257, 300, 1000])
def test_widths_that_no_gpu_family_takes(width):
    wide = inputs(q=ones(3, 4, 5, width), k=ones(3, 2, 6, width))
    expect(ValueError, [f"{width}", "256"], explain, **wide, device="sm_90")
    wide = inputs(v=ones(3, 2, 6, width))
    expect(ValueError, [f"{width}", "256"], explain, **wide, device="sm_90")


def test_unknown_devices():
    expect(ValueError, ["device='sm_91'", "sm_90"], explain, **inputs(), device="sm_91")
    expect(ValueError, ["device=90", "sm_90"], explain, **inputs(), device=90)


# --------------------------------------------------------------------------------------------------------- out=


def out(*shape, dtype=F32):
    return np.zeros(shape or (3, 4, 5, 7), dtype)


def lse(*shape, dtype=F32):
    return np.zeros(shape or (3, 4, 5), dtype)


def read_only(a):
    a.flags.writeable = False
    return a


# fmt: off
OUTS = {
    "shape": (lambda: out(3, 4, 5, 8), ValueError, ["out.shape=(3, 4, 5, 8)", "(3, 4, 5, 7)"]),
    "broadcastable shape": (lambda: out(1, 3, 4, 5, 7), ValueError, ["(1, 3, 4, 5, 7)", "(3, 4, 5, 7)"]),
    "shape of the other layout": (lambda: out(3, 5, 4, 7), ValueError, ["(3, 5, 4, 7)", "(3, 4, 5, 7)"]),
    "dtype": (lambda: out(dtype=F64), TypeError, ["float64", "float32"]),
    "narrower dtype": (lambda: out(dtype=F16), TypeError, ["float16", "float32"]),
    "int": (lambda: out(dtype=int), TypeError, ["int64", "float32"]),
    "read-only": (lambda: read_only(out()), ValueError, ["read-only"]),
    "stride 0": (lambda: np.lib.stride_tricks.as_strided(out(), strides=(0, 140, 28, 4)), ValueError, ["(0, 140, 28, 4)", "share"]),
    "np.broadcast_to": (lambda: np.broadcast_to(out(4, 5, 7), (3, 4, 5, 7)), ValueError, ["out"]),
    "overlapping strides": (lambda: np.lib.stride_tricks.as_strided(out(3000), (3, 4, 5, 7), (560, 140, 24, 4)), ValueError, ["(560, 140, 24, 4)", "share"]),
    "list": (lambda: [1.0], TypeError, ["out is a list", "array"]),
    "three arrays": (lambda: (out(), lse(), lse()), ValueError, ["3", "pair"]),
    "one array in a tuple": (lambda: (out(),), ValueError, ["1", "pair"]),
    "empty tuple": (lambda: (), ValueError, ["0", "pair"]),
    "None in the pair": (lambda: (out(), None), TypeError, ["NoneType", "array"]),
    "lse shape": (lambda: (out(), lse(3, 5, 4)), ValueError, ["lse", "(3, 5, 4)", "(3, 4, 5)"]),
    "lse dtype": (lambda: (out(), lse(dtype=F64)), TypeError, ["lse", "float64", "float32"]),
    "lse read-only": (lambda: (out(), read_only(lse())), ValueError, ["lse", "read-only"]),
    "lse stride 0": (lambda: (out(), np.lib.stride_tricks.as_strided(lse(), strides=(0, 20, 4))), ValueError, ["lse", "(0, 20, 4)", "share"]),
    "swapped pair": (lambda: (lse(), out()), ValueError, ["(3, 4, 5)", "(3, 4, 5, 7)"]),
    "masked": (lambda: np.ma.zeros((3, 4, 5, 7), F32), TypeError, ["masked", "out"]),
    "foreign byte order": (lambda: out(dtype=np.dtype(F32).newbyteorder()), TypeError, ["out", "float32"]),
}
# fmt: on


@pytest.mark.parametrize("name", OUTS)
def test_bad_out(name):
    make, error, words = OUTS[name]
    expect(error, words, attention, **inputs(out=make()))


def test_float32_out_of_float64_inputs():
    wide = {n: a.astype(F64) for n, a in inputs().items()}
    expect(TypeError, ["out", "float32", "float64"], attention, **wide, out=out())
    expect(TypeError, ["lse", "float32", "float64"], attention, **wide, out=(out(dtype=F64), lse()))


def test_out_that_is_an_input(backend):
    square = backend.array(ones(2, 5, 8))
    k, v = backend.array(ones(2, 6, 8)), backend.array(ones(2, 6, 8))
    expect(ValueError, ["out", "q", "shares"], attention, square, k, v, out=square)
    expect(ValueError, ["out", "v", "shares"], attention, k, k, v, out=v)
    expect(ValueError, ["out", "v", "shares"], attention, k, k, v, out=v[::-1])


def test_out_that_overlaps_in_one_element(backend):
    flat = backend.array(np.ones(2 * 6 * 8 + 2 * 5 * 8 - 1, F32))
    q = flat[: 2 * 5 * 8].reshape(2, 5, 8)
    overlapping = flat[2 * 5 * 8 - 1 :].reshape(2, 6, 8)[:, :5]
    k = v = backend.array(ones(2, 6, 8))
    expect(ValueError, ["out", "q", "shares"], attention, q, k, v, out=overlapping)


def test_pair_of_overlapping_arrays(backend):
    flat = backend.array(np.ones(3 * 4 * 5 * 8, F32))
    arguments = on(backend, inputs())
    both = (flat[:420].reshape(3, 4, 5, 7), flat[400:460].reshape(3, 4, 5))
    expect(ValueError, ["lse", "out", "shares"], attention, **arguments, out=both)


def test_out_on_the_other_side(backend):
    if backend.name == "numpy":
        pytest.skip("needs CuPy arrays")
    expect(TypeError, ["out", "NumPy"], attention, **on(backend, inputs()), out=out())
    expect(TypeError, ["out", "NumPy"], attention, **on(backend, inputs()), out=(backend.array(out()), lse()))


# ---------------------------------------------------------------------------------------------------------- backward


def backward_inputs(**changed):
    return inputs(dout=out(), out=out(), lse=lse()) | changed


def gradients(**changed):
    return AttentionGradients(**changed)


# fmt: off
BACKWARD = {
    "dout shape": (lambda: {"dout": out(3, 4, 5, 8)}, ValueError, ["dout.shape=(3, 4, 5, 8)", "(3, 4, 5, 7)"]),
    "out shape": (lambda: {"out": out(3, 4, 5)}, ValueError, ["out.shape=(3, 4, 5)", "(3, 4, 5, 7)"]),
    "lse shape": (lambda: {"lse": lse(3, 5, 4)}, ValueError, ["lse.shape=(3, 5, 4)", "(3, 4, 5)"]),
    "dlse shape": (lambda: {"dlse": lse(4, 5)}, ValueError, ["dlse.shape=(4, 5)", "(3, 4, 5)"]),
    "dout dtype": (lambda: {"dout": out(dtype=F64)}, TypeError, ["dout.dtype=float64", "float32"]),
    "out dtype": (lambda: {"out": out(dtype=F16)}, TypeError, ["out.dtype=float16", "float32"]),
    "lse dtype": (lambda: {"lse": lse(dtype=F64)}, TypeError, ["lse.dtype=float64", "float32"]),
    "dlse dtype": (lambda: {"dlse": lse(dtype=F16)}, TypeError, ["dlse.dtype=float16", "float32"]),
    "dout list": (lambda: {"dout": [1.0]}, TypeError, ["dout is a list", "array"]),
    "lse None": (lambda: {"lse": None}, TypeError, ["lse is a NoneType", "array"]),
    "dlse number": (lambda: {"dlse": 0.0}, TypeError, ["dlse is a float", "array"]),
    "dout masked": (lambda: {"dout": np.ma.zeros((3, 4, 5, 7), F32)}, TypeError, ["dout", "masked"]),
    "wrt str": (lambda: {"wrt": "q"}, TypeError, ["wrt='q'", "tuple"]),
    "wrt number": (lambda: {"wrt": 1}, TypeError, ["wrt=1", "tuple"]),
    "wrt unknown": (lambda: {"wrt": ("q", "x")}, ValueError, ["'x'", "'q', 'k', 'v'"]),
    "wrt dq": (lambda: {"wrt": ("dq",)}, ValueError, ["'dq'", "'q', 'k', 'v'"]),
    "wrt empty": (lambda: {"wrt": ()}, ValueError, ["wrt=()", "at least one"]),
    "wrt twice": (lambda: {"wrt": ("q", "q")}, ValueError, ["('q', 'q')", "once"]),
    "deterministic": (lambda: {"deterministic": 1}, TypeError, ["deterministic=1", "True or False"]),
    "deterministic None": (lambda: {"deterministic": None}, TypeError, ["deterministic=None", "True or False"]),
    "grads_out tuple": (lambda: {"grads_out": (None, None, None)}, TypeError, ["grads_out", "tuple", "AttentionGradients"]),
    "grads_out array": (lambda: {"grads_out": out()}, TypeError, ["grads_out", "AttentionGradients"]),
    "grads_out shape": (lambda: {"grads_out": gradients(dk=ones(3, 4, 6, 8))}, ValueError, ["dk.shape=(3, 4, 6, 8)", "(3, 2, 6, 8)"]),
    "grads_out dtype": (lambda: {"grads_out": gradients(dv=ones(3, 2, 6, 7, dtype=F64))}, TypeError, ["dv.dtype=float64", "float32"]),
    "grads_out read-only": (lambda: {"grads_out": gradients(dq=read_only(ones(3, 4, 5, 8)))}, ValueError, ["dq", "read-only"]),
    "grads_out stride 0": (lambda: {"grads_out": gradients(dv=np.lib.stride_tricks.as_strided(ones(3, 2, 6, 7), strides=(0, 168, 28, 4)))}, ValueError, ["dv", "(0, 168, 28, 4)", "share"]),
    "grads_out list": (lambda: {"grads_out": gradients(dq=[1.0])}, TypeError, ["dq is a list", "array"]),
    "grads_out not in wrt": (lambda: {"wrt": ("q",), "grads_out": gradients(dv=ones(3, 2, 6, 7))}, ValueError, ["dv", "wrt"]),
}
# fmt: on


@pytest.mark.parametrize("name", BACKWARD)
def test_bad_backward(name):
    make, error, words = BACKWARD[name]
    expect(error, words, attention_backward, **backward_inputs(**make()))


@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "out", "lse", "dlse"])
def test_gradients_that_share_memory_with_an_input(backend, name):
    x = {n: backend.array(ones(2, 6, 8)) for n in ("q", "k", "v", "dout", "out")}
    x |= {n: backend.array(ones(2, 6)) for n in ("lse", "dlse")}
    shared = x[name] if x[name].ndim == 3 else backend.array(ones(2, 6, 8))
    if x[name].ndim == 2:
        x[name] = shared.reshape(-1)[:12].reshape(2, 6)
    expect(ValueError, ["dk", name, "shares"], attention_backward, **x, grads_out=AttentionGradients(dk=shared))


def test_gradients_that_share_memory_with_each_other(backend):
    x = on(backend, backward_inputs(v=ones(3, 2, 6, 8), dout=out(3, 4, 5, 8), out=out(3, 4, 5, 8)))
    shared = backend.array(ones(3, 2, 6, 8))
    grads_out = AttentionGradients(dk=shared, dv=shared)
    expect(ValueError, ["dv", "dk", "shares"], attention_backward, **x, grads_out=grads_out)


def test_vjp_checks_its_flag_first():
    expect(TypeError, ["deterministic=0", "True or False"], attention_vjp, **inputs(), deterministic=0)


# ---------------------------------------------------------------------------------------------------- names and places


@pytest.mark.parametrize("name", ["dlse", "attn_mask", "is_causal", "window_size", "dropout_p", "cu_seqlens_q", "slopes"])
def test_options_that_do_not_exist(name):
    with pytest.raises(TypeError, match=name):
        attention(**inputs(), **{name: None})


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        attention(*inputs().values(), 0.5)
    with pytest.raises(TypeError, match="positional"):
        attention_backward(*backward_inputs().values(), None)


def test_negative_sizes_can_not_be_made():
    with pytest.raises(ValueError, match="negative"):
        attention(**inputs(q=ones(3, 4, -5, 8)))


def test_wrt_needs_backward():
    expect(ValueError, ["wrt", "backward"], explain, **inputs(), wrt=("q",))


class OnDevice:
    """An object that says it lies on a DLPack device, and nothing else."""

    def __init__(self, kind):
        self.kind = kind

    def __dlpack_device__(self):
        return (self.kind, 0)

    def __dlpack__(self, **_):
        raise AssertionError("read before the device was looked at")


def test_devices_that_are_not_read():
    expect(TypeError, ["q", "(8, 0)", "CUDA"], attention, **inputs(q=OnDevice(8)))  # Metal


def test_cuda_memory_without_a_gpu():
    from conftest import why_no_gpu

    if not why_no_gpu():
        pytest.skip("there is a GPU here")

    class Interface:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": (5, 8), "typestr": "<f4", "data": (4096, False), "strides": None, "version": 3,
        }  # fmt: skip

    for thing in (OnDevice(2), Interface()):
        with pytest.raises((ValueError, TypeError, ImportError)) as caught:
            attention(thing, thing, thing)
        assert "q" in str(caught.value)
        assert "CUDA" in str(caught.value) or "GPU" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_numpy_beside_cupy(gpu, name):
    mixed = on(gpu, inputs()) | {name: inputs()[name]}
    expect(TypeError, [name, "NumPy", "CUDA device 0"], attention, **mixed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dout", "out", "lse"])
def test_numpy_beside_cupy_in_the_backward(gpu, name):
    mixed = on(gpu, backward_inputs()) | {name: backward_inputs()[name]}
    expect(TypeError, [name, "NumPy"], attention_backward, **mixed)


@pytest.mark.gpu
def test_cupy_offsets_beside_numpy(gpu):
    offsets = gpu.xp.arange(3)
    expect(TypeError, ["q_offset", "NumPy"], attention, **inputs(q_offset=offsets, causal=True))


@pytest.mark.gpu
def test_two_devices(gpu):
    count = gpu.xp.cuda.runtime.getDeviceCount()
    if count < 2:
        pytest.skip(f"{count} GPU here, two are needed")
    mixed = on(gpu, inputs())
    with gpu.xp.cuda.Device(1):
        mixed["k"] = gpu.xp.asarray(inputs()["k"])
    expect(ValueError, ["k", "CUDA device 1", "CUDA device 0"], attention, **mixed)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [257, 300])
def test_widths_that_cupy_arrays_can_not_have(gpu, width):
    wide = on(gpu, inputs(q=ones(3, 4, 5, width), k=ones(3, 2, 6, width)))
    expect(ValueError, [f"{width}", "256"], attention, **wide)


def test_reals_that_are_not_floats_are_fine():
    """No error where there is none to make: any real number is a scale."""
    for scale in (fractions.Fraction(1, 3), np.float16(0.5), 2):
        assert explain(**inputs(), scale=scale).family == "cpu"
    with pytest.raises(TypeError, match="real"):
        explain(**inputs(), scale=decimal.Decimal("0.5"))


def test_all_names_are_there():
    for name in cupyflash.__all__:
        assert hasattr(cupyflash, name)

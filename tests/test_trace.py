"""Score and mask functions: that CUDA C, NumPy and the function itself agree, and what is refused how."""

import functools
import gc
import inspect
import re

import numpy as np
import pytest
import traced as cases
from emulator import Device, build, golden, why_not
from nvrtc import nvrtc

from cupyflash import _trace
from cupyflash._compile import kernels_dir
from cupyflash._score_args import check_lengths, pack_args, take_args
from cupyflash._trace import trace_mask, trace_score
from cupyflash._trace_terms import IndexForm

PAIRS = 200
CHANGING = 1.0
TYPES = {"float": np.float32, "double": np.float64}
NAMES = [inspect.getsource(f).strip().split("\n")[0][:60] for f in cases.SCORES]


# ------------------------------------------------------------------------------------------------------ NumPy


@pytest.mark.parametrize("function", cases.SCORES, ids=NAMES)
def test_numpy_is_the_function_itself(function):
    """Called with arrays in float64, where every integer is int64 and all indices are inside."""
    s, *at = cases.pairs(2000, np.float64)
    args = cases.args_of(function)
    with np.errstate(all="ignore"):
        wide = [x if x.dtype == bool else x.astype(np.int64 if x.dtype.kind in "iu" else np.float64) for x in args]
        direct = function(s.copy(), *(x.astype(np.int64) for x in at), *wide)
    got = trace_score(function, args).numpy(s, *at, args)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, np.broadcast_to(direct, s.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", cases.SCORES, ids=NAMES)
def test_slope_is_the_limit_of_differences(function):
    s, *at = cases.pairs(2000, np.float64, seed=1)
    args = cases.args_of(function)
    traced = trace_score(function, args)
    assert_derivative(lambda step: traced.numpy(s + step, *at, args), traced.slope(s, *at, args))


@pytest.mark.parametrize("function", [f for f in cases.SCORES if trace_score(f, cases.args_of(f)).arg_terms()])
def test_argument_slopes_are_limits_of_differences(function):
    """The gradient of sum_n w_n score_n with respect to an argument, along one direction."""
    s, *at = cases.pairs(500, np.float64, seed=2)
    args = tuple(x if x.dtype.kind in "iub" else x.astype(np.float64) for x in cases.args_of(function))
    traced = trace_score(function, args)
    r = np.random.default_rng(3)
    for argument in {term.argument for term in traced.arg_terms()}:
        direction = r.standard_normal(args[argument].shape)

        def moved(step, argument=argument, direction=direction):
            return traced.numpy(s, *at, tuple(x + step * direction if n == argument else x for n, x in enumerate(args)))

        slope = np.zeros_like(s)
        for term in traced.arg_terms():
            if term.argument == argument:
                index, part = traced.arg_slope(term, s, *at, args)
                slope += part * direction[index]
        assert_derivative(moved, slope)


def assert_derivative(function, slope, step=1e-6):
    """``slope`` is the derivative of ``function`` at 0 where there is one, as the two sides' differences tell."""
    below, here, above = (function(x).astype(np.float64) for x in (-step, 0, step))
    with np.errstate(invalid="ignore"):  # of infinite ones
        left, right = (here - below) / step, (above - here) / step
        size = 1 + np.abs(left) + np.abs(right)
        smooth = np.isfinite(here) & (np.abs(left - right) < 1e-4 * size)
    assert smooth[np.isfinite(here)].mean() > 0.5
    np.testing.assert_array_less(np.abs((left + right) / 2 - slope)[smooth], (2e-6 * size)[smooth])
    infinite = np.isneginf(here)
    assert np.all(slope[infinite] == 0)


def test_choices_leave_nothing_of_the_other_side():
    s = np.array([-4.0, 0.0, np.inf, np.nan, 9.0], np.float32)
    traced = trace_score(lambda s, b, h, i, j: np.where(s > 0, np.sqrt(s), 1))
    np.testing.assert_array_equal(traced.slope(s, 0, 0, 0, 0, ())[[0, 1, 3]], [0, 0, 0])
    hidden = trace_score(lambda s, b, h, i, j: np.where(j < 0, np.exp(s) / s, s * np.inf * 0))
    np.testing.assert_array_equal(np.isnan(hidden.numpy(s, 0, 0, 0, 0, ())), True)
    infinite = (np.asarray(np.inf),)
    untouched = trace_score(lambda s, b, h, i, j, x: s + 0 * x, infinite)
    assert untouched.slope(s, 0, 0, 0, 0, infinite).tolist() == [1] * 5


def test_indices_are_clamped():
    x, s = np.arange(5.0), np.zeros(4, np.float32)
    at = np.array([-7, 0, 4, 2**31 - 1])
    args = (x,)
    assert trace_score(lambda s, b, h, i, j, x: x[i], args).numpy(s, 0, 0, at, 0, args).tolist() == [0, 0, 4, 4]
    assert trace_score(lambda s, b, h, i, j, x: x[-1], args).numpy(s, 0, 0, at, 0, args).tolist() == [4] * 4
    assert trace_score(lambda s, b, h, i, j, x: x[-9], args).numpy(s, 0, 0, at, 0, args).tolist() == [0] * 4


def test_types_are_the_logits():
    """float32 stays float32, whatever it meets; integers wrap."""
    s, i = np.ones(3, np.float32), np.array([0, 3, 2**30], np.int32)
    args = (np.asarray(0.1), np.arange(3, dtype=np.int64))
    traced = trace_score(lambda s, b, h, i, j, x, n: s + x * i + n[i] / 3 + np.exp(i * 0), args)
    assert traced.numpy(s, 0, 0, i, 0, args).dtype == np.float32
    double = np.float32(0.1) * i.astype(np.float32) + np.float32([0, 2, 2]) / np.float32(3)
    np.testing.assert_allclose(traced.numpy(s, 0, 0, i, 0, args), double + 2, rtol=1e-6)
    wraps = trace_score(lambda s, b, h, i, j: i * 4 + (i + 2**40) * 0)
    assert wraps.numpy(s, 0, 0, i, 0, ()).tolist() == [0, 12, 0]


@pytest.mark.parametrize("function", cases.MASKS)
def test_masks(function):
    _, *at = cases.pairs(500, np.float64)
    args = cases.args_of(function, "mask")
    seen = trace_mask(function, args).numpy(*at, args, np.dtype(np.float64))
    assert seen.dtype == np.bool_
    assert seen.any()
    np.testing.assert_array_equal(seen, np.broadcast_to(function(*at, *args), seen.shape))


# ------------------------------------------------------------------------------------------------------- CUDA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traced")


@pytest.fixture(params=["emulator", pytest.param("cupy", marks=pytest.mark.gpu)], scope="module")
def xp(request):
    """CuPy, or the emulator."""
    if request.param == "cupy":
        yield request.getfixturevalue("gpu").xp
        return
    why_not()
    with Device() as module:
        yield module


@pytest.mark.parametrize("accumulator", TYPES)
def test_cuda_is_numpy(xp, folder, accumulator):
    """Values, slopes, and slopes and places of arguments' elements, of all functions, to a few ulp of their terms."""
    dtype = TYPES[accumulator]
    s, *at = cases.pairs(PAIRS, dtype, seed=4)
    got = cases.run(xp, accumulator, folder, s, at)
    rows = cases.program(accumulator, folder)[1]
    for n, function in enumerate([*cases.SCORES, *cases.CLAMPED]):
        args = cases.args_of(function)
        traced = trace_score(function, args)
        where = f"{n}: {inspect.getsource(function)}{traced.cuda}"
        value, slope = traced.numpy(s, *at, args), traced.slope(s, *at, args)
        values = got[rows[n] : rows[n + 1]]
        for mine, theirs in ((values[0], value), (values[1], value), (values[2], slope)):
            assert_close(mine, theirs, where)
        for number, term in enumerate(traced.arg_terms()):
            mine = values[3 + 5 * number :][:5]
            index, slope = traced.arg_slope(term, s, *at, args)
            assert_close(mine[0], slope, where)
            for axis in range(4):
                np.testing.assert_array_equal(mine[1 + axis], index[axis] if axis < len(index) else 0, where)
    first = len(cases.SCORES) + len(cases.CLAMPED)
    for n, function in enumerate(cases.MASKS, first):
        args = cases.args_of(function, "mask")
        np.testing.assert_array_equal(got[rows[n]], trace_mask(function, args).numpy(*at, args, np.dtype(dtype)))


def assert_close(got, want, message):
    """To 16 ulp of the value, or of a typical one where terms cancel."""
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], message)
    size = np.abs(want[finite]) + np.median(np.abs(want[finite])) if finite.any() else 0
    error = np.abs(got[finite] - want[finite])
    limit = 16 * np.finfo(got.dtype).eps * (size + 1)
    assert np.all(error <= limit), f"{np.max(error / limit)} of the limit\n{message}"


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ["sm_60", "sm_75", "sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize("accumulator", TYPES)
@pytest.mark.share(3)
def test_cuda_compiles(folder, accumulator, arch):
    binding = nvrtc()
    made = binding.createProgram(cases.program(accumulator, folder)[0], "traced.cu", (), ())
    try:
        binding.compileProgram(made, ("-std=c++17", f"-arch={arch}", "-ftz=true"))
    except binding.NVRTCError as error:
        pytest.fail(f"{error}\n{binding.getProgramLog(made)}")
    log = binding.getProgramLog(made)
    assert "warning #" not in log, log


def test_shared_parts_are_computed_once():
    text = trace_score(lambda s, b, h, i, j: np.tanh(s * 2) + np.exp(np.tanh(s * 2))).cuda
    assert text.count("tanh") == 1
    assert "template <typename Number>" in text


def test_struct_lies_where_the_kernels_read_it():
    why_not()
    places = {"data": 0, "stride": 8, "length": 40}
    asserts = (f"static_assert(__builtin_offsetof(ArgumentArray, {name}) == {at});" for name, at in places.items())
    text = golden.inline_text(kernels_dir() / "score_args.cuh")
    build.kernel("\n".join((cases.prelude("float") + text, *asserts)), 80, False)
    x = np.zeros((3, 4), np.float32)[::-1, ::2]
    packed = np.frombuffer(pack_args("score_args", (np.asarray(1.0), x)), np.int64)
    assert packed[7:12].tolist() == [x.ctypes.data, -4, 2, 0, 0]
    assert packed[12:14].view(np.int32).tolist() == [3, 2, 1, 1]


# ------------------------------------------------------------------------------------------------ derivatives


FORMS = [
    (lambda s, b, h, i, j, x: s + x[h], [IndexForm("h")]),
    (lambda s, b, h, i, j, x: s + x[b, h, i, j], [IndexForm("b"), IndexForm("h"), IndexForm("i"), IndexForm("j")]),
    (lambda s, b, h, i, j, x: s + x[3], [IndexForm("constant", 3)]),
    (lambda s, b, h, i, j, x: s + x[2 * 0 * i + 4], [IndexForm("constant", 4)]),
    (lambda s, b, h, i, j, x: s + x[j - i], [IndexForm("j - i + c")]),
    (lambda s, b, h, i, j, x: s + x[-(i - 5) + j], [IndexForm("j - i + c", 5)]),
    (lambda s, b, h, i, j, x: s + x[8 + i - j], [IndexForm("i - j + c", 8)]),
    (lambda s, b, h, i, j, x: s + x[np.clip(j - i, -4, 4) + 4], [IndexForm("j - i + c", 4, 0, 8)]),
    (lambda s, b, h, i, j, x: s + x[np.minimum(np.clip(j - i, -4, 4) - 1, 2)], [IndexForm("j - i + c", -1, -5, 2)]),
    (lambda s, b, h, i, j, x: s + x[4 - np.clip(j - i, -4, 4)], [IndexForm("general")]),
    (lambda s, b, h, i, j, x: s + x[np.clip(j - i + 4, 0, 8), h], [IndexForm("j - i + c", 4, 0, 8), IndexForm("h")]),
    (lambda s, b, h, i, j, x: s + x[np.minimum(j - i, 6)], [IndexForm("j - i + c", 0, None, 6)]),
    (lambda s, b, h, i, j, x: s + x[np.maximum(2, np.minimum(j - i, 1))], [IndexForm("j - i + c", 0, 2, 2)]),
    (lambda s, b, h, i, j, x: s + x[np.minimum(1, np.maximum(j - i, 2))], [IndexForm("j - i + c", 0, 1, 1)]),
    (lambda s, b, h, i, j, x: s + x[h // 2, abs(i - j)], [IndexForm("general"), IndexForm("general")]),
    (lambda s, b, h, i, j, x: s + x[np.minimum(i, j)], [IndexForm("general")]),
    (lambda s, b, h, i, j, x: s + x[np.clip(j, 0, 3)], [IndexForm("general")]),
    (lambda s, b, h, i, j, x: s + x[i + 1], [IndexForm("general")]),
    (lambda s, b, h, i, j, x: s + x[-1], [IndexForm("from the end", -1)]),
    (lambda s, b, h, i, j, x: s + x[(s > 0) * 1], [IndexForm("general")]),
    (lambda s, b, h, i, j, x: s + x, []),
]


@pytest.mark.parametrize(("function", "forms"), FORMS)
def test_forms_of_indices(function, forms):
    (term,) = trace_score(function, (np.ones((1,) * len(forms)),)).arg_terms()
    assert term.index == tuple(forms)
    assert (term.argument, term.smooth) == (0, True)


def test_long_chains():
    """What doubles at each step is walked once."""

    def score(s, b, h, i, j, x):
        for _ in range(2000):
            s = s + 1.5 * i
        for _ in range(60):
            i = i + i
        return s + x[i]

    traced = trace_score(score, (X,))
    assert traced.arg_terms()[0].index == (IndexForm("general"),)
    assert max(map(len, traced.cuda.split("\n"))) < 400


def test_terms():
    args = tuple(np.ones(3, t) for t in (np.float32, np.int32, np.float16))
    terms = trace_score(lambda s, b, h, i, j, x, n, y: s * x[h] + x[h] + n[i] + x[n[j]] + (y[0] > s), args).arg_terms()
    assert [(t.argument, t.index[0].form, t.smooth) for t in terms] == [
        (0, "h", True),
        (0, "general", True),
        (2, "constant", False),
    ]


# ------------------------------------------------------------------------------------------------------ caches


def test_equal_functions_are_equal():
    x = (np.ones(4, np.float32),)

    def make(power):
        return lambda s, b, h, i, j, x: s + x[h] * 2.0**-power

    first = trace_score(make(3), x)
    assert trace_score(make(3), (np.zeros(9, np.float32),)) == first
    assert hash(trace_score(make(3), x)) == hash(first)
    assert trace_score(make(4), x) != first
    assert trace_score(make(3), (x[0].astype(np.float64),)) != first
    assert trace_score(lambda s, b, h, i, j, x: s + x[h, 0] * 0.125, (x[0][None],)) != first
    assert trace_mask(lambda b, h, i, j: i >= j) == trace_mask(lambda b, h, i, j: i >= j)


@pytest.fixture
def traces(monkeypatch):
    """The functions that are traced from now on."""
    seen, trace = [], _trace._trace

    def watched(what, function, arguments):
        seen.append(function)
        return trace(what, function, arguments)

    monkeypatch.setattr(_trace, "_trace", watched)
    return seen


def test_a_function_is_called_once_for_each_signature(traces):
    def score(s, b, h, i, j, x):
        return s + np.exp(x[h])

    first = trace_score(score, (np.ones(4),))
    assert trace_score(score, (np.zeros(7)[::2],)) is first
    assert len(traces) == 1
    trace_score(score, (np.ones(4, np.float16),))
    assert len(traces) == 2


def test_functions_are_not_kept(traces):
    before = len(_trace._known)
    function = eval("lambda s, b, h, i, j: s + 1.25")
    trace_score(function)
    assert len(_trace._known) == before + 1
    del function
    traces.clear()
    gc.collect()
    assert len(_trace._known) == before


def test_changed_surroundings_are_seen(traces):
    factor = 2.0

    def scaled(s):
        return s * factor

    def score(s, b, h, i, j):
        return scaled(s) + (lambda: CHANGING)()

    def value():
        return trace_score(score).numpy(np.ones(1), 0, 0, 0, 0, ())[0]

    assert (value(), value(), len(traces)) == (3, 3, 1)
    factor = 3.0
    assert (value(), value(), len(traces)) == (4, 4, 2)
    globals()["CHANGING"] = 5.0
    try:
        assert (value(), value(), len(traces)) == (8, 8, 3)
    finally:
        globals()["CHANGING"] = 1.0


def test_what_can_change_unseen_is_traced_each_time(traces):
    class Model:
        factor = 2.0

        def score(self, s, b, h, i, j):
            return s * self.factor

    model, list_ = Model(), np.ones(1)

    def inner(s, b, h, i, j):
        return s * model.factor + list_[0]

    for function, value in ((model.score, 2), (inner, 3)):
        assert trace_score(function).numpy(np.ones(1), 0, 0, 0, 0, ()) == [value]
    model.factor, list_[0] = 4.0, 2.0
    for function, value in ((model.score, 4), (inner, 6)):
        assert trace_score(function).numpy(np.ones(1), 0, 0, 0, 0, ()) == [value]
    assert len(traces) == 4


def test_callables_without_code():
    class Score:
        __hash__ = None

        def __call__(self, s, b, h, i, j):
            return s + j

    assert trace_score(Score()) == trace_score(lambda s, b, h, i, j: s + j)
    assert trace_score(functools.partial(lambda c, s, b, h, i, j: s + c, 2.0)).cuda.count("2.0") == 1


# --------------------------------------------------------------------------------------------------- refusals

X = np.arange(4.0)
REFUSED = [
    (lambda s, b, h, i, j, x: s if i > j else -s, TypeError, "bool"),
    (lambda s, b, h, i, j, x: s * (i > j and j > 2), TypeError, "bool"),
    (lambda s, b, h, i, j, x: np.where(0 < i < j, s, 0), TypeError, "chained comparison"),
    (lambda s, b, h, i, j, x: max(s, 0), TypeError, "bool"),
    (lambda s, b, h, i, j, x: s * float(i), TypeError, r"float\(\).* of i"),
    (lambda s, b, h, i, j, x: __import__("math").exp(s), TypeError, r"float\(\).* of s"),
    (lambda s, b, h, i, j, x: s * int(i), TypeError, r"int\(\)"),
    (lambda s, b, h, i, j, x: complex(s), TypeError, r"complex\(\)"),
    (lambda s, b, h, i, j, x: sum(range(i)), TypeError, "an index or a count"),
    (lambda s, b, h, i, j, x: sum(s), TypeError, "iteration"),
    (lambda s, b, h, i, j, x: sum(x), TypeError, r"iteration of score_args\[0\]"),
    (lambda s, b, h, i, j, x: s * len(x), TypeError, r"len\(\)"),
    (lambda s, b, h, i, j, x: s * (i in (1, 2)), TypeError, "bool"),
    (lambda s, b, h, i, j, x: {s: 1}[s], TypeError, "hash"),
    (lambda s, b, h, i, j, x: s + X[h], TypeError, "an array indexed by it.*of h.*score_args"),
    (lambda s, b, h, i, j, x: s + X, TypeError, r"array of shape \(4,\)"),
    (lambda s, b, h, i, j, x: s + "a", TypeError, "'a' of type str"),
    (lambda s, b, h, i, j, x: s + 1j, TypeError, "1j of type complex"),
    (lambda s, b, h, i, j, x: s + None, TypeError, "None of type NoneType"),
    (lambda s, b, h, i, j, x: s + 2**70 * i, ValueError, "beyond 64-bit"),
    (lambda s, b, h, i, j, x: np.arctan(s), TypeError, "np.arctan can't be traced.*tanh"),
    (lambda s, b, h, i, j, x: np.exp(s, dtype=np.float32), TypeError, "np.exp with dtype="),
    (lambda s, b, h, i, j, x: np.add(s, i, X), TypeError, "np.add"),
    (lambda s, b, h, i, j, x: np.add.reduce(s), TypeError, "np.add.reduce"),
    (lambda s, b, h, i, j, x: np.sum(s), TypeError, "numpy.sum"),
    (lambda s, b, h, i, j, x: np.where(i > j), TypeError, "np.where without two choices"),
    (lambda s, b, h, i, j, x: np.where(i, s, 0), TypeError, "condition is a number"),
    (lambda s, b, h, i, j, x: s.clip(0, 1), TypeError, r"\.clip of s"),
    (lambda s, b, h, i, j, x: s.astype(np.float32), TypeError, r"\.astype"),
    (lambda s, b, h, i, j, x: x.shape[0] * s, TypeError, r"\.shape of score_args\[0\]"),
    (lambda s, b, h, i, j, x: s**i, TypeError, "power.*no constant"),
    (lambda s, b, h, i, j, x: s + 2**i, TypeError, r"write 2\.0"),
    (lambda s, b, h, i, j, x: s**2.5, TypeError, r"power.*2\.5"),
    (lambda s, b, h, i, j, x: s**17, TypeError, r"power.*17"),
    (lambda s, b, h, i, j, x: s + i**-1, ValueError, "power.*integer"),
    (lambda s, b, h, i, j, x: s @ s, TypeError, "@ of s"),
    (lambda s, b, h, i, j, x: s + (1 << i), TypeError, "<< of i"),
    (lambda s, b, h, i, j, x: s + (i >> 1), TypeError, ">> of i"),
    (lambda s, b, h, i, j, x: round(s), TypeError, r"round\(\)"),
    (lambda s, b, h, i, j, x: s | 1, TypeError, r"bitwise_or \(\|\) of a float"),
    (lambda s, b, h, i, j, x: ~s, TypeError, r"invert \(~\)"),
    (lambda s, b, h, i, j, x: s + -(i > j), TypeError, "negative.*boolean"),
    (lambda s, b, h, i, j, x: s + ((i > j) - (i < j)), TypeError, "subtract of two booleans"),
    (lambda s, b, h, i, j, x: s + x, ValueError, r"score_args\[0\] has 1 axis and is used as a number"),
    (lambda s, b, h, i, j, x: np.exp(x), ValueError, r"has 1 axis"),
    (lambda s, b, h, i, j, x: x[h, i], ValueError, "has 1 axis and is indexed by 2 indices"),
    (lambda s, b, h, i, j, x: s + x[()], ValueError, "indexed by 0 indices"),
    (lambda s, b, h, i, j, x: x[s], TypeError, r"indexing score_args\[0\] with a float"),
    (lambda s, b, h, i, j, x: x[i > j], TypeError, "with a bool"),
    (lambda s, b, h, i, j, x: x[0.5], TypeError, "with a float"),
    (lambda s, b, h, i, j, x: x[1:], TypeError, "indexing with slice"),
    (lambda s, b, h, i, j, x: x[None], TypeError, "indexing with None"),
    (lambda s, b, h, i, j, x: s[i], TypeError, "indexing of s"),
    (lambda s, b, h, i, j, x: s(1), TypeError, "a call of s"),
    (lambda s, b, h, i, j, x: x.__setitem__(0, s), TypeError, "assignment"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "error", "text"), REFUSED)
def test_refusals_name_operation_and_line(function, error, text):
    line = function.__code__.co_firstlineno
    with pytest.raises(error, match=text) as caught:
        trace_score(function, (X,))
    assert re.match(rf"score function at .*test_trace\.py:{line}: ", str(caught.value))


def test_the_line_is_the_one_that_runs():
    def helper(x):
        return x + 1 if x > 0 else x

    def score(s, b, h, i, j):
        s = s + 1
        return helper(s)

    with pytest.raises(TypeError, match=rf"test_trace\.py:{helper.__code__.co_firstlineno + 1}: bool"):
        trace_score(score)


RETURNS = [
    (lambda s, b, h, i, j, x: None, "returns None of type NoneType"),
    (lambda s, b, h, i, j, x: (s, s), "of type tuple"),
    (lambda s, b, h, i, j, x: i > j, "returns a value of kind bool: a score function returns a number"),
    (lambda s, b, h, i, j, x: x, r"returns score_args\[0\], an array"),
    (lambda s, b, h, i, j, x: X, "of type ndarray"),
]


@pytest.mark.parametrize(("function", "text"), RETURNS)
def test_wrong_results_are_refused(function, text):
    with pytest.raises(TypeError, match=text) as caught:
        trace_score(function, (X,))
    assert f"test_trace.py:{function.__code__.co_firstlineno}" in str(caught.value)


def test_a_mask_is_boolean():
    with pytest.raises(TypeError, match=r"mask function <lambda> at .*: it returns a value of kind int"):
        trace_mask(lambda b, h, i, j: i - j)
    with pytest.raises(ValueError, match=r"mask function at .*mask_args\[0\] has 1 axis"):
        trace_mask(lambda b, h, i, j, x: x > 0, (X,))


def test_calls_are_checked():
    with pytest.raises(TypeError, match=r"called as score\(s, b, h, i, j, \*score_args\) with 1 score_args: too many"):
        trace_score(lambda s, b, h, i, j: s, (X,))
    with pytest.raises(TypeError, match="score=3: a score function is callable"):
        trace_score(3)
    kept = []
    trace_score(lambda s, b, h, i, j: kept.append(s) or s)
    with pytest.raises(TypeError, match="another trace"):
        trace_score(lambda s, b, h, i, j: s + kept[0])


def test_errors_of_the_function_itself_pass():
    with pytest.raises(ZeroDivisionError):
        trace_score(lambda s, b, h, i, j: s + 1 / 0)


def test_arguments_are_checked():
    number, array = take_args("score_args", (0.5, [1, 2][0])), take_args("score_args", (X[::2],))
    assert [x.shape for x in number] == [(), ()]
    assert array[0].base is not None
    with pytest.raises(TypeError, match="score_args=3"):
        take_args("score_args", 3)
    with pytest.raises(ValueError, match=r"len\(mask_args\)=9"):
        take_args("mask_args", (X,) * 9)
    with pytest.raises(TypeError, match=r"score_args\[1\].dtype=.*complex128"):
        take_args("score_args", (X, X.astype(complex)))
    with pytest.raises(TypeError, match="machine's byte order"):
        take_args("score_args", (X.astype(X.dtype.newbyteorder()),))
    with pytest.raises(ValueError, match="at most 4 axes"):
        take_args("score_args", (X.reshape(1, 1, 1, 1, 4),))
    with pytest.raises(TypeError, match="a list"):
        take_args("score_args", ([1.0],))
    with pytest.raises(ValueError, match=r"score_args\[0\].shape=\(0, 3\)"):
        check_lengths("score_args", (np.zeros((0, 3)),))
    packed = np.zeros(4, [("x", np.int8), ("y", np.float32)])["y"]
    with pytest.raises(ValueError, match="not multiples of the 4-byte elements"):
        pack_args("score_args", (packed,))

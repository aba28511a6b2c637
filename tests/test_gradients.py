"""The backward: against finite differences, its arguments, its rules. The table checks its bounds, too."""

from __future__ import annotations

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from cupyflash import AttentionGradients, attention, attention_backward, attention_vjp
from cupyflash.testing import bounds, cases, data, reference
from cupyflash.testing.data import Case

CASE = Case(seed=1, num_heads_k=2, group=2, seqlen_q=21, seqlen_k=34, head_dim=12, head_dim_v=7, causal=True)


TILES = pytest.mark.parametrize("small", [False, True], ids=["own tile", "small tile"])


def setup(backend, case=CASE, small=False):
    """The inputs as NumPy arrays and on the backend, out and lse, and the options."""
    x = case.inputs()
    q, k, v, dout, dlse = backend.arrays(x)
    options = case.options() | ({"tile": backend.small_tile(case.dtype)} if small else {})
    out, lse = attention(q, k, v, return_lse=True, **options)
    return x, (q, k, v), dout, dlse, (out, lse), options


def same_bits(backend, a, b):
    return backend.numpy(a).tobytes() == backend.numpy(b).tobytes()


# ------------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("with_dlse", [False, True], ids=["dout", "dout and dlse"])
@pytest.mark.parametrize(
    "case",
    [
        CASE,
        dataclasses.replace(CASE, causal=False, layout="shd"),
        dataclasses.replace(CASE, batch=((2, 1), (3,), (1, 1)), q_offset=-4),
        dataclasses.replace(CASE, batch=((2,),) * 3, offset_shape=(2,)),
        dataclasses.replace(CASE, single_head=True, num_heads_k=1, group=1, scale=-0.8),
    ],
    ids=["plain", "shd", "broadcast", "offsets", "single head"],
)
def test_duality_with_finite_differences(backend, case, with_dlse):
    """<vjp(u), t> is the derivative of <u, f(x + h t)>: extrapolated central differences."""
    x, (q, k, v), dout, dlse, _, options = setup(backend, dataclasses.replace(case, dtype="float64"))
    _, vjp = attention_vjp(q, k, v, **options)
    grads = vjp(dout, dlse=dlse if with_dlse else None)
    tangents = [np.random.default_rng(n).standard_normal(a.shape) for n, a in enumerate(x[:3])]

    def value(h):
        moved = backend.arrays(a + h * t for a, t in zip(x[:3], tangents, strict=True))
        out, lse = (backend.numpy(a) for a in attention(*moved, return_lse=True, **options))
        seen = np.where(lse == -np.inf, 0, lse)
        return (x.dout * out).sum() + ((np.where(lse == -np.inf, 0, x.dlse) * seen).sum() if with_dlse else 0)

    def slope(h):
        return (value(h) - value(-h)) / (2 * h)

    h = 2.0**-9
    numeric = (64 * slope(h / 4) - 20 * slope(h / 2) + slope(h)) / 45  # error of order h**6
    parts = [(backend.numpy(g) * t).sum() for g, t in zip(grads[:3], tangents, strict=True)]
    size = sum(abs(backend.numpy(g) * t).sum() for g, t in zip(grads[:3], tangents, strict=True))
    assert abs(sum(parts) - numeric) <= 1e-10 * size


def test_vjp_is_backward_of_attention(backend):
    _, qkv, dout, dlse, (out, lse), options = setup(backend)
    for return_lse in (False, True):
        result, vjp = attention_vjp(*qkv, return_lse=return_lse, **options)
        for a, b in zip(result if return_lse else (result,), (out, lse), strict=False):
            assert same_bits(backend, a, b)
        for d, wrt in itertools.product((None, dlse), (None, ("v", "q"))):
            got = vjp(dout, dlse=d, wrt=wrt)
            want = attention_backward(dout, *qkv, out, lse, dlse=d, wrt=wrt, **options)
            assert isinstance(got, AttentionGradients)
            for a, b in zip(got, want, strict=True):
                assert (a is None and b is None) or same_bits(backend, a, b)


def test_gradients_are_linear_in_their_cotangents(backend):
    _, qkv, dout, dlse, result, options = setup(backend)
    once = attention_backward(dout, *qkv, *result, dlse=dlse, **options)
    twice = attention_backward(2 * dout, *qkv, *result, dlse=2 * dlse, **options)
    for a, b in zip(once[:3], twice[:3], strict=True):
        np.testing.assert_array_equal(2 * backend.numpy(a), backend.numpy(b))


def test_dlse_of_zeros_is_none(backend):
    _, qkv, dout, dlse, result, options = setup(backend)
    without = attention_backward(dout, *qkv, *result, **options)
    zeros = attention_backward(dout, *qkv, *result, dlse=0 * dlse, **options)
    for a, b in zip(without[:3], zeros[:3], strict=True):
        assert same_bits(backend, a, b)


# -------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("wrt", [w for n in (1, 2, 3) for w in itertools.permutations("qkv", n)], ids="".join)
def test_wrt_chooses_and_changes_nothing(backend, wrt):
    _, qkv, dout, dlse, result, options = setup(backend)
    every = attention_backward(dout, *qkv, *result, dlse=dlse, **options)
    for given in (wrt, list(wrt)):
        some = attention_backward(dout, *qkv, *result, dlse=dlse, wrt=given, **options)
        for name in "qkv":
            got = getattr(some, f"d{name}")
            if name in wrt:
                assert same_bits(backend, got, getattr(every, f"d{name}"))
            else:
                assert got is None


@pytest.mark.parametrize("given", [("dq",), ("dk", "dv"), ("dq", "dk", "dv")], ids="-".join)
def test_grads_out(backend, given):
    _, qkv, dout, _, result, options = setup(backend)
    want = attention_backward(dout, *qkv, *result, **options)
    arrays = {f"d{n}": backend.xp.empty_like(a) for n, a in zip("qkv", qkv, strict=True) if f"d{n}" in given}
    got = attention_backward(dout, *qkv, *result, grads_out=AttentionGradients(**arrays), **options)
    for name in ("dq", "dk", "dv"):
        assert (getattr(got, name) is arrays.get(name)) == (name in given)
        assert same_bits(backend, getattr(got, name), getattr(want, name))


def test_deterministic_false_keeps_the_bounds(backend):
    x, qkv, dout, dlse, result, options = setup(backend)
    grads = attention_backward(dout, *qkv, *result, dlse=dlse, deterministic=False, **options)
    report = bounds.check_backward(
        x.dout,
        x.q,
        x.k,
        x.v,
        *map(backend.numpy, result),
        tuple(map(backend.numpy, grads[:3])),
        dlse=x.dlse,
        **options,
    )
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", data.DTYPES[2:], ids=str)
def test_an_unrounded_out_helps_16_bit_gradients(backend, dtype):
    """With a common offset in v, dp - delta cancels; delta of a rounded out is off by its rounding.

    Where P is rounded before it meets v, out is off by as much, so P is kept whole here.
    """
    case = Case(seed=3, dtype=dtype.name, data="offset_v", seqlen_q=60, seqlen_k=80, head_dim=32, head_dim_v=32)
    x = case.inputs()
    q, k, v, dout = backend.arrays(x[:4])
    exact = reference.forward(x.q, x.k, x.v)
    want = reference.backward(x.dout, x.q, x.k, x.v, *exact, wrt=("q",)).dq
    errors = []
    for out_dtype in (dtype, np.float32):
        out, lse = backend.xp.empty(dout.shape, out_dtype), backend.xp.empty(dout.shape[:-1], np.float32)
        attention(q, k, v, out=(out, lse), precision="highest")
        dq = attention_backward(dout, q, k, v, out, lse, wrt=("q",), precision="highest").dq
        assert dq.dtype == dtype
        errors.append(np.linalg.norm(backend.numpy(dq).astype(float) - want) / np.linalg.norm(want))
    assert errors[1] < 0.01 < 0.05 < errors[0]


@hypothesis.given(choices=st.data())
def test_out_and_lse_are_taken_as_given(backend, choices):
    """The gradients belong to the out and lse that are passed: rounded, or of a larger softmax."""
    seed = choices.draw(st.integers(0, 2**31))
    case = data.random_case(
        data.random_pick(np.random.default_rng(seed)), styles=("plain",), work=100_000, dtypes=("float32",)
    )
    x, rng = case.inputs(), np.random.default_rng(seed)
    out = rng.standard_normal(x.dout.shape).astype(np.float32)
    exact = reference.forward(x.q, x.k, x.v, **case.options()).lse
    lse = (exact + rng.uniform(-0.5, 3, exact.shape)).astype(np.float32)
    arguments = (x.dout, x.q, x.k, x.v, out, lse)
    grads = attention_backward(*backend.arrays(arguments), **case.options())
    report = bounds.check_backward(*arguments, tuple(map(backend.numpy, grads[:3])), **case.options())
    assert report.ok, f"{case}\n{report}"


# ------------------------------------------------------------------------------------------------------ rules


@TILES
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_rows_that_see_nothing_have_no_gradient(backend, dtype, small):
    case = dataclasses.replace(CASE, dtype=dtype.name, q_offset=-5)
    x, qkv, dout, _, (out, lse), options = setup(backend, case, small)
    dlse = x.dlse.copy()
    dlse[:, :5] = [[np.nan], [np.inf], [-np.inf], [1]]
    grads = attention_backward(dout, *qkv, out, lse, dlse=backend.array(dlse), **options)
    dq, dk, dv = map(backend.numpy, grads[:3])
    assert (backend.numpy(lse)[:, :5] == -np.inf).all()
    assert (dq[:, :5] == 0).all()
    assert (dq[:, 5:] != 0).any()
    options.pop("tile", None)
    seen = 21 - 5  # keys that the last row sees
    assert (dk[:, seen:] == 0).all()
    assert (dv[:, seen:] == 0).all()
    report = bounds.check_backward(
        x.dout, x.q, x.k, x.v, backend.numpy(out), backend.numpy(lse), (dq, dk, dv), dlse=dlse,
        p_dtype=backend.p_dtype(dtype), **options,
    )  # fmt: skip
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "size",
    [{"seqlen_k": 0}, {"seqlen_q": 0}, {"batch": ((0,),) * 3}, {"batch": ((0,), (), (1,))}],
    ids=str,
)
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_empty_problems_have_gradients_of_zeros(backend, dtype, size):
    case = dataclasses.replace(CASE, dtype=dtype.name, **size)
    x, qkv, dout, dlse, result, options = setup(backend, case)
    grads = attention_backward(dout, *qkv, *result, dlse=dlse, **options)
    for g, a in zip(grads[:3], x, strict=False):
        assert g.shape == a.shape
        assert (backend.numpy(g) == 0).all()


@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_a_bad_number_stays_in_its_batch_entry_and_kv_head(backend, dtype, which):
    case = dataclasses.replace(CASE, dtype=dtype.name, batch=((2,),) * 3)
    x, qkv, dout, _, result, options = setup(backend, case)
    want = [backend.numpy(g) for g in attention_backward(dout, *qkv, *result, **options)[:3]]
    getattr(x, which)[1, 0, 3, 2] = np.nan
    q, k, v, dout, _ = backend.arrays(x)
    result = attention(q, k, v, return_lse=True, **options)
    got = [backend.numpy(g) for g in attention_backward(dout, q, k, v, *result, **options)[:3]]
    assert any(np.isnan(g.astype(float)).any() for g in got)
    for a, b, group in zip(got, want, (2, 1, 1), strict=True):
        others = np.ones((2, a.shape[1]), bool)
        others[1, :group] = False  # query heads 0 and 1 read kv head 0
        np.testing.assert_array_equal(a[others], b[others])


@TILES
@pytest.mark.parametrize("large", [1e4, None])
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_masked_numbers_do_not_reach_gradients(backend, dtype, large, small):
    """Finite k, v of keys that no row sees, up to the largest: no bit of any gradient changes, theirs are 0."""
    case = dataclasses.replace(CASE, dtype=dtype.name, causal="top_left")
    large = large or ml_dtypes.finfo(dtype).max
    x, qkv, dout, dlse, result, options = setup(backend, case, small)
    want = attention_backward(dout, *qkv, *result, dlse=dlse, **options)
    x.k[:, 21:], x.v[:, 21:] = large, -large
    q, k, v, dout, dlse = backend.arrays(x)
    got = attention_backward(dout, q, k, v, *attention(q, k, v, return_lse=True, **options), dlse=dlse, **options)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert same_bits(backend, a, b)
    assert (backend.numpy(got.dk)[:, 21:] == 0).all()
    assert (backend.numpy(got.dv)[:, 21:] == 0).all()


@TILES
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_products_with_masked_values_may_overflow(backend, dtype, small):
    """The largest number in a v that only row 20 sees, where dout is 0: other rows' dp of it is inf and not used."""
    case = dataclasses.replace(CASE, dtype=dtype.name, causal="top_left")
    x, (q, k, v), *_, options = setup(backend, case, small)
    x.dout[:, 20] = 0
    dout = backend.array(x.dout)
    want = attention_backward(dout, q, k, v, *attention(q, k, v, return_lse=True, **options), **options)
    x.v[:, 20] = ml_dtypes.finfo(dtype).max
    v = backend.array(x.v)
    got = attention_backward(dout, q, k, v, *attention(q, k, v, return_lse=True, **options), **options)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert same_bits(backend, a, b)
    assert (backend.numpy(got.dv)[:, 20] == 0).all()


@TILES
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_an_lse_of_minus_infinity_says_that_a_row_saw_nothing(backend, dtype, small):
    """Also where the diagonal lets it see keys: its dlse is not read, and it adds nothing to any gradient."""
    case = dataclasses.replace(CASE, dtype=dtype.name, causal=False)
    x, qkv, dout, _, (out, lse), options = setup(backend, case, small)
    out, lse, dlse = backend.numpy(out).copy(), backend.numpy(lse).copy(), x.dlse.copy()
    nothing = np.zeros(lse.shape, bool)
    nothing[:, [2, 3, 20]] = True
    out[nothing], lse[nothing], dlse[nothing] = 0, -np.inf, np.nan
    grads = attention_backward(dout, *qkv, *backend.arrays((out, lse)), dlse=backend.array(dlse), **options)
    grads = tuple(map(backend.numpy, grads[:3]))
    assert (grads[0][nothing] == 0).all()
    options.pop("tile", None)
    given = (x.dout, x.q, x.k, x.v, out, lse, grads)
    report = bounds.check_backward(*given, dlse=dlse, p_dtype=backend.p_dtype(dtype), **options)
    assert report.ok, str(report)


@pytest.mark.parametrize("name", data.RANDOM_SETS)
@pytest.mark.parametrize("dtype", data.DTYPES[:2], ids=str)
def test_random_data_needs_no_chain_lengths(backend, name, dtype):
    """On independent random elements the bounds hold without N."""
    if not reference.is_wide_enough(dtype):
        pytest.skip("longdouble is no wider than float64 on this machine")
    keys = 1000 if dtype == np.float32 else 200
    case = Case(seed=4, dtype=dtype.name, data=name, seqlen_q=100, seqlen_k=keys, head_dim=64, head_dim_v=64)
    x, qkv, dout, dlse, result, options = setup(backend, case)
    out, lse = map(backend.numpy, result)
    grads = attention_backward(dout, *qkv, *result, dlse=dlse, **options)
    report = bounds.check_forward(x.q, x.k, x.v, out, lse, random=True, **options) + bounds.check_backward(
        x.dout, x.q, x.k, x.v, out, lse, tuple(map(backend.numpy, grads[:3])), dlse=x.dlse, random=True, **options
    )
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", data.DTYPES[2:], ids=str)
def test_16_bit_results_are_about_the_ideal(backend, dtype):
    case = Case(seed=5, dtype=dtype.name, seqlen_q=120, seqlen_k=200, head_dim=64, head_dim_v=64, causal=True)
    x, qkv, dout, dlse, result, options = setup(backend, case)
    out, lse = map(backend.numpy, result)
    chains = bounds.longest_chains(*x[:3])
    want, limit = bounds.forward_limits(*x[:3], out_dtype=np.float32, chains=chains, **options)
    report = bounds.check_ideal("out", out, want.out, limit.out, reference.ideal_forward(*x[:3], **options))
    grads = attention_backward(dout, *qkv, *result, dlse=dlse, **options)
    arguments = (x.dout, x.q, x.k, x.v, out, lse)
    want, limit = bounds.backward_limits(*arguments, dlse=x.dlse, chains=chains, out_dtype=np.float32, **options)
    ideal = reference.ideal_backward(*arguments, dlse=x.dlse, **options)
    for name, got, w, most, best in zip(want._fields[:3], grads, want, limit, ideal, strict=False):
        report = report + bounds.check_ideal(name, backend.numpy(got), w, most, best, rms=1.5)
    assert report.ok, str(report)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_numpy_and_cupy_agree(gpu, dtype):
    case = dataclasses.replace(CASE, dtype=dtype.name, seqlen_q=150, seqlen_k=170)
    x, qkv, dout, dlse, (out, lse), options = setup(gpu, case)
    on_gpu = attention_backward(dout, *qkv, out, lse, dlse=dlse, **options)
    out, lse = gpu.numpy(out), gpu.numpy(lse)
    on_cpu = attention_backward(x.dout, x.q, x.k, x.v, out, lse, dlse=x.dlse, **options)
    _, limit = bounds.backward_limits(
        x.dout,
        x.q,
        x.k,
        x.v,
        out,
        lse,
        dlse=x.dlse,
        chains=bounds.longest_chains(*x[:3], backward=True),
        p_dtype=gpu.p_dtype(dtype),
        **options,
    )
    for name, a, b, most in zip(limit._fields[:3], on_gpu, on_cpu, limit, strict=False):
        worst = bounds.compare(name, gpu.numpy(a), b.astype(most.dtype), 2 * most)
        assert worst.ratio <= 1, str(worst)


def test_inputs_of_the_backward_are_not_written(backend):
    case = dataclasses.replace(CASE, batch=((2,), (), (1,)), dlse=True)
    assert cases.run(case, backend.xp).ok  # raises BrokenPromise where one is

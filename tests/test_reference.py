"""The specification against loops, complex steps and torch; the bounds against honest and planted errors."""

from __future__ import annotations

import cmath
import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from cupyflash.testing import bounds, data, reference

BFLOAT16 = ml_dtypes.bfloat16


# ------------------------------------------------------------------------ an independent, slow implementation


def attention_by_loops(q, k, v, *, scale=None, causal=False, q_offset=None):
    """out and lse of canonical arrays, one number at a time, real or complex."""
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3], np.shape(0 if q_offset is None else q_offset))
    q, k, v = (np.broadcast_to(a, (*batch, *a.shape[-3:])) for a in (q, k, v))
    (heads, seqlen_q, dim), (heads_k, seqlen_k, dim_v) = q.shape[-3:], v.shape[-3:]
    scale = dim**-0.5 if scale is None else scale
    kind = np.result_type(q, k, v)
    out, lse = (
        np.zeros((*batch, heads, seqlen_q, dim_v), kind),
        np.full((*batch, heads, seqlen_q), -np.inf, kind),
    )
    for b in itertools.product(*map(range, batch)):
        if q_offset is not None:
            offset = int(np.broadcast_to(q_offset, batch)[b])
        else:
            offset = 0 if causal == "top_left" else seqlen_k - seqlen_q
        for h, i in itertools.product(range(heads), range(seqlen_q)):
            g = h // (heads // heads_k)
            seen = [j for j in range(seqlen_k) if not causal or j <= i + offset]
            if not seen:
                continue
            s = [scale * sum(q[(*b, h, i, d)] * k[(*b, g, j, d)] for d in range(dim)) for j in seen]
            top = max(x.real for x in s)
            e = [cmath.exp(x - top) if kind.kind == "c" else math.exp(x - top) for x in s]
            total = sum(e)
            lse[(*b, h, i)] = top + (cmath.log(total) if kind.kind == "c" else math.log(total))
            for d in range(dim_v):
                out[(*b, h, i, d)] = sum(x * v[(*b, g, j, d)] for x, j in zip(e, seen, strict=True)) / total
    return out, lse


def complex_steps(function, x, h=1e-20):
    """The gradient of a scalar analytic function: Im f(x + i h e) / h, with no cancellation."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        y = x.astype(complex)
        y[index] += 1j * h
        gradient[index] = function(y).imag / h
    return gradient


SMALL = {
    "one": {"q": (1, 1, 1), "k": (1, 1, 1), "v": (1, 1, 1)},
    "plain": {"q": (2, 3, 2), "k": (2, 4, 2), "v": (2, 4, 3)},
    "causal": {"q": (1, 3, 2), "k": (1, 5, 2), "v": (1, 5, 1), "causal": True},
    "causal, more rows than keys": {"q": (1, 5, 2), "k": (1, 3, 2), "v": (1, 3, 2), "causal": True},
    "top left": {"q": (1, 3, 2), "k": (1, 5, 2), "v": (1, 5, 1), "causal": "top_left"},
    "groups": {"q": (4, 2, 2), "k": (2, 3, 2), "v": (2, 3, 2), "causal": True},
    "broadcast": {"q": (2, 1, 1, 2, 1), "k": (3, 1, 2, 1), "v": (1, 2, 2), "scale": -0.7},
    "offset": {"q": (1, 4, 2), "k": (1, 3, 2), "v": (1, 3, 2), "causal": True, "q_offset": -2},
    "offsets": {
        "q": (2, 2, 1, 2, 2),
        "k": (2, 1, 1, 3, 2),
        "v": (1, 3, 1),
        "causal": True,
        "q_offset": np.array([[-3, 1], [0, 9]]),
    },
    "scale 0": {"q": (1, 2, 3), "k": (1, 3, 3), "v": (1, 3, 2), "scale": 0.0},
}


def draw_small(name, rng):
    options = dict(SMALL[name])
    q, k, v = (rng.standard_normal(options.pop(n)) for n in "qkv")
    return q, k, v, options


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_the_loops(name):
    q, k, v, options = draw_small(name, np.random.default_rng(1))
    out, lse = reference.forward(q, k, v, **options)
    want_out, want_lse = attention_by_loops(q, k, v, **options)
    np.testing.assert_allclose(out.astype(float), want_out, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(lse.astype(float), want_lse, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("with_dlse", [False, True], ids=["dout", "dout and dlse"])
@pytest.mark.parametrize("name", SMALL)
def test_backward_is_the_complex_step(name, with_dlse):
    rng = np.random.default_rng(2)
    q, k, v, options = draw_small(name, rng)
    out, lse = reference.forward(q, k, v, **options)
    dout = rng.standard_normal(out.shape)
    dlse = np.where(lse == -np.inf, np.nan, rng.standard_normal(lse.shape)) if with_dlse else None
    got = reference.backward(dout, q, k, v, out, lse, dlse=dlse, **options)

    def scalar(q, k, v):
        o, s = attention_by_loops(q, k, v, **options)
        return (dout * o).sum() + (
            0 if dlse is None else (np.where(lse == -np.inf, 0, dlse) * np.where(lse == -np.inf, 0, s)).sum()
        )

    for n, x in enumerate((q, k, v)):
        want = complex_steps(lambda y, n=n: scalar(*(y if m == n else a for m, a in enumerate((q, k, v)))), x)
        assert got[n].shape == x.shape
        np.testing.assert_allclose(got[n].astype(float), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_against_torch(causal):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    q, k, v, dout = (rng.standard_normal(s) for s in ((2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 5), (2, 4, 6, 5)))
    mask = np.tri(6, 9, 3 if causal is True else 0, dtype=bool) if causal else np.ones((6, 9), bool)
    t = [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*t, attn_mask=torch.tensor(mask), enable_gqa=True)
    want.backward(torch.tensor(dout))
    out, lse = reference.forward(q, k, v, causal=causal)
    np.testing.assert_allclose(out.astype(float), want.detach().numpy(), rtol=1e-12)
    got = reference.backward(dout, q, k, v, out, lse, causal=causal)
    for gradient, x in zip(got[:3], t, strict=True):
        np.testing.assert_allclose(gradient.astype(float), x.grad.numpy(), rtol=1e-11, atol=1e-14)


# ------------------------------------------------------------------------------------- shapes and conventions


def test_layouts_and_single_heads_are_the_same_numbers():
    rng = np.random.default_rng(4)
    q, k, v, dout = (rng.standard_normal(s) for s in ((3, 4, 6, 5), (3, 2, 7, 5), (3, 2, 7, 2), (3, 4, 6, 2)))
    out, lse = reference.forward(q, k, v, causal=True)
    grads = reference.backward(dout, q, k, v, out, lse, causal=True)
    swapped = [a.swapaxes(-2, -3) for a in (q, k, v)]
    out_shd, lse_shd = reference.forward(*swapped, causal=True, layout="shd")
    np.testing.assert_array_equal(out_shd.swapaxes(-2, -3), out)
    np.testing.assert_array_equal(lse_shd, lse)
    grads_shd = reference.backward(dout.swapaxes(-2, -3), *swapped, out_shd, lse_shd, causal=True, layout="shd")
    for a, b in zip(grads_shd[:3], grads[:3], strict=True):
        np.testing.assert_array_equal(a.swapaxes(-2, -3), b)

    one = reference.forward(q[0, 0], k[0, 0], v[0, 0], causal=True)
    np.testing.assert_array_equal(one.out, out[0, 0])
    np.testing.assert_array_equal(one.lse, lse[0, 0])
    single = reference.backward(dout[0, 0], q[0, 0], k[0, 0], v[0, 0], *one, causal=True)
    np.testing.assert_array_equal(single.dq, grads.dq[0, 0])
    assert [g.shape for g in single[:3]] == [(6, 5), (7, 5), (7, 2)]


def test_rows_and_keys_are_parts_of_the_whole():
    rng = np.random.default_rng(5)
    q, k, v, dout = (rng.standard_normal(s) for s in ((2, 9, 4, 3), (11, 2, 3), (2, 11, 2, 5), (2, 9, 4, 5)))
    options = {"layout": "shd", "causal": True, "q_offset": np.array([1, -4])}
    out, lse = reference.forward(q, k, v, **options)
    whole = reference.backward(dout, q, k, v, out, lse, **options)
    rows, keys = [8, 0, 3], [10, 2]
    part = reference.forward(q, k, v, rows=rows, **options)
    np.testing.assert_array_equal(part.out, out[:, rows])
    np.testing.assert_array_equal(part.lse, lse[..., rows])
    got = reference.backward(dout, q, k, v, out, lse, rows=rows, keys=keys, **options)
    for a, b in zip(got[:3], (whole.dq[:, rows], whole.dk[keys], whole.dv[:, keys]), strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-15)
    alone = reference.backward(dout, q, k, v, out, lse, wrt=("k",), **options)
    assert [name for name, x in alone._asdict().items() if x is not None] == ["dk"]


def test_empty_rows_and_empty_arrays():
    q, k, v = np.ones((1, 3, 2)), np.ones((1, 2, 2)), np.ones((1, 2, 4))
    options = {"causal": True, "q_offset": -2}  # only row 2 sees a key, key 0
    out, lse = reference.forward(q, k, v, **options)
    assert list(lse[0, :2]) == [-np.inf, -np.inf]
    assert abs(lse[0, 2] - math.sqrt(2)) < 1e-15
    np.testing.assert_array_equal(out[0, :, 0], [0, 0, 1])
    dlse = np.array([[np.nan, np.inf, 1.0]])  # not read where lse is -inf
    grads = reference.backward(np.ones(out.shape), q, k, v, out, lse, dlse=dlse, **options)
    assert all(np.isfinite(g).all() for g in grads[:3])
    assert (grads.dq[0, :2] == 0).all()
    assert (grads.dq[0, 2] != 0).all()
    assert (grads.dk[0, 1] == 0).all()
    assert (grads.dv[0] == [[1] * 4, [0] * 4]).all()
    for shape_q, shape_k in (((1, 3, 2), (1, 0, 2)), ((1, 0, 2), (1, 3, 2)), ((0, 1, 3, 2), (1, 3, 2))):
        q, k = np.ones(shape_q), np.ones(shape_k)
        out, lse = reference.forward(q, k, k)
        assert out.shape == shape_q
        assert (out == 0).all()
        assert (lse == -np.inf).all()
        grads = reference.backward(out, q, k, k, out, lse)
        assert [g.shape for g in grads[:3]] == [shape_q, shape_k, shape_k]
        assert all((g == 0).all() for g in grads[:3])


def test_working_types():
    assert reference.working_type(np.float64) == np.longdouble
    for dtype in (np.float32, np.float16, BFLOAT16):
        assert reference.working_type(dtype) == np.float64
        assert reference.is_wide_enough(dtype)


# ----------------------------------------------------------------------------------------------------- bounds


def split(x, dtype, factor):
    """The sum of two numbers of dtype that stands for x, which is multiplied by a power of 2 meanwhile."""
    high = (x * factor).astype(dtype)
    return (high.astype(x.dtype) + (x * factor - high.astype(x.dtype)).astype(dtype).astype(x.dtype)) / factor


def honest(x, *, causal, base2, block_n, p_dtype=None, p_parts=1, wrong=None):
    """Attention as an honest kernel would do it, in the accumulator's type, or with a planted error."""

    def as_operand(numbers, of_p):
        if p_dtype is None:
            return numbers
        if p_parts == 1:
            return numbers.astype(p_dtype).astype(acc)
        factor = 1
        if p_dtype == np.float16:  # P and dS are brought into its range
            factor = 2.0**12 if of_p else 2.0 ** min(60, 15 - np.frexp(abs(numbers).max())[1])
        return split(numbers, p_dtype, acc(factor))

    acc = np.float64 if x.q.dtype == np.float64 else np.float32
    q, k, v, dout = (a.astype(acc) for a in x[:4])
    k, v = (reference.heads_to(a, q.shape[-3]) for a in (k, v))
    scale = q.shape[-1] ** -0.5 * (1 + 1e-4 if wrong == "scale" else 1)
    factor, exp, log = (acc(scale * math.log2(math.e)), np.exp2, np.log2) if base2 else (acc(scale), np.exp, np.log)
    rows, keys = q.shape[-2], k.shape[-2]
    visible = np.tri(rows, keys, keys - rows - (wrong == "mask"), dtype=bool) if causal else np.ones((rows, keys), bool)

    top = np.full((*q.shape[:-1], 1), -np.inf, acc)
    total, acc_o = np.zeros_like(top), np.zeros((*q.shape[:-1], v.shape[-1]), acc)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for n in range(0, keys, block_n):
            block = slice(n, n + block_n)
            s = np.where(visible[:, block], (q @ k[..., block, :].swapaxes(-1, -2)) * factor, acc(-np.inf))
            new = np.maximum(top, s.max(axis=-1, keepdims=True))
            p = exp(s - np.where(new == -np.inf, acc(0), new))
            old = exp(top - np.where(new == -np.inf, acc(0), new))
            total, top = total * (1 if wrong == "rescale" else old) + p.sum(axis=-1, keepdims=True), new
            acc_o = acc_o * old + as_operand(p, True) @ v[..., block, :]
        lse = ((top + log(total)) * acc(math.log(2) if base2 else 1))[..., 0]
        out = np.where(total > 0, acc_o / np.where(total > 0, total, acc(1)), acc(0)).astype(x.q.dtype)

        s = (q @ k.swapaxes(-1, -2)) * factor - (lse * acc(math.log2(math.e) if base2 else 1))[..., None]
        p = np.where(visible & (lse != -np.inf)[..., None], exp(s), acc(0))
        delta = (dout * out.astype(acc)).sum(axis=-1) - (0 if wrong == "dlse" else x.dlse)
        ds = p * (dout @ v.swapaxes(-1, -2) - delta[..., None])
        p, ds = as_operand(p, True), as_operand(ds, False)
        heads_k = x.k.shape[-3]
        dq = ds @ k * acc(scale)
        dk = reference.heads_from(ds.swapaxes(-1, -2) @ q, heads_k) * acc(scale)
        dv = reference.heads_from(p.swapaxes(-1, -2) @ dout, heads_k)
        return out, lse, tuple(g.astype(x.q.dtype) for g in (dq, dk, dv))


def judge(x, causal, result, **options):
    out, lse, grads = result
    return bounds.check_forward(x.q, x.k, x.v, out, lse, causal=causal, **options) + bounds.check_backward(
        x.dout, x.q, x.k, x.v, out, lse, grads, dlse=x.dlse, causal=causal,
        **{name: value for name, value in options.items() if name != "block_n"},
    )  # fmt: skip


def draw_for(name, dtype, heads=(2, 1), rows=40, keys=70, dim=16, dim_v=9):
    if not reference.is_wide_enough(dtype):
        pytest.skip("longdouble is no wider than float64 on this machine")
    shapes = data.Shapes((heads[0], rows, dim), (heads[1], keys, dim), (heads[1], keys, dim_v), (heads[0], rows, dim_v))
    return data.draw(name, np.random.default_rng(6), shapes, dtype)


FITTING = [(n, d) for d in data.DTYPES for n in data.DATA_SETS if data.suits(n, d)]


@pytest.mark.parametrize("base2", [True, False], ids=["exp2", "exp"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("name", "dtype"), FITTING, ids=lambda x: getattr(x, "name", x))
def test_an_honest_computation_keeps_the_bounds(name, dtype, causal, base2):
    x = draw_for(name, dtype)
    report = judge(x, causal, honest(x, causal=causal, base2=base2, block_n=16))
    assert report.ok, str(report)
    if name in data.RANDOM_SETS:
        report = judge(x, causal, honest(x, causal=causal, base2=base2, block_n=64), random=True)
        assert report.ok, str(report)


@pytest.mark.parametrize("wrong", ["scale", "mask", "rescale", "dlse"])
@pytest.mark.parametrize("dtype", data.DTYPES[:2], ids=str)
def test_planted_errors_break_the_bounds(dtype, wrong):
    x = draw_for("rising", dtype)
    right = judge(x, True, honest(x, causal=True, base2=True, block_n=16), block_n=16)
    report = judge(x, True, honest(x, causal=True, base2=True, block_n=16, wrong=wrong), block_n=16)
    assert right.ratio < 1 < 10 < report.ratio, str(report)


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n, d in FITTING if d.itemsize == 2], ids=lambda x: getattr(x, "name", x)
)
def test_rounded_p_needs_and_keeps_its_own_bound(name, dtype):
    x = draw_for(name, dtype, keys=200)
    result = honest(x, causal=True, base2=True, block_n=32, p_dtype=dtype)
    report = judge(x, True, result, p_dtype=dtype)
    assert report.ok, str(report)
    if name == "normal":
        assert not judge(x, True, result).ok


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n, d in FITTING if d.itemsize == 2], ids=lambda x: getattr(x, "name", x)
)
def test_p_in_two_parts_keeps_its_own_bound(name, dtype):
    """Which is that of P as it is but for 2^-16 or less, and far from that of P rounded once."""
    x = draw_for(name, dtype, keys=200)
    result = honest(x, causal=True, base2=True, block_n=32, p_dtype=dtype, p_parts=2)
    report = judge(x, True, result, p_dtype=dtype, p_parts=2)
    assert report.ok, str(report)
    if name == "normal":
        once = honest(x, causal=True, base2=True, block_n=32, p_dtype=dtype)
        assert not judge(x, True, once, p_dtype=dtype, p_parts=2).ok


@pytest.mark.parametrize("dtype", data.DTYPES[2:], ids=str)
def test_rounded_p_is_about_the_ideal(dtype):
    x = draw_for("normal", dtype, rows=200, keys=300, dim=64, dim_v=64)
    out, lse, grads = honest(x, causal=True, base2=True, block_n=64, p_dtype=dtype)
    chains = bounds.longest_chains(x.q, x.k, x.v)
    want, limit = bounds.forward_limits(x.q, x.k, x.v, out_dtype=np.float32, chains=chains, causal=True)
    ideal = reference.ideal_forward(x.q, x.k, x.v, causal=True)
    report = bounds.check_ideal("out", out, want.out, limit.out, ideal)
    assert report.ok, str(report)
    coarse = bounds.check_ideal(
        "out",
        (out.astype(np.float32) * (1 + 4 * float(ml_dtypes.finfo(dtype).eps))).astype(dtype),
        want.out,
        limit.out,
        ideal,
    )
    assert not coarse.ok

    arguments = (x.dout, x.q, x.k, x.v, out, lse)
    want, limit = bounds.backward_limits(*arguments, dlse=x.dlse, chains=chains, causal=True, out_dtype=np.float32)
    ideal = reference.ideal_backward(*arguments, dlse=x.dlse, causal=True)
    for name, got, w, most, best in zip(want._fields[:3], grads, want, limit, ideal, strict=False):
        report = bounds.check_ideal(name, got, w, most, best, rms=1.5)
        assert report.ok, str(report)


def test_the_worst_element_is_named():
    x = draw_for("normal", np.float32)
    out, lse, _ = honest(x, causal=False, base2=True, block_n=16)
    out[1, 7, 3] += 1
    report = bounds.check_forward(x.q, x.k, x.v, out, lse)
    assert not report.ok
    assert report.worst[0].at == (1, 7, 3)
    assert "out[1, 7, 3]" in str(report)
    out[1, 7, 3] = np.nan
    assert bounds.check_forward(x.q, x.k, x.v, out).ratio == np.inf
    where = np.ones((2, 40), bool)
    where[1, 7] = False
    assert bounds.check_forward(x.q, x.k, x.v, out, lse, where=where).ok
    with pytest.raises(AssertionError, match="shape"):
        bounds.check_forward(x.q, x.k, x.v, out[:1])


def test_limits_of_huge_logits_are_numbers():
    """Where nothing is promised of p, out is still an average of v."""
    x = draw_for("normal", np.float32)
    x = x._replace(q=1e6 * x.q, k=1e6 * x.k, v=np.where(np.arange(9) == 4, 0, x.v).astype(np.float32))
    out = reference.forward(x.q, x.k, x.v, causal=True).out.astype(np.float32)
    report = bounds.check_forward(x.q, x.k, x.v, out, causal=True)
    assert report.ok, str(report)
    assert 1 < report.worst[0].limit < 10
    assert not bounds.check_forward(x.q, x.k, x.v, out + 100, causal=True).ok


def test_sampled_checks_see_sampled_rows_only():
    x = draw_for("normal", np.float32)
    out, lse, grads = honest(x, causal=True, base2=True, block_n=16)
    out[0, 5], grads[0][0, 5], grads[1][0, 6] = 9, 9, 9
    fine = [0, 1, 20, 39]
    assert bounds.check_forward(x.q, x.k, x.v, out, lse, rows=fine, causal=True).ok
    assert not bounds.check_forward(x.q, x.k, x.v, out, lse, rows=[5], causal=True).ok
    out, lse, _ = honest(x, causal=True, base2=True, block_n=16)
    arguments = (x.dout, x.q, x.k, x.v, out, lse, grads)
    assert bounds.check_backward(*arguments, dlse=x.dlse, rows=fine, keys=fine, causal=True).ok
    dq, dk, dv = bounds.check_backward(*arguments, dlse=x.dlse, rows=[3, 5], keys=[6], causal=True).worst
    assert dq.ratio > 1
    assert dk.ratio > 1
    assert dv.ratio < 1
    assert dq.at[:2] == (0, 5), "named by its place in the whole array"


@pytest.mark.parametrize("dtype", data.DTYPES[2:], ids=str)
def test_half_ulp_is_half_an_ulp(dtype):
    def number(x):
        return np.array(x, dtype)

    for x in (1.0, 1.5, 1.99, 2.0, 3e-3, 100.0, 6e-5, 6e-8, 0.0):
        x = number(x)
        ulp = float(np.nextafter(x, number(np.inf)).astype(float)) - float(x.astype(float))
        got = float(bounds.half_ulp(x.astype(float), dtype)) - bounds.flushed(dtype)
        assert got == ulp / 2, x


@pytest.mark.parametrize("name", ["exp", "exp2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponentials_are_as_exact_as_the_bounds_say(dtype, name):
    if not reference.is_wide_enough(dtype):
        pytest.skip("longdouble is no wider than float64 on this machine")
    function, work = getattr(np, name), reference.working_type(dtype)
    x = -np.geomspace(1e-6, 80, 100_000).astype(dtype)
    exact = function(x.astype(work))
    assert (abs(function(x) - exact) / exact).max() <= bounds.EXP * np.finfo(dtype).eps / 2


# ------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("style", data.STYLES)
def test_placed_arrays_know_what_was_written(style):
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    placed = data.place(values, style)
    if style != "repeated":
        np.testing.assert_array_equal(placed.array, values)
    assert placed.unwritten()
    assert placed.guards_intact()
    placed.array[1, 2, 3] = -1
    assert not placed.unwritten()
    assert placed.guards_intact()
    outside = np.flatnonzero(~placed.inside)
    assert outside.size >= 2 * data.GUARD
    gaps = outside[(outside > data.GUARD) & (outside < placed.inside.size - data.GUARD)]
    for byte in (outside[0], outside[-1], *gaps[:1]):
        placed = data.place(values, style)
        placed.buffer[byte] ^= 1
        assert not placed.unwritten()
        assert not placed.guards_intact()


@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_poison_is_nan(dtype):
    for style in data.OUTPUT_STYLES:
        assert np.isnan(data.place_empty((2, 3), dtype, style).array.astype(float)).all()


def test_styles_are_what_they_say():
    values = np.zeros((4, 6, 8), np.float32)
    strides = {style: data.place(values, style).array.strides for style in data.STYLES}
    assert all(s < 0 for s in strides["backwards"])
    assert 0 in strides["repeated"]
    assert strides["swapped"][0] < strides["swapped"][1]
    assert strides["gaps"][-1] == 8
    assert strides["fortran"][0] < strides["fortran"][-1]
    assert data.place(values, "plain").array.ctypes.data % 64 == 0
    assert data.place(values, "shifted").array.ctypes.data % 16 == 4
    assert not data.place(values, "misaligned").array.flags.aligned


def test_a_seed_replays_a_case():
    cases = [data.random_case(data.random_pick(np.random.default_rng(9))) for _ in range(2)]
    assert cases[0] == cases[1] == eval(repr(cases[0]), {"Case": data.Case})
    for a, b in zip(*(case.inputs() for case in cases), strict=True):
        assert a.tobytes() == b.tobytes()


def test_random_cases_reach_all_there_is():
    rng = np.random.default_rng(10)
    cases = [data.random_case(data.random_pick(rng), work=100_000) for _ in range(400)]
    for name, values in (
        ("dtype", {d.name for d in data.DTYPES}),
        ("layout", {"hsd", "shd"}),
        ("causal", {False, True, "top_left"}),
        ("single_head", {False, True}),
        ("out", {None, "array", "pair", "float32"}),
        ("data", set(data.DATA_SETS)),
    ):
        assert {getattr(case, name) for case in cases} == values, name
    assert {style for case in cases for style in case.styles} == set(data.STYLES)
    assert any(case.offset_shape for case in cases)
    assert any(0 in case.shapes.dout for case in cases)
    assert any(len(set(case.batch)) == 3 for case in cases)
    assert all(case.work <= 100_000 for case in cases)

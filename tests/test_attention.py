"""The forward, and both directions of the table of cases and of random problems, on every backend."""

from __future__ import annotations

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from cupyflash import AttentionResult, Tile, attention, explain, prepare
from cupyflash.testing import bounds, cases, data, reference
from cupyflash.testing.data import Case

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def check(backend, case, **options):
    """Both directions of `case` within the bounds, everything else untouched."""
    if not reference.is_wide_enough(case.inputs().q.dtype):
        pytest.skip("longdouble is no wider than float64 on this machine")
    report = cases.run(case, backend.xp, **options)
    assert report.ok, f"{case}\n{report}"


# -------------------------------------------------------------------------------------------------- the table

PLAIN = Case(seed=1, num_heads_k=2, seqlen_q=33, seqlen_k=47, head_dim=16, head_dim_v=16)


def vary(**changes):
    """The plain case with some of its fields changed."""
    return dataclasses.replace(PLAIN, **changes)


TABLE = {
    "plain": PLAIN,
    "one of each": Case(seed=1),
    "a single head": vary(single_head=True, num_heads_k=1, dlse=True),
    "shd": vary(layout="shd"),
    "single head, shd": vary(layout="shd", single_head=True, num_heads_k=1),
    "grouped heads": vary(group=3, causal=True),
    "one kv head": vary(num_heads_k=1, group=6),
    "one kv head, shd": vary(num_heads_k=1, group=4, layout="shd", dlse=True),
    "batch": vary(batch=((3,), (3,), (3,))),
    "batch of 5 axes": vary(batch=((2, 1, 1, 2, 1), (2, 1, 1, 2, 1), (2, 1, 1, 2, 1)), seqlen_q=9, seqlen_k=11),
    "q broadcast": vary(batch=((), (3,), (3,))),
    "k, v broadcast": vary(batch=((3,), (1,), ()), causal=True, dlse=True),
    "k broadcast alone": vary(batch=((2, 3), (1, 3), (2, 1))),
    "all broadcast": vary(batch=((2, 1, 1), (3, 1), (4,)), seqlen_q=5, seqlen_k=7, group=2, layout="shd", dlse=True),
    "more rows than keys": vary(seqlen_q=70, seqlen_k=20, causal=True),
    "more keys than rows": vary(seqlen_q=20, seqlen_k=140, causal=True),
    "top left, more rows": vary(seqlen_q=70, seqlen_k=20, causal="top_left"),
    "top left, more keys": vary(seqlen_q=20, seqlen_k=140, causal="top_left"),
    "one query": vary(seqlen_q=1, seqlen_k=300, group=4, causal=True),
    "one key": vary(seqlen_q=100, seqlen_k=1),
    "one key, causal": vary(seqlen_q=100, seqlen_k=1, causal=True, dlse=True),
    "several blocks": vary(seqlen_q=300, seqlen_k=700, num_heads_k=1, causal=True, dlse=True),
    "block boundaries": vary(seqlen_q=256, seqlen_k=512, num_heads_k=1, causal="top_left"),
    "scale 0": vary(scale=0.0),
    "scale < 0": vary(scale=-0.4, causal=True),
    "scale int": vary(scale=1),
    "offset 0": vary(causal=True, q_offset=0),
    "offset sees nothing": vary(causal=True, q_offset=-33, dlse=True),
    "offset, the last row sees one key": vary(causal=True, q_offset=-32, dlse=True),
    "offset sees all": vary(causal=True, q_offset=46),
    "offset far below": vary(causal=True, q_offset=-(2**40), dlse=True),
    "offset far above": vary(causal=True, q_offset=2**40),
    "offset without causal": vary(q_offset=-5),
    "offsets": vary(batch=((3, 2), (3, 2), (3, 2)), causal=True, offset_shape=(3, 2), dlse=True),
    "offsets, broadcast": vary(batch=((3, 2), (2,), (3, 1)), causal=True, offset_shape=(3, 1)),
    "offsets, fewer axes": vary(batch=((3, 2),) * 3, causal=True, offset_shape=(2,)),
    "offsets along v's axes alone": vary(batch=((1,), (1,), (3,)), causal=True, offset_shape=(3,), group=2, dlse=True),
    "offsets along k's axes alone": vary(batch=((), (2, 3), (3,)), causal=True, offset_shape=(2, 1), layout="shd"),
    "offsets of no axis": vary(causal=True, offset_shape=()),
    "offsets without causal": vary(batch=((3,),) * 3, offset_shape=(3,)),
    "no key": vary(seqlen_k=0, dlse=True),
    "no key, causal": vary(seqlen_k=0, causal=True),
    "no key, k and v anywhere": vary(seqlen_k=0, styles=("plain", "shifted", "shifted", *("plain",) * 6)),
    "no query": vary(seqlen_q=0, dlse=True),
    "no query, causal": vary(seqlen_q=0, causal=True),
    "no query, q anywhere": vary(seqlen_q=0, styles=("shifted", *("plain",) * 8)),
    "neither": vary(seqlen_q=0, seqlen_k=0),
    "no batch": vary(batch=((2, 0),) * 3, dlse=True),
    "no batch, k broadcast": vary(batch=((0,), (1,), ())),
    "out": vary(out="array"),
    "out and lse": vary(out="pair", grads_out=True),
    "out and lse, backwards": vary(out="pair", grads_out=True, styles=("plain",) * 4 + ("backwards",) * 5),
    "out and lse, gaps": vary(
        out="pair", grads_out=True, styles=("plain",) * 4 + ("gaps",) * 5, dlse=True, causal=True
    ),
    "out and lse, fortran": vary(out="pair", grads_out=True, styles=("plain",) * 4 + ("fortran",) * 5),
    "only dv": vary(wrt=("v",)),
    "only dq": vary(wrt=("q",), dlse=True),
    "only dk, given": vary(wrt=("k",), grads_out=True, group=2),
    "dk and dq": vary(wrt=("k", "q"), causal=True),
}


@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.share(90)
def test_table(backend, name, dtype):
    case = dataclasses.replace(TABLE[name], dtype=dtype.name)
    check(backend, case)
    if dtype.itemsize == 2:
        check(backend, dataclasses.replace(case, out="float32"))
        check(backend, case, family=backend.family)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("dim", "dim_v"),
    [(d, d) for d in (*range(1, 10), 16, 31, 64, 80, 100, 128, 129, 200, 255, 256)]
    + [(1, 256), (256, 1), (64, 128), (128, 64), (192, 128), (3, 80), (17, 5), (40, 33)],
)
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
@pytest.mark.share(40)
def test_widths(backend, dim, dim_v, dtype, causal):
    case = Case(seed=2, dtype=dtype.name, seqlen_q=19, seqlen_k=37, head_dim=dim, head_dim_v=dim_v, group=2)
    check(backend, dataclasses.replace(case, causal=causal, dlse=True))


@pytest.mark.parametrize("dim", [257, 320, 513])
def test_numpy_takes_any_width(dim):
    case = Case(seed=2, seqlen_q=9, seqlen_k=20, head_dim=dim, head_dim_v=dim + 1)
    assert cases.run(case).ok


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in data.DATA_SETS for dtype in data.DTYPES if data.suits(name, dtype)],
    ids=lambda x: getattr(x, "name", x),
)
@pytest.mark.parametrize("small", [False, True], ids=["own tile", "small tile"])
@pytest.mark.share(110)
def test_data_sets(backend, name, dtype, causal, small):
    case = Case(
        seed=3,
        dtype=dtype.name,
        data=name,
        group=2,
        seqlen_q=70,
        seqlen_k=300,
        head_dim=24,
        head_dim_v=17,
        causal=causal,
    )
    check(backend, dataclasses.replace(case, dlse=True), tile=backend.small_tile(dtype) if small else None)


ARRAYS = ("q", "k", "v", "dout", "out", "lse", "dq", "dk", "dv")  # in the order of Case.styles


@pytest.mark.parametrize(
    ("style", "where"),
    [(s, n) for s in data.STYLES for n in range(9) if n < 4 or s in data.OUTPUT_STYLES],
    ids=lambda x: x if isinstance(x, str) else ARRAYS[x],
)
@pytest.mark.parametrize("layout", ["hsd", "shd"])
@pytest.mark.share(60)
def test_memory_styles(backend, layout, style, where):
    if style not in backend.styles:
        pytest.skip("a GPU loads elements at multiples of their size only")
    styles = tuple(style if n == where else "plain" for n in range(9))
    case = vary(
        batch=((2,),) * 3,
        layout=layout,
        styles=styles,
        causal=True,
        out="pair",
        grads_out=True,
        group=2,
    )
    check(backend, case)


@hypothesis.given(choices=st.data())
def test_random_problems(backend, choices):
    def pick(n):
        return choices.draw(st.integers(0, n - 1))

    work = 2_000_000 if backend.name == "numpy" else 50_000_000
    case = data.random_case(pick, styles=backend.styles, work=work)
    hypothesis.note(repr(case))
    check(backend, case)


# ------------------------------------------------------------------------------------------ results and types


@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_what_comes_back(backend, dtype):
    q, k, v = backend.arrays(np.ones((3, 2, 4, 5)), dtype)
    out = attention(q, k, v)
    assert isinstance(out, backend.xp.ndarray)
    assert out.dtype == dtype
    result = attention(q, k, v, return_lse=True)
    assert isinstance(result, AttentionResult)
    assert result._fields == ("out", "lse")
    assert result.lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert out.shape == (2, 4, 5)
    assert result.lse.shape == (2, 4)
    np.testing.assert_array_equal(backend.numpy(out), np.ones((2, 4, 5), dtype))


def test_constant_logits_give_log_of_the_count(backend):
    q, k, v = backend.arrays([np.zeros((1, 6, 3)), np.ones((1, 6, 3)), np.ones((1, 6, 2))], np.float64)
    lse = backend.numpy(attention(q, k, v, causal=True, return_lse=True).lse)
    np.testing.assert_allclose(lse[0], np.log(np.arange(1, 7)), rtol=4e-16)


@pytest.mark.parametrize("scale", [1, np.float32(0.5), np.int64(2), np.float16(0.25), True and 0.125])
def test_scale_is_any_real(backend, scale):
    rng = np.random.default_rng(0)
    q, k, v = backend.arrays(rng.standard_normal((3, 1, 4, 5)), np.float32)
    got = attention(q, k, v, scale=scale)
    np.testing.assert_array_equal(backend.numpy(got), backend.numpy(attention(q, k, v, scale=float(scale))))


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint8, np.uint64])
def test_offsets_of_any_integer_type(backend, kind):
    rng = np.random.default_rng(0)
    q, k, v = backend.arrays(rng.standard_normal((3, 2, 1, 4, 5)), np.float32)
    offsets = np.array([1, 2])
    want = backend.numpy(attention(q, k, v, causal=True, q_offset=offsets))
    for given in (offsets.astype(kind), backend.xp.asarray(offsets.astype(kind))):
        np.testing.assert_array_equal(backend.numpy(attention(q, k, v, causal=True, q_offset=given)), want)
    one = backend.numpy(attention(q, k, v, causal=True, q_offset=kind(1)))
    np.testing.assert_array_equal(one[0], want[0])


def test_offsets_are_not_changed(backend):
    q, k, v = backend.arrays(np.ones((3, 2, 1, 4, 5)), np.float32)
    offsets = backend.xp.asarray([1, -7])
    attention(q, k, v, causal=True, q_offset=offsets)
    assert offsets.tolist() == [1, -7]


def test_out_as_array_and_as_pair(backend):
    rng = np.random.default_rng(1)
    q, k, v = backend.arrays(rng.standard_normal((3, 2, 7, 4)), np.float32)
    want = attention(q, k, v, return_lse=True)
    out, lse = backend.xp.empty_like(want.out), backend.xp.empty_like(want.lse)
    assert attention(q, k, v, out=out) is out
    assert backend.numpy(out).tobytes() == backend.numpy(want.out).tobytes()
    for pair in ((out, lse), AttentionResult(out, lse)):
        out[...], lse[...] = 0, 0
        result = attention(q, k, v, out=pair)
        assert isinstance(result, AttentionResult)
        assert result.out is out
        assert result.lse is lse
        for got, w in zip(result, want, strict=True):
            assert backend.numpy(got).tobytes() == backend.numpy(w).tobytes()
    out[...] = 0
    result = attention(q, k, v, out=out, return_lse=True)
    assert result.out is out
    assert backend.numpy(result.lse).tobytes() == backend.numpy(want.lse).tobytes()


@pytest.mark.parametrize("dtype", data.DTYPES[2:], ids=str)
def test_float32_out_of_16_bit_inputs_is_not_rounded(backend, dtype):
    rng = np.random.default_rng(1)
    q, k, v = backend.arrays(rng.standard_normal((3, 2, 7, 4)), dtype)
    exact = backend.xp.empty((2, 7, 4), np.float32)
    attention(q, k, v, out=exact)
    rounded = backend.numpy(attention(q, k, v))
    exact = backend.numpy(exact)
    assert (exact != rounded.astype(np.float32)).any()
    np.testing.assert_array_equal(exact.astype(dtype), rounded)


def test_slices_of_one_packed_array(backend):
    """q, k, v and out as slices of one array share a buffer, and no element."""
    rng = np.random.default_rng(2)
    packed = backend.array(rng.standard_normal((2, 30, 4, 3, 8)), np.float32)  # (B, S, H, q k v, D)
    q, k, v = (packed[..., n, :] for n in range(3))
    want = attention(q, k, v, layout="shd", causal=True)
    wider = backend.xp.zeros((2, 30, 4, 4, 8), np.float32)
    wider[..., :3, :] = packed
    q, k, v, out = (wider[..., n, :] for n in range(4))
    attention(q, k, v, layout="shd", causal=True, out=out)
    assert backend.numpy(wider[..., 3, :]).tobytes() == backend.numpy(want).tobytes()
    assert backend.numpy(wider[..., :3, :]).tobytes() == backend.numpy(packed).tobytes()


@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_precisions(backend, dtype):
    rng = np.random.default_rng(3)
    x = data.Inputs(*(a.astype(dtype) for a in rng.standard_normal((5, 1, 40, 16))))
    q, k, v = backend.arrays(x[:3])
    allowed = {2: (None, "highest"), 4: (None, "highest", "ieee"), 8: (None,)}[dtype.itemsize]
    for precision in allowed:
        out, lse = attention(q, k, v, precision=precision, return_lse=True)
        plan = explain(q, k, v, precision=precision)
        assert plan.p_parts == (2 if plan.rounds_p and precision == "highest" else 1)
        p_dtype = dtype if plan.rounds_p else None
        got = backend.numpy(out), backend.numpy(lse)
        assert bounds.check_forward(*x[:3], *got, p_dtype=p_dtype, p_parts=plan.p_parts).ok
    for precision in {"highest", "ieee", "high", "exact"} - set(allowed):
        with pytest.raises(ValueError, match=f"precision='{precision}'"):
            attention(q, k, v, precision=precision)


@pytest.mark.parametrize("tile", [Tile(16, 16), Tile(block_m=32), Tile(block_n=32), Tile(64, 32)])
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
@pytest.mark.share(6)
def test_tiles_and_families(backend, tile, dtype):
    case = Case(seed=5, dtype=dtype.name, seqlen_q=70, seqlen_k=90, head_dim=16, head_dim_v=16, group=2, causal=True)
    check(backend, case, tile=tile, family=backend.family)
    inputs = backend.arrays(case.inputs()[:3])
    plan = explain(*inputs, tile=tile, family=backend.family)
    for name in ("block_m", "block_n"):
        assert getattr(tile, name) in (None, getattr(plan, name))


# ------------------------------------------------------------------------------------------------ NaN and inf


def small(backend, dtype=np.float32, batch=(2,), seed=7):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*batch, *s)).astype(dtype) for s in ((2, 6, 4), (1, 8, 4), (1, 8, 3))]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_a_bad_query_stays_in_its_row(backend, dtype, bad):
    q, k, v = small(backend, dtype)
    want = attention(*backend.arrays((q, k, v)), causal=True, return_lse=True)
    q[1, 0, 4, 2] = bad
    got = attention(*backend.arrays((q, k, v)), causal=True, return_lse=True)
    others = np.ones((2, 2, 6), bool)
    others[1, 0, 4] = False
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(backend.numpy(a)[others], backend.numpy(b)[others])
    assert np.isnan(backend.numpy(got.out)[1, 0, 4].astype(float)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_a_bad_key_stays_in_the_rows_that_see_it(backend, dtype, bad):
    q, k, v = small(backend, dtype)
    q = abs(q)  # so that inf gives a logit of +inf
    want = attention(*backend.arrays((q, k, v)), causal=True, return_lse=True)
    k[1, 0, 5] = bad
    got = attention(*backend.arrays((q, k, v)), causal=True, return_lse=True)
    see = np.zeros((2, 2, 6), bool)
    see[1, :, 3:] = True  # row i sees keys j <= i + 2
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(backend.numpy(a)[~see], backend.numpy(b)[~see])
    assert np.isnan(backend.numpy(got.out)[see].astype(float)).all()


@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_a_logit_of_minus_infinity_has_no_weight(backend, dtype):
    q, k, v = small(backend, dtype)
    q = abs(q)
    k[1, 0, 5] = -np.inf
    got = attention(*backend.arrays((q, k, v)), return_lse=True)
    keep = [0, 1, 2, 3, 4, 6, 7]
    entry = (q[1], k[1][:, keep], v[1][:, keep], *(backend.numpy(a)[1] for a in got))
    report = bounds.check_forward(*entry, p_dtype=backend.p_dtype(dtype))
    assert report.ok, str(report)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_stays_in_its_batch_entry_and_kv_head(backend, bad):
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4, 6, 4), (2, 2, 8, 4), (2, 2, 8, 3)))
    want = backend.numpy(attention(*backend.arrays((q, k, v)), causal=True))
    v[1, 1, 5, 2] = bad
    got = backend.numpy(attention(*backend.arrays((q, k, v)), causal=True))
    others = np.ones((2, 4), bool)
    others[1, 2:] = False
    np.testing.assert_array_equal(got[others], want[others])
    assert not np.isfinite(got[1, 2:, 3:, 2]).any()
    np.testing.assert_array_equal(got[..., :2], want[..., :2])


@pytest.mark.parametrize("small_tile", [False, True], ids=["own tile", "small tile"])
@pytest.mark.parametrize("large", [1e4, None])
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_masked_keys_and_values_have_no_weight(backend, dtype, large, small_tile):
    """Finite numbers behind the mask, up to the largest, change no bit of the rows that do not see them."""
    q, k, v = small(backend, dtype)
    tile = backend.small_tile(dtype) if small_tile else None
    large = large or ml_dtypes.finfo(dtype).max
    want = attention(*backend.arrays((q, k, v)), causal="top_left", return_lse=True, tile=tile)
    k[..., 6:, :], v[..., 6:, :] = large, -large  # row i sees keys j <= i < 6
    got = attention(*backend.arrays((q, k, v)), causal="top_left", return_lse=True, tile=tile)
    for a, b in zip(got, want, strict=True):
        assert backend.numpy(a).tobytes() == backend.numpy(b).tobytes()


@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_masking_never_makes_nan(backend, dtype):
    q, k, v = small(backend, dtype)
    for offset, scale in itertools.product((-6, -9, -(2**40), 0, 2**40), (None, 0.0, -3.0)):
        out, lse = attention(*backend.arrays((q, k, v)), causal=True, q_offset=offset, scale=scale, return_lse=True)
        out, lse = backend.numpy(out).astype(float), backend.numpy(lse)
        assert not np.isnan(out).any()
        assert not np.isnan(lse).any()
        if offset <= -6:
            assert (out == 0).all()
            assert (lse == -np.inf).all()


# ------------------------------------------------------------------------------------- the two sides together


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_numpy_and_cupy_agree(gpu, dtype):
    """Both lie within the limit of the specification, so they lie within twice the limit of each other."""
    case = Case(seed=8, dtype=dtype.name, seqlen_q=200, seqlen_k=300, head_dim=64, head_dim_v=64, group=2, causal=True)
    x = case.inputs()
    on_cpu = attention(*x[:3], causal=True, return_lse=True)
    on_gpu = [gpu.numpy(a) for a in attention(*gpu.arrays(x[:3]), causal=True, return_lse=True)]
    chains = bounds.longest_chains(*x[:3])
    p_dtype = gpu.p_dtype(dtype)
    _, limit = bounds.forward_limits(*x[:3], out_dtype=dtype, chains=chains, p_dtype=p_dtype, causal=True)
    for name, a, b, most in zip(("out", "lse"), on_gpu, on_cpu, limit, strict=True):
        worst = bounds.compare(name, a, b.astype(most.dtype), 2 * most)
        assert worst.ratio <= 1, str(worst)


# ---------------------------------------------------------------------------------------- explain and prepare


def test_explain_runs_nothing_and_prints(backend, monkeypatch):
    q, k, v = backend.arrays(np.ones((3, 2, 4, 5)), np.float32)
    plan = explain(q, k, v, causal=True)
    assert plan.family == backend.family
    assert plan.chain_d > 0
    assert plan.chain_k > 0
    assert str(plan.block_m) in str(plan)
    assert plan == explain(q, k, v, causal=True)
    both = explain(q, k, v, backward=True)
    assert both.direction == "backward"
    assert both.chain_q > 0


def test_prepare_needs_no_result(backend):
    q, k, v = backend.arrays(np.ones((3, 2, 4, 5)), np.float32)
    assert prepare(q, k, v, causal=True) is None
    assert prepare(q, k, v, causal=True, backward=False) is None

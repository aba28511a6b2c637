"""precision="highest" of 16-bit inputs in the sm80 family: P and dS as sums of two 16-bit numbers."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from conftest import PROFILE
from emulator import Device, Schedule, why_not

from cupyflash import _tiles_sm80, attention, attention_backward, attention_varlen, attention_varlen_backward
from cupyflash._plan import Rows
from cupyflash.testing import bounds, cases, data, reference

DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
ASKED = {"family": "sm80", "precision": "highest"}


@pytest.fixture(autouse=True)
def emulator():
    why_not()


def run(case, seed, tile=None, **options):
    """A case under the race checker, against its bounds."""
    with Device(lambda n: Schedule.draw(seed and 100 * seed + n), arch=80, undefined=PROFILE != "ci") as xp:
        report = cases.run(case, xp, tile=tile, **ASKED, **options)
    assert report.ok, f"{case!r}\n{report}"


# ---------------------------------------------------------------------------------------------- options and forms

TABLE = [
    dataclasses.replace(case, dtype=dtype.name)
    for number, case in enumerate(cases.options_table())
    for dtype in (DTYPES if case.dtype in ("float32", "float64") else (data._dtype(case.dtype),))
    if case.dtype in ("float16", "bfloat16") or number % 2 == DTYPES.index(dtype)
]
WIDTHS = ((64, 64), (128, 128), (33, 100), (5, 7), (192, 128))


@pytest.mark.share(4)
@pytest.mark.parametrize("number", range(len(TABLE)))
def test_every_two_options(number):
    run(TABLE[number], number)


@pytest.mark.share(2)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(dtype, widths, causal):
    case = data.Case(
        4, dtype=dtype.name, seqlen_q=150, seqlen_k=140, head_dim=widths[0], head_dim_v=widths[1], group=2,
        causal=causal, dlse=True, out="float32",
    )  # fmt: skip
    run(case, 3)


# Both forms of the forward's loop; one fragment and two, one part of the queries and three, in the backward.
FORWARD = [_tiles_sm80.AmpereRow(m, 32, 4, 3, 1, 1, overlap, "") for m in (64, 128) for overlap in (False, True)]
BLOCKS = ((16, 32, 4), (32, 64, 4), (192, 64, 8), (64, 128, 8))
BACKWARD = [_tiles_sm80.AmpereBackwardRow(*blocks, 2, 1, "") for blocks in BLOCKS]


@pytest.mark.share(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [*FORWARD, *BACKWARD], ids=lambda row: "-".join(map(str, dataclasses.astuple(row)[:7])))
def test_forms(dtype, row):
    """The kernel of the row takes it, the other one its own; any order of the sums of dq, under several schedules."""
    widths = {"head_dim": 24, "head_dim_v": 40} if row.block_m < 192 else {"head_dim": 12, "head_dim_v": 16}
    case = data.Case(5, dtype=dtype.name, seqlen_q=210, seqlen_k=150, group=2, causal=True, out="float32", **widths)
    forward = isinstance(row, _tiles_sm80.AmpereRow)
    tile = Rows(rows=(("fwd_sm80" if forward else "bwd_sm80", row),))
    for seed in (5, 7):
        run(case, seed, tile)
    if not forward:
        x = case.inputs()
        out, lse = reference.forward(x.q, x.k, x.v, causal=True)
        given = (x.dout, x.q, x.k, x.v, out.astype(np.float32), lse.astype(np.float32))
        with Device(lambda n: Schedule.draw(11 + n), arch=80, undefined=PROFILE != "ci") as xp:
            on = [xp.asarray(a) for a in given]
            grads = attention_backward(*on, causal=True, tile=tile, deterministic=False, **ASKED)[:3]
            got = [g.get() for g in grads]
        report = bounds.check_backward(*given, got, p_dtype=dtype, p_parts=2, causal=True)
        assert report.ok, report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(dtype):
    r = np.random.default_rng(0)
    lengths_q, lengths_k, heads = (70, 0, 1, 33), (90, 16, 5, 0), (2, 1, 1, 2)
    q, k, v, dout = (
        r.standard_normal((sum(own), h, 24)).astype(dtype)
        for own, h in zip((lengths_q, lengths_k, lengths_k, lengths_q), heads, strict=True)
    )
    ends = [np.concatenate([[0], np.cumsum(own)]).astype(np.int32) for own in (lengths_q, lengths_k)]
    with Device(lambda n: Schedule.draw(n), arch=80, undefined=PROFILE != "ci") as xp:
        cu = [xp.asarray(x) for x in ends]
        on = [xp.asarray(x) for x in (q, k, v)]
        made = attention_varlen(*on, *cu, causal=True, return_lse=True, **ASKED)
        grads = attention_varlen_backward(xp.asarray(dout), *on, *made, *cu, causal=True, **ASKED)[:3]
        (out, lse), (dq, dk, dv) = ([x.get() for x in results] for results in (made, grads))
    for begin, end, begin_k, end_k in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        rows, keys = slice(begin, end), slice(begin_k, end_k)
        own, asked = (q[rows], k[keys], v[keys]), {"p_dtype": dtype, "p_parts": 2, "causal": True, "layout": "shd"}
        report = bounds.check_forward(*own, out[rows], lse[:, rows], **asked)
        of_own = (dq[rows], dk[keys], dv[keys])
        report += bounds.check_backward(dout[rows], *own, out[rows], lse[:, rows], of_own, **asked)
        assert report.ok, report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_under_every_schedule(dtype):
    r = np.random.default_rng(0)
    q, k, v, dout = (r.standard_normal((2, 200, 16)).astype(dtype) for _ in range(4))
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    first = None
    for seed in (0, 5, 7, 10):
        with Device(Schedule.draw(seed), arch=80, undefined=False) as xp:
            on = [xp.asarray(x) for x in (dout, q, k, v, out, lse)]
            results = (attention(*on[1:4], causal=True, **ASKED), *attention_backward(*on, causal=True, **ASKED)[:3])
            bits = [x.get().view(np.uint16) for x in results]
        first = first or bits
        for x, y in zip(first, bits, strict=True):
            np.testing.assert_array_equal(x, y)


# ----------------------------------------------------------------------------------------------------- accuracy


def backward_of(given, **options):
    """The gradients of (dout, q, k, v, out, lse)."""
    with Device(Schedule.draw(5), arch=80, undefined=False) as xp:
        grads = attention_backward(*map(xp.asarray, given), family="sm80", **options)
        return [x.get() for x in grads[:3] if x is not None]


def forward_of(q, k, v, **options):
    """out and lse, not rounded."""
    with Device(Schedule.draw(5), arch=80, undefined=False) as xp:
        out = xp.empty((*q.shape[:-1], v.shape[-1]), np.float32), xp.empty(q.shape[:-1], np.float32)
        attention(*map(xp.asarray, (q, k, v)), out=out, family="sm80", **options)
        return [x.get() for x in out]


def cancelling(dtype, pairs=96, dim=64):
    """Gradients that are small beside their terms, so that what P and dS lose is far above the results' own rounding.

    Rows of dS sum to 0: dq loses a common part of k. Of two rows with nearly the same query dout is nearly opposite:
    so are their terms of dk and dv.
    """
    r = np.random.default_rng(0)

    def twice(sign):
        x = r.standard_normal((1, pairs, dim))
        return (np.concatenate([x, sign * x], axis=1) + r.standard_normal((1, 2 * pairs, dim)) / 32).astype(dtype)

    q, dout = twice(1), twice(-1)
    k = (r.standard_normal(q.shape) + 16 * np.sign(r.standard_normal(dim))).astype(dtype)
    return q, k, r.standard_normal(q.shape).astype(dtype), dout


def rms(x):
    return float(np.sqrt((np.asarray(x, np.float64) ** 2).mean()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_of_a_rounded_p_go(dtype):
    """By more than 100 in out, which is not rounded here, and in gradients beside what their own rounding costs.

    What P and dS lose is less by 2^9 in bfloat16 and 2^12 in float16, until float32's errors are left.
    """
    q, k, v, dout = cancelling(dtype)
    exact = reference.forward(q, k, v)
    given = (dout, q, k, v, exact.out.astype(np.float32), exact.lse.astype(np.float32))
    want = reference.backward(*given)[:3]
    of_rounding = [rms(reference.rounded(x, dtype) - x) for x in want]
    errors, lost, same = {}, {}, {}
    for precision in (None, "highest"):
        out = forward_of(q, k, v, precision=precision)[0]
        grads = backward_of(given, precision=precision)
        errors[precision] = [rms(x - y) for x, y in zip((out, *grads), (exact.out, *want), strict=True)]
        lost[precision] = np.sqrt(np.square(errors[precision][1:]) - np.square(of_rounding))
        same[precision] = [(x == y.astype(dtype)).mean() for x, y in zip(grads, want, strict=True)]
    assert errors[None][0] > 100 * errors["highest"][0]
    assert (lost[None] > 100 * lost["highest"]).all()
    for n, of_own in enumerate(of_rounding):
        assert errors[None][n + 1] > 10 * of_own
        assert errors["highest"][n + 1] < 1.01 * of_own
        assert same[None][n] < 0.1 < 0.9 < same["highest"][n]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", ["large", "tiny", "rising", "falling", "beside"])
def test_any_size_of_ds_fits_float16(rows, causal):
    """A power of 2 keeps dS in range: of 1e5 and more, of 1e-6, and where a thread block meets both in any order."""
    seqlen, r = 200, np.random.default_rng(1)
    size = {
        "large": np.full(seqlen, 1e4), "tiny": np.full(seqlen, 1e-5), "rising": np.geomspace(1e4, 1e-4, seqlen),
        "falling": np.geomspace(1e-4, 1e4, seqlen), "beside": np.where(np.arange(seqlen) % 50 == 7, 1e4, 1e-4),
    }[rows]  # fmt: skip
    q, k, v, dout = (r.standard_normal((2, seqlen, 40)).astype(np.float16) for _ in range(4))
    k, v = k[:1], (v[:1] * (1e-2 if rows == "tiny" else 100)).astype(np.float16)  # of both heads
    dout = (dout * size[:, None]).astype(np.float16)
    options = {"causal": causal, "scale": 0.01}
    out, lse = reference.forward(q, k, v, **options)
    given = (dout, q, k, v, out.astype(np.float32), lse.astype(np.float32))
    sizes = abs(reference.differentials(*given, None, **options).dt)
    assert sizes.max() < 1e-5 if rows == "tiny" else sizes.max() > 1e4
    for deterministic in (True, False):
        got = backward_of(given, precision="highest", deterministic=deterministic, **options)
        report = bounds.check_backward(*given, got, p_dtype=np.float16, p_parts=2, **options)
        assert report.ok, report


def test_an_infinite_ds_makes_no_other_row_finite_and_wrong():
    """The power of 2 that would keep it in range makes every other dS 0: they are right, or NaN."""
    r = np.random.default_rng(2)
    q, k, v, dout = (r.standard_normal((1, 300, 40)).astype(np.float16) for _ in range(4))
    out, lse = (x.astype(np.float32) for x in reference.forward(q, k, v))
    (want,) = backward_of((dout, q, k, v, out, lse), precision="highest", wrt=("q",))
    dout[0, 77, 3] = np.inf
    (got,) = backward_of((dout, q, k, v, out, lse), precision="highest", wrt=("q",))
    assert not np.isfinite(got[0, 77]).any()
    finite = np.isfinite(got[0]).all(axis=-1)
    assert finite.any()
    np.testing.assert_allclose(got[0, finite].astype(float), want[0, finite].astype(float), rtol=2e-3, atol=1e-5)

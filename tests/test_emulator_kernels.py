"""The library's kernels on the CPU, through the public functions, under the checker, against the specification."""

import dataclasses
import random

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from conftest import PROFILE
from emulator import Device, EmulatorError, Schedule, emulate, why_not
from emulator.removals import Problem

from cupyflash import AttentionGradients, Tile, _launch, _tiles_sm90, attention, attention_backward
from cupyflash._plan import Rows
from cupyflash.testing import cases, data

WORK = 60_000  # multiplications of a forward: every load passes the checker
# Compiled once each: dtype, widths, architecture, the longest sequences. On 9.0 16-bit types go to the sm90 family,
# narrow and, one wider than 128, wide.
SPECS = (
    ("float32", 16, 16, 90, 64), ("bfloat16", 48, 16, 80, 64), ("float64", 32, 33, 90, 64), ("float16", 7, 64, 80, 64),
    ("bfloat16", 72, 40, 90, 300), ("float16", 24, 136, 90, 300),
)  # fmt: skip
SEVERAL_BLOCKS = (5, 7, 10)  # seeds of schedules with more than one resident block


@pytest.fixture(scope="module", autouse=True)
def emulator():
    why_not()


def _pick(choices):
    def pick(n):
        return choices.draw(st.integers(0, n - 1))

    return pick


def _run(case, seed, arch=90):
    """Forward and backward of a case, each launch under a schedule of its own."""
    with Device(lambda n: Schedule.draw(seed and 100 * seed + n), arch=arch, undefined=PROFILE != "ci") as xp:
        report = cases.run(case, xp)
    assert report.ok, report


@hypothesis.settings(max_examples=6 if PROFILE == "ci" else 300)
@hypothesis.given(choices=st.data(), seed=st.integers(0, 2**32))
def test_any_problem(choices, seed):
    case = data.random_case(_pick(choices), styles=data.GPU_STYLES, work=WORK)
    hypothesis.note(repr(case))
    _run(case, seed)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@hypothesis.settings(max_examples=5 if PROFILE == "ci" else 300)
@hypothesis.given(choices=st.data(), seed=st.integers(0, 2**32))
def test_many_problems_of_one_spec(spec, choices, seed):
    """Few compilations, so many shapes, strides and schedules."""
    dtype, head_dim, head_dim_v, arch, longest = spec
    case = data.random_case(_pick(choices), dtypes=(dtype,), styles=data.GPU_STYLES, work=longest * WORK // 32)
    case = dataclasses.replace(case, head_dim=head_dim, head_dim_v=head_dim_v, causal=bool(case.causal), q_offset=None)
    case = dataclasses.replace(
        case, offset_shape=None, seqlen_q=min(case.seqlen_q, longest), seqlen_k=min(case.seqlen_k, longest)
    )
    hypothesis.note(repr(case))
    _run(case, seed, arch)


@pytest.mark.parametrize("arch", [60, 70, 80])
def test_older_devices(arch):
    """Where there is no cp.async, tiles are loaded another way."""
    _run(data.Case(1, seqlen_q=33, seqlen_k=70, head_dim=24, head_dim_v=16, causal=True, dlse=True), 7, arch)


@pytest.mark.parametrize("seqlens", [(150, 150), (1, 200), (200, 1)])
def test_several_blocks_on_both_sides(seqlens):
    q, k, v = _arrays(*seqlens)
    out = attention(q, k, v, causal=True)
    got = emulate(attention, q, k, v, causal=True, schedule=Schedule("random", "random", 3, 11))
    np.testing.assert_allclose(got, out, rtol=1e-4, atol=1e-5)


def test_same_bits_under_every_schedule():
    q, k, v = _arrays(70, 90)
    dout = np.ones_like(q)
    results = []
    for seed in range(6):
        out, lse = emulate(attention, q, k, v, return_lse=True, schedule=Schedule.draw(seed))
        results.append(
            (out, lse, *emulate(attention_backward, dout, q, k, v, out, lse, schedule=Schedule.draw(seed))[:3])
        )
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


# ------------------------------------------------------------------------------------------------- the sm90 family


def _forms(table):
    """Each form of a kernel that a table ships, once: widths that do not fill its own, causal or not, the row."""
    forms = {}
    for largest, largest_v, row in table:
        form = dataclasses.replace(row, remark="", causal=None, longest=None)
        for causal in (False, True) if row.causal is None else (row.causal,):
            forms[largest - 8, largest_v - 8, causal, form] = None
    return list(forms)


FORWARD_FORMS = _forms(_tiles_sm90.HOPPER_TABLE["fwd_sm90"])
# Heads side by side are a matter of order, which schedules change anyway. A wide head beside a narrow one leaves one of
# the consumers without columns.
BACKWARD_FORMS = [
    (head_dim, head_dim_v, causal, row, deterministic)
    for *largest, causal, row in dict.fromkeys(
        (*widths, causal, dataclasses.replace(row, heads=1, arrival=True))
        for *widths, causal, row in _forms(_tiles_sm90.HOPPER_BACKWARD_TABLE)
    )
    for head_dim, head_dim_v in ([largest, (160, 16), (16, 160)] if _tiles_sm90.is_wide(*largest) else [largest])
    for deterministic in (True, False)
]


def _name(value):
    """A short id of a parameter."""
    return "-".join(f"{n}" for n in dataclasses.astuple(value) if n) if dataclasses.is_dataclass(value) else str(value)


def _form(kernel, row, head_dim, head_dim_v, causal, *options):
    """Ragged problems that reach all of a form: a causal one has rows that see no key."""
    options = (("tile", Rows(rows=((kernel, row),))), ("causal", causal), *options)
    for seqlens in ((200, 260), (260, 130)) if causal else ((200, 260),):
        yield Problem("float16", head_dim, *seqlens, options, heads=2, head_dim_v=head_dim_v)


@pytest.mark.share(4)
@pytest.mark.parametrize(("head_dim", "head_dim_v", "causal", "row"), FORWARD_FORMS, ids=_name)
def test_forms_of_the_hopper_forward(head_dim, head_dim_v, causal, row):
    for problem in _form("fwd_sm90", row, head_dim, head_dim_v, causal):
        for seed in SEVERAL_BLOCKS:
            problem.forward((), Schedule.draw(seed))


@pytest.mark.share(4)
@pytest.mark.parametrize(("head_dim", "head_dim_v", "causal", "row", "deterministic"), BACKWARD_FORMS, ids=_name)
def test_forms_of_the_hopper_backward(head_dim, head_dim_v, causal, row, deterministic):
    for problem in _form("bwd_sm90", row, head_dim, head_dim_v, causal, ("deterministic", deterministic)):
        for seed in SEVERAL_BLOCKS:
            problem.backward((), Schedule.draw(seed))


@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_of_the_hopper_backward_under_every_schedule(causal):
    r = np.random.default_rng(0)
    q, k, v, dout = (r.standard_normal((2, 300, 16)).astype(ml_dtypes.bfloat16) for _ in range(4))
    out, lse = attention(q, k, v, causal=causal, return_lse=True)
    first = None
    for seed in (0, *SEVERAL_BLOCKS, 9):
        with Device(Schedule.draw(seed), undefined=PROFILE != "ci") as xp:
            arrays = [xp.asarray(x) for x in (dout, q, k, v, out, lse)]
            bits = [x.get().view(np.uint16) for x in attention_backward(*arrays, causal=causal)[:3]]
        first = first or bits
        for x, y in zip(first, bits, strict=True):
            np.testing.assert_array_equal(x, y)


# ------------------------------------------------------------------------------------- the Python side is under test


def test_a_call_like_one_before_is_checked_as_the_first_one_was():
    """Found again by its signature: the same bits for other numbers, and every error that the first call would give."""
    q, k, v, dout = (x.astype(np.float16) for x in (*_arrays(70, 70, 64), _arrays(70, 70, 64)[0]))
    with Device(undefined=False) as xp:
        q, k, v, dout = map(xp.asarray, (q, k, v, dout))
        first = attention(q, k, v, causal=True, return_lse=True)
        again = attention(q, k, v, causal=True, return_lse=True)
        other = attention(k, q, v, causal=True, return_lse=True)
        out, lse = xp.empty(first.out.shape, np.float16), xp.empty(first.lse.shape)
        for _ in range(2):
            assert attention(q, k, v, causal=True, out=out) is out
            assert attention(q, k, v, causal=True, out=(out, lse)).lse is lse
        for x, y in zip((*first, *first), (*again, out, lse), strict=True):
            np.testing.assert_array_equal(x.get(), y.get())
        assert (first.out.get() != other.out.get()).any()
        for wrong, text in (
            ({"causal": 1}, "causal=1"), ({"scale": True}, "scale=True"), ({"q_offset": True}, "q_offset=True"),
            ({"out": q}, "shares memory"), ({"out": (out,)}, "tuple of 1"),
        ):  # fmt: skip
            with pytest.raises((TypeError, ValueError), match=text):
                attention(q, k, v, **{"causal": True, **wrong})

        grads = [attention_backward(dout, q, k, v, *first, causal=True) for _ in range(2)]
        given = AttentionGradients(dq=xp.empty(q.shape, np.float16))
        grads += [attention_backward(dout, q, k, v, *first, causal=True, grads_out=given) for _ in range(2)]
        assert grads[3].dq is given.dq
        for found in grads[1:]:
            for x, y in zip(grads[0], found, strict=True):
                np.testing.assert_array_equal(x.get(), y.get())
        with pytest.raises(ValueError, match="shares memory"):
            attention_backward(dout, q, k, v, *first, causal=True, grads_out=AttentionGradients(dq=dout))


def test_a_wrong_stride_is_found(monkeypatch):
    right = _launch.element_strides

    def wrong(shape, strides, itemsize, batch_ndim, tail):
        *lead, row, column = right(shape, strides, itemsize, batch_ndim, tail)
        return (*lead, 2 * row, column)

    monkeypatch.setattr(_launch, "element_strides", wrong)
    with pytest.raises(EmulatorError, match="out of bounds") as caught:
        emulate(attention, *_arrays(9, 9))
    assert caught.value.kind == "out of bounds"


def test_too_little_shared_memory_is_found(monkeypatch):
    right = _launch.Launch.__init__

    def wrong(self, step, *more):
        right(self, dataclasses.replace(step, smem=step.smem - 64), *more)

    monkeypatch.setattr(_launch.Launch, "__init__", wrong)
    with pytest.raises(EmulatorError, match="bytes of shared memory"):
        emulate(attention, *_arrays(70, 70))


def test_too_small_a_grid_is_found(monkeypatch):
    right = _launch.Launch.__init__

    def wrong(self, step, grid, *more):
        right(self, step, grid - 1, *more)

    monkeypatch.setattr(_launch.Launch, "__init__", wrong)
    q, k, v = _arrays(300, 20)
    out = emulate(attention, q, k, v)
    assert np.isnan(out).any(), "rows that no block computed hold what empty() left there"


def test_a_tile_of_the_users_choice():
    q, k, v = _arrays(50, 50)
    got = emulate(
        attention, q, k, v, tile=Tile(block_m=32, block_n=32), schedule=Schedule.draw(random.Random(0).randrange(99))
    )
    np.testing.assert_allclose(got, attention(q, k, v), rtol=1e-4, atol=1e-5)


def _arrays(seqlen_q, seqlen_k, head_dim=16):
    r = np.random.default_rng(0)
    return [r.standard_normal((1, n, head_dim), np.float32) for n in (seqlen_q, seqlen_k, seqlen_k)]

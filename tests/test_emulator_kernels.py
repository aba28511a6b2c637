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

from cupyflash import AttentionGradients, Tile, _launch, _tiles_sm80, _tiles_sm90, attention, attention_backward
from cupyflash._plan import Rows
from cupyflash.testing import cases, data, reference

WORK = 60_000  # multiplications of a forward: every load passes the checker
# Compiled once each: dtype, widths, architecture, the longest sequences. On 9.0 16-bit types go to the sm90 family,
# narrow and, one wider than 128, wide; on 8.x to the sm80 family.
SPECS = (
    ("float32", 16, 16, 90, 64), ("bfloat16", 48, 16, 80, 64), ("float64", 32, 33, 90, 64), ("float16", 7, 64, 80, 64),
    ("bfloat16", 72, 40, 90, 300), ("float16", 24, 136, 90, 300), ("float16", 100, 20, 86, 150),
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


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_of_a_backward_in_a_fixed_order_under_every_schedule(causal, arch):
    r = np.random.default_rng(0)
    q, k, v, dout = (r.standard_normal((2, 300, 16)).astype(ml_dtypes.bfloat16) for _ in range(4))
    out, lse = attention(q, k, v, causal=causal, return_lse=True)
    first = None
    for seed in (0, *SEVERAL_BLOCKS, 9):
        with Device(Schedule.draw(seed), arch=arch, undefined=PROFILE != "ci") as xp:
            arrays = [xp.asarray(x) for x in (dout, q, k, v, out, lse)]
            bits = [x.get().view(np.uint16) for x in attention_backward(*arrays, causal=causal)[:3]]
        first = first or bits
        for x, y in zip(first, bits, strict=True):
            np.testing.assert_array_equal(x, y)



@pytest.mark.parametrize("family", ["sm90", "sm80", "simt"])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_one_head_read_as_several(name, family):
    """An axis of heads of stride 0 is the same array in memory for each head: the bits of copies."""
    r = np.random.default_rng(4)
    values = {x: r.standard_normal((2 if x in "kv" else 4, 40, 16)).astype(np.float16) for x in ("q", "k", "v", "dout")}
    values[name][:] = values[name][0]
    with Device(Schedule.draw(3), arch=90, undefined=PROFILE != "ci") as xp:
        bits = []
        for repeated in (False, True):
            arrays = {x: xp.asarray(value) for x, value in values.items()}
            if repeated:
                arrays[name] = xp.broadcast_to(arrays[name][:1], values[name].shape)
                assert arrays[name].strides[0] == 0
            q, k, v, dout = arrays.values()
            out, lse = attention(q, k, v, return_lse=True, family=family)
            grads = attention_backward(dout, q, k, v, out, lse, family=family)
            bits.append([x.get().tobytes() for x in (out, lse, *grads[:3])])
    assert bits[0] == bits[1]


# ------------------------------------------------------------------------------------------------- the sm80 family

AMPERE_FORMS = _forms(_tiles_sm80.AMPERE_TABLE["fwd_sm80"])
# Buffers, queries of a warp, Q in registers or not, overlap: of narrow heads, so that every loop takes several turns.
AMPERE_VARIANTS = [
    _tiles_sm80.AmpereRow(block_m, 32, 4, stages, 1, q_held, overlap, "")
    for stages in (2, 3, 4, 5) for block_m in (64, 128) for q_held in (0, 1) for overlap in (False, True)
]  # fmt: skip


def _ampere(row, head_dim, head_dim_v, *seqlens, causal=False, **more):
    options = (("family", "sm80"), ("tile", Rows(rows=(("fwd_sm80", row),))), ("causal", causal))
    return Problem("float16", head_dim, *seqlens, options, head_dim_v=head_dim_v, **more)


@pytest.mark.share(4)
@pytest.mark.parametrize(("head_dim", "head_dim_v", "causal", "row"), AMPERE_FORMS, ids=_name)
def test_forms_of_the_ampere_forward(head_dim, head_dim_v, causal, row):
    for seqlens in ((200, 260), (260, 130)):
        for seed in SEVERAL_BLOCKS:
            problem = _ampere(row, head_dim, head_dim_v, *seqlens, causal=causal)
            problem.forward((), Schedule.draw(seed))


@pytest.mark.share(8)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("row", AMPERE_VARIANTS, ids=_name)
def test_variants_of_the_ampere_forward(row, causal):
    """One block of keys up to more than there are buffers; lanes that see nothing; heads that share tiles."""
    for seqlens in ((150, 20), (150, 200), (300, 130)):
        _ampere(row, 24, 40, *seqlens, causal=causal).forward((), Schedule.draw(seqlens[1]))
    for seqlens in ((15, 70), (40, 25)):
        _ampere(row, 24, 40, *seqlens, causal=causal, heads=6, heads_k=2).forward((), Schedule.draw(seqlens[1]))


AMPERE_BACKWARD_FORMS = [
    (head_dim, head_dim_v, causal, row, deterministic)
    for head_dim, head_dim_v, causal, row in dict.fromkeys(
        (*widths, dataclasses.replace(row, heads=1, card=0))
        for *widths, row in _forms(_tiles_sm80.AMPERE_BACKWARD_TABLE)
    )
    for deterministic in (True, False)
]


@pytest.mark.share(4)
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "causal", "row", "deterministic"), AMPERE_BACKWARD_FORMS, ids=_name
)
def test_forms_of_the_ampere_backward(head_dim, head_dim_v, causal, row, deterministic):
    options = ("family", "sm80"), ("deterministic", deterministic)
    for problem in _form("bwd_sm80", row, head_dim, head_dim_v, causal, *options):
        for seed in SEVERAL_BLOCKS:
            problem.backward((), Schedule.draw(seed))


# Where a head's first element lies, and how far apart its rows are: aligned to 16 bytes, 8, 4, and 2.
ALIGNMENTS = ((0, 64), (8, 72), (0, 68), (12, 64), (2, 64), (0, 66), (1, 64), (0, 65))


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("heads", [1, 4], ids=["alone", "packed"])
def test_every_alignment(heads, shift):
    """Each tensor with another one; then rows and columns backwards, and columns that are rows in memory."""
    r = np.random.default_rng(shift)
    seqlens, widths = {"q": 21, "k": 50, "v": 50}, {"q": 20, "k": 20, "v": 23}
    values = {x: r.standard_normal((heads if x == "q" else 1, seqlens[x], widths[x])).astype(np.float16) for x in "qkv"}
    out, lse = reference.forward(*(x[None] for x in values.values()), causal=True)
    with Device(lambda n: Schedule.draw(n + shift), arch=80, undefined=PROFILE != "ci") as xp:
        for turn in range(len(ALIGNMENTS) + 3):
            held = {}
            for i, (name, x) in enumerate(values.items()):
                first, pitch = ALIGNMENTS[(turn + shift * i) % len(ALIGNMENTS)]
                h, rows, columns = x.shape
                if turn < len(ALIGNMENTS):
                    view = xp.empty((first + h * rows * pitch,), np.float16)[first:].reshape(h, rows, pitch)
                    view = view[..., :columns]
                elif turn == len(ALIGNMENTS):
                    view = xp.empty((h, columns, rows + 1), np.float16).swapaxes(1, 2)[:, 1:]
                else:
                    view = xp.empty((h, rows, 2 * columns), np.float16)[:, ::-1, ::-2]
                view[...] = xp.asarray(x)
                held[name] = view
            result = xp.empty((heads, 21, 24), np.float16)[..., : 23]
            got = attention(*held.values(), causal=True, out=result, return_lse=True)
            np.testing.assert_allclose(got.out.get(), out[0], rtol=1e-2, atol=1e-2)
            np.testing.assert_allclose(got.lse.get(), lse[0], rtol=1e-3, atol=1e-3)


def test_packed_heads_have_the_bits_that_they_have_alone():
    r = np.random.default_rng(0)
    q, k, v = (r.standard_normal(shape).astype(np.float16) for shape in ((4, 9, 40), (1, 100, 40), (1, 100, 40)))
    with Device(undefined=False, arch=80) as xp:
        together = attention(xp.asarray(q), xp.asarray(k), xp.asarray(v), causal=True).get()
        alone = [attention(xp.asarray(q[i : i + 1]), xp.asarray(k), xp.asarray(v), causal=True).get() for i in range(4)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


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
            for x, y in zip(grads[0][:3], found[:3], strict=True):
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

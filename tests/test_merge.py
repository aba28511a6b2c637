"""Parts merged: any split of an attention equals the whole, forward and backward; and what bad parts are told."""

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import nvrtc
import pytest
from conftest import PROFILE
from emulator import Device, EmulatorError, Schedule, why_not

import cupyflash
from cupyflash import attention, attention_backward, merge_attention, merge_attention_backward
from cupyflash._plan_merge import merge_kernel
from cupyflash.testing import bounds, data, merging, reference

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


def canonical(x, layout):
    return x if layout == "hsd" or x.ndim == 2 else x.swapaxes(-3, -2)


def check_merge(outs, lses, result, layout="hsd"):
    """Against the specification, from the same parts."""
    outs = [canonical(data.to_numpy(x), layout) for x in outs]
    lses = [data.to_numpy(x) for x in lses]
    out, lse = (data.to_numpy(x) for x in result)
    want, limit = merging.merge(outs, lses), merging.merge_limits(outs, lses, out.dtype)
    for got, exact, most in zip((canonical(out, layout), lse), want, limit, strict=True):
        nothing = exact == -np.inf
        assert (got[nothing] == -np.inf).all()
        np.testing.assert_array_less(abs(np.where(nothing, 0, got - np.where(nothing, 0, exact))), most + 1e-300)


def parts_of(rng, shape, dtype, count, empty=0.3, spread=5.0):
    """Random parts; some rows of some have seen no key, and hold NaN."""
    outs, lses = [], []
    for _ in range(count):
        x = rng.standard_normal(shape).astype(dtype)
        x_lse = (spread * rng.standard_normal(shape[:-1])).astype(np.float64 if dtype == np.float64 else np.float32)
        nothing = rng.random(shape[:-1]) < empty
        x[nothing], x_lse[nothing] = np.nan, -np.inf
        outs.append(x)
        lses.append(x_lse)
    return outs, lses


# ----------------------------------------------------------------------------------------- a split equals the whole

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": "top_left"},
    "window": {"window": (7, 2)},
    "left": {"window": (9, None), "causal": True},
    "slopes": {"alibi_slopes": np.array([0.3, -0.1, 0.5, 0.0]), "causal": True},
    "bias": {"bias": (2, 4, 13, 29)},
    "bias of keys": {"bias": (1, 1, 29), "softcap": 3.0},
    "bias of queries": {"bias": (4, 13, 1)},
    "mask": {"mask": (2, 1, 13, 29), "causal": True},
    "softcap": {"softcap": 1.5, "scale": -0.7},
    "segments": {"segment_ids": (13, 29)},
    "sinks": {"sinks": np.array([0.5, -2.0, 3.0, 0.0]), "causal": True},
    "lens": {"kv_lens": np.array([20, 0]), "causal": True},
    "many": {
        "softcap": 2.0, "bias": (2, 1, 13, 29), "mask": (4, 13, 29), "window": (20, 5), "q_offset": 4,
        "alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4]), "sinks": np.array([0.5, -2.0, 3.0, 0.0]),
    },
}  # fmt: skip


class Whole:
    """An attention of 13 queries and 29 keys, and the options of its parts."""

    def __init__(self, dtype, options, seed=0):
        rng = np.random.default_rng(seed)
        self.q, self.dout = (rng.standard_normal((2, 4, 13, 8)).astype(dtype) for _ in range(2))
        self.k, self.v = (rng.standard_normal((2, 2, 29, 8)).astype(dtype) for _ in range(2))
        self.options = dict(options)
        if "bias" in options:
            self.options["bias"] = rng.standard_normal(options["bias"])
        if "mask" in options:
            self.options["mask"] = rng.random(options["mask"]) < 0.7
        if "segment_ids" in options:
            self.options["segment_ids"] = tuple(np.sort(rng.integers(0, 3, n)) for n in options["segment_ids"])

    def part(self, keys, first):
        """k, v and options of some keys; sinks belong to the first part."""
        found = dict(self.options)
        begin, end = keys.start, keys.stop
        for name in ("bias", "mask"):
            if name in found and found[name].shape[-1] > 1:
                found[name] = found[name][..., keys]
        if "segment_ids" in found:
            found["segment_ids"] = found["segment_ids"][0], found["segment_ids"][1][keys]
        diagonal = found.get("q_offset", 0 if found.get("causal") == "top_left" else 29 - 13)
        if "kv_lens" in found:
            diagonal = found["kv_lens"] - 13
            found["kv_lens"] = np.clip(found["kv_lens"] - begin, 0, end - begin)
        found["q_offset"] = diagonal - begin
        found["causal"] = bool(found.get("causal"))
        if not first:
            found.pop("sinks", None)
        return self.k[:, :, keys], self.v[:, :, keys], found


@pytest.mark.parametrize("name", OPTIONS)
@hypothesis.settings(max_examples=6)
@hypothesis.given(st.lists(st.integers(0, 29), max_size=5), st.sampled_from(DTYPES), st.integers(0, 5))
def test_any_split_equals_the_whole(name, cuts, dtype, seed):
    """Forward: within the parts' own limits, and merging's. 16-bit parts are float32: nothing is rounded between."""
    whole = Whole(dtype, OPTIONS[name], seed)
    ends = [0, *sorted(cuts), 29]
    accumulator = np.float64 if dtype == np.float64 else np.float32
    outs, lses, limits = [], [], []
    for n, keys in enumerate(map(slice, ends, ends[1:])):
        k, v, options = whole.part(keys, n == 0)
        room = np.full((2, 4, 13, 8), np.nan, accumulator), np.full((2, 4, 13), np.nan, accumulator)
        attention(whole.q, k, v, out=room, **options)
        chains = bounds.longest_chains(whole.q, k, v)
        limits.append(bounds.forward_limits(whole.q, k, v, out_dtype=accumulator, chains=chains, **options)[1])
        outs.append(room[0])
        lses.append(room[1])
    out = np.empty((2, 4, 13, 8), dtype)
    merged = merge_attention(outs, lses, out=(out, np.empty((2, 4, 13), accumulator)))
    check_merge(outs, lses, merged)
    want = reference.forward(whole.q, whole.k, whole.v, **whole.options)
    # A part whose lse is off by e has a weight that is off by e, and so has the sum.
    off = np.max([x.lse for x in limits], axis=0)
    grown = np.exp(3 * off)[..., None]  # shares are those of the lse that were found
    lse = np.where(np.isfinite(want.lse), want.lse, 0)
    shares = [np.where(np.isfinite(x), np.exp(x - lse), 0)[..., None] for x in lses]
    errors = [np.expm1(2 * off)[..., None] * abs(x) + y.out for x, y in zip(outs, limits, strict=True)]
    spread = grown * np.sum([x * y for x, y in zip(shares, errors, strict=True)], axis=0)
    most = merging.merge_limits(outs, lses, dtype)
    np.testing.assert_array_less(abs(merged.out - want.out), spread + most.out + 1e-300)
    seen = want.lse > -np.inf
    assert (merged.lse[~seen] == -np.inf).all()
    np.testing.assert_array_less(abs(merged.lse[seen] - want.lse[seen]), (off + most.lse)[seen])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cuts", [(11,), (0, 5, 5, 20, 29)])
def test_gradients_of_a_split_are_those_of_the_whole(name, cuts):
    whole = Whole(np.float64, OPTIONS[name])
    rng = np.random.default_rng(1)
    out, lse = attention(whole.q, whole.k, whole.v, return_lse=True, **whole.options)
    dlse = np.where(np.isfinite(lse), rng.standard_normal(lse.shape), np.nan)
    want = attention_backward(whole.dout, whole.q, whole.k, whole.v, out, lse, dlse=dlse, **whole.options)
    ends = [0, *cuts, 29]
    parts = [whole.part(keys, n == 0) for n, keys in enumerate(map(slice, ends, ends[1:]))]
    outs, lses = zip(*(attention(whole.q, k, v, return_lse=True, **o) for k, v, o in parts), strict=True)
    merged = merge_attention(outs, lses)
    back = merge_attention_backward(whole.dout, outs, lses, *merged, dlse=dlse)
    grads = [
        attention_backward(back.douts[n], whole.q, k, v, outs[n], lses[n], dlse=back.dlses[n], **o)
        for n, (k, v, o) in enumerate(parts)
    ]
    np.testing.assert_allclose(sum(g.dq for g in grads), want.dq, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([g.dk for g in grads], axis=2), want.dk, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([g.dv for g in grads], axis=2), want.dv, rtol=0, atol=1e-12)
    if "sinks" in whole.options:
        np.testing.assert_allclose(grads[0].dsinks, want.dsinks, rtol=0, atol=1e-12)
    if "bias" in whole.options and whole.options["bias"].shape[-1] > 1:
        np.testing.assert_allclose(np.concatenate([g.dbias for g in grads], axis=-1), want.dbias, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ parts alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 30])
def test_random_parts(backend, dtype, count):
    rng = np.random.default_rng(count)
    outs, lses = parts_of(rng, (2, 3, 7, 20), dtype, count, spread=30.0)
    given_outs, given_lses = backend.arrays(outs), backend.arrays(lses)
    check_merge(outs, lses, merge_attention(given_outs, given_lses))


@pytest.mark.parametrize("layout", ["hsd", "shd"])
@pytest.mark.parametrize("style", data.OUTPUT_STYLES)
def test_any_strides_and_guards(backend, layout, style):
    """Parts and results inside poison; nothing else is written."""
    if style not in backend.styles:
        pytest.skip("a GPU can't load such elements")
    rng = np.random.default_rng(3)
    outs, lses = parts_of(rng, (2, 3, 7, 20), np.float32, 3)
    placed = [data.place(np.ascontiguousarray(canonical(x, layout)), style, backend.xp) for x in outs]
    placed_lses = [data.place(x, style, backend.xp) for x in lses]
    room = data.place_empty(canonical(outs[0], layout).shape, np.float32, style, backend.xp)
    room_lse = data.place_empty(lses[0].shape, np.float32, style, backend.xp)
    result = merge_attention(
        [p.array for p in placed], [p.array for p in placed_lses], layout=layout, out=(room.array, room_lse.array)
    )
    assert result.out is room.array
    check_merge([p.values for p in placed], lses, result, layout)
    assert all(p.unwritten() for p in (*placed, *placed_lses))
    assert room.guards_intact()
    assert room_lse.guards_intact()


def test_one_head_and_an_axis_of_parts(backend):
    rng = np.random.default_rng(4)
    outs, lses = parts_of(rng, (7, 20), np.float32, 4)
    stacked = backend.array(np.stack(outs)), backend.array(np.stack(lses))
    result = merge_attention(*stacked)
    check_merge(outs, lses, result)
    again = merge_attention(tuple(backend.arrays(outs)), list(backend.arrays(lses)))
    for x, y in zip(result, again, strict=True):
        np.testing.assert_array_equal(data.to_numpy(x), data.to_numpy(y))


@pytest.mark.parametrize(
    ("part", "out"), [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float16"), ("float32", "bfloat16")]
)
def test_another_dtype_of_the_result(backend, part, out):
    rng = np.random.default_rng(5)
    outs, lses = parts_of(rng, (3, 7, 20), np.dtype(part), 3)
    room = backend.xp.zeros((3, 7, 20), np.dtype(out))
    lse = backend.xp.zeros((3, 7), np.float32)
    merge_attention(backend.arrays(outs), backend.arrays(lses), out=(room, lse))
    check_merge(outs, lses, (room, lse))
    back = merge_attention_backward(room, backend.arrays(outs), backend.arrays(lses), room, lse)
    assert [x.dtype for x in back.douts] == [np.dtype(part)] * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 11])
@pytest.mark.parametrize("dlse", [False, True])
def test_random_gradients(backend, dtype, count, dlse):
    """Against the formulas in float64."""
    rng = np.random.default_rng(count)
    outs, lses = parts_of(rng, (2, 3, 7, 20), dtype, count)
    dout = rng.standard_normal((2, 3, 7, 20)).astype(dtype)
    held = backend.arrays(outs), backend.arrays(lses)
    out, lse = merge_attention(*held)
    seen = np.isfinite(data.to_numpy(lse))
    given = np.where(seen, rng.standard_normal(seen.shape), np.nan).astype(lses[0].dtype)
    back = merge_attention_backward(
        backend.array(dout), *held, out, lse, dlse=backend.array(given) if dlse else None
    )
    out, lse = (data.to_numpy(x).astype(np.float64) for x in (out, lse))
    delta = (dout.astype(np.float64) * out).sum(-1) - (np.where(seen, given, 0) if dlse else 0)
    bound = 64 * float(ml_dtypes.finfo(dtype).eps)
    for n, (x, x_lse) in enumerate(zip(outs, lses, strict=True)):
        there = np.isfinite(x_lse)
        w = np.where(there, np.exp(np.where(there, x_lse, 0) - np.where(seen, lse, 0)), 0)
        x = np.where(there[..., None], x, 0).astype(np.float64)
        want = w[..., None] * dout.astype(np.float64), w * ((dout.astype(np.float64) * x).sum(-1) - delta)
        for got, exact in zip((back.douts[n], back.dlses[n]), want, strict=True):
            np.testing.assert_allclose(data.to_numpy(got).astype(np.float64), exact, rtol=bound, atol=bound)


def test_never_nan_from_merging(backend):
    """Parts that have seen nothing, infinite lse, and weights that vanish beside an infinite out."""
    lses = np.array([[-np.inf, np.inf, 0.0, 500.0], [-np.inf, 3.0, -np.inf, 0.0]], np.float32)
    outs = np.ones((2, 4, 8), np.float32)
    outs[0, 0], outs[1, :] = np.nan, np.inf
    out, lse = (data.to_numpy(x) for x in merge_attention(*backend.arrays((outs, lses))))
    np.testing.assert_array_equal(lse, [-np.inf, np.inf, 0, 500])
    np.testing.assert_array_equal(out, np.repeat([[0.0], [1], [1], [1]], 8, axis=1))
    dout = np.ones((4, 8), np.float32)
    held = backend.arrays((outs, lses))
    back = merge_attention_backward(backend.array(dout), *held, backend.array(out), backend.array(lse))
    douts = np.stack([data.to_numpy(x) for x in back.douts])
    np.testing.assert_array_equal(douts[..., 0], [[0, 1, 1, 1], [0, 0, 0, 0]])
    assert np.isfinite(np.stack([data.to_numpy(x) for x in back.dlses])).all()


def test_nothing_to_merge(backend):
    for shape in ((2, 0, 8), (0, 3, 8)):
        x, lse = backend.xp.zeros(shape, np.float32), backend.xp.zeros(shape[:-1], np.float32)
        result = merge_attention([x, x], [lse, lse])
        assert result.out.shape == shape
        back = merge_attention_backward(x, [x, x], [lse, lse], *result)
        assert back.dlses[1].shape == shape[:-1]


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = [ones(3, 5, 8)] * 2, [ones(3, 5)] * 2
# fmt: off
WRONG = {
    "nothing": (([], []), {}, ValueError, ["0 outs", "at least one"]),
    "one lse": ((GOOD[0], GOOD[1][:1]), {}, ValueError, ["2 outs and 1 lses"]),
    "shapes": (([ones(3, 5, 8), ones(3, 4, 8)], GOOD[1]), {}, ValueError, ["outs[1].shape=(3, 4, 8)", "one shape"]),
    "dtypes": (([ones(3, 5, 8), ones(3, 5, 8, dtype=np.float64)], GOOD[1]), {}, TypeError, ["outs[1].dtype=float64"]),
    "lse": ((GOOD[0], [ones(3, 5), ones(5, 3)]), {}, ValueError, ["lses[1].shape=(5, 3)", "(3, 5)"]),
    "type of lse": ((GOOD[0], [ones(3, 5), ones(3, 5, dtype=np.float64)]), {}, TypeError, ["lses[1].dtype=float64"]),
    "integers": (([ones(3, 5, 8, dtype=int)], [ones(3, 5)]), {}, TypeError, ["outs[0].dtype=int64"]),
    "one axis": (([ones(8)], [ones()]), {}, ValueError, ["outs[0].ndim=1"]),
    "layout": (GOOD, {"layout": "dsh"}, ValueError, ["layout='dsh'"]),
    "a number": ((1.0, GOOD[1]), {}, TypeError, ["outs is a float"]),
    "out": (GOOD, {"out": ones(3, 5, 9)}, ValueError, ["out.shape=(3, 5, 9)"]),
    "out's dtype": (GOOD, {"out": ones(3, 5, 8, dtype=np.float64)}, TypeError, ["out.dtype=float64"]),
    "out of its own": (GOOD, {"out": GOOD[0][0]}, ValueError, ["shares memory with outs[0]"]),
    "lse of out": (GOOD, {"out": (ones(3, 5, 8), ones(3, 8))}, ValueError, ["out[1] (lse).shape=(3, 8)"]),
}
BACK = {
    "dout": ({"dout": ones(3, 5, 9)}, ValueError, ["dout.shape=(3, 5, 9)"]),
    "out": ({"out": ones(3, 5, 8, dtype=np.float64)}, TypeError, ["out.dtype=float64"]),
    "two dtypes": ({"out": ones(3, 5, 8, dtype=np.float16)}, TypeError, ["dout.dtype=float32, out.dtype=float16"]),
    "lse": ({"lse": ones(3, 5, dtype=np.float64)}, TypeError, ["lse.dtype=float64"]),
    "dlse": ({"dlse": ones(5, 3)}, ValueError, ["dlse.shape=(5, 3)"]),
}
# fmt: on


@pytest.mark.parametrize("name", WRONG)
def test_errors(name, monkeypatch):
    arguments, options, error, words = WRONG[name]
    monkeypatch.setattr(cupyflash._cpu_merge, "merge", lambda *_: pytest.fail("it ran before the error"))
    with pytest.raises(error) as caught:
        merge_attention(*arguments, **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", BACK)
def test_errors_of_the_backward(name, monkeypatch):
    changed, error, words = BACK[name]
    monkeypatch.setattr(cupyflash._cpu_merge, "merge_backward", lambda *_: pytest.fail("it ran before the error"))
    arguments = {"dout": ones(3, 5, 8), "out": ones(3, 5, 8), "lse": ones(3, 5), "outs": GOOD[0], "lses": GOOD[1]}
    with pytest.raises(error) as caught:
        merge_attention_backward(**arguments | changed)
    assert all(word in str(caught.value) for word in words), caught.value


# ---------------------------------------------------------------------------------------------- kernels, emulated


def emulated(seed):
    why_not()
    return Device(lambda n: Schedule.draw(seed and 100 * seed + n), arch=80, undefined=PROFILE != "ci")


@pytest.mark.parametrize("seed", [0, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7, 20), (5, 40), (3, 2, 2, 1, 2, 5, 3, 33), (1, 2, 300)])
def test_kernels(shape, dtype, seed):
    """Widths that vectors do and do not fill, more leading axes than the struct has, parts that saw nothing."""
    rng = np.random.default_rng(seed)
    count = 3 if len(shape) < 8 else 2
    outs, lses = parts_of(rng, shape, dtype, count)
    if len(shape) > 4:  # axes that do not become one
        outs = [np.ascontiguousarray(x.swapaxes(0, 3).swapaxes(1, 4)).swapaxes(1, 4).swapaxes(0, 3) for x in outs]
    dout = rng.standard_normal(shape).astype(dtype)
    with emulated(seed) as xp:
        held = [xp.asarray(x) for x in outs], [xp.asarray(x) for x in lses]
        result = merge_attention(*held)
        check_merge(outs, lses, result)
        dlse = np.where(np.isfinite(result.lse.get()), rng.standard_normal(shape[:-1]), np.nan).astype(lses[0].dtype)
        back = merge_attention_backward(xp.asarray(dout), *held, *result, dlse=xp.asarray(dlse))
        got = [x.get().astype(np.float64) for x in (*back.douts, *back.dlses)]
        out, lse = result.out.get(), result.lse.get()
    want = merge_attention_backward(dout, outs, lses, out, lse, dlse=dlse)
    for x, y in zip(got, (*want.douts, *want.dlses), strict=True):
        bound = max(2 * float(ml_dtypes.finfo(y.dtype).eps), 1e-12 if dtype == np.float64 else 1e-5)
        np.testing.assert_allclose(x, y.astype(np.float64), rtol=bound, atol=bound)


@pytest.mark.parametrize("count", [8, 9, 70])
def test_kernels_of_many_parts(count):
    """One launch, then levels."""
    rng = np.random.default_rng(count)
    outs, lses = parts_of(rng, (2, 3, 20), np.float16, count, spread=20.0)
    with emulated(1) as xp:
        result = merge_attention([xp.asarray(x) for x in outs], [xp.asarray(x) for x in lses])
        check_merge(outs, lses, result)
        back = merge_attention_backward(
            result.out, [xp.asarray(x) for x in outs], [xp.asarray(x) for x in lses], *result
        )
        got = [x.get() for x in back.dlses]
    want = merge_attention_backward(result.out.get(), outs, lses, result.out.get(), result.lse.get())
    for x, y in zip(got, want.dlses, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_kernels_never_make_nan():
    why_not()
    with emulated(0) as xp:
        test_never_nan_from_merging(Emulated(xp))


class Emulated:
    """As conftest's Backend, as far as a test asks for it."""

    def __init__(self, xp):
        self.xp = xp

    def array(self, x):
        return self.xp.asarray(x)

    def arrays(self, arrays):
        return tuple(map(self.xp.asarray, arrays))


@pytest.mark.parametrize("style", ["gaps", "backwards", "fortran", "swapped", "shifted"])
def test_kernels_take_any_strides(style):
    rng = np.random.default_rng(7)
    outs, lses = parts_of(rng, (2, 3, 7, 20), np.float32, 3)
    with emulated(2) as xp:
        held = [data.place(x, style, xp).array for x in outs], [data.place(x, style, xp).array for x in lses]
        room, room_lse = (data.place_empty(x.shape, np.float32, style, xp) for x in (outs[0], lses[0]))
        merge_attention(*held, out=(room.array, room_lse.array))
        check_merge(outs, lses, (room.array, room_lse.array))
        assert room.guards_intact()
        assert room_lse.guards_intact()


def test_wrong_kernels_are_found():
    """Planted: the next row of a part; maxima that lanes keep to themselves."""
    rng = np.random.default_rng(8)
    outs, lses = parts_of(rng, (2, 3, 20), np.float32, 3, empty=0)
    next_row = "at.row, col, params.columns, part", "at.row + 1, col, params.columns, part"
    with pytest.raises(EmulatorError, match="out of bounds"), Device(patches=(next_row,), undefined=False) as xp:
        merge_attention([xp.asarray(x) for x in outs], [xp.asarray(x) for x in lses])
    with Device(patches=(("top = warp_max(top);", ""),), undefined=False) as xp:
        result = merge_attention([xp.asarray(x) for x in outs], [xp.asarray(x) for x in lses])
        with pytest.raises(AssertionError):
            check_merge(outs, lses, result)


@pytest.mark.nvrtc
@pytest.mark.parametrize("card", ["sm_60", "sm_80", "sm_90"])
@pytest.mark.parametrize("row_warps", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_kernels_compile(card, row_warps, dtype):
    accumulator = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    for kernel in ("combine", "combine_backward"):
        step = merge_kernel(kernel, accumulator, np.dtype(dtype), accumulator, 100, row_warps, 128)
        if kernel == "combine" or row_warps == 1:
            compiled = nvrtc.compile_spec(step.spec, step.smem, card)
            assert compiled.spill_bytes == compiled.stack_bytes == 0, compiled.log

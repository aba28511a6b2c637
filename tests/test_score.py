# ruff: noqa: E501, E731, E741  (a table is read by its rows; a function may be short, and a grid has I and J)
"""Score and mask functions in attention: against what they stand for, by finite differences, and what is refused."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import numpy as np
import pytest
from emulator import Device, Schedule, why_not

from cupyflash import Tile, attention, attention_backward, attention_vjp, explain, prepare
from cupyflash.testing import cases, data
from cupyflash.testing.data import Case
from cupyflash.testing.functions import MASKS, SCORES

F32, F64 = np.float32, np.float64
FAMILIES = {"simt": ("float32", 90), "sm80": ("bfloat16", 80), "sm90": ("float16", 90)}  # and an architecture
TILES = [None, Tile(16, 16)]
ROWS, KEYS, HEADS = 33, 50, 4
I, J = np.arange(ROWS)[:, None], np.arange(KEYS)
RNG = np.random.default_rng(5)
SLOPES = RNG.standard_normal(HEADS)
TABLE = RNG.standard_normal((HEADS, 9))
ENTRIES = RNG.standard_normal((6, KEYS))


def draw(*batch, dtype=F64, seed=3):
    """q, k, v of 4 query heads and 2 kv heads, and cotangents of out and lse."""
    rng = np.random.default_rng(seed)
    shapes = ((HEADS, ROWS, 8), (2, KEYS, 8), (2, KEYS, 6), (HEADS, ROWS, 6), (HEADS, ROWS))
    return tuple(rng.standard_normal((*batch, *shape)).astype(dtype) for shape in shapes)


def everything(x, wrt=("q", "k", "v"), **options):
    """out, lse and gradients."""
    q, k, v, dout, dlse = x
    out, lse = attention(q, k, v, return_lse=True, **options)
    grads = attention_backward(dout, q, k, v, out, lse, dlse=dlse, wrt=wrt, **options)
    return (out, lse, *(getattr(grads, f"d{name}") for name in wrt))


def close(got, want, limit=1e-12):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=limit, atol=limit)


# ----------------------------------------------------------------------------------------------- what they stand for

# A function, its arguments, and options that say the same.
SAME = {
    "slopes": (lambda s, b, h, i, j, x: s + x[h] * (j - i), (SLOPES,), {"bias": SLOPES[:, None, None] * (J - I)}),
    "table": (
        lambda s, b, h, i, j, x: s + x[h, np.clip(j - i + 4, 0, 8)],
        (TABLE,),
        {"bias": TABLE[:, np.clip(J - I + 4, 0, 8)]},
    ),
    "entries": (
        lambda s, b, h, i, j, x: s + x[b, j],
        (ENTRIES,),
        {"bias": ENTRIES.reshape(2, 3, 1, 1, KEYS)},
    ),
    "scale": (lambda s, b, h, i, j, c: c * s, (2.5,), {"scale": 2.5 * 8**-0.5}),
    "cap": (lambda s, b, h, i, j: 1.5 * np.tanh(s / 1.5), (), {"softcap": 1.5}),
    "window": (
        lambda s, b, h, i, j, n: np.where(abs(j - i - (KEYS - ROWS)) <= n, s, -np.inf), (5,), {"window": (5, 5)},
    ),
    "mask": (
        lambda s, b, h, i, j, keep: np.where(keep[i, j], s, -np.inf), ((I + J) % 3 > 0,), {"mask": (I + J) % 3 > 0},
    ),
}  # fmt: skip
BESIDE = {
    "alone": {},
    "masked": {"causal": True, "sinks": RNG.standard_normal(HEADS), "dropout": 0.3, "seed": 7, "mask": (I * J) % 5 < 3},
}


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("name", SAME)
def test_a_score_is_what_it_stands_for(name, beside, tile):
    function, args, options = SAME[name]
    others = BESIDE[beside]
    if "mask" in options and "mask" in others:
        options = {"mask": options["mask"] & others["mask"]}
    wrt = ("q", "k", "v", *(("sinks",) if "sinks" in others else ()))
    x = draw(2, 3)
    got = everything(x, wrt, score=function, score_args=args, tile=tile, **others)
    close(got, everything(x, wrt, tile=tile, **{**others, **options}))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_mask_function_is_a_mask(tile):
    x, keep = draw(2, 3), RNG.random((6, HEADS, KEYS)) < 0.7
    seen = keep.reshape(2, 3, HEADS, 1, KEYS) & ((I + J) % 4 < 3)
    options = {"window": (20, 3), "sinks": SLOPES, "bias": TABLE[:, np.clip(J - I + 4, 0, 8)], "tile": tile}

    def mask(b, h, i, j, keep, n):
        return keep[b, h, j] & ((i + j) % n < 3)

    wrt = ("q", "k", "v", "bias", "sinks")
    got = everything(x, wrt, mask=mask, mask_args=(keep, 4), **options)
    for a, b in zip(got, everything(x, wrt, mask=seen, **options), strict=True):
        np.testing.assert_array_equal(a, b)


def test_positions_count_in_the_entrys_own_sequence():
    """Neither q_offset nor lengths move i and j."""
    x, lens = draw(2), {"q_lens": np.array([20, 33]), "kv_lens": np.array([31, 7])}
    score = SAME["slopes"][0]
    for options in (lens, {"q_offset": 9, "causal": True}, {**lens, "causal": True}):
        bias = SLOPES[:, None, None] * (J - I)
        got = everything(x, score=score, score_args=(SLOPES,), **options)
        close(got, everything(x, bias=bias, **options))


def test_arguments_of_any_memory_and_type():
    x, want = draw(2), None
    table = np.round(4 * TABLE)
    for kind in (F64, F32, np.float16, np.int8, np.int64):
        for view in (table.astype(kind), np.asfortranarray(table.astype(kind)), table.astype(kind)[::-1, ::-1]):
            function = SAME["table"][0]
            if view.strides[0] < 0:
                def function(s, b, h, i, j, x):  # the reverse of the reverse
                    return s + x[3 - h, 8 - np.clip(j - i + 4, 0, 8)]
            got = everything(x, score=function, score_args=(view,))
            want = want or got
            close(got, want)


# --------------------------------------------------------------------------------------------------- finite differences


def curved(s, b, h, i, j, table, factor, gain):
    """A function of all that there is, bounded in its growth."""
    s = s * gain[b, j] + table[h, np.clip(j - i + 4, 0, 8)]
    return np.tanh(s * factor) / factor + 0.1 * s * s / (1 + s * s) + np.where((i + j) % 7 == 0, 0.5 * s, 0)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_gradients_are_finite_differences(tile):
    q, k, v, dout, dlse = draw(2)
    rng = np.random.default_rng(8)
    bias, sinks = rng.standard_normal((HEADS, 1, KEYS)), rng.standard_normal(HEADS)
    inputs = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    options = {
        "score": curved, "score_args": (TABLE, 0.3, ENTRIES), "softcap": 3.0, "alibi_slopes": SLOPES / 8,
        "mask": lambda b, h, i, j: (i * j + h) % 5 != b, "causal": True, "dropout": 0.2, "seed": 3, "tile": tile,
    }  # fmt: skip
    out, lse = attention(**inputs, return_lse=True, **options)
    dlse = np.where(lse == -np.inf, 0, dlse)
    grads = attention_backward(dout, q, k, v, out, lse, dlse=dlse, bias=bias, sinks=sinks, **options)

    def value(**changed):
        o, s = attention(**{**inputs, **changed}, return_lse=True, **options)
        return (dout * o).sum() + (dlse * np.where(s == -np.inf, 0, s)).sum()

    for name, x in inputs.items():
        t = rng.standard_normal(x.shape)
        step = 1e-5
        slope = (value(**{name: x + step * t}) - value(**{name: x - step * t})) / (2 * step)
        np.testing.assert_allclose((getattr(grads, f"d{name}") * t).sum(), slope, rtol=1e-7, err_msg=name)


def test_vjp_takes_functions_along():
    x = draw(2)
    options = {"score": curved, "score_args": (TABLE, 0.3, ENTRIES), "mask": lambda b, h, i, j: i + j > h}
    (out, lse), vjp = attention_vjp(*x[:3], return_lse=True, **options)
    want = everything(x, **options)
    for a, b in zip((out, lse, *vjp(x[3], x[4])[:3]), want, strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------------- what is hidden


def unsafe(s, b, h, i, j):
    """NaN where j > i + 17, infinite slopes where a logit is 0, as in rows that there are none of."""
    return s + np.log(i - j + 17.5) + 1e-3 / s


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_what_is_hidden_leaves_nothing(tile):
    x = draw(2)
    seen = J <= I + 17
    bias = np.where(seen, np.log(np.where(seen, I - J + 17.5, 1)), 0)
    got = everything(x, score=unsafe, causal=True, tile=tile)
    assert all(np.isfinite(a).all() for a in got)
    safe = {"score": lambda s, b, h, i, j, x: s + x[i, j] + 1e-3 / s, "score_args": (bias,)}
    close(got, everything(x, mask=seen, tile=tile, **safe))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_rows_that_a_score_empties(tile):
    """Their gradients are 0, whatever the function makes of products that are 0."""
    x = draw(2)
    got = everything(x, score=lambda s, b, h, i, j: np.where(i % 3 == 0, -np.inf, s + 1e-3 / s), tile=tile)
    empty = np.arange(ROWS) % 3 == 0
    assert (got[0][..., empty, :] == 0).all()
    assert (got[1][..., empty] == -np.inf).all()
    assert (got[2][..., empty, :] == 0).all()
    mask = lambda b, h, i, j: i % 3 != 0
    close(got, everything(x, score=lambda s, b, h, i, j: s + 1e-3 / s, mask=mask, tile=tile))


def test_minus_infinity_stays_hidden():
    """A bias of -inf does not come back as the square of it."""
    x = draw(2)
    hide = (I + 2 * J) % 5 == 0
    square = {"score": lambda s, b, h, i, j: 0.1 * s * s}
    got = everything(x, ("q", "k", "v", "bias"), bias=np.where(hide, -np.inf, 0.5), **square)
    assert (got[-1][hide] == 0).all()
    close(got, everything(x, ("q", "k", "v", "bias"), bias=np.full((ROWS, KEYS), 0.5), mask=~hide, **square))


# -------------------------------------------------------------------------------------------------------- what compiles


class Texts(list):
    """A patch that changes nothing and keeps each text that is compiled."""

    def __call__(self, text):
        self.append(text)
        return text


def test_other_values_compile_nothing():
    why_not()
    x = draw(2, dtype=F32)
    texts = Texts()
    results = []
    with Device(lambda n: Schedule.draw(0), patches=(texts,), arch=80) as xp:
        counts = []
        for table, factor in ((TABLE, 0.3), (2 * TABLE, 0.3), (TABLE[:, :7], 0.5), (TABLE[:, ::2], 0.7)):
            score = lambda s, b, h, i, j, x, c: c * s + x[h, j - i]  # a new function each time
            held = [xp.asarray(a) for a in x]
            options = {"score": score, "score_args": (xp.asarray(table), factor)}
            results.append([a.get() for a in everything(held, **options)])
            want = everything(x, score=score, score_args=(table, factor))
            close(results[-1], want, 2e-5)
            counts.append(len(texts))
        everything(held, score=lambda s, b, h, i, j, x, c: c * s - x[h, j - i], score_args=options["score_args"])
        assert counts[0] == counts[-1] > 0
        assert len(texts) > counts[0], "another function is another kernel"
    assert not np.allclose(results[0][0], results[1][0])


def test_a_plan_knows_what_functions_do():
    """Equal functions have equal plans; the prelude stays readable, and the text is that of the function."""
    q, k, v, *_ = draw(2, dtype=F32)
    plans = [
        explain(q, k, v, device="sm_90", score=lambda s, b, h, i, j, x: s + x[h] * (j - i), score_args=(x,), backward=way, wrt=("q", "k", "v") if way else None)
        for way in (False, True)
        for x in (SLOPES, np.zeros(9))
    ]
    assert plans[0] == plans[1]
    assert plans[2] == plans[3]
    spec = plans[0].kernels[0].spec
    assert "score_function" in spec.score_text
    assert "constexpr bool HAS_SCORE = true;" in spec.prelude()
    assert "score_function" not in spec.prelude()


SHARED = {
    "pairs": (lambda b, h, i, j: i >= j, (1, 1)),
    "heads": (lambda b, h, i, j: i >= j + h, (1, HEADS)),
    "entries": (lambda b, h, i, j: i >= j + b, (2, 1)),
    "both": (lambda b, h, i, j: (i >= j + b) | (h > 1), (2, HEADS)),
}


@pytest.mark.parametrize("name", SHARED)
def test_there_are_as_many_maps_of_blocks_as_a_mask_function_tells_apart(name):
    function, entries = SHARED[name]
    plan = explain(*draw(2, dtype=F32)[:3], device="sm_80", mask=function)
    assert [shape[:2] for _, shape, _ in plan.maps] == [entries]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_a_mask_function_hides_or_leaves(family):
    """Whole blocks of both kinds, other ones in each entry, by numbers of the logit's own type."""
    why_not()
    dtype, arch = FAMILIES[family]
    case = Case(4, "float64" if family == "simt" else dtype, batch=((2,),) * 3, seqlen_q=300, seqlen_k=400, head_dim=16, head_dim_v=16)
    x = case.inputs()
    factors = np.array([0.5 + 2**-40, 2.0])

    def mask(b, h, i, j, factors):
        return factors[b] * i >= j

    seen = factors[:, None, None, None] * np.arange(300)[:, None] >= np.arange(400)
    results = []
    for function, args in ((mask, (factors,)), (seen, ())):
        with Device(lambda n: Schedule.draw(5), arch=arch) as xp:
            q, k, v, dout = (xp.asarray(a) for a in x[:4])
            options = {"mask": function if callable(function) else xp.asarray(function), "family": family}
            options["mask_args"] = tuple(xp.asarray(a) for a in args)
            out, lse = attention(q, k, v, return_lse=True, **options)
            grads = attention_backward(dout, q, k, v, out, lse, **options)[:3]
            results.append([a.get() for a in (out, lse, *grads)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


# ----------------------------------------------------------------------------------------------------- what is refused


def branching(s, b, h, i, j):
    return s if j > i else 0.0


BAD = {
    "no function": ({"score": 3}, TypeError, ["score=3", "callable"]),
    "a branch": ({"score": branching}, TypeError, ["bool()", "np.where", f"test_score.py:{branching.__code__.co_firstlineno + 1}"]),
    "too few arguments": ({"score": lambda s, b, h, i, j, x: s}, TypeError, ["0 score_args", "test_score.py"]),
    "args alone": ({"score_args": (SLOPES,)}, TypeError, ["score_args has 1", "score is None"]),
    "mask args alone": ({"mask_args": (1,)}, TypeError, ["mask_args has 1", "mask is None"]),
    "mask args of an array": ({"mask": np.ones((ROWS, KEYS), bool), "mask_args": (1,)}, TypeError, ["mask is a ndarray"]),
    "args list": ({"score": branching, "score_args": [SLOPES]}, TypeError, ["score_args=[", "tuple"]),
    "args array": ({"score_args": SLOPES}, TypeError, ["score_args=", "tuple"]),
    "nine args": ({"score": lambda s, b, h, i, j, *x: s, "score_args": (1,) * 9}, ValueError, ["len(score_args)=9", "8"]),
    "a list as an array": ({"score": lambda s, b, h, i, j, x: s, "score_args": ([1],)}, TypeError, ["score_args[0] is a list"]),
    "complex": ({"score": lambda s, b, h, i, j, x: s, "score_args": (SLOPES * 1j,)}, TypeError, ["score_args[0].dtype", "float64"]),
    "an empty axis": (
        {"score": lambda s, b, h, i, j, x: s + x[h], "score_args": (np.ones(0),)}, ValueError, ["score_args[0].shape=(0,)"]
    ),
    "a number for a mask": ({"mask": lambda b, h, i, j: i - j}, TypeError, ["mask function", "boolean"]),
    "a mask of a branch": ({"mask": lambda b, h, i, j: i > j and h > 1}, TypeError, ["bool()", "&, |, ~"]),
}  # fmt: skip


@pytest.mark.parametrize("call", [attention, explain, prepare], ids=lambda call: call.__name__)
@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name, call):
    options, error, words = BAD[name]
    with pytest.raises(error) as caught:
        call(*draw(2)[:3], **options)
    assert type(caught.value) is error
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_no_pairs_ask_for_no_elements():
    q, k, v, *_ = draw(2)
    out = attention(q, k[..., :0, :], v[..., :0, :], score=SAME["entries"][0], score_args=(ENTRIES[:, :0],))
    assert (out == 0).all()


def test_a_result_does_not_overwrite_an_argument():
    q, k, v, *_ = draw(2)
    out = np.empty((2, HEADS, ROWS, 6))
    with pytest.raises(ValueError, match=r"shares memory with score_args\[0\]"):
        attention(q, k, v, score=SAME["slopes"][0], score_args=(out.reshape(-1)[:HEADS],), out=out)


# ------------------------------------------------------------------------------------------------------------- kernels

KINDS = [(name, None) for name in SCORES] + [("square", name) for name in MASKS]


@pytest.mark.share(2)
@pytest.mark.parametrize(("score", "mask"), KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_under_the_emulator(family, score, mask):
    why_not()
    dtype, arch = FAMILIES[family]
    seed = KINDS.index((score, mask))
    lens = {"q_lens": "entries", "kv_lens": "entries"}
    beside = (
        {"causal": True, "bias": "heads"}, {"softcap": 5.0, "bias": "keys", "dropout": 0.2, **lens}, {"sinks": "float32"}
    )  # fmt: skip
    case = Case(
        seed, dtype, batch=((2, 1), (3,), ()), num_heads_k=2, group=2, seqlen_q=70, seqlen_k=90, head_dim=24,
        head_dim_v=16, dlse=True, score=score, mask=mask, **beside[seed % 3],
    )  # fmt: skip
    with Device(lambda n: Schedule.draw(100 * seed + n), arch=arch, undefined=True) as xp:
        report = cases.run(case, xp, family=family)
    assert report.ok, f"{case!r}\n{report}"


@pytest.mark.gpu
@pytest.mark.parametrize(("score", "mask"), KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_kernels_on_a_gpu(gpu, dtype, score, mask):
    for causal, window, lens in ((True, None, None), (False, (40, 9), "entries")):
        case = Case(
            7, dtype, batch=((2,), (2,), ()), num_heads_k=2, group=2, seqlen_q=300, seqlen_k=257, head_dim=64,
            head_dim_v=64, dlse=True, causal=causal, window=window, q_lens=lens, kv_lens=lens, bias="heads",
            sinks="float32", score=score, mask=mask,
        )  # fmt: skip
        report = cases.run(case, gpu.xp)
        assert report.ok, f"{case!r}\n{report}"


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_beyond_the_end_leave_nothing(family):
    """Their logits are 0, of which this function makes infinity."""
    why_not()
    dtype, arch = FAMILIES[family]
    q, k, v, dout, _ = (x.astype(data._dtype(dtype)) for x in draw(2))
    options = {"score": lambda s, b, h, i, j: s + 1e-3 / (s + np.where(s < 0, -1e-2, 0)), "family": family}
    with Device(lambda n: Schedule.draw(3), arch=arch) as xp:
        held = [xp.asarray(x) for x in (q, k, v, dout)]
        out, lse = attention(*held[:3], return_lse=True, **options)
        grads = attention_backward(held[3], *held[:3], out, lse, **options)[:3]
        got = [x.get().astype(F64) for x in (out, lse, *grads)]
    assert all(np.isfinite(x).all() for x in got)


# ---------------------------------------------------------------------------------------------------------------- docs


def test_examples_of_the_page_run():
    page = Path(__file__).resolve().parent.parent / "docs" / "score.md"
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) == text.count("```python") > 1
    report: list[str] = []
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)
    assert test.examples
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert "".join(report) == ""

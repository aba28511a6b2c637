# ruff: noqa: E501  (a table is read by its rows)
"""Options of a call: the pairwise table against the specification, facts that users rely on, and bad input."""

from __future__ import annotations

import fractions

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

import cupyflash
from cupyflash import AttentionGradients, Tile, attention, attention_backward, attention_vjp, explain, prepare
from cupyflash._options import check_lens
from cupyflash.testing import cases, data, reference
from cupyflash.testing.data import Case

F32, F64, F16, BF16 = np.float32, np.float64, np.float16, ml_dtypes.bfloat16
TABLE = cases.options_table()


def check(case, **options):
    """Judge all results of a case on NumPy."""
    if not reference.is_wide_enough(data._dtype(case.dtype)):
        pytest.skip("longdouble is no wider than float64 on this machine")
    report = cases.run(case, **options)
    assert report.ok, f"{case!r}\n{report}"


# ----------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("tile", [None, Tile(16, 16), Tile(32, 48)], ids=["own tile", "16 x 16", "32 x 48"])
@pytest.mark.parametrize("number", range(len(TABLE)))
def test_every_two_options(number, tile):
    check(TABLE[number], tile=tile)


@hypothesis.given(choices=st.data())
def test_random_problems(choices):
    case = data.random_case(lambda n: choices.draw(st.integers(0, n - 1)), work=300_000, options=True)
    blocks = choices.draw(st.sampled_from([None, Tile(16, 16), Tile(24, 40)]))
    hypothesis.note(repr(case))
    check(case, tile=blocks)


@pytest.mark.parametrize("style", data.INPUT_STYLES)
@pytest.mark.parametrize("kind", ["full", "keys", "rows", "key"])
def test_bias_and_mask_in_any_memory(kind, style):
    written = style if style in data.OUTPUT_STYLES else "plain"
    case = Case(
        1, batch=((2,),) * 3, num_heads_k=2, seqlen_q=33, seqlen_k=47, head_dim=8, head_dim_v=8, bias=kind, mask=kind,
        sinks="float32", styles_beside=(style, style, written, written), grads_out=True, dlse=True,
    )  # fmt: skip
    check(case, tile=Tile(16, 16))


@pytest.mark.parametrize("wrt", [("bias",), ("sinks",), ("sinks", "v"), ("q", "bias"), ("bias", "sinks")], ids="-".join)
@pytest.mark.parametrize("grads_out", [False, True], ids=["new", "grads_out"])
def test_gradients_by_name(wrt, grads_out):
    check(
        Case(2, seqlen_q=20, seqlen_k=30, head_dim=8, head_dim_v=8, bias="rows", sinks="float16", wrt=wrt, grads_out=grads_out)
    )


def draw(*batch, seqlen_q=12, seqlen_k=20):
    """q, k, v of 4 query heads and 2 kv heads."""
    rng = np.random.default_rng(3)
    shapes = ((4, seqlen_q, 8), (2, seqlen_k, 8), (2, seqlen_k, 8))
    return tuple(rng.standard_normal((*batch, *shape)).astype(F32) for shape in shapes)


def same_bits(a, b):
    """Whether out and lse of two calls are the same."""
    for x, y in zip(a, b, strict=True):
        assert x.tobytes() == y.tobytes()


def test_seeds_of_any_kind_are_one_seed():
    x, options = draw(2), {"dropout": 0.5, "return_lse": True}
    want = attention(*x, seed=7, **options)
    for seed in (np.int32(7), np.uint64(7), np.array(7), np.array(7, np.uint64)):
        same_bits(attention(*x, seed=seed, **options), want)
    same_bits(attention(*x, seed=2**64 - 1, **options), attention(*x, seed=np.array(-1), **options))
    assert (attention(*x, seed=8, **options).out != want.out).any()
    assert (attention(*x, seed=7 + 2**32, **options).out != want.out).any(), "both halves of a seed count"


def test_lengths_of_any_kind_are_one_length():
    x, options = draw(3), {"return_lse": True, "causal": True}
    want = attention(*x, q_lens=np.array([7, 7, 7]), kv_lens=np.array([11, 11, 11]), **options)
    for kind in (np.int8, np.int32, np.uint8, np.uint64):
        same_bits(attention(*x, q_lens=np.array([7], kind), kv_lens=kind(11), **options), want)
    same_bits(attention(*x, q_lens=7, kv_lens=np.array(11), **options), want)


def test_what_is_off_changes_nothing():
    x = draw(2)
    want = attention(*x, return_lse=True)
    for options in (
        {"dropout": 0}, {"dropout": np.float64(0), "seed": 3}, {"seed": 3}, {"window": (None, None)}, {"window": None},
    ):  # fmt: skip
        same_bits(attention(*x, return_lse=True, **options), want)


def test_an_integer_softcap_is_a_real_one():
    x = draw(2)
    want = attention(*x, softcap=2.0, return_lse=True)
    for softcap in (2, np.float32(2), np.int64(2), fractions.Fraction(2)):
        same_bits(attention(*x, softcap=softcap, return_lse=True), want)


def test_a_window_far_away():
    """Bounds and offsets of more than 32 bits meet as integers do."""
    q, k, v = draw(2)
    for off, window in ((2**40, (2**40, None)), (-(2**40), (None, 2**40 + 3)), (2**61, (2**61 - 2, 2))):
        got = attention(q, k, v, q_offset=off, window=window, return_lse=True)
        want = reference.forward(q, k, v, q_offset=off, window=window)
        np.testing.assert_allclose(got.lse, want.lse.astype(F32), rtol=1e-5)
        np.testing.assert_allclose(got.out, want.out.astype(F32), rtol=1e-4, atol=1e-5)


def test_vjp_takes_options_along():
    q, k, v = draw(2)
    rng = np.random.default_rng(4)
    bias, sinks = rng.standard_normal((4, 12, 20)).astype(F32), rng.standard_normal(4).astype(F32)
    options = {"bias": bias, "sinks": sinks, "window": (8, 2), "softcap": 3.0, "dropout": 0.2, "seed": 5}
    (out, lse), vjp = attention_vjp(q, k, v, return_lse=True, **options)
    dout = rng.standard_normal(out.shape).astype(F32)
    want = attention_backward(dout, q, k, v, out, lse, **options)
    got = vjp(dout)
    assert got._fields == ("dq", "dk", "dv", "dbias", "dsinks", "dscore_args")
    same_bits(got[:5], want[:5])
    assert got.dscore_args is None
    assert vjp(dout, wrt=("sinks",)).dbias is None


def test_inputs_are_not_written():
    """Arrays that are read-only are read."""
    q, k, v = draw(2)
    beside = {
        "bias": np.zeros((12, 20), F16), "mask": np.ones((12, 20), bool), "alibi_slopes": np.ones(4, F32),
        "sinks": np.zeros(4, F32), "q_lens": np.array([3, 12]), "kv_lens": np.array([20, 5]), "seed": np.array(3),
    }  # fmt: skip
    for x in (q, k, v, *beside.values()):
        x.flags.writeable = False
    ids = np.zeros(12, np.int16), np.zeros((2, 20), np.uint8)
    _, vjp = attention_vjp(q, k, v, dropout=0.1, segment_ids=ids, **beside)
    assert all(np.isfinite(x.astype(F32)).all() for x in vjp(np.ones((2, 4, 12, 8), F32))[:5])


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def nothing_runs(monkeypatch):
    """No error may come after a block of NumPy, a launch or a compilation."""

    def ran(*_, **__):
        pytest.fail("something was compiled or ran before the error")

    from cupyflash import _compile, _cpu, _launch

    for module, names in (
        (_cpu, ("forward", "backward")), (_launch, ("forward", "backward", "compile_plan")), (_compile, ("load",))
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, ran)


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


def expect(error, words, function, *args, **kwargs):
    """`function` raises exactly `error`, whose text has all of `words`."""
    with pytest.raises((ValueError, TypeError)) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {text}"
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"


# fmt: off
IDS = ones(5, dtype=int), ones(6, dtype=int)
BAD = {
    # name: (changes to a call of 3 entries, 4 query heads, 5 rows, 6 keys; error; words of the text: the value, the rule)
    "window int": ({"window": 3}, TypeError, ["window=3", "pair (left, right)"]),
    "window list": ({"window": [3, 3]}, TypeError, ["window=[3, 3]", "pair"]),
    "window of three": ({"window": (1, 2, 3)}, TypeError, ["window=(1, 2, 3)", "pair"]),
    "window float": ({"window": (1.0, 2)}, TypeError, ["window=(1.0, 2)", "integers of at least 0"]),
    "window bool": ({"window": (True, 2)}, TypeError, ["window=(True, 2)", "integers"]),
    "window NumPy bool": ({"window": (np.True_, 2)}, TypeError, ["window=", "integers"]),
    "window str": ({"window": ("1", None)}, TypeError, ["window=('1', None)", "integers"]),
    "window array": ({"window": (ones(1, dtype=int), None)}, TypeError, ["window=", "integers"]),
    "window negative": ({"window": (-1, None)}, ValueError, ["window=(-1, None)", "at least 0"]),
    "window negative right": ({"window": (None, np.int64(-2))}, ValueError, ["-2", "at least 0"]),
    "softcap 0": ({"softcap": 0.0}, ValueError, ["softcap=0.0", "above 0"]),
    "softcap negative": ({"softcap": -1}, ValueError, ["softcap=-1.0", "above 0"]),
    "softcap nan": ({"softcap": float("nan")}, ValueError, ["softcap=nan", "finite"]),
    "softcap inf": ({"softcap": np.inf}, ValueError, ["softcap=inf", "finite"]),
    "softcap huge": ({"softcap": 10**400}, ValueError, ["softcap=inf", "finite"]),
    "softcap str": ({"softcap": "30"}, TypeError, ["softcap='30'", "real number"]),
    "softcap bool": ({"softcap": True}, TypeError, ["softcap=True", "real number"]),
    "softcap complex": ({"softcap": 1j}, TypeError, ["softcap=1j", "real number"]),
    "softcap array": ({"softcap": ones(1)}, TypeError, ["softcap=", "real number"]),
    "dropout 1": ({"dropout": 1, "seed": 1}, ValueError, ["dropout=1.0", "below 1"]),
    "dropout above 1": ({"dropout": 1.5, "seed": 1}, ValueError, ["dropout=1.5", "probability"]),
    "dropout negative": ({"dropout": -0.1, "seed": 1}, ValueError, ["dropout=-0.1", "at least 0"]),
    "dropout nan": ({"dropout": np.nan, "seed": 1}, ValueError, ["dropout=nan", "probability"]),
    "dropout huge": ({"dropout": -10**400, "seed": 1}, ValueError, ["dropout=-inf", "probability"]),
    "dropout None": ({"dropout": None}, TypeError, ["dropout=None", "real number"]),
    "dropout bool": ({"dropout": False}, TypeError, ["dropout=False", "real number"]),
    "dropout str": ({"dropout": "0.1", "seed": 1}, TypeError, ["dropout='0.1'", "real number"]),
    "dropout without a seed": ({"dropout": 0.1}, ValueError, ["dropout=0.1 without a seed", "seed="]),
    "seed negative": ({"dropout": 0.1, "seed": -1}, ValueError, ["seed=-1", "2**64 - 1"]),
    "seed too large": ({"dropout": 0.1, "seed": 2**64}, ValueError, [f"seed={2**64}", "2**64 - 1"]),
    "seed without dropout": ({"seed": -1}, ValueError, ["seed=-1", "2**64 - 1"]),
    "seed float": ({"seed": 1.0}, TypeError, ["seed=1.0", "integer"]),
    "seed bool": ({"seed": True}, TypeError, ["seed=True", "integer"]),
    "seed NumPy bool": ({"seed": np.True_}, TypeError, ["seed=", "integer"]),
    "seed str": ({"seed": "1"}, TypeError, ["seed='1'", "integer"]),
    "seed list": ({"seed": [1]}, TypeError, ["seed=[1]", "integer"]),
    "seed int32 array": ({"seed": np.array(1, np.int32)}, TypeError, ["seed=array(1", "int64 or uint64"]),
    "seed float array": ({"seed": np.array(1.0)}, TypeError, ["seed=array(1.", "int64 or uint64"]),
    "seeds": ({"seed": np.array([1, 2])}, ValueError, ["seed.shape=(2,)", "no axes"]),
    "bias list": ({"bias": [[0.0] * 6] * 5}, TypeError, ["bias is a list", "array"]),
    "bias number": ({"bias": 0.5}, TypeError, ["bias is a float", "array"]),
    "bias masked": ({"bias": np.ma.ones((5, 6), F32)}, TypeError, ["bias is a masked array"]),
    "bias int": ({"bias": ones(5, 6, dtype=int)}, TypeError, ["bias.dtype=int64", "float16, bfloat16, float32 or float64"]),
    "bias bool": ({"bias": ones(5, 6, dtype=bool)}, TypeError, ["bias.dtype=bool", "float32"]),
    "bias longdouble": ({"bias": ones(5, 6, dtype=np.longdouble)}, TypeError, [f"bias.dtype={np.dtype(np.longdouble)}", "float64"]),
    "bias complex": ({"bias": ones(5, 6, dtype=complex)}, TypeError, ["bias.dtype=complex128", "float64"]),
    "bias of foreign byte order": ({"bias": ones(5, 6, dtype=np.dtype(F32).newbyteorder())}, TypeError, ["bias.dtype=", "f4"]),
    "bias rows": ({"bias": ones(4, 6)}, ValueError, ["bias.shape=(4, 6)", "(3, 4, 5, 6)", "(*batch, Hq, Sq, Sk)"]),
    "bias keys": ({"bias": ones(5)}, ValueError, ["bias.shape=(5,)", "(3, 4, 5, 6)"]),
    "bias of kv heads": ({"bias": ones(2, 5, 6)}, ValueError, ["bias.shape=(2, 5, 6)", "(3, 4, 5, 6)"]),
    "bias of more entries": ({"bias": ones(2, 3, 4, 5, 6)}, ValueError, ["bias.shape=(2, 3, 4, 5, 6)", "(3, 4, 5, 6)"]),
    "bias of no entry": ({"bias": ones(0, 6)}, ValueError, ["bias.shape=(0, 6)", "(3, 4, 5, 6)"]),
    "mask float": ({"mask": ones(5, 6)}, TypeError, ["mask.dtype=float32", "boolean", "bias"]),
    "mask int": ({"mask": ones(5, 6, dtype=np.uint8)}, TypeError, ["mask.dtype=uint8", "boolean"]),
    "mask list": ({"mask": [True]}, TypeError, ["mask is a list", "array"]),
    "mask shape": ({"mask": ones(6, 5, dtype=bool)}, ValueError, ["mask.shape=(6, 5)", "(3, 4, 5, 6)"]),
    "slopes int": ({"alibi_slopes": ones(4, dtype=int)}, TypeError, ["alibi_slopes.dtype=int64", "float16"]),
    "slopes list": ({"alibi_slopes": [0.5] * 4}, TypeError, ["alibi_slopes is a list", "array"]),
    "slopes of kv heads": ({"alibi_slopes": ones(2)}, ValueError, ["alibi_slopes.shape=(2,)", "(*batch, Hq)", "(3, 4)"]),
    "slopes of pairs": ({"alibi_slopes": ones(4, 1, 1)}, ValueError, ["alibi_slopes.shape=(4, 1, 1)", "(3, 4)"]),
    "sinks int": ({"sinks": ones(4, dtype=int)}, TypeError, ["sinks.dtype=int64", "float16"]),
    "sinks number": ({"sinks": 0.0}, TypeError, ["sinks is a float", "array"]),
    "sinks of kv heads": ({"sinks": ones(2)}, ValueError, ["sinks.shape=(2,)", "each query head", "(4,)"]),
    "sinks of entries": ({"sinks": ones(3, 4)}, ValueError, ["sinks.shape=(3, 4)", "(4,)"]),
    "one sink": ({"sinks": ones(1)}, ValueError, ["sinks.shape=(1,)", "(4,)"]),
    "segments alone": ({"segment_ids": IDS[0]}, TypeError, ["segment_ids=", "pair (q_ids, kv_ids)"]),
    "segments list": ({"segment_ids": list(IDS)}, TypeError, ["segment_ids=", "pair"]),
    "segments of three": ({"segment_ids": (*IDS, IDS[0])}, TypeError, ["segment_ids=", "pair"]),
    "segments None": ({"segment_ids": (IDS[0], None)}, TypeError, ["segment_ids[1] is a NoneType", "array"]),
    "segments float": ({"segment_ids": (ones(5), IDS[1])}, TypeError, ["segment_ids[0].dtype=float32", "integers"]),
    "segments bool": ({"segment_ids": (IDS[0], ones(6, dtype=bool))}, TypeError, ["segment_ids[1].dtype=bool", "integers"]),
    "segments of q": ({"segment_ids": (IDS[1], IDS[1])}, ValueError, ["segment_ids[0].shape=(6,)", "(*batch, Sq)", "(3, 5)"]),
    "segments of k": ({"segment_ids": IDS[:1] * 2}, ValueError, ["segment_ids[1].shape=(5,)", "(*batch, Sk)", "(3, 6)"]),
    "segments of heads": ({"segment_ids": (ones(3, 4, 5, dtype=int), IDS[1])}, ValueError, ["segment_ids[0].shape=(3, 4, 5)", "(3, 5)"]),
    "q_lens too long": ({"q_lens": 6}, ValueError, ["q_lens=6", "0 and the array's 5 rows"]),
    "q_lens negative": ({"q_lens": -1}, ValueError, ["q_lens=-1", "5 rows"]),
    "kv_lens too long": ({"kv_lens": np.int64(7)}, ValueError, ["kv_lens=7", "6 rows"]),
    "kv_lens of entries too long": ({"kv_lens": np.array([1, 9, 6])}, ValueError, ["kv_lens", "from 1 to 9", "6 rows"]),
    "q_lens of entries negative": ({"q_lens": np.array([1, -2, 5])}, ValueError, ["q_lens", "from -2 to 5", "5 rows"]),
    "q_lens float": ({"q_lens": 3.0}, TypeError, ["q_lens=3.0", "integer"]),
    "q_lens bool": ({"q_lens": True}, TypeError, ["q_lens=True", "integer"]),
    "kv_lens NumPy bool": ({"kv_lens": np.True_}, TypeError, ["kv_lens=", "integer"]),
    "kv_lens list": ({"kv_lens": [1, 2, 3]}, TypeError, ["kv_lens=[1, 2, 3]", "integer array over the leading axes"]),
    "kv_lens str": ({"kv_lens": "3"}, TypeError, ["kv_lens='3'", "integer"]),
    "kv_lens of floats": ({"kv_lens": ones(3)}, TypeError, ["kv_lens=", "integer array"]),
    "kv_lens of bools": ({"kv_lens": ones(3, dtype=bool)}, TypeError, ["kv_lens=", "integer array"]),
    "kv_lens of two": ({"kv_lens": ones(2, dtype=int)}, ValueError, ["kv_lens.shape=(2,)", "leading axes = (3,)"]),
    "q_lens of heads": ({"q_lens": ones(3, 4, dtype=int)}, ValueError, ["q_lens.shape=(3, 4)", "leading axes = (3,)"]),
}
# fmt: on


def inputs(**changed):
    """Arguments of a good call, some replaced."""
    return {"q": ones(3, 4, 5, 8), "k": ones(3, 2, 6, 8), "v": ones(3, 2, 6, 7)} | changed


@pytest.mark.parametrize("function", [attention, attention_vjp, explain, prepare], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", BAD)
def test_bad_options(name, function, nothing_runs):
    changes, error, words = BAD[name]
    expect(error, words, function, **inputs(**changes))


@pytest.mark.parametrize("name", BAD)
def test_bad_options_of_the_backward(name, nothing_runs):
    changes, error, words = BAD[name]
    results = {"dout": ones(3, 4, 5, 7), "out": ones(3, 4, 5, 7), "lse": ones(3, 4, 5)}
    expect(error, words, attention_backward, **results, **inputs(**changes))


@pytest.mark.parametrize(
    ("changes", "wrt", "words"),
    [
        ({}, ("bias",), ["wrt=('bias',)", "the call has no bias"]),
        ({}, ("q", "sinks"), ["'sinks'", "the call has no sinks"]),
        ({"mask": ones(5, 6, dtype=bool)}, ("mask",), ["wrt=('mask',)", "'mask'", "gradients exist for"]),
        ({"alibi_slopes": ones(4)}, ("alibi_slopes",), ["'alibi_slopes'", "gradients exist for"]),
        ({"bias": ones(5, 6)}, ("bias", "bias"), ["wrt=('bias', 'bias')", "each once"]),
    ],
)
def test_gradients_that_do_not_exist(changes, wrt, words, nothing_runs):
    results = {"dout": ones(3, 4, 5, 7), "out": ones(3, 4, 5, 7), "lse": ones(3, 4, 5)}
    expect(ValueError, words, attention_backward, wrt=wrt, **results, **inputs(**changes))
    expect(ValueError, words, explain, backward=True, wrt=wrt, **inputs(**changes))


BIAS = ones(5, 6)


@pytest.mark.parametrize(
    ("given", "wrt", "error", "words"),
    [
        ({"dbias": ones(4, 5, 6)}, None, ValueError, ["grads_out.dbias.shape=(4, 5, 6)", "(5, 6)"]),
        ({"dbias": ones(5, 6, dtype=F64)}, None, TypeError, ["grads_out.dbias.dtype=float64", "float32"]),
        ({"dbias": BIAS}, None, ValueError, ["grads_out.dbias", "shares memory with bias"]),
        ({"dbias": np.broadcast_to(ones(6), (5, 6))}, None, ValueError, ["grads_out.dbias is read-only"]),
        ({"dsinks": ones(1)}, None, ValueError, ["grads_out.dsinks.shape=(1,)", "(4,)"]),
        ({"dsinks": ones(4)}, ("bias",), ValueError, ["grads_out.dsinks is given", "leaves 'sinks' out"]),
        ({"dbias": ones(5, 6)}, ("q",), ValueError, ["grads_out.dbias is given", "leaves 'bias' out"]),
    ],
)
def test_bad_arrays_for_gradients(given, wrt, error, words, nothing_runs):
    call = inputs(dout=ones(3, 4, 5, 7), out=ones(3, 4, 5, 7), lse=ones(3, 4, 5), bias=BIAS, sinks=ones(4))
    expect(error, words, attention_backward, grads_out=AttentionGradients(**given), wrt=wrt, **call)


def test_results_do_not_overwrite_a_bias(nothing_runs):
    q = k = v = ones(6, 8)
    bias = ones(6, 8)
    expect(ValueError, ["out", "shares memory with bias"], attention, q, k, v, bias=bias[:, :6], out=bias)


def test_single_heads_have_one_head(nothing_runs):
    q, k, v = ones(5, 8), ones(6, 8), ones(6, 7)
    expect(ValueError, ["sinks.shape=(2,)", "(1,)"], attention, q, k, v, sinks=ones(2))
    expect(ValueError, ["bias.shape=(2, 5, 6)", "(1, 5, 6)"], attention, q, k, v, bias=ones(2, 5, 6))
    expect(ValueError, ["q_lens.shape=(1,)", "()"], attention, q, k, v, q_lens=np.array([5]))


class OnDevice:
    """Lengths that lie on a device: reading them would wait for it."""

    dtype, shape, size = np.dtype(np.int64), (3,), 3

    def min(self):
        return np.int64(0)

    def max(self):
        return np.int64(9)


def test_lengths_of_a_device_are_read_only_if_asked_for(monkeypatch):
    monkeypatch.delenv("CUPYFLASH_CHECK", raising=False)
    check_lens("kv_lens", OnDevice(), 6, (3,))
    monkeypatch.setenv("CUPYFLASH_CHECK", "1")
    expect(ValueError, ["kv_lens", "from 0 to 9", "6 rows"], check_lens, "kv_lens", OnDevice(), 6, (3,))


def test_explain_takes_options():
    """Nothing runs, and chains of additions are those of the sizes."""
    case = next(c for c in TABLE if c.bias and c.sinks and c.q_lens)
    x, options = case.inputs(), case.options()
    assert explain(x.q, x.k, x.v, **options).chain_d == case.head_dim
    plan = explain(x.q, x.k, x.v, backward=True, wrt=("bias", "sinks"), **options)
    assert plan.direction == "backward"


def test_public_names():
    assert AttentionGradients._fields == ("dq", "dk", "dv", "dbias", "dsinks", "dscore_args")
    assert cupyflash.AttentionGradients is AttentionGradients

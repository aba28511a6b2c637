"""Gradients of score_args: against finite differences, on the CPU and in the kernels, and what is refused."""

from __future__ import annotations

import random

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import PROFILE, SEED
from emulator import Device, Schedule, why_not
from emulator.device import _to_host
from nvrtc import compile_spec

from cupyflash import AttentionGradients, attention, attention_backward, attention_vjp, explain
from cupyflash._terms import terms_of
from cupyflash._trace import trace_score
from cupyflash.testing import cases
from cupyflash.testing.data import Case

F16, F32, F64 = np.float16, np.float32, np.float64
BATCH, HEADS, ROWS, KEYS = 2, 4, 37, 70
RNG = np.random.default_rng(11)


def normal(*shape, dtype=F64):
    return RNG.standard_normal(shape).astype(dtype)


# A function, its arguments, and how each of its uses is summed.
FORMS = {
    "heads": (lambda s, b, h, i, j, x: s + x[h] * (j - i) * 0.1, (normal(HEADS),), ["ALL"]),
    "number": (lambda s, b, h, i, j, x, n: np.tanh(s * x) * n, (1.3, 2), ["ALL"]),
    "entries": (lambda s, b, h, i, j, x: s * x[b, 1], (normal(BATCH, 3),), ["ALL"]),
    "unused": (lambda s, b, h, i, j, x: s + 1, (normal(3),), []),
    "flat": (lambda s, b, h, i, j, x: s + np.floor(x[h]), (normal(HEADS),), []),
    "queries": (lambda s, b, h, i, j, x, y: s * x[i] - y[b, i], (normal(ROWS), normal(BATCH, ROWS)), ["QUERIES"] * 2),
    "keys": (lambda s, b, h, i, j, x: s + np.sin(x[h, j]), (normal(HEADS, KEYS),), ["KEYS"]),
    "distances": (lambda s, b, h, i, j, x: s + x[j - i + ROWS - 1], (normal(ROWS + KEYS - 1),), ["DIAGONALS"]),
    "clipped": (lambda s, b, h, i, j, x: s + x[h, np.clip(j - i, -4, 4) + 4], (normal(HEADS, 9),), ["DIAGONALS"]),
    "backwards": (lambda s, b, h, i, j, x: s * x[np.clip(i - j + 2, 0, 6)], (normal(7),), ["DIAGONALS"]),
    "pairs": (lambda s, b, h, i, j, x: s + x[i, j], (normal(ROWS, KEYS),), ["PAIRS"]),
    "clipped pairs": (lambda s, b, h, i, j, x: s + x[np.clip(j - i, 0, 3), i, h], (normal(4, ROWS, HEADS),), ["PAIRS"]),
    "several": (
        lambda s, b, h, i, j, x: s * x[h, 0] + x[-1, j] * x[0, np.maximum(j - i, 0)], (normal(HEADS, KEYS),),
        ["ALL", "KEYS", "DIAGONALS"],
    ),
    "segments": (
        lambda s, b, h, i, j, x, ids: s + x[ids[i], ids[j]], (normal(3, 3), RNG.integers(0, 3, KEYS)), ["ARRIVAL"]
    ),
    "halves": (lambda s, b, h, i, j, x: s + x[h // 2, abs(i - j)], (normal(2, KEYS),), ["ARRIVAL"]),
}  # fmt: skip
GENERAL = {"segments", "halves"}


def draw(dtype=F64):
    """q, k, v and cotangents of out and lse; every row sees a key."""
    shapes = ((HEADS, ROWS, 16), (2, KEYS, 16), (2, KEYS, 8), (HEADS, ROWS, 8), (HEADS, ROWS))
    rng = np.random.default_rng(3)
    *x, dlse = (rng.standard_normal((BATCH, *shape)) for shape in shapes)
    return *(y.astype(dtype) for y in x), dlse.astype(np.result_type(dtype, np.float32))


OPTIONS = {"causal": True, "softcap": 2.0, "bias": normal(ROWS, KEYS), "dropout": 0.2, "seed": 5}


def gradients(x, score, args, **options):
    """dscore_args, out and lse being those of the same options."""
    q, k, v, dout, dlse = x
    options = OPTIONS | {"score": score, "score_args": args} | options
    out, lse = attention(q, k, v, return_lse=True, **{n: y for n, y in options.items() if n != "deterministic"})
    return attention_backward(dout, q, k, v, out, lse, dlse=dlse, wrt=("score_args",), **options).dscore_args


def emulated(x, score, args, seed, arch=90, **options):
    """The same in the kernels, each launch under a schedule of its own."""
    with Device(lambda n: Schedule.draw(100 * seed + n), arch=arch, undefined=PROFILE != "ci") as xp:
        up = _upload(xp)
        options = {name: up(y) for name, y in (OPTIONS | options).items()}
        return _to_host(gradients(up(x), score, up(args), **options))


def _upload(xp):
    def up(x):
        return tuple(map(up, x)) if isinstance(x, tuple) else xp.asarray(x) if isinstance(x, np.ndarray) else x

    return up


def loss(x, score, args):
    q, k, v, dout, dlse = x
    out, lse = attention(q, k, v, return_lse=True, score=score, score_args=args, **OPTIONS)
    return float((out * dout).sum() + (lse * dlse).sum())


def moved(args, steps, h):
    return tuple(x if step is None else x + h * step for x, step in zip(args, steps, strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_directional_derivatives(name):
    """<dscore_args, t> is how fast the loss changes along t."""
    score, args, sums = FORMS[name]
    assert [term.sum for term in terms_of(trace_score(score, tuple(map(np.asarray, args))))] == sums
    x, rng = draw(), np.random.default_rng(1)
    got = gradients(x, score, args, deterministic=name not in GENERAL)
    floats = [np.asarray(y).dtype.kind == "f" for y in args]
    steps = [rng.standard_normal(np.shape(y)) if is_float else None for y, is_float in zip(args, floats, strict=True)]
    h = 1e-5
    slope = (loss(x, score, moved(args, steps, h)) - loss(x, score, moved(args, steps, -h))) / (2 * h)
    assert len(got) == len(args)
    for y, z, is_float in zip(got, args, floats, strict=True):
        assert (y is not None) == is_float
        if is_float:
            assert y.shape == np.shape(z)
            assert y.dtype == np.asarray(z).dtype
    along = sum(float((y * t).sum()) for y, t in zip(got, steps, strict=True) if t is not None)
    np.testing.assert_allclose(along, slope, rtol=1e-7, atol=1e-7)


INDICES = ("b", "h", "i", "j", "1", "-1", "np.clip(j - i + {c}, {low}, {high})", "i - j + {c}", "j - i + {c}")


@st.composite
def indices(draw):
    numbers = {name: draw(st.integers(-5, 40)) for name in ("c", "low", "high")}
    return draw(st.sampled_from(INDICES)).format(**numbers)


@hypothesis.settings(max_examples=25 if PROFILE == "ci" else 500, deadline=None)
@hypothesis.given(chosen=st.lists(indices(), min_size=1, max_size=3), seed=st.integers(0, 2**32))
def test_any_indices_are_summed_where_they_lead(chosen, seed):
    """Of a score s + x[...] / 2 each pair adds half its ds, which is a full bias's gradient, at its index, clamped."""
    check_indices(chosen, seed, lambda function, *args, **options: function(*args, **options))


def check_indices(chosen, seed, run, dtype=F64, limit=1e-9):
    rng = np.random.default_rng(seed)
    shape = tuple(int(rng.integers(2, 9)) for _ in chosen)
    score = eval(f"lambda s, b, h, i, j, x: s + x[{', '.join(chosen)}] * 0.5", {"np": np})
    q, k, v, dout, dlse = draw(dtype)
    options = {"score": score, "score_args": (rng.standard_normal(shape).astype(dtype),), "causal": True}
    options["bias"] = np.zeros((BATCH, HEADS, ROWS, KEYS), dtype)
    out, lse = attention(q, k, v, return_lse=True, **options)
    got = run(attention_backward, dout, q, k, v, out, lse, dlse=dlse, wrt=("bias", "score_args"), **options)
    variables = {
        name: np.arange(n).reshape(axes)
        for name, n, axes in zip("bhij", got.dbias.shape, ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,)), strict=True)
    }
    ends = {text: n - 1 for text, n in zip(chosen, shape, strict=True) if text == "-1"}
    where = (ends[text] if text in ends else eval(text, {"np": np}, variables) for text in chosen)
    place = tuple(np.clip(y, 0, n - 1) for y, n in zip(where, shape, strict=True))
    want = np.zeros(shape)
    np.add.at(want, tuple(np.broadcast_to(y, got.dbias.shape) for y in place), got.dbias * 0.5)
    np.testing.assert_allclose(got.dscore_args[0], want, rtol=limit, atol=limit)


@pytest.mark.share(4)
@pytest.mark.parametrize("chosen", [
    ("h", "np.clip(j - i + 4, 0, 8)"), ("i - j + 3",), ("b", "i"), ("h", "j"), ("b", "1"), ("i", "j - i + 2"),
    ("h", "-1", "j", "i"), ("b", "j", "i"),
])  # fmt: skip
def test_any_indices_in_the_kernels(chosen):
    why_not()

    def run(function, *args, **options):
        with Device(lambda n: Schedule.draw(700 + n), undefined=PROFILE != "ci") as xp:
            up = _upload(xp)
            return _to_host(function(*up(args), **{name: up(x) for name, x in options.items()}))

    check_indices(chosen, 4, run, F32, 2e-5)


@pytest.mark.share(4)
@pytest.mark.parametrize("family", ["simt", "sm80", "sm90"])
@pytest.mark.parametrize("score", ["distance", "relative", "gain"])
@pytest.mark.parametrize("mask", [None, "bands"])
def test_kernels(score, mask, family):
    """Within the bounds, with everything else on, in every family that has kernels for it."""
    why_not()
    dtype, arch = {"simt": ("float64", 90), "sm80": ("bfloat16", 80), "sm90": ("float16", 90)}[family]
    case = Case(
        3, dtype, batch=((2,), (2,), (2,)), num_heads_k=2, group=2, seqlen_q=70, seqlen_k=90, head_dim=16, score=score,
        mask=mask, causal=True, dropout=0.1, softcap=5.0, kv_lens=None if family == "sm90" else "entries", dlse=True,
    )  # fmt: skip
    with Device(lambda n: Schedule.draw(50 + n), arch=arch, undefined=PROFILE != "ci") as xp:
        report = cases.run(case, xp, family=family)
    assert report.ok, report


@pytest.mark.share(2)
@pytest.mark.parametrize("name", ["clipped", "pairs", "several", "number"])
def test_same_bits_under_every_schedule(name):
    why_not()
    score, args, _ = FORMS[name]
    first, *others = (emulated(draw(F32), score, args, seed) for seed in (1, 2))
    for other in others:
        for x, y in zip(first, other, strict=True):
            assert np.array_equal(x, y) if x is not None else y is None


@pytest.mark.share(1)
@pytest.mark.parametrize("name", sorted(GENERAL))
def test_order_of_arrival_in_the_kernels(name):
    why_not()
    score, args, _ = FORMS[name]
    got = emulated(draw(F32), score, args, 7, deterministic=False)
    want = gradients(draw(), score, args, deterministic=False)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)


def test_workers_do_not_change_bits(monkeypatch):
    q, k, v = (np.random.default_rng(0).standard_normal((2, 2, 300, 8)).astype(F32) for _ in range(3))
    score, args, _ = FORMS["clipped"]
    results = []
    for workers in ("1", "3"):
        monkeypatch.setenv("CUPYFLASH_NUM_THREADS", workers)
        out, vjp = attention_vjp(q, k, v, score=score, score_args=args)
        results.append(vjp(np.ones_like(out)).dscore_args[0])
    assert np.array_equal(*results)


def test_what_is_asked_for():
    q, k, v, dout, _ = draw()
    score, args, _ = FORMS["segments"]
    out, lse = attention(q, k, v, score=score, score_args=args, return_lse=True)
    backward = {"score": score, "score_args": args}
    message = r"score_args\[0\] is indexed by score_args\[1\]\[i\]: .*deterministic=False"
    for wrt in (None, ("score_args",)):
        with pytest.raises(ValueError, match=message):
            attention_backward(dout, q, k, v, out, lse, wrt=wrt, **backward)
    grads = attention_backward(dout, q, k, v, out, lse, wrt=("q",), **backward)
    assert grads.dscore_args is None
    grads = attention_backward(dout, q, k, v, out, lse, deterministic=False, **backward)
    assert grads.dscore_args[0].shape == (3, 3)
    assert grads.dscore_args[1] is None
    into = AttentionGradients(dscore_args=(np.empty((3, 3)), None))
    same = attention_backward(
        dout, q, k, v, out, lse, wrt=("score_args",), grads_out=into, deterministic=False, **backward
    )
    assert same.dscore_args[0] is into.dscore_args[0]
    assert np.array_equal(same.dscore_args[0], grads.dscore_args[0])


@pytest.mark.parametrize(
    ("score", "args", "wrt", "grads_out", "message"),
    [
        ("halves", None, None, None, r"score_args\[0\] is indexed by h // 2: "),
        ("heads", (np.arange(4),), ("score_args",), None, "the call has no score_args"),
        ("heads", None, None, AttentionGradients(dscore_args=()), None),
        ("heads", None, None, AttentionGradients(dscore_args=(None, None)), "is of 2: it is a tuple"),
        ("heads", None, None, AttentionGradients(dscore_args=(np.empty(3),)), r"shape=\(3,\)"),
        ("heads", None, ("q",), AttentionGradients(dscore_args=(np.empty(4),)), "leaves 'score_args"),
        ("number", None, None, AttentionGradients(dscore_args=(None, np.empty(()))), "leaves 'score_args"),
    ],
)
def test_refusals(score, args, wrt, grads_out, message):
    q, k, v, dout, _ = draw()
    function, given, _ = FORMS[score]
    options = {"score": function, "score_args": given if args is None else args}
    out, lse = attention(q, k, v, return_lse=True, **options)

    def call():
        return attention_backward(dout, q, k, v, out, lse, wrt=wrt, grads_out=grads_out, **options)

    if message is None:
        assert call().dscore_args[0].shape == (4,)
        return
    with pytest.raises(ValueError, match=message):
        call()


SHARE = 2  # of the forms of a kernel on a card in the ci profile
CARDS = {"60": ("simt",), "80": ("simt", "sm80"), "90": ("simt", "sm90"), "120": ("simt", "sm80")}


@pytest.mark.nvrtc
@pytest.mark.parametrize(("card", "family"), [(card, x) for card, families in CARDS.items() for x in families])
def test_kernels_compile(card, family):
    """Every form of index, in every width; a tile of pairs in registers costs bwd_score_sm80 some words."""
    found = {}
    for name, dtype, width in ((n, t, d) for n in FORMS for t in (F32, F64, F16) for d in (16, 64, 128, 256)):
        if (dtype is F16) == (family == "simt"):
            continue
        x = np.broadcast_to(np.zeros((), dtype), (2, 4, 300, width))
        score, args, _ = FORMS[name]
        options = {"score": score, "score_args": args, "backward": True, "deterministic": False, "family": family}
        for step in explain(x, x, x, device=f"sm_{card}", **options).kernels:
            if "score_" in step.name:
                found.setdefault(step.name, []).append((step.spec, step.smem))
    for name, specs in found.items():
        some = specs if PROFILE == "nightly" else random.Random(f"{SEED} {card} {name}").sample(specs, SHARE)
        for spec, smem in some:
            compiled = compile_spec(spec, smem, f"sm_{card}")
            assert compiled.spill_bytes <= 64, f"{spec}\n{compiled.log}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("name", FORMS)
def test_forms_on_a_gpu(gpu, name, dtype):
    score, args, _ = FORMS[name]
    up, order = _upload(gpu.xp), {"deterministic": name not in GENERAL}
    x = draw(dtype)
    options = {key: up(y) for key, y in OPTIONS.items()} | order
    got = gradients(up(x), score, up(args), **options)
    again = gradients(up(x), score, up(args), **options)
    want = gradients(tuple(y.astype(F64) for y in x), score, args, **order)
    limit = {"float32": 1e-4, "float64": 1e-11, "float16": 0.1}[dtype]
    for a, b, c in zip(got, again, want, strict=True):
        assert (a is None) == (c is None)
        if a is not None:
            assert name in GENERAL or bool((a == b).all())
            np.testing.assert_allclose(gpu.xp.asnumpy(a), c, rtol=limit, atol=limit * max(1, abs(c).max()))

"""Calls with functions and dropout, found again by their signature: new numbers count, other calls are others."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from emulator import Device, why_not

from cupyflash import AttentionGradients, _call, attention, attention_backward, decode

HEADS, ROWS, KEYS = 2, 20, 30
RNG = np.random.default_rng(12)
Q, DOUT = (RNG.standard_normal((HEADS, ROWS, 8), np.float32) for _ in range(2))
K, V = (RNG.standard_normal((HEADS, KEYS, 8), np.float32) for _ in range(2))


@pytest.fixture
def xp():
    """An emulated device."""
    why_not()
    with Device(arch=80, undefined=False) as xp:
        yield xp


@pytest.fixture
def found():
    """A context in which a call on the device that is not found again fails."""
    start = _call.Call.__init__

    def call(self, q, *arguments, **named):
        assert isinstance(q, np.ndarray), "this call was looked at"
        start(self, q, *arguments, **named)

    @contextlib.contextmanager
    def only():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_call.Call, "__init__", call)
            yield

    return only


def up(xp, x):
    """Arrays of tuples and options on the device; numbers stay."""
    if isinstance(x, dict):
        return {name: up(xp, y) for name, y in x.items()}
    if isinstance(x, tuple):
        return tuple(up(xp, y) for y in x)
    return xp.asarray(x) if isinstance(x, np.ndarray) else x


def everything(x, **options):
    """out, lse and all gradients, flat."""
    q, k, v, dout = x
    out, lse = attention(q, k, v, return_lse=True, **options)
    grads = attention_backward(dout, q, k, v, out, lse, **options)
    return [y for y in (out, lse, *grads[:5], *(grads.dscore_args or ())) if y is not None]


def check(xp, **options):
    """The device's results are those of the CPU; returns its out."""
    want = everything((Q, K, V, DOUT), **options)
    got = [x.get() for x in everything(up(xp, (Q, K, V, DOUT)), **up(xp, options))]
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)
    return got[0]


def differ(x, y):
    return abs(x - y).max() > 1e-2


def slopes(s, b, h, i, j, x, factor):
    return s + factor * x[h] * (j - i)


def near(b, h, i, j, width, most):
    return (abs(j - i) <= width[h]) & (j < most)


def drawn(number, seed):
    rng = np.random.default_rng(number)
    return {
        "score": slopes, "score_args": (rng.standard_normal(HEADS).astype(np.float32), 0.1 * number),
        "mask": near, "mask_args": (rng.integers(3, 20, HEADS), 20 + number), "dropout": 0.25, "seed": seed,
    }  # fmt: skip


SEEDS = {"numbers": (1, 2**63 + 5), "arrays": (np.array(3, np.uint64), np.array(2**64 - 1, np.uint64))}


@pytest.mark.parametrize("seeds", SEEDS)
def test_values_count(xp, found, seeds):
    """Those of score_args, mask_args and the seed, arrays and numbers: only the first call is looked at."""
    one, other = SEEDS[seeds]
    first = check(xp, **drawn(1, one))
    with found():
        assert (check(xp, **drawn(1, one)) == first).all()
        assert differ(check(xp, **drawn(2, one)), first)
        assert differ(check(xp, **drawn(1, other)), first)


def test_results_of_the_callers(xp, found):
    """Into grads_out and out=, with gradients of score_args; where these share memory with an input it is refused."""
    options = up(xp, drawn(1, 5))
    x = up(xp, (Q, K, V, DOUT))
    out, lse, *grads = everything(x, **options)
    of = AttentionGradients(dscore_args=(xp.asarray(np.zeros(HEADS, np.float32)), None))
    pair = xp.empty(out.shape, out.dtype), xp.empty(lse.shape, lse.dtype)

    def again():
        attention(*x[:3], out=pair, **options)
        attention_backward(x[3], *x[:3], out, lse, grads_out=of, wrt=("score_args",), **options)

    again()
    of.dscore_args[0][...], pair[0][...] = 0, 0
    with found():
        again()
    assert (pair[0].get() == out.get()).all()
    assert (of.dscore_args[0].get() == grads[3].get()).all()
    taken = AttentionGradients(dscore_args=(options["score_args"][0], None))
    with pytest.raises(ValueError, match="share"):
        attention_backward(x[3], *x[:3], out, lse, grads_out=taken, wrt=("score_args",), **options)


def twice(s):
    return 2 * s


def test_functions_that_were_defined_anew(xp, found, monkeypatch):
    """What a function computes tells calls apart: its text, what it calls, what it closes over; not its name."""

    def score(s, b, h, i, j):
        return twice(s) + offset * j

    offset = 0.1
    outs = [check(xp, score=score)]
    monkeypatch.setitem(globals(), "twice", lambda s: 3 * s)
    outs.append(check(xp, score=score))
    offset = 0.2
    outs.append(check(xp, score=score))

    def score(s, b, h, i, j):
        return s - 0.1 * j

    outs.append(check(xp, score=score))
    with found():  # another function that computes the same
        outs.append(check(xp, score=lambda s, b, h, i, j: s - 0.1 * j))
    assert all(differ(x, y) for n, x in enumerate(outs[:4]) for y in outs[:n])
    assert (outs[4] == outs[3]).all()


def test_a_function_with_a_state(xp):
    """It is traced at each call, and once for a call."""

    class Steeper:
        def __init__(self):
            self.calls = 0

        def __call__(self, s, b, h, i, j):
            self.calls += 1
            return s * self.calls

    score, x = Steeper(), up(xp, (Q, K, V))
    for n in range(1, 4):
        out = attention(*x, score=score)
        np.testing.assert_allclose(out.get(), attention(Q, K, V, scale=n / 8**0.5), rtol=1e-4, atol=1e-5)


ROW = RNG.standard_normal(40).astype(np.float32)
LOOKALIKES = {
    "dtype": (ROW[:30], ROW[:30].astype(np.float16)),
    "length": (ROW[:30], ROW[:9]),  # indices are clamped
    "stride": (ROW[:18], ROW[:36:2]),
    "number or array": (np.float32(2), np.array(3, np.float32)),
    "numbers": (2, 3.5),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_arguments_that_differ_in(xp, name):
    """Both ways round; what they hold is 1 to 3 apart."""
    score = (lambda s, b, h, i, j, x: s + x) if "number" in name else (lambda s, b, h, i, j, x: s + x[j])
    mask = lambda b, h, i, j: j < 30 - h  # noqa: E731, without it a number added to all logits cancels in out
    for x in (*LOOKALIKES[name], LOOKALIKES[name][0]):
        check(xp, score=score, score_args=(x,), mask=mask, sinks=np.ones(HEADS, np.float32))


def test_dropout_and_seeds_are_checked_each_time(xp):
    x = up(xp, (Q, K, V))
    kept = [attention(*x, dropout=p, seed=3).get() for p in (0.25, 0.5, 0.25)]
    assert differ(kept[0], kept[1])
    assert (kept[0] == kept[2]).all()
    attention(*x, seed=3)
    for options in ({"seed": -1}, {"seed": 2**64}, {"seed": True}, {"seed": np.array([1], np.uint64)}, {"seed": 1.0}):
        for p in (0.0, 0.25):
            with pytest.raises((ValueError, TypeError), match="seed"):
                attention(*x, dropout=p, **up(xp, options))
    for p in (1.0, -0.5, float("nan"), True):
        with pytest.raises((ValueError, TypeError), match="dropout"):
            attention(*x, dropout=p, seed=3)
    with pytest.raises(ValueError, match="without a seed"):
        attention(*x, dropout=0.25)


def test_functions_are_checked_each_time(xp):
    x, row = up(xp, (Q, K, V, ROW))[:3], xp.asarray(ROW)
    attention(*x, score=lambda s, b, h, i, j, x: s + x[j], score_args=(row,))
    with pytest.raises(TypeError, match="score_args"):
        attention(*x, score_args=(row,))
    with pytest.raises(TypeError, match="score function"):
        attention(*x, score=lambda s, b, h, i, j: s > 0)
    with pytest.raises(TypeError, match="score function"):
        attention(*x, score=lambda s, b, h, i, j, x: s + x[j])


def test_decoding_with_a_score_is_found_again(xp, found):
    """With other arrays, and with other numbers that are copied to the device."""
    q = RNG.standard_normal((2, 4, 1, 8), np.float32)
    k, v = (RNG.standard_normal((2, 2, 40, 8), np.float32) for _ in range(2))
    lens = np.array([33, 7])

    def both(factor, x):
        options = {"score": slopes, "score_args": (x, factor)}
        want = decode(q, k, v, lens, **options)
        got = decode(*map(xp.asarray, (q, k, v, lens)), **up(xp, options)).get()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)
        return got

    x = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    first = both(0.5, x)
    with found():
        assert differ(first, both(-0.7, x))
        assert differ(first, both(0.5, 3 * x))

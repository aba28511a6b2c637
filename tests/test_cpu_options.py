"""The options on the CPU path, forward and backward, against a dense float64 formula of this file's own."""

from __future__ import annotations

import itertools
import math
import threading
import time
import tracemalloc
from functools import cache

import ml_dtypes
import numpy as np
import pytest

from cupyflash import AttentionGradients, Tile, _cpu, attention, attention_backward
from cupyflash._philox import dropped, philox

VARIABLE = "CUPYFLASH_NUM_THREADS"
TILE = Tile(block_m=16, block_n=16)
DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "float16")} | {"bfloat16": ml_dtypes.bfloat16}
#: Relative to the largest number of an array: rounding in the accumulator, and of the result.
LIMITS = {"float64": 1e-12, "float32": 5e-6, "float16": 1e-3, "bfloat16": 8e-3}
#: The same for gradients, to which the rounding of out adds its own.
GRADIENT_LIMITS = {1e-12: 1e-12, 5e-6: 5e-6, 1e-3: 4e-3, 8e-3: 3.2e-2}


# ---------------------------------------------------------------------------------------------------- dense formula


@cache
def four_words(counter, seed):
    """Philox 4x32-10 in Python's integers."""
    key, low = [seed % 2**32, seed // 2**32], 2**32 - 1
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = b >> 32 ^ counter[1] ^ key[0], b & low, a >> 32 ^ counter[3] ^ key[1], a & low
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


def keep_word(i, j, head, batch, seed):
    """The word that decides on a pair."""
    return four_words((j // 4, i, head, batch), seed)[j % 4]


def unbroadcast(x, shape):
    """The sum of x over the axes along which an array of ``shape`` is broadcast."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(axis for axis, n in enumerate(shape) if n == 1), keepdims=True)


def dense(
    q, k, v, dout, dlse, *, scale=None, causal=False, window=None, softcap=None, bias=None, mask=None,
    alibi_slopes=None, sinks=None, q_lens=None, kv_lens=None, q_offset=None, segment_ids=None, dropout=0.0, seed=0,
):  # fmt: skip
    """out, lse and all gradients of (..., heads, rows, columns), one head of one entry after another."""
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    (hq, sq, d), (hk, sk), dv = q.shape[-3:], k.shape[-3:-1], v.shape[-1]
    scale = 1 / math.sqrt(d) if scale is None else scale

    def full(x, *tail):
        return np.broadcast_to(np.asarray(x).astype(np.float64), (*batch, *tail))

    qs, ks, vs = full(q, hq, sq, d), full(k, hk, sk, d), full(v, hk, sk, dv)
    biases = full(0 if bias is None else bias, hq, sq, sk)
    masks = full(True if mask is None else mask, hq, sq, sk) != 0
    slopes = full(0 if alibi_slopes is None else alibi_slopes, hq)
    lens_q, lens_k = full(sq if q_lens is None else q_lens), full(sk if kv_lens is None else kv_lens)
    ids = [full(0 if segment_ids is None else segment_ids[n], (sq, sk)[n]) for n in (0, 1)]
    out, lse = np.zeros((*batch, hq, sq, dv)), np.full((*batch, hq, sq), -np.inf)
    grads = {"q": np.zeros(qs.shape), "k": np.zeros(ks.shape), "v": np.zeros(vs.shape)}
    grads |= {"bias": np.zeros(biases.shape), "sinks": np.zeros((*batch, hq))}
    for number, entry in enumerate(np.ndindex(*batch)):
        m, n = int(lens_q[entry]), int(lens_k[entry])
        offset = 0 if causal == "top_left" else n - m
        if q_offset is not None:
            offset = int(full(q_offset)[entry])
        i, j = np.arange(m)[:, None], np.arange(n)
        place = np.ones((m, n), bool)
        if causal:
            place &= j <= i + offset
        if window is not None and window[0] is not None:
            place &= j >= i + offset - window[0]
        if window is not None and window[1] is not None:
            place &= j <= i + offset + window[1]
        place &= ids[0][entry][:m, None] == ids[1][entry][:n]
        for h in range(hq):
            g = h // (hq // hk)
            x, y, z = qs[entry][h, :m], ks[entry][g, :n], vs[entry][g, :n]
            product = scale * x @ y.T
            capped = product if softcap is None else softcap * np.tanh(product / softcap)
            slope = np.ones(product.shape) if softcap is None else 1 - (capped / softcap) ** 2
            s = capped - slopes[entry][h] * np.abs(i + offset - j) + biases[entry][h, :m, :n]
            seen = place & masks[entry][h, :m, :n] & (s != -np.inf)
            sink = -np.inf if sinks is None else float(sinks[h])
            logits = np.concatenate([np.where(seen, s, -np.inf), np.full((m, 1), sink)], axis=1)
            lse[entry][h, :m] = np.logaddexp.reduce(logits, axis=1)
            total = lse[entry][h, :m]
            with np.errstate(invalid="ignore", over="ignore"):
                p = np.where(seen, np.exp(s - total[:, None]), 0)
            keep = np.ones((m, n))
            if dropout:
                words = [[keep_word(a, b, h, number, int(seed)) for b in range(n)] for a in range(m)]
                keep = (np.array(words, float).reshape(m, n) >= int(dropout * 2**32)) / (1 - dropout)
            out[entry][h, :m] = (p * keep) @ z
            if dout is None:
                continue
            up = dout[entry][h, :m].astype(np.float64)
            down = np.where(total == -np.inf, 0, dlse[entry][h, :m])
            delta = (up * out[entry][h, :m]).sum(axis=1) - down
            ds = np.where(seen, p * ((up @ z.T) * keep - delta[:, None]), 0)
            grads["bias"][entry][h, :m, :n] = ds
            grads["q"][entry][h, :m] = scale * (ds * slope) @ y
            grads["k"][entry][g, :n] += scale * (ds * slope).T @ x
            grads["v"][entry][g, :n] += (p * keep).T @ up
            if sinks is not None and sink > -np.inf:
                grads["sinks"][entry][h] = -(np.exp(sink - total) * delta).sum()
    inputs = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    return out, lse, {name: unbroadcast(grads[name], x.shape) for name, x in inputs.items() if x is not None}


# ------------------------------------------------------------------------------------------------------- comparison


class Inputs:
    """q, k, v, dout, dlse: grouped heads and leading axes that broadcast."""

    def __init__(self, dtype="float64", sq=45, sk=70, hk=2, group=2, batch=((2,), (1,), (2,)), seed=0):
        self.rng, self.dtype, self.sq, self.sk, self.hq = np.random.default_rng(seed), dtype, sq, sk, hk * group
        self.q, self.k, self.v = (
            self.normal(*lead, *tail)
            for lead, tail in zip(batch, ((hk * group, sq, 9), (hk, sk, 9), (hk, sk, 6)), strict=True)
        )
        self.batch = np.broadcast_shapes(*batch)
        self.dout = self.normal(*self.batch, self.hq, sq, 6)
        self.dlse = self.normal(*self.batch, self.hq, sq, dtype="float64" if dtype == "float64" else "float32")

    def normal(self, *shape, dtype=None):
        return self.rng.standard_normal(shape).astype(DTYPES[self.dtype if dtype is None else dtype])


def close(name, got, want, limit):
    want = np.asarray(want, np.float64)
    got = got.astype(np.float64)
    assert got.shape == want.shape, name
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
    size = max(1.0, float(np.abs(want[finite]).max(initial=0)))
    error = float(np.abs(got[finite] - want[finite]).max(initial=0))
    assert error <= limit * size, f"{name}: {error / size:.2e} of the largest number, {limit:.2e} is allowed"


def both(x, tile=TILE, **options):
    out, lse = attention(x.q, x.k, x.v, return_lse=True, tile=tile, **options)
    grads = attention_backward(x.dout, x.q, x.k, x.v, out, lse, dlse=x.dlse, tile=tile, **options)
    return out, lse, {name: getattr(grads, f"d{name}") for name in grads_of(options)}


def grads_of(options):
    return ["q", "k", "v", *(name for name in ("bias", "sinks") if options.get(name) is not None)]


def check(x, tile=TILE, **options):
    limit = LIMITS[str(x.q.dtype)]
    out, lse, grads = both(x, tile, **options)
    want_out, want_lse, want = dense(x.q, x.k, x.v, x.dout, x.dlse, **options)
    close("out", out, want_out, limit)
    close("lse", lse, want_lse, min(limit, LIMITS["float32"]))
    assert grads.keys() == want.keys()
    for name, gradient in grads.items():
        assert gradient.dtype == options.get(name, x.q).dtype
        close(f"d{name}", gradient, want[name], GRADIENT_LIMITS[max(limit, LIMITS[str(gradient.dtype)])])


# ----------------------------------------------------------------------------------------------------- every option

SQ, SK, HQ = 45, 70, 4
RNG = np.random.default_rng(1)
OPTIONS = {
    "window": {"window": (9, 4)},
    "left": {"window": (9, None)},
    "right": {"window": (None, 4)},
    "own key": {"window": (0, 0)},
    "wide window": {"window": (40, 40)},
    "causal window": {"window": (11, 3), "causal": True},
    "top_left window": {"window": (20, 0), "causal": "top_left"},
    "offset window": {"window": (5, 30), "q_offset": np.array([3, -60])},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi_slopes": np.array([0.5, 0.1, 0.0, -0.2])},
    "alibi of entries": {"alibi_slopes": RNG.standard_normal((2, HQ)), "causal": True},
    "alibi offset": {"alibi_slopes": np.full(HQ, 0.3, np.float32), "q_offset": 11},
    "bias": {"bias": 3 * RNG.standard_normal((2, HQ, SQ, SK))},
    "float16 bias": {"bias": RNG.standard_normal((HQ, SQ, SK)).astype(np.float16), "causal": True},
    "bfloat16 bias": {"bias": RNG.standard_normal((2, 1, SQ, 1)).astype(ml_dtypes.bfloat16)},
    "bias of -inf": {"bias": np.where(RNG.random((SQ, SK)) < 0.5, -np.inf, 1.0)},
    "mask": {"mask": RNG.random((2, HQ, SQ, SK)) < 0.5},
    "sparse mask": {"mask": RNG.random((SQ, SK)) < 0.02},
    "mask of keys": {"mask": RNG.random((2, 1, 1, SK)) < 0.5},
    "mask of rows": {"mask": RNG.random((HQ, SQ, 1)) < 0.5},
    "sinks": {"sinks": np.array([1.0, -4.0, 3.0, -np.inf])},
    "sinks alone": {"sinks": np.array([1.0, 0.0, 9.0, -np.inf], np.float32), "mask": RNG.random((SQ, SK)) < 0.02},
    "16-bit sinks and slopes": {
        "sinks": np.array([1.0, -4.0, 3.0, 0.5], np.float16),
        "alibi_slopes": np.array([0.5, 0.125, 0.0, -0.25], ml_dtypes.bfloat16),
    },
    "bfloat16 sinks": {"sinks": np.array([1.0, -4.0, 3.0, 0.5], ml_dtypes.bfloat16), "window": (20, 20)},
    "documents": {"segment_ids": (np.arange(SQ) // 9, np.arange(SK) // 14)},
    "scattered segments": {"segment_ids": (RNG.integers(0, 4, (2, SQ)), RNG.integers(0, 4, SK).astype(np.uint8))},
    "lens": {"q_lens": np.array([20, SQ]), "kv_lens": np.array([SK, 33])},
    "causal lens": {"q_lens": np.array([17, 41]), "kv_lens": np.array([9, 33]), "causal": True},
    "top_left lens": {"q_lens": 31, "kv_lens": np.array([60, 1]), "causal": "top_left"},
    "offset lens": {"kv_lens": 50, "q_offset": np.array([-4, 20]), "causal": True},
    "no lens": {"q_lens": np.array([0, 5]), "kv_lens": np.array([4, 0]), "sinks": np.ones(HQ)},
    "dropout": {"dropout": 0.3, "seed": 2**63 + 12345678901},
    "much dropout": {"dropout": 0.95, "seed": np.array(5, np.int64), "causal": True},
    "all that adds": {
        "softcap": 2.0, "alibi_slopes": np.array([0.5, 0.1, 0.0, -0.2]), "bias": RNG.standard_normal((HQ, 1, SK)),
        "sinks": np.array([1.0, -4.0, 3.0, 0.0]), "causal": True,
    },
    "all that hides": {
        "window": (30, 12), "mask": RNG.random((2, 1, SQ, SK)) < 0.7, "q_lens": np.array([20, SQ]),
        "kv_lens": np.array([SK, 33]), "segment_ids": (np.arange(SQ) // 15, np.arange(SK) // 20),
    },
    "all": {
        "scale": -0.4, "causal": True, "window": (40, None), "softcap": 1.5, "mask": RNG.random((HQ, SQ, SK)) < 0.8,
        "bias": RNG.standard_normal((2, 1, SQ, SK)), "sinks": np.array([1.0, -4, 3, 0]),
        "alibi_slopes": RNG.standard_normal(HQ),
        "q_lens": np.array([44, 30]), "kv_lens": np.array([66, 33]), "q_offset": np.array([20, 2]),
        "segment_ids": (np.arange(SQ) // 30, np.arange(SK) // 40), "dropout": 0.2, "seed": 7,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, dtype):
    check(Inputs(dtype), **OPTIONS[name])


@pytest.mark.parametrize(
    "tile", [None, Tile(block_m=7, block_n=5), Tile(block_m=64, block_n=8), Tile(block_m=1)], ids=str
)
@pytest.mark.parametrize("name", OPTIONS)
def test_other_tiles(name, tile):
    check(Inputs(), tile, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_no_groups_and_other_leading_axes(name):
    """Each query head with its own kv head; k shared by both entries, v and q not."""
    check(Inputs(hk=4, group=1, batch=((2,), (), (2,))), **OPTIONS[name])


@pytest.mark.parametrize("adds", [False, True])
def test_blocks_of_the_planners_own_size(adds):
    """Several of them: positions beyond what small blocks reach."""
    sq, sk, rng = 900, 700, np.random.default_rng(2)
    options = {
        "window": (300, 120), "q_lens": 850, "kv_lens": 670, "q_offset": -30, "sinks": np.array([1.0]),
        "mask": rng.random((sq, sk)) < 0.7, "segment_ids": (np.arange(sq) // 300, np.arange(sk) // 250),
    }  # fmt: skip
    if adds:
        options |= {"softcap": 2.0, "bias": rng.standard_normal((sq, sk)), "alibi_slopes": np.array([0.01])}
    check(Inputs("float32", sq, sk, 1, 1, ((), (), ())), None, **options)


# ------------------------------------------------------------------------------------------------ gradients of bias


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("own", list(itertools.product([False, True], repeat=4)), ids=str)
def test_bias_broadcast_along_any_axes(own, causal):
    full = (2, HQ, SQ, SK)
    shape = tuple(n if has else 1 for n, has in zip(full, own, strict=True))
    check(Inputs(), bias=RNG.standard_normal(shape), causal=causal)


@pytest.mark.parametrize("shape", [(SQ, SK), (SK,), (SQ, 1), (), (HQ, 1, SK)])
def test_bias_without_leading_axes(shape):
    for hk in (1, 2, 4):
        check(Inputs(hk=hk, group=4 // hk), bias=RNG.standard_normal(shape), softcap=1.0)


def test_bias_with_broadcast_leading_axes():
    """Two leading axes; q, k, v and bias are broadcast along different ones."""
    batch = ((2, 1), (1, 3), (3,))
    for lead in ((), (2, 1), (1, 3), (2, 3), (3,)):
        check(Inputs(sq=20, sk=33, batch=batch), bias=RNG.standard_normal((*lead, 1, 20, 33)), causal=True)


@pytest.mark.parametrize("options", [{}, {"wrt": ("bias", "sinks")}])
def test_gradients_are_written_where_the_caller_wants(options):
    x, bias, sinks = Inputs(), RNG.standard_normal((HQ, SQ, SK)), np.zeros(HQ)
    given = {"bias": bias, "sinks": sinks, "mask": RNG.random((SQ, SK)) < 0.1}
    out, lse = attention(x.q, x.k, x.v, return_lse=True, tile=TILE, **given)
    memory = np.full((HQ, SK, 3 * SQ), np.nan), np.full(2 * HQ, np.nan)
    into = AttentionGradients(dbias=memory[0][:, ::-1, ::3].swapaxes(1, 2), dsinks=memory[1][::-2])
    got = attention_backward(
        x.dout, x.q, x.k, x.v, out, lse, dlse=x.dlse, tile=TILE, grads_out=into, **given, **options
    )
    assert got.dbias is into.dbias
    assert np.isnan(memory[0][:, :, 1:3]).all()
    assert np.isnan(memory[1][::2]).all()
    want = dense(x.q, x.k, x.v, x.dout, x.dlse, **given)[2]
    close("dbias", got.dbias, want["bias"], 1e-12)
    close("dsinks", got.dsinks, want["sinks"], 1e-12)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks"])
def test_one_gradient_is_as_good_alone(name):
    x, options = Inputs(), dict(OPTIONS["all"], tile=TILE)
    out, lse = attention(x.q, x.k, x.v, return_lse=True, **options)
    everything = attention_backward(x.dout, x.q, x.k, x.v, out, lse, dlse=x.dlse, **options)
    alone = attention_backward(x.dout, x.q, x.k, x.v, out, lse, dlse=x.dlse, wrt=(name,), **options)
    assert [field for field, a in alone._asdict().items() if a is not None] == [f"d{name}"]
    assert getattr(alone, f"d{name}").tobytes() == getattr(everything, f"d{name}").tobytes()


@pytest.mark.parametrize("name", ["bias", "sinks"])
@pytest.mark.parametrize("lead", [(2, HQ, SQ, SK), (1, SK), (SQ, 1)], ids=str)
def test_finite_differences(name, lead):
    x, rng = Inputs(), np.random.default_rng(5)
    options = dict(OPTIONS["all"], bias=rng.standard_normal(lead), tile=TILE)
    direction = rng.standard_normal(options[name].shape)

    def value(step):
        out, lse = attention(x.q, x.k, x.v, return_lse=True, **{**options, name: options[name] + step * direction})
        return float((out * x.dout).sum() + (np.where(np.isfinite(lse), lse, 0) * x.dlse).sum())

    out, lse = attention(x.q, x.k, x.v, return_lse=True, **options)
    grads = attention_backward(x.dout, x.q, x.k, x.v, out, lse, dlse=x.dlse, **options)
    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    assert slope == pytest.approx(float((getattr(grads, f"d{name}") * direction).sum()), rel=1e-7, abs=1e-7)
    assert abs(slope) > 1e-2


# --------------------------------------------------------------------------------------------- what is not to be used


def poisoned(x, q_lens, kv_lens):
    """Inputs with NaN where the entries have no rows and no keys; both have leading axes of their own."""
    for array, lens in ((x.q, q_lens), (x.dout, q_lens), (x.k, kv_lens), (x.v, kv_lens)):
        for entry, n in enumerate(lens):
            array[entry, :, n:] = np.nan
    for entry, n in enumerate(q_lens):
        x.dlse[entry, :, n:] = np.nan
    return x


@pytest.mark.parametrize("tile", [TILE, None], ids=str)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_padding_is_never_used(causal, tile):
    """NaN in it changes nothing, and each entry is what it is without padding."""
    q_lens, kv_lens = np.array([20, 37]), np.array([66, 11])
    x = poisoned(Inputs(batch=((2,), (2,), (2,))), q_lens, kv_lens)
    bias = RNG.standard_normal((2, HQ, SQ, SK))
    for entry in range(2):
        bias[entry, :, q_lens[entry] :] = np.nan
        bias[entry, :, :, kv_lens[entry] :] = np.nan
    options = {"causal": causal, "window": (30, None), "sinks": np.ones(HQ), "tile": tile}
    out, lse = attention(x.q, x.k, x.v, bias=bias, q_lens=q_lens, kv_lens=kv_lens, return_lse=True, **options)
    assert (out[0, :, 20:] == 0).all()
    assert (lse[0, :, 20:] == -np.inf).all()
    for entry, n in enumerate(q_lens):
        out[entry, :, n:] = np.nan
    grads = attention_backward(
        x.dout, x.q, x.k, x.v, out, lse, dlse=x.dlse, bias=bias, q_lens=q_lens, kv_lens=kv_lens, **options
    )
    dsinks = np.zeros(HQ)
    for entry, (m, n) in enumerate(zip(q_lens, kv_lens, strict=True)):
        part = [a[entry, :, :m] for a in (x.q, x.dout, x.dlse)] + [a[entry, :, :n] for a in (x.k, x.v)]
        q, dout, dlse, k, v = part
        own = {**options, "bias": bias[entry, :, :m, :n]}
        alone = attention(q, k, v, return_lse=True, **own)
        close("out", out[entry, :, :m], alone.out, 1e-12)
        close("lse", lse[entry, :, :m], alone.lse, 1e-12)
        want = attention_backward(dout, q, k, v, *alone, dlse=dlse, **own)
        for name, rows, columns in (("dq", m, None), ("dk", n, None), ("dv", n, None), ("dbias", m, n)):
            got = getattr(grads, name)[entry]
            close(name, got[:, :rows, :columns], getattr(want, name), 1e-12)
            assert (got[:, rows:] == 0).all()
            assert columns is None or (got[:, :, columns:] == 0).all()
        dsinks += want.dsinks
    close("dsinks", grads.dsinks, dsinks, 1e-12)


HIDING = {
    "mask": lambda seen: {"mask": seen},
    "bias": lambda seen: {"bias": np.where(seen, 0.0, -np.inf)},
    "segments": lambda seen: {"segment_ids": (np.zeros(SQ, int), np.where(seen[0], 0, 1))},
    "window": lambda seen: {"window": (100, None), "kv_lens": None, "causal": True, "q_offset": 19},
}


@pytest.mark.parametrize("name", HIDING)
def test_hidden_pairs_are_discarded_by_selection(name):
    """Whatever stands at a hidden key, weights there are 0: no row feels large values, no forward row a NaN in k."""
    seen = np.broadcast_to(np.arange(SK) < 20, (SQ, SK))
    options = HIDING[name](seen)
    rows = SQ if name != "window" else 1  # which see none of the other keys
    x = Inputs("float32")
    want = attention(x.q, x.k, x.v, tile=TILE, **options)[..., :rows, :]
    for k, v in ((1e18, 1e30), (np.nan, 1.0), (np.inf, 1.0)):
        x.k[..., 20:, :], x.v[..., 20:, :] = k, v
        got = attention(x.q, x.k, x.v, tile=TILE, **options)[..., :rows, :]
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("hides", ["mask", "window"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bias_at_hidden_pairs_may_be_anything(hides, softcap):
    x, bias = Inputs(), RNG.standard_normal((2, HQ, SQ, SK))
    seen = RNG.random((SQ, SK)) < 0.4
    options = {"mask": seen}
    if hides == "window":
        i, j = np.arange(SQ)[:, None], np.arange(SK)
        seen = (j >= i + 25 - 8) & (j <= i + 25 + 3)
        options = {"window": (8, 3)}
    results = []
    for poison in (0.0, np.nan, np.inf, -np.inf, 1e308):
        options |= {"bias": np.where(seen, bias, poison), "softcap": softcap}
        out, lse, grads = both(x, **options)
        results.append([a.tobytes() for a in (out, lse, *grads.values())])
        assert (grads["bias"][..., ~seen] == 0).all()
    assert all(result == results[0] for result in results)


def test_rows_without_a_key():
    """out 0, lse -inf or the sink, gradients 0; dlse is not read where lse is -inf."""
    x, mask = Inputs(), np.ones((SQ, SK), bool)
    mask[::3] = False
    for sinks in (None, np.array([0.5, -np.inf, 3.0, -800.0])):
        x.dlse[:, 1 if sinks is not None else slice(None), ::3] = np.nan
        out, lse = attention(x.q, x.k, x.v, mask=mask, sinks=sinks, tile=TILE, return_lse=True)
        assert (out[:, :, ::3] == 0).all()
        want = np.full(HQ, -np.inf) if sinks is None else sinks
        np.testing.assert_array_equal(lse[:, :, ::3], np.broadcast_to(want[:, None], lse[:, :, ::3].shape))
        bias = np.zeros((HQ, SQ, SK))
        grads = attention_backward(
            x.dout, x.q, x.k, x.v, out, lse, dlse=x.dlse, mask=mask, sinks=sinks, bias=bias, tile=TILE
        )
        assert (grads.dq[:, :, ::3] == 0).all()
        assert (grads.dbias[:, ::3] == 0).all()
        assert all(np.isfinite(a).all() for a in grads if a is not None)
        x = Inputs()


@pytest.mark.parametrize("options", [{"sinks": np.array([1.0, 2, 3, -np.inf])}, {"mask": np.ones((SQ, 0), bool)}])
def test_no_keys(options):
    x = Inputs(sk=0)
    check(x, **options)
    check(x, causal=True, window=(3, 3), **options)


def test_no_queries_and_no_entries():
    for x in (Inputs(sq=0), Inputs(batch=((0,), (), (0,)))):
        check(x, sinks=np.ones(HQ), bias=np.ones((HQ, 1, SK)), kv_lens=5)


# ------------------------------------------------------------------------------------------------ numbers far from 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_lowest_number_in_a_bias_hides_nothing(dtype):
    """It often stands for -inf; a row of nothing else sees every key all the same."""
    x, lowest = Inputs(dtype), np.finfo(dtype).min
    bias = np.where((np.arange(SQ)[:, None] % 2 == 1) & (np.arange(SK) < 30), 0.0, lowest)
    out, lse = attention(x.q, x.k, x.v, bias=bias.astype(dtype), return_lse=True, tile=TILE)
    mean = np.broadcast_to(x.v.mean(axis=-2, keepdims=True), (2, 2, SQ, 6))
    close("out", out[:, ::2, ::2], mean[:, :, ::2], LIMITS[dtype])
    np.testing.assert_array_equal(lse[..., ::2], lowest)
    want = attention(x.q, x.k[..., :30, :], x.v[..., :30, :], tile=TILE)
    close("out", out[:, :, 1::2], want[:, :, 1::2], LIMITS[dtype])


def test_logits_that_rise_or_fall_from_block_to_block():
    for slope in (50.0, -50.0):
        check(Inputs(), alibi_slopes=np.full(HQ, slope))
        check(Inputs(), bias=slope * np.arange(SK, dtype=float))
        check(Inputs(), bias=slope * np.arange(SK, dtype=float)[::-1], causal=True)
    check(Inputs(), scale=300.0, mask=RNG.random((SQ, SK)) < 0.5)
    check(Inputs(), scale=300.0, window=(9, 9))


@pytest.mark.parametrize(
    ("block_n", "options"), [(1, {"window": (9, 9), "q_offset": 0}), (10, {"causal": True, "q_offset": 4})]
)
def test_rows_begin_with_a_maximum_of_what_they_see(block_n, options):
    """Some keys, of which the first rows of a tile see none or the last, have logits beyond all others."""
    x = Inputs()
    x.q = np.abs(x.q)
    x.k[..., 0 if block_n == 1 else slice(5, 10), :] = 3e3
    out = attention(x.q, x.k, x.v, tile=Tile(block_m=16, block_n=block_n), **options)
    close("out", out, dense(x.q, x.k, x.v, None, None, **options)[0], 1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_softcaps(dtype):
    x, large = Inputs(dtype), 1e300
    want = both(x)
    for softcap in (1e15, 1e25, 1e38, large):
        got = both(x, softcap=softcap)
        for name, a, b in zip(("out", "lse"), got, want, strict=False):
            close(name, a, b, LIMITS[dtype])
        for name in ("q", "k", "v"):
            close(f"d{name}", got[2][name], want[2][name], LIMITS[dtype])
    for softcap in (1e-30, 1e-300, 5e-324):
        out, lse, grads = both(x, softcap=softcap, sinks=np.zeros(HQ))
        close("lse", lse, np.full(lse.shape, math.log(SK + 1)), LIMITS[dtype])
        assert all(np.isfinite(a).all() for a in (out, *grads.values()))


# ---------------------------------------------------------------------------------------------------------- dropout


def test_known_answers_of_philox():
    """Of Random123, by the authors of Philox."""
    ones, digits = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    answers = {
        ((0, 0, 0, 0), 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ((ones,) * 4, 2**64 - 1): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (digits, 0xA4093822 + (0x299F31D0 << 32)): "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (counter, seed), words in answers.items():
        assert " ".join(f"{int(word):08x}" for word in philox(counter, seed)) == words
    several = [np.array(words) for words in zip(*(counter for counter, _ in answers), strict=True)]
    assert f"{int(philox(several, 0)[0][0]):08x}" == "6627e8d5"


def test_each_pair_has_its_word():
    seed, want = 2**40 + 3, np.zeros((11, 7), bool)
    for j, i in np.ndindex(11, 7):
        want[j, i] = keep_word(5 + i, 3 + j, 2, 9, seed) < int(0.4 * 2**32)
    np.testing.assert_array_equal(dropped(slice(3, 14), slice(5, 12), 2, 9, seed, 0.4), want)
    assert 0 < want.sum() < want.size


def test_dropout_does_not_depend_on_tiles_and_lse_not_on_dropout():
    x = Inputs("float64", 90, 130)
    out, lse = attention(x.q, x.k, x.v, return_lse=True)
    runs = [
        attention(x.q, x.k, x.v, dropout=0.5, seed=seed, return_lse=True, tile=tile)
        for seed in (3, np.array(3, np.uint64), 4)
        for tile in (TILE, Tile(block_m=7, block_n=9), None)
    ]
    for run in runs:
        close("lse", run.lse, lse, 1e-12)
    for run in runs[1:6]:
        close("out", run.out, runs[0].out, 1e-12)
    assert np.abs(runs[6].out - runs[0].out).max() > 0.1
    mean = np.mean([attention(x.q, x.k, x.v, dropout=0.5, seed=seed) for seed in range(300)], axis=0)
    assert np.abs(mean - out).max() < 0.15
    assert np.abs(runs[0].out - out).max() > 0.3


# ------------------------------------------------------------------------------------------- work, memory, bits, views


def loads(monkeypatch, x, **options):
    """How many blocks of keys the forward and the backward load."""
    counts = []
    out, lse = attention(x.q, x.k, x.v, return_lse=True, tile=TILE, **options)
    for worker, call in (
        (_cpu.ForwardWorker, lambda: attention(x.q, x.k, x.v, tile=TILE, **options)),
        (_cpu.BackwardWorker, lambda: attention_backward(x.dout, x.q, x.k, x.v, out, lse, tile=TILE, **options)),
    ):
        real, seen = worker.load_keys, []

        def load_keys(self, k, v, real=real, seen=seen):
            seen.append(len(k))
            real(self, k, v)

        with monkeypatch.context() as patch:
            patch.setattr(worker, "load_keys", load_keys)
            call()
        counts.append(len(seen))
    return counts


def test_blocks_that_nobody_sees_are_skipped(monkeypatch):
    """16 x 16 blocks of 16 rows and keys."""
    size = 256
    x = Inputs("float32", size, size, 1, 1, ((), (), ()))
    monkeypatch.setenv(VARIABLE, "1")
    diagonal = np.arange(size) // 16
    mask = np.equal.outer(diagonal, diagonal)
    most = {
        "window": ({"window": (8, 8)}, 16 * 3, 16 * 5),
        "causal window": ({"window": (16, 0), "causal": True}, 16 * 2, 16 * 4),
        "kv_lens": ({"kv_lens": 32}, 16 * 2, 16 * 2),
        "q_lens": ({"q_lens": 32}, 2 * 16, 2 * 16),
        "mask": ({"mask": mask}, 16, 16),
        "bias": ({"bias": np.where(mask, 0, -np.inf)}, 16, 16),
        "segments": ({"segment_ids": (diagonal, diagonal)}, 16, 16),
    }
    for name, (options, *limits) in most.items():
        for count, limit in zip(loads(monkeypatch, x, **options), limits, strict=True):
            assert 0 < count <= limit, name


@pytest.mark.parametrize("shape", [(SQ, SK), (2, 1, 1, SK), (HQ, SQ, 1), (1, 1), (2, HQ, SQ, SK)], ids=str)
def test_any_number_of_workers_gives_the_same_bits(monkeypatch, shape):
    x, options = Inputs("float32"), dict(OPTIONS["all"], bias=RNG.standard_normal(shape).astype(np.float32), tile=TILE)
    out, lse = attention(x.q, x.k, x.v, return_lse=True, **options)

    def bits():
        results = list(attention(x.q, x.k, x.v, return_lse=True, **options))
        for wrt in (None, ("bias", "sinks")):
            results += attention_backward(x.dout, x.q, x.k, x.v, out, lse, dlse=x.dlse, wrt=wrt, **options)
        return [a.tobytes() for a in results if a is not None]

    monkeypatch.setattr(_cpu, "_is_small", lambda problem: False)
    _cpu._prepared.cache_clear()
    monkeypatch.setenv(VARIABLE, "1")
    want, threads = bits(), set()
    real = _cpu.BackwardWorker.__call__, _cpu.BackwardWorker.store_rows
    late = itertools.cycle(np.random.default_rng(0).choice((0, 0, 0, 1e-3, 3e-3), 1000).tolist())

    def call(self, task):
        threads.add(threading.get_ident())
        time.sleep(next(late))
        real[0](self, task)

    def store_rows(self, task):
        time.sleep(next(late))
        real[1](self, task)

    monkeypatch.setattr(_cpu.BackwardWorker, "__call__", call)
    monkeypatch.setattr(_cpu.BackwardWorker, "store_rows", store_rows)
    for workers in ("2", "4"):
        monkeypatch.setenv(VARIABLE, workers)
        assert bits() == want
    assert len(threads) > 1


def test_small_calls_start_no_threads(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a small call went the long way")

    monkeypatch.setattr(_cpu, "run", never)
    both(Inputs(), **OPTIONS["all"])
    large = Inputs(sq=100, sk=100)
    with pytest.raises(AssertionError, match="the long way"):
        attention(large.q, large.k, large.v, window=(3, 3))


def test_batch_mates_and_strides_change_no_bit():
    x, options = Inputs("float32", batch=((2,), (2,), (2,))), OPTIONS["all"]
    options = {name: a for name, a in options.items() if name not in ("dropout", "seed")}
    out, lse, grads = both(x, **options)
    x.q, x.k, x.v, x.dout, x.dlse = (a[1:] for a in (x.q, x.k, x.v, x.dout, x.dlse))
    batched = ("bias", "q_lens", "kv_lens", "q_offset")
    options = {name: a[1:] if name in batched else a for name, a in options.items()}
    options["bias"] = np.asfortranarray(options["bias"])
    options["mask"] = np.repeat(options["mask"], 2, axis=-1)[..., ::2]
    alone = both(x, **options)
    assert alone[0].tobytes() == out[1:].tobytes()
    assert alone[1].tobytes() == lse[1:].tobytes()
    for name in ("q", "k", "v", "bias"):
        assert np.ascontiguousarray(alone[2][name]).tobytes() == grads[name][1:].tobytes()


def peak(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_pairs():
    """Of 8 heads and 1024 x 1024 pairs each, 32 MiB of float32, only blocks exist, and dbias as large as bias is."""
    size, rng = 1024, np.random.default_rng(3)
    x = Inputs("float32", size, size, 8, 1, ((), (), ()))
    options = {
        "bias": rng.standard_normal((size, size)).astype(np.float32), "mask": rng.random((size, size)) < 0.9,
        "softcap": 3.0, "dropout": 0.1, "seed": 1,
    }  # fmt: skip
    out, lse = attention(x.q, x.k, x.v, return_lse=True, **options)
    workers = _cpu.run.__globals__["worker_count"]()
    assert peak(lambda: attention(x.q, x.k, x.v, **options)) < 9 * 2**20 * workers
    allowed = 2 * options["bias"].nbytes + 9 * 2**20 * workers
    assert peak(lambda: attention_backward(x.dout, x.q, x.k, x.v, out, lse, **options)) < allowed


def test_other_layouts_and_outputs():
    x, options = Inputs("float16"), OPTIONS["all"]
    want = attention(x.q, x.k, x.v, return_lse=True, tile=TILE, **options)
    swapped = [a.swapaxes(-2, -3) for a in (x.q, x.k, x.v)]
    got = attention(*swapped, return_lse=True, layout="shd", tile=TILE, **options)
    assert got.out.swapaxes(-2, -3).tobytes() == want.out.tobytes()
    assert got.lse.tobytes() == want.lse.tobytes()
    exact = np.empty(want.out.shape, np.float32)
    attention(x.q, x.k, x.v, out=exact, tile=TILE, **options)
    close("out", exact, dense(x.q, x.k, x.v, None, None, **options)[0], LIMITS["float32"])
    one = Inputs("float32", hk=1, group=1, batch=((), (), ()))
    flat = attention(one.q[0], one.k[0], one.v[0], mask=OPTIONS["sparse mask"]["mask"], sinks=np.ones(1), tile=TILE)
    full = attention(one.q, one.k, one.v, mask=OPTIONS["sparse mask"]["mask"], sinks=np.ones(1), tile=TILE)
    assert flat.tobytes() == full.tobytes()

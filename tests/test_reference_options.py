"""The specification's options against loops, complex steps and facts; the bounds against honest and planted errors."""

from __future__ import annotations

import cmath
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from cupyflash.testing import bounds, data, reference
from cupyflash.testing.cases import options_table
from cupyflash.testing.data import Case
from cupyflash.testing.functions import MASKS, SCORES, Sizes, known
from cupyflash.testing.philox import keeps, philox
from cupyflash.testing.table import VALUES, pairwise

# ------------------------------------------------------------------------------------------------------------- Philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_its_authors_numbers(counter, key, words):
    assert philox(counter, key) == words
    stretched = philox(tuple(np.full((2, 3), word) for word in counter), key)
    for got, want in zip(stretched, words, strict=True):
        assert got.shape == (2, 3)
        assert (got == want).all()


def test_a_word_decides_for_each_key():
    j = np.arange(11)
    kept = keeps(0.3, 2**40 + 5, 7, 3, 1000, j)
    for key in j:
        words = philox((key // 4, 1000, 3, 7), (5, 2**8))
        assert kept[key] == (int(words[key % 4]) >= int(0.3 * 2**32))


# ---------------------------------------------------------------------------- an independent, slow implementation


def is_visible(i, j, diagonal, causal, window):
    """Whether causality and window let row i see key j."""
    left, right = window or (None, None)
    return not (
        (causal and j > diagonal)
        or (left is not None and j < diagonal - left)
        or (right is not None and j > diagonal + right)
    )


def attention_by_loops(
    q, k, v, *, scale=None, causal=False, window=None, softcap=None, bias=None, mask=None, alibi_slopes=None,
    sinks=None, q_lens=None, kv_lens=None, q_offset=None, segment_ids=None, dropout=0.0, seed=None,
    score=None, score_args=(), mask_args=(),
):  # fmt: skip
    """out and lse of canonical arrays, one number at a time, real or complex."""
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (np.broadcast_to(a, (*batch, *a.shape[-3:])) for a in (q, k, v))
    (heads, rows, dim), (heads_k, keys, dim_v) = q.shape[-3:], v.shape[-3:]
    scale = dim**-0.5 if scale is None else scale
    kind = np.result_type(q, k, v, *(x for x in (bias, sinks) if x is not None), *filter(np.iscomplexobj, score_args))
    every = (*batch, heads, rows, keys)
    bias = np.broadcast_to(0.0 if bias is None else bias, every)
    if callable(mask):
        entries = np.arange(math.prod(batch)).reshape(*batch, 1, 1, 1)
        mask = mask(entries, np.arange(heads)[:, None, None], np.arange(rows)[:, None], np.arange(keys), *mask_args)
    mask = np.broadcast_to(True if mask is None else mask, every)
    slopes = np.broadcast_to(0.0 if alibi_slopes is None else alibi_slopes, every[:-2])
    q_ids, kv_ids = (0, 0) if segment_ids is None else segment_ids
    q_ids, kv_ids = np.broadcast_to(q_ids, (*batch, rows)), np.broadcast_to(kv_ids, (*batch, keys))
    q_lens, kv_lens = (
        np.broadcast_to(n if lens is None else lens, batch) for lens, n in ((q_lens, rows), (kv_lens, keys))
    )
    out, lse = np.zeros((*batch, heads, rows, dim_v), kind), np.full((*batch, heads, rows), -np.inf, kind)
    for number, b in enumerate(itertools.product(*map(range, batch))):
        offset = 0 if causal == "top_left" else kv_lens[b] - q_lens[b]
        offset = offset if q_offset is None else int(np.broadcast_to(q_offset, batch)[b])
        for h, i in itertools.product(range(heads), range(q_lens[b])):
            g, s = h // (heads // heads_k), {}
            for j in range(kv_lens[b]):
                at = (*b, h, i, j)
                if not (mask[at] and q_ids[(*b, i)] == kv_ids[(*b, j)] and bias[at] != -np.inf):
                    continue
                if is_visible(i, j, i + offset, causal, window):
                    t = scale * sum(q[(*b, h, i, d)] * k[(*b, g, j, d)] for d in range(dim))
                    s[j] = (t if softcap is None else softcap * np.tanh(t / softcap)) + bias[at]
                    s[j] -= slopes[(*b, h)] * abs(i + offset - j)
                    s[j] = s[j] if score is None else score(s[j], number, h, i, j, *score_args)
                    if s[j] == -np.inf:
                        del s[j]
            terms = [*s.values(), *([] if sinks is None else [sinks[h]])]
            if not terms:
                continue
            top = max(x.real for x in terms)
            lse[(*b, h, i)] = top + cmath.log(sum(cmath.exp(x - top) for x in terms)) if kind.kind == "c" else (
                top + math.log(sum(math.exp(x - top) for x in terms))
            )
            for j, x in s.items():
                kept = keeps(dropout, seed or 0, number, h, i, np.int64(j)) / (1 - dropout)
                out[(*b, h, i)] += kept * np.exp(x - lse[(*b, h, i)]) * v[(*b, g, j)]
    return out, lse


SHAPES = {"q": (2, 4, 5, 2), "k": (2, 2, 6, 2), "v": (2, 6, 3)}  # v is shared by the entries
HALF = np.random.default_rng(3).random((2, 4, 5, 6)) < 0.5
SINKS = np.array([0.5, -1.0, 2.0, -30.0])


def hiding(shape):
    """A bias with -inf here and there."""
    rng = np.random.default_rng(4)
    return np.where(rng.random(shape) < 0.3, -np.inf, rng.standard_normal(shape))


SIZES = Sizes(2, 4, 5, 6)


def scoring(name):
    """The options of a named score."""
    args = (2,) if name == "near" else SCORES[name].args(np.random.default_rng(6), SIZES)
    args = tuple(x.astype(float) if isinstance(x, np.ndarray) else x for x in args)
    return {"score": SCORES[name].function, "score_args": args}


def masking(name):
    """The options of a named mask function."""
    return {"mask": MASKS[name].function, "mask_args": MASKS[name].args(np.random.default_rng(7), SIZES)}


SOME = 25  # elements of each input that are judged
ALONE = {
    "window": {"window": (1, 2)},
    "window, causal": {"window": (2, None), "causal": True},
    "window, top left": {"window": (1, None), "causal": "top_left"},
    "window to the right": {"window": (None, 1)},
    "window, far offset": {"window": (2**40, 0), "q_offset": 2**40},
    "softcap": {"softcap": 0.7, "scale": 2.0},
    "slopes": {"alibi_slopes": np.array([0.5, 0.1, 0.0, -0.2])},
    "slopes of entries": {"alibi_slopes": np.array([[0.5], [0.1]]), "q_offset": np.array([3, -3])},
    "bias": {"bias": hiding((2, 4, 5, 6))},
    "bias of heads": {"bias": hiding((4, 1, 6))},
    "bias of entries": {"bias": hiding((2, 1, 5, 6))},
    "bias of rows": {"bias": hiding((5, 1))},
    "bias of keys": {"bias": hiding(6)},
    "bias, one": {"bias": np.array(0.3)},
    "mask": {"mask": HALF},
    "mask of pairs": {"mask": HALF[0, 0], "causal": True},
    "mask of keys": {"mask": HALF[:, :1, :1]},
    "segments": {"segment_ids": (np.array([0, 0, 1, 1, 2]), np.array([[0, 1, 1, 1, 3, 3], [0, 0, 0, 2, 2, 1]]))},
    "sinks": {"sinks": SINKS},
    "sinks, rows without a key": {"sinks": SINKS, "causal": True, "q_offset": -2},
    "lens": {"q_lens": np.array([3, 5]), "kv_lens": np.array([6, 2]), "causal": True},
    "lens of one kind": {"q_lens": 3, "window": (1, 1)},
    "lens of 0": {"q_lens": np.array([0, 4]), "kv_lens": np.array([3, 0]), "sinks": SINKS},
    "lens, top left": {"kv_lens": np.array([4, 5]), "causal": "top_left"},
    "dropout": {"dropout": 0.4, "seed": 2**50 + 3},
    **{f"score {name}": scoring(name) for name in SCORES},
    "score behind a cap and a bias": {**scoring("square"), "softcap": 2.0, "bias": hiding((4, 5, 1)), "sinks": SINKS},
    "score near, rows without a key": {**scoring("near"), "q_lens": 3, "mask": HALF, "causal": True, "q_offset": -2},
    **{f"mask {name}": masking(name) for name in MASKS},
    "all": {
        "window": (3, 1), "softcap": 1.5, "alibi_slopes": np.array([0.5, 0.1, 0.0, -0.2]), "bias": hiding((4, 5, 1)),
        "mask": HALF | (np.arange(6) < 2), "sinks": SINKS, "q_lens": np.array([4, 5]), "kv_lens": np.array([6, 5]),
        "segment_ids": (np.array([0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1])), "dropout": 0.2, "seed": 11,
    },
}  # fmt: skip


def draw_small(rng):
    return tuple(rng.standard_normal(SHAPES[n]) for n in "qkv")


@pytest.mark.parametrize("name", ALONE)
def test_forward_is_the_loops(name):
    q, k, v = draw_small(np.random.default_rng(1))
    out, lse = reference.forward(q, k, v, **ALONE[name])
    want_out, want_lse = attention_by_loops(q, k, v, **ALONE[name])
    np.testing.assert_allclose(out.astype(float), want_out, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(lse.astype(float), want_lse, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ALONE)
def test_backward_is_the_complex_step(name):
    """Im f(x + i h e) / h is the derivative of an analytic f, with no cancellation."""
    rng = np.random.default_rng(2)
    options = ALONE[name]
    inputs = dict(zip("qkv", draw_small(rng), strict=True))
    out, lse = reference.forward(*inputs.values(), **options)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    empty = lse == -np.inf
    got = reference.backward(dout, *inputs.values(), out, lse, dlse=np.where(empty, np.nan, dlse), **options)

    inputs |= {name: options[name] for name in ("bias", "sinks") if name in options}
    gradients = {name: x for name, x in got._asdict().items() if x is not None}
    for n, x in enumerate(gradients.pop("dscore_args", ())):
        if x is not None:
            inputs[n] = np.asarray(options["score_args"][n])
            gradients[f"d{n}"] = x
    assert [f"d{name}" for name in inputs] == [*gradients]
    for n, x in inputs.items():
        gradient = gradients[f"d{n}"]
        assert gradient.shape == x.shape
        assert (gradient[~np.isfinite(x)] == 0).all()
        for index in rng.permutation(np.argwhere(np.isfinite(x)))[:SOME].tolist():
            y = x.astype(complex)
            y[tuple(index)] += 1e-20j
            changed = {**inputs, n: y}
            qkv = [changed.pop(m) for m in "qkv"]
            args = [changed.pop(m, arg) for m, arg in enumerate(options.get("score_args", ()))]
            changed |= {"score_args": tuple(args)} if args else {}
            o, s = attention_by_loops(*qkv, **{**options, **changed})
            want = ((dout * o).sum() + (dlse * np.where(empty, 0, s)).sum()).imag / 1e-20
            got_here = float(gradient[tuple(index)])
            np.testing.assert_allclose(got_here, want, rtol=1e-11, atol=1e-12, err_msg=f"{n}{index}")


# -------------------------------------------------------------------------------------------------------------- facts


def whole(q, k, v, dout, dlse=None, **options):
    """out, lse and all gradients."""
    out, lse = reference.forward(q, k, v, **options)
    return out, lse, *reference.backward(dout, q, k, v, out, lse, dlse=dlse, **options)


def draw(rng, seqlen_q=7, seqlen_k=9, batch=()):
    shapes = ((2, seqlen_q, 4), (2, seqlen_k, 4), (2, seqlen_k, 3), (2, seqlen_q, 3))
    return tuple(rng.standard_normal((*batch, *shape)) for shape in shapes)


def same(got, want):
    for a, b in zip(got, want, strict=True):
        if a is not None and b is not None:
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-13, atol=1e-14)


def test_a_window_of_one_key_gives_its_value():
    q, k, v, dout = draw(np.random.default_rng(1), 7, 9)
    out, lse, dq, dk, dv, *_ = whole(q, k, v, dout, window=(0, 0))
    np.testing.assert_array_equal(out, v[:, 2:])
    np.testing.assert_allclose(lse.astype(float), 0.5 * (q * k[:, 2:]).sum(-1), rtol=1e-14)
    assert (abs(dq) < 1e-15).all()
    assert (abs(dk) < 1e-15).all()
    np.testing.assert_array_equal(dv[:, 2:], dout)
    assert (dv[:, :2] == 0).all()


def test_causal_is_a_window():
    x = draw(np.random.default_rng(2))
    same(whole(*x, causal=True), whole(*x, window=(None, 0)))
    same(whole(*x, causal=True, window=(2, 5)), whole(*x, window=(2, 0)))
    same(whole(*x), whole(*x, window=(10**30, 10**30)))


def test_a_bias_of_minus_infinity_is_a_mask():
    x = draw(np.random.default_rng(3))
    mask = np.random.default_rng(4).random((2, 7, 9)) < 0.4
    mask[:, 2] = False
    biased = whole(*x, bias=np.where(mask, 0, -np.inf))
    same(biased[:5], whole(*x, mask=mask)[:5])
    assert (biased[5][~mask] == 0).all()
    assert (biased[1][:, 2] == -np.inf).all()
    assert (biased[0][:, 2] == 0).all()


def test_what_is_hidden_never_leaks():
    q, k, v, dout = draw(np.random.default_rng(3))
    mask = np.random.default_rng(4).random((7, 9)) < 0.4
    bias = np.where(mask, 0.5, np.nan)
    results = whole(q, k, v, dout, mask=mask, bias=bias)
    same(results[:5], whole(q, k, v, dout, mask=mask, bias=np.full((7, 9), 0.5))[:5])
    assert (results[5][~mask] == 0).all()


def test_the_cap_bounds_logits():
    q, k, v, _ = draw(np.random.default_rng(5))
    _, lse = reference.forward(1e3 * q, 1e3 * k, v, softcap=2.0)
    assert (abs(lse) <= 2 + math.log(9)).all()
    same(reference.forward(q, k, v, softcap=1e9), reference.forward(q, k, v))


def test_dropout_keeps_about_its_share():
    for dropout in (0.1, 0.5, 0.9):
        b, h, i, j = np.ix_(np.arange(3), np.arange(4), np.arange(50), np.arange(101))
        kept = keeps(dropout, 9, b, h, i, j)
        assert abs(kept.mean() - (1 - dropout)) < 5 * math.sqrt(dropout * (1 - dropout) / kept.size)
    assert keeps(2.0**-33, 9, b, h, i, j).all(), "floor(dropout * 2**32) = 0 drops nothing"


def test_dropout_is_the_same_for_parts_and_seeds():
    x = draw(np.random.default_rng(6), batch=(2,))
    options = {"dropout": 0.5, "seed": 7}
    first = reference.forward(*x[:3], **options)
    same(first, reference.forward(*x[:3], dropout=0.5, seed=np.array(7)))
    same(first, reference.forward(*x[:3], dropout=0.5, seed=np.array(7 - 2**64 % 2**63)))
    assert (first.out != reference.forward(*x[:3], dropout=0.5, seed=8).out).any()
    assert (first.lse == reference.forward(*x[:3]).lse).all(), "dropout does not enter lse"


def test_segments_are_separate_calls():
    q, k, v, dout = draw(np.random.default_rng(7), 8, 9)
    ids = np.array([0] * 3 + [5] * 5), np.array([0] * 4 + [5] * 5)
    together = whole(q, k, v, dout, segment_ids=ids)
    for rows, keys in ((slice(3), slice(4)), (slice(3, 8), slice(4, 9))):
        alone = whole(q[:, rows], k[:, keys], v[:, keys], dout[:, rows])
        parts = (rows, rows, rows, keys, keys)
        same([x[:, part] for x, part in zip(together, parts, strict=False)], alone[:5])


def test_lens_are_slices_and_what_lies_beyond_is_never_used():
    rng = np.random.default_rng(8)
    q, k, v, dout = draw(rng, batch=(3,))
    bias = rng.standard_normal((3, 2, 7, 9))
    out_shape, lse = dout.shape, rng.standard_normal((3, 2, 7))
    q_lens, kv_lens = np.array([7, 4, 0]), np.array([5, 9, 2])
    options = {"causal": True, "window": (3, None), "sinks": np.array([0.1, -0.2]), "dropout": 0.25, "seed": 3}
    for b in range(3):
        for x in (q, dout, lse[..., None]):
            x[b, :, q_lens[b] :] = np.nan
        for x in (k, v):
            x[b, :, kv_lens[b] :] = np.nan
        bias[b, :, q_lens[b] :], bias[b, :, :, kv_lens[b] :] = np.nan, np.nan
    out, log_sum = reference.forward(q, k, v, bias=bias, q_lens=q_lens, kv_lens=kv_lens, **options)
    given = [np.where(np.isnan(x), np.nan, y) for x, y in ((dout, out), (lse, log_sum))]
    grads = reference.backward(
        dout, q, k, v, *given, dlse=lse, bias=bias, q_lens=q_lens, kv_lens=kv_lens, **options
    )  # fmt: skip
    assert out.shape == out_shape
    assert all(np.isfinite(x).all() for x in (out, *grads) if x is not None)
    for b in range(3):
        rows, keys = slice(q_lens[b]), slice(kv_lens[b])
        for x in (out, grads.dq):
            assert (x[b, :, q_lens[b] :] == 0).all()
        for x in (grads.dk, grads.dv):
            assert (x[b, :, kv_lens[b] :] == 0).all()
        assert (log_sum[b, :, q_lens[b] :] == -np.inf).all()
        if b == 0:  # dropout counts entries, so only the first one is the same alone
            alone = whole(
                q[0][:, rows], k[0][:, keys], v[0][:, keys], dout[0][:, rows], lse[0][:, rows],
                bias=bias[0][:, rows, keys], **options,
            )  # fmt: skip
            parts = (out[0][:, rows], log_sum[0][:, rows], grads.dq[0][:, rows], grads.dk[0][:, keys])
            same((*parts, grads.dv[0][:, keys], grads.dbias[0][:, rows, keys]), alone[:6])


def test_a_sink_is_one_more_key_without_a_value():
    q, k, v, dout = draw(np.random.default_rng(9))
    dlse, sinks = np.random.default_rng(10).standard_normal((2, 7)), np.array([0.4, -3.0])
    out, lse, dq, dk, dv, _, dsinks, _ = whole(q, k, v, dout, dlse, sinks=sinks)
    more = np.zeros((2, 1, 4)), np.zeros((2, 1, 3))
    bias = np.concatenate([np.zeros((2, 1, 9)), sinks[:, None, None]], axis=-1)
    wide = whole(q, *(np.concatenate([x, y], axis=1) for x, y in zip((k, v), more, strict=True)), dout, dlse, bias=bias)
    same((out, lse, dq, dk, dv), (*wide[:3], wide[3][:, :9], wide[4][:, :9]))
    same((dsinks,), (wide[5][:, 0, 9],))
    none = whole(q, k, v, dout, dlse, sinks=np.full(2, -np.inf))
    same(none[:5], whole(q, k, v, dout, dlse)[:5])
    assert (none[6] == 0).all()


def test_a_row_with_a_sink_and_no_key():
    q, k, v, dout = draw(np.random.default_rng(11))
    dlse, sinks = np.random.default_rng(12).standard_normal((2, 7)), np.array([0.4, -3.0])
    out, lse, dq, dk, dv, _, dsinks, _ = whole(q, k, v, dout, dlse, sinks=sinks, mask=np.zeros((7, 9), bool))
    assert (lse == sinks[:, None]).all()
    assert not any(x.any() for x in (out, dq, dk, dv))
    same((dsinks,), (dlse.sum(axis=-1),))


@pytest.mark.parametrize("name", ALONE)
def test_rows_and_keys_are_parts_of_the_whole(name):
    rng = np.random.default_rng(13)
    x, options = draw_small(rng), ALONE[name]
    out, lse = reference.forward(*x, **options)
    dout, rows, keys = rng.standard_normal(out.shape), [4, 0, 2], [5, 1]
    part = reference.forward(*x, rows=rows, **options)
    same(part, (out[..., rows, :], lse[..., rows]))
    grads = reference.backward(dout, *x, out, lse, **options)
    parts = reference.backward(dout, *x, out, lse, rows=rows, keys=keys, **options)
    same(parts[:3], (grads.dq[..., rows, :], grads.dk[..., keys, :], grads.dv[..., keys, :]))
    if grads.dbias is not None:
        want = grads.dbias
        if want.ndim > 1 and want.shape[-2] > 1:
            want = want[..., rows, :]
        if want.ndim > 0 and want.shape[-1] > 1:
            want = want[..., keys]
        same((parts.dbias, parts.dsinks), (want, grads.dsinks))


def test_layouts_and_single_heads_are_the_same_numbers():
    x = draw(np.random.default_rng(14), batch=(3,))
    options = {"bias": np.random.default_rng(15).standard_normal((2, 7, 9)), "kv_lens": np.array([9, 4, 0])}
    options |= {"sinks": np.array([0.1, 0.2]), "softcap": 1.0, "causal": True}
    want = whole(*x, **options)
    got = whole(*(a.swapaxes(-2, -3) for a in x), layout="shd", **options)
    same(got, [a.swapaxes(-2, -3) if n in (0, 2, 3, 4) else a for n, a in enumerate(want)])
    one = {"bias": options["bias"][0], "kv_lens": 4, "sinks": np.array([0.1]), "softcap": 1.0, "causal": True}
    single = whole(*(a[1, 0] for a in x), **one)
    same(single, [a[0] if n < 5 else a for n, a in enumerate(whole(*(a[1, :1] for a in x), **one))])


# ------------------------------------------------------------------------------------------------------------- bounds


def tanh_by_exp(x):
    """tanh as a kernel without one computes it."""
    one, two = x.dtype.type(1), x.dtype.type(2)
    return np.copysign(one - two / (np.exp(two * abs(x)) + one), x)


@pytest.mark.parametrize("tanh", [np.tanh, tanh_by_exp], ids=["NumPy", "exp"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tanh_is_as_exact_as_the_bounds_say(dtype, tanh):
    if not reference.is_wide_enough(dtype):
        pytest.skip("longdouble is no wider than float64 on this machine")
    x = np.concatenate([np.geomspace(1e-6, 40, 100_000), -np.geomspace(1e-6, 40, 1000)]).astype(dtype)
    error = abs(tanh(x) - np.tanh(x.astype(reference.working_type(dtype))))
    assert error.max() <= bounds.TANH * np.finfo(dtype).eps / 2


def honest(case, base2=False, block_n=16, p_dtype=None, wrong=None):
    """All results of a case as an honest kernel computes them, in the accumulator's type, or with a planted error."""
    x, options = case.inputs(), case.options()
    acc = np.float64 if x.q.dtype == np.float64 else np.float32
    this = reference.pairs(x.q, x.k, x.v, **options)
    q, k, v, scale = this.q.astype(acc), this.k.astype(acc), this.v.astype(acc), acc(this.scale)
    visible, cap = this.visible, None if this.softcap is None else acc(this.softcap)
    sink = this.sink.astype(acc) * acc(1.3 if wrong == "sinks" else 1)
    base = acc(math.log2(math.e)) if base2 else acc(1)
    exp, log = (np.exp2, np.log2) if base2 else (np.exp, np.log)
    kept = np.where(this.kept > 0, acc(1 / (1 - case.dropout)), acc(0))
    if wrong == "dropout":
        kept = np.where(this.kept > 0, acc(1), acc(0))
    slopes = acc(0) if case.alibi is None else options["alibi_slopes"].astype(acc)[..., None, None]
    alibi = -slopes * abs(this.distance - (wrong == "alibi")).astype(acc)
    bias = this.bias.astype(acc)

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        t = (q @ k.swapaxes(-1, -2)) * scale
        cut = None if cap is None else (tanh_by_exp if base2 else np.tanh)(t / cap)
        s = t if cut is None else cap * cut
        u = s + alibi + bias
        s, slope = (u, acc(1)) if this.score is None else scored(this.score, np.where(u == -np.inf, 0, u), acc)
        s = np.where(visible & (u != -np.inf), s * base, acc(-np.inf))
        s = np.broadcast_to(s, (*np.broadcast_shapes(*case.batch), *s.shape[-3:]))
        top = np.broadcast_to(sink * base, (*s.shape[:-1], 1)).copy()
        total, acc_o = np.where(top > -np.inf, acc(1), acc(0)), np.zeros((*s.shape[:-1], v.shape[-1]), acc)
        for n in range(0, s.shape[-1], block_n):
            block = slice(n, n + block_n)
            new = np.maximum(top, s[..., block].max(axis=-1, keepdims=True))
            safe = np.where(new == -np.inf, acc(0), new)
            p, old, top = exp(s[..., block] - safe), exp(top - safe), new
            total = total * old + p.sum(axis=-1, keepdims=True)
            p = p if p_dtype is None else p.astype(p_dtype).astype(acc)
            acc_o = acc_o * old + (p * np.broadcast_to(kept, s.shape)[..., block]) @ v[..., block, :]
        lse = ((top + log(total)) / base)[..., 0]
        out = np.where(total > 0, acc_o / np.where(total > 0, total, acc(1)), acc(0)).astype(x.q.dtype)

    layout, work = options["layout"], acc
    do, dlse = reference.canonical(x.dout, layout, work), reference.canonical_rows(x.dlse, work)[..., None]
    do = np.where(this.row, do, acc(0))
    dlse = np.where((lse != -np.inf)[..., None], dlse, acc(0)) if case.dlse else acc(0)
    arrays = (q, k, v, do, out.astype(acc), dlse, kept)
    slope = acc(1) if wrong == "score" else slope
    grads = honest_gradients(case, x, this, arrays, (s, lse, cut, slope), base, p_dtype, wrong)
    single = x.q.ndim == 2
    return reference.as_user(out, x.q.ndim, layout), lse[0] if single else lse, grads


def scored(score, u, acc):
    """A score function and its slope in the accumulator's type."""
    args = tuple(x.astype(acc) if x.dtype.kind == "f" else x for x in score.args)
    both = score.function, known(score.function).slope
    return (np.broadcast_to(f(u, *score.pairs, *args), u.shape).astype(acc) for f in both)


def honest_gradients(case, x, this, arrays, forward, base, p_dtype, wrong):
    """The gradients of `honest`."""
    (q, k, v, do, out, dlse, kept), (s, lse, cut, slope) = arrays, forward
    acc, options, layout = q.dtype.type, case.options(), case.layout
    exp = np.exp2 if base != 1 else np.exp
    finite = np.where(lse == -np.inf, acc(0), lse)[..., None]
    with np.errstate(over="ignore", invalid="ignore"):
        p = np.where((s > -np.inf) & (lse != -np.inf)[..., None], exp(s - finite * base), acc(0))
        delta = (do * out).sum(axis=-1, keepdims=True) - dlse
        ds = p * (kept * (do @ v.swapaxes(-1, -2)) - delta)
        du = np.where(s > -np.inf, ds * slope, acc(0))
        dt = du if cut is None or wrong == "slope" else du * (1 - cut * cut)
        weight = p if wrong == "dropout of dv" else p * kept
        dt, weight = ((a if p_dtype is None else a.astype(p_dtype).astype(acc)) for a in (dt, weight))
        dq = reference.gradient(dt @ k * acc(this.scale), x.q, layout)
        dk = reference.gradient(dt.swapaxes(-1, -2) @ q * acc(this.scale), x.k, layout)
        dv = reference.gradient(weight.swapaxes(-1, -2) @ do, x.v, layout)
        bias, sinks = options.get("bias"), options.get("sinks")
        dbias = None if bias is None else reference.sum_to(du, bias.shape).astype(bias.dtype)
        dsinks = None
        if sinks is not None:
            sink = np.broadcast_to(this.sink, (*lse.shape, 1)).astype(acc)
            p_sink = np.where((lse == -np.inf)[..., None], acc(0), exp((sink - finite) * base))
            dsinks = reference.sum_to((-p_sink * delta).sum(axis=(-2, -1)), sinks.shape).astype(sinks.dtype)
            dsinks = dsinks * sinks.dtype.type(0 if wrong == "dsinks" else 1)
        return (*(g.astype(x.q.dtype) for g in (dq, dk, dv)), dbias, dsinks)


def judge(case, result, **limits):
    x, (out, lse, grads), options = case.inputs(), result, case.options()
    dlse = x.dlse if case.dlse else None
    return bounds.check_forward(x.q, x.k, x.v, out, lse, **limits, **options) + bounds.check_backward(
        x.dout, x.q, x.k, x.v, out, lse, grads, dlse=dlse, **limits, **options
    )


def judgeable(case):
    if not reference.is_wide_enough(case.dtype):
        pytest.skip("longdouble is no wider than float64 on this machine")
    return case


@pytest.mark.parametrize("base2", [True, False], ids=["exp2", "exp"])
@pytest.mark.parametrize("number", range(len(options_table())))
def test_an_honest_computation_keeps_the_bounds(number, base2):
    case = judgeable(options_table()[number])
    report = judge(case, honest(case, base2))
    assert report.ok, f"{case}\n{report}"
    report = judge(case, honest(case, base2), random=True)
    assert report.ok, f"{case}\n{report}"


@pytest.mark.parametrize("number", range(60))
def test_an_honest_computation_keeps_the_bounds_of_random_problems(number):
    pick = data.random_pick(np.random.default_rng((14, number)))
    case = judgeable(data.random_case(pick, styles=("plain",), work=100_000, options=True))
    p_dtype = case.dtype if np.dtype(data._dtype(case.dtype)).itemsize == 2 and number % 2 else None
    p_dtype = None if p_dtype is None else data._dtype(p_dtype)
    report = judge(case, honest(case, bool(number % 3), p_dtype=p_dtype), p_dtype=p_dtype)
    assert report.ok, f"{case}\n{report}"


PLANTED = {
    # an error: the case, and the results that it must show in
    "alibi": ({"alibi": "heads"}, {"out", "lse"}),
    "sinks": ({"sinks": "float32"}, {"out", "lse"}),
    "dropout": ({"dropout": 0.1}, {"out"}),
    "dropout of dv": ({"dropout": 0.1}, {"dv"}),
    "slope": ({"softcap": 5.0}, {"dq", "dk"}),
    "dsinks": ({"sinks": "float32"}, {"dsinks"}),
    "score": ({"score": "square", "bias": "keys"}, {"dq", "dk", "dbias"}),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("wrong", PLANTED)
def test_planted_errors_break_the_bounds(wrong, dtype):
    changes, where = PLANTED[wrong]
    case = judgeable(
        Case(3, dtype, num_heads_k=2, seqlen_q=40, seqlen_k=70, head_dim=8, head_dim_v=8, dlse=True, **changes)
    )
    assert judge(case, honest(case)).ratio < 0.6
    broken = {worst.name for worst in judge(case, honest(case, wrong=wrong)).worst if worst.ratio > 10}
    assert where <= broken


ON = {
    "window": (20, 3), "softcap": 5.0, "bias": "keys", "mask": "pairs", "segments": "shared", "q_lens": "entries",
    "kv_lens": "entries", "dropout": 0.1, "score": "relative",
}  # fmt: skip


@pytest.mark.parametrize("field", ON)
def test_a_forgotten_option_breaks_the_bounds(field):
    """The limits of a case hold for no computation that ignores one of its options."""
    plain = Case(4, batch=((4,),) * 3, seqlen_q=40, seqlen_k=50, head_dim=8, head_dim_v=8)
    case = replace(plain, **{field: ON[field]})
    x = plain.inputs()  # no padding
    out, lse = (a.astype(np.float32) for a in reference.forward(x.q, x.k, x.v, **plain.options()))
    gradients = reference.backward(x.dout, x.q, x.k, x.v, out, lse, **plain.options())
    report = bounds.check_forward(x.q, x.k, x.v, out, lse, **case.options())
    assert report.ratio > 10
    assert {worst.name for worst in report.worst if worst.ratio > 10} >= {"out"}
    gradients = tuple(None if g is None else g.astype(np.float32) for g in gradients)
    report = bounds.check_backward(x.dout, x.q, x.k, x.v, out, lse, gradients, **case.options())
    assert max(worst.ratio for worst in report.worst) > 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_p_is_about_the_ideal(dtype):
    case = Case(
        5, dtype, num_heads_k=2, seqlen_q=200, seqlen_k=300, head_dim=32, head_dim_v=32, dlse=True, softcap=5.0,
        bias="heads", bias_dtype="float32", sinks="float32", dropout=0.2, window=(150, 20),
    )  # fmt: skip
    x, options = case.inputs(), case.options()
    out, lse, grads = honest(case, True, 64, x.q.dtype)
    chains = bounds.longest_chains(x.q, x.k, x.v)
    want, limit = bounds.forward_limits(x.q, x.k, x.v, out_dtype=np.float32, chains=chains, **options)
    report = bounds.check_ideal("out", out, want.out, limit.out, reference.ideal_forward(x.q, x.k, x.v, **options))
    assert report.ok, str(report)
    given = (x.dout, x.q, x.k, x.v, out, lse)
    want, limit = bounds.backward_limits(*given, dlse=x.dlse, chains=chains, out_dtype=np.float32, **options)
    ideal = reference.ideal_backward(*given, dlse=x.dlse, **options)
    assert ideal.dbias.shape == want.dbias.shape
    assert ideal.dsinks.shape == want.dsinks.shape
    for name, got, w, most, best in zip(want._fields[:3], grads, want, limit, ideal, strict=False):
        report = bounds.check_ideal(name, got, w, most, best, rms=1.5)
        assert report.ok, str(report)


def test_sampled_checks_see_sampled_pairs_of_dbias_only():
    case = judgeable(Case(2, "float32", seqlen_q=40, seqlen_k=50, head_dim=8, head_dim_v=8, bias="pairs"))
    x, options = case.inputs(), case.options()
    out, lse, grads = honest(case)
    grads[3][7, 9] += 1
    given = (x.dout, x.q, x.k, x.v, out, lse, grads)
    assert bounds.check_backward(*given, rows=[1, 7], keys=[8, 10], **options).ok
    worst = bounds.check_backward(*given, rows=[1, 7], keys=[9, 10], **options).worst[3]
    assert worst.name == "dbias"
    assert worst.at == (7, 9)
    assert worst.ratio > 1


# -------------------------------------------------------------------------------------------------------------- table


def test_every_two_values_of_two_options_meet():
    rows = pairwise(VALUES)
    for a, b in itertools.combinations(VALUES, 2):
        together = [(row[a], row[b]) for row in rows]
        assert all(pair in together for pair in itertools.product(VALUES[a], VALUES[b])), (a, b)


def test_the_table_is_small_and_always_the_same():
    table = options_table()
    assert len(table) <= 150
    assert max(case.work for case in table) < 4_000_000
    assert all(case == eval(repr(case), {"Case": Case}) for case in table)
    options_table.cache_clear()
    assert options_table() == table


def test_the_tables_options_are_on():
    """Most rows see a key, and each option is on where its field says so."""
    shares = []
    for case in options_table():
        x, options = case.inputs(), case.options()
        shares.append((reference.forward(x.q, x.k, x.v, **options).lse > -np.inf).mean())
        names = {"alibi": "alibi_slopes", "segments": "segment_ids"}
        for field in (*ON, "alibi", "sinks"):
            assert bool(getattr(case, field)) == (names.get(field, field) in options), field
        assert ("seed" in options) == (case.dropout > 0)
    assert np.mean(shares) > 0.5
    assert min(shares) > 0.05


def test_random_cases_reach_all_there_is():
    rng = np.random.default_rng(15)
    cases = [data.random_case(data.random_pick(rng), work=100_000, options=True) for _ in range(400)]
    for name, values in (
        ("window", {None, *data.WINDOWS}),
        ("softcap", {None, *data.SOFTCAPS}),
        ("bias", {None, *data.PAIR_KINDS}),
        ("mask", {None, *data.PAIR_KINDS, *MASKS}),
        ("score", {None, *SCORES}),
        ("bias_dtype", {None, *data.NAMES}),
        ("alibi", {None, "heads", "entries", "one"}),
        ("sinks", {None, *data.NAMES}),
        ("q_lens", {None, "one", "entries", "last"}),
        ("kv_lens", {None, "one", "entries", "last"}),
        ("segments", {None, "shared", "entries"}),
    ):
        assert {getattr(case, name) for case in cases} == values, name
    assert {style for case in cases for style in case.styles_beside} == set(data.STYLES)
    assert any(case.wrt and "bias" in case.wrt for case in cases)
    assert any(case.wrt == ("sinks",) for case in cases)
    plain = data.random_case(data.random_pick(np.random.default_rng(16)))
    assert plain.options().keys() == {"scale", "causal", "q_offset", "layout"}


def test_padding_of_cases_is_poison():
    case = Case(1, seqlen_q=20, seqlen_k=30, batch=((3,), (1,), ()), q_lens="entries", kv_lens="entries", bias="full")
    x, q_lens, kv_lens = case.inputs(), case.lens("q"), case.lens("k")
    for b in range(3):
        assert np.isnan(x.q[b, 0, q_lens[b] :]).all()
        assert np.isnan(x.dlse[b, 0, q_lens[b] :]).all()
        assert np.isfinite(x.dout[b, 0, : q_lens[b]]).all()
        bias = case.options()["bias"][b, 0]
        assert np.isfinite(bias[: q_lens[b], : kv_lens[b]]).all()
        assert np.isnan(bias[q_lens[b] :]).all()
        assert np.isnan(bias[:, kv_lens[b] :]).all()
    for shared in (x.k[0, 0], x.v[0]):
        assert np.isnan(shared[max(kv_lens) :]).all(), "no entry reads these"
        assert np.isfinite(shared[: max(kv_lens)]).all(), "one entry does"

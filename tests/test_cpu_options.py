"""The options on the CPU path, forward and backward, against a dense float64 formula of this file's own."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from cupyflash import Tile, _cpu, attention, attention_backward
from cupyflash._philox import dropped, philox

VARIABLE = "CUPYFLASH_NUM_THREADS"
TILE = Tile(block_m=16, block_n=16)
#: Relative to the largest number of an array: rounding in the accumulator, and of the result.
LIMITS = {"float64": 1e-12, "float32": 5e-6, "float16": 1e-3, "bfloat16": 8e-3}
#: The same for gradients, to which the rounding of out adds its own.
GRADIENT_LIMITS = {1e-12: 1e-12, 5e-6: 5e-6, 1e-3: 4e-3, 8e-3: 3.2e-2}


# ---------------------------------------------------------------------------------------------------- dense formula


def keep_word(i, j, head, batch, seed):
    """The word of Philox 4x32-10 that decides on a pair, in Python's integers."""
    counter, key, low = [j // 4, i, head, batch], [seed % 2**32, seed // 2**32], 2**32 - 1
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b & low, a >> 32 ^ counter[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter[j % 4]


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
            with np.errstate(invalid="ignore"):
                p = np.where(seen, np.exp(s - total[:, None]), 0)
            keep = np.ones((m, n))
            if dropout:
                words = [[keep_word(a, b, h, number, seed) for b in range(n)] for a in range(m)]
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
        return self.rng.standard_normal(shape).astype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype) \
            if dtype is None else self.rng.standard_normal(shape).astype(dtype)  # fmt: skip


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
        assert gradient.dtype == (options.get(name) if name in options else x.q).dtype
        close(f"d{name}", gradient, want[name], GRADIENT_LIMITS[max(limit, LIMITS[str(gradient.dtype)])])

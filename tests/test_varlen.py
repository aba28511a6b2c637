"""Packed sequences: each one's result is that of attention() on its rows alone, forward and backward."""

import ml_dtypes
import numpy as np
import nvrtc
import pytest
from conftest import PROFILE
from emulator import Device, Schedule, why_not

from cupyflash import (
    AttentionGradients,
    Tile,
    _compile,
    _plan_sm90,
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
    attention_varlen_vjp,
    explain_varlen,
    prepare_varlen,
)
from cupyflash._options import Asked
from cupyflash._packed import PackedCall
from cupyflash._plan import DEVICES
from cupyflash._planner import plan_gpu

LENGTHS_Q = (5, 0, 33, 1, 64, 17)
LENGTHS_K = (9, 20, 0, 1, 64, 40)
HEADS, HEADS_K, D, DV = 4, 2, 16, 24
SPARE = 7  # rows behind the last sequence


def offsets(lengths, dtype=np.int32):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)


class Packed:
    """Random packed sequences, NaN behind the last one, and the options of a call on them."""

    def __init__(self, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, dtype=np.float64, d=D, dv=DV, spare=SPARE, **options):
        rng = np.random.default_rng(len(lengths_q) + d)
        total_q, total_k = sum(lengths_q), sum(lengths_k)
        self.shape = len(lengths_q), HEADS, max(lengths_q, default=0), max(lengths_k, default=0)
        self.cu = offsets(lengths_q), offsets(lengths_k)

        def rows(used, heads, columns):
            x = np.full((used + spare, heads, columns), np.nan).astype(dtype)
            x[:used] = rng.standard_normal((used, heads, columns))
            return x

        self.q, self.k, self.v = rows(total_q, HEADS, d), rows(total_k, HEADS_K, d), rows(total_k, HEADS_K, dv)
        self.dout = rows(total_q, HEADS, dv)
        accumulator = np.float64 if dtype == np.float64 else np.float32
        self.dlse = rng.standard_normal((HEADS, total_q + spare)).astype(accumulator)
        self.dlse[:, total_q:] = np.nan
        self.options = {name: make(rng, self.shape) if callable(make) else make for name, make in options.items()}

    def sequence(self, b):
        """Slices of queries and keys."""
        return tuple(slice(int(cu[b]), int(cu[b + 1])) for cu in self.cu)

    def options_of(self, b):
        """The options of one sequence, as attention() takes them."""
        found = dict(self.options)
        queries, keys = (s.stop - s.start for s in self.sequence(b))
        for name in ("bias", "mask"):
            if name in found and not callable(found[name]):
                whole = np.broadcast_to(found[name], self.shape)
                found[name] = whole[b, :, :queries, :keys]
        if "alibi_slopes" in found:
            found["alibi_slopes"] = np.broadcast_to(found["alibi_slopes"], self.shape[:2])[b]
        if np.ndim(found.get("q_offset", 0)):
            found["q_offset"] = int(found["q_offset"][b])
        if "segment_ids" in found:
            found["segment_ids"] = tuple(x[b, :n] for x, n in zip(found["segment_ids"], (queries, keys), strict=True))
        for name in ("score_args", "mask_args"):  # what depends on the sequence has an axis of them first
            if name in found:
                first, *rest = found[name]
                found[name] = (first[b : b + 1], *rest)
        return found

    def each(self, wrt):
        """out, lse and gradients, sequence by sequence; what lies behind them as it should be."""
        out = np.zeros((len(self.q), HEADS, self.v.shape[2]))
        lse = np.full((HEADS, len(self.q)), -np.inf)
        likes = {"q": self.q, "k": self.k, "v": self.v, **self.options}
        grads = {name: np.zeros(likes[name].shape) for name in wrt if name != "score_args"}
        if "score_args" in wrt:  # the first has an axis of sequences
            grads |= {f"score_args[{n}]": np.zeros(np.shape(x)) for n, x in enumerate(self.options["score_args"])}
        whole = np.zeros(self.shape)
        for b in range(self.shape[0]):
            rows, keys = self.sequence(b)
            q, dout = self.q[rows].swapaxes(0, 1), self.dout[rows].swapaxes(0, 1)
            k, v = self.k[keys].swapaxes(0, 1), self.v[keys].swapaxes(0, 1)
            options = self.options_of(b)
            if options.get("bias") is not None:
                options["bias"] = np.array(options["bias"])
            o, s = attention(q, k, v, return_lse=True, **options)
            g = attention_backward(dout, q, k, v, o, s, dlse=self.dlse[:, rows], wrt=wrt, **options)
            out[rows], lse[:, rows] = o.swapaxes(0, 1), s
            grads["q"][rows], grads["k"][keys] = g.dq.swapaxes(0, 1), g.dk.swapaxes(0, 1)
            grads["v"][keys] = g.dv.swapaxes(0, 1)
            if "bias" in wrt:
                whole[b, :, : q.shape[1], : k.shape[1]] = g.dbias
            if "sinks" in wrt:
                grads["sinks"] += g.dsinks
            for n, x in enumerate(g.dscore_args or ()):
                grads[f"score_args[{n}]"][b if n == 0 else ...] += x[0] if n == 0 else x
        if "bias" in wrt:
            shape = self.options["bias"].shape
            axes = tuple(i for i, (n, m) in enumerate(zip(shape, self.shape, strict=True)) if n != m)
            grads["bias"] = whole.sum(axes, keepdims=True)
        return out, lse, grads

    def run(self, wrt, xp=np, **more):
        """The same from the packed arrays."""
        on = {name: on_device(x, xp) for name, x in self.options.items()} | more
        q, k, v, dout, dlse = map(xp.asarray, (self.q, self.k, self.v, self.dout, self.dlse))
        cu = tuple(map(xp.asarray, self.cu))
        out, lse = attention_varlen(q, k, v, *cu, return_lse=True, **on)
        g = attention_varlen_backward(dout, q, k, v, out, lse, *cu, dlse=dlse, wrt=wrt, **on)
        host = (lambda x: x) if xp is np else (lambda x: x.get())
        grads = {name: host(getattr(g, f"d{name}")) for name in wrt if name != "score_args"}
        grads |= {f"score_args[{n}]": host(x) for n, x in enumerate(g.dscore_args or ())}
        return host(out), host(lse), grads


def on_device(x, xp):
    """An option as a call on arrays of xp takes it."""
    if isinstance(x, tuple):
        return tuple(on_device(y, xp) for y in x)
    return xp.asarray(x) if isinstance(x, np.ndarray) else x


def wrt_of(options):
    return ("q", "k", "v", *(name for name in ("bias", "sinks", "score_args") if name in options))


def check(packed, xp=np, bound=1e-12, **more):
    """Against every sequence alone, which is computed in float64 from the same numbers."""
    wrt = wrt_of(packed.options)
    got = packed.run(wrt, xp, **more)
    want = packed.each(wrt)
    names = ("out", "lse", *want[2])
    for name, x, y in zip(names, (*got[:2], *got[2].values()), (*want[:2], *want[2].values()), strict=True):
        x = x.astype(np.float64)
        finite = np.isfinite(y)
        np.testing.assert_array_equal(x[~finite], y[~finite], err_msg=name)
        np.testing.assert_allclose(
            x[finite], y[finite], rtol=0, atol=bound * max(1, np.abs(y[finite]).max(initial=0)), err_msg=name
        )


def pairs(*shape):
    """A bias of this shape, where 0 stands for all of an axis."""
    return lambda rng, full: rng.standard_normal([n or m for n, m in zip(shape, full, strict=True)])


def tilted(s, b, h, i, j, table, factor):
    """A score that tells sequences, heads and positions apart."""
    return factor * s + table[b, h] * (i - 2 * j)


def near(b, h, i, j, reach):
    """A mask that does."""
    return abs(i - j) <= reach[b] + 3 * h


SCORE = {
    "score": lambda rng, full: tilted, "score_args": lambda rng, full: (0.1 * rng.standard_normal(full[:2]), 0.7)
}  # fmt: skip
MASK = {"mask": lambda rng, full: near, "mask_args": lambda rng, full: (rng.integers(0, 30, full[0]),)}
SEGMENTS = {"segment_ids": lambda rng, full: tuple(np.sort(rng.integers(0, 3, (full[0], n))) for n in full[2:])}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": "top_left", "scale": -0.4},
    "window": {"window": (6, 2)},
    "window and causal": {"window": (9, None), "causal": True},
    "softcap": {"softcap": 1.5},
    "slopes": {"alibi_slopes": lambda rng, full: rng.random(full[:2])},
    "one offset": {"q_offset": 3, "causal": True},
    "offsets": {"q_offset": lambda rng, full: rng.integers(-5, 20, full[0]), "causal": True},
    "bias": {"bias": pairs(0, 0, 0, 0)},
    "bias of all sequences": {"bias": pairs(1, 0, 0, 0), "causal": True},
    "bias of keys": {"bias": pairs(0, 1, 1, 0)},
    "bias of queries": {"bias": pairs(1, 1, 0, 1)},
    "mask": {"mask": lambda rng, full: rng.random(full) < 0.6},
    "sinks": {"sinks": lambda rng, full: rng.standard_normal(full[1])},
    "many": {
        "softcap": 2.0, "bias": pairs(0, 1, 0, 0), "sinks": lambda rng, full: rng.standard_normal(full[1]),
        "mask": lambda rng, full: rng.random((1, *full[1:])) < 0.7, "window": (30, 8),
        "alibi_slopes": lambda rng, full: rng.random(full[1]),
    },
    "score": SCORE,
    "score and causal": {**SCORE, "causal": True, "softcap": 3.0},
    "mask function": MASK,
    "both functions": {**SCORE, **MASK, "window": (20, 9)},
    "segments": SEGMENTS,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_is_alone(name):
    check(Packed(**OPTIONS[name]))


@pytest.mark.parametrize("tile", [Tile(block_m=8, block_n=8), Tile(block_m=16, block_n=64)])
@pytest.mark.parametrize("name", ["causal", "many"])
def test_tiles(name, tile):
    check(Packed(**OPTIONS[name]), tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-4), (ml_dtypes.bfloat16, 0.03)], ids=["simt", "sm80"])
@pytest.mark.parametrize("name", OPTIONS)
def test_on_a_gpu(gpu, name, dtype, bound):
    packed = Packed((300, 0, 33, 1, 129), (310, 20, 0, 1, 260), dtype=dtype, d=64, dv=72, **OPTIONS[name])
    check(packed, gpu.xp, bound)
    if name == "plain":  # without a look at the offsets, and longer than any sequence
        check(packed, gpu.xp, bound, max_seqlen_q=400, max_seqlen_k=512)


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_take_threads(causal):
    check(Packed((700, 3, 400), (300, 900, 2), causal=causal))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtypes(dtype):
    """16-bit results are rounded once from float32, as those of attention() are: to the same number or a neighbour."""
    got = Packed(dtype=dtype, causal=True)
    bound = 2 * float(ml_dtypes.finfo(dtype).eps) if np.dtype(dtype).itemsize == 2 else 2e-5
    check(got, bound=bound)


def test_dropout_counts_in_the_sequence():
    """The weights that fall are those of a batch of padded sequences."""
    packed = Packed(dropout=0.4, seed=2**40 + 3)
    out, lse, grads = packed.run(("q", "k", "v"))
    batch, _, queries, keys = packed.shape

    def padded(x, side, rows):
        full = np.zeros((batch, x.shape[1], rows, x.shape[2]))
        for b in range(batch):
            own = x[packed.sequence(b)[side]].swapaxes(0, 1)
            full[b, :, : own.shape[1]] = own
        return full

    q, dout = padded(packed.q, 0, queries), padded(packed.dout, 0, queries)
    k, v = padded(packed.k, 1, keys), padded(packed.v, 1, keys)
    lens = {"q_lens": np.diff(packed.cu[0]), "kv_lens": np.diff(packed.cu[1])}
    dlse = padded(packed.dlse.T[..., None], 0, queries)[..., 0]
    wanted = attention(q, k, v, return_lse=True, **lens, **packed.options)
    wanted_grads = attention_backward(dout, q, k, v, *wanted, dlse=dlse, **lens, **packed.options)
    undropped = Packed().run(("q", "k", "v"))
    np.testing.assert_allclose(lse, undropped[1], atol=1e-12)
    assert np.abs(out - undropped[0]).max() > 0.1
    for b in range(batch):
        rows, own = packed.sequence(b)
        n, m = rows.stop - rows.start, own.stop - own.start
        for got, want, part, count in (
            (out, wanted.out, rows, n), (grads["q"], wanted_grads.dq, rows, n),
            (grads["k"], wanted_grads.dk, own, m), (grads["v"], wanted_grads.dv, own, m),
        ):  # fmt: skip
            np.testing.assert_allclose(got[part].swapaxes(0, 1), want[b, :, :count], atol=1e-12)


def test_any_strides_and_outputs_in_place():
    packed = Packed(causal=True)
    want = packed.run(("q", "k", "v"))

    def strided(x):
        room = np.full((x.shape[1], 2 * x.shape[0], 3 * x.shape[2]), np.nan)
        view = room[::-1, 1::2, 2::3].swapaxes(0, 1)
        view[...] = x
        return view

    packed.q, packed.k, packed.v, packed.dout = map(strided, (packed.q, packed.k, packed.v, packed.dout))
    packed.dlse = np.repeat(packed.dlse, 2, 1)[:, ::2]
    packed.cu = tuple(np.repeat(cu.astype(np.int64), 3)[::3] for cu in packed.cu)
    got = packed.run(("q", "k", "v"))
    assert (got[0] == want[0]).all()
    assert (got[1] == want[1]).all()
    for name in want[2]:
        assert (got[2][name] == want[2][name]).all()
    out, lse = strided(np.full_like(want[0], np.nan)), np.full_like(want[1], np.nan)
    result = attention_varlen(packed.q, packed.k, packed.v, *packed.cu, causal=True, out=(out, lse))
    assert result.out is out
    assert result.lse is lse
    assert (out == want[0]).all()
    assert (lse == want[1]).all()
    into = AttentionGradients(dq=strided(np.full(packed.q.shape, np.nan)), dv=np.full(packed.v.shape, np.nan))
    g = attention_varlen_backward(
        packed.dout, packed.q, packed.k, packed.v, out, lse, *packed.cu, dlse=packed.dlse, causal=True, grads_out=into,
        wrt=("q", "v"),
    )  # fmt: skip
    assert g.dq is into.dq
    assert g.dk is None
    np.testing.assert_allclose(g.dq, want[2]["q"], atol=1e-12)
    np.testing.assert_allclose(into.dv, want[2]["v"], atol=1e-12)


def test_vjp():
    packed = Packed(**OPTIONS["many"])
    (out, lse), vjp = attention_varlen_vjp(
        packed.q, packed.k, packed.v, *packed.cu, return_lse=True, **packed.options
    )  # fmt: skip
    g = vjp(packed.dout, packed.dlse)
    want = packed.run(wrt_of(packed.options))
    assert (out == want[0]).all()
    assert (lse == want[1]).all()
    assert all((getattr(g, f"d{name}") == x).all() for name, x in want[2].items())
    alone, _ = attention_varlen_vjp(packed.q, packed.k, packed.v, *packed.cu, **packed.options)
    assert (alone == out).all()


@pytest.mark.parametrize(
    "lengths", [((), ()), ((0,), (0,)), ((0, 0), (3, 4)), ((3, 4), (0, 0)), ((5,), (5,)), ((0, 2, 0), (0, 0, 0))]
)
@pytest.mark.parametrize("spare", [0, SPARE])
def test_nothing_here_and_there(lengths, spare):
    check(Packed(*lengths, spare=spare, causal=True))
    check(Packed(*lengths, spare=spare, **OPTIONS["sinks"]))


def test_longer_bounds_than_sequences():
    packed = Packed(causal=True)
    want = packed.run(("q", "k", "v"))
    got = packed.run(("q", "k", "v"), max_seqlen_q=100, max_seqlen_k=np.int64(90))
    np.testing.assert_allclose(got[0], want[0], atol=1e-12)
    np.testing.assert_allclose(got[1], want[1], atol=1e-12)


@pytest.mark.parametrize(
    ("side", "cu", "error", "says"),
    [
        (0, [0, 3, 2, 5], ValueError, r"cu_seqlens_q\[1\]=3, cu_seqlens_q\[2\]=2"),
        (1, [0, 3, 2, 5], ValueError, r"cu_seqlens_k\[1\]=3, cu_seqlens_k\[2\]=2"),
        (0, [1, 2, 3, 5], ValueError, r"cu_seqlens_q\[0\]=1"),
        (1, [0, 2, 3, 13], ValueError, r"cu_seqlens_k\[-1\]=13: k has 12 rows"),
        (0, [0, 5], ValueError, "cu_seqlens_q has 2 numbers, cu_seqlens_k 4"),
        (0, [], ValueError, r"cu_seqlens_q.shape=\(0,\)"),
        (1, [[0, 1, 2, 3]], ValueError, r"cu_seqlens_k.shape=\(1, 4\)"),
    ],
)
def test_offsets_that_do_not_fit(side, cu, error, says):
    q = np.ones((12, 2, 8), np.float32)
    both = [np.array([0, 2, 3, 5]), np.array([0, 2, 3, 5])]
    both[side] = np.array(cu, np.int64)
    with pytest.raises(error, match=says):
        attention_varlen(q, q, q, *both)
    with pytest.raises(error, match=says):
        attention_varlen_backward(q, q, q, q, q, np.zeros((2, 12), np.float32), *both)


def test_arguments_that_do_not_fit():
    q, cu = np.ones((12, 2, 8), np.float32), np.array([0, 2, 3, 12])
    with pytest.raises(TypeError, match=r"cu_seqlens_q\.dtype=float64"):
        attention_varlen(q, q, q, cu * 1.0, cu)
    with pytest.raises(TypeError, match="cu_seqlens_k is a list"):
        attention_varlen(q, q, q, cu, [0, 2, 3, 12])
    with pytest.raises(ValueError, match="max_seqlen_k=8: the longest sequence of cu_seqlens_k has 9 rows"):
        attention_varlen(q, q, q, cu, cu, max_seqlen_k=8)
    with pytest.raises(ValueError, match="max_seqlen_q=-1"):
        attention_varlen(q, q, q, cu, cu, max_seqlen_q=-1)
    with pytest.raises(TypeError, match=r"max_seqlen_q=9\.0"):
        attention_varlen(q, q, q, cu, cu, max_seqlen_q=9.0)
    with pytest.raises(ValueError, match=r"k.shape=\(1, 12, 2, 8\): packed sequences have 3 axes"):
        attention_varlen(q, q[None], q, cu, cu)
    with pytest.raises(ValueError, match=r"bias.shape=\(3, 2, 8, 9\) does not broadcast"):
        attention_varlen(q, q, q, cu, cu, bias=np.zeros((3, 2, 8, 9)))
    with pytest.raises(ValueError, match=r"q_offset.shape=\(2,\)"):
        attention_varlen(q, q, q, cu, cu, causal=True, q_offset=np.array([1, 2]))
    with pytest.raises(ValueError, match="both place the diagonal"):
        attention_varlen(q, q, q, cu, cu, causal="top_left", q_offset=1)
    with pytest.raises(ValueError, match=r"out.shape=\(12, 2, 9\)"):
        attention_varlen(q, q, q, cu, cu, out=np.zeros((12, 2, 9), np.float32))
    with pytest.raises(ValueError, match=r"lse.shape=\(12, 2\)"):
        attention_varlen_backward(q, q, q, q, q, np.zeros((12, 2), np.float32), cu, cu)
    with pytest.raises(ValueError, match="k has 12 rows, v has 11"):
        attention_varlen(q, q, q[1:], cu, cu)


# ------------------------------------------------------------------------------------------------ explain, prepare


def test_explain_says_what_runs():
    packed = Packed(dtype=np.float16, causal=True)
    q, k, v = packed.q, packed.k, packed.v
    plan = explain_varlen(q, k, v, *packed.cu, causal=True)
    assert (plan.family, plan.direction) == ("cpu", "forward")
    plan = explain_varlen(q, k, v, *packed.cu, max_seqlen_q=512, max_seqlen_k=640, causal=True, device="sm_90")
    assert plan.family == "sm80"
    assert dict(plan.declined)["sm90"].startswith("q_lens, kv_lens, packed sequences: their tensor maps begin before")
    assert [step.name for step in plan.kernels] == ["packed_rest", "fwd_sm80"]
    assert plan.chain_k == 640
    plan = explain_varlen(q, k, v, *packed.cu, backward=True, wrt=("q",), tile=Tile(block_m=32), device="sm_90")
    assert (plan.direction, plan.block_m) == ("backward", 32)
    assert "dk" not in {name for step in plan.kernels for name in step.writes}
    functions = {"score": tilted, "score_args": (np.ones((6, 4)), 1.0), "mask": near, "mask_args": (np.ones(6, int),)}
    plan = explain_varlen(q, k, v, *packed.cu, family="sm80", device="sm_90", **functions)
    assert plan.family == "sm80"
    assert plan.kernels[-1].spec.has_score
    assert plan.kernels[-1].spec.mask_function


@pytest.mark.parametrize(("family", "dtype"), [("sm90", np.float16), ("sm80", np.float16), ("simt", np.float32)])
def test_workspace_is_that_of_the_rows_there_are(family, dtype, monkeypatch):
    """One long sequence among many short ones: not as if all were as long."""
    monkeypatch.setattr(_plan_sm90, "TAKES_LENGTHS", True)
    x, ones = np.broadcast_to(np.zeros((), dtype), (8192, 4, 64)), np.full(4096, 1)
    bytes_ = {}
    for longest in (1, 4096):
        cu = offsets((longest, *ones))
        plan = explain_varlen(x, x, x, cu, cu, backward=True, family=family, device="sm_90", tile=Tile(block_m=64))
        bytes_[longest] = plan.workspace
    assert bytes_[1] == bytes_[4096] < 2**30


def test_explain_and_prepare_check_as_the_call_does():
    packed = Packed()
    x, cu = (packed.q, packed.k, packed.v), packed.cu
    for function in (attention_varlen, explain_varlen, prepare_varlen):
        with pytest.raises(ValueError, match="max_seqlen_k=8: the longest"):
            function(*x, *cu, max_seqlen_k=8)
        with pytest.raises(ValueError, match=r"out.shape=\(3, 4, 24\)"):
            function(*x, *cu, out=np.zeros((3, 4, 24)))
        with pytest.raises(TypeError, match="score_args has 1 values and score is None"):
            function(*x, *cu, score_args=(1.0,))
        with pytest.raises(ValueError, match=r"segment_ids\[0\].shape=\(6, 63\)"):
            function(*x, *cu, segment_ids=(np.zeros((6, 63), int), np.zeros((6, 64), int)))
    with pytest.raises(ValueError, match=r"wrt=\('q',\) without backward=True"):
        explain_varlen(*x, *cu, wrt=("q",))
    with pytest.raises(ValueError, match="deterministic=False without backward=True"):
        explain_varlen(*x, *cu, deterministic=False)
    with pytest.raises(ValueError, match="device='sm_12'"):
        explain_varlen(*x, *cu, device="sm_12")
    prepare_varlen(*x, *cu)


# ---------------------------------------------------------------------------------------------- kernels, emulated

# Lengths below, at and beyond blocks, alone and side by side.
EMULATED_Q, EMULATED_K = (70, 0, 1, 64, 33), (33, 20, 0, 64, 130)


@pytest.fixture
def emulator():
    why_not()


def device(seed, arch):
    """Under the race checker, each launch under a schedule of its own."""
    return Device(lambda n: Schedule.draw(seed and 100 * seed + n), arch=arch, undefined=PROFILE != "ci")


def bound_of(dtype):
    """P and dS of 16-bit types are rounded once each, as is the result, to u of their own; other sums are short."""
    return {2: 8 * float(ml_dtypes.finfo(dtype).eps), 4: 2e-5, 8: 1e-12}[np.dtype(dtype).itemsize]


FAMILIES = {
    "sm80": ("sm80", np.float16, 90, 40, 24),
    "sm80 wide": ("sm80", ml_dtypes.bfloat16, 80, 136, 64),
    "simt": ("simt", np.float32, 75, 20, 33),
    "sm80 float64": ("sm80", np.float64, 90, 20, 33),
    "sm80 float32": ("sm80", np.float32, 80, 40, 24),
    "sm90 float32": ("sm90", np.float32, 90, 40, 72),
    "simt float64": ("simt", np.float64, 75, 16, 16),
    "simt wide": ("simt", np.float32, 90, 130, 40),
    "sm90": ("sm90", np.float16, 90, 40, 24),
    "sm90 bfloat16": ("sm90", ml_dtypes.bfloat16, 90, 100, 128),
    "sm90 wide": ("sm90", ml_dtypes.bfloat16, 90, 136, 64),
}


def asked(family, dtype):
    """What makes a family take a call; float32 is sm90's own forward, and sm80's backward."""
    if dtype is np.float32 and family != "simt":
        return {"family": None if family == "sm90" else family, "precision": "highest"}
    return {"family": family}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.share(5)
def test_kernels(emulator, family, name):
    family, dtype, arch, d, dv = FAMILIES[family]
    with device(3, arch) as xp:
        packed = Packed(EMULATED_Q, EMULATED_K, dtype, d, dv, **OPTIONS[name])
        check(packed, xp, bound_of(dtype), **asked(family, dtype))


@pytest.mark.parametrize(
    "family", ["sm80", "sm80 float64", "sm80 float32", "simt", "sm90", "sm90 wide", "sm90 float32"]
)
@pytest.mark.parametrize("seed", [0, 5])
def test_kernels_under_schedules(emulator, family, seed):
    """Plain causal calls, in order and with several blocks at a time; a fixed order and that of arrival."""
    family, dtype, arch, d, dv = FAMILIES[family]
    for deterministic in (True, False):
        with device(seed, arch) as xp:
            packed = Packed(EMULATED_Q, EMULATED_K, dtype, d, dv, causal=True)
            arrays = map(xp.asarray, (packed.q, packed.k, packed.v, *packed.cu))
            result, vjp = attention_varlen_vjp(
                *arrays, causal=True, return_lse=True, deterministic=deterministic, **asked(family, dtype)
            )  # fmt: skip
            g = vjp(xp.asarray(packed.dout), xp.asarray(packed.dlse))
            got = [x.get().astype(np.float64) for x in (result.out, g.dq, g.dk, g.dv)]
        out, _, grads = packed.each(("q", "k", "v"))
        for x, y in zip(got, (out, *grads.values()), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=bound_of(dtype) * max(1, np.abs(y).max()))


def test_tiles_that_heads_share(emulator):
    """Few queries of many heads: rows of a tile are (query, head) pairs."""
    with device(2, 80) as xp:
        packed = Packed((3, 0, 1, 9), (40, 5, 90, 70), np.float16, 64, 64, causal=True)
        packed.k, packed.v = packed.k[:, :1], packed.v[:, :1]
        arrays = map(xp.asarray, (packed.q, packed.k, packed.v, *packed.cu))
        out, lse = (x.get() for x in attention_varlen(*arrays, causal=True, return_lse=True))
    for b in range(4):
        rows, keys = packed.sequence(b)
        x = (packed.q[rows], packed.k[keys], packed.v[keys])
        want = attention(*x, causal=True, layout="shd", return_lse=True)
        np.testing.assert_allclose(out[rows].astype(float), want.out.astype(float), atol=4e-3)
        np.testing.assert_allclose(lse[:, rows], want.lse, atol=1e-4)
    assert (out[packed.cu[0][-1] :] == 0).all()


def test_dropout_of_kernels(emulator):
    """The same weights fall as on the CPU."""
    packed = Packed(EMULATED_Q, EMULATED_K, np.float64, 16, 16, dropout=0.3, seed=77)
    want = packed.run(("q", "k", "v"))
    with device(1, 75) as xp:
        got = packed.run(("q", "k", "v"), xp)
    for x, y in zip((*got[:2], *got[2].values()), (*want[:2], *want[2].values()), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (3, 4)), ((3, 4), (0, 0))])
def test_kernels_with_nothing_here_and_there(emulator, lengths):
    with device(1, 75) as xp:
        check(Packed(*lengths, d=16, dv=16, **OPTIONS["sinks"]), xp)


def test_offsets_of_any_kind(emulator, monkeypatch):
    """int32, int64, strided, from the host: the same bits. With bounds given, nothing is copied to the host."""
    packed = Packed(EMULATED_Q, EMULATED_K, np.float64, 16, 16)
    with device(0, 75) as xp:
        q, k, v = map(xp.asarray, (packed.q, packed.k, packed.v))
        kinds = {
            "int32": [xp.asarray(cu) for cu in packed.cu],
            "int64": [xp.asarray(cu.astype(np.int64)) for cu in packed.cu],
            "strided": [xp.asarray(np.repeat(cu.astype(np.int64), 2)[::-1].copy())[::-2] for cu in packed.cu],
            "host": list(packed.cu),
        }
        outs = {name: attention_varlen(q, k, v, *cu).get() for name, cu in kinds.items()}
        assert all((out == outs["int32"]).all() for out in outs.values())

        def refuse(self):
            raise AssertionError("copied to the host")

        with monkeypatch.context() as context:
            context.setattr(xp.ndarray, "get", refuse)
            bounds = {"max_seqlen_q": max(EMULATED_Q), "max_seqlen_k": max(EMULATED_K)}
            bounded = [attention_varlen(q, k, v, *cu, **bounds) for cu in kinds.values()]
            with pytest.raises(AssertionError, match="copied"):
                attention_varlen(q, k, v, *kinds["int32"], max_seqlen_q=70)
        assert all((out.get() == outs["int32"]).all() for out in bounded)


# What an array of the device may hold, unseen by the host.
WRONG = {
    "falling": [0, 9, 3, 12, 12],
    "beyond": [0, 5, 40, 1000, 2**31 - 1],
    "negative": [-7, -1, 2, 8, -3],
    "not from 0": [4, 6, 8, 9, 11],
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("family", ["sm80", "sm80 float64", "sm80 float32", "simt float64", "sm90", "sm90 float32"])
def test_wrong_offsets_stay_inside(emulator, name, family, monkeypatch):
    """Nothing outside the arrays is read or written, which the emulator would report; those who ask are told."""
    family, dtype, arch, *_ = FAMILIES[family]
    q = np.ones((12, 2, 16), dtype)
    with device(4, arch) as xp:
        x, cu, right = xp.asarray(q), xp.asarray(np.array(WRONG[name])), xp.asarray(np.array([0, 3, 3, 9, 12]))
        bounds = {"max_seqlen_q": 6, "max_seqlen_k": 6, **asked(family, dtype)}
        out, lse = attention_varlen(x, x, x, right, cu, return_lse=True, **bounds)
        # Where sequences overlap, two write the same rows, of which the emulator would tell.
        overlap = name == "falling"
        wrt = ("q",) if overlap else ("q", "k", "v")
        attention_varlen_backward(x, x, x, x, out, lse, right, cu, wrt=wrt, **bounds)
        if not overlap:
            ones = xp.asarray(np.ones((2, 12), lse.dtype))  # not every row of an lse would be written
            attention_varlen(x, x, x, cu, right, **bounds)
            attention_varlen_backward(x, x, x, x, x, ones, cu, right, **bounds)
        monkeypatch.setenv("CUPYFLASH_CHECK", "1")
        with pytest.raises(ValueError, match="cu_seqlens_k"):
            attention_varlen(x, x, x, right, cu, **bounds)


def test_prepare_compiles_what_the_call_runs(emulator, monkeypatch):
    packed = Packed((40,), (40,), np.float16, 16, 16)
    with device(0, 90) as xp:
        x = [xp.asarray(x) for x in (packed.q, packed.k, packed.v, *packed.cu)]
        args = xp.asarray(np.ones((1, 4))), 1.0
        bounds = {"max_seqlen_q": 64, "max_seqlen_k": 64, "score": tilted, "score_args": args}
        prepare_varlen(*x, **bounds)
        known = dict(_compile._loaded)
        _, vjp = attention_varlen_vjp(*x, **bounds)
        vjp(xp.asarray(packed.dout))
        assert _compile._loaded == known


def test_devices_and_families(emulator):
    packed = Packed((40,), (40,), np.float16, 16, 16)
    with device(0, 90) as xp:
        q, k, v = map(xp.asarray, (packed.q, packed.k, packed.v))
        cu = tuple(map(xp.asarray, packed.cu))
        with pytest.raises(ValueError, match="family='cpu' with CuPy arrays"):
            attention_varlen(q, k, v, *cu, family="cpu")
        with pytest.raises(TypeError, match="cu_seqlens_q is a CuPy array, q a NumPy array"):
            attention_varlen(packed.q, packed.k, packed.v, *cu)


# ------------------------------------------------------------------------------------------------ kernels, compiled

COMPILED = [("sm_60", "simt", np.float32), ("sm_86", "simt", np.float64), ("sm_80", "sm80", np.float16)]
COMPILED += [("sm_80", "sm80", np.float32), ("sm_80", "sm80", np.float64), ("sm_90", "sm80", np.float64)]
COMPILED += [("sm_90", "sm90", ml_dtypes.bfloat16)]


@pytest.mark.nvrtc
@pytest.mark.parametrize(("card", "family", "dtype"), COMPILED)
@pytest.mark.share(2)
def test_kernels_compile(card, family, dtype, monkeypatch):
    """Without spills, and with the shared memory that the plan counts."""
    monkeypatch.setattr(_plan_sm90, "TAKES_LENGTHS", True)
    packed = Packed((300, 200), (300, 200), dtype, 128, 128)
    call = Asked(causal=True, layout="shd", precision=asked(family, dtype).get("precision"))
    problem = PackedCall(packed.q, packed.k, packed.v, call, packed.cu, (None, None)).problem
    plans = [plan_gpu(problem, DEVICES[card], family, None, wrt) for wrt in (None, frozenset("qkv"))]
    assert {plan.family for plan in plans} == {family}
    assert [plan.kernels[0].name for plan in plans] == ["packed_rest"] * 2
    for step in (step for plan in plans for step in plan.kernels):
        compiled = nvrtc.compile_spec(step.spec, step.smem, "sm_90a" if family == "sm90" else card)
        # Where accumulators fill the registers a word may be too much; so may one in a search for sequences.
        most = {np.float64: 32, np.float32: 8 if family == "sm80" else 0}.get(dtype, 8 if family == "sm90" else 0)
        assert compiled.spill_bytes <= most, compiled.log



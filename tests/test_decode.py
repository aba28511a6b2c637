# ruff: noqa: E501  (a table is read by its rows)
"""Decoding: against the dense specification, whatever the cache looks like; nothing outside it is read or written."""

import dataclasses
import doctest
import functools
import inspect
import itertools
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from conftest import PROFILE
from emulator import Device, Schedule, why_not

import cupyflash
from cupyflash import Rotary, Tile, attention, decode, explain_decode
from cupyflash._plan import DEVICES
from cupyflash.testing import data, decoding, reference
from cupyflash.testing.data import GPU_STYLES, OUTPUT_STYLES, place, place_empty
from cupyflash.testing.functions import SCORES, Sizes

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    """One decoding call. Lengths are drawn; the first entry is full, the last one has as few rows as can be."""

    seed: int = 0
    dtype: type = np.float32
    batch: int = 2
    heads_k: int = 2
    group: int = 2
    rows: int = 1  # T
    head_dim: int = 16
    head_dim_v: int = 16
    capacity: int = 40  # in rows; whole pages where there are pages
    page_size: int = 0
    append: bool = False
    rotary: int = 0  # columns
    interleaved: bool = False
    styles: tuple = ("plain", "plain", "plain")  # q, caches, new rows and out
    window: tuple | None = None
    softcap: float | None = None
    scale: float | None = None
    slopes: bool = False
    sinks: bool = False
    score: str | None = None
    out32: bool = False

    @property
    def columns(self):
        """Pages of an entry."""
        return -(-self.capacity // self.page_size)

    def make(self, xp=np, check=True):
        """Arguments and options of the call, in poison; what the specification sees of it; all that is placed."""
        rng = np.random.default_rng(self.seed)
        most = (self.columns * self.page_size if self.page_size else self.capacity) - (self.rows if self.append else 0)
        lens = rng.integers(0, most + 1, self.batch)
        lens[:1], lens[1:2] = most, 0
        arrays = {"q": rng.standard_normal((self.batch, self.heads_k * self.group, self.rows, self.head_dim))}
        widths = {"k": self.head_dim, "v": self.head_dim_v}
        table = None
        if self.page_size:
            pages = self.batch * self.columns + 3
            table = rng.permutation(pages)[: self.batch * self.columns].reshape(self.batch, self.columns).astype(np.int32)
            total = lens + (self.rows if self.append else 0)
            unused = np.arange(self.columns) >= -(-total[:, None] // self.page_size)
            table[unused] = rng.choice([-1, -(2**31), 2**31 - 1, pages], unused.sum())
        for side, width in widths.items():
            shape = (self.batch, self.heads_k, self.capacity, width)
            if self.page_size:
                shape = (pages, self.page_size, self.heads_k, width)
            cache = np.full(shape, np.nan)
            for b in range(self.batch):
                for j in range(lens[b]):
                    row = rng.standard_normal((self.heads_k, width))
                    if self.page_size:
                        cache[table[b, j // self.page_size], j % self.page_size] = row
                    else:
                        cache[b, :, j] = row
            arrays[f"{side}_cache"] = cache
            if self.append:
                arrays[f"{side}_new"] = rng.standard_normal((self.batch, self.heads_k, self.rows, width))
        style = dict(zip(("q", "k_cache", "k_new"), self.styles, strict=True))
        style |= {"v_cache": style["k_cache"], "v_new": style["k_new"]}
        placed = {name: place(x.astype(self.dtype), style[name], xp) for name, x in arrays.items()}
        if xp is not np:  # what is there is known to be, though a launch may write it
            for name in ("k_cache", "v_cache"):
                placed[name].array[...] = placed[name].array
        options = {"window": self.window, "softcap": self.softcap, "scale": self.scale}
        heads = self.heads_k * self.group
        if self.slopes:
            options["alibi_slopes"] = rng.random(heads).astype(np.float32)
        if self.sinks:
            options["sinks"] = rng.standard_normal(heads)
        if self.score:
            room = self.columns * self.page_size if self.page_size else self.capacity
            sizes = Sizes(self.batch, heads, max(self.rows, 1), room)
            options |= {"score": SCORES[self.score].function, "score_args": SCORES[self.score].args(rng, sizes)}
        cache = {"page_table": table, "rotary": None}
        if self.rotary:
            angles = rng.uniform(0, 6, (max(most, 0) + self.rows + 2, self.rotary // 2))
            kind = np.float64 if self.dtype == np.float64 else np.float32
            cache["rotary"] = Rotary(np.cos(angles).astype(kind), np.sin(angles).astype(kind), self.interleaved)
        return Made(self, lens, placed, cache, options, xp)


class Made:
    """A case's arrays."""

    def __init__(self, case, lens, placed, cache, options, xp):
        self.case, self.lens, self.placed, self.cache, self.options, self.xp = case, lens, placed, cache, options, xp
        self.before = {name: np.array(p.values) for name, p in placed.items()}
        q = self.before["q"]
        accumulator = np.float64 if q.dtype == np.float64 else np.float32
        out_dtype = np.dtype(np.float32) if case.out32 and q.dtype.itemsize == 2 else q.dtype
        shape = (*q.shape[:3], case.head_dim_v)
        self.out = place_empty(shape, out_dtype, case.styles[2], xp)
        self.lse = place_empty(shape[:3], accumulator, "plain", xp)

    def arguments(self):
        """Positional arguments and options of decode()."""
        on = self.xp.asarray
        kv_lens = on(self.lens if self.case.seed % 2 else self.lens.astype(np.int32))
        found = {name: self.placed[name].array for name in ("q", "k_cache", "v_cache")}
        more = {name: self.placed[name].array for name in ("k_new", "v_new") if name in self.placed}
        given = {name: _on(x, on) for name, x in (self.cache | self.options).items()}
        return (*found.values(), kv_lens), more | given

    def seen(self):
        """What the specification sees."""
        b, new = self.before, {name: self.before[name] for name in ("k_new", "v_new") if name in self.before}
        return decoding.seen(b["q"], b["k_cache"], b["v_cache"], self.lens, **new, **self.cache)

    def run(self, **more):
        """Run, and check results, the cache and all bytes around."""
        args, options = self.arguments()
        result = decode(*args, **options, out=(self.out.array, self.lse.array), **more)
        out, lse = (data.to_numpy(x) for x in result)
        self.check(out, lse, **more)
        return out, lse

    def check(self, out, lse, **more):
        case, this = self.case, self.seen()
        args, options = self.arguments()
        plan = explain_decode(*args, **options, **more)
        by = 0.0
        if case.rotary:
            cos, sin, _ = self.cache["rotary"]
            by = decoding.turn_limit(self.before["q"], cos, sin)
            if case.append:
                by = np.maximum(by, decoding.turn_limit(self.before["k_new"], cos, sin).max(initial=0))
        merged = 4 * (plan.splits.number if self.xp is not np else 1)  # and the warps of a block
        report = decoding.check(
            this, out, lse, turned_by=by, merged=merged, p_dtype=self.before["q"].dtype if plan.rounds_p else None,
            p_parts=plan.p_parts,
            **{name: x for name, x in self.options.items() if x is not None},
        )  # fmt: skip
        assert report.ok, f"{case}\n{report}"
        self.check_memory(this)

    def check_memory(self, this):
        """New rows are where they belong; nothing else has changed."""
        for name, p in self.placed.items():
            if not (self.case.append and name.endswith("cache")):
                assert p.unwritten(), name
                continue
            assert p.guards_intact(), name
            want, new = self.before[name].copy(), self.before[f"{name[0]}_new"]
            got = p.values
            if name == "k_cache" and self.case.rotary:
                cos, sin, interleaved = self.cache["rotary"]
                places = self.lens[:, None] + np.arange(self.case.rows)
                exact = decoding.turned(new, cos, sin, places, interleaved)
                limit = decoding.turn_limit(new, cos, sin)
            else:
                exact, limit = new.astype(np.float64), np.zeros(1)
            for b, n in enumerate(self.lens):
                for t in range(self.case.rows):
                    j = int(n) + t
                    size, table = self.case.page_size, self.cache["page_table"]
                    at = (table[b, j // size], j % size) if size else (b, slice(None), j)
                    error = abs(got[at].astype(exact.dtype) - exact[b, :, t])
                    assert (error <= np.broadcast_to(limit, exact.shape)[b, :, t]).all(), (name, b, t)
                    want[at] = got[at]
            assert want.tobytes() == got.tobytes(), name
        assert self.out.guards_intact()
        assert self.lse.guards_intact()


def _on(x, asarray):
    """An option as a call on arrays of another kind takes it."""
    if isinstance(x, Rotary):
        return Rotary(asarray(x.cos), asarray(x.sin), x.interleaved)
    if isinstance(x, tuple):
        return tuple(_on(y, asarray) for y in x)
    return asarray(x) if isinstance(x, np.ndarray) else x


def cases(dtypes=DTYPES, styles=OUTPUT_STYLES, widths=(1, 2, 7, 16, 24, 33), rows=16, most=90):
    """Cases of all kinds."""
    width = st.sampled_from(widths)
    return st.builds(
        Case, seed=st.integers(0, 2**20), dtype=st.sampled_from(dtypes), batch=st.integers(0, 3),
        heads_k=st.integers(1, 2), group=st.sampled_from([1, 2, 3, 7]), rows=st.integers(0, rows),
        head_dim=width, head_dim_v=width, capacity=st.integers(rows, most),
        page_size=st.sampled_from([0, 0, 1, 3, 16, 64]), append=st.booleans(),
        rotary=st.sampled_from([0, 0, 2, 6, 16]), interleaved=st.booleans(),
        styles=st.tuples(*[st.sampled_from(styles)] * 3),
        window=st.sampled_from([None, None, (5, 0), (None, 3), (0, None)]), softcap=st.sampled_from([None, None, 2.0]),
        scale=st.sampled_from([None, 0.3, -0.5, 0.0]), slopes=st.booleans(), sinks=st.booleans(),
        score=st.sampled_from([None, None, None, *SCORES]), out32=st.booleans(),
    ).map(lambda case: dataclasses.replace(case, rotary=min(case.rotary, case.head_dim // 2 * 2)))  # fmt: skip


@hypothesis.settings(max_examples=120)
@hypothesis.given(cases())
def test_any_case(case):
    case.make().run()


NAMED = {
    "one query": Case(),
    "speculative": Case(rows=5, append=True, group=4),
    "pages": Case(page_size=16, rows=3),
    "pages of 1": Case(page_size=1, append=True),
    "rotary": Case(append=True, rotary=8, rows=2),
    "rotary of all, interleaved, pages": Case(append=True, rotary=16, interleaved=True, page_size=7),
    "window": Case(rows=4, window=(9, 0), capacity=70),
    "softcap, slopes, sinks": Case(rows=4, softcap=2.0, slopes=True, sinks=True, append=True, page_size=16),
    "distance": Case(rows=3, score="distance"),
    "16 queries": Case(rows=16, append=True, capacity=50, head_dim_v=24),
    "wide": Case(head_dim=72, head_dim_v=40, capacity=200, page_size=16),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMED)
def test_named_cases(name, dtype):
    dataclasses.replace(NAMED[name], dtype=dtype).make().run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_and_contiguous_caches_give_the_same_bits(dtype):
    """Whatever the pages' size and order; with the same options, appended rows among them."""
    rng = np.random.default_rng(0)
    q, k_new = (rng.standard_normal((3, heads, 2, 24)).astype(dtype) for heads in (4, 2))
    v_new = rng.standard_normal((3, 2, 2, 16)).astype(dtype)
    k, v = (rng.standard_normal((3, 2, 1200, width)).astype(dtype) for width in (24, 16))
    lens = np.array([1198, 40, 0])
    angles = rng.standard_normal((1200, 12))
    options = {"k_new": k_new, "v_new": v_new, "window": (1000, 0), "rotary": Rotary(np.cos(angles), np.sin(angles))}
    want = decode(q, k.copy(), v.copy(), lens, return_lse=True, **options)
    for size in (1, 16, 48, 1200):
        pages = 3 * (1200 // size)
        table = rng.permutation(pages).reshape(3, -1).astype(np.int32)
        caches = []
        for x in (k, v):
            cache = np.empty((pages, size, 2, x.shape[-1]), dtype)
            cache[table] = x.reshape(3, 2, -1, size, x.shape[-1]).transpose(0, 2, 3, 1, 4)
            caches.append(cache)
        got = decode(q, *caches, lens, page_table=table, return_lse=True, **options)
        for x, y in zip(got, want, strict=True):
            assert x.tobytes() == y.tobytes(), size


def test_bits_do_not_depend_on_the_batch():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((5, 2, n, 16)).astype(np.float32) for n in (3, 700, 700))
    lens = np.array([700, 3, 0, 512, 129])
    together = decode(q, k, v, lens)
    for b in range(5):
        for more in ({}, {"num_splits": 3}, {"batch_invariant": False}):
            alone = decode(q[b : b + 1], k[b : b + 1], v[b : b + 1], lens[b : b + 1], **more)
            assert alone.tobytes() == together[b : b + 1].tobytes()


def test_steps_are_one_attention():
    """Row after row, and chunk after chunk, of one sequence: causal attention of all of it."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, heads, 30, 16)) for heads in (4, 2, 2))
    want = attention(q, k, v, causal=True)
    for chunks in ([1] * 30, [13, 1, 1, 7, 8], [30]):
        cache = np.full((2, 2, 2, 30, 16), np.nan)
        outs, begin = [], 0
        for n in chunks:
            rows = slice(begin, begin + n)
            outs.append(decode(q[:, :, rows], *cache, begin, k_new=k[:, :, rows], v_new=v[:, :, rows]))
            begin += n
        np.testing.assert_allclose(np.concatenate(outs, axis=2), want, rtol=0, atol=1e-13)
        assert (cache == np.stack([k, v])).all()


def test_chunks_of_a_prefill_through_q_offset(backend):
    """attention() against what a cache holds so far: each chunk's rows are those of one call over all."""
    rng = np.random.default_rng(9)
    q, k, v = (backend.array(rng.standard_normal((2, heads, 100, 16)), np.float32) for heads in (4, 2, 2))
    for window in (None, (20, 0)):
        want = backend.numpy(attention(q, k, v, causal=True, window=window))
        for begin, end in ((0, 37), (37, 38), (38, 100)):
            got = attention(q[:, :, begin:end], k, v, causal=True, q_offset=begin, kv_lens=end, window=window)
            np.testing.assert_allclose(backend.numpy(got), want[:, :, begin:end], rtol=0, atol=2e-6)


def test_the_page_on_decoding_is_true():
    """docs/decoding.md: its examples run, one after the other."""
    page = Path(__file__).resolve().parent.parent / "docs" / "decoding.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)
    assert len(test.examples) > 20
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert "".join(report) == ""


def test_entries_may_share_pages():
    """A common beginning, read by both; each grows in pages of its own."""
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((2, 5, 4, 1, 8))
    q, k_new, v_new = rng.standard_normal((3, 2, 1, 1, 8))
    table = np.array([[0, 1, 2], [0, 1, 3]], np.int32)
    sides = (k, k_new), (v, v_new)
    rows = [[np.concatenate([x[0, :, 0], x[1, :, 0], new[b, 0]])[None] for x, new in sides] for b in (0, 1)]
    want = [attention(q[b], *rows[b]) for b in (0, 1)]
    got = decode(q, k, v, 8, page_table=table, k_new=k_new, v_new=v_new)
    np.testing.assert_allclose(got, np.stack(want), rtol=0, atol=1e-14)


def test_without_an_lse_and_with_numbers_of_any_kind():
    q, k, v = (np.ones((2, 2, n, 8), np.float32) for n in (1, 20, 20))
    assert isinstance(decode(q, k, v, 7), np.ndarray)
    for lens in (7, np.int16(7), np.array(7), np.array([7]), np.array([7, 7], np.uint8)):
        assert (decode(q, k, v, lens, return_lse=True).lse == np.float32(8**0.5 + np.log(7))).all()
    assert decode(q, k, v, 0, sinks=np.ones(2), return_lse=True).lse.tolist() == [[[1], [1]]] * 2


# ----------------------------------------------------------------------------------------------------------- errors

F32 = np.float32


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


def good(**changed):
    """A good call: 2 entries, 4 heads over 2, 3 queries of width 8, room for 20 rows."""
    found = {
        "q": ones(2, 4, 3, 8), "k_cache": ones(2, 2, 20, 8), "v_cache": ones(2, 2, 20, 7), "kv_lens": np.array([4, 17])
    }  # fmt: skip
    return found | changed


def paged(**changed):
    """The same in pages of 5."""
    found = {
        "k_cache": ones(8, 5, 2, 8), "v_cache": ones(8, 5, 2, 7),
        "page_table": np.array([[0, 1, 99, 99], [2, 3, 4, 5]], np.int32),
    }  # fmt: skip
    return good(**found | changed)


NEW = {"k_new": ones(2, 2, 3, 8), "v_new": ones(2, 2, 3, 7)}
TABLE = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], np.int32)
ROTARY = Rotary(ones(20, 4), ones(20, 4))
BASE = np.zeros(400, F32)


def frozen(x):
    x.flags.writeable = False
    return x


# fmt: off
WRONG = {
    "3 axes of q": (good(q=ones(4, 3, 8)), ValueError, ["q.shape=(4, 3, 8)", "(batch, Hq, T, D)"]),
    "3 axes of a cache": (good(k_cache=ones(2, 20, 8)), ValueError, ["k_cache.shape=(2, 20, 8)"]),
    "caches differ": (good(v_cache=ones(2, 2, 21, 7)), ValueError, ["v_cache.shape=(2, 2, 21, 7)", "the same"]),
    "batch": (good(q=ones(3, 4, 3, 8)), ValueError, ["k_cache.shape=(2, 2, 20, 8)", "q.shape=(3, 4, 3, 8)"]),
    "heads": (good(q=ones(2, 3, 3, 8)), ValueError, ["3", "2", "multiple"]),
    "widths": (good(q=ones(2, 4, 3, 9)), ValueError, ["q.shape[-1]=9"]),
    "dtypes": (good(k_cache=ones(2, 2, 20, 8, dtype=np.float64)), TypeError, ["k_cache.dtype=float64", "q.dtype=float32"]),
    "integers": (good(q=ones(2, 4, 3, 8, dtype=int), k_cache=ones(2, 2, 20, 8, dtype=int), v_cache=ones(2, 2, 20, 7, dtype=int)), TypeError, ["q.dtype=int64"]),
    "lens too long": (good(kv_lens=np.array([4, 21])), ValueError, ["kv_lens", "4 to 21", "20 rows"]),
    "lens negative": (good(kv_lens=-1), ValueError, ["-1"]),
    "lens of floats": (good(kv_lens=np.array([4.0, 5.0])), TypeError, ["kv_lens.dtype=float64"]),
    "lens a float": (good(kv_lens=4.0), TypeError, ["kv_lens"]),
    "lens of another batch": (good(kv_lens=np.array([4, 5, 6])), ValueError, ["kv_lens.shape=(3,)"]),
    "no room": (good(kv_lens=18, **NEW), ValueError, ["18 to 18", "20 rows", "3 are for new ones"]),
    "room for nothing": (good(k_cache=ones(2, 2, 2, 8), v_cache=ones(2, 2, 2, 7), kv_lens=0, **NEW), ValueError, ["2 rows", "3"]),
    "k_new alone": (good(k_new=NEW["k_new"]), ValueError, ["k_new without v_new"]),
    "k_new's shape": (good(**NEW | {"k_new": ones(2, 2, 2, 8)}), ValueError, ["k_new.shape=(2, 2, 2, 8)", "(2, 2, 3, 8)"]),
    "v_new's dtype": (good(**NEW | {"v_new": ones(2, 2, 3, 7, dtype=np.float16)}), TypeError, ["v_new.dtype=float16"]),
    "read-only cache": (good(k_cache=frozen(ones(2, 2, 20, 8)), **NEW), ValueError, ["k_cache is read-only"]),
    "broadcast cache": (good(v_cache=np.lib.stride_tricks.as_strided(BASE, (2, 2, 20, 7), (0, 0, 28, 4)), **NEW), ValueError, ["v_cache.strides", "share memory"]),
    "one cache for both": (good(k_cache=BASE[:320].reshape(2, 2, 20, 4), v_cache=BASE[:320].reshape(2, 2, 20, 4), q=ones(2, 4, 3, 4), k_new=ones(2, 2, 3, 4), v_new=ones(2, 2, 3, 4)), ValueError, ["shares memory"]),
    "table of int64": (paged(page_table=TABLE.astype(np.int64)), TypeError, ["page_table.dtype=int64", "int32"]),
    "table's shape": (paged(page_table=TABLE[:1]), ValueError, ["page_table.shape=(1, 4)"]),
    "table too short": (paged(page_table=TABLE[:, :3]), ValueError, ["4 to 17", "15 rows"]),
    "page that is not": (paged(page_table=np.array([[0, 1, 2, 3], [4, 5, 8, 7]], np.int32)), ValueError, ["page_table[1, 2]=8", "0 to 7"]),
    "page below 0": (paged(page_table=np.array([[-1, 1, 2, 3], [4, 5, 6, 7]], np.int32)), ValueError, ["page_table[0, 0]=-1"]),
    "page for a new row": (paged(page_table=np.array([[0, 9, 2, 3], [4, 5, 6, 7]], np.int32), **NEW), ValueError, ["page_table[0, 1]=9"]),
    "two new rows in one place": (paged(page_table=np.array([[0, 1, 2, 3], [0, 1, 2, 3]], np.int32), kv_lens=np.array([4, 4]), **NEW), ValueError, ["gets a new row"]),
    "new row in another's": (paged(page_table=np.array([[0, 1, 2, 3], [4, 5, 0, 7]], np.int32), kv_lens=np.array([2, 15]), **NEW), ValueError, ["row 2 of page 0", "entry 1"]),
    "pages of no rows": (paged(k_cache=ones(8, 0, 2, 8), v_cache=ones(8, 0, 2, 7)), ValueError, ["at least one row"]),
    "rotary": (good(rotary=(ones(20, 4), ones(20, 4))), TypeError, ["rotary is a tuple", "Rotary"]),
    "rotary's shapes": (good(rotary=Rotary(ones(20, 4), ones(20, 3))), ValueError, ["rotary.sin.shape=(20, 3)"]),
    "rotary too wide": (good(rotary=Rotary(ones(20, 5), ones(20, 5))), ValueError, ["rotary.cos.shape[1]=5"]),
    "rotary too short": (good(rotary=Rotary(ones(16, 4), ones(16, 4))), ValueError, ["rotary.cos has 16 rows", "key 16"]),
    "rotary's dtype": (good(rotary=Rotary(ones(20, 4, dtype=int), ones(20, 4))), TypeError, ["rotary.cos.dtype=int64"]),
    "rotary's flag": (good(rotary=Rotary(ones(20, 4), ones(20, 4), 1)), TypeError, ["rotary.interleaved=1"]),
    "num_splits": (good(num_splits=0), ValueError, ["num_splits=0"]),
    "num_splits a float": (good(num_splits=2.0), TypeError, ["num_splits=2.0"]),
    "batch_invariant": (good(batch_invariant=1), TypeError, ["batch_invariant=1"]),
    "window": (good(window=(-1, 0)), ValueError, ["window=(-1, 0)"]),
    "sinks": (good(sinks=ones(3)), ValueError, ["sinks.shape=(3,)"]),
    "family": (good(family="sm80"), ValueError, ["family='sm80' with NumPy arrays"]),
    "tile": (good(tile=Tile(stages=2)), ValueError, ["Tile(stages=2)"]),
    "out's shape": (good(out=ones(2, 4, 3, 8)), ValueError, ["out.shape=(2, 4, 3, 8)"]),
    "out in the cache": (good(k_cache=BASE[:320].reshape(2, 2, 20, 4), q=ones(2, 4, 3, 4), v_cache=ones(2, 2, 20, 4), out=BASE[:96].reshape(2, 4, 3, 4)), ValueError, ["out shares memory with k_cache"]),
    "return_lse": (good(return_lse=1), TypeError, ["return_lse=1"]),
}
# fmt: on


@pytest.mark.parametrize("name", WRONG)
def test_errors_come_before_anything_is_written(name, monkeypatch):
    arguments, error, words = WRONG[name]
    for module, function in ((cupyflash._cpu, "forward"), (cupyflash._cpu_decode, "append_and_turn")):
        monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("something ran before the error"))
    with pytest.raises((ValueError, TypeError)) as caught:
        decode(**arguments)
    assert type(caught.value) is error, caught.value
    assert all(word in str(caught.value) for word in words), caught.value


def test_explain_takes_the_same_arguments():
    """What is checked and planned is what runs."""
    names = [list(inspect.signature(f).parameters) for f in (decode, explain_decode)]
    assert set(names[0]) - {"return_lse"} == set(names[1]) - {"device"}
    plan = explain_decode(**good(tile=Tile(block_n=64)))
    assert (plan.family, plan.block_n) == ("cpu", 64)
    with pytest.raises(ValueError, match="holds 4 to 21"):
        explain_decode(**good(kv_lens=np.array([4, 21])))


# ---------------------------------------------------------------------------------------------------------------- plans


def planned(batch=1, heads=32, heads_k=8, capacity=8192, dim=128, dtype=np.float32, page_size=0, rows=1, **options):
    """The plan of a call on a card, without arrays of that size."""
    q = np.broadcast_to(np.zeros((), dtype), (batch, heads, rows, dim))
    shape = (batch, heads_k, capacity, dim)
    if page_size:
        shape = (batch * capacity // page_size, page_size, heads_k, dim)
        options["page_table"] = np.zeros((batch, capacity // page_size), np.int32)
    writeable = "k_new" in options
    caches = [np.zeros(shape, dtype) if writeable else np.broadcast_to(np.zeros((), dtype), shape) for _ in range(2)]
    return explain_decode(q, *caches, 1, **{"device": "sm_90"} | options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_do_not_depend_on_the_batch(dtype):
    for capacity in (1, 100, 256, 257, 8192, 131072, 2**20):
        plans = [planned(batch, 8 * group, 8, capacity, dtype=dtype) for batch in (1, 7, 300) for group in (1, 4)]
        assert len({(p.splits[:2], p.block_m, p.block_n) for p in plans}) == 1
        for plan in plans:
            length, count, blocks = plan.splits
            assert (count - 1) * length < capacity
            assert count == 128 or capacity <= count * length
            assert 1 <= blocks <= count
            assert (count > 1) == any(step.name == "combine" for step in plan.kernels)


def test_the_caller_may_fix_splits_or_let_them_fill_a_card():
    for splits in (1, 2, 3, 64):
        assert planned(num_splits=splits).splits.number == splits
    assert planned(capacity=100, num_splits=50).splits.number <= 100 // 32 + 1  # no split without keys
    filled = [planned(batch, heads_k=1, capacity=16384, batch_invariant=False) for batch in (1, 4, 1000)]
    assert filled[0].splits.number > filled[1].splits.number > filled[2].splits.number == 1
    assert filled[0].kernels[0].grid >= 132


def test_few_thread_blocks_have_no_splits_to_share_and_many_have_several_each():
    """The grid grows with the batch, but not without bound, where entries may be much longer than they are."""
    assert planned(dtype=np.float16).splits == (512, 16, 16)
    one, many = planned(1, capacity=2**17), planned(64, capacity=2**17)
    assert one.splits == (256, 128, 128)
    assert many.splits[:2] == one.splits[:2]
    assert one.kernels[0].grid == 8 * 128
    assert 8 * 132 <= many.kernels[0].grid <= 2 * 8 * 132


@pytest.mark.parametrize("card", DEVICES)
def test_every_width_fits_every_card(card):
    for dtype, dim, rows, page_size in itertools.product(DTYPES, (1, 16, 100, 128, 130, 256), (1, 16), (0, 16)):
        plan = planned(2, 4, 2, 320, dim, dtype, page_size, rows, device=card)
        assert all(step.smem <= DEVICES[card].smem and step.threads <= 1024 for step in plan.kernels)
        (step,) = (step for step in plan.kernels if step.name.startswith("decode"))
        assert step.grid == 2 * 2 * -(-rows * 2 // step.spec.block_m) * plan.splits.blocks


def test_a_plan_says_what_runs_and_why():
    angles = np.zeros((8192, 8), np.float32)
    new = np.broadcast_to(np.float32(0), (1, 8, 1, 128))
    plan = planned(k_new=new, v_new=new, rotary=Rotary(angles, angles))
    assert [step.name for step in plan.kernels] == ["decode_append", f"decode_{plan.family}", "combine"]
    assert plan.kernels[0].writes == ("k", "v", "q_turned")
    assert "splits      32, of at least 256 keys, by 32 thread blocks" in str(plan)
    assert plan.workspace == 4 * (32 * 32 * 129 + 32 * 128)
    assert [step.name for step in planned(num_splits=1).kernels] == [f"decode_{plan.family}"]
    assert "splits      none" in str(planned(num_splits=1))
    for options, family, why in (
        ({}, "simt", "not sm80    float32"), ({"dtype": np.float16}, "sm80", "not sm90    wgmma"),
        ({"dtype": np.float16, "device": "sm_75"}, "simt", "not sm80    sm_75 has compute capability 7.5"),
        ({"dtype": np.float16, "precision": "highest"}, "sm80", "not sm90    wgmma"),
    ):  # fmt: skip
        plan = planned(**options)
        assert plan.family == family
        assert why in str(plan)
    for options, why in (
        ({"family": "sm90"}, "'sm80' and 'simt'"), ({"family": "cpu"}, "CuPy arrays"), ({"tile": Tile(64, 64)}, "one tile"),
        ({"dim": 257}, "257"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            planned(**options)


# ------------------------------------------------------------------------------------------------ kernels, emulated

ARCHS = {"simt": 70, "sm80": 80}
KINDS = {"simt": DTYPES, "sm80": (np.float16, ml_dtypes.bfloat16)}
FAMILIES = pytest.mark.parametrize("family", ARCHS)


def emulated(family, seed=0, **more):
    """Under the race checker, each launch under a schedule of its own."""
    why_not()
    draw = functools.partial(_schedule, seed)
    return Device(draw, arch=ARCHS[family], undefined=PROFILE != "ci", **more)


def _schedule(seed, launch):
    return Schedule.draw(seed and 100 * seed + launch)


@FAMILIES
@hypothesis.settings(max_examples=12 if PROFILE == "ci" else 300)
@hypothesis.given(choices=st.data(), seed=st.integers(0, 2**32))
def test_any_case_of_kernels(family, choices, seed):
    styles = tuple(style for style in OUTPUT_STYLES if style in GPU_STYLES)
    case = choices.draw(cases(KINDS[family], styles, widths=(7, 16, 24), rows=5, most=70))
    splits = choices.draw(st.sampled_from([None, 1, 2, 3]))
    hypothesis.note(repr(case))
    with emulated(family, seed) as xp:
        case.make(xp).run(family=family, num_splits=splits)


@pytest.mark.share(8)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("family", "dtype"), [(f, dtype) for f in ARCHS for dtype in KINDS[f]])
def test_named_cases_of_kernels(family, dtype, name):
    with emulated(family, 7) as xp:
        dataclasses.replace(NAMED[name], dtype=dtype).make(xp).run(family=family)


@pytest.mark.share(4)
@pytest.mark.parametrize("widths", [(192, 128), (256, 256), (130, 70), (80, 80), (48, 48), (160, 33), (64, 256)])
@FAMILIES
def test_wide_heads_of_kernels(family, widths):
    """Tiles and rings of each kind; more rows than a tile has."""
    case = Case(
        seed=3, dtype=KINDS[family][1], heads_k=1, head_dim=widths[0], head_dim_v=widths[1], capacity=330,
        page_size=16, append=True, rotary=16, rows=7, group=3,
    )  # fmt: skip
    with emulated(family, 7) as xp:
        case.make(xp).run(family=family)


@pytest.mark.parametrize("dtype", KINDS["sm80"])
@pytest.mark.parametrize("group", [2, 8])
def test_two_parts_of_p(dtype, group):
    """precision="highest": out in float32 within the bound of P in two parts, and far below what a rounded P gives."""
    case = Case(
        seed=6, dtype=dtype, heads_k=1, head_dim=40, head_dim_v=48, capacity=300, rows=3, group=group, out32=True
    )  # fmt: skip
    for splits in (1, 3):
        worst = []
        for precision in (None, "highest"):
            with emulated("sm80", 4) as xp:
                made = case.make(xp)
                out, _ = made.run(family="sm80", num_splits=splits, precision=precision)
            q, k, v, lens = made.seen()
            right = reference.forward(q, k, v, causal=True, kv_lens=lens).out
            worst.append(abs(out - right).max())
        assert worst[0] > 50 * worst[1], worst


@FAMILIES
def test_bits_of_kernels(family):
    """An entry's bits are the same alone and in any batch, in line and in pages of any size, under any schedule."""
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((3, heads, n, 24)).astype(np.float16) for heads, n in ((4, 2), (2, 600), (2, 600)))
    lens = np.array([600, 3, 513])

    def run(b, size=0, seed=0):
        caches, table = [k[b], v[b]], None
        if size:
            table = rng.permutation(len(k[b]) * 600 // size).reshape(len(k[b]), -1).astype(np.int32)
            for i, x in enumerate(caches):
                caches[i] = np.empty((table.size, size, 2, 24), x.dtype)
                caches[i][table] = x.reshape(len(x), 2, -1, size, 24).transpose(0, 2, 3, 1, 4)
        with emulated(family, seed) as xp:
            args = (xp.asarray(x) for x in (q[b], *caches, lens[b]))
            return decode(*args, page_table=None if table is None else xp.asarray(table), family=family).get()

    together = run(slice(None))
    for b, size, seed in ((slice(0, 1), 0, 0), (slice(2, 3), 12, 5), (slice(None), 20, 7), (slice(1, 2), 600, 0)):
        assert run(b, size, seed).tobytes() == together[b].tobytes(), (b, size)


@FAMILIES
def test_kernels_clamp_what_the_host_does_not_know(family):
    """Lengths outside the cache count as the nearest inside, pages that do not exist as the nearest that do."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((3, 2, n, 16)).astype(np.float16) for n in (2, 40, 40))
    k_new, v_new = rng.standard_normal((2, 3, 2, 2, 16)).astype(np.float16)
    angles = rng.standard_normal((7, 3)).astype(np.float32)  # fewer positions than rows
    table = rng.permutation(15).reshape(3, 5).astype(np.int32)
    pages = [rng.standard_normal((15, 8, 2, 16)).astype(np.float16) for _ in range(2)]
    wild = table.copy()
    wild[0, 1], wild[0, 3] = -1, 2**31 - 1
    tame = np.clip(wild, 0, 14)
    for append, lens, near in ((False, [-5, 10**9, 41], [0, 40, 40]), (True, [2**31 - 1, -(2**31), 39], [38, 0, 38])):
        for kind, caches, tables in ((np.int32, (k, v), None), (np.int64, pages, (wild, tame))):
            results = []
            for n, given in enumerate((lens, near)):
                with emulated(family, 3) as xp:
                    held = [xp.asarray(x) for x in caches]
                    for x in held:
                        x[...] = x  # what is there is known to be, though a launch may write it
                    new = {"k_new": xp.asarray(k_new), "v_new": xp.asarray(v_new)} if append else {}
                    if tables is not None and append:  # two entries that grow in one page
                        tables = (table, table)
                    out = decode(
                        xp.asarray(q), *held, xp.asarray(np.array(given, kind)), family=family, return_lse=True,
                        page_table=None if tables is None else xp.asarray(tables[n]),
                        rotary=Rotary(*map(xp.asarray, (np.cos(angles), np.sin(angles)))), **new,
                    )  # fmt: skip
                    results.append([x.get().tobytes() for x in (*out, *held)])
            assert results[0] == results[1], (append, kind)


@pytest.mark.parametrize("dim", [24, 40])
def test_rows_of_any_alignment_give_the_same_bits(dim):
    """16, 8, 4 or 2 bytes at a time, from rows that lie side by side, apart, and column by column."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((2, heads, n, dim)).astype(np.float16) for heads, n in ((2, 1), (1, 200), (1, 200)))
    results = set()
    for gap, begin in ((0, 0), (4, 0), (2, 0), (1, 0), (8, 4), (8, 2), (8, 1), (None, 0)):
        with emulated("sm80", 5) as xp:
            if gap is None:
                caches = [xp.asarray(np.ascontiguousarray(x.swapaxes(2, 3))).swapaxes(2, 3) for x in (k, v)]
            else:
                room = [np.pad(x, [(0, 0)] * 3 + [(begin, gap + 8)], constant_values=np.nan) for x in (k, v)]
                caches = [xp.asarray(x)[..., begin : begin + dim] for x in room]
            results.add(decode(xp.asarray(q), *caches, 150, family="sm80", num_splits=1).get().tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("layout", ["apart", "interleaved", "in line"])
def test_a_call_like_one_before_is_not_looked_at_again(layout, monkeypatch):
    """Other numbers in other arrays of the same layout, new rows and turned queries among them; other options are."""
    rng = np.random.default_rng(8)
    angles = rng.standard_normal((80, 4)).astype(np.float32)
    rotary = Rotary(np.cos(angles), np.sin(angles))
    table = rng.permutation(10).reshape(2, 5).astype(np.int32)
    sides = {"sinks": rng.standard_normal(4).astype(np.float32), "alibi_slopes": rng.random(4).astype(np.float32)}
    with emulated("sm80") as xp:
        on = {name: xp.asarray(x) for name, x in sides.items()} | {"rotary": Rotary(*map(xp.asarray, rotary[:2]))}

        def run(lens, kind=np.int64, out=None, **more):
            q, k_new, v_new = (rng.standard_normal((2, heads, 2, 16)).astype(np.float16) for heads in (4, 2, 2))
            if layout == "in line":
                both = rng.standard_normal((2, 2, 2, 80, 16)).astype(np.float16)
                held, paged = xp.asarray(both), {}
                caches, ours = (held[0], held[1]), both.copy()
            else:
                both = rng.standard_normal((10, 2, 16, 2, 16)).astype(np.float16)
                both = both.swapaxes(0, 1).copy() if layout == "apart" else both
                held, paged = xp.asarray(both), {"page_table": table}
                halves = (0, 1) if layout == "apart" else ((slice(None), 0), (slice(None), 1))
                caches, ours = [held[half] for half in halves], [both[half].copy() for half in halves]
            held[...] = held
            options = {"num_splits": 2, "return_lse": out is None} | more
            got = decode(
                xp.asarray(q), *caches, xp.asarray(np.array(lens, kind)), k_new=xp.asarray(k_new),
                v_new=xp.asarray(v_new), out=out, **on, **{n: xp.asarray(x) for n, x in paged.items()}, **options,
            )  # fmt: skip
            want = decode(
                q, *ours, np.array(lens), k_new=k_new, v_new=v_new, rotary=rotary, **sides, **paged, **options
            )
            for x, y in zip(got, want, strict=True):
                np.testing.assert_allclose(data.to_numpy(x).astype(float), y.astype(float), rtol=0, atol=2e-3)
            for x, y in zip(caches, ours, strict=True):
                np.testing.assert_allclose(x.get().astype(float), y.astype(float), rtol=0, atol=2e-3)

        run([70, 5])
        monkeypatch.setattr(cupyflash._launch_decode, "decode", lambda *_: pytest.fail("looked at again"))
        run([3, 78])
        run([0, 1])
        for more in ({"num_splits": 1}, {"batch_invariant": False}, {"window": (3, 0)}, {"kind": np.int32}):
            with pytest.raises(pytest.fail.Exception):
                run([0, 1], **more)


def test_a_call_like_one_before_still_has_its_memory_checked():
    with emulated("simt") as xp:
        held = xp.asarray(np.zeros((4, 1, 2, 20, 8), np.float32))
        held[...] = held
        new, lens = held[2][:, :, :1], xp.asarray(np.array([3]))
        decode(new, held[0], held[1], lens, k_new=new, v_new=new)
        with pytest.raises(ValueError, match="k_cache shares memory with q"):
            decode(held[0][:, :, :1], held[0], held[1], lens, k_new=new, v_new=new)
        with pytest.raises(ValueError, match="shares memory"):
            decode(new, held[0], held[0], lens, k_new=new, v_new=new)


def test_devices_are_asked_where_the_environment_says_so(monkeypatch):
    monkeypatch.setenv("CUPYFLASH_CHECK", "1")
    with emulated("simt") as xp:
        q, cache = xp.asarray(ones(2, 2, 1, 8)), xp.asarray(ones(2, 2, 20, 8))
        with pytest.raises(ValueError, match="kv_lens holds 4 to 21"):
            decode(q, cache, cache, xp.asarray(np.array([4, 21])))
        pages = xp.asarray(ones(4, 5, 2, 8))
        with pytest.raises(ValueError, match=r"page_table\[1, 0\]=4"):
            decode(q, pages, pages, xp.asarray(np.array([4, 1])), page_table=xp.asarray(np.array([[0], [4]], np.int32)))


def test_new_rows_need_room_whatever_the_lengths_are():
    with emulated("simt") as xp:
        q, new, cache = (xp.asarray(ones(1, 2, n, 8)) for n in (3, 3, 2))
        with pytest.raises(ValueError, match="the cache has 2 rows: 3 new rows do not fit"):
            decode(q, cache, cache, xp.asarray(np.array([0])), k_new=new, v_new=new)


# ------------------------------------------------------------------------------------------------------------ a GPU


def families_of(gpu, dtype):
    """The kernel families that decode a dtype on this card."""
    arch = int(gpu.xp.cuda.Device().compute_capability)
    return ("sm80", "simt") if np.dtype(dtype).itemsize == 2 and arch >= 80 else ("simt",)


@pytest.mark.gpu
@hypothesis.settings(max_examples=20 if PROFILE == "ci" else 1000)
@hypothesis.given(
    case=cases(styles=tuple(style for style in OUTPUT_STYLES if style in GPU_STYLES), most=700),
    splits=st.sampled_from([None, None, 1, 3]),
)
def test_any_case_on_a_gpu(gpu, case, splits):
    for family in families_of(gpu, case.dtype):
        case.make(gpu.xp).run(family=family, num_splits=splits)


@pytest.mark.gpu
@pytest.mark.share(12)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMED)
def test_named_cases_on_a_gpu(gpu, name, dtype):
    for family in families_of(gpu, dtype):
        dataclasses.replace(NAMED[name], dtype=dtype, head_dim=128, head_dim_v=128, capacity=600).make(gpu.xp).run(
            family=family
        )


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 16, 100])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_long_caches_on_a_gpu(gpu, dtype, page_size):
    """Many splits, some without keys; the same as attention of each entry, and the same bits alone."""
    xp, rng = gpu.xp, gpu.xp.random.default_rng(0)
    lens = np.array([70000, 1, 0, 33333])
    q, k, v = (rng.standard_normal((4, heads, n, 64)).astype(dtype) for heads, n in ((8, 2), (2, 70000), (2, 70000)))
    caches, options = [k, v], {}
    if page_size:
        table = np.random.default_rng(0).permutation(4 * 70000 // page_size).reshape(4, -1).astype(np.int32)
        options["page_table"] = xp.asarray(table)
        for i, x in enumerate((k, v)):
            caches[i] = xp.empty((table.size, page_size, 2, 64), dtype)
            caches[i][options["page_table"]] = x.reshape(4, 2, -1, page_size, 64).transpose(0, 2, 3, 1, 4)
    want = attention(q, k, v, causal=True, kv_lens=xp.asarray(lens), return_lse=True)
    bound = 2e-3 if dtype == np.float16 else 1e-5
    for family in families_of(gpu, dtype):
        got = decode(q, *caches, xp.asarray(lens), family=family, return_lse=True, **options)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(gpu.numpy(x).astype(float), gpu.numpy(y).astype(float), rtol=bound, atol=bound)
        if page_size == 0:
            for b in range(4):
                rows = slice(b, b + 1)
                alone = decode(q[rows], k[rows], v[rows], xp.asarray(lens[rows]), family=family)
                assert gpu.numpy(alone).tobytes() == gpu.numpy(got.out[rows]).tobytes()


@pytest.mark.gpu
def test_lengths_and_pages_that_are_not_there_on_a_gpu(gpu):
    """Nothing outside the cache is read or written, whatever lengths and page tables hold."""
    xp, rng = gpu.xp, np.random.default_rng(0)
    for seed in range(10):
        case = Case(
            seed=seed, dtype=np.float16, batch=1, rows=3, append=True, rotary=8, page_size=(0, 16)[seed % 2],
            capacity=200, head_dim=64, head_dim_v=64, styles=("shifted",) * 3,
        )  # fmt: skip
        made = case.make(xp)
        (q, k, v, _), options = made.arguments()
        if case.page_size:
            options["page_table"] = xp.asarray(rng.integers(-(2**31), 2**31, (1, case.columns)).astype(np.int32))
        for family in families_of(gpu, case.dtype):
            for n in (-1, 10**6, 2**31 - 1, -(2**31)):
                decode(q, k, v, xp.asarray(np.array([n], np.int32)), family=family, out=made.out.array, **options)
        for placed in (*made.placed.values(), made.out):
            assert placed.guards_intact()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_graph_decodes_step_after_step(gpu, dtype):
    """One captured step, with new rows, pages, rotary and lengths that the graph itself counts up, replayed."""
    xp, rng = gpu.xp, np.random.default_rng(0)
    steps, angles = 40, rng.uniform(0, 6, (700, 32)).astype(np.float32)
    rows = [rng.standard_normal((2, heads, steps, 64)).astype(dtype) for heads in (8, 2, 2)]
    begin = [rng.standard_normal((160, 16, 2, 64)).astype(dtype) for _ in range(2)]
    table = rng.permutation(160)[:80].reshape(2, 40).astype(np.int32)
    rotary = Rotary(np.cos(angles), np.sin(angles))
    caches, wanted, lens = [x.copy() for x in begin], [], np.array([500, 13])
    for t in range(steps):
        q, k_new, v_new = (x[:, :, t : t + 1] for x in rows)
        wanted.append(decode(q, *caches, lens + t, page_table=table, k_new=k_new, v_new=v_new, rotary=rotary))
    on = xp.asarray
    held, out = [on(x) for x in begin], xp.empty((2, 8, 1, 64), dtype)
    now, kv_lens = [on(np.ascontiguousarray(x[:, :, :1])) for x in rows], on(lens.astype(np.int32))
    more = {"page_table": on(table), "k_new": now[1], "v_new": now[2], "rotary": Rotary(*map(on, rotary[:2]))}
    decode(now[0], *held, kv_lens, out=out, **more)
    kv_lens += 1  # both are compiled now
    stream = xp.cuda.Stream(non_blocking=True)
    xp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        decode(now[0], *held, kv_lens, out=out, **more)
        kv_lens += 1
        graph = stream.end_capture()
    for x, y in zip(held, begin, strict=True):
        x[...] = on(y)
    kv_lens[...] = on(lens.astype(np.int32))
    bound = 5e-3 if dtype == np.float16 else 1e-5
    for t in range(steps):
        for x, y in zip(now, rows, strict=True):
            x[...] = on(y[:, :, t : t + 1])
        xp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        np.testing.assert_allclose(gpu.numpy(out).astype(float), wanted[t].astype(float), rtol=bound, atol=bound)

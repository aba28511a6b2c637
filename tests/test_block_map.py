"""Blocks that a mask or segments hide: the map of them against NumPy, the walk over it, and that kernels keep to it."""

import functools

import ml_dtypes
import numpy as np
import pytest
from conftest import PROFILE
from emulator import Device, Schedule, why_not
from nvrtc import compile_spec

from cupyflash import Tile, _launch, attention, attention_backward, explain
from cupyflash._compile import FLOAT32, Spec, kernel_text
from cupyflash.testing import bounds

BATCH, HEADS, HEADS_K = 2, 4, 2
# Family, dtype, compute capability, tile, lengths: some blocks on both sides, the last ones cut.
FAMILIES = {
    "simt": (np.float32, 90, Tile(block_m=32, block_n=32), 90, 150),
    "sm80": (np.float16, 80, None, 200, 400),
    "sm80 float64": (np.float64, 90, Tile(32, 32), 90, 150),
    "sm90": (ml_dtypes.bfloat16, 90, None, 300, 420),
}


@pytest.fixture(scope="module", autouse=True)
def emulator():
    why_not()


def _device(arch, seed=5, **more):
    return Device(lambda n: Schedule.draw(seed and 100 * seed + n), arch=arch, undefined=PROFILE != "ci", **more)


# --------------------------------------------------------------------------------------------------- masks and segments


def _in_blocks(rng, states, shape):
    """A mask of blocks of 64 x 64 that are hidden, mixed, or seen, drawn from `states`."""
    rows, columns = shape[-2:]
    grid = rng.choice(states, (*shape[:-2], -(-rows // 64), -(-columns // 64)))
    grid = grid.repeat(64, -2).repeat(64, -1)[..., :rows, :columns]
    return np.where(grid == 1, rng.random(shape) < 0.5, grid == 2)


def _block_diagonal(shape):
    i, j = (np.arange(n) for n in shape[-2:])
    return np.broadcast_to(i[:, None] // 70 == j // 100, shape)


def _beside(name, seqlen_q, seqlen_k):
    """The options of a case."""
    rng = np.random.default_rng(7)
    own = (BATCH, HEADS, seqlen_q, seqlen_k)
    masks = {
        "block diagonal": lambda: _block_diagonal(own[2:]),
        "random blocks": lambda: _in_blocks(rng, (0, 1, 2), own),
        "hidden blocks for all heads": lambda: _in_blocks(rng, (0, 0, 2), (BATCH, 1, *own[2:])),
        "random blocks for all entries": lambda: _in_blocks(rng, (0, 1, 2), (1, HEADS, *own[2:])),
        "all hidden": lambda: np.zeros(own[2:], bool),
        "all seen": lambda: np.ones((1, 1, *own[2:]), bool),
        "of keys": lambda: _in_blocks(rng, (0, 2), (BATCH, 1, 1, seqlen_k)),
        "of queries": lambda: _in_blocks(rng, (0, 2), (HEADS, seqlen_q, 1)),
    }
    if name in masks:
        return {"mask": masks[name]()}
    ids = [rng.integers(0, 5, (BATCH, n)) * 2**40 for n in (seqlen_q, seqlen_k)]
    if name == "segments":
        return {"segment_ids": tuple(np.sort(x) for x in ids)}
    if name == "unsorted segments":
        return {"segment_ids": tuple(ids)}
    if name == "segments that no key has":
        return {"segment_ids": (ids[0], ids[1] + 1)}
    first = masks["random blocks"]()
    more = {"causal": {"causal": True}, "window": {"window": (60, 45)}, "segments": _beside("segments", *own[2:])}
    return {"mask": first, **more[name.removeprefix("random blocks and ")]}


NAMES = (
    "block diagonal", "random blocks", "hidden blocks for all heads", "random blocks for all entries", "all hidden",
    "all seen", "of keys", "of queries", "segments", "unsorted segments", "segments that no key has",
    "random blocks and causal", "random blocks and window", "random blocks and segments",
)  # fmt: skip


def _seen(beside, seqlen_q, seqlen_k):
    """Which pairs mask and segments leave: (BATCH, HEADS, seqlen_q, seqlen_k)."""
    seen = np.ones((BATCH, HEADS, seqlen_q, seqlen_k), bool)
    if "mask" in beside:
        seen &= beside["mask"]
    if "segment_ids" in beside:
        q_ids, kv_ids = beside["segment_ids"]
        seen &= (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]
    return seen


def _blocks_of(seen, block_m, block_n):
    """Of each block of pairs, whether any is seen and whether all are."""
    *lead, rows, columns = seen.shape
    m_blocks, n_blocks = -(-rows // block_m), -(-columns // block_n)
    ends = [(0, 0)] * len(lead) + [(0, m_blocks * block_m - rows), (0, n_blocks * block_n - columns)]
    cut = (*lead, m_blocks, block_m, n_blocks, block_n)
    any_, all_ = (np.pad(seen, ends, constant_values=beyond).reshape(cut) for beyond in (False, True))
    return any_.any((-3, -1)), all_.all((-3, -1))


def _arrays(dtype, seqlen_q, seqlen_k, head_dim=16):
    rng = np.random.default_rng(3)
    shapes = [(HEADS, seqlen_q), (HEADS_K, seqlen_k), (HEADS_K, seqlen_k), (HEADS, seqlen_q)]
    return [rng.standard_normal((BATCH, *shape, head_dim)).astype(dtype) for shape in shapes]


def _on(xp, beside):
    moved = {name: xp.asarray(x) for name, x in beside.items() if isinstance(x, np.ndarray)}
    if "segment_ids" in beside:
        moved["segment_ids"] = tuple(xp.asarray(x) for x in beside["segment_ids"])
    return {**beside, **moved}


def _run(family, name, poison=lambda *_: None, **more):
    """Forward and backward under the checker, judged by the specification; numbers that poison() hides are not used."""
    dtype, arch, tile, seqlen_q, seqlen_k = FAMILIES[family]
    beside = _beside(name, seqlen_q, seqlen_k)
    q, k, v, dout = _arrays(dtype, seqlen_q, seqlen_k)
    clean = q, k, v, dout
    with _device(arch, **more) as xp:
        options = _on(xp, beside) | {"family": family.split()[0], "tile": tile}
        plans = [explain(xp.asarray(q), xp.asarray(k), xp.asarray(v), backward=b, **options) for b in (False, True)]
        poisoned = [x.copy() for x in clean]
        poison(poisoned, _seen(beside, seqlen_q, seqlen_k), plans)
        q, k, v, dout = (xp.asarray(x) for x in poisoned)
        out, lse = attention(q, k, v, return_lse=True, **options)
        grads = attention_backward(dout, q, k, v, out, lse, **options)[:3]
        out, lse, grads = out.get(), lse.get(), tuple(x.get() for x in grads)
    q, k, v, dout = clean
    p_dtype = q.dtype if plans[0].rounds_p else None
    report = bounds.check_forward(q, k, v, out, lse, p_dtype=p_dtype, **beside)
    report += bounds.check_backward(dout, q, k, v, out, lse, grads, p_dtype=p_dtype, **beside)
    assert report.ok, report
    return plans


# ----------------------------------------------------------------------------------------------------------- the map


def _watch_maps(monkeypatch):
    """The arrays of maps that launches allocate, by name, as they are made."""
    found = {}
    run = _launch.Ready.run

    def watching(ready, tensors):
        names = iter([name for name, _, _ in ready.temporaries])
        memory = _launch._memory

        def kept(*of):
            x = memory(*of)
            found[next(names)] = x
            return x

        with monkeypatch.context() as patch:
            patch.setattr(_launch, "_memory", kept)
            return run(ready, tensors)

    monkeypatch.setattr(_launch.Ready, "run", watching)
    return found


def _check_map(held, any_, all_):
    """The bits of a map, (..., rows, bytes), against (..., rows, blocks)."""
    *_, rows, bytes_ = held.shape
    blocks = any_.shape[-1]
    assert rows == any_.shape[-2]
    assert bytes_ == 8 * -(-blocks // 32)
    bits = np.unpackbits(held.get(), axis=-1, bitorder="little").reshape(*held.shape[:-1], 2, 4 * bytes_)
    np.testing.assert_array_equal(np.broadcast_to(bits[..., 0, :blocks], any_.shape), any_)
    np.testing.assert_array_equal(np.broadcast_to(bits[..., 1, :blocks], all_.shape), all_)
    assert not bits[..., blocks:].any(), "bits of blocks that there are none of"


@pytest.mark.parametrize("name", NAMES)
def test_the_map_against_numpy(name, monkeypatch):
    """More key blocks than bits of a word; the backward on tensor cores has both maps, of one tile."""
    found = _watch_maps(monkeypatch)
    for family, dtype, tile, lengths in (
        ("simt", np.float32, Tile(block_m=32, block_n=16), (70, 560)), ("sm80", np.float16, None, (150, 272)),
    ):  # fmt: skip
        beside = _beside(name, *lengths)
        seen = _seen(beside, *lengths)
        with _device(80) as xp:
            q, k, v, dout = (xp.asarray(x) for x in _arrays(dtype, *lengths, 8))
            options = _on(xp, beside) | {"family": family, "tile": tile}
            plan = explain(q, k, v, **options)
            out, lse = attention(q, k, v, return_lse=True, **options)
            _check_map(found["key_map"], *_blocks_of(seen, plan.block_m, plan.block_n))
            if family == "simt":
                continue
            plan = explain(q, k, v, backward=True, **options)
            attention_backward(dout, q, k, v, out, lse, **options)
            any_, all_ = _blocks_of(seen, plan.block_m, plan.block_n)
            _check_map(found["key_map"], any_, all_)
            _check_map(found["query_map"], any_.swapaxes(-1, -2), all_.swapaxes(-1, -2))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x: x[..., ::-1], "backwards"),
        (lambda x: np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2), "columns first"),
        (lambda x: np.pad(x, ((0, 0), (0, 0), (0, 0), (3, 8)))[..., 3:-8], "not aligned"),
        (lambda x: np.pad(x, ((0, 0), (0, 0), (0, 0), (16, 16)))[..., 16:-16], "aligned"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_masks_in_any_memory(change, name, monkeypatch):
    found = _watch_maps(monkeypatch)
    lengths = 70, 144 if name == "aligned" else 137
    mask = change(_in_blocks(np.random.default_rng(0), (0, 1, 2), (BATCH, HEADS, *lengths)))
    with _device(80) as xp:
        q, k, v, _ = (xp.asarray(x) for x in _arrays(np.float32, *lengths, 8))
        attention(q, k, v, mask=_same_view(xp, mask), tile=Tile(block_m=32, block_n=16))
    _check_map(found["key_map"], *_blocks_of(mask, 32, 16))


def _same_view(xp, mask):
    """On the device, the view that `mask` is of its base."""
    first = [x.__array_interface__["data"][0] for x in (mask, mask.base)]
    return xp.ndarray(mask.shape, mask.dtype, xp.asarray(mask.base).data + (first[0] - first[1]), mask.strides)


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ["sm_60", "sm_75", "sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize(
    "fields", [{"has_mask": True}, {"segments": True}, {"has_mask": True, "segments": True}], ids="-".join
)
def test_the_kernel_compiles_into_registers(arch, fields):
    compiled = compile_spec(_spec(block_m=128, block_n=96, **fields), 64, arch)
    assert compiled.spill_bytes == compiled.stack_bytes == 0, compiled.log


# ---------------------------------------------------------------------------------------------------------- the walk

PROBE = """
extern "C" __global__ void probe(const unsigned char* map, int* found, int blocks) {
  if (thread_index() != 0) return;
  Tensor tensor = {};
  tensor.data = const_cast<unsigned char*>(map);
  Sequence seq = {};
  const BlockWalk walk(tensor, seq, 0, 0, blocks);
  int n = 0;
  const auto tell = [&](int x) { store_global(found + n++, Vector<int, 1>{{x}}); };
  for (int begin = 0; begin <= blocks; begin += 5) {
    for (int end = begin; end <= blocks; end += 7) {
      const BlockRange range = walk.within({begin, begin, end, end});
      tell(range.begin);
      tell(range.end);
      tell(walk.count(begin, end));
      for (int block = begin; block <= end; ++block) tell(walk.up(block, end));
      for (int block = begin - 1; block < end; ++block) tell(walk.down(block, begin));
    }
  }
  for (int block = 0; block < blocks; ++block) tell(walk.whole(block));
}
"""


def _walked(seen, whole):
    """What the probe finds."""
    blocks, found = len(seen), []
    for begin in range(0, blocks + 1, 5):
        for end in range(begin, blocks + 1, 7):
            within = [n for n in range(begin, end) if seen[n]]
            found += [within[0], within[-1] + 1] if within else [begin, begin]
            found.append(len(within))
            found += [next((n for n in within if n >= block), end) for block in range(begin, end + 1)]
            found += [next((n for n in within[::-1] if n <= block), begin - 1) for block in range(begin - 1, end)]
    return found + [int(x) for x in whole]


@pytest.mark.parametrize("blocks", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_the_walk_against_python(blocks, share):
    rng = np.random.default_rng(blocks)
    seen = rng.random(blocks) < share
    whole = seen & (rng.random(blocks) < 0.5)
    words = -(-blocks // 32)
    bits = np.zeros((2, 32 * words), bool)
    bits[0, :blocks], bits[1, :blocks] = seen, whole
    expected = _walked(seen, whole)
    with _device(80) as xp:
        kernel = xp.RawModule(code=_probe_text()).get_function("probe")
        found = xp.empty((len(expected),), np.int32)
        held = xp.asarray(np.packbits(bits.reshape(-1), bitorder="little"))
        kernel((1,), (32,), (held, found, np.int32(blocks)))
        np.testing.assert_array_equal(found.get(), expected)


@functools.cache
def _probe_text():
    return _spec(block_m=32, block_n=32, has_mask=True).prelude() + kernel_text("block_map") + PROBE


def _spec(**fields):
    """The kernel that makes the maps."""
    return Spec(
        kernel="block_map", element=FLOAT32, output=FLOAT32, accumulator=FLOAT32, gradient=FLOAT32, head_dim=16,
        head_dim_v=16, dim_chunk=16, num_stages=2, num_warps=8, causal=False, **fields,
    )  # fmt: skip


# ------------------------------------------------------------------------------------- main loops that keep to the map


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.share(4)
def test_every_family(family, name):
    _run(family, name)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("arch", [80, 90])
def test_dq_in_any_order(arch, deterministic):
    """A tile's dq is the sum over key blocks with gaps between them."""
    lengths = 300, 700
    beside = _beside("random blocks", *lengths)
    q, k, v, dout = _arrays(np.float16, *lengths)
    first = None
    for seed in (5, 7):
        with _device(arch, seed) as xp:
            options, held = _on(xp, beside), [xp.asarray(x) for x in (q, k, v)]
            out, lse = attention(*held, return_lse=True, **options)
            grads = attention_backward(xp.asarray(dout), *held, out, lse, deterministic=deterministic, **options)[:3]
            out, lse, grads = out.get(), lse.get(), tuple(x.get() for x in grads)
        report = bounds.check_backward(dout, q, k, v, out, lse, grads, p_dtype=q.dtype, **beside)
        assert report.ok, report
        first = first or grads
        if deterministic:
            for x, y in zip(first, grads, strict=True):
                np.testing.assert_array_equal(x, y)


def _poison_what_nobody_sees(arrays, seen, plans):
    """NaN in keys and queries of blocks that are hidden from everyone, whichever kernel's blocks they are."""
    q, k, v, dout = arrays
    specs = [step.spec for plan in plans for step in plan.kernels if step.name == "block_map"]
    keys, queries = np.ones(seen.shape[-1], bool), np.ones(seen.shape[-2], bool)
    for spec in specs:
        any_, _ = _blocks_of(seen, spec.block_m, spec.block_n)
        keys &= ~any_.any((0, 1, 2)).repeat(spec.block_n)[: len(keys)]
        queries &= ~any_.any((0, 1, 3)).repeat(spec.block_m)[: len(queries)]
    assert keys.any()
    assert queries.any()
    for x in (k, v):
        x[..., keys, :] = np.nan
    for x in (q, dout):
        x[..., queries, :] = np.nan


def _far_corner(name, seqlen_q, seqlen_k):
    """Seen: the last third of the keys, by the last third of the queries, and holes in it."""
    mask = np.zeros((seqlen_q, seqlen_k), bool)
    mask[-(seqlen_q // 3) :, -(seqlen_k // 3) :] = np.random.default_rng(0).random((seqlen_q // 3, seqlen_k // 3)) < 0.8
    return {"mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_blocks_are_not_loaded(family, monkeypatch):
    """What was loaded would be multiplied by 0, and a NaN would stay one."""
    monkeypatch.setitem(globals(), "_beside", _far_corner)
    _run(family, "far corner", _poison_what_nobody_sees)


def _hide_when_asked(text):
    """No single pair is ever seen, whoever asks; the maps are as they were."""
    patched = text.replace("    return hidden;\n", "    return true;\n")
    assert patched != text or "hides(" not in text
    return text if "void __launch_bounds__(NUM_THREADS, 1) block_map(" in text else patched


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_blocks_ask_for_no_pair(family):
    """All blocks are whole: nobody asks, and nobody learns that pairs are hidden."""
    dtype, arch, _, _, _ = FAMILIES[family]
    q, k, v, dout = _arrays(dtype, 128, 384)  # a multiple of every tile's keys: 64, 96, 128
    with _device(arch, patches=(_hide_when_asked,)) as xp:
        held = [xp.asarray(x) for x in (q, k, v)]
        options = {"mask": xp.asarray(np.ones((128, 384), bool)), "family": family.split()[0]}
        out, lse = attention(*held, return_lse=True, **options)
        grads = attention_backward(xp.asarray(dout), *held, out, lse, **options)[:3]
        out, lse, grads = out.get(), lse.get(), tuple(x.get() for x in grads)
    p_dtype = q.dtype if q.dtype.itemsize == 2 else None
    report = bounds.check_forward(q, k, v, out, lse, p_dtype=p_dtype)
    report += bounds.check_backward(dout, q, k, v, out, lse, grads, p_dtype=p_dtype)
    assert report.ok, report

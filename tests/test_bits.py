"""What a result's bits do not depend on: the run, the batch and its mates, memory, `out=`."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from cupyflash import AttentionGradients, attention, attention_backward
from cupyflash.testing import data
from cupyflash.testing.data import Case

#: Large enough for several blocks both ways, odd enough for remainders everywhere.
CASE = Case(
    seed=1, num_heads_k=2, group=2, seqlen_q=150, seqlen_k=217, head_dim=33, head_dim_v=20, causal=True
)
DTYPES = pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
#: None lets the backend choose blocks; the other makes sure that there are several, and several tasks.
TILES = pytest.mark.parametrize("small", [False, True], ids=["own tile", "small tile"])


def tile(backend, dtype, small):
    return {"tile": backend.small_tile(dtype)} if small else {}


def both(backend, x, grads_out=None, out=None, **options):
    """out, lse, dq, dk, dv as NumPy arrays from NumPy or backend arrays."""
    q, k, v, dout, dlse = (
        backend.array(a) if isinstance(a, np.ndarray) and backend.name != "numpy" else a for a in x
    )
    result = attention(q, k, v, out=out, return_lse=True, **options)
    grads = attention_backward(dout, q, k, v, *result, dlse=dlse, grads_out=grads_out, **options)
    return [backend.numpy(a) for a in (*result, *grads[:3])]


def assert_same_bits(got, want):
    assert len(got) == len(want)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=False):
        assert a.dtype == b.dtype
        assert a.shape == b.shape, name
        assert a.tobytes() == b.tobytes(), f"{name} differs in {(a != b).sum()} of {a.size} elements"


@TILES
@DTYPES
def test_run_to_run(backend, dtype, small):
    x = dataclasses.replace(CASE, dtype=dtype.name).inputs()
    want = both(backend, x, causal=True, **tile(backend, dtype, small))
    for _ in range(3):
        assert_same_bits(both(backend, x, causal=True, **tile(backend, dtype, small)), want)


@TILES
@DTYPES
def test_batch_size_and_batch_mates(backend, dtype, small):
    """An entry alone, and the same entry among others, whatever they hold."""
    case = dataclasses.replace(CASE, dtype=dtype.name, batch=((5,),) * 3)
    x = case.inputs()
    whole = both(backend, x, causal=True, **tile(backend, dtype, small))
    options = tile(backend, dtype, small)
    for n in (0, 3):
        alone = data.Inputs(*(a[n] for a in x))
        assert_same_bits(both(backend, alone, causal=True, **options), [a[n] for a in whole])
        single = data.Inputs(*(a[n : n + 1] for a in x))
        assert_same_bits(both(backend, single, causal=True, **options), [a[n : n + 1] for a in whole])
    for a in x:
        a[1] = -3 * a[1]
        a[4] = np.nan
    changed = both(backend, x, causal=True, **tile(backend, dtype, small))
    assert_same_bits([a[[0, 2, 3]] for a in changed], [a[[0, 2, 3]] for a in whole])


@TILES
@DTYPES
def test_heads_do_not_touch_each_other(backend, dtype, small):
    case = dataclasses.replace(CASE, dtype=dtype.name, num_heads_k=3)
    x = case.inputs()
    whole = both(backend, x, causal=True, **tile(backend, dtype, small))
    alone = data.Inputs(x.q[2:4], x.k[1:2], x.v[1:2], x.dout[2:4], x.dlse[2:4])
    got = both(backend, alone, causal=True, **tile(backend, dtype, small))
    assert_same_bits(got, [a[2:4] for a in whole[:3]] + [a[1:2] for a in whole[3:]])


@DTYPES
def test_large_batches_of_small_problems(backend, dtype):
    """Many entries at once may be computed together; an entry's bits stay."""
    case = dataclasses.replace(CASE, dtype=dtype.name, batch=((40,),) * 3, seqlen_q=13, seqlen_k=17)
    x = case.inputs()
    whole = both(backend, x, causal=True)
    for n in (0, 17, 39):
        assert_same_bits(both(backend, data.Inputs(*(a[n] for a in x)), causal=True), [a[n] for a in whole])


@TILES
@DTYPES
@pytest.mark.parametrize("style", [s for s in data.STYLES if s != "repeated"])
def test_strides_and_alignment(backend, style, dtype, small):
    if style not in backend.styles:
        pytest.skip("a GPU loads elements at multiples of their size only")
    case = dataclasses.replace(CASE, dtype=dtype.name, batch=((2,),) * 3)
    x = case.inputs()
    want = both(backend, x, causal=True, **tile(backend, dtype, small))
    placed = [backend.array(a, style=style) for a in x]
    assert_same_bits(both(backend, placed, causal=True, **tile(backend, dtype, small)), want)


@DTYPES
def test_strides_of_single_queries_and_keys(backend, dtype):
    """Matrices of one row or column are where BLAS would take another path."""
    for sizes in (
        {"seqlen_q": 1},
        {"seqlen_k": 1},
        {"head_dim": 1, "head_dim_v": 1},
        {"seqlen_q": 2, "seqlen_k": 3},
    ):
        x = dataclasses.replace(CASE, dtype=dtype.name, **sizes).inputs()
        want = both(backend, x, causal=True)
        for style in set(backend.styles) - {"plain", "repeated"}:
            assert_same_bits(both(backend, [backend.array(a, style=style) for a in x], causal=True), want)


@TILES
@DTYPES
def test_broadcasting_is_repeating(backend, dtype, small):
    """Stride 0, size 1, a missing axis and a copy give the same out, lse and dq."""
    case = dataclasses.replace(CASE, dtype=dtype.name, batch=((3,), (), ()))
    x = case.inputs()
    want = both(backend, x, causal=True, **tile(backend, dtype, small))
    for make in (lambda a: a[None], lambda a: np.broadcast_to(a, (3, *a.shape)), lambda a: np.stack([a] * 3)):
        y = x._replace(k=make(x.k), v=make(x.v))
        assert_same_bits(both(backend, y, causal=True, **tile(backend, dtype, small))[:3], want[:3])


@DTYPES
def test_layout(backend, dtype):
    case = dataclasses.replace(CASE, dtype=dtype.name, batch=((2,),) * 3)
    x = case.inputs()
    want = both(backend, x, causal=True)
    shd = data.Inputs(*(np.ascontiguousarray(a.swapaxes(-2, -3)) for a in x[:4]), x.dlse)
    out, lse, *grads = both(backend, shd, causal=True, layout="shd")
    assert_same_bits([out.swapaxes(-2, -3), lse, *(g.swapaxes(-2, -3) for g in grads)], want)


@DTYPES
def test_number_of_axes(backend, dtype):
    case = dataclasses.replace(CASE, dtype=dtype.name, num_heads_k=1, group=1)
    x = case.inputs()
    want = both(backend, x, causal=True)
    assert_same_bits([a[None] for a in both(backend, data.Inputs(*(a[0] for a in x)), causal=True)], want)
    deep = both(backend, data.Inputs(*(a[None, None] for a in x)), causal=True)
    assert_same_bits([a[0, 0] for a in deep], want)


@pytest.mark.parametrize("style", data.OUTPUT_STYLES)
@DTYPES
def test_out_and_grads_out(backend, dtype, style):
    if style not in backend.styles:
        pytest.skip("a GPU loads elements at multiples of their size only")
    case = dataclasses.replace(CASE, dtype=dtype.name, batch=((2,),) * 3)
    x = case.inputs()
    want = both(backend, x, causal=True)
    arrays = [data.place_empty(a.shape, a.dtype, style, backend.xp) for a in want]
    out, lse, *grads = (p.array for p in arrays)
    got = both(backend, x, out=(out, lse), grads_out=AttentionGradients(*grads), causal=True)
    assert_same_bits(got, want)
    assert all(p.guards_intact() for p in arrays)


@DTYPES
def test_return_lse_changes_no_bit(backend, dtype):
    x = dataclasses.replace(CASE, dtype=dtype.name).inputs()
    q, k, v = backend.arrays(x[:3])
    alone = backend.numpy(attention(q, k, v, causal=True))
    assert alone.tobytes() == backend.numpy(attention(q, k, v, causal=True, return_lse=True).out).tobytes()


@DTYPES
def test_an_offset_is_its_number(backend, dtype):
    """A number, an array of one number, and the default are one diagonal."""
    case = dataclasses.replace(CASE, dtype=dtype.name, batch=((2,),) * 3)
    x = case.inputs()
    want = both(backend, x, causal=True)
    off = case.seqlen_k - case.seqlen_q
    for given in (off, np.int32(off), np.array(off), np.array([off]), np.array([off, off])):
        assert_same_bits(both(backend, x, causal=True, q_offset=given), want)


@DTYPES
def test_offsets_of_mates(backend, dtype):
    case = dataclasses.replace(CASE, dtype=dtype.name, batch=((3,),) * 3)
    x = case.inputs()
    got = both(backend, x, causal=True, q_offset=np.array([-40, 10, 300]))
    for n, offset in enumerate((-40, 10, 300)):
        alone = both(backend, data.Inputs(*(a[n] for a in x)), causal=True, q_offset=offset)
        assert_same_bits([a[n] for a in got], alone)


def test_number_of_workers(monkeypatch):
    """CUPYFLASH_NUM_THREADS changes who computes a block, not what."""
    import subprocess
    import sys

    program = (
        "import hashlib, numpy as np\n"
        "from cupyflash import attention, attention_backward\n"
        "x = np.random.default_rng(0).standard_normal((4, 2, 4, 300, 32)).astype(np.float32)\n"
        "r = attention(*x[:3], causal=True, return_lse=True)\n"
        "g = attention_backward(x[3], *x[:3], *r, causal=True)[:3]\n"
        "print(hashlib.sha256(b''.join(a.tobytes() for a in (*r, *g))).hexdigest())\n"
    )
    import os

    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "CUPYFLASH_NUM_THREADS": n},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for n in ("1", "2", "5")
    }
    assert len(hashes) == 1


# ------------------------------------------------------------------------------------------------ many times, at once


@pytest.fixture(scope="module")
def busy_gpu():
    """Another program on the GPU, multiplying matrices."""
    import subprocess
    import sys

    program = "import cupy\na = cupy.ones((4096, 4096), cupy.float32)\nwhile True: (a @ a)[0, 0].get()"
    process = subprocess.Popen([sys.executable, "-c", program])
    yield
    assert process.poll() is None, "the other program has stopped"
    process.kill()
    process.wait()


@pytest.mark.gpu
@pytest.mark.parametrize("family", [None, "sm80"])
@pytest.mark.parametrize(
    ("batch", "heads", "heads_k", "seqlen", "dim", "causal"),
    [
        (1, 1, 1, 2048, 128, True),
        (1, 1, 1, 2048, 64, False),
        (1, 1, 1, 1000, 256, True),
        (2, 8, 2, 777, 128, True),
        (1, 8, 8, 4096, 128, False),
        (4, 16, 16, 1024, 64, True),
    ],
)
def test_a_thousand_backwards(gpu, busy_gpu, batch, heads, heads_k, seqlen, dim, causal, family):
    """On four streams at once, beside another program: key blocks that wait for one another always end, and alike."""
    xp, rng = gpu.xp, np.random.default_rng(1)
    shapes = [(batch, h, seqlen, dim) for h in (heads, heads_k, heads_k, heads)]
    q, k, v, dout = (xp.asarray(rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)) for shape in shapes)
    out, lse = attention(q, k, v, causal=causal, return_lse=True)
    first = attention_backward(dout, q, k, v, out, lse, causal=causal, family=family)[:3]
    want = [x.view(np.int16).copy() for x in first]
    streams = [xp.cuda.Stream(non_blocking=True) for _ in range(4)]
    xp.cuda.Device().synchronize()
    for _ in range(10):
        differ = []
        for turn in range(100):
            with streams[turn % 4]:
                grads = attention_backward(dout, q, k, v, out, lse, causal=causal, family=family)
                differ += [(x.view(np.int16) != y).any() for x, y in zip(grads[:3], want, strict=True)]
        xp.cuda.Device().synchronize()
        assert not any(map(bool, differ))

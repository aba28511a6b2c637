"""CUDA graphs: a captured call replays to the same bits, whatever else uses the memory pool in between."""

from __future__ import annotations

import numpy as np
import pytest

from cupyflash import AttentionGradients, AttentionResult, attention, attention_backward, prepare
from cupyflash.testing import data
from cupyflash.testing.data import Case

pytestmark = pytest.mark.gpu

CASES = {
    "plain": Case(seed=1, batch=((2,),) * 3, group=2, seqlen_q=200, seqlen_k=300, head_dim=64, head_dim_v=64),
    "causal, broadcast": Case(
        seed=2,
        batch=((3,), (), (1,)),
        group=2,
        seqlen_q=100,
        seqlen_k=150,
        head_dim=40,
        head_dim_v=72,
        causal=True,
    ),
    "offsets": Case(
        seed=3,
        batch=((3,),) * 3,
        seqlen_q=100,
        seqlen_k=150,
        head_dim=32,
        head_dim_v=32,
        causal=True,
        offset_shape=(3,),
    ),
    "strided": Case(
        seed=4,
        batch=((2,),) * 3,
        seqlen_q=65,
        seqlen_k=90,
        head_dim=32,
        head_dim_v=32,
        styles=("gaps",) * 9,
        dtype="float16",
    ),
    "float64": Case(
        seed=5, seqlen_q=100, seqlen_k=100, head_dim=48, head_dim_v=48, dtype="float64", causal=True
    ),
}


def use_the_pool(xp, stream, seed):
    """Allocate, fill and free many blocks on another stream."""
    rng = np.random.default_rng(seed)
    with stream:
        for n in rng.integers(1, 2_000_000, 30):
            xp.empty(int(n), np.uint8).fill(0xFF)
        stream.synchronize()


@pytest.mark.parametrize("name", CASES)
def test_replays_are_the_eager_bits(gpu, name):
    xp, case = gpu.xp, CASES[name]
    x = case.inputs()
    q, k, v, dout, dlse = (gpu.array(a, style=s) for a, s in zip(x, case.styles, strict=False))
    options = case.options()
    if isinstance(options["q_offset"], np.ndarray):
        options["q_offset"] = xp.asarray(options["q_offset"])
    prepare(q, k, v, **options)
    stream, other = xp.cuda.Stream(non_blocking=True), xp.cuda.Stream(non_blocking=True)
    result = AttentionResult(xp.empty(dout.shape, dout.dtype), xp.empty(dlse.shape, dlse.dtype))
    grads = AttentionGradients(*(xp.empty(a.shape, a.dtype) for a in (q, k, v)))
    xp.cuda.Device().synchronize()

    with stream:
        stream.begin_capture()
        attention(q, k, v, out=result, **options)
        attention_backward(dout, q, k, v, *result, dlse=dlse, grads_out=grads, **options)
        graph = stream.end_capture()

    def change(turn):
        """New numbers in the same arrays, and what eager calls make of them."""
        new = data.draw(
            "normal", np.random.default_rng(turn), data.Shapes(*(a.shape for a in x[:4])), x.q.dtype
        )
        for a, b in zip((q, k, v, dout), new[:4], strict=True):
            a[...] = xp.asarray(b)
        eager = attention(q, k, v, return_lse=True, **options)
        wanted = (*eager, *attention_backward(dout, q, k, v, *eager, dlse=dlse, **options)[:3])
        return [gpu.numpy(a).tobytes() for a in wanted]

    for turn in range(10):
        want = change(turn)
        for a in (*result, *grads[:3]):
            a.fill(np.nan)
        xp.cuda.Device().synchronize()
        graph.launch(stream)
        use_the_pool(xp, other, turn)
        stream.synchronize()
        got = [gpu.numpy(a).tobytes() for a in (*result, *grads[:3])]
        assert got == want, [a == b for a, b in zip(got, want, strict=True)]


def test_temporaries_outlive_the_capture(gpu):
    """All of the call but its arguments is gone before the replays; others ask for its memory."""
    xp, case = gpu.xp, CASES["causal, broadcast"]
    q, k, v, dout, _ = gpu.arrays(case.inputs())
    eager = attention(q, k, v, return_lse=True, causal=True)
    want = [gpu.numpy(a).tobytes() for a in attention_backward(dout, q, k, v, *eager, causal=True)[:3]]
    grads = AttentionGradients(*(xp.empty(a.shape, a.dtype) for a in (q, k, v)))
    stream = xp.cuda.Stream(non_blocking=True)
    xp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        attention_backward(dout, q, k, v, *eager, grads_out=grads, causal=True)
        graph = stream.end_capture()
    held = []
    for turn in range(20):
        with xp.cuda.Stream(non_blocking=True) as other:
            held += [
                xp.full(size, 0xFF, np.uint8) for size in (512, 4096, 2**16, 2**18, 2**20) for _ in range(4)
            ]
            other.synchronize()
        poison = [a.copy() for a in held[-5:]]
        graph.launch(stream)
        stream.synchronize()
        assert [gpu.numpy(a).tobytes() for a in grads[:3]] == want, turn
        assert all((a == 0xFF).all() for a in poison), "a replay wrote memory that others own"
        assert all(bool((a == 0xFF).all()) for a in held), "a replay wrote memory that others own"
        if turn % 3 == 2:
            held.clear()

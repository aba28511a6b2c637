"""Several threads, streams and devices at once."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cupyflash import attention, attention_backward
from cupyflash.testing import data
from cupyflash.testing.data import Case

THREADS = 8


def problems():
    """Different problems, so that threads that mix them up are found."""
    for seed, dtype in enumerate(data.DTYPES * 2):
        yield Case(
            seed=seed,
            dtype=dtype.name,
            batch=((2,),) * 3,
            group=2,
            seqlen_q=90 + 7 * seed,
            seqlen_k=130,
            head_dim=16 + seed,
            head_dim_v=24,
            causal=seed % 2 == 0,
        )


def solve(backend, x, causal):
    q, k, v, dout, dlse = backend.arrays(x)
    result = attention(q, k, v, causal=causal, return_lse=True)
    grads = attention_backward(dout, q, k, v, *result, dlse=dlse, causal=causal)
    return [backend.numpy(a).tobytes() for a in (*result, *grads[:3])]


def blas_threads():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    return [(p["filepath"], p["num_threads"]) for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"]


def test_eight_threads_at_once(backend):
    cases = [(case.inputs(), case.causal) for case in problems()]
    before = blas_threads()
    want = [solve(backend, *case) for case in cases]
    start = threading.Barrier(THREADS)

    def work(n):
        start.wait()
        order = np.random.default_rng(n).permutation(len(cases))
        return all(solve(backend, *cases[i]) == want[i] for _ in range(3) for i in order)

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))
    assert blas_threads() == before


def test_blas_is_restored_after_an_error():
    before = blas_threads()
    x = np.ones((1, 4, 3), np.float32)
    for bad in ({"scale": np.nan}, {"out": np.empty((1, 4, 4), np.float32)}):
        with contextlib.suppress(ValueError):
            attention(x, x, x, **bad)
            pytest.fail("accepted")
    assert blas_threads() == before


def test_threads_inside_a_limit_of_the_caller():
    """A limit that the caller has set on BLAS holds afterwards, too."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    x = np.ones((8, 300, 16), np.float32)
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        inside = blas_threads()
        attention(x, x, x)
        assert blas_threads() == inside


@pytest.mark.gpu
def test_several_streams(gpu):
    cases = [(case.inputs(), case.causal) for case in problems()]
    want = [solve(gpu, *case) for case in cases]

    def work(n):
        stream = gpu.xp.cuda.Stream(non_blocking=True)
        with stream:
            good = all(solve(gpu, *cases[i]) == want[i] for i in range(n, n + len(cases)) for i in (i % len(cases),))
            stream.synchronize()
        return good

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))


@pytest.mark.gpu
def test_streams_overlap_without_mixing(gpu):
    """One thread keeps many streams busy; nothing is waited for until the end."""
    cases = [(case.inputs(), case.causal) for case in problems()]
    want = [solve(gpu, *case) for case in cases]
    arrays = [gpu.arrays(x) for x, _ in cases]
    gpu.xp.cuda.Device().synchronize()
    running = []
    for _ in range(5):
        for (q, k, v, dout, dlse), (_, causal) in zip(arrays, cases, strict=True):
            with gpu.xp.cuda.Stream(non_blocking=True) as stream:
                result = attention(q, k, v, causal=causal, return_lse=True)
                grads = attention_backward(dout, q, k, v, *result, dlse=dlse, causal=causal)
                running.append((stream, (*result, *grads[:3])))
    for n, (stream, results) in enumerate(running):
        stream.synchronize()
        assert [gpu.numpy(a).tobytes() for a in results] == want[n % len(cases)], n


@pytest.mark.gpu
def test_a_call_runs_on_the_current_stream(gpu):
    """The launch waits for what its stream holds, and for nothing else."""
    x = next(problems()).inputs()
    want = solve(gpu, x, True)[0]
    with gpu.xp.cuda.Stream(non_blocking=True) as stream:
        q, k, v = (gpu.xp.zeros(a.shape, a.dtype) for a in x[:3])
        sources = gpu.arrays(x[:3])
        busy = gpu.xp.ones(50_000_000, np.float32)
        for _ in range(50):
            gpu.xp.sin(busy, out=busy)  # keeps the stream busy before the copies
        for a, b in zip((q, k, v), sources, strict=True):
            a[...] = b
        out = attention(q, k, v, causal=True)
        stream.synchronize()
        assert gpu.numpy(out).tobytes() == want


@pytest.mark.gpu
def test_a_second_device(gpu):
    count = gpu.xp.cuda.runtime.getDeviceCount()
    if count < 2:
        pytest.skip(f"{count} GPU here, two are needed")
    x = next(problems()).inputs()
    want = solve(gpu, x, True)
    with gpu.xp.cuda.Device(1):
        assert solve(gpu, x, True) == want
        arrays = gpu.arrays(x)
    assert attention(*arrays[:3], causal=True).device.id == 1  # whichever device is current

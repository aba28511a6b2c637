"""Sizes at which 16- or 32-bit arithmetic would break: over 65535 heads or batch entries, over 2**31 elements.

A size is put where only one index is large, so that the rest stays cheap; sampled parts are held against the bounds.
"""

import numpy as np
import pytest

from cupyflash import attention, attention_backward, attention_vjp
from cupyflash.testing import bounds


@pytest.mark.parametrize("shape", [(70001, 1, 3, 4), (1, 70001, 3, 4), (70001, 3, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_more_than_65535_entries_or_heads(backend, shape, dtype):
    rng = np.random.default_rng(1)
    q, k, v, dout = rng.standard_normal((4, *shape), np.float32).astype(dtype)
    placed = [backend.xp.asarray(x) for x in (q, k, v)]
    (out, lse), vjp = attention_vjp(*placed, causal=True, return_lse=True)
    grads = vjp(backend.xp.asarray(dout))
    host = [x if isinstance(x, np.ndarray) else x.get() for x in (out, lse, *grads[:3])]
    options = {"causal": True, "p_dtype": backend.p_dtype(dtype)}
    report = bounds.check_forward(q, k, v, *host[:2], **options)
    report = report + bounds.check_backward(dout, q, k, v, *host[:2], tuple(host[2:]), **options)
    assert report.ok, report


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu):
    """q, out, dout and dq have 2**31 + 640 elements; the last rows are those that a 32-bit offset would miss."""
    xp, rows, width = gpu.xp, 2**24 + 5, 128
    if xp.cuda.runtime.memGetInfo()[0] < 24 << 30:
        pytest.skip("less than 24 GiB of GPU memory are free")
    last = 300
    rng = np.random.default_rng(2)
    k, v = rng.standard_normal((2, 1, 5, width)).astype(np.float16)
    end, end_dout = rng.standard_normal((2, 1, last, width)).astype(np.float16)
    q, dout = (xp.zeros((1, rows, width), np.float16) for _ in range(2))
    q[:, -last:], dout[:, -last:] = xp.asarray(end), xp.asarray(end_dout)
    arrays = (q, xp.asarray(k), xp.asarray(v))
    assert q.size > 2**31

    out, lse = attention(*arrays, return_lse=True)
    grads = attention_backward(dout, *arrays, out, lse)
    end_out, end_lse = out[:, -last:].get(), lse[:, -last:].get()
    # The last rows are a problem of their own: rows are independent, and where dout is 0 nothing is added to dk and dv.
    p_dtype = gpu.p_dtype(np.float16)
    report = bounds.check_forward(end, k, v, end_out, end_lse, p_dtype=p_dtype)
    parts = (grads.dq[:, -last:].get(), grads.dk.get(), grads.dv.get())
    report = report + bounds.check_backward(end_dout, end, k, v, end_out, end_lse, parts, p_dtype=p_dtype)
    assert report.ok, report
    del out, grads, q, dout, arrays
    xp.get_default_memory_pool().free_all_blocks()

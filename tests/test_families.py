"""The sm80 family on a GPU whose own family is another: forced, over the whole range of cases."""

from __future__ import annotations

import random
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cupyflash import attention, attention_backward
from cupyflash.testing import cases, data

pytestmark = pytest.mark.gpu
WIDTHS = ((64, 64), (128, 128), (256, 256), (80, 80), (33, 100), (192, 128), (16, 250), (5, 7))


@pytest.fixture(autouse=True)
def takes_sm80(gpu):
    """Skip on cards before Ampere, which have no mma.sync of these shapes."""
    if int(gpu.xp.cuda.Device().compute_capability) < 80:
        pytest.skip("compute capability below 8.0")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("seed", range(40))
def test_any_case(gpu, dtype, seed):
    """Strides, alignments, masks, heads that share tiles: against the specification."""
    rng = random.Random(seed)
    case = data.random_case(rng.randrange, dtypes=(dtype,), styles=data.GPU_STYLES, work=4_000_000)
    head_dim, head_dim_v = WIDTHS[seed % len(WIDTHS)]
    case = replace(case, head_dim=head_dim, head_dim_v=head_dim_v)
    if seed % 2 and not case.offset_shape:
        case = replace(case, seqlen_q=rng.randrange(1, 900), seqlen_k=rng.randrange(1, 900))
    report = cases.run(case, gpu.xp, family="sm80")
    assert report.ok, report


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_long_sequences_as_the_other_family_has_them(gpu, width, causal):
    """2000 rows; the same bits each time, and nearly those of dq in the order of arrival."""
    r = np.random.default_rng(width)
    shapes = [(2, heads, 2000, width) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (gpu.xp.asarray(r.standard_normal(s, np.float32).astype(ml_dtypes.bfloat16)) for s in shapes)
    found = {}
    for family in (None, "sm80", "sm80"):
        out, lse = attention(q, k, v, causal=causal, family=family, return_lse=True)
        grads = attention_backward(dout, q, k, v, out, lse, causal=causal, family=family)[:3]
        arrays = [gpu.numpy(x).astype(np.float32) for x in (out, lse, *grads)]
        if family in found:
            for x, y in zip(found[family], arrays, strict=True):
                np.testing.assert_array_equal(x, y)
        found[family] = arrays
    any_order = attention_backward(dout, q, k, v, out, lse, causal=causal, family="sm80", deterministic=False)[:3]
    others = (*arrays[:2], *(gpu.numpy(x).astype(np.float32) for x in any_order))
    for x, y, z in zip(found[None], found["sm80"], others, strict=True):
        assert np.abs(x - y).max() <= 0.02 * np.abs(x).max()
        assert np.abs(z - y).max() <= 0.02 * np.abs(x).max()

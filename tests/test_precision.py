"""float32 on tensor cores is never less exact than IEEE float32, on data sets that hurt.

The emulator's tensor cores round as an H200's do, bit by bit (docs/emulator.md).
"""

from __future__ import annotations

import numpy as np
import pytest
from emulator import Device, Schedule, why_not

from cupyflash import attention, attention_backward
from cupyflash.testing import precision

AT_MOST = 1.25  # times the error of IEEE float32, in both measures
KERNELS = {"mma.sync": "sm80", "wgmma": "sm90"}


def computed(xp, x, causal, family, kind):
    """Out and the gradients; the backward of sm90's float32 is that of sm80."""
    q, k, v, dout = map(xp.asarray, x)  # no copy where it is there
    options = {"causal": causal, "precision": kind}
    out, lse = attention(q, k, v, family=family, return_lse=True, **options)
    found = {"out": out}
    if family != "sm90":
        gradients = attention_backward(dout, q, k, v, out, lse, family=family, **options)
        found |= {name: getattr(gradients, name) for name in ("dq", "dk", "dv")}
    return found


def check(xp, name, seed, sizes, family, host=np):
    """Against the FMA kernels with the same algorithm; the forward also against an unfused computation on the host."""
    *lead, rows, keys, head_dim = sizes
    x = precision.draw(name, seed, tuple(lead), rows, keys, head_dim, np.float32, host)
    causal = precision.DATA_SETS[name].causal
    _, right, size = precision.truth(x, causal, xp=host)
    plain = computed(xp, x, causal, "simt", "ieee")
    for result, got in computed(xp, x, causal, family, "highest").items():
        rivals = [plain[result], *([precision.unfused_out(x, causal, host)] if result == "out" else [])]
        ours = precision.errors(_at(host, got), right[result], size[result])
        for rival in rivals:
            theirs = precision.errors(_at(host, rival), right[result], size[result])
            assert max(a / b for a, b in zip(ours, theirs, strict=True)) <= AT_MOST, (result, ours, theirs)


def _at(host, x):
    return x.get() if host is np and hasattr(x, "get") else x


@pytest.mark.parametrize("name", precision.DATA_SETS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("instruction", KERNELS)
@pytest.mark.share(5)
def test_not_less_exact_than_ieee(name, head_dim, instruction):
    why_not()
    with Device(Schedule(), arch=90) as xp:
        check(xp, name, 1, (1, 192, 256, head_dim), KERNELS[instruction])


@pytest.mark.gpu
@pytest.mark.parametrize("name", precision.DATA_SETS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("instruction", KERNELS)
def test_not_less_exact_than_ieee_on_a_gpu(gpu, name, head_dim, instruction):
    arch = int(gpu.xp.cuda.Device().compute_capability)
    if arch < 80 or (instruction == "wgmma" and arch != 90):
        pytest.skip("a GPU without this instruction")
    check(gpu.xp, name, 2, (4, 1024, 2048, head_dim), KERNELS[instruction], gpu.xp)

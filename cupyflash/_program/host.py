"""Host time: what calls on small arrays cost their caller, who does not wait for the device.

Calls take turns in batches. Those of a batch follow each other at once; the device catches up outside the clock.
NumPy's calls end with their result, so that theirs is the whole time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .. import AttentionGradients, attention, attention_backward
from .backend import Backend
from .contenders import Torch, as_torch
from .timing import OURS, Samples, in_turn
from .workload import Workload

Call = Callable[[], object]

BATCHES = 9
CALLS = {"numpy": 20, "cupy": 200}  # of a batch: their kernels wait in a stream, which holds 1024
TORCH = "torch: scaled_dot_product_attention(q, k, v)"
TORCH_BACKWARD = "torch: autograd.grad(out, (q, k, v), dout)"


def workload(dtype: str) -> Workload:
    """One entry of 8 heads, 128 rows, width 64: the device needs less time for it than the host."""
    return Workload(1, 8, 128, 64, dtype)


def calls(
    work: Workload, xp: Any, family: str | None = None, precision: str | None = None
) -> dict[str, Callable[[], Call]]:
    """What makes each call whose host time is measured, by name; the names of ours begin with OURS."""
    how: dict[str, Any] = {"family": family, "precision": precision}
    q, k, v, dout = work.arrays(xp)

    def into() -> Call:
        result = attention(q, k, v, return_lse=True, **how)
        return partial(attention, q, k, v, out=tuple(result), **how)

    def backward(**options: Any) -> Call:
        result = attention(q, k, v, return_lse=True, **how)
        return partial(attention_backward, dout, q, k, v, result.out, result.lse, **how, **options)

    def backward_into() -> Call:
        return backward(grads_out=AttentionGradients(*(xp.empty_like(x) for x in (q, k, v))))

    def torch_forward() -> Call:
        import torch

        return partial(torch.nn.functional.scaled_dot_product_attention, *map(as_torch, (q, k, v)))

    return {
        f"{OURS}: attention(q, k, v)": lambda: partial(attention, q, k, v, **how),
        f"{OURS}: attention(..., return_lse=True)": lambda: partial(attention, q, k, v, return_lse=True, **how),
        f"{OURS}: attention(..., out=(out, lse))": into,
        TORCH: torch_forward,
        f"{OURS}: attention_backward(...)": backward,
        f"{OURS}: attention_backward(..., deterministic=False)": lambda: backward(deterministic=False),
        f"{OURS}: attention_backward(..., grads_out=...)": backward_into,
        TORCH_BACKWARD: lambda: Torch(work, (q, k, v, dout)).backward,
    }


def peer(name: str) -> str:
    """The call of torch that does what a call of ours does."""
    return TORCH_BACKWARD if "backward" in name or name == TORCH_BACKWARD else TORCH


def measure(makers: Mapping[str, Callable[[], Call]], backend: Backend, batches: int = BATCHES) -> Samples:
    """Seconds a call, by batch. A call that can't be made, or fails at first, is skipped with its reason."""
    found, warm = Samples("call"), {}
    for name, make in makers.items():
        try:
            call = make()
            for _ in range(3):
                call()
        except Exception as error:  # torch may be missing
            found.skip(name, error)
        else:
            warm[name] = call
    names = list(warm)
    for turn in range(batches):
        for name in in_turn(names, turn):
            seconds = sample(warm[name], CALLS[backend.name], backend.synchronize)
            found.samples.setdefault(name, []).append(seconds)
    found.samples = {name: found.samples[name] for name in names}
    return found


def sample(call: Call, count: int, synchronize: Call) -> float:
    """Seconds a call, while the device catches up outside the clock."""
    synchronize()
    began = time.perf_counter()
    for _ in range(count):
        call()
    spent = (time.perf_counter() - began) / count
    synchronize()
    return spent

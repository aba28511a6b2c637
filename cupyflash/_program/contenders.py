"""cupyflash and its peers on one workload, each as two calls without arguments: forward and backward."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np

from .. import attention, attention_backward
from .workload import Workload, numpy_dtype

Arrays = tuple[Any, Any, Any, Any]  # q, k, v, dout

TORCH_BACKENDS = {
    "torch flash": "FLASH_ATTENTION",
    "torch mem-eff.": "EFFICIENT_ATTENTION",
    "torch cuDNN": "CUDNN_ATTENTION",
    "torch math": "MATH",
}


class Timed(Protocol):
    """Something that can be timed."""

    def around(self) -> AbstractContextManager[Any]:
        """What must be in force while it runs, entered outside the clock."""

    def forward(self) -> Any:
        """The forward once."""

    def backward(self) -> Any:
        """The backward once, from a forward that has run before."""


class Contender(Timed, Protocol):
    """Something that computes attention."""

    def results(self, direction: str) -> dict[str, Any]:
        """What a direction computes, by name, in axes (batch, heads, seqlen, columns); as arrays of its own kind."""


class Ours:
    """cupyflash."""

    def __init__(
        self,
        workload: Workload,
        arrays: Arrays,
        family: str | None = None,
        deterministic: bool = True,
        precision: str | None = None,
    ) -> None:
        self._arrays, self._deterministic = arrays, deterministic
        self._options: dict[str, Any] = {"causal": workload.causal, "family": family, "precision": precision}

    def around(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @cached_property
    def kept(self) -> Any:
        """out and lse, which the backward reads."""
        return self.forward()

    def forward(self) -> Any:
        q, k, v, _ = self._arrays
        return attention(q, k, v, return_lse=True, **self._options)

    def backward(self) -> Any:
        q, k, v, dout = self._arrays
        return attention_backward(dout, q, k, v, *self.kept, deterministic=self._deterministic, **self._options)

    def results(self, direction: str) -> dict[str, Any]:
        return dict(getattr(self, direction)()._asdict())


class Unfused:
    """The textbook's attention: one array operation after another, with the matrix of weights in memory.

    The forward keeps the weights for the backward. On NumPy, 16-bit inputs are computed in float32, because
    NumPy has no fast product of 16-bit matrices.
    """

    def __init__(self, workload: Workload, arrays: Arrays, xp: Any) -> None:
        self._xp, self._workload, self._arrays = xp, workload, arrays
        widen = xp is np and numpy_dtype(workload.dtype).itemsize == 2
        self._work = np.dtype(np.float32) if widen else numpy_dtype(workload.dtype)

    def around(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @cached_property
    def kept(self) -> Any:
        """out and the weights, which the backward reads."""
        return self.forward()

    @cached_property
    def _hidden(self) -> Any:
        n = self._workload.seqlen
        return ~self._xp.tri(n, dtype=bool) if self._workload.causal else None

    def _wide(self, *arrays: Any) -> Any:
        return (x.astype(self._work, copy=False) for x in arrays)

    def forward(self) -> Any:
        xp, dtype = self._xp, self._arrays[0].dtype
        q, k, v = self._wide(*self._arrays[:3])
        p = xp.matmul(q * q.dtype.type(self._workload.scale), k.swapaxes(-1, -2))
        if self._hidden is not None:
            xp.copyto(p, -np.inf, where=self._hidden)
        p -= p.max(axis=-1, keepdims=True)
        xp.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        return xp.matmul(p, v).astype(dtype, copy=False), p

    def backward(self) -> Any:
        xp, dtype = self._xp, self._arrays[0].dtype
        out, p = self.kept
        q, k, v, dout, out = self._wide(*self._arrays, out)
        dv = xp.matmul(p.swapaxes(-1, -2), dout)
        ds = xp.matmul(dout, v.swapaxes(-1, -2))
        ds -= (dout * out).sum(axis=-1, keepdims=True)
        ds *= p
        ds *= ds.dtype.type(self._workload.scale)
        dq, dk = xp.matmul(ds, k), xp.matmul(ds.swapaxes(-1, -2), q)
        return tuple(x.astype(dtype, copy=False) for x in (dq, dk, dv))

    def results(self, direction: str) -> dict[str, Any]:
        return {"out": self.forward()[0]} if direction == "forward" else gradients(self.backward())


class Torch:
    """torch's scaled_dot_product_attention, by the SDPBackend of that name, or the one that torch chooses."""

    def __init__(self, workload: Workload, arrays: Arrays, backend: str | None = None) -> None:
        import torch

        self._torch, self._causal, self._backend = torch, workload.causal, backend
        self._inputs = tuple(as_torch(x) for x in arrays)

    def around(self) -> AbstractContextManager[Any]:
        if self._backend is None:
            return nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, self._backend))  # type: ignore[no-any-return]

    def _attention(self, q: Any, k: Any, v: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backend that can't run says so in warnings before it raises
            return self._torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self._causal)

    @cached_property
    def _graph(self) -> Any:
        leaves = tuple(x.detach().requires_grad_() for x in self._inputs[:3])
        return self._attention(*leaves), leaves

    def forward(self) -> Any:
        with self._torch.no_grad():
            return self._attention(*self._inputs[:3])

    def backward(self) -> Any:
        out, leaves = self._graph
        return self._torch.autograd.grad(out, leaves, self._inputs[3], retain_graph=True)

    def results(self, direction: str) -> dict[str, Any]:
        return {"out": self.forward()} if direction == "forward" else gradients(self.backward())


class Jax:
    """JAX's dot_product_attention. It runs on streams of its own, so the host times it, to the end of many calls."""

    def __init__(self, workload: Workload, arrays: Arrays, implementation: str = "cudnn") -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need memory too
        import jax

        self._jax = jax
        self._inputs = tuple(jax.block_until_ready(jax.jit(self._swap)(as_jax(x))) for x in arrays)
        self._attention = jax.jit(
            partial(jax.nn.dot_product_attention, is_causal=workload.causal, implementation=implementation)
        )
        self._pull = jax.jit(lambda vjp, dout: vjp(dout))

    @staticmethod
    def _swap(x: Any) -> Any:
        """Between (batch, heads, seqlen, columns) and JAX's (batch, seqlen, heads, columns)."""
        return x.swapaxes(1, 2)

    def around(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @cached_property
    def _graph(self) -> Any:
        return self._jax.vjp(self._attention, *self._inputs[:3])[1]

    def forward(self) -> Any:
        return self._attention(*self._inputs[:3])

    def backward(self) -> Any:
        return self._pull(self._graph, self._inputs[3])

    def clock(self, call: Callable[[], object], repeats: int) -> float:
        """Seconds a call."""
        self._jax.block_until_ready(call())
        began = time.perf_counter()
        for _ in range(repeats):
            result = call()
        self._jax.block_until_ready(result)
        return (time.perf_counter() - began) / repeats

    def results(self, direction: str) -> dict[str, Any]:
        if direction == "forward":
            return {"out": self._swap(self.forward())}
        return gradients([self._swap(x) for x in self.backward()])


def gradients(values: Iterable[Any]) -> dict[str, Any]:
    """dq, dk, dv by name."""
    return dict(zip(("dq", "dk", "dv"), values, strict=True))


def as_jax(x: Any) -> Any:
    """A JAX array of x's numbers; on a GPU of its memory."""
    import jax

    return jax.numpy.asarray(x) if isinstance(x, np.ndarray) else jax.dlpack.from_dlpack(x)


def as_torch(x: Any) -> Any:
    """A torch tensor of x's memory."""
    import torch

    if not isinstance(x, np.ndarray):
        return torch.from_dlpack(x)
    if x.dtype == numpy_dtype("bfloat16"):  # torch reads no ml_dtypes
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def contenders(
    workload: Workload, arrays: Arrays, xp: Any, family: str | None = None, precision: str | None = None
) -> dict[str, Callable[[], Contender]]:
    """What makes cupyflash and each peer, by name, cupyflash first. What can't run raises when run."""
    found: dict[str, Callable[[], Contender]] = {
        "cupyflash": lambda: Ours(workload, arrays, family, precision=precision),
        f"unfused {'NumPy' if xp is np else 'CuPy'}": lambda: Unfused(workload, arrays, xp),
    }
    if xp is np:
        return found | {"torch SDPA": lambda: Torch(workload, arrays)}
    return found | {
        name: lambda backend=backend: Torch(workload, arrays, backend) for name, backend in TORCH_BACKENDS.items()
    }

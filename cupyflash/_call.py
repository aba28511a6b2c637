"""One call's arrays: taken in, checked to lie together, handed on as canonical views to the CPU path or the GPU.

Between the public functions, which speak the user's shapes, and the computing modules, which speak
``(*leading, heads, rows, columns)``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _cpu, _tuned
from ._arrays import Array, address, import_cupy, is_cupy, misaligned, on_device, place, same_place, take
from ._plan import DEVICES, Device, Plan
from ._planner import plan_cpu, plan_gpu
from ._problem import Problem, read_problem
from ._tma import MAP_TYPES, MAPPED, unreadable

if TYPE_CHECKING:
    from ._launch import Ready


class Call:
    """q, k, v and what lies beside them, with the Problem they make.

    Attributes
    ----------
    problem : Problem
    place : int or None
        The CUDA device that holds the arrays; None for host memory.
    device : Device or None
        What to plan for: the device of ``place``, or the one that ``explain`` names.
    inputs : dict of str to array
        Every array that the call reads, by its argument's name.
    """

    def __init__(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        scale: object,
        causal: object,
        q_offset: Any,
        layout: object,
        precision: object,
        beside: dict[str, Array] | None = None,
        out: Array | None = None,
        device: object = None,
    ) -> None:
        q, k, v = take("q", q), take("k", k), take("v", v)
        self.inputs: dict[str, Array] = {"q": q, "k": k, "v": v}
        if beside is not None:
            self.inputs.update(beside)
        self.place = same_place(self.inputs)
        self.problem: Problem = read_problem(
            q, k, v, scale=scale, causal=causal, q_offset=q_offset, layout=layout, precision=precision,
            out_dtype=None if out is None else out.dtype,
        )  # fmt: skip
        if self.problem.q_offset is None:
            self.inputs["q_offset"] = _offsets(q_offset, self.place)
        self.device = _device(self.place) if device is None else _named_device(device)

    def plan(self, family: object, tile: object, wrt: frozenset[str] | None = None, deterministic: bool = True) -> Plan:
        """The plan of the forward, or of the backward for the gradients in ``wrt``."""
        if self.device is None:
            return plan_cpu(self.problem, family, tile, wrt)
        if tile is None:
            tile = _tuned.tile(self.problem, self.device)
        copies = tuple(f"{name}: {why}" for name, x in self.inputs.items() if (why := misaligned(x)))
        return plan_gpu(self.problem, self.device, family, tile, wrt, copies, self._unmapped(), deterministic)

    def _unmapped(self) -> tuple[str, ...]:
        """The inputs that TMA can't read in place, with the reason, on a GPU that has it."""
        if self.device is None or self.device.arch != 90 or self.problem.dtype not in MAP_TYPES:
            return ()
        reasons = []
        for name in MAPPED:
            if name in self.inputs:
                x = self.problem.canonical(self.inputs[name])
                if why := unreadable(x.shape, x.strides, address(x), x.itemsize):
                    reasons.append(f"{name}: {why}")
        return tuple(reasons)

    def allocate(self, out: Array | None, lse: Array | None, pair: bool) -> tuple[Array, Array | None]:
        """Out and lse, where the user gave none; lse only for a pair."""
        problem = self.problem
        if out is None:
            out = self.empty(problem.out_shape, problem.out_dtype)
        if lse is None and pair:
            lse = self.empty(problem.lse_shape, problem.accumulator)
        return out, lse

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """A new array where the call's arrays lie."""
        if self.place is None:
            return np.empty(shape, dtype)
        with on_device(self.place):
            return import_cupy().empty(shape, dtype)

    def forward(self, plan: Plan, out: Array, lse: Array | None) -> Ready | _cpu.Small | None:
        """Compute out, and lse where there is one; return what calls like this one can run again, if anything."""
        problem, inputs = self.problem, self.inputs
        q, k, v, offsets = inputs["q"], inputs["k"], inputs["v"], inputs.get("q_offset")
        if not problem.comes_canonical:
            q, k, v, out = map(problem.canonical, (q, k, v, out))
            lse = None if lse is None else problem.canonical_lse(lse)
        if self.place is None:
            return _cpu.forward(problem, q, k, v, offsets, out, lse, plan.block_m, plan.block_n)
        from . import _launch

        read: dict[str, Array | None] = {"q": q, "k": k, "v": v, "q_offsets": offsets}
        return _launch.forward(problem, plan, self.place, read, {"out": out, "lse": lse})

    def backward(self, plan: Plan, gradients: dict[str, Array]) -> Ready | None:
        """Compute the gradients, keyed "dq", "dk", "dv", from ``inputs``, which holds dout, out, lse too.

        Returns what ``forward`` returns.
        """
        problem, inputs = self.problem, self.inputs
        tensors = {name: problem.canonical(inputs[name]) for name in ("q", "k", "v", "dout", "out")}
        tensors |= {name: problem.canonical_lse(inputs[name]) for name in ("lse", "dlse") if name in inputs}
        grads = {name: problem.canonical(x) for name, x in gradients.items()}
        offsets = inputs.get("q_offset")
        if self.place is None:
            _cpu.backward(
                problem, tensors["dout"], tensors["q"], tensors["k"], tensors["v"], tensors["out"], tensors["lse"],
                tensors.get("dlse"), offsets, grads.get("dq"), grads.get("dk"), grads.get("dv"),
                plan.block_m, plan.block_n,
            )  # fmt: skip
            return None
        from . import _launch

        tensors["q_offsets"] = offsets
        return _launch.backward(problem, plan, self.place, tensors, grads)


def _offsets(q_offset: Any, where: int | None) -> Array:
    """One int64 offset for each batch entry, where the call's arrays lie; host offsets are copied to a device."""
    if is_cupy(q_offset):
        if where is None:
            raise TypeError("q_offset is a CuPy array, q a NumPy array: one call stays on one side")
        if place(q_offset) != where:
            raise ValueError(f"q_offset lies on CUDA device {place(q_offset)}, q on {where}: one device for a call")
    with on_device(where):
        return (np if where is None else import_cupy()).asarray(q_offset, np.int64)


@lru_cache(maxsize=64)
def _device(where: int | None) -> Device | None:
    """The GPU with this number, as a plan knows it."""
    if where is None:
        return None
    runtime = import_cupy().cuda.runtime
    properties = runtime.getDeviceProperties(where)
    name = properties["name"].decode()
    arch = 10 * properties["major"] + properties["minor"]
    return Device(name, arch, properties["sharedMemPerBlockOptin"], properties["multiProcessorCount"])


def _named_device(name: object) -> Device:
    if isinstance(name, str) and name in DEVICES:
        return DEVICES[name]
    raise ValueError(f"device={name!r}: device is None or one of {', '.join(DEVICES)}")

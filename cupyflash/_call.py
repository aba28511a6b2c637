"""One call's arrays: taken in, checked to lie together, handed on as canonical views to the CPU path or the GPU.

Between the public functions, which speak the user's shapes, and the computing modules, which speak
``(*leading, heads, rows, columns)``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _cpu, _tuned
from ._arrays import Array, address, check_beside, import_cupy, is_cupy, misaligned, on_device, same_place, take
from ._functions import Functions, args_of, check_functions, take_functions
from ._options import PLAIN, Asked, Options, Shape, read_options, read_seed
from ._plan import DEVICES, Device, Plan
from ._planner import plan_cpu, plan_gpu
from ._problem import Problem, read_problem
from ._score_args import argument_place
from ._terms import check_order
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
        asked: Asked,
        beside: dict[str, Array] | None = None,
        out: Array | None = None,
        device: object = None,
        functions: Functions | None = None,
    ) -> None:
        q, k, v = take("q", q), take("k", k), take("v", v)
        self.inputs: dict[str, Array] = {"q": q, "k": k, "v": v}
        if beside is not None:
            self.inputs.update(beside)
        options: dict[str, Array] = {}
        if not asked.is_plain:
            options = asked.arrays()
            functions = take_functions(asked) if functions is None else functions
            options |= {name: x for name, x in functions.arrays.items() if name not in functions.numbers}
        self.inputs.update(options)
        self.place = same_place(self.inputs)
        self._read_problem(asked, options, functions, None if out is None else out.dtype)
        if self.problem.q_offset is None:
            self.inputs["q_offset"] = _integers("q_offset", asked.q_offset, self.place)
        self.device = _device(self.place) if device is None else _named_device(device)

    def _read_problem(
        self, asked: Asked, arrays: dict[str, Array], functions: Functions | None, out_dtype: np.dtype | None
    ) -> None:
        """The problem of q, k, v and options."""
        problem = read_problem(
            self.inputs["q"], self.inputs["k"], self.inputs["v"], scale=asked.scale, causal=asked.causal,
            q_offset=asked.q_offset, layout=asked.layout, precision=asked.precision, out_dtype=out_dtype,
        )  # fmt: skip
        if functions is not None:
            shape = Shape(problem.batch_shape, problem.num_heads, problem.seqlen_q, problem.seqlen_k)
            shapes = tuple(x.shape for x in args_of("score_args", functions.arrays))
            options = read_options(
                asked, arrays, shape, score=functions.score, score_shapes=shapes, mask_function=functions.mask
            )
            bottom_right = options.lens and asked.q_offset is None and asked.causal != "top_left"
            problem = replace(problem, options=options, bottom_right=bottom_right)
            self._take_integers(asked, arrays, options)
            self._take_functions(functions, problem)
        self.problem: Problem = problem

    def _take_integers(self, asked: Asked, arrays: dict[str, Array], options: Options) -> None:
        """The options' small arrays of integers, as kernels read them."""
        for name in ("q_segments", "kv_segments"):
            if name in arrays:
                self.inputs[name] = _integers(name, arrays[name], self.place)
        for name, lengths in (("q_lens", asked.q_lens), ("kv_lens", asked.kv_lens)):
            if lengths is not None:
                self.inputs[name] = _integers(name, lengths, self.place)
        if options.dropout:
            self.inputs["seed"] = _integers("seed", read_seed(asked.seed), self.place, np.uint64)

    def _take_functions(self, functions: Functions, problem: Problem) -> None:
        """What score and mask functions read, numbers among it."""
        if problem.batch * problem.seqlen_q * problem.seqlen_k:
            check_functions(functions)
        for name in functions.numbers:
            x = functions.arrays[name]
            with on_device(self.place):
                self.inputs[name] = x if self.place is None else import_cupy().asarray(x)

    def named(self) -> dict[str, Array]:
        """The inputs by the names of arguments, for messages."""
        return self.inputs

    def beside(self) -> dict[str, Array]:
        """What options and offsets bring, broadcast to where it is read: see `_options`."""
        problem = self.problem
        heads = (*problem.batch_shape, problem.num_heads)
        shapes = {
            "bias": (*heads, problem.seqlen_q, problem.seqlen_k),
            "mask": (*heads, problem.seqlen_q, problem.seqlen_k),
            "alibi_slopes": heads,
            "sinks": heads,
            "q_segments": (*problem.batch_shape, problem.seqlen_q),
            "kv_segments": (*problem.batch_shape, problem.seqlen_k),
            "q_lens": problem.batch_shape,
            "kv_lens": problem.batch_shape,
        }
        broadcast_to = (np if self.place is None else import_cupy()).broadcast_to
        found = {name: broadcast_to(self.inputs[name], shape) for name, shape in shapes.items() if name in self.inputs}
        for name, own in (("q_offset", "q_offsets"), ("seed", "seed")):
            if name in self.inputs:
                found[own] = self.inputs[name]
        return found | {name: x for name, x in self.inputs.items() if argument_place(name)}

    def plan(self, family: object, tile: object, wrt: frozenset[str] | None = None, deterministic: bool = True) -> Plan:
        """The plan of the forward, or of the backward for the gradients in ``wrt``."""
        if wrt is not None and "score_args" in wrt:
            check_order(self.problem.options, deterministic)
        if self.device is None:
            return plan_cpu(self.problem, family, tile, wrt)
        if tile is None and self.problem.options == PLAIN:
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
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        beside = self.beside() if len(inputs) > 3 else {}
        if not problem.comes_canonical:
            q, k, v, out = map(problem.canonical, (q, k, v, out))
            lse = None if lse is None else problem.canonical_lse(lse)
        if self.place is None:
            return _cpu.forward(problem, q, k, v, beside, out, lse, plan.block_m, plan.block_n)
        from . import _launch

        read: dict[str, Array | None] = {"q": q, "k": k, "v": v, **beside}
        return _launch.forward(problem, plan, self.place, read, {"out": out, "lse": lse})

    def backward(self, plan: Plan, gradients: dict[str, Array]) -> Ready | None:
        """Compute the gradients, keyed "dq", "dscore_args[0]" and so on; ``inputs`` holds dout, out, lse too.

        Returns what ``forward`` returns.
        """
        problem, inputs = self.problem, self.inputs
        tensors = {name: problem.canonical(inputs[name]) for name in ("q", "k", "v", "dout", "out")}
        tensors |= {name: problem.canonical_lse(inputs[name]) for name in ("lse", "dlse") if name in inputs}
        grads = dict(gradients)
        for name in {"dq", "dk", "dv"} & grads.keys():
            grads[name] = problem.canonical(grads[name])
        if "dbias" in gradients:
            grads["dbias"] = _with_axes(gradients["dbias"], len(problem.batch_shape) + 3)
        if self.place is None:
            _cpu.backward(
                problem, tensors["dout"], tensors["q"], tensors["k"], tensors["v"], tensors["out"], tensors["lse"],
                tensors.get("dlse"), self.beside(), grads, plan.block_m, plan.block_n,
            )  # fmt: skip
            return None
        from . import _launch

        return _launch.backward(problem, plan, self.place, tensors | self.beside(), grads)


def _with_axes(x: Array, ndim: int) -> Array:
    """x with axes of length 1 before its own."""
    return x[(None,) * (ndim - x.ndim)]


def _integers(name: str, x: Any, where: int | None, dtype: type = np.int64) -> Array:
    """Integers where the call's arrays lie; those of the host are copied to a device."""
    if is_cupy(x):
        check_beside(name, x, where)
    with on_device(where):
        return (np if where is None else import_cupy()).asarray(x, dtype)


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

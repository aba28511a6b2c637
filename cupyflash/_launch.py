"""GPU launches: workspace, Params, kernels in the plan's order, on CuPy's current stream.

What depends on shapes, strides and options alone is prepared once and found again; a launch then costs the
look-up, the addresses, and CuPy's own launch.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from . import _compile
from ._arrays import Array, ArraySpec, address, import_cupy, misaligned, on_device
from ._block_map import MAPS
from ._params import BY_TILE, TAIL_AXES, Layout, element_strides, make_template, scalars
from ._plan import KernelPlan, Plan, tile_shift
from ._problem import Problem
from ._score_args import GRADIENT_ARGS, argument_name, argument_place
from ._tma import ALIGNMENT, map_axes, map_template, unreadable


class LaunchTemplate(Protocol):
    """A struct without its addresses, and how it gets them: see `Template`."""

    @property
    def nbytes(self) -> int: ...
    @property
    def slots(self) -> tuple[tuple[str, int], ...]: ...
    @property
    def offsets(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def holds_addresses(self) -> bool: ...
    def begin(self, struct: memoryview) -> None: ...
    def fill(self, words: memoryview, launch: int, addresses: Mapping[str, int]) -> None: ...


Tensors = dict[str, Array | None]


class Launch:
    """One kernel of one layout, ready but for its addresses.

    Attributes
    ----------
    names : tuple of str
        The tensors whose addresses the kernel gets.
    writes : frozenset of str
        Those that it writes.
    """

    def __init__(self, step: KernelPlan, grid: int, device: int, template: LaunchTemplate) -> None:
        self.names = tuple(name for name, _ in template.slots)
        self.writes = frozenset(step.writes)
        self._template = template
        self._kernel = _compile.load(step.spec, step.smem, device)
        # The struct stays where it is: a launch writes addresses and hands the driver a pointer, which takes a tenth of
        # the time that CuPy needs to make an argument of an array. One launch at a time, since the driver copies it.
        self._lock = threading.Lock()
        self._memory = ctypes.create_string_buffer(template.nbytes + _STRUCT_ALIGNMENT)
        start = -ctypes.addressof(self._memory) % _STRUCT_ALIGNMENT
        struct = memoryview(self._memory).cast("B")[start : start + template.nbytes]
        template.begin(struct)
        self._words = struct.cast("Q")
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._memory) + start)
        self._pointers_at = ctypes.addressof(self._pointers)
        self._launch = import_cupy().cuda.driver.launchKernel
        self._shape = (grid, 1, 1, step.threads, 1, 1, step.smem)
        self._slots = template.slots if template.holds_addresses else None

    def run(self, tensors: dict[str, Array], stream: int | None = None) -> None:
        """Launch on the current stream: once, or once for each index of leading axes beyond the struct's.

        ``stream``: what the caller has asked for already.
        """
        if stream is None:
            stream = import_cupy().cuda.get_current_stream().ptr
        function, pointers, launch = self._kernel.kernel.ptr, self._pointers_at, self._launch
        if self._slots is not None:
            words = self._words
            with self._lock:
                for name, slot in self._slots:
                    words[slot] = tensors[name].data.ptr
                launch(function, *self._shape, stream, pointers, 0)
            return
        addresses = {name: tensors[name].data.ptr for name in self.names}
        with self._lock:
            for i in range(len(self._template.offsets)):
                self._template.fill(self._words, i, addresses)
                launch(function, *self._shape, stream, pointers, 0)


_STRUCT_ALIGNMENT = 64  # of tensor maps, and of the kernel parameter that holds them


@dataclass(frozen=True)
class Ready:
    """The launches of a plan for tensors of one layout, in order, and the temporary arrays between them."""

    device: int
    launches: tuple[Launch, ...]
    temporaries: tuple[ArraySpec, ...]
    zeroed: tuple[ArraySpec, ...]  # temporaries that start at 0
    results: tuple[ArraySpec, ...] = ()  # to allocate beside the tensors given

    def run(self, tensors: dict[str, Array]) -> dict[str, Array]:
        """Run on the current stream; all tensors but the temporaries."""
        with on_device(self.device):
            cupy = import_cupy()
            stream = cupy.cuda.get_current_stream().ptr
            if self.results:
                tensors |= {name: cupy.empty(shape, dtype) for name, shape, dtype in self.results}
            held = dict(tensors)
            if self.temporaries:
                capturing = cupy.cuda.runtime.streamIsCapturing(stream)
                held |= {name: _memory(cupy, shape, dtype, capturing) for name, shape, dtype in self.temporaries}
            for name, shape, dtype in self.zeroed:
                held[name] = zeroed_workspace(shape, dtype)
            for launch in self.launches:
                launch.run(held, stream)
        return tensors


def forward(problem: Problem, plan: Plan, device: int, inputs: Tensors, results: Tensors) -> Ready | None:
    """Run a forward plan: q, k, v and what lies beside them (canonical views) to out and lse, which may be None.

    Returns what later calls with tensors of the same layout can run; None where such a call needs more than that.
    """
    with on_device(device):
        tensors = {name: x for name, x in (_readable(plan, inputs) | results).items() if x is not None}
        tickets = any("tickets" in step.writes for step in plan.kernels)
        # Where leading axes are walked from here, each launch takes those of its first entry.
        zeroed = (("tickets", problem.batch_shape, np.dtype(np.int32)),) if tickets else ()
        ready = _make_ready(problem, plan.kernels, device, tensors, plan.maps, zeroed)
        ready.run(tensors)
    return None if plan.copies else ready


def backward(
    problem: Problem, plan: Plan, device: int, inputs: Tensors, gradients: dict[str, Array]
) -> Ready | None:
    """Run a backward plan: q, k, v, out, lse, dout and what lies beside them to the gradients that are given.

    A gradient whose input several batch entries share is written for each of them first, in the accumulator
    type, and then summed over them in a fixed order. Returns what ``forward`` returns.
    """
    with on_device(device):
        tensors = {name: x for name, x in _readable(plan, inputs).items() if x is not None}
        finished = [step.writes[0] for step in plan.kernels if step.name == "bwd_finish"]
        partials = {name: _partial(problem, name, gradients[name]) for name in finished}
        tensors |= {name: partials[name].by_entry if name in partials else x for name, x in gradients.items()}
        lead = problem.batch_shape if problem.options.packed is None else ()
        temporaries = tuple((name, (*lead, *tail), dtype) for name, tail, dtype in plan.temporaries)
        steps = tuple(step for step in plan.kernels if step.name != "bwd_finish")
        ready = _make_ready(problem, steps, device, tensors, temporaries + plan.maps, plan.zeroed)
        ready.run(tensors)
        for step in plan.kernels[len(steps) :]:
            partials[step.writes[0]].finish(step, device)
    return None if plan.copies or partials else ready


def compile_plan(plan: Plan, device: int) -> None:
    """Compile and load every kernel of a plan."""
    with on_device(device):
        for step in plan.kernels:
            _compile.load(step.spec, step.smem, device)


def _make_ready(
    problem: Problem,
    steps: tuple[KernelPlan, ...],
    device: int,
    tensors: dict[str, Array],
    temporaries: tuple[ArraySpec, ...],
    zeroed: tuple[ArraySpec, ...],
) -> Ready:
    made = []
    for name, shape, dtype in (*temporaries, *zeroed):
        strides = contiguous(shape, dtype)
        if problem.options.packed is not None and name in BY_TILE:  # tiles first, heads behind them
            shape, strides = ((x[1], x[0], *x[2:]) for x in (shape, strides))
        made.append((name, shape, _shared(shape, strides) if name in MAPS else strides, dtype.itemsize))
    given = [(name, x.shape, x.strides, x.itemsize) for name, x in tensors.items()]
    launches = []
    for step in steps:
        if step.grid:
            named = (layout for layout in (*given, *made) if _is_known(layout[0], step))
            launches.append(_launch(problem, step, device, tuple(named)))
    return Ready(device, tuple(launches), temporaries, zeroed)


RESULTS = frozenset({"dq", "dk", "dv", "dbias", "dsinks", "partial"})


def _is_known(name: str, step: KernelPlan) -> bool:
    """Whether a kernel gets this tensor: gradients go to those that write them, arguments to those with a function."""
    if name in step.writes:
        return True
    if place := argument_place(name):
        args, n = place
        if args == GRADIENT_ARGS or argument_name(GRADIENT_ARGS, n) in step.writes:
            return False
        return bool({"score_args": step.spec.score_text, "mask_args": step.spec.mask_text}[args])
    return name not in RESULTS if step.reads is None else name in step.reads


def contiguous(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The strides of a new array, in bytes."""
    return tuple(dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _shared(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an array of which an axis of length 1 is there for all: 0 along it."""
    return tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))


@lru_cache(maxsize=4096)
def _launch(problem: Problem, step: KernelPlan, device: int, layouts: tuple[Layout, ...]) -> Launch:
    ndim = len(problem.batch_shape)
    packed = tuple(
        (name, element_strides(shape, strides, itemsize, ndim, TAIL_AXES.get(name, 3)), itemsize)
        for name, shape, strides, itemsize in layouts
        if not argument_place(name)
    )
    arguments = tuple(
        (*place, shape, tuple(s // itemsize for s in strides))
        for name, shape, strides, itemsize in layouts
        if (place := argument_place(name))
    )
    numbers = scalars(problem, step.section)
    if problem.options.packed is not None:
        numbers = replace(numbers, tile_shift=next((tile_shift(x[1][-1]) for x in layouts if x[0] == "delta"), 0))
    if not step.boxes:
        own, summed = problem.batch_shape, None
        if step.entries is not None:
            own, numbers = step.entries[:-1], replace(numbers, num_heads=step.entries[-1])
        if step.sums:
            summed = tuple(n // o if o else 1 for n, o in zip(problem.batch_shape, own, strict=True))
        template = make_template(numbers, own, packed, summed, arguments=arguments)
        # The grid counts the tiles of all launches; there are several where leading axes are walked from here.
        return Launch(step, step.grid // len(template.offsets), device, template)
    template = make_template(numbers, problem.batch_shape, packed, axes=map_axes(problem), arguments=arguments)
    return Launch(step, step.grid, device, map_template(problem, template, problem.dtype, step.boxes))


def _partial(problem: Problem, name: str, gradient: Array) -> Partial:
    """What bwd_finish sums: dq, dk, dv over leading axes, dbias and dsinks over heads too."""
    shape = problem.batch_shape
    if name in ("dq", "dk", "dv"):
        return Partial(problem, shape, gradient, ...)
    shape = (*shape, problem.num_heads)
    if name == "dbias":
        return Partial(problem, shape, gradient[..., None, :, :], (..., 0, slice(None), slice(None)))
    return Partial(problem, shape, gradient[:, None, None, None], (..., 0, 0, 0))


class Partial:
    """A gradient before its sum over the batch entries that share the input, and that sum.

    Parameters
    ----------
    shape : tuple of int
        The axes of what is written, before heads, rows and columns.
    gradient : array
        The sum, with these axes too, or fewer, or of length 1.
    written : index
        What of (*shape, heads, rows, columns) the kernel walks.

    Attributes
    ----------
    by_entry : array, shape (*batch_shape, heads, rows, columns)
        One gradient for each batch entry, in the accumulator type: what the main kernels write. In memory the
        shared axes come after the others, so that the sum walks one axis.
    """

    def __init__(self, problem: Problem, shape: tuple[int, ...], gradient: Array, written: Any) -> None:
        ndim = len(shape)
        missing = ndim + 3 - gradient.ndim
        own = (1,) * missing + gradient.shape[:-3]
        kept = [i for i in range(ndim) if own[i] == shape[i]]
        shared = [i for i in range(ndim) if own[i] != shape[i]]
        order, tail = kept + shared, gradient.shape[-3:]
        memory = workspace((*(shape[i] for i in order), *tail), problem.accumulator)
        by_entry = memory.transpose(*(order.index(i) for i in range(ndim)), ndim, ndim + 1, ndim + 2)
        self.by_entry = by_entry[written]

        count = math.prod(shape[i] for i in shared)
        self._partial = memory.reshape(*(shape[i] for i in kept), count, *tail)
        self._gradient = gradient
        strides = (0,) * missing + gradient.strides
        strides = (*(strides[i] for i in kept), 0, *strides[-3:])
        itemsize, axes = self._partial.itemsize, len(kept) + 1
        tensors = (
            ("partial", element_strides(self._partial.shape, self._partial.strides, itemsize, axes, 3), itemsize),
            (
                "dq",
                element_strides((*(own[i] for i in kept), 1, *tail), strides, gradient.itemsize, axes, 3),
                gradient.itemsize,
            ),
        )
        heads, rows, columns = tail
        self._template = make_template(
            replace(scalars(problem), num_heads=heads, seqlen_q=rows, head_dim=columns, packed=None),
            (*(own[i] for i in kept), 1),
            tensors,
            (1,) * len(kept) + (count,),
        )

    def finish(self, step: KernelPlan, device: int) -> None:
        """Sum over the shared axes into the gradient; in Params, ``dq`` stands for whichever gradient it is."""
        if step.grid:
            step = replace(step, writes=("dq",))
            Launch(step, step.grid, device, self._template).run({"partial": self._partial, "dq": self._gradient})


def workspace(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Uninitialised temporary memory on the current device and stream.

    While a stream is being captured the memory is a node of the graph (cudaMallocAsync), so that a replay owns it;
    memory of CuPy's pool would go back to the pool, and to others, before the replay.
    """
    cupy = import_cupy()
    capturing = cupy.cuda.runtime.streamIsCapturing(cupy.cuda.get_current_stream().ptr)
    return _memory(cupy, shape, dtype, capturing)


def _memory(cupy: Any, shape: tuple[int, ...], dtype: np.dtype, capturing: bool) -> Array:
    if capturing and (size := math.prod(shape) * dtype.itemsize):
        return cupy.ndarray(shape, dtype, cupy.cuda.malloc_async(size))
    return cupy.empty(shape, dtype)


def zeroed_workspace(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Temporary memory as ``workspace`` gives it, filled with zeros."""
    cupy = import_cupy()
    x = workspace(shape, dtype)
    cupy.cuda.runtime.memsetAsync(x.data.ptr, 0, x.nbytes, cupy.cuda.get_current_stream().ptr)
    return x


def _readable(plan: Plan, tensors: Tensors) -> Tensors:
    """The tensors as kernels walk them, with copies of those that the plan says must be copied."""
    for name in ("q_segments", "kv_segments"):
        if (ids := tensors.get(name)) is not None:
            tensors = tensors | {name: ids[..., None, :]}  # one head
    if not plan.copies:
        return tensors
    mapped = {name for step in plan.kernels for name, _ in step.boxes}
    readable = dict(tensors)
    for name, x in tensors.items():
        if x is None:
            continue
        if name in mapped and unreadable(x.shape, x.strides, address(x), x.itemsize):
            readable[name] = copy_of(x, ALIGNMENT)
        else:
            readable[name] = in_whole_elements(x)
    return readable


def in_whole_elements(x: Array) -> Array:
    """The array, or a copy of one whose elements the GPU does not load."""
    if not misaligned(x):
        return x
    return copy_of(x, x.itemsize) if x.ndim else copy_of(x[None], x.itemsize)[0]


def copy_of(x: Array, alignment: int) -> Array:
    """A copy with aligned rows; what is broadcast stays so.

    Where elements are not aligned it is read byte by byte: the GPU does not load them otherwise.
    """
    cupy = import_cupy()
    shape = (*(1 if stride == 0 else n for n, stride in zip(x.shape[:-2], x.strides[:-2], strict=True)), *x.shape[-2:])
    pitch = -(-shape[-1] * x.itemsize // alignment) * alignment
    memory = workspace((math.prod(shape[:-1]), pitch), np.dtype(np.uint8))
    strides, step = [x.itemsize], pitch
    for n in shape[-2::-1]:
        strides.insert(0, step)
        step *= n
    unit, more, stride = (np.uint8, (x.itemsize,), (1,)) if misaligned(x) else (x.dtype, (), ())
    cupy.ndarray((*shape, *more), unit, memory.data, (*strides, *stride))[...] = cupy.ndarray(
        (*shape, *more), unit, x.data, (*x.strides, *stride)
    )
    repeated = (0 if n == 1 else s for n, s in zip(shape, strides, strict=True))
    return cupy.ndarray(x.shape, x.dtype, memory.data, tuple(repeated))

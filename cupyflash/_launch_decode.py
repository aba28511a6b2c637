"""Launches of decoding: rows appended and turned, tiles of each split, splits merged, on CuPy's current stream."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from ._arrays import Array, on_device
from ._decoding import Decoding
from ._launch import Launch, Ready, contiguous, in_whole_elements
from ._launch_merge import strided
from ._params import Layout
from ._params_decode import make_decode_template
from ._params_merge import Stack, make_merge_template
from ._plan import KernelPlan
from ._plan_decode import DecodePlan
from ._problem import Problem
from ._score_args import argument_place

# What decode_append gets, and what the kernels that attend get beside results and options.
_APPEND = ("q", "k", "v", "kv_lens", "page_table", "k_new", "v_new", "cos", "sin", "q_turned")
_ATTEND = (
    "q", "k", "v", "kv_lens", "page_table", "alibi_slopes", "sinks", "out", "lse", "partial", "partial_lse"
)  # fmt: skip


def decode(
    problem: Problem, decoding: Decoding, plan: DecodePlan, device: int, tensors: dict[str, Array]
) -> Ready | None:
    """Run a plan on canonical tensors; out and lse among them, lse only where it is wanted.

    Returns what later calls with tensors of the same layout can run; None where such a call needs copies.
    """
    with on_device(device):
        if plan.copies:
            tensors = {name: in_whole_elements(x) for name, x in tensors.items()}
        layouts = {name: (name, x.shape, x.strides, x.itemsize) for name, x in tensors.items()}
        for name, shape, dtype in plan.results:
            layouts[name] = (name, shape, contiguous(shape, dtype), dtype.itemsize)
        launches = tuple(
            _launch(problem, decoding, plan, step, device, tuple(layouts.values()))
            for step in plan.kernels
            if step.grid
        )
        ready = Ready(device, launches, plan.results if launches else (), ())
        ready.run(tensors)
    return None if plan.copies else ready


@lru_cache(maxsize=1024)
def _launch(
    problem: Problem, decoding: Decoding, plan: DecodePlan, step: KernelPlan, device: int, layouts: tuple[Layout, ...]
) -> Launch:
    if step.name == "combine":
        return _combine_launch(plan, step, device, {layout[0]: layout for layout in layouts})
    attends = step.name != "decode_append"
    names = set(_ATTEND if attends else _APPEND) - ({"out", "lse"} if plan.splits.number > 1 else set())
    called = {"q_turned": "q"} if attends and decoding.rotary_dim else {}  # outside, and in the struct
    names = (names - set(called.values())) | set(called)
    given = tuple((called.get(name, name), *rest) for name, *rest in layouts if name in names)
    arguments = tuple(
        (*place, shape, tuple(s // itemsize for s in strides))
        for name, shape, strides, itemsize in layouts
        if attends and (place := argument_place(name))
    )
    template = make_decode_template(problem, decoding, given, plan.splits, arguments)
    return Launch(step, step.grid, device, _renamed(template, {inside: name for name, inside in called.items()}))


def _combine_launch(plan: DecodePlan, step: KernelPlan, device: int, layouts: dict[str, Layout]) -> Launch:
    """combine of the partial results of all splits, of which one array has all."""
    names = {"outs_0": "partial", "lses_0": "partial_lse", "out": "out", "lse": "lse"}
    parts, steps = [], []
    for inside, name in names.items():
        if name in layouts:
            _, shape, strides, itemsize = layouts[name]
            if inside[-2:] == "_0":  # the kernel reads all parts, which begin where the first one does
                along, rest = (0, slice(1, None)) if name == "partial" else (-1, slice(-1))
                steps.append(strides[along] // itemsize)
                shape, strides = shape[rest], strides[rest]
            parts.append((inside, shape, strides, itemsize))
    shape = layouts["out"][1]
    template = make_merge_template(shape, strided(tuple(parts), len(shape) - 3), plan.splits.number, Stack(*steps))
    return Launch(step, step.grid // len(template.offsets), device, _renamed(template, names))


def _renamed(template: Any, names: dict[str, str]) -> Any:
    """A template whose tensors are found by other names than the struct has for them."""
    return replace(template, slots=tuple((names.get(name, name), slot) for name, slot in template.slots))

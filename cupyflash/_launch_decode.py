"""Launches of decoding: rows appended and turned, tiles of each split, splits merged, on CuPy's current stream."""

from __future__ import annotations

from functools import lru_cache

from ._arrays import Array, misaligned, on_device
from ._decoding import Decoding
from ._launch import Launch, copy_of, workspace
from ._launch_merge import combine_launch
from ._params_decode import Layout, make_decode_template
from ._params_merge import Stack
from ._plan import KernelPlan
from ._plan_decode import DecodePlan
from ._problem import Problem
from ._score_args import argument_place

# What decode_append gets, and what the kernels that attend get beside results and options.
_APPEND = ("q", "k", "v", "kv_lens", "page_table", "k_new", "v_new", "cos", "sin", "q_turned")
_ATTEND = (
    "q", "k", "v", "kv_lens", "page_table", "alibi_slopes", "sinks", "out", "lse", "partial", "partial_lse"
)  # fmt: skip


def decode(problem: Problem, decoding: Decoding, plan: DecodePlan, device: int, tensors: dict[str, Array]) -> None:
    """Run a plan on canonical tensors; out and lse among them, lse only where it is wanted."""
    with on_device(device):
        caches = {name: tensors[name] for name in ("k", "v")}
        held = {name: copy_of(x, x.itemsize) if misaligned(x) else x for name, x in tensors.items()} | caches
        held |= {name: workspace(shape, dtype) for name, shape, dtype in plan.results}
        for step in plan.kernels:
            if not step.grid:
                continue
            if step.name == "combine":
                _combine(plan, step, device, held)
                continue
            named = _tensors_of(step, held, plan.num_splits > 1)
            _launch(problem, decoding, step, device, _layouts(named), plan.split_length, plan.num_splits).run(named)


def _tensors_of(step: KernelPlan, held: dict[str, Array], splits: bool) -> dict[str, Array]:
    """What a kernel gets, by its name there."""
    if step.name == "decode_append":
        return {name: held[name] for name in _APPEND if name in held}
    left_out = ("out", "lse") if splits else ()
    found = {name: held[name] for name in _ATTEND if name in held and name not in left_out}
    if "q_turned" in held:
        found["q"] = held["q_turned"]
    return found | {name: x for name, x in held.items() if argument_place(name)}


def _layouts(tensors: dict[str, Array]) -> tuple[Layout, ...]:
    return tuple((name, x.shape, x.strides, x.itemsize) for name, x in tensors.items())


@lru_cache(maxsize=1024)
def _launch(
    problem: Problem, decoding: Decoding, step: KernelPlan, device: int, layouts: tuple[Layout, ...],
    split_length: int, num_splits: int,
) -> Launch:  # fmt: skip
    arguments = tuple(
        (*place, shape, tuple(s // itemsize for s in strides))
        for name, shape, strides, itemsize in layouts
        if (place := argument_place(name))
    )
    arrays = tuple(layout for layout in layouts if not argument_place(layout[0]))
    template = make_decode_template(problem, decoding, arrays, split_length, num_splits, arguments)
    return Launch(step, step.grid, device, template)


def _combine(plan: DecodePlan, step: KernelPlan, device: int, held: dict[str, Array]) -> None:
    """The partial results of all splits, of which one array has all."""
    partial, partial_lse = held["partial"], held["partial_lse"]
    named = {"out": held["out"], "outs_0": partial[0], "lses_0": partial_lse[0]}
    if "lse" in held:
        named["lse"] = held["lse"]
    stack = Stack(partial.strides[0] // partial.itemsize, partial_lse.strides[0] // partial_lse.itemsize)
    # The kernel reads all parts: it gets the whole arrays, whose first parts begin where they do.
    launch = combine_launch(step, device, _layouts(named), plan.num_splits, stack)
    launch.run(named | {"outs_0": partial, "lses_0": partial_lse})

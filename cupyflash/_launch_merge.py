"""Parts merged on a GPU: launches of `combine` and `combine_backward`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ._arrays import Array, on_device
from ._launch import Launch, in_whole_elements, workspace
from ._params import Layout, element_strides
from ._params_merge import MOST_ARRAYS, TAIL_AXES, make_merge_template
from ._plan_merge import merge_kernel, part_names


def merge(device: int, outs: Sequence[Array], lses: Sequence[Array], out: Array, lse: Array) -> None:
    """Write out (..., rows, columns) and lse: in levels, where there are more parts than a launch takes."""
    with on_device(device):
        outs, lses = ([in_whole_elements(x) for x in arrays] for arrays in (outs, lses))
        while len(outs) > MOST_ARRAYS:
            groups = range(0, len(outs), MOST_ARRAYS)
            made = [(workspace(out.shape, lse.dtype), workspace(lse.shape, lse.dtype)) for _ in groups]
            for begin, (x, x_lse) in zip(groups, made, strict=True):
                here = slice(begin, begin + MOST_ARRAYS)
                _run("combine", device, {"out": x, "lse": x_lse}, {"outs": outs[here], "lses": lses[here]})
            outs, lses = [x for x, _ in made], [x_lse for _, x_lse in made]
        _run("combine", device, {"out": out, "lse": lse}, {"outs": outs, "lses": lses})


def merge_backward(
    device: int, dout: Array, outs: Sequence[Array], lses: Sequence[Array], out: Array, lse: Array, dlse: Array | None,
    douts: Sequence[Array], dlses: Sequence[Array],
) -> None:  # fmt: skip
    """Write the gradients of the parts."""
    with on_device(device):
        given = {"out": out, "lse": lse, "dout": dout} | ({} if dlse is None else {"dlse": dlse})
        tensors = {name: in_whole_elements(x) for name, x in given.items()}
        outs, lses = ([in_whole_elements(x) for x in arrays] for arrays in (outs, lses))
        for begin in range(0, len(outs), MOST_ARRAYS):
            here = slice(begin, begin + MOST_ARRAYS)
            parts = {"outs": outs[here], "lses": lses[here], "douts": douts[here], "dlses": dlses[here]}
            _run("combine_backward", device, tensors, parts)


def _run(kernel: str, device: int, tensors: dict[str, Array], parts: dict[str, Sequence[Array]]) -> None:
    """One kernel, for at most MOST_ARRAYS parts."""
    named = dict(tensors)
    for side, arrays in parts.items():
        named |= dict(zip(part_names(side, len(arrays)), arrays, strict=True))
    if tensors["out"].ndim == 2:  # one head
        named = {name: x[None] for name, x in named.items()}
    if not named["lse"].size:
        return
    layouts = tuple((name, x.shape, x.strides, x.itemsize) for name, x in named.items())
    dtypes = parts["outs"][0].dtype, tensors["out"].dtype, tensors["lse"].dtype
    _launch(kernel, device, dtypes, layouts).run(named)


@lru_cache(maxsize=1024)
def _launch(
    kernel: str, device: int, dtypes: tuple[np.dtype, np.dtype, np.dtype], layouts: tuple[Layout, ...]
) -> Launch:
    shape = next(shape for name, shape, _, _ in layouts if name == "out")
    template = make_merge_template(shape, strided(layouts, len(shape) - 3), sum(x[0][:5] == "outs_" for x in layouts))
    step = merge_kernel(kernel, *dtypes, math.prod(shape[:-1]) // len(template.offsets))
    return Launch(step, step.grid, device, template)


def strided(layouts: tuple[Layout, ...], lead: int) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    """Tensors by name, element strides and itemsize."""
    return tuple(
        (name, element_strides(shape, strides, itemsize, lead, TAIL_AXES.get(name, 3)), itemsize)
        for name, shape, strides, itemsize in layouts
    )

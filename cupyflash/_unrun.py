"""What a checked call would run, for dense and packed arrays alike: its plan, and its kernels compiled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ._call import Call
from ._plan import Plan, Tile
from ._problem import read_wrt
from ._results import check_out_of, split_out


def explain_call(
    call: Call, out: Any, family: str | None, tile: Tile | None, backward: bool, wrt: Iterable[str] | None,
    deterministic: bool, differentiable: tuple[str, ...],
) -> Plan:  # fmt: skip
    """The plan of the forward, or of the backward for the gradients in ``wrt``."""
    _check_out(call, out)
    if backward:
        return call.plan(family, tile, read_wrt(wrt, differentiable), deterministic)
    if wrt is not None:
        raise ValueError(f"wrt={wrt!r} without backward=True: the forward has no gradients")
    if not deterministic:
        raise ValueError("deterministic=False without backward=True: the forward always gives the same bits")
    return call.plan(family, tile)


def prepare_call(
    call: Call, out: Any, family: str | None, tile: Tile | None, backward: bool, wrt: Iterable[str] | None,
    deterministic: bool, differentiable: tuple[str, ...],
) -> None:  # fmt: skip
    """Compile the kernels of the forward, and of the backward too."""
    _check_out(call, out)
    plans = [call.plan(family, tile)]
    if backward:
        plans.append(call.plan(family, tile, read_wrt(wrt, differentiable), deterministic))
    if call.place is not None:
        from ._launch import compile_plan

        for plan in plans:
            compile_plan(plan, call.place)


def _check_out(call: Call, out: Any) -> None:
    """What the forward would check of ``out=``."""
    ours, lse = split_out(out)
    if ours is not None:
        check_out_of(call, ours, lse)

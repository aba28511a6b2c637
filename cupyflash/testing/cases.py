"""Run a problem through the public functions and judge all it returns: for tests and `selftest`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import AttentionGradients, attention, attention_backward, explain
from . import bounds
from .data import Case, Inputs, Placed, place, place_empty, to_numpy


class BrokenPromise(AssertionError):
    """A promise that is not about the size of errors: memory written, a wrong shape or dtype."""


def run(case: Case, xp: Any = np, **options: Any) -> bounds.Report:
    """Forward and backward of `case` on NumPy or CuPy, against the specification.

    Parameters
    ----------
    case : Case
    xp : module
        ``numpy`` or ``cupy``: where the arrays lie.
    **options
        More options for both calls, such as ``family`` or ``tile``.

    Returns
    -------
    Report
        The worst element of out, lse, dq, dk, dv.

    Raises
    ------
    BrokenPromise
        If an input or a byte outside an output was written, or a shape or dtype is wrong.
    """
    inputs = case.inputs()
    styles = (*case.styles[:4], "plain")
    placed = {n: place(a, s, xp) for n, a, s in zip(Inputs._fields, inputs, styles, strict=True)}
    options = {**case.options(), **options}
    spec = {name: options[name] for name in ("scale", "causal", "q_offset", "layout")}
    q, k, v = (placed[name].array for name in "qkv")
    values = Inputs(*(p.values for p in placed.values()))  # a repeated axis has changed them

    outputs = _outputs(case, inputs, xp)
    out, lse = _forward(case, (q, k, v), outputs, options)
    plan = explain(q, k, v, **options)
    report = bounds.check_forward(
        values.q, values.k, values.v, to_numpy(out), to_numpy(lse),
        chain_d=plan.chain_d, chain_k=plan.chain_k, block_n=min(plan.block_n, max(case.seqlen_k, 1)),
        p_dtype=inputs.q.dtype if plan.rounds_p else None, **spec,
    )  # fmt: skip

    dlse = placed["dlse"].array if case.dlse else None
    grads = _backward(case, placed, out, lse, dlse, outputs, options)
    plan = explain(q, k, v, backward=True, wrt=case.wrt, **options)
    report = report + bounds.check_backward(
        values.dout, values.q, values.k, values.v, to_numpy(out), to_numpy(lse),
        tuple(None if g is None else to_numpy(g) for g in grads[:3]), dlse=values.dlse if case.dlse else None,
        chain_d=plan.chain_d, chain_k=plan.chain_k, chain_q=plan.chain_q,
        p_dtype=inputs.q.dtype if plan.rounds_p else None, **spec,
    )  # fmt: skip
    for name, p in placed.items():
        _promise(p.unwritten(), f"{name} or the bytes around it were written")
    for name, p in outputs.items():
        _promise(p.guards_intact(), f"bytes that belong to no element of {name} were written")
    return report


def _outputs(case: Case, inputs: Inputs, xp: Any) -> dict[str, Placed]:
    """Arrays full of poison for out=, lse and the gradients of a case."""
    dtype = inputs.q.dtype
    out_dtype = np.dtype(np.float32) if case.out == "float32" else dtype
    accumulator = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    shapes = {"out": (inputs.dout.shape, out_dtype), "lse": (case.lse_shape, accumulator)}
    shapes |= {f"d{name}": (getattr(inputs, name).shape, dtype) for name in "qkv"}
    return {
        name: place_empty(*shape, style, xp)
        for (name, shape), style in zip(shapes.items(), case.styles[4:], strict=True)
    }


def _forward(case: Case, qkv: tuple[Any, ...], outputs: dict[str, Placed], options: dict[str, Any]) -> Any:
    """out and lse, written where the case says."""
    out, lse = outputs["out"].array, outputs["lse"].array
    given = {None: None, "array": out, "pair": (out, lse), "float32": (out, lse)}[case.out]
    result = attention(*qkv, out=given, return_lse=True, **options)
    _promise(case.out is None or result.out is out, "the result is not the array of out=")
    _promise(case.out in (None, "array") or result.lse is lse, "the result is not the lse of out=")
    for name in ("out", "lse"):
        _expect(name, getattr(result, name), outputs[name].array)
    return result


def _backward(
    case: Case,
    placed: dict[str, Placed],
    out: Any,
    lse: Any,
    dlse: Any,
    outputs: dict[str, Placed],
    options: dict[str, Any],
) -> Any:
    """The gradients, written where the case says."""
    names = case.wrt or ("q", "k", "v")
    given = {f"d{name}": outputs[f"d{name}"].array for name in names} if case.grads_out else {}
    q, k, v, dout = (placed[name].array for name in ("q", "k", "v", "dout"))
    grads = attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, wrt=case.wrt,
        grads_out=AttentionGradients(**given) if given else None, **options,
    )  # fmt: skip
    for name in "qkv":
        got = getattr(grads, f"d{name}")
        _promise((got is not None) == (name in names), f"wrt={case.wrt} and d{name} is {type(got).__name__}")
        if got is not None:
            _expect(f"d{name}", got, outputs[f"d{name}"].array)
            _promise(not given or got is given[f"d{name}"], f"d{name} is not the array of grads_out=")
    return grads


def _expect(name: str, got: Any, like: Any) -> None:
    _promise(got.shape == like.shape, f"{name}.shape={got.shape}, expected {like.shape}")
    _promise(got.dtype == like.dtype, f"{name}.dtype={got.dtype}, expected {like.dtype}")


def _promise(kept: bool, message: str) -> None:
    if not kept:
        raise BrokenPromise(message)

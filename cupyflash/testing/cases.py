"""Run a problem through the public functions and judge all it returns: for tests and `selftest`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import AttentionGradients, attention, attention_backward, explain
from . import bounds, reference
from .data import Case, Inputs, Placed, Shape, place, place_empty, to_numpy
from .table import options_table as options_table

# What is written, in the order of the styles of a case: those of `styles`, then those of `styles_beside`.
OUTPUTS = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")


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
        The worst element of out, lse and each gradient.

    Raises
    ------
    BrokenPromise
        If an input or a byte outside an output was written, or a shape or dtype is wrong.
    """
    placed, asked, meaning = _place(case, xp)
    options = {**asked, **options}
    q, k, v = (placed[name].array for name in "qkv")
    values = Inputs(*(placed[name].values for name in Inputs._fields))  # a repeated axis has changed them

    outputs = _outputs(case, placed, xp)
    out, lse = _forward(case, (q, k, v), outputs, options)
    plan = explain(q, k, v, **options)
    report = bounds.check_forward(
        values.q, values.k, values.v, to_numpy(out), to_numpy(lse),
        chain_d=plan.chain_d, chain_k=plan.chain_k, block_n=min(plan.block_n, max(case.seqlen_k, 1)),
        p_dtype=values.q.dtype if plan.rounds_p else None, p_parts=plan.p_parts, **meaning,
    )  # fmt: skip

    _poison_padding(case, out, lse)
    dlse = placed["dlse"].array if case.dlse else None
    grads = _backward(case, placed, out, lse, dlse, outputs, options)
    plan = explain(q, k, v, backward=True, wrt=case.wrt, **options)
    report = report + bounds.check_backward(
        values.dout, values.q, values.k, values.v, to_numpy(out), to_numpy(lse),
        _to_numpy(grads), dlse=values.dlse if case.dlse else None,
        chain_d=plan.chain_d, chain_k=plan.chain_k, chain_q=plan.chain_q,
        p_dtype=values.q.dtype if plan.rounds_p else None, p_parts=plan.p_parts, **meaning,
    )  # fmt: skip
    for name, p in placed.items():
        _promise(p.unwritten(), f"{name} or the bytes around it were written")
    for name, p in outputs.items():
        _promise(p.guards_intact(), f"bytes that belong to no element of {name} were written")
    return report


def _place(case: Case, xp: Any) -> tuple[dict[str, Placed], dict[str, Any], dict[str, Any]]:
    """A case's arrays inside poison, its options with these arrays, its options as the specification takes them."""
    styles = dict(zip(("q", "k", "v", "dout"), case.styles, strict=False))
    styles |= {"bias": case.styles_beside[0], "mask": case.styles_beside[1]}
    meaning = case.options()
    beside = {name: x for name, x in meaning.items() if isinstance(x, np.ndarray) and name != "q_offset"}
    tuples = {name: meaning[name] for name in ("segment_ids", "score_args", "mask_args") if name in meaning}
    for name, parts in tuples.items():
        beside |= {f"{name}[{i}]": x for i, x in enumerate(parts) if isinstance(x, np.ndarray)}
    arrays = case.inputs()._asdict() | beside  # offsets stay with the host, which may hold them for any device
    placed = {name: place(x, styles.get(name, "plain"), xp) for name, x in arrays.items()}
    options = {name: placed[name].array if name in placed else value for name, value in meaning.items()}
    for name, parts in tuples.items():
        names = [f"{name}[{i}]" for i in range(len(parts))]
        options[name] = tuple(placed[x].array if x in placed else parts[i] for i, x in enumerate(names))
    return placed, options, {name: placed[name].values if name in placed else value for name, value in meaning.items()}


def _to_numpy(grads: Any) -> tuple[Any, ...]:
    """Gradients, a tuple of them among these, on the host."""
    return tuple(None if x is None else _to_numpy(x) if isinstance(x, tuple) else to_numpy(x) for x in grads)


def _poison_padding(case: Case, out: Any, lse: Any) -> None:
    """NaN in the rows of out and lse that an entry does not have: the backward may not use them."""
    lens = case.lens("q")
    if lens is None:
        return
    batch = np.broadcast_shapes(*case.batch)
    columns = (slice(None),) * (1 if case.layout == "hsd" or case.single_head else 2)
    for entry in np.ndindex(*batch):
        beyond = (*entry, ..., slice(int(np.broadcast_to(lens, batch)[entry]), None))
        lse[beyond] = np.nan
        out[beyond + columns] = np.nan


def _outputs(case: Case, placed: dict[str, Placed], xp: Any) -> dict[str, Placed]:
    """Arrays full of poison for out=, lse and the gradients of a case."""
    dtype = placed["q"].array.dtype
    out_dtype = np.dtype(np.float32) if case.out == "float32" else dtype
    accumulator = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    shapes: dict[str, tuple[Shape, Any]] = {
        "out": (placed["dout"].array.shape, out_dtype), "lse": (case.lse_shape, accumulator)
    }  # fmt: skip
    for name in ("q", "k", "v", "bias", "sinks"):
        if name in placed:
            shapes[f"d{name}"] = placed[name].array.shape, placed[name].array.dtype
    for n, x in enumerate(case.options().get("score_args", ())):
        if reference.is_float(x):
            shapes[f"dscore_args[{n}]"] = np.shape(x), np.asarray(x).dtype
    styles = dict(zip(OUTPUTS, (*case.styles[4:], *case.styles_beside[2:]), strict=True))
    return {name: place_empty(*shape, styles.get(name, "plain"), xp) for name, shape in shapes.items()}


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
    known = [name[1:] for name in outputs if name.startswith("d") and "[" not in name]
    args = [outputs.get(f"dscore_args[{n}]") for n in range(len(options.get("score_args", ())))]
    floats = ["score_args"] if any(x is not None for x in args) else []
    names = case.wrt or [*known, *floats]
    given: dict[str, Any] = {}
    if case.grads_out:
        given = {f"d{name}": outputs[f"d{name}"].array for name in names if name != "score_args"}
        if "score_args" in names:
            given["dscore_args"] = tuple(None if x is None else x.array for x in args)
    q, k, v, dout = (placed[name].array for name in ("q", "k", "v", "dout"))
    grads = attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, wrt=case.wrt,
        grads_out=AttentionGradients(**given) if given else None, **options,
    )  # fmt: skip
    for name in known:
        got = getattr(grads, f"d{name}")
        _promise((got is not None) == (name in names), f"wrt={case.wrt} and d{name} is {type(got).__name__}")
        if got is not None:
            _expect(f"d{name}", got, outputs[f"d{name}"].array)
            _promise(not given or got is given[f"d{name}"], f"d{name} is not the array of grads_out=")
    got = grads.dscore_args
    _promise((got is not None) == ("score_args" in names and bool(floats)), f"wrt={case.wrt}, dscore_args={got}")
    for n, (x, like) in enumerate(zip(got or (), args, strict=False)):
        _promise((x is None) == (like is None), f"dscore_args[{n}] is {type(x).__name__}")
        if like is not None:
            _expect(f"dscore_args[{n}]", x, like.array)
            _promise(not given or x is like.array, f"dscore_args[{n}] is not the array of grads_out=")
    return grads


def _expect(name: str, got: Any, like: Any) -> None:
    _promise(got.shape == like.shape, f"{name}.shape={got.shape}, expected {like.shape}")
    _promise(got.dtype == like.dtype, f"{name}.dtype={got.dtype}, expected {like.dtype}")


def _promise(kept: bool, message: str) -> None:
    if not kept:
        raise BrokenPromise(message)

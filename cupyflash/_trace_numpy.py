"""An Expression on NumPy arrays: its value, and its slope as dual numbers have it.

A slope of None is exactly 0: what does not depend on the seed adds nothing, not even 0 * inf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ._expression import Expression, Kind, Node

Array = npt.NDArray[Any]
Slope = Array | None
Variables = Mapping[str, Any]
LN2 = 0.69314718055994530942


def evaluate(
    expression: Expression,
    variables: Variables,
    args: tuple[Any, ...],
    dtype: np.dtype,
    seed: int | None = None,
) -> tuple[list[Array], Slope]:
    """The value of every node, and the slope of the last with respect to node ``seed``.

    ``variables`` has s in ``dtype`` (unless it is a mask's) and b, h, i, j, arrays that broadcast.
    """
    types = {Kind.BOOL: np.dtype(np.bool_), Kind.INT: np.dtype(np.int32), Kind.LONG: np.dtype(np.int64)}
    types[Kind.FLOAT] = dtype
    carries = expression.carries(seed)
    values: list[Array] = []
    slopes: dict[int, Slope] = {} if seed is None else {seed: np.ones((), dtype)}
    with np.errstate(all="ignore"):
        for n, node in enumerate(expression.nodes):
            inputs = [values[i] for i in node.inputs]
            values.append(_value(node, inputs, variables, args, types[node.kind]))
            if n in carries and n != seed:
                slopes[n] = SLOPES[node.op](inputs, [slopes.get(i) for i in node.inputs], values[n])
    slope = slopes.get(len(values) - 1)
    return values, None if slope is None else slope.astype(dtype, copy=False)


def _value(node: Node, inputs: list[Array], variables: Variables, args: tuple[Any, ...], dtype: np.dtype) -> Array:
    if node.op == "variable":
        return np.asarray(variables[node.data], dtype)
    if node.op == "constant":
        return np.asarray(node.value).astype(dtype)
    if node.op == "load":
        x = args[node.data]
        place = tuple(clamped(index, length) for index, length in zip(inputs, x.shape, strict=True))
        return np.asarray(x[place]).astype(dtype, copy=False)
    if node.op == "length":
        argument, axis = node.data
        return np.asarray(args[argument].shape[axis], dtype)
    if node.op == "cast":
        return inputs[0].astype(dtype)
    if node.op == "where":
        return np.where(*inputs)
    result: Array = np.asarray(getattr(np, node.op)(*inputs))
    return result


def clamped(index: Array, length: int) -> Array:
    """Into an axis of this length, as the kernels do it."""
    return np.asarray(np.minimum(np.maximum(index, 0), length - 1))


# --------------------------------------------------------------------------------------------------------- slopes


def _sum(x: Slope, y: Slope) -> Slope:
    return y if x is None else x if y is None else np.asarray(x + y)


def _times(slope: Slope, x: Array) -> Slope:
    return None if slope is None else np.asarray(slope * x)


def _choice(condition: Array, x: Slope, y: Slope) -> Array:
    """By selection, so that nothing of the side that is not chosen remains."""
    dtype = next(s.dtype for s in (x, y) if s is not None)
    zero = np.zeros((), dtype)
    return np.where(condition, zero if x is None else x, zero if y is None else y)


def _negated(x: Slope) -> Slope:
    return None if x is None else np.asarray(-x)


def _chain(factor: Callable[[Array, Array], Array]) -> Callable[..., Slope]:
    """Of a function of one number: its slope from argument and value."""
    return lambda v, d, value: _times(d[0], factor(v[0], value))


def _quotient(v: list[Array], d: list[Slope], value: Array) -> Slope:
    above = _sum(d[0], _negated(_times(d[1], value)))
    return None if above is None else np.asarray(above / v[1])


def _remainder(v: list[Array], d: list[Slope], value: Array) -> Slope:
    return _sum(d[0], None if d[1] is None else -(np.floor_divide(v[0], v[1]) * d[1]))


SLOPES: dict[str, Callable[[list[Array], list[Slope], Array], Slope]] = {
    "add": lambda v, d, _: _sum(d[0], d[1]),
    "subtract": lambda v, d, _: _sum(d[0], _negated(d[1])),
    "multiply": lambda v, d, _: _sum(_times(d[0], v[1]), _times(d[1], v[0])),
    "divide": _quotient,
    "remainder": _remainder,
    "minimum": lambda v, d, _: _choice((v[0] <= v[1]) | (v[0] != v[0]), d[0], d[1]),
    "maximum": lambda v, d, _: _choice((v[0] >= v[1]) | (v[0] != v[0]), d[0], d[1]),
    "negative": lambda v, d, _: _negated(d[0]),
    "absolute": lambda v, d, _: _choice(v[0] > 0, d[0], _choice(v[0] < 0, _negated(d[0]), None)),
    "where": lambda v, d, _: _choice(v[0], d[1], d[2]),
    "exp": _chain(lambda x, y: y),
    "exp2": _chain(lambda x, y: np.asarray(y * y.dtype.type(LN2))),
    "log": _chain(lambda x, y: np.asarray(1 / x)),
    "sqrt": _chain(lambda x, y: np.asarray(y.dtype.type(0.5) / y)),
    "tanh": _chain(lambda x, y: np.asarray(1 - y * y)),
    "sin": _chain(lambda x, y: np.cos(x)),
    "cos": _chain(lambda x, y: np.asarray(-np.sin(x))),
}

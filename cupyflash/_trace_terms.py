"""Where the gradient of a float argument comes from: the uses of its elements in a score function.

Each use is one element, found by index expressions. What index expressions look like decides how a gradient can be
summed: one that is a head's number alone asks for a sum over pairs, one of j - i + c for a sum along diagonals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ._expression import Expression, Kind, Node

Form = Literal["b", "h", "i", "j", "constant", "from the end", "j - i + c", "i - j + c", "general"]
Linear = dict[str, int]  # coefficients of b, h, i, j, and of "" the constant
_DIAGONALS: dict[tuple[tuple[str, int], ...], Form] = {
    (("i", -1), ("j", 1)): "j - i + c",
    (("i", 1), ("j", -1)): "i - j + c",
}


class IndexForm(NamedTuple):
    """What an index expression is, before it is clamped into its axis.

    ``c``: what is added on a diagonal, or the constant itself, below 0 where it counts from the axis's end. ``low`` and
    ``high``: the function clips to them first; None: it does not.
    """

    form: Form
    c: int = 0
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class ArgTerm:
    """One use of an element of a float argument.

    Attributes
    ----------
    argument : int
        Its position in score_args.
    index : tuple of IndexForm
        One for each of its axes.
    node : int
        Its load, among the expression's nodes.
    smooth : bool
        Whether the score's slope with respect to it may be other than 0.
    """

    argument: int
    index: tuple[IndexForm, ...]
    node: int
    smooth: bool


def arg_terms(expression: Expression) -> tuple[ArgTerm, ...]:
    """All uses of float arguments; equal ones are one."""
    last = len(expression.nodes) - 1
    sums = linear_forms(expression)
    return tuple(
        ArgTerm(node.data, tuple(classify(expression, sums, i) for i in node.inputs), n, last in expression.carries(n))
        for n, node in enumerate(expression.nodes)
        if node.op == "load" and node.kind is Kind.FLOAT
    )


def classify(expression: Expression, sums: list[Linear | None], n: int) -> IndexForm:
    """The form of an index expression. int32 sums of positions are taken not to wrap."""
    if (c := _from_end(expression, n)) is not None:
        return IndexForm("from the end", c)
    low = high = None
    shift = 0  # what is added behind the bounds to come
    while sums[n] is None and expression.nodes[n].op in ("minimum", "maximum", "add", "subtract"):
        node = expression.nodes[n]
        bound, other = (_constant(expression, i) for i in node.inputs)
        if bound is None or node.op == "subtract":
            bound, inner = other, node.inputs[0]
        else:
            inner = node.inputs[1]
        if bound is None:
            return IndexForm("general")
        if node.op in ("add", "subtract"):
            shift += bound if node.op == "add" else -bound
            n = inner
            continue
        bound += shift
        # An outer bound wins: what an inner one leaves is clipped by it once more.
        if node.op == "minimum":
            high = bound if high is None else min(bound, high)
            high = high if low is None else max(high, low)
        else:
            low = bound if low is None else max(bound, low)
            low = low if high is None else min(low, high)
        n = inner
    terms = sums[n]
    if terms is None:
        return IndexForm("general")
    c = terms.get("", 0) + shift
    kept = tuple(sorted((name, factor) for name, factor in terms.items() if factor and name))
    if not kept:
        c = c if low is None else max(c, low)
        return IndexForm("constant", c if high is None else min(c, high))
    if kept in _DIAGONALS:
        return IndexForm(_DIAGONALS[kept], c, low, high)
    plain = len(kept) == 1 and kept[0][1] == 1 and c == 0 and low is None and high is None
    names: dict[str, Form] = {"b": "b", "h": "h", "i": "i", "j": "j"}
    return IndexForm(names[kept[0][0]]) if plain else IndexForm("general")


def _from_end(expression: Expression, n: int) -> int | None:
    """The constant below 0 that an index was, if it was one: it comes as the axis's length plus it."""
    node = expression.nodes[n]
    if node.op != "add" or expression.nodes[node.inputs[0]].op != "length":
        return None
    return _constant(expression, node.inputs[1])


def _constant(expression: Expression, n: int) -> int | None:
    node = expression.nodes[n]
    return int(node.data) if node.op == "constant" else None


def linear_forms(expression: Expression) -> list[Linear | None]:
    """Every node as a sum of multiples of b, h, i, j and 1, if it is an integer and one."""
    sums: list[Linear | None] = []
    for node in expression.nodes:
        parts = [sums[i] for i in node.inputs]
        known = [part for part in parts if part is not None]
        integer = node.kind in (Kind.INT, Kind.LONG)
        sums.append(_linear(node, known) if integer and len(known) == len(parts) else None)
    return sums


def _linear(node: Node, parts: list[Linear]) -> Linear | None:
    if node.op == "variable":
        return {node.data: 1}
    if node.op == "constant":
        return {"": int(node.data)}
    if node.op == "cast":
        return parts[0]
    if node.op == "negative":
        return _scaled(parts[0], -1)
    if node.op in ("add", "subtract"):
        first, other = parts[0], _scaled(parts[1], 1 if node.op == "add" else -1)
        return {name: first.get(name, 0) + other.get(name, 0) for name in {*first, *other}}
    if node.op == "multiply":
        for x, y in (parts, parts[::-1]):
            if set(x) <= {""}:
                return _scaled(y, x.get("", 0))
    return None


def _scaled(terms: Linear, factor: int) -> Linear:
    return {name: factor * x for name, x in terms.items()}

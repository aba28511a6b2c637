"""What a score or mask function computes, as a flat list of operations on scalars.

A Tape records operations in NumPy's terms and lowers them to few: operands of one operation have one kind, powers
are products, clip is minimum and maximum. Equal operations become one. ``finish`` keeps what the result needs.

Kinds are bool, int32, int64 and the float type of the logit. Integers that meet floats become floats of that type,
whatever their width; integer arithmetic wraps, as NumPy's does.
"""

from __future__ import annotations

import enum
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ._arrays import DTYPES

MOST_POWER = 16  # x ** n is written out as products up to here


class Kind(enum.IntEnum):
    """What a value is; of two that meet, the greater."""

    BOOL = 0
    INT = 1  # int32
    LONG = 2  # int64
    FLOAT = 3  # the logit's type


_INTEGER_KINDS = {"int8", "int16", "int32", "uint8", "uint16"}
KINDS: dict[np.dtype, Kind] = {np.dtype(np.bool_): Kind.BOOL}
KINDS |= {
    np.dtype(name): Kind.INT if name in _INTEGER_KINDS else Kind.LONG
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}
KINDS |= dict.fromkeys(DTYPES, Kind.FLOAT)

FUNCTIONS = ("exp", "exp2", "log", "sqrt", "tanh", "sin", "cos")  # of one float
ARITHMETIC = ("add", "subtract", "multiply", "floor_divide", "remainder", "minimum", "maximum")
COMPARISONS = ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
_OF_BOOLEANS = {"add": "logical_or", "multiply": "logical_and", "minimum": "logical_and", "maximum": "logical_or"}
BITWISE = ("bitwise_and", "bitwise_or", "bitwise_xor")
LOGICAL = ("logical_and", "logical_or", "logical_xor")
# Of these, what an input's slope does to the result's; all others have slope 0.
SMOOTH = {"add", "subtract", "multiply", "divide", "remainder", "minimum", "maximum", "negative", "absolute", "where"}
SMOOTH |= {*FUNCTIONS}


class Node(NamedTuple):
    """One operation; inputs are the numbers of earlier nodes.

    ``data``: a variable's name, a constant's repr, a load's argument, a length's (argument, axis).
    """

    op: str
    kind: Kind
    inputs: tuple[int, ...] = ()
    data: Any = None

    @property
    def value(self) -> bool | int | float:
        """Of a constant."""
        return self.data == "True" if self.kind is Kind.BOOL else (float if self.kind is Kind.FLOAT else int)(self.data)


@dataclass(frozen=True)
class Expression:
    """Nodes in the order of evaluation; the last is the result."""

    nodes: tuple[Node, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.nodes)

    def carries(self, seed: int | None) -> frozenset[int]:
        """The nodes whose slope with respect to node ``seed`` may be other than 0."""
        found = set() if seed is None else {seed}
        for n, node in enumerate(self.nodes):
            inputs = node.inputs[1:] if node.op == "where" else node.inputs
            if node.kind is Kind.FLOAT and node.op in SMOOTH and not found.isdisjoint(inputs):
                found.add(n)
        return frozenset(found)

    def find(self, op: str, data: Any) -> int | None:
        """The first node of this operation, if there is one."""
        return next((n for n, node in enumerate(self.nodes) if node.op == op and node.data == data), None)


# ------------------------------------------------------------------------------------------------------- refusals


_NOT_USERS = {os.path.abspath(__file__), os.path.join(os.path.dirname(os.path.abspath(__file__)), "_symbols.py")}
_NUMPY = os.path.dirname(os.path.abspath(np.__file__)) + os.sep
_TRACER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_trace.py")


def user_line() -> str | None:
    """File and line of the user's code that is running: the innermost frame that is neither ours nor NumPy's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = os.path.abspath(frame.f_code.co_filename)
        if name == _TRACER:
            return None
        if name not in _NOT_USERS and not name.startswith(_NUMPY):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def refuse(what: str, message: str, error: type[Exception] = TypeError) -> NoReturn:
    """Raise what names the kind of function, the operation and its rule, and the user's line."""
    place = user_line()
    raise error(f"{what} function{f' at {place}' if place else ''}: {message}")


# ----------------------------------------------------------------------------------------------------------- tape


class Tape:
    """Records what one call of a function does. Operands and results are numbers of nodes."""

    def __init__(self, what: str) -> None:
        self.what = what  # "score" or "mask", for messages
        self.nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}

    def node(self, op: str, kind: Kind, *inputs: int, data: Any = None) -> int:
        """The node of this operation, a new one if there was none."""
        node = Node(op, kind, inputs, data)
        if node not in self._numbers:
            self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[node]

    def kind(self, a: int) -> Kind:
        return self.nodes[a].kind

    def value(self, a: int) -> bool | int | float | None:
        """Of a constant; None: it is none."""
        node = self.nodes[a]
        return node.value if node.op == "constant" else None

    def refuse(self, message: str, error: type[Exception] = TypeError) -> NoReturn:
        refuse(self.what, message, error)

    def variable(self, name: str) -> int:
        return self.node("variable", Kind.FLOAT if name == "s" else Kind.INT, data=name)

    def constant(self, value: bool | int | float) -> int:
        if isinstance(value, bool):
            return self.node("constant", Kind.BOOL, data=repr(value))
        if isinstance(value, float):
            return self.node("constant", Kind.FLOAT, data=repr(value))
        if not -(2**63) <= value < 2**63:
            self.refuse(f"the constant {value} is beyond 64-bit integers", ValueError)
        return self.node("constant", Kind.INT if -(2**31) <= value < 2**31 else Kind.LONG, data=repr(value))

    def cast(self, a: int, kind: Kind) -> int:
        """The same value as another, greater kind."""
        if self.kind(a) is kind:
            return a
        value = self.value(a)
        if value is not None:
            return self.node("constant", kind, data=repr((float if kind is Kind.FLOAT else int)(value)))
        return self.node("cast", kind, a)

    def _meet(self, *operands: int, least: Kind = Kind.BOOL) -> tuple[Kind, list[int]]:
        kind = max(least, *(self.kind(a) for a in operands))
        return kind, [self.cast(a, kind) for a in operands]

    # -------------------------------------------------------------------------------------- arithmetic

    def unary(self, op: str, a: int) -> int:
        """Negative, absolute, floor, or one of FUNCTIONS."""
        kind = self.kind(a)
        if op in FUNCTIONS:
            return self.node(op, Kind.FLOAT, self.cast(a, Kind.FLOAT))
        if kind is Kind.BOOL and op == "negative":
            self.refuse("negative (unary -) of a boolean: use ~ for its opposite")
        if kind is Kind.BOOL or (op == "floor" and kind is not Kind.FLOAT):
            return a
        return self.node(op, kind, a)

    def arithmetic(self, op: str, a: int, b: int) -> int:
        """One of ARITHMETIC."""
        if self.kind(a) is self.kind(b) is Kind.BOOL:  # as NumPy has it
            if op not in _OF_BOOLEANS:
                self.refuse(f"{op} of two booleans: use &, |, ^ and ~ on them")
            return self.node(_OF_BOOLEANS[op], Kind.BOOL, a, b)
        kind, (a, b) = self._meet(a, b)
        return self.node(op, kind, a, b)

    def divide(self, a: int, b: int) -> int:
        """True division: of floats, whatever comes."""
        return self.node("divide", Kind.FLOAT, self.cast(a, Kind.FLOAT), self.cast(b, Kind.FLOAT))

    def power(self, a: int, b: int) -> int:
        """As products, as sqrt, or, of 2, as exp2."""
        exponent = self.value(b)
        if exponent is None:
            return self._power_of_two(a, b)
        if exponent in (0.5, -0.5):
            root = self.unary("sqrt", a)
            return root if exponent > 0 else self.divide(self.constant(1.0), root)
        if exponent % 1 != 0 or abs(exponent) > MOST_POWER:
            self.refuse(f"power (**) with the exponent {exponent}: integers up to {MOST_POWER} and 0.5 are taken")
        a = self.cast(a, max(Kind.INT, self.kind(a), self.kind(b)))
        if exponent < 0 and self.kind(a) is not Kind.FLOAT:
            self.refuse(f"power (**) of an integer with the exponent {exponent}: write 1 / x ** n", ValueError)
        product = self._product(a, abs(int(exponent)))
        return product if exponent >= 0 else self.divide(self.constant(1.0), product)

    def _power_of_two(self, a: int, b: int) -> int:
        if self.value(a) != 2:
            self.refuse("power (**) with an exponent that is no constant: write np.exp(x * log(base)), or 2.0 ** x")
        if max(self.kind(a), self.kind(b)) is not Kind.FLOAT:
            self.refuse("power (**) of an integer with an exponent that is no constant: write 2.0 ** x")
        return self.unary("exp2", b)

    def _product(self, a: int, times: int) -> int:
        """By repeated squaring."""
        product: int | None = None
        while times:
            if times % 2:
                product = a if product is None else self.arithmetic("multiply", product, a)
            times //= 2
            a = self.arithmetic("multiply", a, a) if times else a
        return self.cast(self.constant(1), self.kind(a)) if product is None else product

    def clip(self, a: int, low: int | None, high: int | None) -> int:
        """Where low > high, it is high, as NumPy has it."""
        a = a if low is None else self.arithmetic("maximum", a, low)
        return a if high is None else self.arithmetic("minimum", a, high)

    def sign(self, a: int) -> int:
        """-1, 0, 1, or NaN."""
        kind, (a, zero) = self._meet(a, self.constant(0), least=Kind.INT)
        one, minus = (self.cast(self.constant(x), kind) for x in (1, -1))
        below = self.where(self.compare("less", a, zero), minus, self.arithmetic("multiply", a, zero))
        return self.where(self.compare("greater", a, zero), one, below)

    # ------------------------------------------------------------------------------------------- logic

    def compare(self, op: str, a: int, b: int) -> int:
        """One of COMPARISONS."""
        _, (a, b) = self._meet(a, b, least=Kind.INT)
        return self.node(op, Kind.BOOL, a, b)

    def truth(self, a: int) -> int:
        """Whether a number is not 0."""
        return a if self.kind(a) is Kind.BOOL else self.compare("not_equal", a, self.constant(0))

    def logical(self, op: str, a: int, b: int) -> int:
        """One of LOGICAL; of numbers, whether they are not 0."""
        return self.node(op, Kind.BOOL, self.truth(a), self.truth(b))

    def invert(self, a: int) -> int:
        """The opposite of a boolean, the bits' of an integer."""
        if self.kind(a) is Kind.FLOAT:
            self.refuse("invert (~) of a float: booleans and integers have it")
        return self.node("logical_not" if self.kind(a) is Kind.BOOL else "invert", self.kind(a), a)

    def bitwise(self, op: str, a: int, b: int) -> int:
        """One of BITWISE."""
        kind, (a, b) = self._meet(a, b)
        if kind is Kind.FLOAT:
            sign = "&|^"[BITWISE.index(op)]
            self.refuse(f"{op} ({sign}) of a float: booleans and integers have it")
        return self.node(op.replace("bitwise", "logical") if kind is Kind.BOOL else op, kind, a, b)

    def where(self, condition: int, a: int, b: int) -> int:
        if self.kind(condition) is not Kind.BOOL:
            self.refuse("where whose condition is a number: compare it, e.g. where(x > 0, ...)")
        kind, (a, b) = self._meet(a, b)
        return a if a == b else self.node("where", kind, condition, a, b)

    # --------------------------------------------------------------------------------------- arguments

    def load(self, argument: int, dtype: np.dtype, indices: tuple[int, ...]) -> int:
        """An element of an array argument. A constant index below 0 counts from the end; computed ones are clamped."""
        counted = []
        for axis, index in enumerate(indices):
            if self.kind(index) not in (Kind.INT, Kind.LONG):
                kind = self.kind(index).name.lower()
                self.refuse(f"indexing {self.what}_args[{argument}] with a {kind}: an index is an integer expression")
            value = self.value(index)
            if value is not None and value < 0:
                length = self.node("length", Kind.INT, data=(argument, axis))
                index = self.arithmetic("add", length, index)
            counted.append(index)
        return self.node("load", KINDS[dtype], *counted, data=argument)

    def finish(self, result: int) -> Expression:
        """All that the result needs, numbered anew."""
        needed = {result}
        for n in range(result, -1, -1):
            if n in needed:
                needed.update(self.nodes[n].inputs)
        numbers = {n: new for new, n in enumerate(sorted(needed))}
        kept = (self.nodes[n] for n in numbers)
        return Expression(tuple(n._replace(inputs=tuple(numbers[i] for i in n.inputs)) for n in kept))

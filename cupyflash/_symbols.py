"""What stands for numbers and arrays while a score or mask function is traced.

A Symbol answers Python's operators, NumPy's ufuncs, ``np.where`` and ``np.clip`` by recording them on its Tape. What
would need a value (``if``, ``float``, a loop over it) is refused by name, with the user's line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from ._expression import ARITHMETIC, BITWISE, COMPARISONS, FUNCTIONS, LOGICAL, Kind, Tape

_TRUTH = "use np.where for a choice, and &, |, ~ for and, or, not"
# What asks for the value of a symbol: how the user may have written it, and what to write.
_VALUES = {
    "__bool__": ("bool() (if, and, or, not, a chained comparison)", _TRUTH),
    "__float__": ("float() (functions of math do that)", "use NumPy's functions"),
    "__int__": ("int()", "np.floor rounds down; // divides integers"),
    "__complex__": ("complex()", "logits are real"),
    "__index__": ("use as an index or a count", "pass arrays to be indexed by it in {what}_args"),
    "__iter__": ("iteration", "it is a number"),
    "__len__": ("len()", "it is a number"),
    "__contains__": ("in", "compare with == and |"),
    "__hash__": ("hash() (a set or a dict)", "an array in {what}_args can be looked up by index"),
    "__array__": (
        "conversion to an array (or an array indexed by it)",
        "pass arrays in {what}_args; of NumPy, ufuncs, where and clip are taken",
    ),
    "__round__": ("round()", "write np.floor(x + 0.5)"),
    "__trunc__": ("math.trunc()", "use np.floor"),
    "__floor__": ("math.floor()", "use np.floor"),
    "__ceil__": ("math.ceil()", "write -np.floor(-x)"),
    "__lshift__": ("<<", "multiply by a power of two"),
    "__rlshift__": ("<<", "multiply by a power of two"),
    "__rshift__": (">>", "divide by a power of two with //"),
    "__rrshift__": (">>", "divide by a power of two with //"),
    "__matmul__": ("@", "it is a number at one pair"),
    "__rmatmul__": ("@", "it is a number at one pair"),
    "__setitem__": ("assignment to an element", "a function changes nothing: use np.where"),
    "__call__": ("a call", "it is a number"),
}

Operation = Callable[..., int]  # of a tape and the numbers of its nodes


def _two(method: str, op: str) -> Operation:
    return lambda tape, a, b: getattr(tape, method)(op, a, b)


def _one(op: str) -> Operation:
    return lambda tape, a: tape.unary(op, a)


# By the ufunc's name.
UFUNCS: dict[str, tuple[int, Operation]] = {op: (2, _two("arithmetic", op)) for op in ARITHMETIC}
UFUNCS |= {op: (2, _two("compare", op)) for op in COMPARISONS}
UFUNCS |= {op: (2, _two("bitwise", op)) for op in BITWISE}
UFUNCS |= {op: (2, _two("logical", op)) for op in LOGICAL}
UFUNCS |= {op: (1, _one(op)) for op in (*FUNCTIONS, "negative", "absolute", "floor")}
UFUNCS |= {
    "divide": (2, Tape.divide),
    "true_divide": (2, Tape.divide),  # its name in older NumPy
    "power": (2, Tape.power),
    "float_power": (2, lambda tape, a, b: tape.power(tape.cast(a, Kind.FLOAT), b)),
    "positive": (1, lambda tape, a: a),
    "fabs": (1, lambda tape, a: tape.unary("absolute", tape.cast(a, Kind.FLOAT))),
    "square": (1, lambda tape, a: tape.arithmetic("multiply", a, a)),
    "reciprocal": (1, lambda tape, a: tape.divide(tape.constant(1.0), a)),
    "sign": (1, Tape.sign),
    "invert": (1, Tape.invert),
    "logical_not": (1, lambda tape, a: tape.invert(tape.truth(a))),
    "isnan": (1, lambda tape, a: tape.compare("not_equal", a, a)),
}
_OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
}  # fmt: skip
_UNARY = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}


class Traceable:
    """What symbols of numbers and of arrays share: an operator is a ufunc, and a ufunc an operation of the tape."""

    _tape: Tape

    def _number(self) -> int:
        """The node that this is."""
        raise NotImplementedError

    def _name(self) -> str:
        """How a message calls it."""
        raise NotImplementedError

    def _refuse(self, operation: str, rule: str) -> NoReturn:
        tape = self._tape
        tape.refuse(f"{operation} of {self._name()} can't be traced: {rule.format(what=tape.what)}")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        name = f"np.{ufunc.__name__}"
        if method != "__call__":
            self._refuse(f"{name}.{method}", "it is a number at one pair")
        if options:
            self._refuse(f"{name} with {', '.join(f'{option}=' for option in options)}", "it has its operands only")
        return apply(self._tape, ufunc.__name__, *inputs)

    def __array_function__(self, function: Any, types: Any, inputs: Any, options: dict[str, Any]) -> Any:
        if function is np.where:
            return _where(self._tape, *inputs, **options)
        if function is np.clip:
            return _clip(self._tape, *inputs, **options)
        self._refuse(f"{function.__module__}.{function.__name__}", "of NumPy, ufuncs, where and clip are taken")

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}", "use NumPy's functions")


class Symbol(Traceable):
    """A number at one pair."""

    def __init__(self, tape: Tape, number: int) -> None:
        self._tape, self._node = tape, number

    def _number(self) -> int:
        return self._node

    def _name(self) -> str:
        node = self._tape.nodes[self._node]
        return f"{node.data}" if node.op == "variable" else "a traced value"

    def __getitem__(self, index: Any) -> Symbol:
        node = self._tape.nodes[self._node]
        if node.op == "load" and not node.inputs and index == ():
            return self
        self._refuse("indexing", "it is a number at one pair; arrays come in {what}_args")


class ArraySymbol(Traceable):
    """An array argument, to be indexed."""

    def __init__(self, tape: Tape, argument: int, dtype: np.dtype, ndim: int) -> None:
        self._tape, self._argument, self._dtype, self.ndim = tape, argument, dtype, ndim

    def _name(self) -> str:
        return f"{self._tape.what}_args[{self._argument}]"

    def _number(self) -> int:
        self._tape.refuse(
            f"{self._name()} has {_axes(self.ndim)} and is used as a number: index it, "
            f"e.g. x[{', '.join('bhij'[4 - self.ndim :])}]",
            ValueError,
        )

    def __getitem__(self, index: Any) -> Symbol:
        indices = index if isinstance(index, tuple) else (index,)
        for part in indices:
            if part is None or part is Ellipsis or isinstance(part, (slice, list)):
                self._refuse(f"indexing with {part!r}", "an index is an integer expression")
        if len(indices) != self.ndim:
            counted = f"{len(indices)} ind{'ex' if len(indices) == 1 else 'ices'}"
            shape = f"{self._name()} has {_axes(self.ndim)} and is indexed by {counted}"
            self._tape.refuse(f"{shape}: give one for each axis", ValueError)
        numbers = tuple(number(self._tape, part) for part in indices)
        return Symbol(self._tape, self._tape.load(self._argument, self._dtype, numbers))


def _axes(ndim: int) -> str:
    return f"{ndim} ax{'is' if ndim == 1 else 'es'}"


def number(tape: Tape, x: Any) -> int:
    """The node of an operand: a symbol, or a constant."""
    if isinstance(x, Traceable):
        if x._tape is not tape:
            tape.refuse("a value of another trace is used: a function must not keep what it was called with")
        return x._number()
    if isinstance(x, np.ndarray):
        if x.ndim:
            tape.refuse(f"an array of shape {x.shape} is used: pass it in {tape.what}_args and index it")
        x = x[()]
    if isinstance(x, (bool, np.bool_)):
        return tape.constant(bool(x))
    if isinstance(x, (int, np.integer)):
        return tape.constant(int(x))
    if isinstance(x, (float, np.floating, ml_dtypes.bfloat16)):
        return tape.constant(float(x))
    tape.refuse(f"{x!r} of type {type(x).__name__} is used: numbers and {tape.what}_args are taken")


def apply(tape: Tape, ufunc: str, *operands: Any) -> Symbol:
    """Record a ufunc."""
    if ufunc not in UFUNCS:
        taken = ", ".join(sorted(UFUNCS))
        tape.refuse(f"np.{ufunc} can't be traced: of NumPy's ufuncs, {taken} are taken")
    arity, operation = UFUNCS[ufunc]
    if len(operands) != arity:
        tape.refuse(f"np.{ufunc} of {len(operands)} operands: it has {arity}, and no out")
    return Symbol(tape, operation(tape, *(number(tape, x) for x in operands)))


def _where(tape: Tape, condition: Any, *choices: Any, **options: Any) -> Symbol:
    if len(choices) != 2 or options:
        tape.refuse("np.where without two choices can't be traced: write np.where(condition, x, y)")
    return Symbol(tape, tape.where(*(number(tape, x) for x in (condition, *choices))))


def _clip(tape: Tape, a: Any, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None) -> Symbol:
    bounds = (a_min if min is None else min, a_max if max is None else max)
    return Symbol(tape, tape.clip(number(tape, a), *(None if x is None else number(tape, x) for x in bounds)))


def _binary(ufunc: str, swapped: bool) -> Callable[[Traceable, Any], Symbol]:
    if swapped:
        return lambda self, other: apply(self._tape, ufunc, other, self)
    return lambda self, other: apply(self._tape, ufunc, self, other)


def _value(operation: str, rule: str) -> Callable[..., NoReturn]:
    return lambda self, *_, **__: self._refuse(operation, rule)


for _name, _ufunc in _OPERATORS.items():
    setattr(Traceable, f"__{_name}__", _binary(_ufunc, swapped=False))
    if _ufunc not in COMPARISONS:
        setattr(Traceable, f"__r{_name}__", _binary(_ufunc, swapped=True))
for _name, _ufunc in _UNARY.items():
    setattr(Traceable, f"__{_name}__", lambda self, ufunc=_ufunc: apply(self._tape, ufunc, self))
for _name, (_operation, _rule) in _VALUES.items():
    setattr(Traceable, _name, _value(_operation, _rule))

"""Score and mask functions, from Python to CUDA C, to NumPy, and to derivatives.

A function is called once, with symbols, for the dtypes and ranks of its arguments. What it did is a Traced: CUDA C for
the kernels, and the same operations on NumPy arrays, so that both sides agree within rounding. Two functions that do
the same have equal Traced, and share what is compiled.
"""

from __future__ import annotations

import builtins
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType, NoneType
from typing import Any

import numpy as np
import numpy.typing as npt

from ._arrays import Array
from ._expression import Expression, Kind, Tape
from ._score_args import Argument, signature
from ._symbols import ArraySymbol, Symbol, number
from ._trace_cuda import mask_function, score_function, score_term
from ._trace_numpy import clamped, evaluate
from ._trace_terms import ArgTerm, arg_terms

INT32 = np.dtype(np.int32)
NumPy = npt.NDArray[Any]


@dataclass(frozen=True)
class Traced:
    """What a function computes, and the arguments that it was traced for.

    Equal and hashable by both; arguments count by dtype and rank, never by values or shape.
    """

    expression: Expression
    arguments: tuple[Argument, ...]

    def __hash__(self) -> int:
        return hash((self.expression, self.arguments))

    @property
    def _dtypes(self) -> tuple[np.dtype, ...]:
        return tuple(x.dtype for x in self.arguments)


@dataclass(frozen=True)
class TracedScore(Traced):
    """A score function."""

    __hash__ = Traced.__hash__

    @cached_property
    def cuda(self) -> str:
        """``template <typename Number> Number score_function(Number s, int b, h, i, j, const ScoreArgs& args)``.

        After dual.cuh and score_args.cuh; Number is Accumulator or Dual.
        """
        return score_function(self.expression, self._dtypes)

    @cached_property
    def cuda_terms(self) -> str:
        """For each n of ``arg_terms()``: ``Accumulator score_term_<n>(s, b, h, i, j, args, int (&index)[4])``.

        Returns d score / d (that use) and the element's index, clamped.
        """
        terms = enumerate(self.arg_terms())
        return "\n".join(score_term(self.expression, self._dtypes, term.node, n) for n, term in terms)

    def numpy(self, s: NumPy, b: Any, h: Any, i: Any, j: Any, args: tuple[NumPy, ...]) -> NumPy:
        """The scores of logits s, a float array; b, h, i, j are integer arrays that broadcast to it."""
        values, _ = evaluate(self.expression, _variables(s, b, h, i, j), args, s.dtype)
        return np.broadcast_to(values[-1], s.shape)

    def slope(self, s: NumPy, b: Any, h: Any, i: Any, j: Any, args: tuple[NumPy, ...]) -> NumPy:
        """The scores' derivatives with respect to s."""
        return self.with_slope(s, b, h, i, j, args)[1]

    def with_slope(self, s: NumPy, b: Any, h: Any, i: Any, j: Any, args: tuple[NumPy, ...]) -> tuple[NumPy, NumPy]:
        """The scores, and their derivatives with respect to s."""
        seed = self.expression.find("variable", "s")
        values, slope = evaluate(self.expression, _variables(s, b, h, i, j), args, s.dtype, seed)
        found = (values[-1], np.zeros((), s.dtype) if slope is None else slope)
        return np.broadcast_to(found[0], s.shape), np.broadcast_to(found[1], s.shape)

    def arg_terms(self) -> tuple[ArgTerm, ...]:
        """The uses of float arguments, each with what its index looks like."""
        return self._arg_terms

    @cached_property
    def _arg_terms(self) -> tuple[ArgTerm, ...]:
        return arg_terms(self.expression)

    def arg_slope(
        self, term: ArgTerm, s: NumPy, b: Any, h: Any, i: Any, j: Any, args: tuple[NumPy, ...]
    ) -> tuple[tuple[NumPy, ...], NumPy]:
        """The elements that a term uses, as clamped indices, and the scores' derivatives with respect to them."""
        values, slope = evaluate(self.expression, _variables(s, b, h, i, j), args, s.dtype, term.node)
        axes = zip(self.expression.nodes[term.node].inputs, args[term.argument].shape, strict=True)
        index = tuple(np.broadcast_to(clamped(values[n], length), s.shape) for n, length in axes)
        return index, np.broadcast_to(np.zeros((), s.dtype) if slope is None else slope, s.shape)


@dataclass(frozen=True)
class TracedMask(Traced):
    """A mask function."""

    __hash__ = Traced.__hash__

    @cached_property
    def cuda(self) -> str:
        """``bool mask_function(int b, int h, int i, int j, const MaskArgs& args)``, after dual.cuh and score_args.cuh.

        Floats in it are Accumulators.
        """
        return mask_function(self.expression, self._dtypes)

    def numpy(self, b: Any, h: Any, i: Any, j: Any, args: tuple[NumPy, ...], dtype: np.dtype) -> NumPy:
        """Whether pairs are visible; ``dtype`` is the Accumulator's, for floats in it."""
        variables = _variables(None, b, h, i, j)
        values, _ = evaluate(self.expression, variables, args, dtype)
        return np.broadcast_to(values[-1], np.broadcast_shapes(*(x.shape for x in variables.values())))


def _variables(s: NumPy | None, b: Any, h: Any, i: Any, j: Any) -> dict[str, NumPy]:
    found = {name: np.asarray(x, INT32) for name, x in (("b", b), ("h", h), ("i", i), ("j", j))}
    return found if s is None else {"s": s, **found}


# -------------------------------------------------------------------------------------------------------- tracing


def trace_score(function: Callable[..., Any], args: tuple[Array, ...] = ()) -> TracedScore:
    """What ``function(s, b, h, i, j, *score_args)`` computes.

    Parameters
    ----------
    args : tuple of arrays
        As ``take_args`` gives them; only dtypes and ranks are read.

    Raises
    ------
    TypeError, ValueError
        Where it does what can't be traced; the message has the operation and the line.
    """
    traced = _cached("score", function, signature("score_args", args))
    assert isinstance(traced, TracedScore)
    return traced


def trace_mask(function: Callable[..., Any], args: tuple[Array, ...] = ()) -> TracedMask:
    """What ``function(b, h, i, j, *mask_args)`` computes; as ``trace_score``."""
    traced = _cached("mask", function, signature("mask_args", args))
    assert isinstance(traced, TracedMask)
    return traced


# For each function: by kind and signature, what its names stood for when it was traced, and the result.
_known: weakref.WeakKeyDictionary[Any, dict[Any, tuple[tuple[Any, ...], Traced]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_CONSTANT_MODULES = {"numpy", "math", "cupy"}
_CONSTANTS = (bool, int, float, str, NoneType, np.generic, np.ufunc, BuiltinFunctionType, type, CodeType)


def _cached(what: str, function: Callable[..., Any], arguments: tuple[Argument, ...]) -> Traced:
    if not callable(function):
        raise TypeError(f"{what}={function!r}: a {what} function is callable")
    names = _names(function)
    if names is None:
        return _trace(what, function, arguments)
    key = (what, arguments)
    with _lock:
        before, traced = _known.get(function, {}).get(key, ((), None))
    if traced is None or len(before) != len(names) or any(x is not y for x, y in zip(before, names, strict=True)):
        traced = _trace(what, function, arguments)
        with _lock:
            _known.setdefault(function, {})[key] = (names, traced)
    return traced


def _names(function: object) -> tuple[Any, ...] | None:
    """What the names in a function stand for, beside its parameters, and in functions that it calls.

    If one of them changes, the function is traced anew. None: among them is something that can change without notice,
    so the function is traced at each call.
    """
    if not isinstance(function, FunctionType):
        return None
    found: list[Any] = [function]
    names: list[Any] = []
    for known in found:  # which grows meanwhile
        for x in _meanings(known):
            if isinstance(x, FunctionType) and not _is_constant_module(x.__module__):
                if not any(x is other for other in found):
                    found.append(x)
            elif isinstance(x, ModuleType):
                if not _is_constant_module(x.__name__):
                    return None
            elif not isinstance(x, _CONSTANTS) and not (callable(x) and _is_constant_module(type(x).__module__)):
                return None
            names.append(x)
    return tuple(names)


def _meanings(function: FunctionType) -> list[Any]:
    code = function.__code__
    found = [code, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    found += (cell.cell_contents for cell in function.__closure__ or () if cell != CellType())
    codes = [code]
    for known in codes:  # with those of inner functions
        codes += (x for x in known.co_consts if isinstance(x, CodeType))
    names = (name for known in codes for name in known.co_names)
    return found + [function.__globals__.get(name, getattr(builtins, name, None)) for name in names]


def _is_constant_module(name: str | None) -> bool:
    return name is not None and name.split(".")[0] in _CONSTANT_MODULES


def _trace(what: str, function: Callable[..., Any], arguments: tuple[Argument, ...]) -> Traced:
    tape = Tape(what)
    variables = ("s", "b", "h", "i", "j") if what == "score" else ("b", "h", "i", "j")
    symbols: list[Any] = [Symbol(tape, tape.variable(name)) for name in variables]
    for n, x in enumerate(arguments):
        symbols.append(ArraySymbol(tape, n, x.dtype, x.ndim) if x.ndim else Symbol(tape, tape.load(n, x.dtype, ())))
    _check_call(what, function, variables, symbols)
    root = _result(tape, function, function(*symbols))
    return _make(what, tape.finish(root), arguments)


@lru_cache(maxsize=1024)
def _make(what: str, expression: Expression, arguments: tuple[Argument, ...]) -> Traced:
    """One object for equal functions, so that their texts are written once."""
    return (TracedScore if what == "score" else TracedMask)(expression, arguments)


def _check_call(what: str, function: Callable[..., Any], variables: tuple[str, ...], symbols: list[Any]) -> None:
    try:
        expected = inspect.signature(function)
    except (TypeError, ValueError):  # it has no signature to ask for
        return
    try:
        expected.bind(*symbols)
    except TypeError as error:
        given = len(symbols) - len(variables)
        raise TypeError(
            f"{_defined(what, function)}: it is called as {what}({', '.join(variables)}, *{what}_args) with "
            f"{given} {what}_args: {error}"
        ) from None


def _result(tape: Tape, function: Callable[..., Any], returned: Any) -> int:
    """The node of what a function returned."""
    what = tape.what
    kind = "a number" if what == "score" else "a boolean"
    try:
        root = number(tape, returned)
    except (TypeError, ValueError):
        seen = f"{returned!r} of type {type(returned).__name__}"
        if isinstance(returned, ArraySymbol):
            seen = f"{returned._name()}, an array"
        raise TypeError(f"{_defined(what, function)}: it returns {seen}: a {what} function returns {kind}") from None
    if (tape.kind(root) is Kind.BOOL) != (what == "mask"):
        seen = f"a value of kind {tape.kind(root).name.lower()}"
        raise TypeError(f"{_defined(what, function)}: it returns {seen}: a {what} function returns {kind}")
    return root if what == "mask" else tape.cast(root, Kind.FLOAT)


def _defined(what: str, function: Callable[..., Any]) -> str:
    """A function and where it is."""
    code = getattr(function, "__code__", None)
    place = f" at {code.co_filename}:{code.co_firstlineno}" if isinstance(code, CodeType) else ""
    return f"{what} function {getattr(function, '__name__', repr(function))}{place}"



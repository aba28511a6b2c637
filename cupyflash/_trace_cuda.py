"""An Expression as CUDA C: one function, with what is used more than once in locals."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from ._arrays import DTYPES
from ._expression import COMPARISONS, FUNCTIONS, Expression, Kind, Node
from ._score_args import MOST_AXES

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = DTYPES
Dtypes = tuple[np.dtype, ...]

_INTEGERS = {8: "char", 16: "short", 32: "int", 64: "long long"}
C_TYPES: dict[np.dtype, str] = {np.dtype(np.bool_): "unsigned char"}
C_TYPES |= {np.dtype(f"int{bits}"): f"signed {name}" for bits, name in _INTEGERS.items()}
C_TYPES |= {np.dtype(f"uint{bits}"): f"unsigned {name}" for bits, name in _INTEGERS.items()}
C_TYPES |= {FLOAT16: "Float16", BFLOAT16: "Bfloat16", FLOAT32: "float", FLOAT64: "double"}

_SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_SIGNS |= dict(zip(COMPARISONS, ("<", "<=", ">", ">=", "==", "!="), strict=True))
_SIGNS |= {"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}
_SIGNS |= {"logical_and": "&&", "logical_or": "||", "logical_xor": "!="}
_SCALARS = {Kind.BOOL: "bool", Kind.INT: "int", Kind.LONG: "long long", Kind.FLOAT: "Accumulator"}
_WRAPPING = {"add", "subtract", "multiply", "negative", "absolute", "floor_divide", "remainder", "minimum", "maximum"}
LONGEST = 72  # a longer text gets a name


class Body:
    """The statements that compute an expression, and the texts of its nodes.

    Nodes whose slope with respect to ``seed`` may not be 0 have C++ type ``number``. Those in ``named`` get a local
    in any case.
    """

    def __init__(
        self, expression: Expression, dtypes: Dtypes, seed: int | None, number: str, named: tuple[int, ...] = ()
    ) -> None:
        self.lines: list[str] = []
        self.texts: list[str] = []
        self._dtypes, self._number = dtypes, number
        self._carries = expression.carries(seed)
        uses = Counter(i for node in expression.nodes for i in node.inputs)
        for n, node in enumerate(expression.nodes):
            text = self._text(node, n)
            if n == seed and node.op == "load":
                text = f"{number}({text}, Accumulator(1))"
            shared = uses[n] > 1 or n in named or n == seed or len(text) > LONGEST
            if shared and node.op not in ("variable", "constant", "length"):
                text = self._local(number if n in self._carries else _SCALARS[node.kind], text)
            self.texts.append(text)
        self.result = _unwrapped(self.texts[-1])
        self.carries_result = len(expression.nodes) - 1 in self._carries

    def _local(self, kind: str, text: str) -> str:
        name = f"t{len(self.lines)}"
        self.lines.append(f"  const {kind} {name} = {_unwrapped(text)};")
        return name

    def _text(self, node: Node, n: int) -> str:
        x = [self.texts[i] for i in node.inputs]
        if node.op == "variable":
            return str(node.data)
        if node.op == "constant":
            return _constant(node)
        if node.op == "length":
            return f"args.array[{node.data[0]}].length[{node.data[1]}]"
        if node.op == "load":
            types = f"{_SCALARS[node.kind]}, {C_TYPES[self._dtypes[node.data]]}"
            return f"load_argument<{types}>({', '.join((f'args.array[{node.data}]', *map(_unwrapped, x)))})"
        if n not in self._carries:
            x = [f"math::value({t})" if i in self._carries else t for t, i in zip(x, node.inputs, strict=True)]
        elif node.op in ("where", "minimum", "maximum"):  # both sides of a choice have one type
            sides = zip(x[-2:], node.inputs[-2:], strict=True)
            x[-2:] = [t if i in self._carries else f"{self._number}({_unwrapped(t)})" for t, i in sides]
        return _operation(node, x)


def _unwrapped(text: str) -> str:
    """Without the brackets that enclose all of it."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[1:-1] if letter == ")" and at == len(text) - 1 and text[0] == "(" else text
    return text


def _operation(node: Node, x: list[str]) -> str:
    if node.op == "cast":
        return f"static_cast<{_SCALARS[node.kind]}>({_unwrapped(x[0])})"
    if node.op == "where":
        return f"({x[0]} ? {x[1]} : {x[2]})"
    if node.op == "logical_not":
        return f"!{x[0]}"
    if node.op == "invert":
        return f"~{x[0]}"
    if node.kind in (Kind.INT, Kind.LONG) and node.op in _WRAPPING:
        return f"integer::{node.op}({', '.join(map(_unwrapped, x))})"
    if node.op == "negative":
        return f"(-{x[0]})"
    if node.op in _SIGNS:
        return f"({x[0]} {_SIGNS[node.op]} {x[1]})"
    assert node.op in (*FUNCTIONS, "floor", "absolute", "floor_divide", "remainder", "minimum", "maximum")
    return f"math::{node.op}({', '.join(map(_unwrapped, x))})"


def _constant(node: Node) -> str:
    if node.kind is Kind.BOOL:
        return str(node.data).lower()
    if node.kind is Kind.FLOAT:
        value = float(node.data)
        if math.isnan(value):
            return "math::not_a_number<Accumulator>()"
        if math.isinf(value):
            return "math::infinity<Accumulator>()" if value > 0 else "(-math::infinity<Accumulator>())"
        return f"math::constant<Accumulator>({node.data})"
    suffix = "LL" if node.kind is Kind.LONG else ""
    value = int(node.data)
    if value in (-(2**31), -(2**63)):  # C has no negative literals
        return f"({value + 1}{suffix} - 1)"
    return f"{value}{suffix}" if value >= 0 else f"({value}{suffix})"


def score_function(expression: Expression, dtypes: Dtypes) -> str:
    """``score_function``, generic over float, double and Dual."""
    body = Body(expression, dtypes, expression.find("variable", "s"), "Number")
    return _function(
        "template <typename Number>\n__device__ __forceinline__ Number score_function(\n"
        "    Number s, int b, int h, int i, int j, const ScoreArgs& args) {",
        [*body.lines, f"  return {body.result if body.carries_result else f'Number({body.result})'};"],
    )


def mask_function(expression: Expression, dtypes: Dtypes) -> str:
    """``mask_function``."""
    body = Body(expression, dtypes, None, "Accumulator")
    return _function(
        "__device__ __forceinline__ bool mask_function(int b, int h, int i, int j, const MaskArgs& args) {",
        [*body.lines, f"  return {body.result};"],
    )


def score_term(expression: Expression, dtypes: Dtypes, use: int, term: int) -> str:
    """``score_term_<term>``: what one use of a float argument adds to its gradient, and where."""
    load = expression.nodes[use]
    body = Body(expression, dtypes, use, "Dual", named=load.inputs)
    places = ["0"] * MOST_AXES
    for axis, n in enumerate(load.inputs):
        places[axis] = f"clamped({_unwrapped(body.texts[n])}, args.array[{load.data}].length[{axis}])"
    return _function(
        f"__device__ __forceinline__ Accumulator score_term_{term}(\n"
        "    Accumulator s, int b, int h, int i, int j, const ScoreArgs& args, int (&index)[4]) {",
        [
            *body.lines,
            *(f"  index[{axis}] = {place};" for axis, place in enumerate(places)),
            f"  return {f'math::slope({body.result})' if body.carries_result else 'Accumulator(0)'};",
        ],
    )


def _function(head: str, lines: list[str]) -> str:
    return "\n".join((head, *lines, "}")) + "\n"

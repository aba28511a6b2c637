"""Gradients of score_args: which terms they have, how each is summed, and what kernels are told of it.

The GPU's two steps, and the memory between them, stand in kernels/terms.cuh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from ._arrays import ArraySpec
from ._block_map import KEY_MAP, mapped
from ._compile import Spec
from ._expression import Expression
from ._options import Options
from ._plan import FEATURES_OFF, KernelPlan
from ._plan import grid as grid_of
from ._problem import Problem
from ._score_args import GRADIENT_ARGS, MOST_AXES, argument_name
from ._trace import TracedScore
from ._trace_cuda import score_term
from ._trace_terms import ArgTerm, IndexForm

_OF = {
    "constant": "CONSTANT", "from the end": "FROM_END", "b": "ENTRY", "h": "HEAD", "i": "QUERY", "j": "KEY",
    "j - i + c": "DISTANCE", "i - j + c": "MINUS_DISTANCE",
}  # fmt: skip
_FAR = 2**62
_WARPS = 8  # of bwd_score_args


@dataclass(frozen=True)
class Term:
    """A use whose slope may be other than 0.

    Attributes
    ----------
    sum : str
        What it keeps of a lane of tiles, as kernels/terms.cuh has it.
    of_entry, of_head : bool
        Whether b and h are among its indices.
    """

    use: ArgTerm
    sum: str
    of_entry: bool
    of_head: bool


@lru_cache(maxsize=1024)
def terms_of(score: TracedScore) -> tuple[Term, ...]:
    """What the gradients of all float arguments are sums of."""
    return tuple(_term(use) for use in score.arg_terms() if use.smooth)


def _term(use: ArgTerm) -> Term:
    forms = {form.form for form in use.index}
    distance = not forms.isdisjoint(("j - i + c", "i - j + c"))
    if "general" in forms:
        how = "ARRIVAL"
    elif {"i", "j"} <= forms or (distance and not forms.isdisjoint("ij")):
        how = "PAIRS"
    elif distance:
        how = "DIAGONALS"
    else:
        how = "QUERIES" if "i" in forms else "KEYS" if "j" in forms else "ALL"
    return Term(use, how, "b" in forms, "h" in forms)


def float_args(options: Options) -> tuple[int, ...]:
    """The places of those that have a gradient."""
    if options.score is None:
        return ()
    return tuple(n for n, x in enumerate(options.score.arguments) if x.dtype.kind not in "iub")


def check_order(options: Options, deterministic: bool) -> None:
    """ValueError where a gradient of score_args can't be summed in a fixed order, and has to be."""
    if options.score is None or deterministic is False:
        return
    expression = options.score.expression
    for term in terms_of(options.score):
        if term.sum == "ARRIVAL":
            load = expression.nodes[term.use.node]
            axis = next(axis for axis, form in enumerate(term.use.index) if form.form == "general")
            name = argument_name("score_args", load.data)
            raise ValueError(
                f"{name} is indexed by {describe(expression, load.inputs[axis])}: its gradient is summed in a fixed "
                "order where each index is b, h, i, j, a constant, or j - i plus a constant, clipped or not; pass "
                "deterministic=False for sums in the order of arrival, or leave 'score_args' out of wrt"
            )


_SIGNS = {
    "add": "+", "subtract": "-", "multiply": "*", "floor_divide": "//", "remainder": "%", "less": "<",
    "less_equal": "<=", "greater": ">", "greater_equal": ">=", "equal": "==", "not_equal": "!=",
    "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^", "logical_and": "&", "logical_or": "|",
    "divide": "/",
}  # fmt: skip


def describe(expression: Expression, n: int, nested: bool = False) -> str:
    """A node as the user may have written it."""
    node = expression.nodes[n]
    if node.op in ("variable", "constant"):
        return str(node.data)
    if node.op == "length":
        return f"score_args[{node.data[0]}].shape[{node.data[1]}]"
    if node.op == "load":
        index = ", ".join(describe(expression, i) for i in node.inputs)
        return f"score_args[{node.data}]" + (f"[{index}]" if index else "")
    if node.op == "cast":
        return describe(expression, node.inputs[0], nested)
    if node.op in _SIGNS:
        left, right = (describe(expression, i, nested=True) for i in node.inputs)
        text = f"{left} {_SIGNS[node.op]} {right}"
        return f"({text})" if nested else text
    return f"{node.op}({', '.join(describe(expression, i) for i in node.inputs)})"


# -------------------------------------------------------------------------------------------------------- kernels


def terms_text(terms: tuple[Term, ...], **constants: int) -> str:
    """All terms as C++, and some numbers."""
    lines = [f"__device__ constexpr Term TERMS[] = {{{', '.join(map(_struct, terms))}}};"] if terms else [
        "__device__ constexpr Term TERMS[1] = {};"
    ]  # fmt: skip
    constants = {"NUM_TERMS": len(terms), **constants}
    lines += [f"constexpr int {name} = {value};" for name, value in constants.items()]
    return "\n".join(lines) + "\n"


def _struct(term: Term) -> str:
    index = [_form(form) for form in term.use.index]
    index += ["{}"] * (MOST_AXES - len(index))
    flags = ", ".join(str(x).lower() for x in (term.of_entry, term.of_head))
    return f"{{{term.use.argument}, {len(term.use.index)}, Sum::{term.sum}, {flags}, {{{', '.join(index)}}}}}"


def _form(form: IndexForm) -> str:
    if form.form == "general":
        return "{}"
    low, high = (_clamped(x, other) for x, other in ((form.low, -_FAR), (form.high, _FAR)))
    return f"{{Of::{_OF[form.form]}, {_clamped(form.c, 0)}LL, {low}LL, {high}LL}}"


def _clamped(x: int | None, other: int) -> int:
    return other if x is None else max(-_FAR, min(x, _FAR))


def score_kernels(problem: Problem, spec: Spec, smem: int) -> tuple[KernelPlan, ...]:
    """All kernels of dscore_args; the tile of those that walk pairs is the Spec's."""
    return (*_term_kernels(problem, spec, smem), *_gathering(problem, spec))


def _term_kernels(problem: Problem, spec: Spec, smem: int) -> tuple[KernelPlan, ...]:
    """What fills `partial`: a kernel for each term, whose tile is the Spec's, with the map of blocks that it reads."""
    score = problem.options.score
    assert score is not None
    terms, dtypes = terms_of(score), tuple(x.dtype for x in score.arguments)
    kernels: list[KernelPlan] = []
    for n, term in enumerate(terms):
        text = score.cuda + score_term(score.expression, dtypes, term.use.node, 0)
        text += terms_text(terms, TERM=n)
        lead = len(problem.batch_shape) * (1,)
        walks_entries = term.sum == "PAIRS" and not term.of_entry
        kernel = KernelPlan(
            spec=replace(spec, score_text=text),
            grid=grid_of(*_lanes(problem, term, spec)) if problem.batch * problem.seqlen_q * problem.seqlen_k else 0,
            threads=32 * spec.num_warps,
            smem=smem,
            writes=("partial",),
            section=problem.batch,
            entries=(*lead, problem.num_heads) if walks_entries else None,
            sums=walks_entries,
        )
        kernels += mapped(problem, kernel, (KEY_MAP,))
    return tuple(kernels)


def _blocks(problem: Problem, tile: Spec) -> tuple[int, int]:
    return -(-problem.seqlen_q // tile.block_m), -(-problem.seqlen_k // tile.block_n)


def _lanes(problem: Problem, term: Term, tile: Spec) -> tuple[int, int, int]:
    """Lanes, 1, and heads of entries that have such lanes."""
    m_blocks, n_blocks = _blocks(problem, tile)
    lanes = {
        "KEYS": n_blocks, "DIAGONALS": (m_blocks - 1) * (tile.block_m // tile.block_n) + n_blocks,
        "PAIRS": m_blocks * n_blocks,
    }.get(term.sum, m_blocks)  # fmt: skip
    heads, entries = problem.num_heads, problem.batch
    if term.sum == "PAIRS":
        heads, entries = (n if of else 1 for n, of in ((heads, term.of_head), (entries, term.of_entry)))
    return lanes, 1, heads * entries


def _numbers(problem: Problem, term: Term, tile: Spec, shape: tuple[int, ...]) -> int:
    """Of a term in `partial`."""
    if term.sum == "ARRIVAL":
        return math.prod(shape)
    if not problem.batch * problem.seqlen_q * problem.seqlen_k:
        return 0
    m, n = tile.block_m, tile.block_n
    each = {"QUERIES": m, "KEYS": n, "DIAGONALS": m + n - 1, "PAIRS": m * n}.get(term.sum, 1)
    lanes, _, cells = _lanes(problem, term, tile)
    return lanes * cells * each


def partial_of(problem: Problem, tile: Spec) -> ArraySpec:
    """The memory between the kernels; it begins with zeros."""
    score, shapes = problem.options.score, problem.options.score_shapes
    assert score is not None
    numbers = sum(_numbers(problem, term, tile, shapes[term.use.argument]) for term in terms_of(score))
    return "partial", (1, 1, max(1, numbers)), problem.accumulator


def _gathering(problem: Problem, tile: Spec) -> tuple[KernelPlan, ...]:
    """bwd_score_args for each float argument."""
    score = problem.options.score
    assert score is not None
    terms, kernels = terms_of(score), []
    for n in float_args(problem.options):
        own = [term for term in terms if term.use.argument == n]
        alone = all(term.sum in ("PAIRS", "ARRIVAL") for term in own)
        text = terms_text(terms, ARGUMENT=n, SUMS_OF_BLOCKS=int(not alone))
        elements = math.prod(problem.options.score_shapes[n])
        spec = Spec(
            kernel="bwd_score_args", element=problem.dtype, output=problem.out_dtype,
            accumulator=problem.accumulator, gradient=score.arguments[n].dtype, head_dim=16, head_dim_v=16,
            dim_chunk=16, block_m=tile.block_m, block_n=tile.block_n, num_stages=2, num_warps=_WARPS, causal=False,
            **(FEATURES_OFF | {"score_text": text}),
        )  # fmt: skip
        kernels.append(
            KernelPlan(
                spec=spec,
                grid=grid_of(elements, 32 * _WARPS if alone else 1, 1),
                threads=32 * _WARPS,
                smem=32 * _WARPS * problem.accumulator.itemsize,
                writes=(argument_name(GRADIENT_ARGS, n),),
                section=problem.batch,
                entries=(*(len(problem.batch_shape) * (1,)), problem.num_heads),
                reads=("partial",),
            )
        )
    return tuple(kernels)

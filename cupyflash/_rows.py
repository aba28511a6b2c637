"""The rows of all families' tile tables as one: what may be timed, kept and read again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from ._tiles_simt import TABLE, TileRow, check_row, padded_width, simt_candidates
from ._tiles_sm80 import (
    AMPERE_TABLE,
    AmpereBackwardRow,
    AmpereRow,
    ampere_backward_candidates,
    ampere_candidates,
    check_ampere,
    check_ampere_backward,
    part_bytes,
)
from ._tiles_sm90 import (
    HOPPER_TABLE,
    HopperBackwardRow,
    HopperRow,
    check_hopper,
    check_hopper_backward,
    hopper_backward_candidates,
    hopper_candidates,
)
from ._tiles_wide import (
    PartsRow,
    WideBackwardRow,
    WideRow,
    check_parts,
    check_wide,
    check_wide_backward,
    parts_candidates,
    wide_backward_candidates,
    wide_candidates,
)

if TYPE_CHECKING:
    from ._problem import Problem

Row = TileRow | AmpereRow | AmpereBackwardRow | WideRow | WideBackwardRow | PartsRow | HopperRow | HopperBackwardRow
# Fields that say when a row is chosen, not what it does.
_CHOICE = frozenset({"remark", "card", "causal", "longest", "split"})
_KINDS: dict[str, type[Row]] = {
    "fwd_sm80": AmpereRow,
    "bwd_sm80": AmpereBackwardRow,
    "fwd_wide": WideRow,
    "bwd_wide": WideBackwardRow,
    "fwd_parts_sm90": PartsRow,
    "fwd_sm90": HopperRow,
    "bwd_sm90": HopperBackwardRow,
}


def tiled_kernels() -> frozenset[str]:
    """The kernels that have tiles to choose from."""
    return frozenset({*_KINDS}) | {kernel for kernel, _ in TABLE}


def row_fields(row: Row) -> dict[str, int | bool]:
    """What a row does to its kernel, by name: what the tuner keeps."""
    return {f.name: getattr(row, f.name) for f in fields(row) if f.name not in _CHOICE}


def make_row(kernel: str, values: object) -> Row:
    """The row with these fields; ValueError unless they are all of them, each an integer or a truth value."""
    kind: type[Row] = _KINDS.get(kernel, TileRow)
    kinds = {f.name: {"int": int, "bool": bool}[str(f.type)] for f in fields(kind) if f.name not in _CHOICE}
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        raise ValueError(f"a tile of {kernel} has the fields {', '.join(kinds)}, not {values!r}")
    for name, wanted in kinds.items():
        least = 0 if name == "q_held" else 1
        if type(values[name]) is not wanted or (wanted is int and values[name] < least):
            may_be = "true or false" if wanted is bool else f"at least {least}"
            raise ValueError(f"{name}={values[name]!r}: it is {may_be}")
    return kind(**values, remark="")


def why_not(kernel: str, row: Row, problem: Problem, smem: int) -> str | None:
    """Why a row can't run a problem where a thread block may have ``smem`` bytes, or None. The card may be any."""
    head_dim, head_dim_v, accumulator = problem.head_dim, problem.head_dim_v, problem.accumulator.itemsize
    if isinstance(row, HopperRow):
        return check_hopper(row, head_dim, head_dim_v, smem)
    if isinstance(row, AmpereRow):
        return check_ampere(row, head_dim, head_dim_v, smem)
    if isinstance(row, AmpereBackwardRow):
        return check_ampere_backward(row, head_dim, head_dim_v, smem, part_bytes(problem, row))
    if isinstance(row, WideRow):
        return check_wide(row, problem, smem)
    if isinstance(row, WideBackwardRow):
        return check_wide_backward(row, problem, smem)
    if isinstance(row, PartsRow):
        return check_parts(row, problem, smem)
    if isinstance(row, HopperBackwardRow):
        return check_hopper_backward(row, head_dim, head_dim_v, smem)
    padded, padded_v = (padded_width(d, row.dim_chunk) for d in (head_dim, head_dim_v))
    return check_row(kernel, replace(row, card=0), padded, padded_v, accumulator, smem)


def candidates(kernel: str, problem: Problem, smem: int) -> tuple[Row, ...]:
    """The rows that are worth timing for a problem; none for a kernel that has nothing to choose."""
    rows: Iterable[Row]
    if kernel in HOPPER_TABLE:
        rows = hopper_candidates(kernel, problem, smem)
    elif kernel in AMPERE_TABLE:
        rows = ampere_candidates(kernel, problem, smem)
    elif kernel == "bwd_sm80":
        rows = ampere_backward_candidates(problem)
    elif kernel == "fwd_wide":
        rows = wide_candidates(problem)
    elif kernel == "bwd_wide":
        rows = wide_backward_candidates(problem)
    elif kernel == "fwd_parts_sm90":
        rows = parts_candidates(problem)
    elif kernel == "bwd_sm90":
        rows = hopper_backward_candidates(problem)
    else:
        rows = simt_candidates(kernel, problem)
    return tuple(dict.fromkeys(row for row in rows if why_not(kernel, row, problem, smem) is None))

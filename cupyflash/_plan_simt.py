"""Plans of the simt family: every GPU, every dtype."""

from __future__ import annotations

from dataclasses import replace

from . import _tiles_simt as _tiles
from ._arrays import ArraySpec
from ._block_map import KEY_MAP, QUERY_MAP, map_arrays, map_bytes, mapped
from ._compile import Spec
from ._plan import (
    Device,
    KernelPlan,
    Plan,
    Tile,
    bias_kernel,
    by_entry,
    by_tile,
    finishing,
    grid,
    keyed,
    partials,
    plan_of,
    row_kernel,
    sinks_kernel,
    spec_of,
    workspace,
)
from ._problem import Problem
from ._terms import partial_of, score_kernels


def plan_simt(
    problem: Problem, device: Device, tile: Tile, wrt: frozenset[str] | None, copies: tuple[str, ...]
) -> Plan:
    temporaries: tuple[ArraySpec, ...] = ()
    zeroed: tuple[ArraySpec, ...] = ()
    if wrt is None:
        main = _main_kernel("fwd_simt", problem, device, tile, ("out", "lse"))
        kernels = [*mapped(problem, main, (KEY_MAP,))]
        bytes_ = 0
    else:
        kernels = [row_kernel("bwd_delta", problem, ("delta",))]
        if keyed(wrt):
            kernels += mapped(problem, _main_kernel("bwd_simt_dkdv", problem, device, tile, keyed(wrt)), (QUERY_MAP,))
        if "q" in wrt:
            kernels += mapped(problem, _main_kernel("bwd_simt_dq", problem, device, tile, ("dq",)), (KEY_MAP,))
        if "bias" in wrt:
            kernels += mapped(problem, bias_kernel_simt(problem, device, tile), (KEY_MAP,))
        if "sinks" in wrt:
            kernels.append(sinks_kernel(problem))
        if "score_args" in wrt:
            tile_of_score = score_tile_simt(problem, device)
            kernels += score_kernels(problem, *tile_of_score)
            zeroed = (partial_of(problem, tile_of_score[0]),)
        kernels += finishing(problem, wrt)
        rows = kernels[0].spec.block_m
        packed = problem.options.packed is not None
        delta = by_tile(problem, rows, rows) if packed else (problem.num_heads, problem.seqlen_q)
        temporaries = (("delta", delta, problem.accumulator),)
        bytes_ = workspace(problem, temporaries, partials(problem, wrt))
    maps = map_arrays(problem, kernels)
    main = next(step for step in kernels if step.name not in ("bwd_delta", "block_map"))
    return plan_of(
        "simt", device.name, problem, wrt is not None, (main.spec.block_m, main.spec.block_n),
        kernels=tuple(kernels), workspace=bytes_ + map_bytes(maps + zeroed), copies=copies,
        temporaries=temporaries, maps=maps, zeroed=zeroed,
    )  # fmt: skip


def bias_kernel_simt(problem: Problem, device: Device, tile: Tile) -> KernelPlan:
    """bwd_bias_simt, with a tile of bwd_simt_dq, whose shared memory it has too."""
    row, head_dim, head_dim_v = _choose_row("bwd_bias_simt", problem, device, tile)
    spec = spec_of("bwd_bias_simt", problem, row, (head_dim, head_dim_v), row.dim_chunk)
    smem = _tiles.smem_bytes("bwd_bias_simt", row, head_dim, head_dim_v, problem.accumulator.itemsize)
    return bias_kernel("bwd_bias_simt", problem, spec, smem)


def score_tile_simt(problem: Problem, device: Device) -> tuple[Spec, int]:
    """The Spec of bwd_score_simt, but for its term, and its shared memory. Its tile is its own: it fits every card."""
    row, head_dim, head_dim_v = _choose_row("bwd_score_simt", problem, device, Tile())
    spec = spec_of("bwd_score_simt", problem, row, (head_dim, head_dim_v), row.dim_chunk)
    return spec, _tiles.smem_bytes("bwd_score_simt", row, head_dim, head_dim_v, problem.accumulator.itemsize)


def _main_kernel(kernel: str, problem: Problem, device: Device, tile: Tile, writes: tuple[str, ...]) -> KernelPlan:
    """A kernel with a row of the tile table, or with the tile that the caller wants."""
    accumulator = problem.accumulator.itemsize
    row, head_dim, head_dim_v = _choose_row(kernel, problem, device, tile)
    owns_keys = kernel in _tiles.KEYED
    rows, block = (problem.seqlen_k, row.block_n) if owns_keys else (problem.seqlen_q, row.block_m)
    heads = problem.num_heads_k if owns_keys else problem.num_heads
    shared = by_entry(problem, frozenset(name[1:] for name in writes), writes[0][1:])
    return KernelPlan(
        spec=spec_of(
            kernel, problem, row, (head_dim, head_dim_v), row.dim_chunk,
            gradient=problem.accumulator if shared else problem.dtype,
        ),
        grid=grid(rows, block, heads * problem.batch),
        threads=32 * row.warps,
        smem=_tiles.smem_bytes(kernel, row, head_dim, head_dim_v, accumulator, problem.options.weights_apart),
        writes=writes,
    )  # fmt: skip


def _choose_row(
    kernel: str, problem: Problem, device: Device, tile: Tile
) -> tuple[_tiles.TileRow, int, int]:
    """The first row of the table that fits, with the caller's tile in its place; and the padded widths."""
    accumulator = problem.accumulator.itemsize
    width = max(problem.head_dim, problem.head_dim_v)
    wanted = tile.given()
    refused = ""
    if (own := tile.row(kernel)) is not None:
        return own, *(_tiles.padded_width(d, own.dim_chunk) for d in (problem.head_dim, problem.head_dim_v))
    for largest, table_row in _tiles.TABLE[kernel, accumulator]:
        if width > largest:
            continue
        row = replace(table_row, **wanted)
        head_dim, head_dim_v = (_tiles.padded_width(d, row.dim_chunk) for d in (problem.head_dim, problem.head_dim_v))
        why = _tiles.check_row(
            kernel, row, head_dim, head_dim_v, accumulator, device.smem, problem.options.weights_apart
        )
        if why is None:
            return row, head_dim, head_dim_v
        refused = why
    raise ValueError(
        f"{tile} does not fit {kernel} on {device.name} (head widths {problem.head_dim}, {problem.head_dim_v}, "
        f"{problem.dtype}): {refused}"
    )

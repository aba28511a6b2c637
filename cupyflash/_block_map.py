"""The maps of what a mask and segments leave of blocks of pairs: by kernels/block_map.cu, before their readers run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ._arrays import ArraySpec
from ._compile import FLOAT32, Spec
from ._plan import KernelPlan, grid
from ._problem import Problem

MAPS = KEY_MAP, QUERY_MAP = "key_map", "query_map"
_WARPS = 8  # a thread block's, one for each bit of a byte
_BYTE = np.dtype(np.uint8)  # written by bytes, read by words of four


def map_entries(problem: Problem) -> tuple[int, ...]:
    """How many maps there are along the leading axes and along the heads: 1 where they share mask and segments."""
    lead, options = len(problem.batch_shape), problem.options
    full = (*problem.batch_shape, problem.num_heads)
    shape = (1,) * (lead + 1)
    if (function := options.mask_function) is not None:
        by_entry, by_head = (function.expression.find("variable", name) is not None for name in "bh")
        shape = (*(full[:lead] if by_entry else shape[:lead]), full[lead] if by_head else 1)
    if options.mask is not None:
        own = (1,) * (lead + 3 - len(options.mask.shape)) + options.mask.shape
        shape = own[: lead + 1]
    if options.segments:
        shape = (*full[:lead], shape[lead])
    return shape


def mapped(problem: Problem, kernel: KernelPlan, maps: tuple[str, ...]) -> tuple[KernelPlan, ...]:
    """A kernel, behind the one that makes the maps that it reads, where the problem hides single pairs."""
    if not problem.options.hides_pairs:
        return (kernel,)
    return _map_kernel(problem, kernel.spec, maps), kernel


def map_arrays(problem: Problem, kernels: Iterable[KernelPlan]) -> tuple[ArraySpec, ...]:
    """The maps that some kernels write, each as large as its largest writer needs."""
    tails: dict[str, tuple[int, int]] = {}
    for step in kernels:
        if step.name != "block_map":
            continue
        m_blocks, n_blocks = _blocks(problem, step.spec)
        for name in step.writes:
            rows, others = (m_blocks, n_blocks) if name == KEY_MAP else (n_blocks, m_blocks)
            most = tails.get(name, (0, 0))
            tails[name] = max(most[0], rows), max(most[1], 2 * _bytes(others))
    return tuple((name, (*map_entries(problem), *tail), _BYTE) for name, tail in tails.items())


def map_bytes(maps: tuple[ArraySpec, ...]) -> int:
    """What the maps take of the workspace."""
    return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in maps)


def _map_kernel(problem: Problem, reader: Spec, maps: tuple[str, ...]) -> KernelPlan:
    m_blocks, n_blocks = _blocks(problem, reader)
    bytes_ = {KEY_MAP: m_blocks * _bytes(n_blocks), QUERY_MAP: n_blocks * _bytes(m_blocks)}
    accumulator = reader.accumulator if reader.mask_function else FLOAT32  # of floats in the function
    spec = Spec(
        kernel="block_map", element=FLOAT32, output=FLOAT32, accumulator=accumulator, gradient=FLOAT32, head_dim=16,
        head_dim_v=16, dim_chunk=16, block_m=reader.block_m, block_n=reader.block_n, num_stages=2, num_warps=_WARPS,
        causal=False, has_mask=reader.has_mask, segments=reader.segments, mask_function=reader.mask_function,
        mask_text=reader.mask_text,
    )  # fmt: skip
    return KernelPlan(
        spec=spec,
        grid=grid(sum(bytes_[name] for name in maps), 1, math.prod(map_entries(problem))),
        threads=32 * _WARPS,
        smem=2 * 4 * _WARPS,
        writes=maps,
        entries=map_entries(problem),
        reads=("mask", "q_segments", "kv_segments"),  # mask_args too
    )


def _blocks(problem: Problem, spec: Spec) -> tuple[int, int]:
    """Blocks of queries, and of keys."""
    return -(-problem.seqlen_q // spec.block_m), -(-problem.seqlen_k // spec.block_n)


def _bytes(blocks: int) -> int:
    """Of whole words of 32 bits that have a bit for each block."""
    return 4 * -(-blocks // 32)

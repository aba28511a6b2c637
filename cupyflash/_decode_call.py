"""One decoding call: a few queries of each entry against its cache, checked before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ._arrays import Array, import_cupy, is_cupy, misaligned, on_device, take
from ._call import Call
from ._decoding import (
    Extras,
    as_entries,
    check_new_rows,
    check_pages,
    check_written,
    known,
    read_decoding,
    read_lens,
    take_rotary,
)
from ._functions import Functions, args_of
from ._options import Asked, Shape, read_options
from ._plan import Plan
from ._plan_decode import plan_decode
from ._planner import check_family, check_gpu_limits, check_tile
from ._problem import read_problem


class DecodeCall(Call):
    """q, the cache and what lies beside them, with the Problem and the Decoding they make.

    ``inputs`` has the caches as "k" and "v", as they came; "kv_lens" counts new rows on the host, not on a device.
    """

    def __init__(
        self, q: Any, k_cache: Any, v_cache: Any, asked: Asked, extras: Extras, out: Array | None = None,
        device: object = None, functions: Functions | None = None,
    ) -> None:  # fmt: skip
        self._extras = extras
        beside: dict[str, Array] = {}
        for name in ("page_table", "k_new", "v_new"):
            if (x := getattr(extras, name)) is not None:
                beside[name] = take(name, x)
        if extras.rotary is not None:
            beside |= take_rotary(extras.rotary)
        super().__init__(
            q, take("k_cache", k_cache), take("v_cache", v_cache), asked,
            beside=beside, out=out, device=device, functions=functions,
        )  # fmt: skip

    def named(self) -> dict[str, Array]:
        """The inputs by the names of arguments."""
        names = {"k": "k_cache", "v": "v_cache", "cos": "rotary.cos", "sin": "rotary.sin"}
        return {names.get(name, name): x for name, x in self.inputs.items()}

    def _read_problem(
        self, asked: Asked, arrays: dict[str, Array], functions: Functions | None, out_dtype: np.dtype | None
    ) -> None:
        extras, inputs = self._extras, self.inputs
        q = inputs["q"]
        self.decoding = read_decoding(extras, inputs)
        paged = self.decoding.page_size > 0
        k, v = (as_entries(inputs[name], self.decoding, len(q)) for name in ("k", "v"))
        problem = read_problem(
            q, k, v, scale=asked.scale, causal=True, q_offset=None, layout="hsd", precision=asked.precision,
            out_dtype=out_dtype,
        )  # fmt: skip
        traced: dict[str, Any] = {}
        if functions is not None:
            shapes = tuple(x.shape for x in args_of("score_args", functions.arrays))
            traced = {"score": functions.score, "score_shapes": shapes}
        lens = read_lens(extras, self.place, len(q), problem.seqlen_q, problem.seqlen_k, paged)
        shape = Shape(problem.batch_shape, problem.num_heads, problem.seqlen_q, problem.seqlen_k)
        options = read_options(asked, arrays, shape, **traced)
        self.problem = replace(problem, options=replace(options, kv_lens=True), bottom_right=True)
        self._check_cache(lens)
        if functions is not None:
            self._take_functions(functions, self.problem)
        self.inputs["kv_lens"] = self._lens_as_read(lens)

    def _check_cache(self, lens: Array | None) -> None:
        """What is known of lengths, pages and new rows; lens are None where the host does not know them."""
        decoding, inputs, rows = self.decoding, self.inputs, self.problem.seqlen_q
        if decoding.appends:
            for name in ("k", "v"):
                check_written(f"{name}_cache", inputs[name], self.named())
        if lens is None:
            return
        total = lens + rows if decoding.appends else lens
        if decoding.rotary_dim and rows and int(total.max(initial=0)) > decoding.positions:
            raise ValueError(
                f"rotary.cos has {decoding.positions} rows, and the last query sits on key "
                f"{int(total.max()) - 1}: there is a row for each position"
            )
        if not decoding.page_size:
            return
        table = known(inputs["page_table"])
        if table is not None:
            check_pages(table, total, decoding)
            if decoding.appends:
                check_new_rows(table, lens, rows, decoding)

    def _lens_as_read(self, lens: Array | None) -> Array:
        """int64 on the host, with new rows. On a device int32, without: the low words of what came."""
        given = self._extras.kv_lens
        if self.place is None:
            assert lens is not None
            return lens + self.problem.seqlen_q if self.decoding.appends else lens
        with on_device(self.place):
            cupy = import_cupy()
            batch = self.problem.batch
            if is_cupy(given):
                x = cupy.ndarray(given.shape, np.int32, given.data, given.strides)
                return cupy.broadcast_to(x, (batch,))
            return cupy.asarray(np.broadcast_to(lens if lens is not None else given, (batch,)), np.int32)

    def beside(self) -> dict[str, Array]:
        """What options bring, and where the pages are."""
        found = super().beside()
        if "page_table" in self.inputs:
            found["page_table"] = self.inputs["page_table"]
        return found

    def plan(self, family: object, tile: object, wrt: frozenset[str] | None = None, deterministic: bool = True) -> Plan:
        if self.device is None:
            return super().plan(family, tile)
        check_family(family, on_gpu=True)
        check_gpu_limits(self.problem)
        for name in ("k", "v"):
            if (why := misaligned(self.inputs[name])) and self.place is not None:
                raise ValueError(f"{name}_cache: {why}, and a cache is not copied")
        copies = tuple(f"{name}: {why}" for name, x in self.named().items() if (why := misaligned(x)))
        return plan_decode(self.problem, self.decoding, self.device, family, check_tile(tile), copies)

    def forward(self, plan: Any, out: Array, lse: Array | None) -> Any:
        """Append, turn, attend."""
        if self.place is None:
            from . import _cpu_decode

            q = _cpu_decode.append_and_turn(self.decoding, self.inputs)
            inputs, self.inputs = self.inputs, {**self.inputs, "q": q}
            super().forward(plan, out, lse)
            self.inputs = inputs
            return None
        from . import _launch_decode

        names = ("q", "k_new", "v_new", "cos", "sin")
        tensors = {name: self.inputs[name] for name in names if name in self.inputs} | self.beside()
        for name in ("k", "v"):
            cache = self.inputs[name]
            tensors[name] = cache.swapaxes(1, 2) if self.decoding.page_size else cache
        tensors |= {"out": out} | ({} if lse is None else {"lse": lse})
        return _launch_decode.decode(self.problem, self.decoding, plan, self.place, tensors)

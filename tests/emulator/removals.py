"""Take one barrier, wait or fence out of a kernel: every place where that can be done, and how to run what is left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyflash._plan import Rows
from cupyflash._tiles_sm80 import AmpereBackwardRow, AmpereRow
from cupyflash._tiles_sm90 import HopperBackwardRow, HopperRow
from cupyflash._tiles_wide import PartsRow, WideBackwardRow, WideRow
from cupyflash.testing.functions import SCORES

from .build import WORDS
from .device import Device, Patch
from .errors import EmulatorError
from .golden import HERE, KERNELS
from .samples import SAMPLES
from .schedule import Schedule

# Calls that only order things. (setmaxnreg and prefetches do not.) Those with a value, such as refill(), stay where
# they are called: what they consist of is taken out of them.
_CALL = re.compile(
    r"\b(?:__sync\w+|sync_block|sync_warp|wait_copies|barrier_sync|barrier_arrive|cp_async_wait<[\w ?:-]+>|"
    r"cp_async_commit|mbarrier_wait|mbarrier_arrive\w*|fence_\w+|wgmma_fence|wgmma_commit|wgmma_wait<\w+>|wgmma_hold|"
    r"bulk_commit|bulk_wait\w*<\w+>|store_release|add_release|__threadfence\w*|"
    r"(?<!void )(?:take_turn|pass_turn|meet)|(?<!= )smem\.[\w.\[\]]+\.(?:await|await_free|hand_over|release|send))\s*\("
)
_LOOP = re.compile(r"while \(load_acquire\([^{]*\{")
_FUNCTION = re.compile(r"\b(?:__forceinline__|__global__) .*?(\w+)\(")
_MARK = re.compile(r'^#line (\d+) "kernels/([\w.]+)"$')


@dataclass(frozen=True)
class Removal:
    """One call, by its place in the source."""

    file: str
    line: int  # from 1
    column: int
    call: str  # as written, without its arguments
    function: str = ""  # that it stands in: the last one defined above

    @property
    def id(self) -> str:
        return f"{self.file}:{self.line}:{self.call}"

    def __call__(self, text: str) -> str:
        """The assembled text of a kernel without this call; unchanged if the file is not in it."""
        lines = text.splitlines()
        here: tuple[str, int] = ("", 0)
        for i, line in enumerate(lines):
            mark = _MARK.match(line)
            if mark:
                here = (mark[2], int(mark[1]) - 1)
                continue
            here = (here[0], here[1] + 1)
            if here == (self.file, self.line):
                lines[i] = line[: self.column] + _without_call(line[self.column :])
        return "\n".join(lines) + "\n"


def _without_call(rest: str) -> str:
    """`call(arguments) ...` or `while (...) ...` with nothing in its place."""
    begin = rest.index("(")
    depth = 0
    for i in range(begin, len(rest)):
        depth += {"(": 1, ")": -1}.get(rest[i], 0)
        if depth == 0:
            return ("if (false)" if rest.startswith("while") else "(void)0") + rest[i + 1 :]
    raise ValueError(f"a call that does not end on its line: {rest}")


def removals() -> list[Removal]:
    """Every such call in the library's kernels and words, and in the samples."""
    files = [*sorted(KERNELS.glob("*.cu")), *sorted(KERNELS.glob("*.cuh")), *sorted((HERE / "samples").glob("*.cu"))]
    return [r for file in files if not (WORDS / file.name).exists() for r in _calls_in(file)]


def _calls_in(file: Path) -> Iterator[Removal]:
    function = ""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        code = line.split("//")[0]
        defined = _FUNCTION.search(code)
        function = defined[1] if defined else function
        for pattern in (_CALL, _LOOP):
            for match in pattern.finditer(code):
                yield Removal(file.name, number, match.start(), match[0].split("(")[0].strip(), function)


def assembled_text(kernel: str) -> str:
    """A library kernel's text with its words, as NVRTC gets it but for the prelude."""
    from cupyflash._compile import kernel_text

    return kernel_text(kernel)


# --------------------------------------------------------------------------------------------------- how to run them

_HOW = ("tile", "wrt", "deterministic", "family", "precision")
Run = Callable[[tuple[Patch, ...], Schedule], None]  # raises if something is wrong


@dataclass(frozen=True)
class Problem:
    """Lengths with several blocks on both sides, so that every loop takes more than one turn."""

    dtype: str
    head_dim: int
    seqlen_q: int
    seqlen_k: int
    options: tuple[tuple[str, Any], ...] = ()
    heads: int = 1
    heads_k: int = 1
    batch: tuple[int, int] = (1, 1)  # of q, and of k and v
    unaligned: bool = False
    head_dim_v: int | None = None  # None: head_dim

    def arrays(self) -> list[np.ndarray]:
        r = np.random.default_rng(0)
        (b, c), h, g, d, m, n = self.batch, self.heads, self.heads_k, self.head_dim, self.seqlen_q, self.seqlen_k
        dv = self.head_dim_v or d
        shapes = ((b, h, m, d), (c, g, n, d), (c, g, n, dv), (max(b, c), h, m, dv))
        return [r.standard_normal(shape).astype(self.dtype) for shape in shapes]

    def forward(self, patches: tuple[Patch, ...], schedule: Schedule) -> None:
        from cupyflash import attention
        from cupyflash.testing import reference

        q, k, v, _ = self.arrays()
        with Device(schedule, patches, undefined=False) as xp:
            out, lse = attention(*(self._on(xp, x) for x in (q, k, v)), return_lse=True, **self._asked(xp))
        right = reference.forward(q, k, v, **self._meaning())
        _compare(out.get(), right.out)
        _compare(lse.get(), right.lse)

    def backward(self, patches: tuple[Patch, ...], schedule: Schedule) -> None:
        from cupyflash import attention_backward
        from cupyflash.testing import reference

        q, k, v, dout = self.arrays()
        out, lse = reference.forward(q, k, v, **self._meaning())
        out = np.ascontiguousarray(out, self.dtype)
        lse = np.ascontiguousarray(lse, np.float64 if self.dtype == "float64" else np.float32)
        with Device(schedule, patches, undefined=False) as xp:
            device = [self._on(xp, x) for x in (dout, q, k, v, out, lse)]
            got = attention_backward(*device, **self._asked(xp))
        *right, right_args = reference.backward(dout, q, k, v, out, lse, **self._meaning())
        for x, y in zip((*got[:5], *(got[5] or ())), (*right, *(right_args or ())), strict=True):
            if x is not None:
                _compare(x.get(), y)

    def _meaning(self) -> dict[str, Any]:
        """The options that change what is right, not how it is computed."""
        return {name: x for name, x in self.options if name not in _HOW}

    def _asked(self, xp: Any) -> dict[str, Any]:
        """The options, their arrays on the device."""
        options = dict(self.options)
        args = tuple(xp.asarray(x) for x in options.pop("score_args", ()))
        return {name: xp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()} | (
            {"score_args": args} if args else {}
        )

    def _on(self, xp: Any, x: np.ndarray) -> Any:
        if not self.unaligned:
            return xp.asarray(x)
        held = xp.asarray(np.concatenate([np.zeros(1, x.dtype), x.ravel()]))
        return held[1:].reshape(x.shape)


@dataclass(frozen=True)
class PackedProblem:
    """Packed sequences on sm90, NaN in the rows behind the last one; more than the 32 that a warp looks at at once."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    heads: int = 2
    head_dim: int = 16
    spare: int = 3

    def forward(self, patches: tuple[Patch, ...], schedule: Schedule) -> None:
        self._run(patches, schedule, backward=False)

    def backward(self, patches: tuple[Patch, ...], schedule: Schedule) -> None:
        self._run(patches, schedule, backward=True)

    def _run(self, patches: tuple[Patch, ...], schedule: Schedule, backward: bool) -> None:
        """Patches are for one direction: a backward gets the out and lse that are right."""
        from cupyflash import attention_varlen, attention_varlen_backward

        q, k, v, dout, *cu = self.arrays()
        options = dict(self.options)
        exact = {name: x for name, x in options.items() if name not in ("tile", "deterministic")}
        out, lse = attention_varlen(q, k, v, *cu, return_lse=True, **exact)
        with Device(schedule, patches, arch=90, undefined=False) as xp:
            device = list(map(xp.asarray, (q, k, v, *cu)))
            if backward:
                results = [xp.asarray(x) for x in (out, lse)]
                got = attention_varlen_backward(xp.asarray(dout), *device[:3], *results, *device[3:], **options)
            else:
                options.pop("deterministic", None)
                got = attention_varlen(*device, return_lse=True, **options)
            found = [x.get() for x in got if x is not None]
        want = attention_varlen_backward(dout, q, k, v, out, lse, *cu, **exact) if backward else (out, lse)
        for x, y in zip(found, (y for y in want if y is not None), strict=True):
            _compare(x, y.astype(np.float64))

    def arrays(self) -> list[np.ndarray]:
        r = np.random.default_rng(0)
        lengths = (self.lengths_q, self.lengths_k, self.lengths_k, self.lengths_q)
        packed = []
        for own in lengths:
            x = np.full((sum(own) + self.spare, self.heads, self.head_dim), np.nan, np.float16)
            x[: sum(own)] = r.standard_normal((sum(own), self.heads, self.head_dim))
            packed.append(x)
        return [*packed, *(np.concatenate([[0], np.cumsum(own)]).astype(np.int32) for own in lengths[:2])]


@dataclass(frozen=True)
class DecodeProblem:
    """A cache with more blocks of keys than a warp's ring holds, several splits; new rows that are turned."""

    family: str
    dtype: str
    head_dim: int = 24
    rows: int = 2
    lens: tuple[int, ...] = (798, 0, 70)
    page_size: int = 16  # 0: in line
    gap: int = 0  # columns of the cache that are not the heads'
    num_splits: int = 2
    wild: bool = False  # lengths and a page number are outside, and count as the nearest inside
    options: tuple[tuple[str, Any], ...] = ()

    def forward(self, patches: tuple[Patch, ...], schedule: Schedule) -> None:
        from cupyflash import Rotary, decode
        from cupyflash.testing import decoding, reference

        r = np.random.default_rng(0)
        batch, longest = len(self.lens), max(self.lens) + self.rows
        lens, shape, table, named = np.array(self.lens), (batch, 2, longest), None, {}
        given_lens = np.where(lens == 0, -5, lens + 10**6 * (lens == max(lens))) if self.wild else lens
        if self.page_size:
            columns = -(-longest // self.page_size)
            pages = batch * columns
            shape = (pages, self.page_size, 2)
            table = r.permutation(pages).reshape(batch, columns).astype(np.int32)
            table = (table - table[0, 0] - 1) % pages  # the first page is the last one of the cache
            named["page_table"] = np.where(table == pages - 1, pages + 7, table) if self.wild else table
        caches = [r.standard_normal((*shape, self.head_dim + self.gap)).astype(self.dtype) for _ in range(2)]
        q = r.standard_normal((batch, 6, self.rows, self.head_dim)).astype(self.dtype)
        new = [r.standard_normal((batch, 2, self.rows, self.head_dim)).astype(self.dtype) for _ in range(2)]
        angles = r.uniform(0, 6, (longest, 4)).astype(np.float32)
        turns = np.cos(angles), np.sin(angles)
        options = {name: np.array(x) if isinstance(x, tuple) else x for name, x in self.options}
        with Device(schedule, patches, arch=80, undefined=False) as xp:
            held = [xp.asarray(x) for x in caches]
            for x in held:
                x[...] = x  # all of it is known, though a launch may write it
            got = decode(
                xp.asarray(q), *(x[..., : self.head_dim] for x in held), xp.asarray(given_lens),
                k_new=xp.asarray(new[0]), v_new=xp.asarray(new[1]), rotary=Rotary(*map(xp.asarray, turns)),
                family=self.family, num_splits=self.num_splits, return_lse=True,
                **{name: xp.asarray(x) for name, x in (options | named).items()},
            )  # fmt: skip
            found = [x.get() for x in got]
        ours = [x[..., : self.head_dim] for x in caches]
        this = decoding.seen(q, *ours, lens, page_table=table, k_new=new[0], v_new=new[1], rotary=(*turns, False))
        right = reference.forward(this.q, this.k, this.v, causal=True, kv_lens=this.kv_lens, **options)
        for x, y in zip(found, right, strict=True):
            _compare(x, y)


def _compare(got: np.ndarray, right: np.ndarray) -> None:
    # Coarse: these problems find lost synchronisation and wrong indices, others find lost digits. In 16 bits P and dS
    # are rounded: errors of theirs are 1e-3.
    tolerance = 1e-2 if got.dtype.itemsize == 2 else 1e-3
    np.testing.assert_allclose(got.astype(np.float64), right, rtol=tolerance, atol=tolerance)


# One chunk and several, so that every branch on them is taken.
PROBLEMS = (Problem("float32", 16, 140, 140), Problem("float32", 160, 40, 70))


# Whole, hidden and mixed blocks.
MASKED = Problem("float32", 16, 140, 140, (("mask", np.arange(140) // 70 * 70 + np.arange(140)[:, None] // 9 < 100),))


def bias_problem(dtype: str, shape: tuple[int, ...], *options: tuple[str, Any]) -> Problem:
    """A bias that three entries share, or all rows of them."""
    bias = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return Problem(dtype, 16, 70, 90, (("bias", bias), *options), heads=2, heads_k=2, batch=(3, 3))


SINKS = Problem("float32", 16, 600, 40, (("sinks", np.ones(2, np.float32)),), heads=2, heads_k=2)
BIAS_SIMT = tuple(bias_problem("float32", shape) for shape in ((1, 2, 70, 90), (3, 1, 1, 90)))
BIAS_SM80 = tuple(bias_problem("float16", shape, ("family", "sm80")) for shape in ((1, 1, 70, 90), (1, 2, 1, 90)))


def score_problem(dtype: str, *more: tuple[str, Any], score: str = "relative") -> Problem:
    """The gradient of a table of distances, or, of "distance", of slopes."""
    args = np.random.default_rng(2).standard_normal((2, 9)).astype(np.float32)
    args = args if score == "relative" else args[:, 0]
    options = (("score", SCORES[score].function), ("score_args", (args,)), ("wrt", ("score_args",)))
    return Problem(dtype, 40, 70, 90, (*options, *more), heads=2, heads_k=2)


SCORE_SIMT = (score_problem("float32"),)
SCORE_SM80 = (score_problem("float16", ("family", "sm80")),)


def ampere_forward(row: AmpereRow, **more: Any) -> Problem:
    """A form of fwd_sm80, with more blocks of keys than it has buffers."""
    options = (("family", "sm80"), ("tile", Rows(rows=(("fwd_sm80", row),))), ("causal", True))
    return Problem("float16", 24, 140, 150, options, **{"heads": 2, "heads_k": 2, **more})


AMPERE_FORWARD = (
    ampere_forward(AmpereRow(64, 16, 4, 3, 1, 0, False, "")),
    ampere_forward(AmpereRow(64, 16, 2, 4, 1, 1, True, "")),
    ampere_forward(AmpereRow(64, 16, 4, 2, 1, 2, False, "")),
)


def ampere_backward(
    *options: tuple[str, Any], heads: int = 2, seqlens: tuple[int, int] = (50, 70), head_dim: int = 24,
    row: AmpereBackwardRow | None = None,
) -> Problem:  # fmt: skip
    """bwd_sm80 with the shortest blocks that it takes: several on both sides."""
    row = row or AmpereBackwardRow(block_m=16, block_n=32, warps=4, stages=2, heads=1, remark="")
    options = (("family", "sm80"), ("tile", Rows(rows=(("bwd_sm80", row),))), *options)
    return Problem("float16", head_dim, *seqlens, options, heads=heads)


AMPERE_BACKWARD = (
    ampere_backward(),
    ampere_backward(heads=1, seqlens=(16, 200)),  # jobs of one turn
    ampere_backward(("wrt", ("v",))),
    ampere_backward(("wrt", ("k", "v"))),
    ampere_backward(("deterministic", False)),
    # Enough columns for every warp to have a unit of dq.
    ampere_backward(row=AmpereBackwardRow(32, 128, 8, 2, 1, ""), seqlens=(100, 140), head_dim=64),
    # The largest dS goes from warp to warp, of several parts of a tile; it rises where rows see fewer and fewer keys.
    ampere_backward(
        ("precision", "highest"), ("causal", True), row=AmpereBackwardRow(128, 64, 8, 2, 1, ""), seqlens=(200, 200)
    ),
)


def double_forward(row: WideRow, **more: Any) -> Problem:
    """A form of fwd_wide, with more blocks of keys than it has buffers."""
    options = (("tile", Rows(rows=(("fwd_wide", row),))), ("causal", True))
    return Problem("float64", 24, 70, 100, options, **{"heads": 2, "heads_k": 2, **more})


def double_backward(*options: tuple[str, Any], heads: int = 2, seqlens: tuple[int, int] = (50, 70)) -> Problem:
    """bwd_wide with short blocks: several on both sides."""
    row = WideBackwardRow(block_m=16, block_n=32, warps=4, stages=2, heads=1, remark="")
    return Problem("float64", 24, *seqlens, (("tile", Rows(rows=(("bwd_wide", row),))), *options), heads=heads)


DOUBLE_FORWARD = tuple(double_forward(WideRow(32, 16, 2, stages, "")) for stages in (3, 4, 2))
DOUBLE_BACKWARD = (
    double_backward(),
    double_backward(heads=1, seqlens=(16, 200)),  # jobs of one turn
    double_backward(("wrt", ("v",))),
    double_backward(("wrt", ("k", "v"))),
)


def parts_forward(*seqlens: int, stages: int = 2) -> Problem:
    """fwd_parts_sm90 with the shortest blocks of keys: more of them than it has buffers."""
    row = PartsRow(128, 16, stages, "")
    options = (("tile", Rows(rows=(("fwd_parts_sm90", row),))), ("family", "sm90"), ("precision", "highest"))
    return Problem("float32", 24, *seqlens, (*options, ("causal", True)), head_dim_v=40)


PARTS_FORWARD = (parts_forward(150, 100), parts_forward(60, 70, stages=3))


def hopper_forward(row: HopperRow) -> Problem:
    """A form of fwd_sm90. Two heads, so that thread blocks have several tiles.

    Causal, at blocks of 16 or 32 keys: some are seen by one consumer and not by the other, 2 of 32 to begin with, as
    many as there are stages.
    """
    options = (("tile", Rows(rows=(("fwd_sm90", row),))), ("causal", True))
    return Problem("float16", 16, 200, 70 if row.block_n == 16 else 140, options, heads=2)


def hopper_backward(
    head_dim: int, head_dim_v: int, *options: tuple[str, Any], heads: int = 2, seqlens: tuple[int, int] | None = None
) -> Problem:
    """bwd_sm90 with the shortest blocks of queries that it takes; three blocks on both sides."""
    wide = max(head_dim, head_dim_v) > 128
    block_m, block_n = (64, 64) if wide else (16, 128)
    row = HopperBackwardRow(block_m=block_m, block_n=block_n, stages=2, heads=1, arrival=True, remark="")
    seqlen_q, seqlen_k = seqlens or (2 * block_m + 2, 2 * block_n + 2)
    options = (("tile", Rows(rows=(("bwd_sm90", row),))), *options)
    return Problem("float16", head_dim, seqlen_q, seqlen_k, options, heads=heads, head_dim_v=head_dim_v)


HOPPER_FORWARD = (
    hopper_forward(HopperRow(128, 16, 2, 2, True, True, "")),
    hopper_forward(HopperRow(192, 32, 2, 1, False, False, "")),
    hopper_forward(HopperRow(128, 16, 2, 1, True, False, "")),
)
HOPPER_NARROW = (
    hopper_backward(16, 16),
    hopper_backward(16, 16, heads=1, seqlens=(16, 600)),  # jobs of one turn: the tickets run ahead as far as they may
    hopper_backward(16, 16, ("wrt", ("v",))),
    hopper_backward(16, 16, ("wrt", ("k", "v"))),
    hopper_backward(16, 16, ("deterministic", False)),
)
# Shares of the columns for both consumers; none of q's and k's for the second one.
HOPPER_WIDE = (hopper_backward(160, 16), hopper_backward(16, 160))


# No rows, one, a tile and one more or less of the shortest tiles; a second look at sequences.
_LENGTHS_Q = (1, 0, 129, 16, 15, 0, 64, *(28 * (0,)), 17, 33)
_LENGTHS_K = (0, 5, 16, 129, 1, 128, 17, *(28 * (0,)), 127, 40)
PACKED_FORWARD = PackedProblem(
    _LENGTHS_Q, _LENGTHS_K, (("tile", Rows(rows=(("fwd_sm90", HopperRow(64, 16, 2, 2, True, False, "")),))),)
)
PACKED_BACKWARD = PackedProblem(
    _LENGTHS_Q, _LENGTHS_K,
    (("tile", Rows(rows=(("bwd_sm90", HopperBackwardRow(16, 128, 2, 8, True, "")),))), ("causal", True)),
)  # fmt: skip


# Of 8 splits thread blocks take several, one after another.
DECODE_SM80 = (
    DecodeProblem("sm80", "float16"), DecodeProblem("sm80", "float16", num_splits=8),
    DecodeProblem("sm80", "float16", head_dim=72, gap=1), DecodeProblem("sm80", "float16", rows=9, num_splits=1),
)  # fmt: skip
DECODE_SIMT = (DecodeProblem("simt", "float32"), DecodeProblem("simt", "float32", num_splits=8))


def runs_of(removal: Removal) -> list[Run]:
    """What a removal may break, likeliest first."""
    file = removal.file
    sample = file.removesuffix(".cu")
    if sample in SAMPLES:
        return [lambda patches, schedule: _run_sample(sample, patches, schedule)]
    if file == "block_map.cu":
        return [MASKED.forward]
    beside = {
        "bwd_sinks.cu": (SINKS,), "bwd_bias_simt.cu": BIAS_SIMT, "bwd_bias_sm80.cu": BIAS_SM80,
        "bwd_score_simt.cu": SCORE_SIMT, "bwd_score_sm80.cu": SCORE_SM80, "terms.cuh": SCORE_SIMT,
        "term_turns.cuh": (score_problem("float32", score="distance"),),
    }  # fmt: skip
    if file in beside:
        return [p.backward for p in beside[file]]
    if file == "bwd_wide.cu":
        return [p.backward for p in DOUBLE_BACKWARD]
    if file.endswith(("_wide.cu", "_wide.cuh")):
        return [p.forward for p in DOUBLE_FORWARD]
    if file.startswith(("decode", "combine", "cache")):
        return [p.forward for p in (DECODE_SM80 if "sm80" in file else DECODE_SIMT)]
    if file in ("bwd_sm80.cu", "gradients.cuh"):
        return [p.backward for p in AMPERE_BACKWARD]
    if file.endswith(("_sm80.cu", "_sm80.cuh")):
        return [p.forward for p in AMPERE_FORWARD]
    if file == "fwd_parts_sm90.cu":
        return [p.forward for p in PARTS_FORWARD]
    if file == "fwd_sm90.cu":
        return [p.forward for p in (*HOPPER_FORWARD, PACKED_FORWARD)]
    if file == "bwd_sm90.cu":
        narrow, wide = ([p.backward for p in problems] for problems in (HOPPER_NARROW, HOPPER_WIDE))
        return [*wide, *narrow] if removal.function == "consume_wide" else [*narrow, *wide]
    if file.endswith("_sm90.cuh"):
        return [*(p.forward for p in (*HOPPER_FORWARD, *PARTS_FORWARD)), *(p.backward for p in HOPPER_NARROW)]
    forward, backward = [p.forward for p in PROBLEMS], [p.backward for p in PROBLEMS]
    return forward if file.startswith("fwd") else backward if file.startswith("bwd") else [*forward, *backward]


def _run_sample(name: str, patches: tuple[Patch, ...], schedule: Schedule) -> None:
    with Device(schedule, patches) as xp:
        SAMPLES[name](xp, schedule.seed)


def is_found(removal: Removal, seeds: tuple[int, ...] = (0, 5, 10)) -> str | None:
    """What the first run that fails says; None if none does."""
    for run in runs_of(removal):
        for seed in seeds:
            try:
                run((removal,), Schedule.draw(seed))
            except (EmulatorError, AssertionError) as error:
                return f"{type(error).__name__}: {error}"
    return None


def unseen() -> dict[tuple[str, str], str]:
    """The lines that no CPU run can show missing: (file, code) to the reason."""
    reasons: dict[tuple[str, str], str] = {}
    for line in (HERE / "unseen.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            file, code, reason = (part.strip() for part in line.split("|"))
            reasons[file, code] = reason
    return reasons


def key_of(removal: Removal) -> tuple[str, str] | None:
    """The key in `unseen` that stands for a removal: its file, and how the code ends that ends with its line."""
    folder = HERE / "samples" if (HERE / "samples" / removal.file).exists() else KERNELS
    lines = (folder / removal.file).read_text(encoding="utf-8").splitlines()[: removal.line]
    code = " ".join(part for part in (line.split("//")[0].strip() for line in lines) if part)
    return next((key for key in unseen() if key[0] == removal.file and code.endswith(key[1])), None)

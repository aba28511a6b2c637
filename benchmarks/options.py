"""What options cost, as ratios of our own calls in one run on a GPU: bfloat16, forward and backward.

    python -m benchmarks.options --out benchmarks/results/h200-options.json

Each ratio is the time of a call with an option over that of a call it is held against, in turns, medians over the
rounds. Three have bars: windows at 16384 keys (0.10 and 0.16 of the full forward), and the backward with dbias of a
bias (1, H, S, S) at batch 8, 2048 keys, d = 64 (1.6 of the same backward without dbias). The others say what an option
costs beside the plain call at 4096 keys. The exit code is 1 if a call failed; a bar that is missed is said, and no
failure. Packed sequences are held against a dense batch of the longest, for each pair that a tile computes (1.1); a
dense batch, packed, against itself, which says what it takes to find the tiles (1.03); and sequences without rows
against some that have rows. --dry-run needs no GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import facts
from benchmarks.cells import arguments, build
from cupyflash import (
    _compile,
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
    explain,
    explain_varlen,
)
from cupyflash._program import backend as backends
from cupyflash._program.terminal import table
from cupyflash._program.timing import device_clock
from cupyflash._program.workload import numpy_dtype

COLUMNS = 2048  # heads x head_dim
ROUNDS = 9
BUDGET = 150.0
WARM_UP = 2.0
LEAST = 0.005  # seconds of a sample


BESIDE_PLAIN = (
    "causal", "softcap", "ALiBi", "bias", "mask", "block mask", "segments", "sinks", "kv_lens", "dropout"
)  # fmt: skip


@dataclass
class Comparison:
    """Two calls that take turns, and what came of it."""

    name: str
    bar: float | None = None
    family: str = ""
    ratios: list[float] = field(default_factory=list)
    milliseconds: float = 0.0
    failed: str | None = None

    @property
    def median(self) -> float:
        """Of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def what(self) -> str:
        """The call, in a few words."""
        raise NotImplementedError

    def measure(self, rounds: int, xp: Any) -> None:
        """Both calls in turns."""
        raise NotImplementedError

    def take_turns(
        self, rounds: int, calls: Sequence[Callable[[], object]], sizes: tuple[float, float] = (1, 1)
    ) -> None:
        """Time both, for each unit of their sizes."""
        for call in calls:
            call()
        repeats = [max(1, round(LEAST / device_clock(call, 2))) for call in calls]
        times = []
        for _ in range(rounds):
            pair = [device_clock(call, n) for call, n in zip(calls, repeats, strict=True)]
            times.append(pair[0])
            self.ratios.append(pair[0] / sizes[0] / (pair[1] / sizes[1]))
        self.milliseconds = 1e3 * statistics.median(times)

    def row(self) -> tuple[str, ...]:
        """For the printed table."""
        if self.failed or not self.ratios:
            return self.name, self.what, self.family, self.failed or "not run", "", ""
        low, _, high = statistics.quantiles(self.ratios, n=4)
        bar = "" if self.bar is None else f"{self.bar:.2f}: {'holds' if self.median <= self.bar else 'missed'}"
        return self.name, self.what, self.family, f"{self.median:.3f}", f"{low:.3f} to {high:.3f}", bar


@dataclass
class Ratio(Comparison):
    """A call with options beside a call with others."""

    direction: str = "forward"
    batch: int = 1
    seqlen: int = 16384
    head_dim: int = 64
    options: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    wrt: tuple[str, ...] | None = None
    beside_wrt: tuple[str, ...] | None = None

    @property
    def what(self) -> str:
        return f"{self.direction}, {self.batch} x {self.seqlen}, d={self.head_dim}"

    def measure(self, rounds: int, xp: Any) -> None:
        rng = xp.random.default_rng(20)
        shape = (self.batch, COLUMNS // self.head_dim, self.seqlen, self.head_dim)
        arrays = [rng.standard_normal(shape, dtype=xp.float32).astype(BFLOAT16) for _ in range(4)]
        other = call_of(self, self.beside, self.beside_wrt, arrays, xp)
        self.take_turns(rounds, (call_of(self, self.options, self.wrt, arrays, xp), other))


@dataclass
class Ragged(Comparison):
    """Packed sequences beside another call."""

    direction: str = "forward"
    head_dim: int = 64
    heads: int = 4
    longest: int = 512
    sequences: int = 4096

    @property
    def what(self) -> str:
        return f"{self.direction}, {self.heads} heads, d={self.head_dim}"

    def lengths(self) -> np.ndarray:
        """Rows of each sequence, at random from 1 to the longest."""
        return np.random.default_rng(3).integers(1, self.longest + 1, self.sequences)

    def packed_call(self, lengths: np.ndarray, rows: int, xp: Any) -> Callable[[], object]:
        """The call on sequences of these lengths, in arrays of so many rows; sets the family."""
        offsets = xp.asarray(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        q, k, v, dout = self._draw((rows, self.heads, self.head_dim), xp)
        longest: dict[str, Any] = {"max_seqlen_q": self.longest, "max_seqlen_k": self.longest}
        self.family = explain_varlen(q, k, v, offsets, offsets, **longest).family
        if self.direction == "forward":
            return lambda: attention_varlen(q, k, v, offsets, offsets, **longest)
        out, lse = attention_varlen(q, k, v, offsets, offsets, return_lse=True, **longest)
        return lambda: attention_varlen_backward(dout, q, k, v, out, lse, offsets, offsets, **longest)

    def dense_call(self, batch: int, xp: Any) -> tuple[Callable[[], object], tuple[int, int]]:
        """The call on a batch whose entries are as long as the longest sequence, and its blocks of queries and keys."""
        shape = (batch, self.longest, self.heads, self.head_dim)
        q, k, v, dout = (x.swapaxes(1, 2) for x in self._draw(shape, xp))
        plan = explain(q, k, v, backward=self.direction == "backward")
        if self.direction == "forward":
            return lambda: attention(q, k, v), (plan.block_m, plan.block_n)
        out, lse = attention(q, k, v, return_lse=True)
        return lambda: attention_backward(dout, q, k, v, out, lse), (plan.block_m, plan.block_n)

    def _draw(self, shape: tuple[int, ...], xp: Any) -> list[Any]:
        rng = xp.random.default_rng(4)
        return [rng.standard_normal(shape, dtype=xp.float32).astype(BFLOAT16) for _ in range(4)]


@dataclass
class ByPair(Ragged):
    """Sequences of random lengths beside a dense batch of the longest: time for a pair that a tile computes."""

    name: str = "4096 sequences of 1 to 512 rows"
    bar: float | None = 1.1

    def measure(self, rounds: int, xp: Any) -> None:
        lengths, batch = self.lengths(), self.sequences // 4
        dense, (m, n) = self.dense_call(batch, xp)
        whole = -(-lengths // m) * m * (-(-lengths // n) * n)
        pairs = int(whole.sum()), batch * (-(-self.longest // m) * m * (-(-self.longest // n) * n))
        self.take_turns(rounds, (self.packed_call(lengths, int(lengths.sum()), xp), dense), pairs)


@dataclass
class Equal(Ragged):
    """A dense batch, packed, beside itself: the same tiles, found in another way."""

    name: str = "1024 sequences of 512 rows"
    bar: float | None = 1.03

    def measure(self, rounds: int, xp: Any) -> None:
        batch = self.sequences // 4
        packed = self.packed_call(np.full(batch, self.longest), batch * self.longest, xp)
        self.take_turns(rounds, (packed, self.dense_call(batch, xp)[0]))


@dataclass
class Nothing(Ragged):
    """Sequences without rows beside those that have some: what it takes to find out, with nothing to do meanwhile."""

    name: str = "4096 sequences of 0 rows"

    def measure(self, rounds: int, xp: Any) -> None:
        lengths = self.lengths()
        # One row behind the last sequence: without any, nothing would be launched.
        self.take_turns(
            rounds,
            (self.packed_call(0 * lengths, 1, xp), self.packed_call(lengths, int(lengths.sum()), xp)),
        )


def plan() -> list[Comparison]:
    """Every comparison; those with bars first."""
    found: list[Comparison] = []
    for d in (64, 128):
        for name, bar in (("window=(1024, 0)", 0.10), ("window=(1024, 1024)", 0.16)):
            found.append(Ratio(name, bar=bar, head_dim=d, options=(name,)))
            found.append(Ratio(name, direction="backward", head_dim=d, options=(name,)))
    keys = ("q", "k", "v")
    found.append(
        Ratio(
            "dbias", 1.6, direction="backward", batch=8, seqlen=2048, options=("bias",), beside=("bias",),
            wrt=(*keys, "bias"), beside_wrt=keys,
        )
    )  # fmt: skip
    for direction in ("forward", "backward"):
        for kind in (ByPair, Equal, Nothing):
            found += [kind(direction=direction, head_dim=d) for d in (64, 128)]
    for d in (64, 128):
        for name in BESIDE_PLAIN:
            for direction in ("forward", "backward"):
                found.append(
                    Ratio(
                        name, direction=direction, batch=4, seqlen=4096, head_dim=d, options=(name,), wrt=keys,
                        beside_wrt=keys,
                    )
                )  # fmt: skip
    return found


def options_of(names: Sequence[str], ratio: Ratio, xp: Any) -> dict[str, Any]:
    """The keyword arguments that the names stand for."""
    heads, seqlen, batch = COLUMNS // ratio.head_dim, ratio.seqlen, ratio.batch
    rng = xp.random.default_rng(7)
    segment = xp.arange(seqlen) // 512
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "causal": lambda: {"causal": True},
        "softcap": lambda: {"softcap": 30.0},
        "ALiBi": lambda: {"alibi_slopes": xp.linspace(0.1, 1, heads, dtype=xp.float32)},
        "bias": lambda: {"bias": rng.standard_normal((1, heads, seqlen, seqlen), dtype=xp.float32).astype(BFLOAT16)},
        "mask": lambda: {"mask": rng.random((1, 1, seqlen, seqlen), dtype=xp.float32) < 0.7},
        "block mask": lambda: {"mask": segment[:, None] == segment},
        "segments": lambda: {"segment_ids": (xp.broadcast_to(segment, (batch, seqlen)),) * 2},
        "sinks": lambda: {"sinks": xp.zeros(heads, xp.float32)},
        "kv_lens": lambda: {"kv_lens": xp.full(batch, seqlen)},
        "dropout": lambda: {"dropout": 0.1, "seed": 3},
        "window=(1024, 0)": lambda: {"window": (1024, 0)},
        "window=(1024, 1024)": lambda: {"window": (1024, 1024)},
    }
    return {key: value for name in names for key, value in made[name]().items()}


BFLOAT16 = numpy_dtype("bfloat16")


def call_of(ratio: Ratio, names: Sequence[str], wrt: Any, arrays: Sequence[Any], xp: Any) -> Callable[[], object]:
    """The call to time, compiled."""
    q, k, v, dout = arrays
    options = options_of(names, ratio, xp)
    if ratio.direction == "forward":
        ratio.family = explain(q, k, v, **options).family
        out = xp.empty_like(q)

        def forward() -> object:
            return attention(q, k, v, out=out, **options)

        forward()
        return forward
    ratio.family = explain(q, k, v, backward=True, wrt=wrt, **options).family
    out, lse = attention(q, k, v, return_lse=True, **options)

    def backward() -> object:
        return attention_backward(dout, q, k, v, out, lse, wrt=wrt, **options)

    backward()
    return backward


def specs_of(ratio: Ratio, xp: Any) -> set[_compile.Spec]:
    """The kernels of both calls."""
    x = xp.broadcast_to(xp.zeros((), BFLOAT16), (ratio.batch, COLUMNS // ratio.head_dim, ratio.seqlen, ratio.head_dim))
    found = set()
    for names, wrt in ((ratio.options, ratio.wrt), (ratio.beside, ratio.beside_wrt)):
        options = options_of(names, ratio, xp)
        plans = [explain(x, x, x, **options)]
        if ratio.direction == "backward":
            plans.append(explain(x, x, x, backward=True, wrt=wrt, **options))
        found |= {kernel.spec for plan in plans for kernel in plan.kernels}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = arguments("python -m benchmarks.options", __doc__, ROUNDS, BUDGET)
    args: argparse.Namespace = parser.parse_args(argv)
    comparisons = plan()
    if args.dry_run:
        print("\n".join("  ".join(r.row()) for r in comparisons))
        return 0
    began = time.monotonic()
    backend = backends.choose("cupy")
    if backend is None:
        return 2
    place = facts.place(backend)
    build(backend, {spec for r in comparisons if isinstance(r, Ratio) for spec in specs_of(r, backend.xp)})
    heat(backend.xp)
    for ratio in comparisons:
        if time.monotonic() - began > args.budget:
            break
        try:
            ratio.measure(args.rounds, backend.xp)
        except Exception as error:
            ratio.failed = f"{type(error).__name__}: {error}"
        backend.free()
        print(f"[{time.monotonic() - began:5.1f} s] " + "  ".join(ratio.row()), flush=True)
    print(table(("option", "call", "family", "ratio", "quartiles", "bar"), [r.row() for r in comparisons]))
    if args.out:
        results = {"ratios": [dict(vars(r), median=r.median if r.ratios else None) for r in comparisons]}
        facts.write(Path(args.out), {"program": "benchmarks/options.py"} | place | results)
    return 1 if any(ratio.failed for ratio in comparisons) else 0


def heat(xp: Any) -> None:
    """Work until the clocks have settled."""
    q = xp.zeros((4, 16, 4096, 128), BFLOAT16)
    began = time.monotonic()
    while time.monotonic() - began < WARM_UP:
        attention(q, q, q)
        xp.cuda.Device().synchronize()


if __name__ == "__main__":
    sys.exit(main())

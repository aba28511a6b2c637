"""How large errors are: the worst of many entries, each with its own values and lengths, and beside peers by data set.

    python -m benchmarks.errors --out benchmarks/results/h200-errors.json

Two tables. The first has, for each dtype, precision and head width, the worst over many (batch, head) entries, full and
causal: calls of random sizes, on data sets in turn, half of them with a length of its own for each batch entry. The
second has errors of one call on each data set, beside torch, unfused attention and IEEE multiply-adds. What is right
is computed in float64; for float64 in long double, on fewer entries and on the host. An error is relative, in the
Frobenius norm of an entry, or the worst element's, in units of the dtype's last place times the sum of the sizes of
what it is a sum of. lse's is in such units of its accumulator, of lse or 1. Results that a dtype has no room for count
for nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import facts
from benchmarks.exact import wide
from cupyflash import attention, attention_backward, explain
from cupyflash._program import backend as backends
from cupyflash._program.backend import Backend
from cupyflash._program.contenders import TORCH_BACKENDS, Torch, Unfused
from cupyflash._program.terminal import table
from cupyflash._program.workload import Workload, numpy_dtype
from cupyflash.testing import precision
from cupyflash.testing.precision import DATA_SETS, Inputs

#: dtype, precision: what each promises is in docs/numerics.md.
ARITHMETIC = (
    ("float16", None), ("float16", "highest"), ("bfloat16", None), ("bfloat16", "highest"),
    ("float32", "ieee"), ("float32", "highest"), ("float64", None),
)  # fmt: skip
WIDTHS = (64, 128)
LEAD = (8, 16)  # batch entries and heads of a call
LONGEST = {"float64": 48}  # rows and keys; others:
LONGEST_ELSE = 256
FEWER = {"float64": 100}  # by so much, since long double is slow
ENTRIES = 100_000
BUDGET = 240.0  # seconds after which no new call begins
PEER_ROWS, PEER_HEADS, PEER_WIDTH = 2048, 8, 128
GRADIENTS = ("dq", "dk", "dv")


@dataclass(frozen=True)
class Arithmetic:
    """What one row of the first table is about: up to four kernels each way."""

    dtype: str
    precision: str | None
    head_dim: int

    @property
    def unit(self) -> float:
        """The last place of 1."""
        return float(ml_dtypes.finfo(numpy_dtype(self.dtype)).eps)

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest normal number, and the largest one."""
        info = ml_dtypes.finfo(numpy_dtype(self.dtype))
        return float(info.smallest_normal), float(info.max)

    @property
    def longest(self) -> int:
        """Rows and keys."""
        return LONGEST.get(self.dtype, LONGEST_ELSE)

    def __str__(self) -> str:
        return f"{self.dtype}{f' {self.precision}' if self.precision else ''}, width {self.head_dim}"


@dataclass
class Worst:
    """The largest error of a result so far, and the call that had it: the same seed makes it again."""

    error: float = 0.0
    data: str = ""
    seed: int = -1

    def add(self, error: float, data: str, seed: int) -> None:
        """NaN is worse than everything."""
        if not error <= self.error:
            self.error, self.data, self.seed = error, data, seed


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    args = parse(argv)
    backend = backends.choose("numpy" if args.numpy else "cupy")
    if backend is None:
        return 2
    began = time.monotonic()
    print(f"{backend.device}; seed {args.seed}")
    rows = [measure(backend, of, args.entries, args.seed, began + args.budget) for of in arithmetics(args.dtypes)]
    pairs = [] if args.skip_peers else [(name, dtype) for dtype in ("float32", "bfloat16") for name in DATA_SETS]
    peers = [beside_peers(backend, *pair) for pair in pairs]
    found = {
        "program": "benchmarks/errors.py", **facts.place(backend), "seed": args.seed,
        "seconds": time.monotonic() - began, "worst": rows, "data_sets": peers,
    }  # fmt: skip
    facts.write(args.out, found)
    print(text(rows, peers))
    short = [row["of"] for row in rows if row["entries"] < row["wanted"]]
    if short:
        print(f"NOT ALL ENTRIES, the budget was spent: {'; '.join(short)}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.errors", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=facts.Path, required=True, help="where the JSON goes")
    parser.add_argument("--numpy", action="store_true", help="NumPy arrays and the CPU path")
    parser.add_argument("--entries", type=int, default=ENTRIES, help="over all rows of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS")
    parser.add_argument("--dtypes", nargs="+", default=sorted({dtype for dtype, _ in ARITHMETIC}))
    parser.add_argument("--skip-peers", action="store_true", help="only the first table")
    return parser.parse_args(argv)


def arithmetics(dtypes: Sequence[str]) -> list[Arithmetic]:
    """The rows of the first table."""
    return [Arithmetic(dtype, kind, d) for dtype, kind in ARITHMETIC if dtype in dtypes for d in WIDTHS]


# ------------------------------------------------------------------------------------------------- worst of many


def measure(backend: Backend, of: Arithmetic, entries: int, seed: int, deadline: float) -> dict[str, Any]:
    """One row: calls until there are entries enough."""
    wanted = math.ceil(entries / len(ARITHMETIC) / len(WIDTHS) / FEWER.get(of.dtype, 1))
    worst: dict[str, dict[str, Worst]] = {}
    done, families = 0, set()
    for call in calls(of, seed):
        if done >= wanted or time.monotonic() > deadline:
            break
        done += call.run(backend, worst, families)
    return {
        "of": str(of), **asdict(of), "entries": done, "wanted": wanted, "families": sorted(families),
        "worst": {name: {kind: asdict(x) for kind, x in kinds.items()} for name, kinds in worst.items()},
    }  # fmt: skip


@dataclass(frozen=True)
class Call:
    """Entries of one size, and lengths of their own."""

    of: Arithmetic
    data: str
    seed: int
    rows: int
    keys: int
    causal: bool
    own_lengths: bool

    def run(self, backend: Backend, worst: dict[str, dict[str, Worst]], families: set[str]) -> int:
        """Compare a call with what is right; returns how many entries it had."""
        xp, of = backend.xp, self.of
        lead = LEAD if of.dtype != "float64" else (2, 4)
        x = precision.draw(
            self.data, self.seed, lead, self.rows, self.keys, of.head_dim, numpy_dtype(of.dtype), xp
        )  # fmt: skip
        arrays = wide_inputs(x, xp)
        if not precision.fits(arrays):
            return 0
        lens = None
        if self.own_lengths:
            rng = np.random.default_rng(self.seed)
            lens = xp.asarray(rng.integers(1, self.keys + 1, lead[0]))
        options = {"causal": self.causal, "precision": of.precision, "kv_lens": lens}
        out, lse = attention(*x[:3], return_lse=True, **options)
        grads = attention_backward(x.dout, *x[:3], out, lse, **options)
        got = {"out": out, **{name: getattr(grads, name) for name in GRADIENTS}}
        families |= {explain(*x[:3], backward=backward, **options).family for backward in (False, True)}
        self._compare(backend, arrays, lens, lse, got, worst)
        return math.prod(lead)

    def _compare(
        self, backend: Backend, arrays: Inputs, lens: Any, lse: Any, got: dict[str, Any],
        worst: dict[str, dict[str, Worst]],
    ) -> None:  # fmt: skip
        xp, of = backend.xp, self.of
        results = {name: wide(y, xp) for name, y in got.items()}
        dtype: Any = np.float64
        if of.dtype == "float64":
            dtype, host = np.longdouble, (lambda y: y.get() if hasattr(y, "get") else y)
            arrays, lse, lens = Inputs(*map(host, arrays)), host(lse), None if lens is None else host(lens)
            results, xp = {name: host(y) for name, y in results.items()}, np
        true = precision.truth(arrays, self.causal, None if lens is None else lens[:, None, None, None], xp, dtype)
        smallest, largest = of.limits
        for name, y in results.items():
            if not bool(true.sizes[name].max() < largest):
                continue
            both = precision.errors(y, true.right[name], true.sizes[name], of.unit, smallest, (-2, -1))
            for kind, each in zip(("norm", "element"), both, strict=True):
                kinds = worst.setdefault(name, {"norm": Worst(), "element": Worst()})
                kinds[kind].add(float(each.max()), self.data, self.seed)
        right = xp.where(true.lse > -np.inf, true.lse, 0)
        off = xp.where(true.lse > -np.inf, abs(lse.astype(dtype) - right), 0) / abs(right).clip(1)
        unit = 2.0**-52 if of.dtype == "float64" else 2.0**-23
        kinds = worst.setdefault("lse", {"element": Worst()})
        kinds["element"].add(float(off.max()) / unit, self.data, self.seed)


def calls(of: Arithmetic, seed: int) -> Iterator[Call]:
    """Calls of random sizes without an end."""
    rng = np.random.default_rng(seed)
    number = 0
    while True:
        for name, data in DATA_SETS.items():
            rows, keys = (int(n) for n in np.exp(rng.uniform(0, math.log(of.longest), 2)).round())
            number += 1
            causal = data.causal or number % 2 == 0
            yield Call(of, name, 1000 * seed + number, rows, keys, causal, own_lengths=number % 4 < 2)


def wide_inputs(x: Inputs, xp: Any) -> Inputs:
    """In float64."""
    return Inputs(*(wide(a, xp) for a in x))


# ------------------------------------------------------------------------------------------------- beside peers


def beside_peers(backend: Backend, name: str, dtype: str) -> dict[str, Any]:
    """Errors of one call, of everyone who can run it."""
    xp, causal = backend.xp, DATA_SETS[name].causal
    rows = PEER_ROWS if backend.name == "cupy" else PEER_ROWS // 8
    work = Workload(1, PEER_HEADS, rows, PEER_WIDTH, dtype, causal)
    x = precision.draw(name, 0, work.shape[:2], rows, rows, PEER_WIDTH, numpy_dtype(dtype), xp)
    arrays = wide_inputs(x, xp)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    skipped: dict[str, str] = {}
    if precision.fits(arrays):
        true = precision.truth(arrays, causal, xp=xp)
        for contender, results in contenders(work, x, xp):
            try:
                got = {result: wide(y, xp) for result, y in results().items()}
            except Exception as error:  # a peer that lacks the dtype, say
                skipped[contender] = f"{type(error).__name__}: {error}".split("\n")[0]
                continue
            unit = Arithmetic(dtype, None, PEER_WIDTH).unit
            found[contender] = {
                result: tuple(map(float, precision.errors(y, true.right[result], true.sizes[result], unit)))
                for result, y in got.items()
            }
    return {"data": name, "dtype": dtype, "workload": work.as_dict(), "errors": found, "skipped": skipped}


def contenders(work: Workload, x: Inputs, xp: Any) -> Iterator[tuple[str, Any]]:
    """Who computes out and gradients, by name."""

    def ours(**options: Any) -> dict[str, Any]:
        out, lse = attention(*x[:3], causal=work.causal, return_lse=True, **options)
        grads = attention_backward(x.dout, *x[:3], out, lse, causal=work.causal, **options)
        return {"out": out, **{name: getattr(grads, name) for name in GRADIENTS}}

    for kind in dict.fromkeys(kind for dtype, kind in ARITHMETIC if dtype == work.dtype):
        yield f"cupyflash {kind or 'default'}", lambda kind=kind: ours(precision=kind)
    if xp is not np:
        yield "cupyflash simt", lambda: ours(family="simt")
    peers = {"unfused": lambda: Unfused(work, tuple(x), xp)}
    if xp is np:
        peers["torch"] = lambda: Torch(work, tuple(x))
    else:
        peers |= {name: lambda b=b: Torch(work, tuple(x), b) for name, b in TORCH_BACKENDS.items()}
    for name, make in peers.items():
        yield name, lambda make=make: results_of(make())


def results_of(peer: Any) -> dict[str, Any]:
    """Both directions."""
    with peer.around():
        return dict(peer.results("forward")) | dict(peer.results("backward"))


# ----------------------------------------------------------------------------------------------------- output


def text(rows: list[dict[str, Any]], peers: list[dict[str, Any]]) -> str:
    """Both tables."""
    results = ("out", *GRADIENTS)
    first = [
        (
            row["of"], ", ".join(row["families"]), str(row["entries"]),
            *(" / ".join(f"{row['worst'][r][kind]['error']:.2g}" for kind in ("norm", "element")) for r in results),
            f"{row['worst']['lse']['element']['error']:.2g}",
        )
        for row in rows
        if row["worst"]
    ]  # fmt: skip
    second = [
        (cell["dtype"], cell["data"], name, *(" / ".join(f"{e:.2g}" for e in errors[r]) for r in results))
        for cell in peers
        for name, errors in cell["errors"].items()
    ]
    head = "error in the norm / of the worst element"
    parts = [head, table(("", "families", "entries", *results, "lse"), first)]
    if second:
        parts.append(table(("dtype", "data", "who", *results), second))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())

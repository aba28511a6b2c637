"""One table for the CPU: attention on NumPy arrays beside its peers in the same run, small calls, and memory.

    python benchmarks/cpu.py                      # under three minutes; writes benchmarks/results/cpu.json

Contenders of one group take turns, in another order each round; each sample follows an untimed call, so that nobody
pays for caches and threads that its neighbour left. A row compares two of them by the median of the rounds' ratios,
beside its quartiles: neighbours in time share what else the machine does, so their ratio moves less than either.
torch is a peer where it is installed; "unfused" is NumPy with the whole matrix of logits in memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file runs as a script from a bare checkout too

from benchmarks import facts  # noqa: E402
from cupyflash import AttentionGradients, attention, attention_backward  # noqa: E402
from cupyflash._program.machine import cpu_name, read_versions  # noqa: E402
from cupyflash._program.terminal import seconds, size, table  # noqa: E402
from cupyflash._workers import worker_count  # noqa: E402

HEADS, SEQLEN, HEAD_DIM = 8, 2048, 64
SMALL = (1, 8, 16, 32, 64)
DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
MEMORY_SEQLENS = (512, 2048, 8192)
MEMORY_LIMIT = 24 * 2**20  # bytes a worker
LEAST = 0.004  # seconds of a sample: short calls are repeated
ROUNDS = 15
LIMIT = 25.0  # seconds after which a group begins no new round

Call = Callable[[], object]


@dataclass
class Group:
    """Contenders that take turns."""

    name: str
    calls: dict[str, Call]
    samples: dict[str, list[float]] = field(default_factory=dict)  # seconds a call, one a round

    def median(self, name: str) -> float:
        """Seconds a call."""
        return statistics.median(self.samples[name])

    def ratios(self, one: str, other: str) -> list[float]:
        """How many times the time of `other` the contender `one` took, by round."""
        return [a / b for a, b in zip(self.samples[one], self.samples[other], strict=True)]


@dataclass
class Row:
    """One figure, and what it shall be."""

    name: str
    value: float
    unit: str = ""
    low: float | None = None  # quartiles
    high: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the figure is what it shall be; None where nothing is asked of it."""
        if self.at_least is None and self.at_most is None:
            return None
        return self.value >= (self.at_least or 0) and self.value <= (self.at_most or float("inf"))


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=facts.RESULTS / "cpu.json")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each contender (default %(default)s)")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out, though it is installed")
    args = parser.parse_args(argv)
    torch = None if args.no_torch else import_torch()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    began = time.perf_counter()
    groups = [forward_group(torch), backward_group(torch), dtype_group(), *map(small_group, SMALL), tiny_group()]
    for group in groups:
        measure(group, args.rounds)
    rows = [row for group in groups for row in read(group)] + [memory(n, b) for n in MEMORY_SEQLENS for b in (0, 1)]
    print(text(groups, rows))
    write(args.out, groups, rows, torch, load, time.perf_counter() - began)
    return 0


def import_torch() -> Any:
    """Torch with as many threads as we have workers, or None."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(worker_count())
    return torch


def arrays(count: int, shape: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    """Random inputs."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(count)]


# -------------------------------------------------------------------------------------------------------- contenders


def unfused(q: Any, k: Any, v: Any) -> Any:
    """Attention as matmul, max, exp, sum, matmul."""
    s = np.matmul(q * np.float32(q.shape[-1] ** -0.5), k.swapaxes(-1, -2))
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    out = np.matmul(s, v)
    out /= s.sum(axis=-1, keepdims=True)
    return out


def forward_group(torch: Any) -> Group:
    """Forward, full and causal."""
    q, k, v = arrays(3, (HEADS, SEQLEN, HEAD_DIM))
    calls: dict[str, Call] = {
        "cupyflash": lambda: attention(q, k, v),
        "cupyflash causal": lambda: attention(q, k, v, causal=True),
    }
    if torch:
        t = [torch.from_numpy(x)[None] for x in (q, k, v)]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        calls["torch"] = lambda: sdpa(*t)
        calls["torch causal"] = lambda: sdpa(*t, is_causal=True)
    calls["unfused"] = lambda: unfused(q, k, v)
    return Group("forward", calls)


def backward_group(torch: Any) -> Group:
    """Backward, full and causal; torch's is autograd through a graph that is kept."""
    q, k, v, dout = arrays(4, (HEADS, SEQLEN, HEAD_DIM))
    calls: dict[str, Call] = {}
    for causal in (False, True):
        name = " causal" if causal else ""
        out, lse = attention(q, k, v, causal=causal, return_lse=True)
        calls["cupyflash" + name] = partial(attention_backward, dout, q, k, v, out, lse, causal=causal)
        if torch:
            t = [torch.from_numpy(x)[None].requires_grad_() for x in (q, k, v)]
            graph = torch.nn.functional.scaled_dot_product_attention(*t, is_causal=causal)
            cotangent = torch.from_numpy(dout)[None]
            calls["torch" + name] = partial(torch.autograd.grad, graph, t, cotangent, retain_graph=True)
    return Group("backward", calls)


def dtype_group() -> Group:
    """The same forward and backward in every dtype."""
    calls: dict[str, Call] = {}
    for dtype in DTYPES:
        name = np.dtype(dtype).name
        q, k, v, dout = arrays(4, (HEADS, SEQLEN, HEAD_DIM), dtype)
        out, lse = attention(q, k, v, return_lse=True)
        calls[f"{name} forward"] = partial(attention, q, k, v)
        calls[f"{name} backward"] = partial(attention_backward, dout, q, k, v, out, lse)
    return Group("dtypes", calls)


def small_group(seqlen: int) -> Group:
    """Short sequences, few and many of them."""
    calls: dict[str, Call] = {}
    for batch in (1, 8):
        q, k, v = arrays(3, (batch, HEADS, seqlen, HEAD_DIM))
        name = f"B*H={batch * HEADS} "
        calls[name + "cupyflash"], calls[name + "unfused"] = partial(attention, q, k, v), partial(unfused, q, k, v)
    return Group(f"S={seqlen}", calls)


def tiny_group() -> Group:
    """What a call costs that has nothing to do."""
    q, k, v = arrays(3, (1, 8, 16))
    return Group("one call, q (1, 8, 16)", {"cupyflash": partial(attention, q, k, v)})


# ------------------------------------------------------------------------------------------------------- measurement


def measure(group: Group, rounds: int) -> None:
    """Let the contenders take turns."""
    group.samples = {name: [] for name in group.calls}
    repeats = {}
    for name, call in group.calls.items():
        call()
        repeats[name] = max(1, round(LEAST / max(sample(call, 1), 1e-9)))
    names, began = list(group.calls), time.perf_counter()
    for n in range(rounds):
        if n and time.perf_counter() - began > LIMIT:
            break
        for name in names[n % len(names) :] + names[: n % len(names)]:
            group.calls[name]()
            group.samples[name].append(sample(group.calls[name], repeats[name]))


def sample(call: Call, repeats: int) -> float:
    """Seconds a call."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def memory(seqlen: int, backward: int) -> Row:
    """Peak of a call's temporary memory a worker, beside each worker's accumulators of dk and dv."""
    q, k, v, dout = arrays(4, (HEADS, seqlen, HEAD_DIM))
    out, lse = attention(q, k, v, return_lse=True)
    call: Call = partial(attention, q, k, v, out=(out, lse))
    if backward:
        grads = AttentionGradients(*(np.empty_like(x) for x in (q, k, v)))
        call = partial(attention_backward, dout, q, k, v, out, lse, grads_out=grads)
    call()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    call()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    accumulators = backward * seqlen * 2 * HEAD_DIM * 4
    name = f"{('forward', 'backward')[backward]}, S={seqlen}: memory a worker"
    return Row(name, peak / worker_count() - accumulators, "bytes", at_most=MEMORY_LIMIT)


def compare(group: Group, name: str, one: str, other: str, **wanted: float) -> Row | None:
    """The ratio of two contenders' times, if both ran."""
    if one not in group.samples or other not in group.samples:
        return None
    ratios = group.ratios(one, other)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Row(name, middle, "times", low, high, **wanted)


def read(group: Group) -> list[Row]:
    """What a group's samples say."""
    ours = "cupyflash"
    if group.name == "forward":
        rows = [
            compare(group, "forward: speed of torch", "torch", ours, at_least=0.9),
            compare(group, "forward, causal: speed of torch", "torch causal", ours + " causal"),
            compare(group, "forward: causal over full speed", ours, ours + " causal", at_least=1.6),
            compare(group, "forward: speed of unfused NumPy", "unfused", ours),
        ]
    elif group.name == "backward":
        rows = [
            compare(group, "backward: speed of torch", "torch", ours, at_least=0.7),
            compare(group, "backward, causal: speed of torch", "torch causal", ours + " causal"),
            compare(group, "backward: causal over full speed", ours, ours + " causal"),
        ]
    elif group.name == "dtypes":
        rows = [
            compare(group, f"{np.dtype(dtype).name}, {way}: time of float32", f"{np.dtype(dtype).name} {way}",
                    f"float32 {way}")
            for dtype in DTYPES if dtype is not np.float32 for way in ("forward", "backward")
        ]  # fmt: skip
    elif group.name.startswith("S="):
        rows = [
            compare(group, f"{group.name}, {b}: time of unfused NumPy", f"{b} cupyflash", f"{b} unfused", at_most=1.1)
            for b in ("B*H=8", "B*H=64")
        ]
    else:
        low, middle, high = statistics.quantiles(group.samples[ours], n=4)
        rows = [Row(group.name, middle, "seconds", low, high, at_most=40e-6)]
    return [row for row in rows if row is not None]


# ------------------------------------------------------------------------------------------------------------ output


def text(groups: list[Group], rows: list[Row]) -> str:
    """The tables."""
    flops = {"forward": 4 * HEADS * SEQLEN**2 * HEAD_DIM, "backward": 10 * HEADS * SEQLEN**2 * HEAD_DIM}
    times = [
        (f"{group.name}: {name}", seconds(group.median(name)),
         f"{flops[group.name] / (2 if 'causal' in name else 1) / group.median(name) / 1e9:.0f}"
         if group.name in flops else "-")
        for group in groups for name in group.samples
    ]  # fmt: skip
    title = f"{cpu_name()}, {worker_count()} workers, float32, {HEADS} heads, S={SEQLEN}, d={HEAD_DIM} unless named"
    return "\n\n".join(
        (title, table(("median time", "", "GFLOP/s"), times), table(("figure", "", "quartiles", "wanted", ""),
         [(row.name, show(row, row.value), spread(row), wanted(row), verdict(row)) for row in rows]))
    )  # fmt: skip


def show(row: Row, value: float) -> str:
    """A value with its unit."""
    return {"seconds": seconds, "bytes": size}.get(row.unit, "{:.2f}".format)(value)


def spread(row: Row) -> str:
    """The quartiles."""
    return "" if row.low is None or row.high is None else f"{show(row, row.low)} - {show(row, row.high)}"


def wanted(row: Row) -> str:
    """The limit."""
    if row.at_least is not None:
        return f">= {show(row, row.at_least)}"
    return "" if row.at_most is None else f"<= {show(row, row.at_most)}"


def verdict(row: Row) -> str:
    """Whether the limit is kept."""
    return {None: "", True: "met", False: "MISSED"}[row.met]


def write(path: Path, groups: list[Group], rows: list[Row], torch: Any, load: float | None, took: float) -> None:
    """Everything as JSON."""
    found = {
        "program": "benchmarks/cpu.py",
        "date": facts.now(),
        "commit": facts.commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "workers": worker_count(),
        "load_before": load,
        "seconds": took,
        "versions": read_versions() | {"torch": str(torch.__version__) if torch else None},
        "rows": [asdict(row) | {"met": row.met} for row in rows],
        "samples": {group.name: group.samples for group in groups},
    }
    facts.write(path, found)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    sys.exit(main())

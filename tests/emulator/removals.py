"""Take one barrier, wait or fence out of a kernel: every place where that can be done, and how to run what is left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .build import WORDS
from .device import Device, Patch
from .errors import EmulatorError
from .golden import HERE, KERNELS
from .samples import SAMPLES
from .schedule import Schedule

# Calls that only order things. (setmaxnreg and prefetches do not.)
_CALL = re.compile(
    r"\b(?:__sync\w+|sync_block|sync_warp|wait_copies|barrier_sync|barrier_arrive|cp_async_wait<\w+>|cp_async_commit|"
    r"mbarrier_wait|mbarrier_arrive\w*|fence_\w+|wgmma_fence|wgmma_commit|wgmma_wait<\w+>|wgmma_hold|"
    r"bulk_commit|bulk_wait\w*<\w+>|store_release|add_release|__threadfence\w*)\s*\("
)
_LOOP = re.compile(r"while \(load_acquire\([^{]*\{")
_MARK = re.compile(r'^#line (\d+) "kernels/([\w.]+)"$')


@dataclass(frozen=True)
class Removal:
    """One call, by its place in the source."""

    file: str
    line: int  # from 1
    column: int
    call: str  # as written, without its arguments

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
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        code = line.split("//")[0]
        for pattern in (_CALL, _LOOP):
            for match in pattern.finditer(code):
                yield Removal(file.name, number, match.start(), match[0].split("(")[0].strip())


def assembled_text(kernel: str) -> str:
    """A library kernel's text with its words, as NVRTC gets it but for the prelude."""
    from cupyflash._compile import kernel_text

    return kernel_text(kernel)


# --------------------------------------------------------------------------------------------------- how to run them

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

    def arrays(self) -> list[np.ndarray]:
        r = np.random.default_rng(0)
        (b, c), h, g, d = self.batch, self.heads, self.heads_k, self.head_dim
        q, k = (self.seqlen_q, d), (self.seqlen_k, d)
        shapes = ((b, h, *q), (c, g, *k), (c, g, *k), (max(b, c), h, *q))
        return [r.standard_normal(shape).astype(self.dtype) for shape in shapes]

    def forward(self, patches: tuple[Patch, ...], schedule: Schedule) -> None:
        from cupyflash import attention
        from cupyflash.testing import reference

        q, k, v, _ = self.arrays()
        options = dict(self.options)
        with Device(schedule, patches, undefined=False) as xp:
            got = attention(*(self._on(xp, x) for x in (q, k, v)), **options).get()
        options.pop("tile", None)
        _compare(got, reference.forward(q, k, v, **options).out)

    def backward(self, patches: tuple[Patch, ...], schedule: Schedule) -> None:
        from cupyflash import attention_backward
        from cupyflash.testing import reference

        q, k, v, dout = self.arrays()
        options = dict(self.options)
        plain = {name: x for name, x in options.items() if name != "tile"}
        out, lse = (np.ascontiguousarray(x, self.dtype) for x in reference.forward(q, k, v, **plain))
        with Device(schedule, patches, undefined=False) as xp:
            device = [self._on(xp, x) for x in (dout, q, k, v, out, lse)]
            got = [x.get() for x in attention_backward(*device, **options)[:3]]
        for x, y in zip(got, reference.backward(dout, q, k, v, out, lse, **plain), strict=True):
            _compare(x, y)

    def _on(self, xp: Any, x: np.ndarray) -> Any:
        if not self.unaligned:
            return xp.asarray(x)
        held = xp.asarray(np.concatenate([np.zeros(1, x.dtype), x.ravel()]))
        return held[1:].reshape(x.shape)


def _compare(got: np.ndarray, right: np.ndarray) -> None:
    # Coarse: these problems find lost synchronisation and wrong indices, others find lost digits.
    np.testing.assert_allclose(got, right, rtol=1e-3, atol=1e-3)


# One chunk and several, so that every branch on them is taken.
PROBLEMS = (Problem("float32", 16, 140, 140), Problem("float32", 160, 40, 70))


def runs_of(file: str) -> list[Run]:
    """What a removal in a file may break, likeliest first."""
    sample = file.removesuffix(".cu")
    if sample in SAMPLES:
        return [lambda patches, schedule: _run_sample(sample, patches, schedule)]
    forward = [p.forward for p in PROBLEMS]
    backward = [p.backward for p in PROBLEMS]
    return forward if file.startswith("fwd") else backward if file.startswith("bwd") else [*forward, *backward]


def _run_sample(name: str, patches: tuple[Patch, ...], schedule: Schedule) -> None:
    with Device(schedule, patches) as xp:
        SAMPLES[name](xp, schedule.seed)


def is_found(removal: Removal, seeds: tuple[int, ...] = (0, 5)) -> str | None:
    """What the first run that fails says; None if none does."""
    for run in runs_of(removal.file):
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


def code_of(removal: Removal) -> Any:
    """The line a removal stands in, without its comment: its key in unseen.txt."""
    folder = HERE / "samples" if (HERE / "samples" / removal.file).exists() else KERNELS
    line = (folder / removal.file).read_text(encoding="utf-8").splitlines()[removal.line - 1]
    return removal.file, line.split("//")[0].strip()

"""Where a command computes: CuPy or NumPy, as asked for or as good as it gets."""

from __future__ import annotations

import argparse
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._arrays import import_cupy
from .machine import Machine, read_machine

BACKENDS = ("cupy", "numpy")


@dataclass(frozen=True)
class Backend:
    """An array library, on this machine."""

    name: str
    xp: Any
    machine: Machine

    @property
    def device(self) -> str:
        """What computes, for people."""
        machine = self.machine
        if self.name == "cupy":
            gpu = machine.cupy.gpus[self.xp.cuda.runtime.getDevice()]
            return f"{gpu.name} (sm_{gpu.arch}), CuPy {machine.cupy.version}"
        threads = f"{machine.workers} worker thread{'s' if machine.workers > 1 else ''}"
        return f"{machine.cpu}, {threads}, NumPy {machine.versions['NumPy']}, {machine.versions['BLAS']}"

    def peak_memory(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """What `call` returns, and the bytes that it held at its peak beyond those held before it."""
        if self.name == "cupy":
            pool = self.xp.cuda.MemoryPool()  # a pool of its own: all that it ever asked the device for
            with self.xp.cuda.using_allocator(pool.malloc):
                result = call()
            return result, int(pool.total_bytes())
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            result = call()
            return result, tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()

    def synchronize(self) -> None:
        """Wait for the device; NumPy's results are there when a call returns."""
        if self.name == "cupy":
            self.xp.cuda.Device().synchronize()

    def free(self) -> None:
        """Give cached device memory back, so that the next contender finds it."""
        if self.name == "cupy":
            self.xp.get_default_memory_pool().free_all_blocks()
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_available():
                torch.cuda.empty_cache()


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option --backend."""
    parser.add_argument("--backend", choices=BACKENDS, help="where to compute; the best there is if not given")


def choose(name: str | None) -> Backend | None:
    """The backend asked for, or the best one; None, with a message on stderr, where CuPy can't be used."""
    machine = read_machine()
    name = machine.backend if name is None else name
    if name == "cupy" and machine.cupy.problem:
        print(f"CuPy can't be used here: {machine.advice or machine.cupy.problem}", file=sys.stderr)
        return None
    return Backend(name, import_cupy() if name == "cupy" else np, machine)

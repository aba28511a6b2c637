"""Print versions, devices, and which kernel families can run here.

Where a family can't run, the reason is printed, and what to install if an NVIDIA driver is present.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from .machine import Family, Machine, read_machine
from .terminal import as_json, named, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`info` has no options of its own."""


def run(args: argparse.Namespace) -> int:
    """The command."""
    machine = read_machine()
    print(as_json({"command": "info", "backend": machine.backend, **asdict(machine)}) if args.json else text(machine))
    return 0


def text(machine: Machine) -> str:
    """All of it, for people."""
    pairs = list(machine.versions.items())
    pairs += [("CuPy", machine.cupy.version or "not installed"), ("NVRTC", machine.cupy.nvrtc or "not found")]
    pairs += [("driver", driver_text(machine))]
    pairs += [("CPU", f"{machine.cpu}, {machine.workers} worker threads (CUPYFLASH_NUM_THREADS sets them)")]
    pairs += [
        (f"GPU {i}", f"{gpu.name}, sm_{gpu.arch}, {size(gpu.memory)}") for i, gpu in enumerate(machine.cupy.gpus)
    ] or [("GPU", "none that CuPy can use")]
    pairs += [(f"family {family.name}", family_text(family)) for family in machine.families]
    if machine.advice:
        pairs += [("advice", machine.advice)]
    return named(pairs)


def driver_text(machine: Machine) -> str:
    """The NVIDIA driver in one line."""
    driver = machine.driver
    if driver is None:
        return "no NVIDIA driver"
    return f"NVIDIA, for CUDA {driver.cuda}: {', '.join(driver.gpus) or driver.problem or 'no device'}"


def family_text(family: Family) -> str:
    """Whether and for what a family runs."""
    if family.why_not:
        return f"can't run on {family.device}: {family.why_not}"
    return f"runs on {family.device}: {', '.join(family.dtypes)}"

"""Run the library's CUDA kernels on the CPU, under a race and memory checker. See docs/emulator.md."""

import os

from .build import BuildError, compiler
from .device import Device, emulate
from .errors import KINDS, EmulatorError
from .schedule import Schedule

__all__ = ["KINDS", "BuildError", "Device", "EmulatorError", "Schedule", "compiler", "emulate", "why_not"]


def why_not() -> None:
    """Skip the running test where there is no C++ compiler; fail it where CI promises one."""
    import pytest

    if compiler() is None:
        reason = "the emulator needs GCC's g++ (or $CUPYFLASH_EMULATOR_CXX)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

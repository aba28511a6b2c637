"""Run the library's CUDA kernels on the CPU, under a race and memory checker. See docs/emulator.md."""

from .build import BuildError, compiler
from .device import Device, emulate
from .errors import KINDS, EmulatorError
from .schedule import Schedule

__all__ = ["KINDS", "BuildError", "Device", "EmulatorError", "Schedule", "compiler", "emulate"]

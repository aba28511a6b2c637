"""NVRTC without a GPU: compile a Spec for any architecture and read what ptxas says of it."""

import os
import re
from dataclasses import dataclass

import pytest

from cupyflash._compile import OPTIONS, Spec, source


@dataclass(frozen=True)
class Compiled:
    """What ptxas reports for the one kernel of a compilation."""

    registers: int
    spill_bytes: int
    stack_bytes: int  # arrays that registers could not hold
    log: str


def nvrtc():
    """CuPy's binding of NVRTC; skip without it, fail where CI promises it."""
    try:
        from cupy.cuda import nvrtc as binding

        binding.getVersion()
    except Exception as error:  # CuPy, or the library it loads, is missing
        if os.environ.get("CI"):
            pytest.fail(f"NVRTC can't be used: {error}")
        pytest.skip(f'NVRTC can\'t be used: {error}; pip install ".[cuda12x]"')
    return binding


def compile_spec(spec: Spec, smem: int, arch: str) -> Compiled:
    """Compile for ``arch`` with the options that a launch uses (CuPy adds -ftz=true); the kernel must need ``smem``."""
    binding = nvrtc()
    text = source(spec) + f'static_assert(SMEM_BYTES == {smem}, "the plan counts shared memory as the kernel does");\n'
    program = binding.createProgram(text, f"{spec.kernel}.cu", (), ())
    options = (*OPTIONS, f"-arch={arch}", "-ftz=true", "--ptxas-options=-v")
    try:
        binding.compileProgram(program, options)
    except binding.NVRTCError as error:
        pytest.fail(f"{spec.kernel} for {arch}: {error}\n{binding.getProgramLog(program)}\n{spec.prelude()}")
    log = binding.getProgramLog(program)
    binding.destroyProgram(program)
    spills = [int(n) for n in re.findall(r"stack frame, (\d+) bytes spill stores", log)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert registers, f"ptxas reports no registers:\n{log}"
    stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", log)]
    return Compiled(max(registers), sum(spills), sum(stack), log)

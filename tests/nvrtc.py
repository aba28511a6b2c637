"""NVRTC without a GPU: compile a Spec for any architecture and read what ptxas says of it."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cupyflash import Rotary, _planner, _rows, _tiles, explain, explain_decode
from cupyflash._compile import OPTIONS, Spec, source
from cupyflash._plan import DEVICES, Rows
from cupyflash._plan_decode import DecodeSpec
from cupyflash._problem import read_problem


@dataclass(frozen=True)
class Compiled:
    """What ptxas reports for the one kernel of a compilation."""

    registers: int
    spill_bytes: int
    stack_bytes: int  # arrays that registers could not hold
    serialised: bool  # wgmma waits for itself, which ptxas says in warning C7510 or one of its neighbours
    code_bytes: int  # of the kernel's instructions
    log: str

    def row(self) -> list[int | bool]:
        """What the table has of a kernel."""
        return [self.registers, self.spill_bytes, self.serialised, self.code_bytes]


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
    code = _code_bytes(binding.getCUBIN(program))
    binding.destroyProgram(program)
    spills = [int(n) for n in re.findall(r"stack frame, (\d+) bytes spill stores", log)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert registers, f"ptxas reports no registers:\n{log}"
    stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", log)]
    return Compiled(max(registers), sum(spills), sum(stack), re.search(r"C75\d\d", log) is not None, code, log)


def _code_bytes(cubin: bytes) -> int:
    """The size of the .text sections of an ELF file of 64 bits; 0 where there is none, for a virtual architecture."""
    if not cubin:
        return 0
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    strings = headers[names][4]

    def is_code(name: int) -> bool:
        return cubin[strings + name :].startswith(b".text")

    return sum(header[5] for header in headers if is_code(header[0]))


def version() -> str | None:
    """NVRTC's, as its package has it; None where it comes from elsewhere."""
    for name in ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


# ------------------------------------------------------------------------ what ptxas says of the tensor-core families

TABLE = Path(__file__).with_name("registers.json")
COLUMNS = "registers, spilled bytes, serialised, bytes of code"
PAIRS = (*((width, width) for width in _tiles.WIDTHS), (192, 128), (64, 128), (128, 64), (256, 64), (64, 256), (64, 48))
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)  # every row of the tile tables is for one of them


def hopper_specs() -> dict[str, tuple[Spec, int]]:
    """What calls on an sm_90 device are compiled to, and shared memory, by a short text."""
    found = {}
    for dtype, (dim, dim_v), causal, length in itertools.product(
        (np.float16, ml_dtypes.bfloat16), PAIRS, (False, True), LENGTHS
    ):
        q, v = (np.broadcast_to(np.zeros((), dtype), (1, length, width)) for width in (dim, dim_v))
        plans = [explain(q, q, v, causal=causal, device="sm_90")]
        for fixed_order in (True, False):
            plans.append(explain(q, q, v, causal=causal, device="sm_90", backward=True, deterministic=fixed_order))
        for step in (step for plan in plans for step in plan.kernels if step.name.endswith("_sm90")):
            found[text_of(step.spec)] = step.spec, step.smem
    return found


def hopper_candidates() -> dict[str, tuple[Spec, int]]:
    """What the tuner compiles on an sm_90 device, and shared memory, by a short text."""
    found, device = {}, DEVICES["sm_90"]
    for dim, causal in itertools.product((16, 32, 64, 80, 128, 192, 256), (False, True)):
        q = np.broadcast_to(np.zeros((), ml_dtypes.bfloat16), (2, 300, dim))
        problem = read_problem(q, q, q, scale=None, causal=causal, q_offset=None, layout="hsd", precision=None)
        for kernel, wrt in (("fwd_sm90", None), ("bwd_sm90", frozenset("qkv"))):
            for row in _rows.candidates(kernel, problem, device.smem):
                plan = _planner.plan_gpu(problem, device, None, Rows(rows=((kernel, row),)), wrt)
                (step,) = (step for step in plan.kernels if step.name == kernel)
                found[text_of(step.spec)] = step.spec, step.smem
    return found


AMPERE = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")  # with 163, 99 and 227 KB of shared memory


def ampere_specs() -> dict[str, tuple[Spec, int, str]]:
    """What the sm80 family compiles for a card, shared memory, and the card, by a short text that begins with it."""
    found = {}
    for device, (dim, dim_v), causal, length in itertools.product(AMPERE, PAIRS, (False, True), LENGTHS):
        for dtype in (ml_dtypes.bfloat16, np.float16) if device == "sm_80" else (ml_dtypes.bfloat16,):
            for heads, rows in ((1, length), (8, 16)):  # the latter share tiles
                q = np.broadcast_to(np.zeros((), dtype), (heads, rows, dim))
                k, v = (np.broadcast_to(np.zeros((), dtype), (1, length, width)) for width in (dim, dim_v))
                if heads > 1 and dim not in (64, 128):
                    continue
                plans = [explain(q, k, v, causal=causal, device=device, family="sm80")]
                if heads == 1 and dim == dim_v:
                    plans.append(explain(q, k, v, causal=causal, device=device, family="sm80", backward=True))
                for step in (step for plan in plans for step in plan.kernels if step.name.endswith("_sm80")):
                    found[f"{device}, {text_of(step.spec)}"] = step.spec, step.smem, device
    return found


WIDEST = ((64, 64), (96, 96), (64, 128), (128, 128), (192, 128), (192, 192), (256, 256))  # of the rows of its tables


def two_part_specs() -> dict[str, tuple[Spec, int, str]]:
    """What it compiles for P in two parts, for a card of each size of shared memory, by a short text likewise."""
    found = {}
    for device, (dim, dim_v), causal, dtype in itertools.product(
        ("sm_80", "sm_86", "sm_90"), WIDEST, (False, True), (ml_dtypes.bfloat16, np.float16)
    ):
        asked = {"causal": causal, "device": device, "family": "sm80", "precision": "highest"}
        for heads, rows in ((1, 4096), (8, 16)) if (dim, dim_v) == (128, 128) else ((1, 4096),):
            q = np.broadcast_to(np.zeros((), dtype), (heads, rows, dim))
            k, v = (np.broadcast_to(np.zeros((), dtype), (1, 4096, width)) for width in (dim, dim_v))
            plans = [explain(q, k, v, **asked)]
            if heads == 1 and dim == dim_v:
                plans.append(explain(q, k, v, backward=True, **asked))
            for step in (step for plan in plans for step in plan.kernels if step.name.endswith("_sm80")):
                found[f"{device}, {text_of(step.spec)}"] = step.spec, step.smem, device
    return found


WIDE = {np.float64: ("sm_80", "sm_90", "sm_100"), np.float32: ("sm_80", "sm_86", "sm_90", "sm_100")}
WIDE_PAIRS = (*((width, width) for width in (64, 96, 128, 160, 192, 256)), (64, 128), (192, 128))


def wide_specs() -> dict[str, tuple[Spec, int, str]]:
    """What float64 and float32 compile for tensor cores of a card, shared memory, and the card, by a short text."""
    found = {}
    for (dtype, devices), (dim, dim_v), causal in itertools.product(WIDE.items(), WIDE_PAIRS, (False, True)):
        q, v = (np.broadcast_to(np.zeros((), dtype), (1, 512, width)) for width in (dim, dim_v))
        precision = "highest" if dtype == np.float32 else None
        for device, backward in itertools.product(devices, (False, True)):
            plan = explain(q, q, v, causal=causal, device=device, backward=backward, precision=precision)
            for step in (step for step in plan.kernels if step.name in ("fwd_wide", "bwd_wide", "fwd_parts_sm90")):
                arch = f"{device}a" if step.name.endswith("_sm90") else device
                found[f"{device}, {text_of(step.spec)}"] = step.spec, step.smem, arch
    return found


def decode_specs(device: str) -> dict[str, list[tuple[Spec, int]]]:
    """What decoding compiles for a card, and shared memory, by kernel."""
    found: dict[str, dict[tuple[Spec, int], None]] = {}
    for dtype, dim, paged, appends, rows in itertools.product(
        (np.float16, ml_dtypes.bfloat16, np.float32, np.float64), _tiles.WIDTHS, (False, True), (False, True), (1, 16)
    ):
        q, new = (np.broadcast_to(np.zeros((), dtype), (2, heads, rows, dim)) for heads in (8, 2))
        shape = (80, 16, 2, dim) if paged else (2, 2, 640, dim)
        caches = [np.zeros(shape, dtype) for _ in range(2)]
        options = {"page_table": np.arange(80, dtype=np.int32).reshape(2, 40)} if paged else {}
        angles = np.zeros((640, dim // 2), np.float64 if dtype == np.float64 else np.float32)
        if appends:
            options |= {"k_new": new, "v_new": new, "rotary": Rotary(angles, angles, interleaved=paged)}
        for splits in (1, 2):
            plan = explain_decode(q, *caches, 1, num_splits=splits, device=device, **options)
            for step in plan.kernels:
                found.setdefault(step.name, {})[step.spec, step.smem] = None
    return {kernel: list(specs) for kernel, specs in found.items()}


def decode_rows() -> dict[str, tuple[Spec, int, str]]:
    """What decoding compiles for tensor cores of a card, shared memory, and the card, by a short text."""
    return {
        f"{device}, {text_of(spec)}": (spec, smem, device)
        for device in ("sm_80", "sm_86", "sm_90")
        for spec, smem in decode_specs(device)["decode_sm80"]
        if spec.element == ml_dtypes.bfloat16 and spec.splits and spec.appends
    }


def text_of(spec: Spec) -> str:
    """What differs between two Specs of a tensor-core family."""
    words = [spec.kernel, spec.element.name, f"{spec.head_dim}/{spec.head_dim_v}", "causal" if spec.causal else "full"]
    words += [f"{spec.block_m} x {spec.block_n}", f"{spec.num_stages} stages"]
    if spec.kernel == "fwd_sm90":
        words += [f"{spec.q_stages} of q", *(w for w in ("overlap", "take_turns") if getattr(spec, w))]
        words += ["2 blocks"] if spec.min_blocks == 2 else []
    elif spec.kernel == "fwd_sm80":
        words += [f"{spec.num_warps} warps", f"{spec.min_blocks} blocks", f"{spec.q_held} steps of q held"]
        words += [w for w in ("overlap", "pack_heads") if getattr(spec, w)]
    elif spec.kernel in ("bwd_sm80", "fwd_wide", "bwd_wide"):
        words += [f"{spec.num_warps} warps"]
    elif isinstance(spec, DecodeSpec):
        words += [f"{spec.num_warps} warps", f"{spec.q_held} steps of q held", "paged" if spec.paged else "in line"]
    elif spec.kernel == "bwd_sm90":
        words += ["fixed order" if spec.deterministic else "order of arrival"]
    return ", ".join([*words, "two parts"] if spec.split_p else words)


def main(parts: list[str]) -> None:
    """Write the table anew: ``python tests/nvrtc.py``, 40 minutes of one core.

    ``python tests/nvrtc.py decode_sm80 float32`` compiles rows that have one of these in their text, and rows that are
    new; the others stay.
    """
    specs = {text: (*spec, "sm_90a") for text, spec in hopper_specs().items()}
    specs |= ampere_specs() | two_part_specs() | wide_specs() | decode_rows()
    known = json.loads(TABLE.read_text())
    rows = known[COLUMNS] if parts and known["nvrtc"] == version() else {}
    rows = {text: rows[text] for text in specs if text in rows and not any(part in text for part in parts)}
    todo = [text for text in specs if text not in rows]
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda text: compile_spec(*specs[text]), todo)
        rows |= {text: compiled.row() for text, compiled in zip(todo, made, strict=True)}
    print(f"{len(todo)} of {len(rows)} rows compiled")
    lines = ",\n".join(f"    {json.dumps(text)}: {json.dumps(row)}" for text, row in sorted(rows.items()))
    kernels = f'  "{COLUMNS}": {{\n{lines}\n  }}\n'
    TABLE.write_text(f'{{\n  "nvrtc": {json.dumps(version())},\n{kernels}}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])

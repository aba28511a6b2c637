"""Conformance: one probe for each instruction, run on a GPU once, and in the emulator by every test run.

    python tests/emulator/golden.py FOLDER

on a machine with an H100 or H200 and CuPy runs every probe and writes FOLDER/golden.npz (the outputs) and
FOLDER/golden.txt (what they were made with); both belong into tests/emulator/golden/. Inputs are made from seeds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"
GOLDEN = HERE / "golden" / "golden.npz"
OPTIONS = ("-std=c++17", "-arch=sm_90a")
_INCLUDE = re.compile(r'^#include "([\w.]+)"$')

Bound = Callable[[np.ndarray], Any]  # the emulator's output -> how far the device's may lie from it


@dataclass(frozen=True)
class Out:
    """An array that the kernel writes: its first content, and how exact the emulator's copy of it is."""

    initial: np.ndarray
    bound: Bound | None = None  # None: bit for bit


@dataclass(frozen=True)
class Tensor:
    """A tensor map over an array, which the kernel may write."""

    array: np.ndarray
    data_type: int  # CUtensorMapDataType
    dims: tuple[int, ...]  # innermost first, as everything here
    strides: tuple[int, ...]  # bytes, from dimension 1 on
    box: tuple[int, ...]
    swizzle: int  # 0 none, 1, 2, 3: 32, 64, 128 bytes
    offset: int = 0  # bytes into the array


@dataclass(frozen=True)
class Case:
    """One launch of one probe."""

    name: str
    file: str
    entry: str
    args: tuple[Any, ...]  # arrays (read), Out, Tensor, Python ints for int, np scalars for others
    threads: int
    grid: int = 1
    shared: int = 0
    resident: int = 1  # blocks that wait for each other

    def fingerprint(self) -> str:
        """Of all that the output depends on; a golden file with another one is out of date."""
        digest = hashlib.sha256(repr((self.entry, self.threads, self.grid, self.shared)).encode())
        digest.update((HERE / "probes" / self.file).read_bytes())
        for x in self.args:
            x = x.initial if isinstance(x, Out) else x
            if isinstance(x, Tensor):
                digest.update(repr((x.data_type, x.dims, x.strides, x.box, x.swizzle, x.offset)).encode())
                x = x.array
            digest.update(x.tobytes() if isinstance(x, np.ndarray) else repr(x).encode())
        return digest.hexdigest()[:16]

    def outputs(self) -> list[Out]:
        return [x if isinstance(x, Out) else Out(x.array) for x in self.args if isinstance(x, (Out, Tensor))]


@functools.cache
def inline_text(file: Path) -> str:
    """A probe with its includes inlined, each once, under #line marks."""
    lines: list[str] = []
    seen: set[str] = set()

    def inline(path: Path) -> None:
        seen.add(path.name)
        lines.append(f'#line 1 "kernels/{path.name}"')
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            include = _INCLUDE.match(line)
            if include:
                if include[1] not in seen:
                    inline(KERNELS / include[1])
                lines.append(f'#line {number + 1} "kernels/{path.name}"')
            else:
                lines.append("" if line.strip() == "#pragma once" else line)

    inline(file)
    return "\n".join(lines) + "\n"


def run(case: Case, xp: Any, modules: dict[str, Any]) -> list[np.ndarray]:
    """The outputs of a case on CuPy, or on the emulator's device."""
    if case.file not in modules:
        modules[case.file] = xp.RawModule(code=inline_text(HERE / "probes" / case.file), options=OPTIONS)
    kernel = modules[case.file].get_function(case.entry)
    if case.shared > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = case.shared
    args, results = [], []
    for x in case.args:
        if isinstance(x, Out):
            results.append(xp.asarray(x.initial))
            args.append(results[-1])
        elif isinstance(x, Tensor):
            results.append(xp.asarray(x.array))
            args.append(tensor_map(xp, x, results[-1]))
        elif isinstance(x, np.ndarray):
            args.append(xp.asarray(x))
        else:
            args.append(np.int32(x) if isinstance(x, int) else x)
    kernel((case.grid,), (case.threads,), tuple(args), shared_mem=case.shared)
    return [x.get() for x in results]


def tensor_map(xp: Any, tensor: Tensor, array: Any) -> np.ndarray:
    """The 128 bytes of a tensor map, by the driver or by the emulator."""
    holder = np.zeros(192, np.uint8)
    start = -holder.ctypes.data % 64
    rank = len(tensor.dims)
    arguments = (
        ctypes.c_void_p(holder.ctypes.data + start), ctypes.c_int(tensor.data_type), ctypes.c_uint32(rank),
        ctypes.c_void_p(array.data.ptr + tensor.offset), (ctypes.c_uint64 * rank)(*tensor.dims),
        (ctypes.c_uint64 * max(rank - 1, 1))(*tensor.strides), (ctypes.c_uint32 * rank)(*tensor.box),
        (ctypes.c_uint32 * rank)(*(1,) * rank), 0, ctypes.c_int(tensor.swizzle), 0, 0,
    )  # fmt: skip
    if hasattr(xp, "encode_tiled"):
        xp.encode_tiled(*arguments)
    else:
        code = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(*arguments)
        if code:
            raise RuntimeError(f"cuTensorMapEncodeTiled: {code}")
    return np.frombuffer(holder[start : start + 128].tobytes(), np.dtype([("bytes", np.uint8, (128,))]))


# -------------------------------------------------------------------------------------------------------------- cases


def cases() -> Iterator[Case]:
    """Every case. Names are keys in the golden file."""
    for group in GROUPS:
        yield from group()


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _zeros(n: int, dtype: Any, bound: Bound | None = None) -> Out:
    return Out(np.zeros(n, dtype), bound)


def _float_bits() -> np.ndarray:
    """float32 numbers about every boundary of the 16-bit formats, and random bits."""
    exact = np.arange(65536, dtype=np.uint32)
    half = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    near = np.concatenate([exact << 16, half])
    near = near[::16]
    steps = np.array([0, 1, -1, 0x1000, 0x0FFF, 0x1001, 0x8000, 0x7FFF, 0x8001], np.int64)
    bits = (near[:, None].astype(np.int64) + steps).ravel() & 0xFFFFFFFF
    return np.concatenate([bits.astype(np.uint32), _rng("bits").integers(0, 2**32, 2**14, np.uint32)]).view(np.float32)


def _numbers() -> Iterator[Case]:
    def launch(name: str, *args: Any, n: int) -> Case:
        return Case(name, "numbers.cu", name, (*args, n), 256, -(-n // 256))

    every = np.arange(65536, dtype=np.uint16)
    yield launch("widen", every, _zeros(every.size, "f4"), _zeros(every.size, "f4"), n=every.size)
    x = _float_bits()
    shorts, words = (_zeros(x.size, t) for t in ("u2", "u4"))
    yield launch("narrow", x, shorts, shorts, words, words, n=x.size)
    r = _rng("functions")
    special = (0, -0.0, np.inf, -np.inf, np.nan, 128, 127.99999, -126, -126.5, -149, -150)
    spread = (r.uniform(-150, 130, 6000), r.standard_normal(2000), np.exp(r.uniform(-80, 80, 4000)))
    y = np.concatenate([*spread, np.linspace(-2, 2, 101), special])
    y = y.astype(np.float32)
    two_ulp = lambda z: 2 * np.spacing(np.abs(z))  # noqa: E731
    yield launch(
        "functions", y, _zeros(y.size, "f4", two_ulp), _zeros(y.size, "f4", two_ulp), _zeros(y.size, "f4"), n=y.size
    )


def _warps() -> Iterator[Case]:
    r = _rng("warp")
    x = r.integers(-1000, 1000, 128).astype(np.int32)
    yield Case("shuffles", "warp.cu", "shuffles", (x, _zeros(32 * 160, "i4")), 32)
    yield Case(
        "words",
        "warp.cu",
        "words",
        (r.standard_normal(32, np.float32), _zeros(256, "f4"), r.standard_normal(32), _zeros(256, "f8")),
        32,
    )
    yield Case("votes", "warp.cu", "votes", (x, _zeros(416, "i4")), 32)
    yield Case("block_votes", "warp.cu", "block_votes", (np.abs(x) % 200, _zeros(384, "i4")), 128)
    numbers = (_zeros(12, "i4"), _zeros(8, "u4"), _zeros(2, "u8"), _zeros(16, "f4"), _zeros(2, "f8"))
    numbers[1].initial[2] = 0xFFFFFFFF
    numbers[1].initial[0] = 500
    numbers[0].initial[6] = 5
    yield Case("atomics", "warp.cu", "atomics", (x, *numbers), 128)
    yield Case("flags", "warp.cu", "flags", (_zeros(65, "i4"), _zeros(2, "i4"), _zeros(65, "i4")), 64, 2, resident=2)
    yield Case("barriers", "warp.cu", "barriers", (x, _zeros(64, "i4")), 128, shared=512)


def _pack(x: np.ndarray, kind: str) -> np.ndarray:
    """Numbers as 16-bit elements, two in a word."""
    if kind == "float16":
        return x.astype(np.float16).view(np.uint32)
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint32)


def _mma() -> Iterator[Case]:
    shapes = {  # entry: registers of d, a, b
        "m16n8k16_float16": (4, 4, 2), "m16n8k16_bfloat16": (4, 4, 2), "m16n8k8_float16": (4, 2, 1),
        "m16n8k8_bfloat16": (4, 2, 1), "m16n8k4_tf32": (4, 2, 1), "m16n8k8_tf32": (4, 4, 2),
        "m8n8k4_f64": (2, 1, 1), "m16n8k4_f64": (4, 2, 1), "m16n8k8_f64": (4, 4, 2), "m16n8k16_f64": (4, 8, 4),
    }  # fmt: skip
    for entry, (d, a, b) in shapes.items():
        for data in ("integers", "normal"):
            r = _rng(entry + data)
            kind = entry.split("_")[1]
            each = 2 if "float16" in kind else 1

            def numbers(n: int) -> np.ndarray:
                return r.integers(-9, 10, n).astype(float) if data == "integers" else r.standard_normal(n)  # noqa: B023

            x, y, c = numbers(32 * a * each), numbers(32 * b * each), numbers(32 * d)
            if kind == "f64":
                operands = (x, y, c, Out(np.zeros(32 * d)))
            elif kind == "tf32":  # float32 numbers whose low bits the product must not read
                u, v = (
                    z.astype(np.float32).view(np.uint32) | (r.integers(0, 2**13, z.size).astype(np.uint32))
                    for z in (x, y)
                )
                operands = (u, v, c.astype(np.float32), _zeros(32 * d, "f4"))
            else:
                operands = (_pack(x, kind), _pack(y, kind), c.astype(np.float32), _zeros(32 * d, "f4"))
            yield Case(f"{entry}.{data}", "mma.cu", entry, operands, 32)


def _matrices() -> Iterator[Case]:
    r = _rng("matrix")
    memory = r.integers(0, 2**32, 1024, np.uint32)
    rows = (r.permutation(256)[:32] * 16).astype(np.int32)
    yield Case("ldmatrix", "matrix.cu", "load_matrices", (memory, rows, _zeros(32 * 15, "u4")), 32, shared=4096)
    for count in (1, 2, 4):
        for suffix in ("", "_trans"):
            values = r.integers(0, 2**32, 128, np.uint32)
            entry = f"store_x{count}{suffix}"
            yield Case(
                f"stmatrix_x{count}{suffix}",
                "matrix.cu",
                entry,
                (memory, rows, values, _zeros(1024, "u4")),
                32,
                shared=4096,
            )
    source = r.integers(0, 256, 1024).astype(np.uint8)
    yield Case("cp_async", "matrix.cu", "copies", (memory, source, _zeros(1024 + 32, "u4")), 32, shared=4096)


def _bulk() -> Iterator[Case]:
    r = _rng("bulk")
    x = r.integers(-100, 100, 2048).astype(np.float32)
    for first, count in ((0, 512), (16, 64), (4, 8)):
        yield Case(
            f"bulk_load_{first}_{count}", "bulk.cu", "bulk_in", (x, _zeros(1024, "f4"), first, count), 128, shared=4224
        )
    doubles = r.integers(-100, 100, 512).astype(np.float64)
    outs = (
        _zeros(1024, "f4"),
        Out(r.integers(-9, 9, 512).astype(np.float32)),
        Out(r.integers(-9, 9, 128).astype(np.float64)),
        _zeros(1, "f4"),
    )
    source = x[:1024].copy()
    source[:256] = doubles[:128].view(np.float32)  # what the float64 addition reads
    yield Case("bulk_store", "bulk.cu", "bulk_out", (source, *outs), 128, shared=4224)
    yield Case("bulk_round_trip", "bulk.cu", "round_trip", (x, _zeros(256, "f4"), _zeros(256, "f4")), 128, shared=4224)
    yield Case("mbarrier", "bulk.cu", "phases", (_zeros(10, "i4"),), 128, shared=4224)


_WIDTH = {0: 64, 1: 32, 2: 64, 3: 128}  # bytes of a box's inner dimension under each swizzle
_U16, _F32 = 1, 7  # CUtensorMapDataType


def _tensors() -> Iterator[Case]:
    dims = {2: (72, 20), 3: (72, 12, 5), 4: (72, 9, 4, 3), 5: (72, 7, 3, 3, 2)}
    boxes = {2: (16,), 3: (6, 4), 4: (5, 3, 2), 5: (4, 2, 2, 2)}
    corners = {2: ((0, 0), (40, 8), (-8, -3), (56, 13)), 3: ((8, 3, 1), (-16, -2, 3), (64, 9, -1)),
               4: ((0, 0, 0, 0), (24, 6, -1, 2)), 5: ((8, 1, 1, 1, 0), (-24, 5, 2, -1, 1))}  # fmt: skip
    for rank, shape in dims.items():
        for swizzle, width in _WIDTH.items():
            box = (width // 2, *boxes[rank])
            pitch = [160]
            for n in shape[1:-1]:
                pitch.append(pitch[-1] * n + 32)
            strides = tuple(pitch[: rank - 1])
            nbytes = strides[-1] * shape[-1] + 64
            for number, corner in enumerate(corners[rank]):
                name = f"tensor_{rank}d_swizzle{width if swizzle else 0}_{number}"
                r = _rng(name)
                memory = r.integers(0, 2**16, nbytes // 2).astype(np.uint16)
                tensor = Tensor(memory, _U16, shape, strides, box, swizzle, offset=32)
                count = int(np.prod(box)) * 2
                at = (*corner, 0, 0, 0)[:5]
                yield Case(
                    f"{name}.load",
                    "tensor.cu",
                    "box_in",
                    (tensor, _zeros(count // 4, "u4"), rank, count, *at),
                    128,
                    shared=33800,
                )
                words = r.integers(0, 2**32, count // 4, np.uint32)
                # An H200 stops with an illegal instruction where a store begins before the tensor; loads may.
                inside = tuple(max(c, 0) for c in at)
                yield Case(
                    f"{name}.store", "tensor.cu", "box_out", (tensor, words, 0, rank, count, *inside), 128, shared=33800
                )
    r = _rng("tensor_add")
    memory = r.integers(-50, 50, 4 * 3 * 9 * 40).astype(np.float32)
    tensor = Tensor(memory, _F32, (36, 9, 3, 4), (160, 1440, 4320), (32, 5, 2, 3), 3)
    values = r.integers(-50, 50, 960).astype(np.float32).view(np.uint32)
    for number, corner in enumerate(((0, 0, 0, 0), (12, 6, 1, 2))):
        yield Case(
            f"tensor_add_{number}", "tensor.cu", "box_out", (tensor, values, 1, 4, 3840, *corner, 0), 128, shared=33800
        )


def _descriptor(leading: int, stride: int, swizzle: int, start: int = 0) -> np.uint64:
    """As kernels/descriptors.cuh; swizzle is a width in bytes."""
    code = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return np.uint64(start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | code << 62)


def _operand(major: str, swizzle: int, rows: int, start: int) -> tuple[np.uint64, int]:
    """A descriptor of (rows, 16 k) elements from `start` on, and the bytes to the next 16 along k."""
    if major == "k":
        if not swizzle:
            return _descriptor(128, 256, 0, start), 256 * (rows // 8)
        return _descriptor(16, 8 * swizzle, swizzle, start), 32 if swizzle > 32 else 32 * rows
    if not swizzle:  # stride: 8 elements on along M or N; leading: 8 on along k
        return _descriptor(128 * (rows // 8), 128, 0, start), 256 * (rows // 8)
    per_chunk = swizzle // 2
    chunks = -(-rows // per_chunk)
    return _descriptor(1024 * 16, 8 * swizzle, swizzle, start) if chunks > 1 else _descriptor(
        16, 8 * swizzle, swizzle, start
    ), 16 * swizzle


def _wgmma() -> Iterator[Case]:
    shared = 24 * 1024 * 4 + 1024
    for data in ("integers", "normal"):
        r = _rng("wgmma" + data)
        numbers = r.integers(-4, 5, 48 * 1024).astype(float) if data == "integers" else r.standard_normal(48 * 1024)
        memory = {kind: _pack(numbers, kind) for kind in ("float16", "bfloat16")}

        def ss(entry: str, a: str, b: str, swizzle: int, n: int, kind: str = "float16") -> Case:
            first, step_a = _operand(a, swizzle, 64, 0)
            second, step_b = _operand(b, swizzle, n, 32 * 1024)
            out = _zeros(64 * n, "f4")
            name = f"wgmma_{entry}_swizzle{swizzle}.{data}"  # noqa: B023
            return Case(name, "wgmma.cu", entry, (memory[kind], first, second, step_a, step_b, out), 128, shared=shared)  # noqa: B023

        def rs(entry: str, b: str, swizzle: int, n: int, kind: str) -> Case:
            descriptor, step = _operand(b, swizzle, n, 32 * 1024)
            fragments = _pack(numbers[:2048], kind)  # noqa: B023
            out = _zeros(64 * n, "f4")
            name = f"wgmma_{entry}_swizzle{swizzle}.{data}"  # noqa: B023
            return Case(name, "wgmma.cu", entry, (memory[kind], fragments, descriptor, step, out), 128, shared=shared)  # noqa: B023

        for swizzle in (0, 32, 64, 128):
            yield ss("ss_k_k_64", "k", "k", swizzle, 64)
            yield ss("ss_k_mn_64", "k", "mn", swizzle, 64)
            yield ss("ss_mn_k_64", "mn", "k", swizzle, 64)
            yield ss("ss_mn_mn_64", "mn", "mn", swizzle, 64)
        yield ss("ss_k_k_64_bfloat16", "k", "k", 128, 64, "bfloat16")
        yield ss("ss_k_k_8", "k", "k", 128, 8)
        yield ss("ss_k_k_80", "k", "k", 64, 80)
        yield ss("ss_k_k_176", "k", "k", 128, 176, "bfloat16")
        yield ss("ss_k_mn_192", "k", "mn", 128, 192)
        yield ss("ss_k_k_256", "k", "k", 128, 256)
        yield rs("rs_k_64", "k", 128, 64, "float16")
        yield rs("rs_mn_128", "mn", 128, 128, "bfloat16")


GROUPS = (_numbers, _warps, _mma, _matrices, _bulk, _tensors, _wgmma)


# --------------------------------------------------------------------------------------------------- made on a device


def make(folder: Path) -> int:
    """Run everything on the GPU at hand; a probe that fails is named and left out.

    Each group has a process of its own, so that neither a hang nor a broken context takes the others along.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for group in GROUPS:
            part = Path(scratch) / group.__name__
            command = [sys.executable, str(Path(__file__).resolve()), "--group", group.__name__, str(part)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
                if done.returncode:
                    notes.append(f"{group.__name__}: {done.stderr[-2000:]}")
            except subprocess.TimeoutExpired:
                notes.append(f"{group.__name__}: not done after 100 s")
            made, failed = _read_group(part)
            arrays |= made
            notes += failed
    np.savez_compressed(folder / "golden.npz", **arrays)
    wanted = {case.name for case in cases()}
    missing = sorted(wanted - {name.rsplit(".", 1)[0] for name in arrays})
    lines = [
        *_machine(),
        f"{len(wanted) - len(missing)} of {len(wanted)} cases",
        *(f"missing: {name}" for name in missing),
        *notes,
    ]
    (folder / "golden.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 1 if missing else 0


def _make_group(name: str, part: Path) -> None:
    """One group in this process; what is done is on disk before the next case starts."""
    import cupy

    modules: dict[str, Any] = {}
    with part.open("wb") as file:
        for case in next(group for group in GROUPS if group.__name__ == name)():
            try:
                result: Any = run(case, cupy, modules)
            except Exception:
                result = f"{case.name}: {traceback.format_exc(limit=2)}"
            pickle.dump((case.name, case.fingerprint(), result), file)
            file.flush()


def _read_group(part: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    arrays, failed = {}, []
    with contextlib.suppress(EOFError, FileNotFoundError), part.open("rb") as file:
        while True:
            name, fingerprint, result = pickle.load(file)
            if isinstance(result, str):
                failed.append(result)
                continue
            arrays |= {f"{name}.{i}": x for i, x in enumerate(result)}
            arrays[f"{name}.fingerprint"] = np.array(fingerprint)
    return arrays, failed


def _machine() -> list[str]:
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(runtime.getDevice())
    return [
        f"device {properties['name'].decode()}, sm_{properties['major']}{properties['minor']}",
        f"driver {runtime.driverGetVersion()}, NVRTC {cupy.cuda.nvrtc.getVersion()}, CuPy {cupy.__version__}",
    ]


if __name__ == "__main__":
    if sys.argv[1] == "--group":
        _make_group(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(make(Path(sys.argv[1])))

"""What this machine has: driver, CuPy, GPUs, versions, kernel families; and what to install if that lacks."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .. import __version__, _planner
from .._arrays import DTYPES
from .._plan import Device
from .._planner import CPU_FAMILY, GPU_FAMILIES
from .._problem import read_problem
from .._workers import worker_count

OLDEST_CUDA = 12000  # what the extras' CuPy wheels need of a driver, as cuDriverGetVersion counts


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver, asked without CuPy."""

    version: int  # 1000 * major + 10 * minor of the newest CUDA it runs
    gpus: tuple[str, ...]
    problem: str | None = None

    @property
    def cuda(self) -> str:
        """The newest CUDA version that the driver runs."""
        return cuda_version(self.version)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as CuPy sees it."""

    name: str
    arch: int  # 90 for compute capability 9.0
    memory: int  # bytes
    smem: int  # bytes of shared memory that one thread block may have
    sms: int  # multiprocessors


@dataclass(frozen=True)
class Cupy:
    """CuPy and what it reaches; `problem` says why it can't be used here."""

    version: str | None = None
    nvrtc: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Family:
    """A kernel family on one device; `why_not` where it can't run."""

    name: str
    device: str
    dtypes: tuple[str, ...] = ()
    why_not: str | None = None


@dataclass(frozen=True)
class Machine:
    """All of it."""

    versions: dict[str, str]
    cpu: str
    workers: int
    driver: Driver | None
    cupy: Cupy
    families: tuple[Family, ...]
    advice: str | None

    @property
    def backend(self) -> str:
        """The best there is: "cupy" or "numpy"."""
        return "numpy" if self.cupy.problem else "cupy"


def read_machine() -> Machine:
    """Look around. Imports CuPy where it is installed."""
    driver = read_driver()
    cupy = read_cupy(driver)
    return Machine(
        versions=read_versions(),
        cpu=cpu_name(),
        workers=worker_count(),
        driver=driver,
        cupy=cupy,
        families=read_families(cupy),
        advice=advise(driver, cupy),
    )


def cuda_version(number: int) -> str:
    """12040 as "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"


# ----------------------------------------------------------------------------------------------- driver, CuPy


def read_driver(load: Callable[[str], Any] = ctypes.CDLL) -> Driver | None:
    """Ask the driver's own library, which needs no CUDA toolkit; None where there is no driver."""
    try:
        cuda = load("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return Driver(0, (), "cuDriverGetVersion failed")
    status = cuda.cuInit(0)
    if status != 0:
        meaning = "no CUDA device" if status == 100 else "see CUresult in the CUDA driver API"  # CUDA_ERROR_NO_DEVICE
        return Driver(version.value, (), f"cuInit returned {status}: {meaning}")
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    return Driver(version.value, tuple(_driver_gpu(cuda, i) for i in range(count.value)))


def _driver_gpu(cuda: Any, index: int) -> str:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    return name.value.decode(errors="replace")


def read_cupy(driver: Driver | None) -> Cupy:
    """Import CuPy and ask it for NVRTC and, where there is a driver, for devices."""
    if importlib.util.find_spec("cupy") is None:
        return Cupy(problem="CuPy is not installed")
    try:
        import cupy
    except Exception as error:  # a broken installation may raise anything
        return Cupy(problem=f"CuPy does not import: {first_line(error)}")
    version = str(cupy.__version__)
    try:
        nvrtc = "{}.{}".format(*cupy.cuda.nvrtc.getVersion())
    except Exception as error:
        return Cupy(version, problem=f"NVRTC, which compiles the kernels, is not found: {first_line(error)}")
    if driver is None:
        return Cupy(version, nvrtc, problem="no NVIDIA driver")
    try:
        gpus = tuple(_cupy_gpu(cupy, i) for i in range(cupy.cuda.runtime.getDeviceCount()))
    except Exception as error:
        return Cupy(version, nvrtc, problem=f"no CUDA device: {first_line(error)}")
    return Cupy(version, nvrtc, gpus, problem=None if gpus else "no CUDA device")


def _cupy_gpu(cupy: Any, index: int) -> Gpu:
    found = cupy.cuda.runtime.getDeviceProperties(index)
    return Gpu(
        name=found["name"].decode(),
        arch=10 * found["major"] + found["minor"],
        memory=found["totalGlobalMem"],
        smem=found["sharedMemPerBlockOptin"],
        sms=found["multiProcessorCount"],
    )


def advise(driver: Driver | None, cupy: Cupy) -> str | None:
    """What to install so that the GPU, whose driver is here, is used; None where nothing is to be said."""
    if driver is None or cupy.problem is None:
        return None
    gpus = ", ".join(driver.gpus) or "no GPU"
    found = f"an NVIDIA driver for CUDA {driver.cuda} is here ({gpus}), but "
    if driver.version < OLDEST_CUDA:
        return f"{found}CuPy needs a driver for CUDA {cuda_version(OLDEST_CUDA)} or newer: update the driver"
    if not driver.gpus:
        return f"{found}{driver.problem or 'it reports no device'}"
    extra = "cuda13x" if driver.version >= 13000 else "cuda12x"
    return f'{found}{cupy.problem}:\npython -m pip install "cupyflash[{extra}]" adds what fits this driver'


def first_line(error: BaseException) -> str:
    """An exception in one line: what it says first; of a compiler's log the errors, which warnings may precede."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =*-")]
    errors = [line for line in lines if _COMPILER_ERROR.search(line) and not _AFTERMATH.search(line)]
    if errors:
        more = f" (and {len(errors) - MOST_ERRORS} more errors)" if len(errors) > MOST_ERRORS else ""
        return "; ".join(errors[:MOST_ERRORS]) + more
    return lines[0] if lines else type(error).__name__


MOST_ERRORS = 3
# nvcc and NVRTC: `file(12): error: ...`, `nvrtc: error: ...`; ptxas: `ptxas fatal   : ...`, `line 12; error   : ...`.
_COMPILER_ERROR = re.compile(r"(?:^ptxas fatal|^ptxas error|[:;] (?:fatal |catastrophic )?error(?: #\d+(?:-D)?)?)\s*:")
_AFTERMATH = re.compile(r"aborted due to errors")


# ----------------------------------------------------------------------------------------- versions, families


def read_versions() -> dict[str, str]:
    """Versions of everything but the GPU's side."""
    return {
        "cupyflash": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "NumPy": np.__version__,
        "BLAS": blas_name(),
        "ml_dtypes": ml_dtypes.__version__,
        "threadpoolctl": importlib.metadata.version("threadpoolctl"),
    }


def blas_name() -> str:
    """The BLAS library that NumPy has loaded, as far as threadpoolctl knows it."""
    from threadpoolctl import threadpool_info

    found = []
    for lib in threadpool_info():
        if lib["user_api"] == "blas":
            details = [lib[name] for name in ("architecture", "threading_layer") if lib.get(name)]
            found.append(f"{lib['internal_api']} {lib['version']} ({', '.join(details)})")
    return ", ".join(found) or "unknown"


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def read_families(cupy: Cupy) -> tuple[Family, ...]:
    """Every family on every device, as the planner sees it."""
    names = tuple(dtype.name for dtype in DTYPES)
    found = [Family(CPU_FAMILY, "NumPy arrays", names)]
    for family in GPU_FAMILIES:
        if cupy.problem:
            found.append(Family(family, "CuPy arrays", why_not=cupy.problem))
        for gpu in () if cupy.problem else cupy.gpus:
            found.append(_gpu_family(family, gpu))
    return tuple(found)


def _gpu_family(family: str, gpu: Gpu) -> Family:
    """Ask the planner, for each dtype, whether the family takes a plain problem on this GPU."""
    device, label = Device(gpu.name, gpu.arch, gpu.smem, gpu.sms), f"{gpu.name} (sm_{gpu.arch})"
    dtypes: list[str] = []
    reasons: list[str] = []
    for dtype in DTYPES:
        q = np.empty((1, 64, 64), dtype)
        problem = read_problem(q, q, q, scale=None, causal=False, q_offset=None, layout="hsd", precision=None)
        try:
            _planner.plan_gpu(problem, device, family, None, None, ())
        except ValueError as error:
            reasons.append(first_line(error))
        else:
            dtypes.append(dtype.name)
    return Family(family, label, tuple(dtypes), why_not=None if dtypes else reasons[0])

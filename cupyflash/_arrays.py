"""What arrays come in: NumPy, CuPy, and whatever speaks DLPack or ``__cuda_array_interface__``.

``take`` turns one argument into a NumPy or CuPy array without copying it; ``place`` says where it lies.
CuPy is imported here and nowhere before, and only when an argument asks for a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))

Array = Any  # numpy.ndarray or cupy.ndarray; CuPy has no type stubs
ArraySpec = tuple[str, tuple[int, ...], np.dtype]  # name, shape, dtype of a new array

_DLPACK_CPU = (1, 3)  # kDLCPU, kDLCUDAHost
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


def import_cupy() -> ModuleType:
    """CuPy, or an ImportError that names the extra to install."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            'arrays on a CUDA device need CuPy: pip install "cupyflash[cuda12x]" or "cupyflash[cuda13x]", '
            "whichever matches the driver (`python -m cupyflash info` tells)"
        ) from error
    return cupy  # type: ignore[no-any-return]


def is_cupy(x: object) -> bool:
    """Whether x is a CuPy array; imports nothing."""
    module = type(x).__module__
    return module == "cupy" or (module.startswith("cupy.") and hasattr(x, "device"))


def take(name: str, x: object) -> Array:
    """View x as a NumPy or CuPy array, without a copy; TypeError if it is no array."""
    if type(x) is np.ndarray or is_cupy(x):
        return x
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name} is a masked array: masks are not read; fill it, or pass the plain .data")
        return x.view(np.ndarray)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _take_dlpack(name, x)
    if hasattr(x, "__cuda_array_interface__"):
        return _take_cuda(name, x, "asarray")
    raise TypeError(
        f"{name} is {_a(x)}: attention takes arrays (NumPy, CuPy, or any object with __dlpack__ or "
        "__cuda_array_interface__)"
    )


def _take_cuda(name: str, x: Any, reader: str) -> Array:
    cupy = import_cupy()
    try:
        return getattr(cupy, reader)(x)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ValueError(f"{name} is {_a(x)} on a CUDA device, which CuPy can't read here: {error}") from error


def _take_dlpack(name: str, x: Any) -> Array:
    device_type, device_id = x.__dlpack_device__()
    if int(device_type) in _DLPACK_CUDA:
        return _take_cuda(name, x, "from_dlpack")
    if int(device_type) not in _DLPACK_CPU:
        raise TypeError(
            f"{name} lies on DLPack device ({int(device_type)}, {device_id}): only CPU and CUDA memory is read"
        )
    try:
        return np.from_dlpack(x)
    except Exception as error:
        # NumPy reads no bfloat16 from DLPack; JAX hands it out as an ml_dtypes array instead.
        try:
            return np.asarray(x)
        except Exception:
            raise TypeError(f"{name} is {_a(x)} that NumPy can't read through DLPack: {error}") from error


def place(x: Array) -> int | None:
    """The CUDA device that holds x, or None for host memory."""
    return None if isinstance(x, np.ndarray) else int(x.device.id)


def same_place(named: dict[str, Array]) -> int | None:
    """The one place of all arrays; an error names the first two that differ."""
    places = {place(x) for x in named.values()}
    if len(places) == 1:
        return places.pop()
    names = iter(named.items())
    first, x = next(names)
    where = place(x)
    for name, y in names:
        other = place(y)
        if other == where:
            continue
        if where is None or other is None:
            raise TypeError(f"{first} is {_lies(where)}, {name} is {_lies(other)}: one call stays on one side")
        raise ValueError(f"{first} is {_lies(where)}, {name} is {_lies(other)}: one call stays on one device")
    return where


def check_beside(name: str, x: Array, where: int | None) -> None:
    """Check that a small array may go beside q, which lies at ``where``: on its device, or on the host."""
    other = place(x)
    if other is not None and where is None:
        raise TypeError(f"{name} is a CuPy array, q a NumPy array: one call stays on one side")
    if other is not None and other != where:
        raise ValueError(f"{name} lies on CUDA device {other}, q on {where}: one device for a call")


def on_device(device: int | None) -> AbstractContextManager[Any]:
    """Make a CUDA device current for a while; nothing for host memory, or where it is current already."""
    if device is None:
        return nullcontext()
    cuda = import_cupy().cuda
    return nullcontext() if cuda.runtime.getDevice() == device else cuda.Device(device)


def address(x: Array) -> int:
    """Where the element at index 0 of every axis lies."""
    return int(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)


def broadcasts_to(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether an array of ``shape`` broadcasts to ``full``."""
    try:
        return np.broadcast_shapes(shape, full) == full
    except ValueError:
        return False


def misaligned(x: Array) -> str | None:
    """Why kernels can't read x in place: they count strides and addresses in elements. None where they can."""
    itemsize = x.itemsize
    for stride in x.strides:
        if stride % itemsize:
            return f"strides {x.strides} are not multiples of the {itemsize}-byte elements"
    if address(x) % itemsize and x.size:
        return f"its address is not a multiple of the {itemsize}-byte elements"
    return None


def share_memory(x: Array, y: Array) -> bool:
    """Whether an element of x and one of y lie on the same byte, exactly, on either side."""
    low_x, high_x = extent(x)
    low_y, high_y = extent(y)
    return low_x < high_y and low_y < high_x and np.shares_memory(_twin(x), _twin(y))


def extent(x: Array) -> tuple[int, int]:
    """First byte and last byte + 1 of x; empty for an empty array."""
    low = high = address(x)
    if x.size == 0:
        return low, low
    for stride, n in zip(x.strides, x.shape, strict=True):
        if stride < 0:
            low += stride * (n - 1)
        else:
            high += stride * (n - 1)
    return low, high + x.itemsize


class _Interface:
    """An array's address, shape and strides as NumPy reads them from a foreign object."""

    def __init__(self, x: Array) -> None:
        self.__array_interface__ = {
            "data": (address(x), True),
            "shape": x.shape,
            "strides": x.strides,
            "typestr": f"|V{x.itemsize}",
            "version": 3,
        }


def _twin(x: Array) -> np.ndarray:
    """A NumPy array with x's address, shape and strides, whose elements must not be read."""
    return x if isinstance(x, np.ndarray) else np.asarray(_Interface(x))


def elements_overlap(x: Array) -> bool:
    """Whether two indices of x name the same memory (a zero stride, say).

    Nested strides can't overlap: sorted by size, each stride clears the span of those below it. What fails
    that test is counted out, element by element.
    """
    span = x.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < span:
            break
        span += stride * (n - 1)
    else:
        return False
    if x.size == 0:
        return False
    offsets = np.zeros((), np.int64)
    for stride, n in zip(x.strides, x.shape, strict=True):
        offsets = np.add.outer(offsets, np.arange(n, dtype=np.int64) * stride)
    gaps = np.diff(np.sort(offsets, axis=None))
    return bool((gaps < x.itemsize).any())


def _a(x: object) -> str:
    kind = type(x)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _lies(where: int | None) -> str:
    return "a NumPy array" if where is None else f"on CUDA device {where}"

"""Device memory of the emulator, and arrays in it that behave like CuPy's as far as this library uses them."""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import numpy as np

from . import build


class Allocation:
    """Bytes of their own, far from any others. ``filled``: all of them hold values that kernels may build on."""

    def __init__(self, nbytes: int, filled: bool | None, itemsize: int = 1) -> None:
        library = build.core()
        self.handle = library.emulator_allocate(max(nbytes, 1))
        if not self.handle:
            raise MemoryError(f"{nbytes} bytes")
        self.nbytes = max(nbytes, 1)
        self.ptr = library.emulator_data(self.handle)
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.ptr))
        self.itemsize = itemsize
        self.filled = filled  # True: by the host; False: nothing yet; None: by the host, but outputs in it are not
        self.granule: int | None = None  # once a launch may have written here
        self.written: np.ndarray | None = None  # granule by granule, where a launch has been undone
        weakref.finalize(self, library.emulator_free, self.handle)


class MemoryPointer:
    """As cupy.cuda.MemoryPointer: an address that keeps its memory alive."""

    def __init__(self, allocation: Allocation, offset: int) -> None:
        self.allocation = allocation
        self.offset = offset
        self.ptr = allocation.ptr + offset
        self.device_id = DEVICE_NUMBER

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.allocation, self.offset + offset)


class _Device:
    def __init__(self, number: int) -> None:
        self.id = number


DEVICE_NUMBER = 1000  # no real device has it, so that nothing cached for one is taken for the other


class ndarray:
    """An array in emulated device memory: views, copies from and to the host, no arithmetic."""

    device = _Device(DEVICE_NUMBER)

    def __init__(self, shape: Any, dtype: Any = np.float32, memptr: Any = None, strides: Any = None) -> None:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        if memptr is None:
            memptr = MemoryPointer(Allocation(math.prod(shape) * dtype.itemsize, False, dtype.itemsize), 0)
        self.allocation = memptr.allocation
        if math.prod(shape):
            self.host = np.ndarray(shape, dtype, self.allocation.bytes, memptr.offset, strides)
        else:
            self.host = np.ndarray(shape, dtype, strides=strides, buffer=np.empty(1, np.uint8)[:0])
        self._offset = memptr.offset

    def _view(self, host: np.ndarray) -> ndarray:
        view = object.__new__(ndarray)
        view.allocation, view.host = self.allocation, host
        view._offset = host.ctypes.data - self.allocation.ptr if host.size else self._offset
        return view

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    strides = property(lambda self: self.host.strides)
    itemsize = property(lambda self: self.host.itemsize)
    size = property(lambda self: self.host.size)
    ndim = property(lambda self: self.host.ndim)
    nbytes = property(lambda self: self.host.nbytes)
    flags = property(lambda self: self.host.flags)
    data = property(lambda self: MemoryPointer(self.allocation, self._offset))
    T = property(lambda self: self._view(self.host.T))

    def __getitem__(self, index: Any) -> ndarray:
        return self._view(self.host[index] if self.host.size else np.asarray(self.host[index]))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.host[index] = value.host if isinstance(value, ndarray) else value
        self.allocation.filled = True
        self.allocation.granule = None

    def __len__(self) -> int:
        return len(self.host)

    def get(self) -> np.ndarray:
        return self.host.copy()

    def reshape(self, *shape: Any) -> ndarray:
        host = self.host.reshape(*shape)
        if not np.shares_memory(host, self.host) and host.size:
            raise NotImplementedError("a reshape that copies")
        return self._view(host)

    def transpose(self, *axes: Any) -> ndarray:
        return self._view(self.host.transpose(*axes))

    def swapaxes(self, a: int, b: int) -> ndarray:
        return self._view(self.host.swapaxes(a, b))


ndarray.__module__ = "cupy"  # what the library asks an array for

"""What arrays come in: NumPy's kinds, and whatever speaks DLPack or an array interface, all read in place."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cupyflash import AttentionGradients, attention, attention_backward
from cupyflash.testing import data


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal(s).astype(dtype)
        for s in ((2, 4, 9, 8), (2, 2, 11, 8), (2, 2, 11, 5), (2, 4, 9, 5))
    ]


def both(q, k, v, dout):
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    return (out, lse, *attention_backward(dout, q, k, v, out, lse, causal=True)[:3])


def assert_same(backend, got, want):
    for a, b in zip(got, want, strict=True):
        assert backend.numpy(a).tobytes() == backend.numpy(b).tobytes()


class OwnDLPack:
    """DLPack and nothing else: what another library's array looks like."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OldDLPack(OwnDLPack):
    """DLPack as it was before version 1: no keyword but `stream`."""

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__() if stream is None else self.array.__dlpack__(stream=stream)


class OwnCuda:
    """`__cuda_array_interface__` and nothing else."""

    def __init__(self, array):
        self.array = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__


# ------------------------------------------------------------------------------------------------------ NumPy


class Subclass(np.ndarray):
    """Breaks whatever treats it as more than an array."""

    def __array_finalize__(self, other):
        pass

    def __array_ufunc__(self, *args, **kwargs):
        raise AssertionError("computed with the subclass")

    def __array_function__(self, *args, **kwargs):
        raise AssertionError("computed with the subclass")


@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_subclasses_are_read_as_arrays(dtype):
    x = arrays(dtype)
    want = both(*x)
    got = both(*(a.view(Subclass) for a in x))
    for a, b in zip(got, want, strict=True):
        assert type(a) is np.ndarray
        assert a.tobytes() == b.tobytes()


def test_matrices_are_single_heads():
    with pytest.warns(PendingDeprecationWarning):
        q = np.matrix(np.ones((3, 2), np.float32))
    out = attention(q, q, q)
    assert type(out) is np.ndarray
    assert out.shape == (3, 2)


@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_read_only_arrays(dtype):
    x = arrays(dtype)
    want = both(*x)
    for a in x:
        a.flags.writeable = False
    for a, b in zip(both(*x), want, strict=True):
        assert a.tobytes() == b.tobytes()
        assert a.flags.writeable


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_memory_mapped_files(tmp_path, dtype):
    x = arrays(dtype)
    want = both(*x)
    mapped = []
    for n, a in enumerate(x):
        file = tmp_path / f"{n}.npy"
        np.save(file, a)
        mapped.append(np.load(file, mmap_mode="r"))
    assert isinstance(mapped[0], np.memmap)
    for a, b in zip(both(*mapped), want, strict=True):
        assert type(a) is np.ndarray
        assert a.tobytes() == b.tobytes()


def test_results_into_memory_mapped_files(tmp_path):
    q, k, v, _ = arrays()
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float32, (2, 4, 9, 5))
    assert attention(q, k, v, out=out) is out
    out.flush()
    assert np.load(tmp_path / "out.npy").tobytes() == attention(q, k, v).tobytes()


def test_out_of_a_subclass_comes_back_as_itself():
    q, k, v, _ = arrays()
    out = np.zeros((2, 4, 9, 5), np.float32).view(Subclass)
    assert attention(q, k, v, out=out) is out
    assert out.view(np.ndarray).tobytes() == attention(q, k, v).tobytes()


def test_gradients_into_a_subclass():
    q, k, v, dout = arrays()
    want = both(q, k, v, dout)
    dk = np.zeros(k.shape, np.float32).view(Subclass)
    grads = attention_backward(dout, q, k, v, *want[:2], causal=True, grads_out=AttentionGradients(dk=dk))
    assert grads.dk is dk
    assert dk.view(np.ndarray).tobytes() == want[3].tobytes()


def test_native_order_by_another_name():
    x = arrays()
    native = np.dtype("<f4" if np.little_endian else ">f4")
    for a, b in zip(both(*(a.view(native) for a in x)), both(*x), strict=True):
        assert a.tobytes() == b.tobytes()


def test_foreign_order_is_refused_and_converts():
    q, k, v, _ = arrays()
    foreign = q.astype(q.dtype.newbyteorder())
    with pytest.raises(TypeError, match="byte order"):
        attention(foreign, k, v)
    assert attention(foreign.astype(np.float32), k, v).tobytes() == attention(q, k, v).tobytes()


def test_one_array_as_all_three():
    x = arrays()[1]
    got = attention(x, x, x, causal=True)
    assert got.tobytes() == attention(x.copy(), x.copy(), x.copy(), causal=True).tobytes()


# ----------------------------------------------------------------------------------------------------- DLPack


@pytest.mark.parametrize("wrap", [OwnDLPack, OldDLPack])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dlpack(backend, dtype, wrap):
    x = backend.arrays(arrays(dtype))
    assert_same(backend, both(*map(wrap, x)), both(*x))


@pytest.mark.parametrize("style", ["swapped", "gaps", "fortran", "shifted"])
def test_dlpack_of_strided_arrays(backend, style):
    x = backend.arrays(arrays(), style=style)
    assert_same(backend, both(*map(OwnDLPack, x)), both(*x))


def test_dlpack_shares_memory(backend):
    """Written through the wrapper: a result lands in the array behind it, so nothing was copied."""
    q, k, v, _ = backend.arrays(arrays())
    out = backend.xp.zeros((2, 4, 9, 5), np.float32)
    attention(q, k, v, out=OwnDLPack(out))
    assert backend.numpy(out).tobytes() == backend.numpy(attention(q, k, v)).tobytes()


def test_dlpack_beside_arrays(backend):
    q, k, v, dout = backend.arrays(arrays())
    assert_same(backend, both(OwnDLPack(q), k, OwnDLPack(v), dout), both(q, k, v, dout))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_torch_on_the_cpu(dtype):
    torch = pytest.importorskip("torch")
    x = arrays(dtype)
    for a, b in zip(both(*map(torch.from_numpy, x)), both(*x), strict=True):
        assert type(a) is np.ndarray
        assert a.tobytes() == b.tobytes()


def test_torch_bfloat16_on_the_cpu_says_why_not():
    """NumPy reads no bfloat16 through DLPack."""
    torch = pytest.importorskip("torch")
    q = torch.ones(3, 2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"q is a torch.Tensor.*DLPack"):
        attention(q, q, q)


def test_torch_tensors_that_need_a_gradient_say_so():
    torch = pytest.importorskip("torch")
    q = torch.ones(3, 2, requires_grad=True)
    with pytest.raises((TypeError, ValueError), match=r"q.*(grad|DLPack)"):
        attention(q, q, q)


def test_jax_on_the_cpu():
    jax = pytest.importorskip("jax")
    x = arrays()
    with jax.default_device(jax.devices("cpu")[0]):
        y = [jax.numpy.asarray(a) for a in x]
    for a, b in zip(both(*y), both(*x), strict=True):
        assert a.tobytes() == b.tobytes()


# ------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
def test_device_dlpack(gpu, dtype):
    x = gpu.arrays(arrays(dtype))
    assert_same(gpu, both(*map(OwnDLPack, x)), both(*x))


@pytest.mark.gpu
@pytest.mark.parametrize("style", ["plain", "swapped", "gaps", "backwards"])
def test_cuda_array_interface(gpu, style):
    x = gpu.arrays(arrays(), style=style)
    assert_same(gpu, both(*map(OwnCuda, x)), both(*x))


@pytest.mark.gpu
def test_cuda_array_interface_shares_memory(gpu):
    q, k, v, _ = gpu.arrays(arrays())
    out = gpu.xp.zeros((2, 4, 9, 5), np.float32)
    attention(q, k, v, out=OwnCuda(out))
    assert gpu.numpy(out).tobytes() == gpu.numpy(attention(q, k, v)).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_on_the_gpu(gpu, dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    x = arrays(kind)
    tensors = [torch.tensor(a.astype(np.float64)).to(getattr(torch, dtype)).cuda() for a in x]
    assert_same(gpu, both(*tensors), both(*gpu.arrays(x)))

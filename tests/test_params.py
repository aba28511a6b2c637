"""The launch struct: that Python and C++ agree on it, and that collapsing leading axes loses no address."""

import itertools
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupyflash import _params, _score_args
from cupyflash._compile import kernels_dir


def decode(packed: bytes) -> dict[str, tuple[int, ...]]:
    """The struct's tensors: (data, batch strides..., head, row, column strides)."""
    size = _params._TENSOR.size
    return {name: _params._TENSOR.unpack_from(packed, i * size) for i, name in enumerate(_params.TENSORS)}


def decode_shapes(packed: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """batch_shape and reduce_shape."""
    numbers = _params._SCALARS.unpack_from(packed, len(_params.TENSORS) * _params._TENSOR.size)[7:]
    n = _params.BATCH_AXES
    return numbers[:n], numbers[n : 2 * n]


def test_fields_lie_where_the_kernels_read_them(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("g++ is missing")
        pytest.skip("g++ is missing")
    wide = ("q_offset", "softmax_scale", "first_batch", "window_left", "window_right", "softcap", "undropped")
    narrow = ("num_heads", "num_heads_k", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v", "section", "drop_below")
    numbers = (*wide, "batch_shape", "reduce_shape", *narrow, "bottom_right", *_score_args.FUNCTIONS)
    lines = [f'printf("%zu ", offsetof(Params, {name}));' for name in _params.TENSORS + numbers]
    lines.append(
        'printf("%zu ", offsetof(Tensor, batch_stride)); printf("%zu ", offsetof(Tensor, col_stride));'
    )
    main = tmp_path / "main.cpp"
    main.write_text(
        f"#include <cstddef>\n#include <cstdio>\nconstexpr int PARAMS_BYTES = {_params.PARAMS_BYTES};\n"
        f"constexpr int FUNCTION_ARGS_BYTES = {_score_args.FUNCTION_ARGS_BYTES};\n"
        '#include "params.cuh"\nint main() {' + "\n".join(lines) + "}\n"
    )
    program = tmp_path / "main"
    subprocess.run([compiler, "-std=c++17", f"-I{kernels_dir()}", str(main), "-o", str(program)], check=True)
    offsets = [int(x) for x in subprocess.run([program], capture_output=True, check=True).stdout.split()]

    size = _params._TENSOR.size
    behind = len(_params.TENSORS) * size
    n = 4 * _params.BATCH_AXES
    expected = [i * size for i in range(len(_params.TENSORS))]
    expected += [behind + 8 * i for i in range(len(wide))]
    behind += 8 * len(wide)
    expected += [behind, behind + n] + [behind + 2 * n + 4 * i for i in range(len(narrow) + 1)]
    expected += [_params._argument(args, 0) for args in _score_args.FUNCTIONS]
    assert offsets == [*expected, 8, size - 8]


def test_struct_order_matches_the_header():
    text = (kernels_dir() / "params.cuh").read_text()
    body = re.search(r"struct Params \{(.*?)\};", text, re.DOTALL)[1]
    fields = re.findall(r"(\w+)(?:\[4\])?(?=[,;])", re.sub(r"//.*", "", body))
    assert tuple(fields[: len(_params.TENSORS)]) == _params.TENSORS


@st.composite
def walks(draw):
    """Leading axes and, for each tensor, strides: contiguous here, broadcast there, reversed elsewhere."""
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=7)))
    tensors = []
    for name in ("q", "k", "v"):
        strides, step = [], draw(st.sampled_from([1, 4]))
        for n in reversed(shape):
            kind = draw(st.sampled_from(["next", "next", "next", "broadcast", "gap", "reversed"]))
            step *= 2 if kind == "gap" else 1
            strides.append(0 if kind == "broadcast" or n == 1 else -step if kind == "reversed" else step)
            step *= n if kind != "broadcast" else 1
        tensors.append((name, (*reversed(strides), 7, 5, 3), 2))
    return shape, tuple(tensors)


@given(walks())
def test_collapsed_axes_reach_every_address(walk):
    shape, tensors = walk
    template = _params.make_template(_params.Scalars(0, 1.0, 1, 1, 1, 1, 1, 1, 1), shape, tensors)
    expected = sorted(
        tuple(
            2 * sum(i * s for i, s in zip(index, strides[: len(shape)], strict=True))
            for _, strides, _ in tensors
        )
        for index in itertools.product(*map(range, shape))
    )
    reached = []
    for launch in range(len(template.offsets)):
        packed = bytearray(template.nbytes)
        template.begin(memoryview(packed))
        template.fill(memoryview(packed).cast("Q"), launch, dict.fromkeys("qkv", 1 << 40))
        fields = decode(packed)
        for index in itertools.product(*map(range, decode_shapes(packed)[0])):
            reached.append(
                tuple(
                    fields[n][0]
                    - (1 << 40)
                    + 2 * sum(i * s for i, s in zip(index, fields[n][1:5], strict=True))
                    for n in "qkv"
                )
            )
    assert sorted(reached) == expected


def test_arguments_of_functions_lie_behind_the_numbers():
    """Both kinds, with strides in elements; every launch reads the same ones."""
    shape, walked = (2, 2, 3, 2, 2), (1, 0, 1, 0, 1, 7, 5, 3)
    arguments = (("score_args", 1, (5, 6), (-6, 1)), ("mask_args", 0, (), ()))
    template = _params.make_template(
        _params.Scalars(0, 1.0, 1, 1, 1, 1, 1, 1, 1), shape, (("q", walked, 2),), arguments=arguments
    )
    assert len(template.offsets) > 1
    assert [name for name, _ in template.slots] == ["q", "score_args[1]", "mask_args[0]"]
    for launch in range(len(template.offsets)):
        packed = bytearray(template.nbytes)
        template.begin(memoryview(packed))
        addresses = {"q": 1 << 40, "score_args[1]": 48, "mask_args[0]": 80}
        template.fill(memoryview(packed).cast("Q"), launch, addresses)
        half = _score_args.FUNCTION_ARGS_BYTES
        score_args, mask_args = packed[-2 * half : -half], packed[-half:]
        array = _score_args._ARRAY
        assert not any(score_args[: array.size])
        assert array.unpack_from(score_args, array.size) == (48, -6, 1, 0, 0, 5, 6, 1, 1)
        assert array.unpack_from(mask_args) == (80, 0, 0, 0, 0, 1, 1, 1, 1)


def test_contiguous_axes_become_one():
    x = np.empty((2, 3, 4, 5, 6, 7, 8, 9), np.float32)
    strides = _params.element_strides(x.shape, x.strides, 4, 5, 3)
    template = _params.make_template(
        _params.Scalars(0, 1.0, 1, 1, 1, 1, 1, 1, 1), x.shape[:5], (("q", strides, 4),)
    )
    assert len(template.offsets) == 1
    assert decode_shapes(template.packed)[0] == (1, 1, 1, 720)
    assert decode(template.packed)["q"][4:] == (504, 72, 9, 1)


def test_an_axis_is_kept_or_summed():
    shape, reduce = (5, 1, 1), (1, 2, 3)
    strides = {"partial": (6, 4, 1, 0, 0, 0), "dq": (1, 0, 0, 0, 0, 0)}
    template = _params.make_template(
        _params.Scalars(0, 1.0, 1, 1, 1, 1, 1, 1, 1), shape, tuple((n, s, 4) for n, s in strides.items()), reduce
    )
    assert decode_shapes(template.packed) == ((1, 5, 1, 1), (1, 1, 2, 3))
    assert decode(template.packed)["partial"][1:5] == (0, 6, 4, 1)


def test_summed_axes_become_one_where_strides_nest():
    strides = {"partial": (6, 3, 1, 0, 0, 0), "dq": (1, 0, 0, 0, 0, 0)}
    template = _params.make_template(
        _params.Scalars(0, 1.0, 1, 1, 1, 1, 1, 1, 1), (5, 1, 1), tuple((n, s, 4) for n, s in strides.items()), (1, 2, 3)
    )
    assert decode_shapes(template.packed) == ((1, 1, 5, 1), (1, 1, 1, 6))
    assert template.entries == 30


def test_axes_that_no_kernel_walks_are_not_summed():
    strides = (("partial", (64, 16, 32, 4, 9, 0, 0, 0), 4),)
    with pytest.raises(ValueError, match="summed over"):
        _params.make_template(_params.Scalars(0, 1.0, 1, 1, 1, 1, 1, 1, 1), (1, 2, 1, 2, 1), strides, (2, 1, 2, 1, 2))

"""The library's kernels on the CPU, through the public functions, under the checker, against the specification."""

import dataclasses
import random

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import PROFILE
from emulator import Device, EmulatorError, Schedule, emulate, why_not

from cupyflash import Tile, _launch, attention, attention_backward
from cupyflash.testing import cases, data

WORK = 60_000  # multiplications of a forward: every load passes the checker
SPECS = (("float32", 16, 16), ("bfloat16", 48, 16), ("float64", 32, 33), ("float16", 7, 64))  # compiled once each


@pytest.fixture(scope="module", autouse=True)
def emulator():
    why_not()


def _pick(choices):
    def pick(n):
        return choices.draw(st.integers(0, n - 1))

    return pick


def _run(case, seed, arch=90):
    """Forward and backward of a case, each launch under a schedule of its own."""
    with Device(lambda n: Schedule.draw(seed and 100 * seed + n), arch=arch, undefined=PROFILE != "ci") as xp:
        cases.run(case, xp)


@hypothesis.settings(max_examples=6 if PROFILE == "ci" else 300)
@hypothesis.given(choices=st.data(), seed=st.integers(0, 2**32))
def test_any_problem(choices, seed):
    case = data.random_case(_pick(choices), styles=data.GPU_STYLES, work=WORK)
    hypothesis.note(repr(case))
    _run(case, seed)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@hypothesis.settings(max_examples=5 if PROFILE == "ci" else 300)
@hypothesis.given(choices=st.data(), seed=st.integers(0, 2**32))
def test_many_problems_of_one_spec(spec, choices, seed):
    """Few compilations, so many shapes, strides and schedules."""
    dtype, head_dim, head_dim_v = spec
    case = data.random_case(_pick(choices), dtypes=(dtype,), styles=data.GPU_STYLES, work=2 * WORK)
    case = dataclasses.replace(case, head_dim=head_dim, head_dim_v=head_dim_v, causal=bool(case.causal), q_offset=None)
    case = dataclasses.replace(
        case, offset_shape=None, seqlen_q=min(case.seqlen_q, 64), seqlen_k=min(case.seqlen_k, 64)
    )
    hypothesis.note(repr(case))
    _run(case, seed)


@pytest.mark.parametrize("arch", [60, 70, 80])
def test_older_devices(arch):
    """Where there is no cp.async, tiles are loaded another way."""
    _run(data.Case(1, seqlen_q=33, seqlen_k=70, head_dim=24, head_dim_v=16, causal=True, dlse=True), 7, arch)


@pytest.mark.parametrize("seqlens", [(150, 150), (1, 200), (200, 1)])
def test_several_blocks_on_both_sides(seqlens):
    q, k, v = _arrays(*seqlens)
    out = attention(q, k, v, causal=True)
    got = emulate(attention, q, k, v, causal=True, schedule=Schedule("random", "random", 3, 11))
    np.testing.assert_allclose(got, out, rtol=1e-4, atol=1e-5)


def test_same_bits_under_every_schedule():
    q, k, v = _arrays(70, 90)
    dout = np.ones_like(q)
    results = []
    for seed in range(6):
        out, lse = emulate(attention, q, k, v, return_lse=True, schedule=Schedule.draw(seed))
        results.append(
            (out, lse, *emulate(attention_backward, dout, q, k, v, out, lse, schedule=Schedule.draw(seed))[:3])
        )
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


# ------------------------------------------------------------------------------------- the Python side is under test


def test_a_wrong_stride_is_found(monkeypatch):
    right = _launch.element_strides

    def wrong(shape, strides, itemsize, batch_ndim, tail):
        *lead, row, column = right(shape, strides, itemsize, batch_ndim, tail)
        return (*lead, 2 * row, column)

    monkeypatch.setattr(_launch, "element_strides", wrong)
    with pytest.raises(EmulatorError, match="out of bounds") as caught:
        emulate(attention, *_arrays(9, 9))
    assert caught.value.kind == "out of bounds"


def test_too_little_shared_memory_is_found(monkeypatch):
    right = _launch._run

    def wrong(problem, step, device, tensors):
        right(problem, dataclasses.replace(step, smem=step.smem - 64), device, tensors)

    monkeypatch.setattr(_launch, "_run", wrong)
    with pytest.raises(EmulatorError, match="bytes of shared memory"):
        emulate(attention, *_arrays(70, 70))


def test_too_small_a_grid_is_found(monkeypatch):
    right = _launch._run

    def wrong(problem, step, device, tensors):
        right(problem, dataclasses.replace(step, grid=step.grid - 1), device, tensors)

    monkeypatch.setattr(_launch, "_run", wrong)
    q, k, v = _arrays(300, 20)
    out = emulate(attention, q, k, v)
    assert np.isnan(out).any(), "rows that no block computed hold what empty() left there"


def test_a_tile_of_the_users_choice():
    q, k, v = _arrays(50, 50)
    got = emulate(
        attention, q, k, v, tile=Tile(block_m=32, block_n=32), schedule=Schedule.draw(random.Random(0).randrange(99))
    )
    np.testing.assert_allclose(got, attention(q, k, v), rtol=1e-4, atol=1e-5)


def _arrays(seqlen_q, seqlen_k, head_dim=16):
    r = np.random.default_rng(0)
    return [r.standard_normal((1, n, head_dim), np.float32) for n in (seqlen_q, seqlen_k, seqlen_k)]

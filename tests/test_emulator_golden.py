"""The emulator against the hardware: every probe's output, bit for bit where the instruction is exact."""

import dataclasses
import os

import numpy as np
import pytest
from emulator import Device, EmulatorError, Schedule, golden, why_not

CASES = {case.name: case for case in golden.cases()}


@pytest.fixture(scope="module")
def stored():
    """The golden file; without one there is nothing to compare with."""
    if golden.GOLDEN.exists():
        return np.load(golden.GOLDEN)
    reason = f"{golden.GOLDEN.name} is missing: make it on a GPU with `python tests/emulator/golden.py FOLDER`"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module", autouse=True)
def emulator():
    why_not()


@pytest.mark.parametrize("name", CASES)
def test_probe_runs_clean(name):
    """Without a report under a random schedule, and with the same bits as in order."""
    case = CASES[name]
    in_order, mixed = (_run(case, schedule) for schedule in (Schedule(), Schedule("random", "lazy", 1, 3)))
    for x, y in zip(in_order, mixed, strict=True):
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize("name", CASES)
def test_probe_matches_the_device(name, stored):
    case = CASES[name]
    assert f"{name}.fingerprint" in stored, "the golden file is older than this probe: make it again"
    assert str(stored[f"{name}.fingerprint"]) == case.fingerprint(), "the probe changed: make the golden file again"
    for i, (out, got) in enumerate(zip(case.outputs(), _run(case, Schedule()), strict=True)):
        want = stored[f"{name}.{i}"]
        if out.bound is None:
            np.testing.assert_array_equal(_bits(got), _bits(want), err_msg=f"output {i}")
        else:
            _assert_within(got, want, out.bound, f"output {i}")


def test_a_store_that_begins_before_its_tensor_is_reported():
    """An H200 stops with an illegal instruction, where a load fills with zeros."""
    case = CASES["tensor_2d_swizzle0_0.store"]
    tensor, words, add, rank, count, _, *rest = case.args
    before = dataclasses.replace(case, args=(tensor, words, add, rank, count, -8, *rest))
    with pytest.raises(EmulatorError, match="begins at -8 along axis 0"):
        _run(before, Schedule())


def _run(case, schedule):
    order, asynchronous = schedule.order, schedule.asynchronous
    with Device(Schedule(order, asynchronous, case.resident, schedule.seed)) as xp:
        return golden.run(case, xp, {})


def _bits(x):
    """Bit patterns, all NaNs one of them."""
    if x.dtype.kind != "f":
        return x
    bits = x.view(f"u{x.itemsize}").copy()
    bits[np.isnan(x)] = np.array(np.nan, x.dtype).view(bits.dtype)
    return bits


def _assert_within(got, want, bound, message):
    finite = np.isfinite(want) & np.isfinite(got)
    np.testing.assert_array_equal(_bits(got[~finite]), _bits(want[~finite]), err_msg=message)
    x, y = got[finite].astype(np.float64), want[finite].astype(np.float64)
    limit = np.broadcast_to(np.asarray(bound(got), np.float64), got.shape)[finite]
    worst = np.argmax(np.abs(x - y) / np.maximum(limit, np.finfo(np.float64).tiny))
    assert (np.abs(x - y) <= limit).all(), f"{message}: {x[worst]} here, {y[worst]} on the device, limit {limit[worst]}"

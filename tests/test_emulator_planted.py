"""Bugs on purpose. Each must be caught with the right report; without them every sample is clean."""

import re

import pytest
from emulator import Device, EmulatorError, Schedule, why_not
from emulator.planted import LIBRARY, PLANTED, Planted
from emulator.removals import assembled_text
from emulator.samples import SAMPLES, text


@pytest.fixture(scope="module", autouse=True)
def emulator():
    why_not()


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_clean(name):
    """No false alarm under any schedule, and exact answers."""
    for seed in range(25):
        with Device(Schedule.draw(seed)) as xp:
            SAMPLES[name](xp, seed)


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: f"{bug.kernel}: {bug.name}")
def test_planted_in_a_sample(bug: Planted):
    _applies(bug, text(bug.kernel))
    for seed in (0, 1, 2):
        with Device(Schedule.draw(seed), patches=(bug.patch,)) as xp:
            _expect(bug, lambda xp=xp, seed=seed: SAMPLES[bug.kernel](xp, seed))


@pytest.mark.parametrize("bug", LIBRARY, ids=lambda bug: f"{bug.kernel}: {bug.name}")
def test_planted_in_a_kernel(bug: Planted):
    _applies(bug, assembled_text(bug.kernel))
    run = _run_of(bug)
    for seed in bug.seeds:
        _expect(bug, lambda seed=seed: run((bug.patch,), Schedule.draw(seed)))


@pytest.mark.parametrize("bug", LIBRARY, ids=lambda bug: f"{bug.kernel}: {bug.name}")
def test_its_problem_is_clean_without_it(bug: Planted):
    run = _run_of(bug)
    run((), Schedule.draw(3))


def _run_of(bug):
    return bug.problem.forward if bug.kernel.startswith(("fwd", "decode", "combine")) else bug.problem.backward


def _applies(bug, where):
    assert bug.applies(where), f"the text of {bug.kernel} has changed: {bug.old!r} is not in it"


def _expect(bug, run):
    with pytest.raises((EmulatorError, AssertionError)) as caught:
        run()
    if caught.type is AssertionError:
        assert "values" in bug.kinds, f"only the values showed it:\n{caught.value}"
    else:
        assert caught.value.kind in bug.kinds, str(caught.value)
        assert re.search(bug.says, str(caught.value)), str(caught.value)

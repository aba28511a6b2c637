"""Profiles, seeds, the backends, and what pytest prints about them.

Environment: ``CUPYFLASH_TEST_PROFILE`` is ``ci`` (default: a seeded share of the large tables, few hypothesis
examples, always the same) or ``nightly`` (all of the tables, many examples, new ones each time);
``CUPYFLASH_TEST_SEED`` is the seed of both, printed in the header.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import random
import warnings
from collections import defaultdict
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest

from cupyflash import Tile, explain
from cupyflash.testing import data

os.environ["CUPYFLASH_TUNING"] = "0"  # tiles that this machine's user has tuned are not what is tested
PROFILE = os.environ.get("CUPYFLASH_TEST_PROFILE", "ci")
SEED = int(
    os.environ.get(
        "CUPYFLASH_TEST_SEED", random.SystemRandom().randrange(2**32) if PROFILE == "nightly" else 0
    )
)

os.environ["CUPYFLASH_TEST_SEED"] = str(SEED)  # for the processes of pytest-xdist, which choose the same tests

hypothesis.settings.register_profile(
    "ci",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile(
    "nightly",
    parent=hypothesis.settings.get_profile("ci"),
    max_examples=1000,
    derandomize=False,
    print_blob=True,
)
hypothesis.settings.load_profile(PROFILE)


# --------------------------------------------------------------------------------------------------- backends


class Backend:
    """An array library and the arrays it makes."""

    def __init__(self, name: str, xp: ModuleType, styles: tuple[str, ...]) -> None:
        self.name = name
        self.xp = xp
        self.styles = styles  # memory styles that this backend's arrays can have
        self.family = {"numpy": "cpu", "cupy": "simt"}[name]  # that takes every dtype

    def small_tile(self, dtype: Any) -> Tile:
        """A tile below the planner's own that both directions take in the family that the planner chooses."""
        return Tile(16, 16) if self.p_dtype(dtype) is None else Tile(64, 128)

    def p_dtype(self, dtype: Any) -> Any:
        """What P and dS are rounded to in the family that the planner chooses; None: they are not."""
        x = self.xp.zeros((1, 1, 1), dtype)
        return np.dtype(dtype) if explain(x, x, x).rounds_p else None

    def array(self, values: Any, dtype: Any = None, style: str = "plain") -> Any:
        """`values` inside poison, in memory as `style` says."""
        return data.place(np.asarray(values, dtype), style, self.xp).array

    def arrays(self, values: Any, dtype: Any = None, style: str = "plain") -> tuple[Any, ...]:
        """`array` of each."""
        return tuple(self.array(a, dtype, style) for a in values)

    def numpy(self, array: Any) -> np.ndarray:
        """The elements of an array of this backend, which it must be."""
        assert isinstance(array, self.xp.ndarray), f"{type(array)} from backend {self.name}"
        return data.to_numpy(array)


def why_no_gpu() -> str | None:
    """Why tests marked ``gpu`` can't run here, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cupy
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"no GPU: {type(error).__name__}: {error}"
    return None if count else "no GPU: CUDA counts 0 devices"


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)], scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """NumPy, and CuPy where there is a GPU."""
    if request.param == "numpy":
        return Backend("numpy", np, data.INPUT_STYLES)
    return request.getfixturevalue("gpu")


@pytest.fixture(scope="session")
def gpu() -> Backend:
    """CuPy; skips where there is no GPU. Tests that take it are marked ``gpu``."""
    reason = why_no_gpu()
    if reason:
        pytest.skip(reason)
    import cupy

    return Backend("cupy", cupy, data.GPU_STYLES)


# ------------------------------------------------------------------------------------------------------ share


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "share(n): of this test's parameters, profile ci runs a seeded share of n"
    )
    if PROFILE == "nightly" and config.getoption("hypothesis_seed", None) is None:
        hypothesis.core.global_force_seed = SEED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop what is beyond the share of its test, unless tests were named one by one."""
    if PROFILE != "ci" or any("::" in arg for arg in config.args):
        return
    tables = defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("share")
        if mark:
            on_gpu = item.get_closest_marker("gpu") is not None
            tables[item.nodeid.split("[")[0], on_gpu, mark.args[0]].append(item)
    dropped = set()
    for (name, _, n), table in tables.items():
        rng = random.Random(f"{SEED} {name}")
        dropped |= {id(item) for item in rng.sample(table, max(0, len(table) - n))}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in dropped])
    items[:] = [item for item in items if id(item) not in dropped]


# ------------------------------------------------------------------------------------------- header and times


def pytest_report_header() -> list[str]:
    names = ("numpy", "ml_dtypes", "threadpoolctl", "hypothesis", "cupy-cuda12x", "cupy-cuda13x", "torch")
    versions = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    reason = why_no_gpu()
    return [
        f"machine: {platform.platform()}, {os.cpu_count()} cores; {reason or _gpu_name()}",
        f"packages: {', '.join(versions)}",
        f"profile: {PROFILE}, CUPYFLASH_TEST_SEED={SEED}"
        + (", hypothesis derandomized" if PROFILE == "ci" else f", hypothesis seed {SEED}"),
    ]


def _gpu_name() -> str:
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"{cupy.cuda.runtime.getDeviceCount()} x {name}"


_seconds: dict[str, float] = defaultdict(float)
_tests: dict[str, int] = defaultdict(int)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    group = report.nodeid.split("::")[0]
    _seconds[group] += report.duration
    _tests[group] += report.when == "call"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _seconds:
        return
    terminalreporter.section("time of each group of tests")
    for group, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        terminalreporter.line(f"{seconds:8.1f} s  {_tests[group]:5d} tests  {group}")
    terminalreporter.line(f"{sum(_seconds.values()):8.1f} s  {sum(_tests.values()):5d} tests  together")

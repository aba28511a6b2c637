"""Every two options in every kernel family: the pairwise table on a GPU, and a share of it under the emulator."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
from conftest import PROFILE
from emulator import Device, Schedule, why_not

from cupyflash.testing import cases

TABLE = cases.options_table()
FAMILIES = {"simt": 90, "sm80": 80, "sm90": 90}  # and a compute capability for the emulator
WIDTHS = ((64, 64), (128, 128), (8, 24), (80, 48), (256, 256), (192, 128))
SHARE = int(os.environ.get("CUPYFLASH_OPTIONS_SHARE", "6" if PROFILE == "ci" else "1000000"))
SEED = int(os.environ.get("CUPYFLASH_OPTIONS_SEED", "1"))


def rows(widths):
    """(row of the table, family, the case as this family takes it)."""
    found = []
    for number, case in enumerate(TABLE):
        for family in FAMILIES:
            if family == "sm90" and (case.q_lens is not None or case.kv_lens is not None):
                continue  # sm80 takes them
            if family == "simt":
                found.append(pytest.param(case, family, id=f"{number}-{family}"))
                continue
            dtype = ("bfloat16", "float16")[number % 2] if case.dtype in ("float32", "float64") else case.dtype
            # Sides of more bits than q, k, v have none to lose.
            this = replace(case, dtype=dtype)
            if widths:
                head_dim, head_dim_v = WIDTHS[number % len(WIDTHS)]
                this = replace(this, head_dim=head_dim, head_dim_v=head_dim_v)
            found.append(pytest.param(this, family, id=f"{number}-{family}"))
    return found


def share(found):
    """A share that a seed has drawn; its ids say which."""
    return sorted(random.Random(SEED).sample(found, min(SHARE, len(found))), key=lambda row: row.id)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "family"), rows(widths=True))
def test_every_two_options_on_a_gpu(gpu, case, family):
    if int(gpu.xp.cuda.Device().compute_capability) < {"simt": 60, "sm80": 80, "sm90": 90}[family]:
        pytest.skip("an older GPU")
    report = cases.run(case, gpu.xp, family=family)
    assert report.ok, f"{case!r}\n{report}"


@pytest.mark.parametrize(("case", "family"), share(rows(widths=False)))
def test_every_two_options_under_the_emulator(case, family):
    """Under the race checker, each launch with a schedule of its own."""
    why_not()
    with Device(lambda n: Schedule.draw(100 * case.seed + n), arch=FAMILIES[family], undefined=True) as xp:
        report = cases.run(case, xp, family=family)
    assert report.ok, f"{case!r}\n{report}"

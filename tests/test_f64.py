"""float64 on tensor cores: its words, its tiles, and the kernels under the race checker."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import PROFILE
from emulator import Device, Schedule, golden, why_not
from emulator.removals import Problem

from cupyflash import Tile, _tiles_f64, attention, explain
from cupyflash._plan import DEVICES, Rows
from cupyflash.testing import bounds, reference

U = 2.0**-53
SEVERAL_BLOCKS = (5, 7, 10)  # seeds of schedules with more than one resident block

EXP2 = """#include "exp2_table.cuh"
extern "C" __global__ void powers(const double* x, double* y, int n) {
  DYNAMIC_SHARED(Exp2Table<4>, table);
  table.fill(32);
  sync_block();
  const Exp2<4> exp2(table);
  for (int i = thread_index(); i < n; i += 32) y[i] = exp2(x[i]);
}
"""


def emulated_exp2(x, folder):
    path = folder / "powers.cu"
    path.write_text(EXP2, encoding="utf-8")
    with Device() as xp:
        y = xp.asarray(np.full(x.size, -1.0))
        kernel = xp.RawModule(code=golden.inline_text(path)).get_function("powers")
        kernel((1,), (32,), (xp.asarray(x), y, np.int32(x.size)), shared_mem=64 * 4 * 8)
        return y.get()


def test_powers_of_2(tmp_path):
    """Within 3.1 u wherever a normal number results; 0 below, NaN where there is no answer."""
    why_not()
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("longdouble is no wider than float64 on this machine")
    rng = np.random.default_rng(0)
    borders = np.arange(-200, 200) / 128 + rng.choice([-1e-17, 0, 1e-17], 400)  # where the table's entry changes
    small, far = -(10.0 ** rng.uniform(-320, 0, 400)), [rng.uniform(-1022, 9, 3000), rng.uniform(9, 1023.9, 200)]
    x = np.concatenate([*far, rng.uniform(-1, 1, 3000), borders, small, [0.0, -0.0, -1021.999999]])
    y = emulated_exp2(x, tmp_path)
    exact = np.exp2(x.astype(np.longdouble))
    assert (np.abs(y - exact) <= 3.1 * U * exact).all()
    assert y[x == 0].tolist() == [1.0] * 2
    gone = np.array([-np.inf, -1022.5, -2000.0, -1e300, -np.finfo(np.float64).max])
    assert emulated_exp2(gone, tmp_path).tolist() == [0.0] * 5
    payload = np.array([0x7FF8000000000000, 0xFFF8000000000000, 0xFFFFFFFFFFFFFFFF, 0x7FF80000DEADBEEF], np.uint64)
    assert np.isnan(emulated_exp2(np.concatenate([payload.view(np.float64), [np.inf]]), tmp_path)).all()


# ------------------------------------------------------------------------------------------------------------- tiles


def plan(d, dv, device="sm_90", seqlen=700, **options):
    q, v = (np.broadcast_to(np.zeros((), np.float64), (1, seqlen, width)) for width in (d, dv))
    return explain(q, q, v, device=device, **options)


def test_which_cards_take_float64():
    for device in DEVICES.values():
        made = plan(64, 64, device.name)
        assert (made.family == "sm80") == (device.arch in (80, 90, 100)), device
        assert not made.rounds_p
    assert "float64 on compute capability 8.6" in dict(plan(64, 64, "sm_86").declined)["sm80"]
    with pytest.raises(ValueError, match=r"family='sm80': float64 on compute capability 12\.0"):
        plan(64, 64, "sm_120", family="sm80")


def test_each_row_of_the_table_is_reached():
    reached = {
        (d, dv, *(getattr(plan(d, dv, device).kernels[0].spec, name) for name in ("block_m", "block_n", "num_stages")))
        for d, dv, _ in _tiles_f64.DOUBLE_TABLE
        for device in ("sm_80", "sm_90")
    }
    assert reached >= {(d, dv, row.block_m, row.block_n, row.stages) for d, dv, row in _tiles_f64.DOUBLE_TABLE}


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (Tile(block_m=100), ["block_m=100", "with warps=8 it is 128 or 64"]),
        (Tile(block_n=40), ["block_n=40", "multiple of 16"]),
        (Tile(stages=1), ["stages=1", "at least 2"]),
        (Tile(warps=3), ["warps=3", "even"]),
        (Tile(64, 64, 2, 4), ["registers"]),
        (Tile(stages=9), ["shared memory", "232448"]),
    ],
)
def test_a_tile_that_does_not_fit_says_why(tile, words):
    with pytest.raises(ValueError, match="does not fit fwd_f64") as caught:
        plan(128, 128, tile=tile)
    for word in words:
        assert word in str(caught.value)


# ----------------------------------------------------------------------------------- the kernels under the emulator

# Buffers from as few as there may be to more than there are blocks, keys, warps that share queries; of narrow heads.
VARIANTS = [
    _tiles_f64.DoubleRow(block_m, block_n, warps, stages, "")
    for block_m, block_n, warps in ((64, 16, 4), (64, 32, 4), (32, 16, 4), (16, 48, 2)) for stages in (2, 3, 4, 5)
]  # fmt: skip
FORMS = [
    (d - 8, dv - 8, causal, dataclasses.replace(row, remark=""))
    for d, dv, row in _tiles_f64.DOUBLE_TABLE for causal in (False, True)
]  # fmt: skip


def name(value):
    """A short id of a parameter."""
    return "-".join(f"{n}" for n in dataclasses.astuple(value) if n) if dataclasses.is_dataclass(value) else str(value)


def forward(row, d, dv, seqlen_q, seqlen_k, causal, seed, **more):
    options = (("tile", Rows(rows=(("fwd_f64", row),))), ("causal", causal))
    Problem("float64", d, seqlen_q, seqlen_k, options, head_dim_v=dv, **more).forward((), Schedule.draw(seed))


@pytest.mark.share(3)
@pytest.mark.parametrize(("head_dim", "head_dim_v", "causal", "row"), FORMS, ids=name)
def test_forms_of_the_forward(head_dim, head_dim_v, causal, row):
    why_not()
    for seqlens in ((150, 130), (130, 70)):
        for seed in SEVERAL_BLOCKS:
            forward(row, head_dim, head_dim_v, *seqlens, causal, seed)


@pytest.mark.share(5)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("row", VARIANTS, ids=name)
def test_variants_of_the_forward(row, causal):
    """One block of keys up to more than there are buffers; rows that see nothing; heads that share keys."""
    why_not()
    for seqlens in ((70, 10), (70, 100), (100, 60)):
        forward(row, 24, 40, *seqlens, causal, seqlens[1], heads=2)


@pytest.mark.parametrize("arch", [80, 90])
def test_rows_that_rise_and_rows_that_do_not(arch):
    """Logits that grow from block to block, far and by a little, and fall; each row has its own bits."""
    why_not()
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((16, 8)), rng.standard_normal((160, 8)), rng.standard_normal((160, 8))
    q[:, 0], k[:, 1:] = 1, k[:, 1:] * 1e-3
    q[8:] *= 0.01
    for growth in (np.arange(160) * 40.0, np.arange(160) * 0.3, np.arange(160)[::-1] * 40.0):
        k[:, 0] = growth
        with Device(Schedule.draw(1), arch=arch, undefined=PROFILE != "ci") as xp:
            x = [xp.asarray(a[None]) for a in (q, k, v)]
            tile = Tile(16, 16)
            out, lse = (a.get()[0] for a in attention(*x, return_lse=True, tile=tile))
            alone = attention(xp.asarray(q[None, 8:]), *x[1:], tile=tile).get()[0]
        report = bounds.check_forward(q[None], k[None], v[None], out[None], lse[None])
        assert report.ok, report
        right = reference.forward(q[None], k[None], v[None])
        assert np.abs(out - right.out[0]).max() < 1e-12
        np.testing.assert_array_equal(out[8:], alone)

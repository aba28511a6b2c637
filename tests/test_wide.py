"""float64 and float32 on tensor cores: their words, tiles, and the kernels under the race checker."""

from __future__ import annotations

import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest
from conftest import PROFILE
from emulator import Device, Schedule, golden, why_not
from emulator.removals import Problem

from cupyflash import Tile, _tiles_wide, attention, explain
from cupyflash._plan import DEVICES, Rows
from cupyflash.testing import bounds, reference

U = 2.0**-53
SEVERAL_BLOCKS = (5, 7, 10)  # seeds of schedules with more than one resident block

EXP2 = """using Element = double;
#include "exp2_table.cuh"
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


SPLIT = """using Element = float;
#include "memory.cuh"
#include "parts.cuh"
extern "C" __global__ void parts(const float* x, unsigned* y, int n) {
  for (int i = thread_index(); i < n / 2; i += 32) split(y[3 * i], y[3 * i + 1], y[3 * i + 2], x[2 * i], x[2 * i + 1]);
}
"""


def emulated_split(x, folder):
    """The three parts of float32 numbers, as float64: (3, len(x))."""
    path = folder / "parts.cu"
    path.write_text(SPLIT, encoding="utf-8")
    with Device() as xp:
        y = xp.asarray(np.zeros(3 * x.size // 2, np.uint32))
        kernel = xp.RawModule(code=golden.inline_text(path)).get_function("parts")
        kernel((1,), (32,), (xp.asarray(x), y, np.int32(x.size)))
        halves = y.get().view(np.uint16).reshape(-1, 3, 2).swapaxes(0, 1).reshape(3, -1)
    return halves.view(ml_dtypes.bfloat16).astype(np.float64)


def test_three_parts_are_the_number(tmp_path):
    """Exactly, from 2**-102 to the largest number; and as small as the bound of what is left out takes them."""
    why_not()
    rng = np.random.default_rng(0)
    most = np.finfo(np.float32).max
    some = rng.choice([-1, 1], 20000) * 2.0 ** rng.uniform(-102, 127.9, 20000)
    bits = (rng.integers(0, 2**23, 2000, np.uint32) | np.uint32(127 << 23)).view(np.float32)  # all of [1, 2)
    halfway = np.float32(1) + np.arange(256, dtype=np.float32) * np.float32(2.0**-16) + np.float32(2.0**-17)
    x = np.concatenate([some, bits, halfway, [most, -most, 0.0, -0.0, 1.0, 2.0**-102]]).astype(np.float32)
    parts = emulated_split(x, tmp_path)
    assert (parts.sum(0) == x).all()
    assert (np.abs(parts[1]) < 2.0**-7 * np.abs(x))[x != 0].all()
    assert (np.abs(parts[2]) <= 2.0**-16 * np.abs(x)).all()
    infinite = emulated_split(np.array([np.inf, -np.inf, np.nan, 1], np.float32), tmp_path)
    assert np.isnan(infinite.sum(0)[:3]).all()


# ------------------------------------------------------------------------------------------------------------- tiles

DTYPES = {"float64": None, "float32": "highest"}  # and the precision that tensor cores take it with


def plan(d, dv, device="sm_90", dtype="float64", seqlen=700, **options):
    """The plan of the sm80 family, or what there is without one."""
    q, v = (np.broadcast_to(np.zeros((), dtype), (1, seqlen, width)) for width in (d, dv))
    return explain(q, q, v, device=device, **{"precision": DTYPES[dtype], **options})


def test_which_cards_take_float64():
    for device in DEVICES.values():
        made = plan(64, 64, device.name)
        assert (made.family == "sm80") == (device.arch in (80, 90, 100)), device
        assert not made.rounds_p
    assert "float64 on compute capability 8.6" in dict(plan(64, 64, "sm_86").declined)["sm80"]
    with pytest.raises(ValueError, match=r"family='sm80': float64 on compute capability 12\.0"):
        plan(64, 64, "sm_120", family="sm80")


def test_which_cards_take_float32():
    for device in DEVICES.values():
        for backward in (False, True):
            made = plan(64, 64, device.name, "float32", backward=backward)
            own = device.arch == 90 and not backward
            assert made.family == ("sm90" if own else "sm80" if device.arch >= 80 else "simt"), device
            assert not made.rounds_p
    assert plan(129, 64, "sm_90", "float32").family == plan(64, 129, "sm_90", "float32").family == "sm80"
    assert plan(64, 64, "sm_90", "float32", family="sm80").kernels[0].name == "fwd_wide"
    for precision in (None, "ieee"):
        made = plan(64, 64, "sm_80", "float32", precision=precision)
        assert made.family == "simt"
        assert f"float32, precision={precision!r}" in dict(made.declined)["sm80"]
        with pytest.raises(ValueError, match=r"family='sm80': float32, precision=.*precision=\"highest\""):
            plan(64, 64, "sm_80", "float32", precision=precision, family="sm80")


@pytest.mark.parametrize(("dtype", "widest"), [("float64", 128), ("float32", 160)])
def test_wider_gradients_stay_on_simt(dtype, widest):
    assert plan(widest, widest, dtype=dtype, backward=True).family == "sm80"
    wider = plan(widest + 1, 64, dtype=dtype, backward=True)
    assert wider.family == "simt"
    assert f"{dtype}, backward, head width {widest + 1}" in dict(wider.declined)["sm80"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_of_the_tables_is_reached(dtype):
    cards = ("sm_80", "sm_90") if dtype == "float64" else ("sm_80", "sm_86", "sm_100")
    itemsize = np.dtype(dtype).itemsize
    for table, backward in ((_tiles_wide.WIDE_TABLE, False), (_tiles_wide.WIDE_BACKWARD_TABLE, True)):
        reached = set()
        for (d, dv, _), device in itertools.product(table[itemsize], cards):
            made = plan(d, dv, device, dtype, backward=backward)
            spec = next(step.spec for step in made.kernels if step.name.endswith("_wide"))
            reached.add((d, dv, spec.block_m, spec.block_n, spec.num_stages, spec.num_warps))
        assert reached >= {(d, dv, r.block_m, r.block_n, r.stages, r.warps) for d, dv, r in table[itemsize]}


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
    with pytest.raises(ValueError, match="does not fit fwd_wide") as caught:
        plan(128, 128, tile=tile)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (Tile(block_m=48), ["block_m=48", "16, or a multiple of 32 up to 256"]),
        (Tile(block_n=40), ["block_n=40", "multiple of"]),
        (Tile(stages=3), ["stages=3", "there are 2"]),
        (Tile(block_m=256), ["shared memory", "232448"]),
        (Tile(32, 256, warps=8), ["registers"]),
    ],
)
def test_a_tile_of_the_backward_that_does_not_fit_says_why(tile, words):
    with pytest.raises(ValueError, match="does not fit bwd_wide") as caught:
        plan(64, 64, dtype="float32", backward=True, tile=tile)
    for word in words:
        assert word in str(caught.value)


# ----------------------------------------------------------------------------------- the kernels under the emulator

# Buffers from as few as there may be to more than there are blocks, keys, warps that share queries; of narrow heads.
VARIANTS = [
    _tiles_wide.WideRow(block_m, block_n, warps, stages, "")
    for block_m, block_n, warps in ((64, 16, 4), (64, 32, 4), (32, 16, 4), (16, 48, 2)) for stages in (2, 3, 4, 5)
]  # fmt: skip


def forms(tables):
    """Rows of the tables of both types, with widths that leave some of the padding."""
    return [
        (dtype, d - 8, dv - 8, causal, dataclasses.replace(row, remark="", card=0))
        for dtype in DTYPES for d, dv, row in tables[np.dtype(dtype).itemsize] for causal in (False, True)
    ]  # fmt: skip


def name(value):
    """A short id of a parameter."""
    return "-".join(f"{n}" for n in dataclasses.astuple(value) if n) if dataclasses.is_dataclass(value) else str(value)


def problem(kernel, dtype, row, d, dv, *seqlens, causal, **more):
    family = "sm90" if kernel.endswith("_sm90") else "sm80"
    asked = (("precision", DTYPES[dtype]), ("family", family))
    options = (("tile", Rows(rows=((kernel, row),))), ("causal", causal), *asked)
    return Problem(dtype, d, *seqlens, options, head_dim_v=dv, **more)


@pytest.mark.share(4)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "head_dim_v", "causal", "row"), forms(_tiles_wide.WIDE_TABLE), ids=name
)
def test_forms_of_the_forward(dtype, head_dim, head_dim_v, causal, row):
    why_not()
    for seqlens in ((150, 130), (130, 70)):
        for seed in SEVERAL_BLOCKS:
            run = problem("fwd_wide", dtype, row, head_dim, head_dim_v, *seqlens, causal=causal)
            run.forward((), Schedule.draw(seed))


@pytest.mark.share(4)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "head_dim_v", "causal", "row"), forms(_tiles_wide.WIDE_BACKWARD_TABLE), ids=name
)
def test_forms_of_the_backward(dtype, head_dim, head_dim_v, causal, row):
    why_not()
    row = dataclasses.replace(row, heads=1)
    for seqlens in ((70, 130), (130, 70)):
        for seed in SEVERAL_BLOCKS:
            run = problem("bwd_wide", dtype, row, head_dim, head_dim_v, *seqlens, causal=causal)
            run.backward((), Schedule.draw(seed))


@pytest.mark.share(8)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("row", VARIANTS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_variants_of_the_forward(dtype, row, causal):
    """One block of keys up to more than there are buffers; rows that see nothing; heads that share keys."""
    why_not()
    for seqlens in ((70, 10), (70, 100), (100, 60)):
        run = problem("fwd_wide", dtype, row, 24, 40, *seqlens, causal=causal, heads=2)
        run.forward((), Schedule.draw(seqlens[1]))


PARTS = [
    (d - 8, dv - 8, causal, dataclasses.replace(row, remark=""))
    for d, dv, row in (*_tiles_wide.PARTS_TABLE, (24, 48, _tiles_wide.PartsRow(128, 16, 2, "")))
    for causal in (False, True)
]  # fmt: skip


@pytest.mark.share(4)
@pytest.mark.parametrize(("head_dim", "head_dim_v", "causal", "row"), PARTS, ids=name)
def test_forms_of_the_forward_on_hopper(head_dim, head_dim_v, causal, row):
    """Of one warpgroup's queries, of both's; fewer blocks of keys than slots, and more; rows that see nothing."""
    why_not()
    for seqlens, seed in zip(((200, 150), (70, 230), (40, 10)), SEVERAL_BLOCKS, strict=True):
        run = problem("fwd_parts_sm90", "float32", row, head_dim, head_dim_v, *seqlens, causal=causal)
        run.forward((), Schedule.draw(seed))


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

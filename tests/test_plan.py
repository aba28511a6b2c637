"""Plans: pure, printable, and true to the card."""

import itertools
import math
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cupyflash
from cupyflash import Tile, _rows, _tiles, _tiles_simt, _tiles_sm80, explain
from cupyflash._plan import DEVICES
from cupyflash._problem import read_problem

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def plan(shape_q, shape_k, *, dim_v=None, dtype=np.float32, device="sm_90", **options):
    q, k = np.zeros(shape_q, dtype), np.zeros(shape_k, dtype)
    v = np.zeros((*shape_k[:-1], dim_v or shape_k[-1]), dtype)
    return explain(q, k, v, device=device, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "precision"), [*((d, None) for d in DTYPES), *((d, "highest") for d in DTYPES[:2])])
@pytest.mark.parametrize("backward", [False, True])
def test_every_width_fits_every_card(device, dtype, precision, backward):
    asked = {"dtype": dtype, "precision": precision, "device": device, "backward": backward}
    for dim in (*_tiles.WIDTHS, 1, 7, 100, 250):
        for dim_v in {dim, 1, 256}:
            made = plan((2, 33, dim), (1, 70, dim), dim_v=dim_v, **asked)
            for step in made.kernels:
                assert step.smem <= DEVICES[device].smem
                assert step.threads <= 1024
                spec = step.spec
                if step.name in _tiles.ROW_KERNELS:
                    continue
                assert spec.head_dim >= dim
                assert spec.head_dim_v >= dim_v
                for width in (spec.head_dim, spec.head_dim_v):
                    assert width <= spec.dim_chunk or width % spec.dim_chunk == 0


@pytest.mark.parametrize("key", _tiles_simt.TABLE)
def test_each_row_of_the_table_is_reached_and_runs(key):
    kernel, accumulator = key
    reached = set()
    for device, apart in itertools.product(DEVICES.values(), (False, True)):
        for width in _tiles.WIDTHS:
            for largest, row in _tiles_simt.TABLE[key]:
                dim = _tiles_simt.padded_width(width, row.dim_chunk)
                why = _tiles_simt.check_row(kernel, row, dim, dim, accumulator, device.smem, apart)
                if width <= largest and why is None:
                    reached.add(row)
                    break
    assert reached == {row for _, row in _tiles_simt.TABLE[key]}


def test_each_row_of_the_ampere_table_is_reached():
    rows = _tiles_sm80.AMPERE_TABLE["fwd_sm80"]
    specs = set()
    for device in (device for device in DEVICES.values() if device.arch >= 80):
        for dim, dim_v, _ in rows:
            for precision in (None, "highest"):
                spec = plan(
                    (1, 999, dim), (1, 999, dim), dim_v=dim_v, dtype=np.float16, device=device.name, family="sm80",
                    precision=precision,
                ).kernels[0].spec  # fmt: skip
                form = (spec.block_m, spec.block_n, spec.num_warps, spec.num_stages, spec.q_held)
                specs.add((dim, dim_v, spec.split_p, *form))
    for dim, dim_v, row in rows:
        form = (row.block_m, row.block_n, row.warps, row.stages, row.q_held)
        assert any((dim, dim_v, split, *form) in specs for split in (True, False) if row.split in (None, split))


def test_p_in_two_parts_is_the_ampere_familys():
    """And of no card before it: there P and dS are not rounded anyway."""
    for backward in (False, True):
        made = plan((2, 9, 8), (2, 9, 8), dtype=np.float16, device="sm_90", precision="highest", backward=backward)
        assert (made.family, made.rounds_p, made.p_parts) == ("sm80", True, 2)
        assert "two parts" in dict(made.declined)["sm90"]
        assert "P and dS    the sum of 2" in str(made)
        assert [step.spec.split_p for step in made.kernels if step.name in ("fwd_sm80", "bwd_sm80")] == [True]
        made = plan((2, 9, 8), (2, 9, 8), dtype=np.float16, device="sm_75", precision="highest", backward=backward)
        assert (made.family, made.rounds_p, made.p_parts) == ("simt", False, 1)
        with pytest.raises(ValueError, match="family='sm90': precision='highest'"):
            plan((2, 9, 8), (2, 9, 8), dtype=np.float16, device="sm_90", precision="highest", family="sm90")


def test_a_tile_has_room_for_second_parts():
    """One that fits without them is refused, with the bytes that it would need; one kept by tune() too."""
    asked = {"dtype": np.float16, "device": "sm_86", "backward": True, "family": "sm80"}
    tile = Tile(block_m=48, block_n=64)
    assert plan((1, 64, 128), (1, 64, 128), tile=tile, **asked).p_parts == 1
    with pytest.raises(ValueError, match="107648 bytes of shared memory"):
        plan((1, 64, 128), (1, 64, 128), tile=tile, precision="highest", **asked)
    row, x = _tiles_sm80.AmpereBackwardRow(48, 64, 8, 2, 8, ""), np.zeros((1, 64, 128), np.float16)
    for precision, fits in ((None, True), ("highest", False)):
        problem = read_problem(x, x, x, scale=None, causal=False, q_offset=None, layout="hsd", precision=precision)
        assert (_rows.why_not("bwd_sm80", row, problem, DEVICES["sm_86"].smem) is None) == fits


def test_ampere_takes_what_hopper_declines():
    made = plan((2, 9, 8), (2, 9, 8), dtype=np.float16, device="sm_80")
    assert (made.family, made.rounds_p) == ("sm80", True)
    assert [name for name, _ in made.declined] == ["sm90"]
    made = plan((2, 9, 8), (2, 9, 8), dtype=np.float32, device="sm_80")
    assert (made.family, [name for name, _ in made.declined]) == ("simt", ["sm90", "sm80"])
    made = plan((2, 9, 8), (2, 9, 8), dtype=np.float16, device="sm_75")
    assert "7.5" in dict(made.declined)["sm80"]
    with pytest.raises(ValueError, match="family='sm80': float32"):
        plan((2, 9, 8), (2, 9, 8), device="sm_80", family="sm80")


@pytest.mark.parametrize(
    ("heads", "heads_k", "seqlen", "tiles", "packed"),
    [(8, 1, 1, 1, True), (8, 2, 33, 4, True), (8, 8, 1, 8, False), (4, 1, 128, 4, False), (4, 1, 2000, 64, False)],
)
def test_heads_are_packed_where_that_saves_tiles(heads, heads_k, seqlen, tiles, packed):
    made = plan((heads, seqlen, 64), (heads_k, 700, 64), dtype=np.float16, device="sm_80").kernels[0]
    assert made.spec.block_m == 128
    assert (made.grid, made.spec.pack_heads) == (tiles, packed)


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (Tile(block_m=100), ["block_m=100", "multiple of"]),
        (Tile(block_n=40), ["block_n=40", "multiple of 16"]),
        (Tile(stages=1), ["stages=1", "at least 2"]),
        (Tile(warps=3), ["warps=3", "even"]),
        (Tile(block_m=256, warps=4), ["registers"]),
        (Tile(block_n=256, stages=4), ["shared memory", "101376"]),
    ],
)
def test_a_tile_that_does_not_fit_ampere_says_why(tile, words):
    with pytest.raises(ValueError, match="does not fit fwd_sm80") as caught:
        plan((1, 64, 128), (1, 64, 128), dtype=np.float16, device="sm_86", tile=tile)
    for word in words:
        assert word in str(caught.value)


def test_plans_are_values():
    a = plan((4, 100, 64), (2, 80, 64), causal=True, backward=True)
    b = plan((4, 100, 64), (2, 80, 64), causal=True, backward=True)
    assert a == b
    assert hash(a) == hash(b)
    assert pickle.loads(pickle.dumps(a)) == a


def test_a_plan_prints_what_it_holds():
    text = str(plan((2, 4, 100, 64), (2, 80, 64), backward=True))
    for word in ("backward", "sm_90", "simt", "bwd_simt_dkdv", "bwd_simt_dq", "bwd_finish", "workspace", "copies"):
        assert word in text
    assert "cpu" in str(explain(*[np.zeros((1, 2, 3), np.float32)] * 3))


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from(DTYPES), st.booleans())
def test_tiles_do_not_depend_on_batch_or_heads(batch, heads, dtype, backward):
    def tiles(lead):
        made = plan((*lead, 65, 40), (*lead, 90, 40), dtype=dtype, backward=backward)
        return [(s.name, s.spec, s.threads, s.smem) for s in made.kernels]

    assert tiles((batch, heads)) == tiles((1,))


def test_grid_covers_every_row():
    made = plan((3, 8, 100, 64), (3, 2, 300, 64), backward=True)
    grids = {s.name: s.grid for s in made.kernels}
    blocks = {s.name: (s.spec.block_m, s.spec.block_n) for s in made.kernels}
    assert grids["bwd_simt_dq"] == math.ceil(100 / blocks["bwd_simt_dq"][0]) * 8 * 3
    assert grids["bwd_simt_dkdv"] == math.ceil(300 / blocks["bwd_simt_dkdv"][1]) * 2 * 3


def test_wrt_leaves_kernels_out():
    names = [s.name for s in plan((2, 9, 8), (2, 9, 8), backward=True, wrt=("q",)).kernels]
    assert names == ["bwd_delta", "bwd_simt_dq"]
    names = [s.name for s in plan((2, 9, 8), (2, 9, 8), backward=True, wrt=("v",)).kernels]
    assert names == ["bwd_delta", "bwd_simt_dkdv"]


def test_workspace_counts_delta_and_partials():
    shared = plan((3, 2, 50, 16), (2, 70, 16), backward=True)
    assert shared.workspace == 4 * (3 * 2 * 50 + 2 * 3 * 2 * 70 * 16)
    own = plan((3, 2, 50, 16), (3, 2, 70, 16), backward=True)
    assert own.workspace == 4 * 3 * 2 * 50
    assert plan((3, 2, 50, 16), (2, 70, 16)).workspace == 0


def test_what_must_be_copied_is_told():
    packed = np.zeros((2, 40), np.dtype([("a", np.uint8), ("x", np.float32, (8,))]))["x"]
    x = np.zeros((2, 40, 8), np.float32)
    made = explain(packed, x, x, device="sm_90")
    assert len(made.copies) == 1
    assert made.copies[0].startswith("q: strides")
    assert not explain(x[:, ::-2], x, x, device="sm_90").copies


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (Tile(block_m=4096), ["block_m=4096", "shared memory", "232448"]),
        (Tile(block_m=100), ["block_m=100", "multiple"]),
        (Tile(block_n=4), ["block_n=4", "multiple of 8"]),
        (Tile(warps=64), ["warps=64", "2048", "1024"]),
        (Tile(stages=3), ["stages=3", "stage"]),
        (Tile(block_m=128, block_n=64, warps=2), ["registers"]),
    ],
)
def test_a_tile_that_does_not_fit_says_why(tile, words):
    with pytest.raises(ValueError, match="does not fit") as caught:
        plan((1, 64, 64), (1, 64, 64), tile=tile)
    for word in words:
        assert word in str(caught.value)


def test_a_tile_that_fits_is_used():
    step = plan((1, 64, 64), (1, 64, 64), tile=Tile(block_m=32, block_n=16, warps=2)).kernels[0]
    assert (step.spec.block_m, step.spec.block_n, step.spec.num_warps) == (32, 16, 2)


@pytest.mark.parametrize(("name", "value"), [("block_m", 0), ("block_n", -8), ("warps", 0), ("stages", -1)])
def test_tile_fields_are_positive(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Tile(**{name: value})


@pytest.mark.parametrize("value", [1.5, True, "64"])
def test_tile_fields_are_integers(value):
    with pytest.raises(TypeError, match="block_m"):
        Tile(block_m=value)


def test_limits_of_the_gpu_families():
    with pytest.raises(ValueError, match=r"q\.shape\[-1\]=300"):
        plan((1, 4, 300), (1, 4, 300))
    with pytest.raises(ValueError, match=r"v\.shape\[-1\]=257"):
        plan((1, 4, 30), (1, 4, 30), dim_v=257)
    with pytest.raises(ValueError, match="device='sm_52'"):
        plan((1, 4, 30), (1, 4, 30), device="sm_52")
    long = np.broadcast_to(np.float32(0), (1, 2**31, 8))
    short = np.zeros((1, 4, 8), np.float32)
    with pytest.raises(ValueError, match="q has 2147483648 rows"):
        explain(long, short, short, device="sm_90")


def test_too_many_blocks_are_refused():
    many = np.broadcast_to(np.float32(0), (2**26, 64, 4096, 8))
    with pytest.raises(ValueError, match="thread blocks"):
        explain(many, many, many, device="sm_90")


def test_importing_leaves_cupy_alone():
    import subprocess
    import sys

    code = "import sys, cupyflash; print('cupy' in sys.modules, 'threadpoolctl' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
    assert cupyflash.__version__

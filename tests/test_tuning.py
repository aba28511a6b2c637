"""Tuning: candidates that run, the fastest kept, and files that nobody can break."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator import Device, why_not

import cupyflash
from cupyflash import Tile, TuningCacheWarning, _planner, _ready, _rows, _tuned, _tuning, attention, explain, tune
from cupyflash._options import Asked
from cupyflash._plan import DEVICES, Rows
from cupyflash._problem import Problem, read_problem
from cupyflash._program import main, timing
from cupyflash._tiles_simt import TABLE, TileRow
from cupyflash._tiles_sm80 import AmpereRow
from cupyflash._tiles_sm90 import HOPPER_FORMS

H = DEVICES["sm_90"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, turned on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CUPYFLASH_TUNING", "1")
    _tuned.forget()
    yield tmp_path / "cupyflash" / "tiles"
    _tuned.forget()
    _ready.forget()


def arrays(dtype: Any = ml_dtypes.bfloat16, seqlen: int = 1000, dim: int = 128, lead: tuple[int, ...] = (2,)) -> Any:
    return tuple(np.zeros((*lead, seqlen, dim), dtype) for _ in range(3))


def block_n_of(plan: Any) -> int:
    return int(plan.kernels[0].spec.block_n)


def problem_of(*qkv: Any, causal: bool = False) -> Problem:
    return read_problem(*qkv, scale=None, causal=causal, q_offset=None, layout="hsd", precision=None)


# Two tiles of width 128, neither of which is the planner's own.
OWN = block_n_of(explain(*arrays(), device="sm_90"))
ROW, OTHER = (
    next(row for row in _rows.candidates("fwd_sm90", problem_of(*arrays()), H.smem) if row.block_n == n and n != OWN)
    for n in (96, 80)
)


def keep(row: Any = ROW, kernel: str = "fwd_sm90", problem: Problem | None = None) -> Path:
    path = _tuned.keep(kernel, problem or problem_of(*arrays()), H, row, {})
    _tuned.forget()
    return path


def block_n(*qkv: Any, **options: Any) -> int:
    return block_n_of(explain(*qkv, device="sm_90", **options))


# --------------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("device", ["sm_60", "sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_every_candidate_plans_and_the_planners_own_is_among_them(device: str, dtype: Any) -> None:
    for dim, dim_v in ((7, 7), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)):
        q = np.zeros((1, 5000, dim), dtype)
        v = np.zeros((1, 5000, dim_v), dtype)
        for causal in (False, True):
            problem = problem_of(q, q, v, causal=causal)
            for wrt in (None, frozenset("qkv")):
                plan = _planner.plan_gpu(problem, DEVICES[device], None, None, wrt)
                for step in plan.kernels:
                    rows = _rows.candidates(step.name, problem, DEVICES[device].smem)
                    assert len(set(rows)) == len(rows)
                    assert bool(rows) == (step.name in _rows.tiled_kernels())
                    plans = [with_row(problem, DEVICES[device], step.name, row, wrt) for row in rows]
                    if rows:
                        assert plan.kernels in [made.kernels for made in plans]


def with_row(problem: Problem, device: Any, kernel: str, row: Any, wrt: Any) -> Any:
    """The plan with a row, which must be the one that is used, and fit."""
    made = _planner.plan_gpu(problem, device, None, Rows(rows=((kernel, row),)), wrt)
    (step,) = (step for step in made.kernels if step.name == kernel)
    assert step.smem <= device.smem
    assert (step.spec.block_m, step.spec.block_n, step.threads) == (row.block_m, row.block_n, 32 * row.warps)
    assert f"{kernel}: a tile that tune() has kept" in made.notes
    return made


def test_hopper_candidates_cover_the_forms() -> None:
    rows = _rows.candidates("fwd_sm90", problem_of(*arrays(dim=64)), H.smem)
    assert {(row.block_m, row.overlap, row.take_turns, row.min_blocks) for row in rows} == set(HOPPER_FORMS)
    assert {row.stages for row in rows} == {2, 3}
    assert 20 < len(rows) < 60  # each one is compiled


@pytest.mark.parametrize(("dim", "dim_v"), [(16, 16), (32, 32), (64, 64), (128, 16)])
def test_no_hopper_candidate_has_a_product_beyond_the_registers_at_entry(dim: int, dim_v: int) -> None:
    """512 threads begin with 128 registers each, and ptxas refuses the scores of more than 192 keys; 384 have 168."""
    q, v = (np.zeros((1, 300, width), ml_dtypes.bfloat16) for width in (dim, dim_v))
    rows = _rows.candidates("fwd_sm90", problem_of(q, q, v), H.smem)
    assert max(row.block_n for row in rows if row.block_m == 192) == 192
    assert max(row.block_n for row in rows if row.block_m < 192) > 192


def test_a_tile_that_ptxas_refuses_is_refused_with_the_numbers() -> None:
    for options in ({"tile": Tile(192, 208)}, {"tile": Tile(192, 208), "causal": True}):
        with pytest.raises(ValueError, match=r"104 \+ 26 registers a thread: 512 threads begin with 128"):
            explain(*arrays(dim=64), device="sm_90", **options)


def test_rows_survive_json() -> None:
    ampere = AmpereRow(128, 64, 4, 4, 2, 0, False, "")
    for kernel, row in (("fwd_sm90", ROW), ("fwd_sm80", ampere), ("bwd_simt_dq", TileRow(64, 32, 4, 64, ""))):
        assert _rows.make_row(kernel, json.loads(json.dumps(_rows.row_fields(row)))) == row


# ----------------------------------------------------------------------------------------------------- what plans use


def test_a_kept_tile_is_planned_and_explained() -> None:
    q, k, v = arrays()
    planned = explain(q, k, v, device="sm_90")
    assert not planned.notes
    keep()
    made = explain(q, k, v, device="sm_90")
    spec = made.kernels[0].spec
    for name in ("block_m", "block_n", "q_stages", "overlap", "take_turns"):
        assert getattr(spec, name) == getattr(ROW, name)
    assert made.block_n == 96 != planned.block_n
    assert made.notes == ("fwd_sm90: a tile that tune() has kept",)
    assert "tune()" in str(made)
    assert explain(q, k, v, device="sm_90") is made  # plans are cached, and the file is not read again


def test_a_kept_tile_is_for_its_class_alone() -> None:
    own = block_n(*arrays())
    keep()
    assert block_n(*arrays()) == 96
    assert block_n(*arrays(lead=(3, 5))) == 96  # batch and heads never matter
    assert block_n(*arrays(seqlen=513)) == 96
    assert block_n(*arrays(dim=100)) == 96
    for other in ({"seqlen": 512}, {"seqlen": 1025}, {"dtype": np.float16}):
        assert block_n(*arrays(**other)) == own
    assert not explain(*arrays(dim=64), device="sm_90").notes
    assert not explain(*arrays(), device="sm_90", causal=True).notes
    assert not explain(*arrays(), device="sm_90", backward=True).notes
    assert not explain(*arrays(), device="sm_80").notes


def test_a_tile_of_the_callers_own_goes_first() -> None:
    keep()
    plain = explain(*arrays(), device="sm_90", tile=Tile(block_m=128))
    assert plain.kernels[0].spec.block_n != 96
    assert not plain.notes


def test_kernels_of_one_backward_are_tuned_alone() -> None:
    qkv = arrays(np.float32, dim=64)
    row = TileRow(64, 32, 4, 64, "")
    keep(row, "bwd_simt_dq", problem_of(*qkv))
    made = {step.name: step.spec for step in explain(*qkv, device="sm_90", backward=True).kernels}
    keep(row, "bwd_simt_dkdv", problem_of(*arrays(np.float32, dim=64, seqlen=5000)))
    assert (made["bwd_simt_dq"].block_m, made["bwd_simt_dq"].block_n) == (64, 32)
    table = TABLE["bwd_simt_dkdv", 4]
    assert made["bwd_simt_dkdv"].block_n == next(r for largest, r in table if largest >= 64).block_n


def test_wide_heads_are_refused_by_the_plan_itself() -> None:
    with pytest.raises(ValueError, match="head widths from 1 to 256"):
        explain(*arrays(dim=300), device="sm_90")


def test_the_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    keep()
    monkeypatch.setenv("CUPYFLASH_TUNING", "0")
    _tuned.forget()
    assert not explain(*arrays(), device="sm_90").notes
    monkeypatch.setenv("CUPYFLASH_TUNING", "maybe")
    _tuned.forget()
    with pytest.raises(ValueError, match="CUPYFLASH_TUNING='maybe'"):
        explain(*arrays(), device="sm_90")


def test_relative_cache_homes_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert _tuned.folder(H).is_relative_to(Path.home() / ".cache" / "cupyflash" / "tiles" / cupyflash.__version__)


def test_cards_of_one_name_are_told_apart() -> None:
    cards = (H, replace(H, sms=100), replace(H, smem=1), replace(H, name="x"))
    assert len({_tuned.folder(card) for card in cards}) == 4


# ------------------------------------------------------------------------------------------------------ damaged files


def change(**fields: Any) -> Callable[[Path], None]:
    def body(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return body


TILE = _rows.row_fields(ROW)
def test_p_in_two_parts_has_tiles_of_its_own() -> None:
    """Where tensor cores take it so: float32 is "highest" with the kernels that it has anyway."""
    for dtype, same in ((np.float16, False), (np.float32, True)):
        x = np.zeros((1, 20, 8), dtype)
        asked = {"scale": None, "causal": False, "q_offset": None, "layout": "hsd"}
        once, highest = (
            _tuned.class_of(read_problem(x, x, x, precision=precision, **asked)) for precision in (None, "highest")
        )
        assert (once == highest, str(once) == str(highest)) == (same, same)


PROBLEMS = vars(_tuned.class_of(problem_of(*arrays())))
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda path: path.write_text(path.read_text()[:50]), ""),
    "empty": (lambda path: path.write_text(""), ""),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe{}"), ""),
    "nested": (lambda path: path.write_text("[" * 100_000), ""),
    "no object": (lambda path: path.write_text("[1]"), "no JSON object"),
    "format": (change(format=99), "format is 99, not 2"),
    "version": (change(version="0.0.1"), "version is '0.0.1'"),
    "card": (change(card="NVIDIA L4"), "card is 'NVIDIA L4'"),
    "kernel": (change(kernel="bwd_delta"), "'bwd_delta' has no tile"),
    "kernel type": (change(kernel=["fwd_sm90"]), "has no tile"),
    "problems": (change(problems={"dtype": "bfloat16"}), "problems are described by"),
    "problems' types": (change(problems=PROBLEMS | {"seqlen_q": True}), "problems are described by"),
    "tile": (change(tile={"block_m": 128}), "has the fields block_m, block_n"),
    "tile's types": (change(tile=TILE | {"block_n": 96.0}), r"block_n=96\.0"),
    "tile's values": (change(tile=TILE | {"stages": 0}), "stages=0"),
    "no candidate": (change(tile=TILE | {"block_n": 9 * 16}), "is no tile of fwd_sm90"),
    "does not fit": (change(tile=TILE | {"block_n": 4096}), "is no tile of fwd_sm90"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_ignored_with_a_warning(name: str) -> None:
    damage, text = DAMAGE[name]
    path = keep()
    other = keep(problem=problem_of(*arrays(seqlen=5000)))
    damage(path)
    assert path != other
    with pytest.warns(TuningCacheWarning, match=f"(?s){re.escape(str(path.parent))}.*{text}"):
        assert not explain(*arrays(), device="sm_90").notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not explain(*arrays(), device="sm_90").notes  # it is told once
    assert explain(*arrays(seqlen=5000), device="sm_90").notes, "the other files count"


def test_a_folder_that_is_a_file_is_no_error(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("")
    assert not explain(*arrays(), device="sm_90").notes


def test_nothing_else_is_left_in_the_folder() -> None:
    path = keep()
    assert list(path.parent.iterdir()) == [path]
    keep(OTHER)
    assert list(path.parent.iterdir()) == [path], "one file for a class, whose last winner counts"
    assert block_n(*arrays()) == 80


def test_a_failed_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = keep()
    monkeypatch.setattr(os, "replace", lambda *names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keep(OTHER)
    assert list(path.parent.iterdir()) == [path]
    assert block_n(*arrays()) == 96


def write(number: int) -> None:
    """One of many processes: its own class, and one that all of them write."""
    for turn in range(10):
        keep(OTHER if (number + turn) % 2 else ROW)
        keep(problem=problem_of(*arrays(seqlen=2 ** (number + 1), dtype=np.float16)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a file that is half written would warn
            assert block_n(*arrays()) in (80, 96)


def test_concurrent_writers_lose_nothing() -> None:
    processes = [multiprocessing.get_context("fork").Process(target=write, args=(n,)) for n in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    _tuned.forget()
    for n in range(6):
        assert explain(*arrays(seqlen=2 ** (n + 1), dtype=np.float16), device="sm_90").notes
    assert len(list(_tuned.folder(H).iterdir())) == 7


# --------------------------------------------------------------------------------------------------------------- tune


class FakeClock:
    """Runs nothing; says how long a plan takes."""

    def __init__(self, seconds: Callable[[Any], float]) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, call: Any, repeats: int) -> float:
        self.calls += 1
        contender = call.__self__
        ((kernel, row),) = contender._rows.rows
        return self.seconds((kernel, row))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], float]], FakeClock]:
    """Put a fake clock in the place of the GPU's."""

    def use(seconds: Callable[[Any], float]) -> FakeClock:
        made = FakeClock(seconds)
        monkeypatch.setattr(timing, "graph_clock", made)
        monkeypatch.setattr(_tuning.Call, "forward", lambda *args: None)
        return made

    return use


def favourite(**fields: Any) -> Callable[[Any], float]:
    """A card on which tiles with these fields take half the time."""

    def seconds(candidate: Any) -> float:
        _, row = candidate
        return 1e-3 if all(getattr(row, name) == value for name, value in fields.items()) else 2e-3

    return seconds


def test_tune_keeps_the_fastest_for_this_and_later_processes(clock: Any) -> None:
    clock(favourite(block_m=192, block_n=112, q_stages=1))
    with Device() as xp:
        qkv = [xp.asarray(x) for x in arrays()]
        found = tune(*qkv, backward=False)
        made = explain(*qkv)
        (kernel,) = found.kernels
        assert (kernel.kernel, kernel.problems) == ("fwd_sm90", "bfloat16-d128-v128-q1024-k1024")
        assert (kernel.tile["block_m"], kernel.tile["block_n"]) == (192, 112)
        assert (made.kernels[0].spec.block_m, made.kernels[0].spec.block_n) == (192, 112)
        assert made.notes
        assert (kernel.seconds, kernel.planned_seconds) == (1e-3, 2e-3)
        assert "100.0 % faster" in str(found)
        assert kernel.path is not None
        content = json.loads(kernel.path.read_text())
        assert content["tile"] == kernel.tile
        assert content["facts"]["shapes"] == {name: [2, 1000, 128] for name in "qkv"}
        _tuned.forget()  # as a new process would find it
        assert explain(*qkv) == made


def test_tune_times_each_kernel_of_the_backward(clock: Any) -> None:
    made = clock(favourite(block_n=32, block_m=64, dim_chunk=64))
    with Device(arch=80) as xp:
        qkv = [xp.asarray(x) for x in arrays(np.float32, seqlen=40, dim=64)]
        found = {kernel.kernel: kernel for kernel in tune(*qkv).kernels}
        assert list(found) == ["fwd_simt", "bwd_simt_dkdv", "bwd_simt_dq"]
        assert (found["fwd_simt"].tile["block_m"], found["fwd_simt"].tile["block_n"]) == (64, 32)
        assert {step.name for step in explain(*qkv, backward=True).kernels} >= {"bwd_simt_dkdv", "bwd_simt_dq"}
    assert made.calls > 2 * sum(len(kernel.tried) for kernel in found.values())


def test_a_gain_below_a_percent_is_not_worth_other_bits(clock: Any) -> None:
    for gain, kept in ((0.995, False), (0.98, True)):
        clock(lambda candidate, gain=gain: 1e-3 * (gain if candidate[1].block_m == 64 else 1))
        with Device() as xp:
            (kernel,) = tune(*(xp.asarray(x) for x in arrays()), backward=False).kernels
        assert (kernel.tile["block_m"] == 64) == kept
        assert ("the planner's own tile" in str(kernel)) != kept


# What a compiler says of a kernel that does not compile: warnings come first.
LOG = """
kernels/fwd_sm90.cu(12): warning #177-D: variable "DIM_CHUNK" was declared but never referenced
  constexpr int DIM_CHUNK = 64;

ptxas fatal   : (C7602) Insufficient registers (128)
ptxas fatal   : Ptx assembly aborted due to errors
"""


def test_candidates_that_do_not_run_are_told(clock: Any) -> None:
    def seconds(candidate: Any) -> float:
        if candidate[1].block_m == 64:
            raise RuntimeError(LOG)
        return 1e-3 if candidate[1].block_n == 96 else 2e-3

    clock(seconds)
    with Device() as xp:
        (kernel,) = tune(*(xp.asarray(x) for x in arrays()), backward=False).kernels
    reasons = {why for why in kernel.tried.values() if isinstance(why, str)}
    assert reasons == {"RuntimeError: ptxas fatal   : (C7602) Insufficient registers (128)"}
    assert kernel.tile["block_n"] == 96


def test_noise_does_not_choose_the_winner(clock: Any) -> None:
    """The first look is wrong about one candidate by half, and all clocks drift; turns find the truth."""
    seen: dict[Any, int] = {}

    def seconds(candidate: Any) -> float:
        seen[candidate] = seen.get(candidate, 0) + 1
        drift = 1 + 1e-4 * sum(seen.values())
        lucky = candidate[1] == OTHER and seen[candidate] <= 3
        return drift * (0.9e-3 if candidate[1].block_n == 96 else 0.8e-3 if lucky else 1e-3)

    clock(seconds)
    with Device() as xp:
        (kernel,) = tune(*(xp.asarray(x) for x in arrays()), backward=False).kernels
    assert kernel.tile["block_n"] == 96


def test_tune_without_a_cache_keeps_nothing(clock: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    clock(favourite(block_n=96))
    monkeypatch.setenv("CUPYFLASH_TUNING", "0")
    with Device() as xp:
        (kernel,) = tune(*(xp.asarray(x) for x in arrays()), backward=False).kernels
    assert kernel.path is None
    assert "not kept" in str(kernel)
    assert not cache.exists()


def test_a_cache_that_cant_be_written_costs_a_warning(clock: Any, cache: Path) -> None:
    clock(favourite(block_n=96))
    cache.parent.mkdir()
    cache.write_text("")
    with Device() as xp, pytest.warns(TuningCacheWarning, match="the tile of fwd_sm90 is not kept"):
        (kernel,) = tune(*(xp.asarray(x) for x in arrays()), backward=False).kernels
    assert kernel.path is None
    assert kernel.tile["block_n"] == 96


def test_numpy_arrays_have_nothing_to_tune() -> None:
    with pytest.raises(ValueError, match="on the CPU there is nothing to tune"):
        tune(*arrays())


def test_empty_problems_have_nothing_to_time(clock: Any) -> None:
    clock(favourite())
    with Device() as xp, pytest.raises(ValueError, match="nothing to time"):
        tune(*(xp.asarray(x) for x in arrays(lead=(0, 2))))


def test_tuned_tiles_compute_the_same(clock: Any) -> None:
    """A tile other than the planner's, found and kept, through the real kernels."""
    why_not()
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 70, 16)).astype(np.float32)
    want = attention(q, k, v)
    own = explain(q, k, v, device="sm_60").kernels[0].spec.block_m
    row = next(
        row for row in _rows.candidates("fwd_simt", problem_of(q, k, v), H.smem) if row.block_m != own
    )
    with Device(arch=60, shared=H.smem, undefined=False) as xp:
        on_gpu = [xp.asarray(x) for x in (q, k, v)]
        call = _tuning.Call(*on_gpu, Asked())
        _tuned.keep("fwd_simt", call.problem, call.device, row, {})
        _tuned.forget()
        assert explain(*on_gpu).kernels[0].spec.block_m == row.block_m
        np.testing.assert_allclose(attention(*on_gpu).get(), want, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- the program


def test_the_program_needs_cupy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cupyflash._program import machine

    monkeypatch.setattr(machine, "read_cupy", lambda driver: machine.Cupy(problem="CuPy is not installed"))
    assert main(["tune"]) == 2
    assert "CuPy can't be used here" in capsys.readouterr().err


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program on a device that is not there."""
    from cupyflash._program import backend as backends
    from cupyflash._program import machine

    here = machine.read_machine()
    with Device() as xp:
        monkeypatch.setattr(backends.Backend, "free", lambda self: None)
        monkeypatch.setattr(backends, "choose", lambda name: backends.Backend("cupy", xp, here))
        yield xp


ARGS = ["tune", "--seqlen", "64", "100", "--heads", "1", "--batch", "1", "--head-dim", "32", "--forward-only"]


@pytest.mark.usefixtures("emulated")
def test_the_program_tunes(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    clock(favourite(block_m=64))
    assert main(ARGS) == 0
    text = capsys.readouterr().out
    assert text.count("fwd_sm90, float16-d32-v32-q") == 2
    assert "100.0 % faster" in text
    assert main([*ARGS, "--causal", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["device"]) == ("tune", "emulated")
    assert [kernel["problems"] for kernel in found["kernels"]] == [
        f"float16-d32-v32-causal-q{n}-k{n}" for n in (64, 128)
    ]
    assert all(Path(kernel["path"]).is_file() for kernel in found["kernels"])


@pytest.mark.usefixtures("emulated")
def test_the_program_says_what_it_cant_tune(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    clock(favourite())
    assert main([*ARGS, "--family", "sm90", "--dtype", "float32"]) == 2
    assert "family='sm90'" in capsys.readouterr().err


def test_a_bad_variable_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUPYFLASH_TUNING", "on")
    with pytest.raises(SystemExit) as stop:
        main(["info"])
    assert stop.value.code == 2
    assert "CUPYFLASH_TUNING='on'" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_tune_on_a_gpu(gpu: Any, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (gpu.xp.asarray(rng.standard_normal((2, 300, 64)).astype(dtype)) for _ in range(3))
    want = gpu.numpy(attention(q, k, v))
    found = tune(q, k, v)
    portable = ["fwd_simt", "bwd_simt_dkdv", "bwd_simt_dq"]
    wanted = portable if gpu.p_dtype(dtype) is None else ["fwd_sm90", "bwd_sm90"]
    assert [kernel.kernel for kernel in found.kernels] == wanted
    for kernel in found.kernels:
        refused = {name: why for name, why in kernel.tried.items() if not isinstance(why, float)}
        assert not refused, "\n".join(f"{kernel.kernel} {name}: {why}" for name, why in refused.items())
        assert math.isfinite(kernel.seconds)
        assert kernel.path is not None
    assert len(explain(q, k, v).notes) == 1
    near = 1e-5 if dtype == np.float32 else 1e-2
    np.testing.assert_allclose(gpu.numpy(attention(q, k, v)).astype(float), want.astype(float), rtol=near, atol=near)

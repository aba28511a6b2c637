"""The emulator itself: what it accepts, what it reports and how, on kernels of a few lines."""

# ruff: noqa: E501  (kernels on one line each read best)

import re

import numpy as np
import pytest
from emulator import KINDS, BuildError, Device, EmulatorError, Schedule, build, why_not
from emulator.errors import KINDS as ALL_KINDS
from emulator.schedule import SIMPLEST

from cupyflash._compile import kernels_dir

WORDS = build.WORDS
HEAD = '#include "types.cuh"\n#include "memory.cuh"\n#include "mma_sm80.cuh"\n#include "mma_sm90.cuh"\n'


@pytest.fixture(scope="module", autouse=True)
def emulator():
    why_not()


def launch(body, *, schedule=SIMPLEST, grid=1, block=64, shared=1024, n=64, prefix="", dtype=np.int32, arch=90):
    """Run `body` with `int* x` (0, 1, 2, ...), `int* y` (never written) and `unsigned char* bytes`, shared memory."""
    kind = {np.int32: "int", np.float32: "float", np.float64: "double", np.uint16: "unsigned short"}[dtype]
    text = f"""{prefix}
extern "C" __global__ void probe({kind}* x, {kind}* y) {{
  struct Smem {{ alignas(1024) unsigned char at[{max(shared, 1)}]; }};
  DYNAMIC_SHARED(Smem, smem);
  {kind}* s = reinterpret_cast<{kind}*>(smem.at);
  const int t = threadIdx.x, lane = t % 32;
  (void)s; (void)t; (void)lane;
{body}
}}
"""
    words = "\n".join(f'#line 1 "kernels/{name}"' for name in ("types.cuh", "memory.cuh", "mma_sm80.cuh"))
    descriptors = f'#line 1 "kernels/descriptors.cuh"\n{(kernels_dir() / "descriptors.cuh").read_text()}'
    text = f'{words}\n{descriptors}\n#line 1 "kernels/mma_sm90.cuh"\n#line 1 "kernels/probe.cu"\n{text}'
    with Device(schedule, arch=arch) as xp:
        x, y = xp.asarray(np.arange(n).astype(dtype)), xp.empty(n, dtype)
        kernel = xp.RawModule(code=text).get_function("probe")
        kernel.max_dynamic_shared_size_bytes = max(shared, 48 * 1024)
        kernel((grid,), (block,), (x, y), shared_mem=shared)
        return y.get()


def report(body, **options):
    with pytest.raises(EmulatorError) as caught:
        launch(body, **options)
    return caught.value


# ------------------------------------------------------------------------------------------------------------ reports


def test_a_report_names_both_sides():
    error = report("s[t] = x[t];\n y[t] = s[(t + 1) % 64];\n", schedule=Schedule("random", "lazy", 1, 4))
    assert error.kind in ("race", "uninitialised")
    error = report("s[0] = t;\n  y[t] = t;\n")
    assert error.kind == "race"
    text = str(error)
    assert re.search(
        r"write of shared\+0 is not ordered after a write by thread 0 \(warp 0, lane 0\) at kernels/probe.cu:8", text
    )
    assert "by thread 1 (warp 0, lane 1) of block (0, 0, 0) at kernels/probe.cu:8" in text
    assert "replay with Schedule(order='in order', asynchronous='eager', resident=1, seed=0)" in text


def test_a_report_names_the_element():
    error = report("y[t] = x[t];\n if (t == 5) y[67] = 1;\n")
    assert error.kind == "out of bounds"
    assert "y+268" in str(error)
    error = report("if (t == 5) y[7] = 0;\n else if (t == 40) y[7] = 1;\n")
    assert "y+28 (element [7])" in str(error)


@pytest.mark.parametrize("seed", range(1, 8))
def test_a_seed_replays(seed):
    body = "if (t % 7 == 0) s[t / 32] = t;\n __syncwarp();\n s[2 + lane] = t;\n y[t] = s[0];\n"
    first, again = (str(report(body, schedule=Schedule.draw(seed))) for _ in range(2))
    assert first == again


def test_schedules_are_drawn_and_checked():
    assert Schedule.draw(0) == Schedule()
    assert len({Schedule.draw(seed) for seed in range(200)}) == 200
    assert eval(repr(Schedule.draw(3))) == Schedule.draw(3)
    for wrong in ({"order": "any"}, {"asynchronous": "never"}, {"resident": 5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Schedule(**wrong)


def test_every_kind_in_the_sources_is_documented():
    used = set()
    for path in build.CORE.glob("*.cpp"):
        used |= set(re.findall(r'(?:fail|undefined)\(\s*"([^"]+)"', path.read_text(encoding="utf-8")))
        used |= set(re.findall(r'EMULATOR_FAULT\(.*, "([^"]+)", "', path.read_text(encoding="utf-8")))
    assert used - {"granule"} <= set(KINDS)
    assert KINDS is ALL_KINDS


# ------------------------------------------------------------------------------------------------- what is reported

FAULTS = {
    "race between lanes": ("s[t] = t;\n y[t] = s[t ^ 1];\n", "uninitialised|race", "shared"),
    "write after read": ("s[t] = t; __syncthreads(); y[t] = s[t ^ 1];\n s[t] = 1;\n", "race", "after a (read|write)"),
    "shuffles order nothing": ("s[t] = t; __shfl_xor_sync(~0u, t, 1);\n y[t] = s[t ^ 1];\n", "race", "shared"),
    "__syncwarp is not __syncthreads": ("s[t] = t; __syncwarp(); y[t] = s[(t + 32) % 64];\n", "uninitialised|race", "shared"),
    "uninitialised shared": ("y[t] = s[t];\n", "uninitialised", "never written"),
    "uninitialised global": ("x[t] = y[t];\n", "uninitialised", "y\\+"),
    "shared overrun": ("s[256 + t] = 1;\n", "out of bounds", "1024 bytes of shared memory"),
    "null": ("int* p = nullptr; p[t] = 1;\n", "out of bounds", "no array is near"),
    "unknown memory": ("x[1 << 20] = 1;\n", "out of bounds", "[xy]\\+|no array"),
    "index outside a local array": ("int a[4] = {1, 2, 3, 4}; y[t] = a[x[t] & 7];\n", "out of bounds", "index"),
    "misaligned": ("*reinterpret_cast<uint4*>(s + 1) = make_uint4(1, 2, 3, 4);\n", "misaligned", "16-byte"),
    "overflow": ("y[t] = x[t] * 0x40000000;\n", "undefined", "multiplication"),
    "shift": ("y[t] = 1 << (x[t] + 30);\n", "undefined", "shift"),
    "division": ("y[t] = 5 / x[t];\n", "undefined", "division"),
    "lanes at two collectives": ("if (lane < 16) __syncwarp(); else __shfl_sync(~0u, t, 0);\n", "divergence", "__shfl_sync|__syncwarp"),
    "lane outside its mask": ("__syncwarp(1);\n", "divergence", "lacks"),
    "lane has exited": ("if (lane == 3) return;\n __syncwarp();\n", "divergence", "exit"),
    "two __syncthreads": ("if (t < 32) __syncthreads();\n else __syncthreads();\n", "divergence", "__syncthreads here"),
    "a warp misses __syncthreads": ("if (t < 32) __syncthreads();\n", "deadlock", "32 of 64 threads have arrived"),
    "barrier with two counts": ("if (t < 32) barrier_sync(2, 64);\n else barrier_sync(2, 32);\n", "barrier", "for 64"),
    "no such barrier": ("barrier_sync(16, 64);\n", "barrier", "no barrier 16"),
    "ldmatrix in part of a warp": (
        "s[t] = t; __syncthreads(); unsigned r[1];\n if (lane < 8) ldmatrix_x1(r, shared_address(s + 4 * lane));\n",
        "deadlock|divergence", "ldmatrix"),
    "aligned collectives at two places": (
        "s[t] = t; __syncthreads(); unsigned r[1];\n if (lane < 8)\n ldmatrix_x1(r, shared_address(s));\n else\n"
        " ldmatrix_x1(r, shared_address(s));\n", "divergence", "ldmatrix"),
    "mbarrier not initialised": ("mbarrier_arrive(shared_address(s));\n", "mbarrier", "no mbarrier"),
    "mbarrier overwritten": (
        "if (t == 0) { mbarrier_init(shared_address(s), 1);\n s[0] = 3; }\n", "mbarrier", "live mbarrier"),
    "too many arrivals": (
        "if (t == 0) { mbarrier_init(shared_address(s), 2); }\n __syncthreads();\n"
        " if (t == 1) mbarrier_expect_tx(shared_address(s), 16);\n __syncthreads(); if (t < 3) mbarrier_arrive(shared_address(s));\n",
        "mbarrier", "more are left"),
    "copy never waited for": ("cp_async<16>(shared_address(s + 4 * t), x + 4 * (t % 16));\n", "unfinished", "cp.async"),
    "copy read too early": (
        "cp_async<4>(shared_address(s + t), x + t); cp_async_commit();\n y[t] = s[t]; cp_async_wait<0>();\n",
        "early use", "cp.async"),
    "another thread's copy": (
        "cp_async<4>(shared_address(s + t), x + t); cp_async_commit(); cp_async_wait<0>();\n y[t] = s[t ^ 1];\n",
        "race|early use|uninitialised", "shared"),
    "bulk load without a proxy fence": (
        "s[64 + t] = 0; if (t == 0) { mbarrier_init(shared_address(s + 128), 1); fence_mbarrier_init(); }\n __syncthreads();\n"
        " if (t == 0) { mbarrier_arrive_expect_tx(shared_address(s + 128), 256);\n bulk_load(shared_address(s + 64), x, 256,"
        " shared_address(s + 128)); }\n mbarrier_wait(shared_address(s + 128), 0);\n", "missing proxy fence", "asynchronous write"),
    "bulk load nobody waits for": (
        "if (t == 0) { mbarrier_init(shared_address(s + 128), 1); fence_mbarrier_init();"
        " mbarrier_arrive_expect_tx(shared_address(s + 128), 256);\n bulk_load(shared_address(s), x, 256, shared_address(s + 128)); }\n",
        "unfinished", "bulk load"),
    "bulk copy of an odd size": (
        "if (t == 0) { mbarrier_init(shared_address(s + 128), 1); fence_mbarrier_init();\n bulk_load(shared_address(s), x, 24,"
        " shared_address(s + 128)); }\n", "misaligned", "multiple of 16"),
    "trap": ("__trap();\n", "trap", "trapped"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fault(name, seed):
    body, kinds, says = FAULTS[name]
    error = report(body, schedule=Schedule.draw(seed), prefix="// " + name)
    assert re.fullmatch(kinds, error.kind), str(error)
    assert re.search(says, str(error)), str(error)


CLEAN = {
    "barriers order": "s[t] = t; __syncthreads(); y[t] = s[t ^ 33]; __syncthreads(); s[t] = 1;\n",
    "warp barriers order": "s[t] = t; __syncwarp(); y[t] = s[t ^ 1]; __syncwarp(); s[t ^ 1] = 1;\n",
    "knowledge passes on": (
        "if (t == 0) s[0] = 5;\n if (t < 32) __syncwarp();\n if (t == 7) s[1] = s[0];\n __syncthreads(); y[t] = s[0] + s[1];\n"
    ),
    "arrive and sync": (
        "if (t < 32) { s[t] = t; barrier_arrive(1, 64); }\n else { barrier_sync(1, 64); y[t] = s[t - 32]; }\n"
    ),
    "mbarrier by threads": (
        "if (t == 0) mbarrier_init(shared_address(s + 64), 32); __syncthreads();\n"
        "if (t < 32) { s[t] = t; mbarrier_arrive(shared_address(s + 64)); }\n"
        "else { mbarrier_wait(shared_address(s + 64), 0); y[t] = s[t - 32]; }\n"
    ),
    "atomics do not race": "atomicAdd(&x[0], t); atomicMax(&x[1], t); __syncthreads(); y[t] = x[0];\n",
    "reads do not race": "if (t == 0) s[0] = 1; __syncthreads(); y[t] = s[0] + x[0];\n",
    "a fence and an atomic publish": (
        "if (t == 0) { s[0] = 4; __threadfence(); atomicExch(&x[9], 77); }\n"
        "if (t == 40) { while (atomicAdd(&x[9], 0) != 77) {}\n __threadfence(); y[0] = s[0]; }\n"
    ),
}


@pytest.mark.parametrize("name", CLEAN)
def test_no_false_alarm(name):
    for seed in range(12):
        launch(CLEAN[name], schedule=Schedule.draw(seed), prefix="// " + name)


def test_bytes_and_halves_in_shared_memory():
    """Neighbours smaller than a word do not collide: the shadow becomes finer where a kernel needs it."""
    for dtype in (np.uint16, np.int32):
        body = "unsigned char* b = smem.at + 512; b[t] = t; s[t] = x[t]; __syncthreads(); y[t] = s[t ^ 1] + b[t ^ 1];\n"
        got = launch(body, dtype=dtype)
        np.testing.assert_array_equal(got, 2 * (np.arange(64) ^ 1))


def test_results_of_lazy_copies_come_late():
    body = "s[t] = -1; __syncthreads(); cp_async<4>(shared_address(s + t), x + t); cp_async_commit(); cp_async_wait<0>(); y[t] = s[t];\n"
    for asynchronous in ("eager", "lazy", "random"):
        np.testing.assert_array_equal(launch(body, schedule=Schedule("random", asynchronous, 1, 5)), np.arange(64))


# ------------------------------------------------------------------------------------------------- blocks and grids


def test_a_wait_for_a_block_that_has_not_started():
    body = "if (t == 0 && blockIdx.x == 0) while (load_acquire(&x[1]) != 7) {}\n if (t == 0 && blockIdx.x == 1) store_release(&x[1], 7);\n"
    error = report(body, grid=2, schedule=Schedule())
    assert error.kind == "deadlock"
    assert "flag at x+4" in str(error)
    assert "1 of 2 blocks have not started" in str(error)
    launch(body, grid=2, schedule=Schedule(resident=2))


def test_blocks_race():
    error = report("if (t == 0) y[0] = blockIdx.x;\n", grid=2)
    assert error.kind == "race between blocks"
    assert "of block (0, 0, 0)" in str(error)
    assert "of block (1, 0, 0)" in str(error)


SPINS = {
    "an atomic that adds nothing": "if (t == 0) { while (atomicAdd(&x[9], 0) != 77) {}\n y[0] = 1; }\n if (t == 40) atomicExch(&x[9], 77);\n",
    "compare and swap": "if (t == 0) { while (atomicCAS(&x[9], 77, 1) != 77) {}\n y[0] = 1; }\n if (t == 40) atomicExch(&x[9], 77);\n",
    "an ordered load": "if (t == 0) { while (load_acquire(&x[9]) != 77) {}\n y[0] = 1; }\n if (t == 40) store_release(&x[9], 77);\n",
    "try_wait": (
        "if (t == 0) { mbarrier_init(shared_address(s), 1); } __syncthreads();\n"
        "if (t == 0) { while (!mbarrier_try_wait(shared_address(s), 0)) {}\n y[0] = 1; }\n if (t == 40) mbarrier_arrive(shared_address(s));\n"
    ),
}


@pytest.mark.parametrize("name", SPINS)
def test_spins_wait_for_other_threads(name):
    for seed in range(6):
        assert launch(SPINS[name], schedule=Schedule.draw(seed), prefix="// " + name)[0] == 1


def test_spins_that_nobody_ends():
    for name, body in SPINS.items():
        error = report(body.replace("t == 40", "t == 400"), prefix="// endless " + name)
        assert error.kind == "deadlock"
        assert re.search(r"flag at x\+36|mbarrier at shared\+0", str(error))
    error = report("volatile int* flag = x; while (flag[3] == 3) {}\n")
    assert error.kind == "deadlock"
    assert "spins" in str(error)


def test_launch_limits():
    assert report("y[t] = 0;", block=2048).kind == "launch"
    assert report("y[t] = 0;", shared=300 * 1024).kind == "launch"
    assert report("y[t] = 0;", grid=0).kind == "launch"


def test_short_last_warp():
    np.testing.assert_array_equal(launch("y[t] = __ballot_sync(~0u, 1);\n", block=40, n=40)[32:], 255)


# ------------------------------------------------------------------------------------------------------------ building


def test_words_have_every_name_of_the_device():
    """Each function, struct, macro and constant of a replaced word exists in its replacement."""
    pattern = re.compile(
        r"^(?:struct (?:alignas\(\S+\) )?(\w+) \{|#define (\w+)\(|__device__ .*?\b(\w+)\(|constexpr \w+ (\w+) =)",
        re.MULTILINE,
    )
    own = {"WGMMA_", "Bits", "Pun", "IS_FLOAT16"}  # how the device's side is written
    for path in WORDS.glob("*.cuh"):
        device, host = ((folder / path.name).read_text(encoding="utf-8") for folder in (kernels_dir(), WORDS))
        names = {name for groups in pattern.findall(device) for name in groups if name}
        assert names, path
        missing = {n for n in names if not re.search(rf"\b{n}\b", host) and not any(n.startswith(p) for p in own)}
        assert not missing, f"{path.name} lacks {missing}"


def test_a_kernel_that_does_not_compile():
    with pytest.raises(BuildError, match="probe"):
        launch("this is no C++;\n")


def test_builds_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPYFLASH_EMULATOR_CACHE", str(tmp_path / "builds"))
    build.cache.cache_clear()
    try:
        launch("y[t] = 41;\n")
        (first,) = (tmp_path / "builds").glob("*.so")
        stamp = first.stat().st_mtime_ns
        with Device() as xp:
            del xp
        launch("y[t] = 41;\n")
        assert first.stat().st_mtime_ns == stamp
        launch("y[t] = 42;\n")
        assert len(list((tmp_path / "builds").glob("*.so"))) == 2
    finally:
        build.cache.cache_clear()


def test_without_a_compiler(monkeypatch):
    """Skipped with a reason on a user's machine, failed where CI promises a compiler."""
    monkeypatch.setenv("CUPYFLASH_EMULATOR_CXX", "no-such-compiler")
    build.compiler.cache_clear()
    try:
        monkeypatch.delenv("CI", raising=False)
        with pytest.raises(pytest.skip.Exception, match="g\\+\\+"):
            why_not()
        monkeypatch.setenv("CI", "true")
        with pytest.raises(pytest.fail.Exception, match="g\\+\\+"):
            why_not()
    finally:
        build.compiler.cache_clear()

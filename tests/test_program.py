"""The program: what it prints, what it checks, and its exit codes; broken computations must make it fail."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import cupyflash
from cupyflash import _cpu
from cupyflash._program import backend as backends
from cupyflash._program import bench, contenders, demo, host, machine, main, selftest, terminal, timing
from cupyflash._program.machine import Cupy, Driver, Gpu
from cupyflash._program.workload import DIRECTIONS, DTYPE_NAMES, Workload, numpy_dtype
from cupyflash.testing import reference
from cupyflash.testing.cases import run as run_case

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One round of timing, and peers in one thread: BLAS threads that wait for a busy core make tests slow."""
    monkeypatch.setattr(demo, "ROUNDS", 1)
    with threadpool_limits(1, "blas"):
        yield


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    command = [sys.executable, "-m", "cupyflash", *args]
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env={**os.environ, **one}
    )


def in_process(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, Any]:
    """Exit code, and what `--json` printed."""
    code = main([*args, "--json"])
    return code, json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------------ command line


def test_without_arguments_it_prints_help() -> None:
    done = run()
    assert done.returncode == 0
    for command in ("demo", "info", "bench", "selftest"):
        assert re.search(rf"^ +{command} +[A-Z]", done.stdout, re.MULTILINE), done.stdout


def test_a_reader_that_stops_is_no_error() -> None:
    command = [sys.executable, "-m", "cupyflash", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"cupyflash {cupyflash.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ("demo", "--backend", "torch"),
        ("demo", "--seqlen", "0"),
        ("bench", "--dtype", "int8"),
        ("bench", "--seqlen"),
        ("bench", "--family", "sm_1"),
        ("selftest", "--seed", "-1"),
        ("selftest", "--seconds", "long"),
        ("selftest", "--seconds", "nan"),
        ("selftest", "--seconds", "inf"),
        ("train",),
    ],
)
def test_bad_arguments_are_refused(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_bad_number_of_threads_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUPYFLASH_NUM_THREADS", "many")
    with pytest.raises(SystemExit) as stop:
        main(["info"])
    assert stop.value.code == 2
    assert "CUPYFLASH_NUM_THREADS='many'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- demo


def test_demo_prints_a_table_and_a_verdict() -> None:
    done = run("demo", "--backend", "numpy", "--seqlen", "48")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^forward, cupyflash +[\d.]+ us|ms  +[\d.]+ GFLOP/s  +[\d.]+ [KM]iB$", done.stdout, re.M)
    assert "backward, unfused NumPy" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("OK: ")


def test_demo_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = in_process(capsys, "demo", "--backend", "numpy", "--seqlen", "48")
    assert (code, found["ok"], found["backend"]) == (0, True, "numpy")
    assert [row["name"] for row in found["check"]] == ["out", "lse", "dq", "dk", "dv"]
    assert all(0 < row["ratio"] <= 1 for row in found["check"])
    for cell in found["cells"]:
        assert [c["name"] for c in cell["contenders"]] == ["cupyflash", "unfused NumPy"]
        assert all(c["seconds"] > 0 for c in cell["contenders"])
    assert found["memory"]["cupyflash"]["forward"] >= 8 * 48 * 64 * 4  # out itself
    assert found["memory"]["unfused NumPy"]["forward"] >= 8 * 48 * 48 * 4  # the weights


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_demo_fails_when_a_gradient_is_wrong(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        grads = cupyflash.attention_backward(*args, **options)
        getattr(grads, name)[...] *= 1.0001
        return grads

    monkeypatch.setattr(contenders, "attention_backward", broken)
    code, found = in_process(capsys, "demo", "--backend", "numpy", "--seqlen", "40")
    assert (code, found["ok"]) == (1, False)
    assert [row["name"] for row in found["check"] if not row["ok"]] == [name]
    assert found["verdict"].startswith(f"FAILED: a result lies outside its error bound: {name}[")


def test_demo_fails_when_the_output_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        result = cupyflash.attention(*args, **options)
        result.out[0, 7, 31, 5] = np.nan  # fewer rows than the demo samples: it sees all of them
        return result

    monkeypatch.setattr(contenders, "attention", broken)
    assert main(["demo", "--backend", "numpy", "--seqlen", "64"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAILED: ")


def test_demo_says_when_unfused_attention_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: contenders.Unfused) -> None:
        raise MemoryError("Unable to allocate 16.0 GiB")

    monkeypatch.setattr(contenders.Unfused, "forward", full)
    assert main(["demo", "--backend", "numpy", "--seqlen", "64"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("OK: ")
    assert "unfused NumPy attention did not run: MemoryError: Unable to allocate 16.0 GiB" in last


# -------------------------------------------------------------------------------------------------------------- info


def test_info_json() -> None:
    done = run("info", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["cupyflash"] == cupyflash.__version__
    assert found["versions"]["NumPy"] == np.__version__
    assert found["workers"] >= 1
    cpu = next(family for family in found["families"] if family["name"] == "cpu")
    assert cpu["dtypes"] == ["float16", "bfloat16", "float32", "float64"]
    assert cpu["why_not"] is None
    if found["cupy"]["problem"]:
        assert found["backend"] == "numpy"
        assert [f["why_not"] for f in found["families"] if f["name"] == "simt"] == [found["cupy"]["problem"]]


class FakeCuda:
    """The driver's library as `read_driver` calls it."""

    def __init__(self, version: int, gpus: tuple[str, ...] = ("NVIDIA H200",), init: int = 0) -> None:
        self.version, self.gpus, self.init = version, gpus, init

    def __call__(self, name: str) -> FakeCuda:
        assert name in ("libcuda.so.1", "nvcuda.dll")
        return self

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = self.gpus[device.value].encode()
        return 0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "RuntimeError"),
        ("\n=====\n  no kernel image\nmore", "no kernel image"),
        ("an error: first\nof two lines", "an error: first"),
        (
            "f.cu(2): warning #177-D: unused\n\nptxas fatal   : (C7602) No room\nptxas fatal   : aborted due to errors",
            "ptxas fatal   : (C7602) No room",
        ),
        (
            "f.cu(2): warning #1-D: w\nptxas x.ptx, line 9; error   : odd\nf.cu(3): error: b",
            "ptxas x.ptx, line 9; error   : odd; f.cu(3): error: b",
        ),
        (
            "\n".join(f"f.cu({n}): error: {n}" for n in range(5)),
            "f.cu(0): error: 0; f.cu(1): error: 1; f.cu(2): error: 2 (and 2 more errors)",
        ),
    ],
)
def test_an_exception_in_one_line(text: str, line: str) -> None:
    assert machine.first_line(RuntimeError(text)) == line


def test_the_driver_is_read_without_cupy() -> None:
    two = ("NVIDIA H200", "NVIDIA L4")
    assert machine.read_driver(FakeCuda(12040, two)) == Driver(12040, two)
    assert machine.read_driver(FakeCuda(12040)).cuda == "12.4"
    none = machine.read_driver(FakeCuda(13000, init=100))
    assert (none.gpus, none.problem) == ((), "cuInit returned 100: no CUDA device")

    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert machine.read_driver(missing) is None


MISSING = Cupy(problem="CuPy is not installed")


@pytest.mark.parametrize(
    ("driver", "advice"),
    [
        (FakeCuda(12020), 'python -m pip install "cupyflash[cuda12x]"'),
        (FakeCuda(12090), 'python -m pip install "cupyflash[cuda12x]"'),
        (FakeCuda(13000), 'python -m pip install "cupyflash[cuda13x]"'),
        (FakeCuda(13010), 'python -m pip install "cupyflash[cuda13x]"'),
        (FakeCuda(11080), "CuPy needs a driver for CUDA 12.0 or newer: update the driver"),
        (FakeCuda(12040, init=100), "cuInit returned 100: no CUDA device"),
    ],
    ids=["12.2", "12.9", "13.0", "13.1", "11.8", "no device"],
)
def test_a_driver_without_cupy_is_reported(
    driver: FakeCuda, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = machine.read_driver(driver)
    monkeypatch.setattr(machine, "read_driver", lambda: found)
    monkeypatch.setattr(machine, "read_cupy", lambda driver: MISSING)
    for command in (["info"], ["demo", "--seqlen", "16"]):
        assert main(command) == 0
        text = capsys.readouterr().out
        assert advice in text, text
        assert f"for CUDA {found.cuda}" in text
    assert main(["demo", "--backend", "cupy"]) == 2
    assert advice in capsys.readouterr().err


def test_without_a_driver_there_is_no_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "read_driver", lambda: None)
    monkeypatch.setattr(machine, "read_cupy", lambda driver: MISSING)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "pip install" not in text
    assert re.search(r"^CuPy +not installed$", text, re.M)
    assert re.search(r"^driver +no NVIDIA driver$", text, re.M)
    assert re.search(r"^family simt +can't run on CuPy arrays: CuPy is not installed$", text, re.M)


def test_no_advice_where_cupy_works() -> None:
    assert machine.advise(Driver(12040, ("NVIDIA H200",)), Cupy("14.2.0", "12.9")) is None


def test_families_are_the_planners() -> None:
    card = Gpu("NVIDIA H200", 90, 150 * 2**30, 232448, 132)
    cpu, sm90, sm80, simt = machine.read_families(Cupy("14.2.0", "12.9", (card,)))
    assert (cpu.name, sm90.name, sm80.name, simt.name) == ("cpu", "sm90", "sm80", "simt")
    assert simt.device == "NVIDIA H200 (sm_90)"
    assert sm90.dtypes == ("float16", "bfloat16")
    assert sm80.dtypes == ("float16", "bfloat16", "float64")
    assert simt.dtypes == ("float16", "bfloat16", "float32", "float64")
    assert simt.why_not is None
    nothing = machine.read_families(Cupy("14.2.0", "12.9", (Gpu("small", 90, 2**30, 1024, 132),)))[3]
    assert nothing.dtypes == ()
    assert "1024" in str(nothing.why_not)


def test_cupy_that_does_not_import_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('\\n=====\\nlibcublas.so.12: no such file\\n=====\\n')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.read_cupy(None).problem == "CuPy does not import: libcublas.so.12: no such file"


# ------------------------------------------------------------------------------------------------------------- bench


def test_bench_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = in_process(
        capsys, "bench", "--family", "cpu", "--seqlen", "32", "48", "--head-dim", "8", "--heads", "2",
        "--batch", "3", "--causal", "--rounds", "3",
    )  # fmt: skip
    assert code == 0
    assert [(c["workload"]["seqlen"], c["direction"]) for c in found["cells"]] == [
        (32, "forward"), (32, "backward"), (48, "forward"), (48, "backward"),
    ]  # fmt: skip
    for cell in found["cells"]:
        assert cell["workload"] | {"seqlen": 0} == {
            "batch": 3, "heads": 2, "seqlen": 0, "head_dim": 8, "head_dim_v": 8, "dtype": "float32", "causal": True,
        }  # fmt: skip
        ours, unfused = cell["contenders"][:2]
        assert (ours["name"], unfused["name"]) == ("cupyflash", "unfused NumPy")
        assert len(ours["samples"]) == len(unfused["samples"]) == 3
        ratios = [a / b for a, b in zip(unfused["samples"], ours["samples"], strict=True)]
        assert unfused["ratio"] == pytest.approx(sorted(ratios)[1])
        assert min(ratios) <= unfused["quartiles"][0] <= unfused["ratio"] <= unfused["quartiles"][1] <= max(ratios)
        flops = 4 * 3 * 2 * cell["workload"]["seqlen"] ** 2 * 8 / 2 * (2.5 if cell["direction"] == "backward" else 1)
        assert ours["flops_per_second"] == pytest.approx(flops / ours["seconds"])


def test_bench_skips_a_peer_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    args = ["bench", "--family", "cpu", "--seqlen", "16", "--direction", "forward", "--rounds", "1"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert re.search(r"^torch SDPA skipped +ModuleNotFoundError: ", text, re.M)
    assert re.search(r"^forward +1 x 16 +[\d.]+ us +[\d.]+ GFLOP/s +[\d.]+ us +[\d.]+x$", text, re.M)


def test_bench_fails_when_cupyflash_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(contenders, "attention_backward", broken)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, found = in_process(capsys, "bench", "--family", "cpu", "--seqlen", "16", "--rounds", "1")
    assert code == 1
    forward, backward = found["cells"]
    assert "seconds" in forward["contenders"][0]
    assert {"name": "cupyflash", "skipped": "RuntimeError: no kernel"} in backward["contenders"]


def test_bench_host_times_small_calls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(host.CALLS, "numpy", 2)
    monkeypatch.setitem(sys.modules, "torch", None)
    args = ("bench", "--host", "--family", "cpu", "--rounds", "3")
    code, found = in_process(capsys, *args)
    assert code == 0
    names = [call["name"] for call in found["calls"]]
    assert names == [name for name in host.calls(host.workload("float32"), np) if name.startswith("cupyflash")]
    assert len(names) == 6
    assert found["workload"]["dtype"] == "float32"
    for call in found["calls"]:
        assert len(call["samples"]) == 3
        assert 0 < min(call["samples"]) <= call["quartiles"][0] <= call["seconds"] <= call["quartiles"][1]
        assert call["ratio_to_torch"] is None
    assert list(found["skipped"]) == [host.TORCH, host.TORCH_BACKWARD]
    assert main(list(args)) == 0
    text = capsys.readouterr().out
    assert re.search(r"^cupyflash: attention\(q, k, v\)( +[\d.]+ [um]?s){3} +-$", text, re.M), text
    assert f"{host.TORCH} skipped" in text


def test_host_times_are_held_against_torchs(capsys: pytest.CaptureFixture[str]) -> None:
    """A batch counts the calls between two waits for the device; a backward is held against a backward."""
    events: list[str] = []
    makers: Any = {
        name: lambda name=name: lambda: events.append(name) for name in (host.TORCH, host.TORCH_BACKWARD, "cupyflash")
    }
    backend = SimpleNamespace(name="numpy", synchronize=lambda: events.append("wait"))
    found = host.measure(makers, backend, batches=2)  # type: ignore[arg-type]
    count = host.CALLS["numpy"]
    assert events[9:] == [
        event
        for name in (host.TORCH, host.TORCH_BACKWARD, "cupyflash", host.TORCH_BACKWARD, "cupyflash", host.TORCH)
        for event in ("wait", *[name] * count, "wait")
    ]
    assert all(len(samples) == 2 for samples in found.samples.values())
    found.samples = {host.TORCH: [2.0, 4.0], host.TORCH_BACKWARD: [5.0, 5.0]}
    found.samples |= {"a": [4.0, 12.0], "a backward": [5.0, 10.0]}
    assert [bench.to_torch(found, name) for name in found.samples] == ["1.00", "1.00", "2.50", "1.50"]


def test_bench_says_once_what_the_planner_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = backends.Backend("numpy", np, machine.read_machine())
    monkeypatch.setattr(bench.backends, "choose", lambda name: found)  # of arrays that a GPU's family does not take
    for more in ([], ["--host"], ["--json"], ["--precision", "highest"]):
        assert main(["bench", "--family", "sm90", *more]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err == "family='sm90' with NumPy arrays: NumPy arrays run on 'cpu'\n"


@pytest.mark.parametrize(
    ("args", "name", "dtype"),
    [
        ([], "cupy", "float32"),
        (["--family", "sm90"], "cupy", "bfloat16"),
        (["--family", "sm80"], "cupy", "bfloat16"),
        (["--family", "sm80", "--precision", "highest"], "cupy", "float32"),
        (["--host"], "cupy", "bfloat16"),
        (["--host"], "numpy", "float32"),
    ],
)
def test_bench_has_a_dtype_that_fits(args: list[str], name: str, dtype: str) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.default_dtype(parser.parse_args(args), SimpleNamespace(name=name)) == dtype  # type: ignore[arg-type]


def test_bench_needs_cupy_for_a_gpu_family(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "read_cupy", lambda driver: MISSING)
    assert main(["bench", "--family", "simt"]) == 2
    assert "CuPy can't be used here" in capsys.readouterr().err


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_contenders_compute_the_same(dtype: str, causal: bool) -> None:
    work = Workload(2, 3, 33, 16, dtype, causal)
    arrays = work.arrays(np)
    made = {name: make() for name, make in contenders.contenders(work, arrays, np).items() if can_make(name)}
    tolerance = {"float64": 1e-12, "float32": 1e-4}.get(dtype, 0.05)
    for name, contender in made.items():
        results = [forward_of(contender), *contender.backward()[:3]]
        wanted = [forward_of(made["cupyflash"]), *made["cupyflash"].backward()[:3]]
        for got, want in zip(results, wanted, strict=True):
            np.testing.assert_allclose(wide(got), wide(want), rtol=tolerance, atol=tolerance, err_msg=name)


def can_make(name: str) -> bool:
    return "torch" not in name or importlib.util.find_spec("torch") is not None


def forward_of(contender: contenders.Contender) -> Any:
    result = contender.forward()
    return result[0] if isinstance(result, tuple) else result


def wide(x: Any) -> np.ndarray:
    return (x if isinstance(x, np.ndarray) else x.double().numpy()).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_workloads_have_their_dtype_and_repeat(dtype: str) -> None:
    work = Workload(2, 3, 5, 7, dtype)
    first, second = work.arrays(np), work.arrays(np)
    assert all(x.shape == (2, 3, 5, 7) and x.dtype == numpy_dtype(dtype) for x in first)
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
    assert not np.shares_memory(first[0], second[0])


def test_contenders_take_turns() -> None:
    calls: list[str] = []

    class Fake:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def around(self) -> Any:
            return contextlib.nullcontext()

        def forward(self) -> None:
            calls.append(self.name)

    def clock(call: Any, repeats: int) -> float:
        call()
        seen.append(repeats)
        return {"cupyflash": 0.004, "slow": 0.5, "late": 0.01}[calls[-1]]

    def late() -> Fake:
        return Fake("late", 0)

    seen: list[int] = []
    cell = timing.Cell("forward", workload=Workload(1, 1, 8, 8))
    makers: Any = {"cupyflash": lambda: Fake("cupyflash", 0), "slow": lambda: Fake("slow", 0), "late": late}
    makers["missing"] = lambda: 1 / 0
    timing.measure(cell, makers, clock, rounds=3, least=0.02)
    assert calls[:6] == ["cupyflash", "cupyflash", "slow", "slow", "late", "late"]  # warm-up
    assert calls[6:] == ["cupyflash", "slow", "late", "slow", "late", "cupyflash", "late", "cupyflash", "slow"]
    assert seen[6:9] == [5, 1, 2]
    assert cell.ratio("slow") == pytest.approx(125)
    assert cell.skipped == {"missing": "ZeroDivisionError: division by zero"}
    assert not cell.failed


# ---------------------------------------------------------------------------------------------------------- selftest


def test_selftest_passes_and_replays(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = in_process(capsys, "selftest", "--backend", "numpy", "--seconds", "3", "--seed", "5")
    assert (code, found["ok"], found["seed"]) == (0, True, 5)
    assert {"out", "lse"} <= {name for known in found["worst"].values() for name in known}
    assert sum(found["cases"].values()) >= 5
    program, *again = shlex.split(found["worst_case"]["replay"])[2:]
    assert program == "cupyflash"
    code, replayed = in_process(capsys, *again)
    assert code == 0
    assert sum(replayed["cases"].values()) == 1
    everything = [worst for known in found["worst"].values() for worst in known.values()]
    largest = max(everything, key=lambda worst: worst["ratio"])
    (dtype,) = replayed["worst"]
    assert replayed["worst"][dtype][largest["name"]] == found["worst"][dtype][largest["name"]] == largest


def test_selftest_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--backend", "numpy", "--seed", "5", "--case", "2"]) == 0
    text = capsys.readouterr().out
    assert "python -m cupyflash selftest --backend numpy --seed 5 --case 2" in text
    assert text.splitlines()[-1].startswith("OK: 1 cases")


def test_selftest_draws_a_new_seed_each_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "draw", lambda seed, index, backend: selftest.Drawn(selftest.Case(1), None))
    seeds = {in_process(capsys, "selftest", "--backend", "numpy", "--seconds", "0")[1]["seed"] for _ in range(3)}
    assert len(seeds) > 1


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_the_same_seed_gives_the_same_cases(backend: str) -> None:
    first = [selftest.draw(7, i, backend) for i in range(40)]
    assert first == [selftest.draw(7, i, backend) for i in range(40)]
    assert first != [selftest.draw(8, i, backend) for i in range(40)]
    assert len({str(drawn) for drawn in first}) == 40


def test_gpu_cases_share_kernels() -> None:
    for start in range(0, 64, selftest.GROUP):
        group = [selftest.draw(3, start + i, "cupy").case for i in range(selftest.GROUP)]
        compiled = {(c.dtype, c.head_dim, c.head_dim_v, bool(c.causal)) for c in group}
        assert len(compiled) == 1
        assert all("misaligned" not in c.styles for c in group)
        assert all(c.work <= 20_000_000 for c in group)


@pytest.mark.parametrize("index", range(0, 48, 7))
def test_gpu_cases_are_valid_problems(index: int) -> None:
    assert run_case(selftest.draw(11, index, "cupy").case).ok


def test_a_cases_text_makes_it_again() -> None:
    for index in range(20):
        drawn = selftest.draw(1, index, "numpy")
        text = str(drawn).partition(", blocks of")[0]
        assert eval(text, {"Case": selftest.Case}) == drawn.case


@pytest.mark.parametrize("broken", ["value", "crash", "input"])
def test_selftest_fails_on_a_broken_promise(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = _cpu.forward

    def wrong(problem: Any, q: Any, k: Any, v: Any, beside: Any, out: Any, lse: Any, *tile: int) -> None:
        forward(problem, q, k, v, beside, out, lse, *tile)
        if broken == "value":
            lse += 0.5
        elif broken == "crash":
            raise IndexError("tile 3 of 2")
        elif q.size:
            q[(0,) * q.ndim] = 17

    monkeypatch.setattr(_cpu, "forward", wrong)
    args = ["selftest", "--backend", "numpy", "--seed", "1", "--seconds", "0.3"]
    code, found = in_process(capsys, *args)
    assert (code, found["ok"]) == (1, False)
    first = found["failures"][0]
    wanted = {"value": "! lse[", "crash": "IndexError: tile 3 of 2", "input": "BrokenPromise: q or the bytes"}[broken]
    assert wanted in first["text"]
    assert found["worst_case"] == {key: first[key] for key in ("case", "problem", "replay")}
    assert main(args) == 1
    text = capsys.readouterr().out
    assert first["replay"] in text
    assert text.splitlines()[-1].startswith("FAILED: ")


def test_a_case_needs_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--case", "3"]) == 2
    assert "--seed" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- terminal


def test_units() -> None:
    assert [terminal.seconds(s) for s in (12.345, 0.99949, 0.0123456, 1e-3, 7.891e-6, 1e-9)] == [
        "12.3 s", "999 ms", "12.3 ms", "1.00 ms", "7.89 us", "0.00 us",
    ]  # fmt: skip
    assert [terminal.rate(r) for r in (75.06e9, 999.4e9, 20.3e12)] == ["75.1 GFLOP/s", "999 GFLOP/s", "20.3 TFLOP/s"]
    assert [terminal.ratio(r) for r in (0.0314, 2.5, 2e71, float("inf"))] == ["0.031", "2.500", "2e+71", "inf"]
    assert [terminal.size(n) for n in (512, 3 * 2**20, 5 * 2**30)] == ["0.5 KiB", "3.0 MiB", "5.0 GiB"]


def test_json_is_strict() -> None:
    text = terminal.as_json({"a": [float("inf"), np.float64("nan"), 1.5], "b": (None, True)})
    assert json.loads(text) == {"a": ["inf", "nan", 1.5], "b": [None, True]}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def no_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)


@pytest.mark.usefixtures("no_tqdm")
def test_progress_is_a_plain_line_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stream = Terminal()
    with terminal.Progress("bench", 4, stream=stream) as progress:
        progress.to(1, "forward")
        assert stream.getvalue() == ""  # too soon to bother anybody
        now[0] = 3.0
        progress.to(2, "backward")
        assert stream.getvalue() == "\rbench:  50 %  backward"
    assert stream.getvalue().endswith("\r" + " " * 22 + "\r")


@pytest.mark.usefixtures("no_tqdm")
def test_progress_is_silent_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.Progress, "DELAY", -1.0)
    stream = io.StringIO()
    with terminal.Progress("bench", 4, stream=stream) as progress:
        progress.to(3)
    assert stream.getvalue() == ""


def test_progress_uses_tqdm_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            told.append((options["desc"], options["total"], options["disable"]))

        def set_description_str(self, text: str, refresh: bool) -> None:
            told.append(text)

        def update(self, step: float) -> None:
            told.append(step)

        def close(self) -> None:
            told.append("closed")

    module = ModuleType("tqdm")
    module.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", module)
    with terminal.Progress("demo", 9, stream=Terminal()) as progress:
        progress.to(2, "check")
        progress.tell(5, "time", "round 1")
    assert told == [("demo", 9, None), "demo: check", 2, "demo: time, round 1", 3, "closed"]


# ------------------------------------------------------------------------------------------------- the GPU benchmark


def benchmark(name: str) -> ModuleType:
    """A module of the benchmarks, which are run from the repository's root and not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        return importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(scope="module")
def gpu_benchmark() -> ModuleType:
    return benchmark("gpu")


@pytest.fixture
def small_benchmark(gpu_benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark with cells that NumPy computes in no time."""
    everything = dict.fromkeys(DTYPE_NAMES, ("unfused NumPy",))
    changes = {"ROWS": 32, "COLUMNS": 16, "FAMILY": None, "PEERS": everything, "WARM_UP": 0.01}
    for name, value in (changes | {"LEAST": 1e-4, "CAUSAL_SEQLENS": (32,)}).items():
        monkeypatch.setattr(gpu_benchmark, name, value)
    monkeypatch.setitem(host.CALLS, "numpy", 2)
    found = backends.Backend("numpy", np, machine.read_machine())
    monkeypatch.setattr(gpu_benchmark.backends, "choose", lambda name: found)
    return gpu_benchmark


SMALL = ["--dtypes", "float32", "float64", "--head-dims", "8", "--seqlens", "16", "32", "--rounds", "2"]


def test_errors_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On NumPy arrays; a result that is wrong in one element of one entry shows, and where."""
    errors = benchmark("errors")
    monkeypatch.setattr(errors, "PEER_ROWS", 512)
    monkeypatch.setattr(errors, "LEAD", (2, 2))
    out = tmp_path / "x.json"
    args = ["--numpy", "--out", str(out), "--seed", "3", "--entries", "300"]
    assert errors.main([*args, "--dtypes", "float32", "float16"]) == 0
    found = json.loads(out.read_text())
    assert [row["of"] for row in found["worst"]][-1] == "float32 highest, width 128"
    for row in found["worst"]:
        assert row["entries"] >= row["wanted"]
        assert 0 < row["worst"]["out"]["norm"]["error"] < (1e-2 if "float16" in row["of"] else 1e-4)
    assert {cell["data"] for cell in found["data_sets"]} == set(errors.DATA_SETS)
    assert "unfused" in found["data_sets"][0]["errors"]
    right = errors.attention

    def wrong(*arrays: Any, **options: Any) -> Any:
        result = right(*arrays, **options)
        result.out[0, 0, -1, -1] += 0.5 * abs(result.out).max()
        return result

    monkeypatch.setattr(errors, "attention", wrong)
    assert errors.main([*args, "--dtypes", "float32", "--skip-peers"]) == 0
    worst = json.loads(out.read_text())["worst"][0]["worst"]["out"]["element"]
    assert worst["error"] > 1e5
    assert worst["data"] in errors.DATA_SETS
    assert errors.main([*args, "--budget", "0", "--skip-peers"]) == 0
    assert "NOT ALL ENTRIES" in capsys.readouterr().out


def test_decode_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lists its cells, and measures small ones on NumPy."""
    decode = benchmark("decode")
    assert decode.main(["--dry-run"]) == 0
    assert "128 x 32/8 heads x   4096 rows: 2.147 GB beside copy, torch cuDNN" in capsys.readouterr().out
    changes = {"WARM_UP": 0, "LEAST": 1e-4, "BEYOND_CACHE": 10**5, "DTYPE": "float32", "HOST_CALLS": 1}
    for name, value in (changes | {"CELLS": ((2, 4, 2, 32),)}).items():
        monkeypatch.setattr(decode, name, value)
    backend = backends.Backend("numpy", np, machine.read_machine())
    monkeypatch.setattr(decode.backends, "choose", lambda name: backend)
    assert decode.main(["--out", str(tmp_path / "x.json"), "--rounds", "2", "--peers"]) == 0
    (cell,) = json.loads((tmp_path / "x.json").read_text())["cells"]
    assert [one["name"] for one in cell["contenders"]] == [
        "cupyflash", "cupyflash, pages of 16", "cupyflash, 4 queries", "cupyflash, a step", "copy"
    ]  # fmt: skip
    assert all(len(one["samples"]) == 2 for one in cell["contenders"])
    assert cell["error"] < 1e-5
    assert set(cell["host"]) == {"cupyflash", "cupyflash, a step"}
    assert "host time of" in capsys.readouterr().out


def test_gpu_benchmark_lists_its_cells(gpu_benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_benchmark.main(["--dry-run"]) == 0
    *lines, count = capsys.readouterr().out.splitlines()
    assert count == f"{len(lines)} cells" == "96 cells"
    assert lines[4] == ("float32  d=64   4 x 4096  x 16 heads forward: 0.27 TFLOP beside torch mem-eff., torch math")


def test_gpu_benchmark_leaves_out_what_would_fill_the_memory(gpu_benchmark: ModuleType) -> None:
    def skipped(dtype: str, seqlen: int, direction: str) -> list[str]:
        (cell,) = (
            cell
            for cell in gpu_benchmark.plan([dtype], [64], [seqlen])
            if cell.direction == direction and not cell.workload.causal
        )
        return list(gpu_benchmark.too_large(cell, gpu_benchmark.PEERS[dtype], 140e9))

    assert skipped("float64", 2048, "backward") == []
    assert skipped("float64", 16384, "forward") == ["torch math"]  # one matrix is 34 GB
    assert skipped("float32", 16384, "backward") == []
    assert skipped("bfloat16", 16384, "backward") == []  # its peers keep none


def test_gpu_benchmark_measures_and_writes(
    small_benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "gpu.json"
    monkey = pytest.MonkeyPatch()
    monkey.setitem(sys.modules, "torch", None)  # a missing peer is no failure
    with monkey.context():
        assert small_benchmark.main([*SMALL, "--out", str(path)]) == 0
    monkey.undo()
    found = json.loads(path.read_text())
    assert len(found["cells"]) == 2 * (2 + 1) * 2
    assert not found["failed"]
    assert found["not_run"] == []
    assert {"cupyflash", "NumPy", "driver", "CuPy", "NVRTC", "torch"} <= found["versions"].keys()
    ours = [name for name in found["host_seconds"] if name.startswith("cupyflash")]
    assert len(ours) == 6
    assert all(found["host_seconds"][name]["median"] > 0 for name in ours)
    assert list(found["host_skipped"]) == [host.TORCH, host.TORCH_BACKWARD]
    text = capsys.readouterr().out
    assert re.search(r"^float64 +8 +causal +backward +- +[\d.]+ +[\d.]+x$", text, re.M), text


def test_gpu_benchmark_fails_when_cupyflash_fails(
    small_benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        if args[0].dtype == np.float64:
            raise RuntimeError("no kernel")
        return cupyflash.attention_backward(*args, **options)

    monkeypatch.setattr(contenders, "attention_backward", broken)
    path = tmp_path / "gpu.json"
    assert small_benchmark.main([*SMALL, "--out", str(path)]) == 1
    found = json.loads(path.read_text())
    assert found["failed"]
    skipped = [c for cell in found["cells"] for c in cell["contenders"] if c["name"] == "cupyflash" and "skipped" in c]
    assert len(skipped) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAILED: float64 ")


def test_gpu_benchmark_stops_at_its_budget(small_benchmark: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert small_benchmark.main([*SMALL, "--out", str(path), "--budget", "0"]) == 0
    found = json.loads(path.read_text())
    assert found["cells"] == []
    assert len(found["not_run"]) == 12


# ------------------------------------------------------------------------------------------- the attention benchmark


@pytest.fixture(scope="module")
def attention_benchmark() -> ModuleType:
    return benchmark("attention")


@pytest.fixture(scope="module")
def verdict() -> ModuleType:
    return benchmark("verdict")


@pytest.fixture
def small_attention(
    attention_benchmark: ModuleType, verdict: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """The benchmark with cells that NumPy computes in no time, beside a peer that NumPy has."""
    changes: dict[str, Any] = {"ROWS": 32, "COLUMNS": 16, "FAMILY": None, "WARM_UP": 0.01, "LEAST": 1e-4}
    changes |= {"PEERS": ("unfused NumPy",), "MORE_PEERS": (), "LONG": (64,), "REFERENCES": ("unfused NumPy",)}
    for name, value in changes.items():
        monkeypatch.setattr(attention_benchmark, name, value)
        if hasattr(verdict, name):
            monkeypatch.setattr(verdict, name, value)
    monkeypatch.setattr(attention_benchmark, "import_modules", lambda names: None)
    found = backends.Backend("numpy", np, machine.read_machine())
    monkeypatch.setattr(attention_benchmark.backends, "choose", lambda name: found)
    return attention_benchmark


SMALL_ATTENTION = ["--head-dims", "8", "--seqlens", "16", "32", "--rounds", "3"]


def test_attention_benchmark_lists_its_cells(
    attention_benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attention_benchmark.main(["--dry-run"]) == 0
    *lines, count = capsys.readouterr().out.splitlines()
    assert count == "72 cells and 12 long ones"
    assert len(set(lines)) == len(lines) == 84
    assert lines[3] == (
        "backward d=64  full   16 x 1024   x 32 heads: 0.34 TFLOP, cupyflash; cupyflash, any order; torch cuDNN; "
        "torch flash; JAX cuDNN"
    )
    assert lines[-1] == "forward  d=256 causal  1 x 131072 x 8 heads: 70.37 TFLOP, cupyflash"
    assert attention_benchmark.main(["--dry-run", "--directions", "backward", "--peers", "unfused CuPy"]) == 0
    *lines, count = capsys.readouterr().out.splitlines()
    assert count == "36 cells and 0 long ones"
    assert [line.endswith("unfused CuPy") for line in lines[:6]] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    "args", [["--seqlens", "3000"], ["--head-dims", "96"], ["--long", "4096"], ["--rounds", "0"], []]
)
def test_attention_benchmark_refuses(args: list[str], attention_benchmark: ModuleType) -> None:
    with pytest.raises(SystemExit) as stop:
        attention_benchmark.main([*args, *(["--dry-run"] if args else [])])
    assert stop.value.code == 2


def test_attention_benchmark_measures_and_writes(
    small_attention: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "attention.json"
    assert small_attention.main([*SMALL_ATTENTION, "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert (len(found["cells"]), found["failed"], found["not_run"]) == (8 + 2, False, [])
    assert {"commit", "date", "device", "versions", "clocks", "clocks_when_warm"} <= found.keys()
    for cell in found["cells"][:8]:
        names = ["out"] if cell["direction"] == "forward" else ["dq", "dk", "dv"]
        ours = ["cupyflash"] + (["cupyflash, any order"] if cell["direction"] == "backward" else [])
        assert [c["name"] for c in cell["contenders"]] == [*ours, "unfused NumPy"]
        assert all(len(c["samples"]) == 3 for c in cell["contenders"])
        assert list(cell["verdicts"]) == ours
        assert {name: list(rms) for name, rms in cell["rms"].items()} == dict.fromkeys([*ours, "unfused NumPy"], names)
        assert all(0 < x < 0.01 for rms in cell["rms"].values() for x in rms.values())
        assert cell["unchecked"] == {}
    assert [c["name"] for c in found["cells"][8]["contenders"]] == ["cupyflash"]
    assert len(found["bars"]) == 18
    text = capsys.readouterr().out
    for title in ("forward", "backward, any order", "backward, deterministic"):
        assert re.search(rf"^{title}\n +S=16 +S=32\nd=8 +full +\d+ [\d.]+ +\d+ [\d.]+$", text, re.M), text


def test_attention_benchmark_goes_on_after_a_failure(
    small_attention: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        if not options["deterministic"]:
            raise RuntimeError("no kernel")
        return cupyflash.attention_backward(*args, **options)

    def unreadable(*args: Any) -> Any:
        raise TypeError("no such memory")

    monkeypatch.setattr(contenders, "attention_backward", broken)
    monkeypatch.setattr(sys.modules["benchmarks.exact"], "wide", unreadable)
    path = tmp_path / "attention.json"
    assert small_attention.main([*SMALL_ATTENTION, "--out", str(path)]) == 1
    found = json.loads(path.read_text())
    assert found["failed"]
    assert len(found["cells"]) == 10
    assert found["cells"][0]["unchecked"]["cupyflash"] == "TypeError: no such memory"
    skipped = {"name": "cupyflash, any order", "skipped": "RuntimeError: no kernel"}
    assert [skipped in cell["contenders"] for cell in found["cells"]] == [False, True] * 4 + [False] * 2
    assert all("samples" in cell["contenders"][0] for cell in found["cells"])
    assert "FAILED: backward d=8" in capsys.readouterr().out.splitlines()[-1]


def test_attention_benchmark_stops_at_its_budget(
    small_attention: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "attention.json"
    assert small_attention.main([*SMALL_ATTENTION, "--out", str(path), "--budget", "0"]) == 0
    found = json.loads(path.read_text())
    assert (found["cells"], len(found["not_run"])) == ([], 10)
    assert "NOT RUN" in capsys.readouterr().out
    assert {bar["held"] for bar in found["bars"]} == {None}
    assert found["bars"][0]["of"] == 4


def judged(attention_benchmark: ModuleType, gain: float, tax: float, error: float, speed: float) -> list[Any]:
    """All cells as if measured: cuDNN takes `gain` times our time in the middle of three rounds."""
    cells = attention_benchmark.plan((64, 128, 256), attention_benchmark.SEQLENS, DIRECTIONS, (32768,))
    for cell in cells:
        flops = cell.workload.flops(cell.direction) / (speed if cell.long else 1)
        cell.samples["cupyflash"] = [flops / 1e12] * 3
        if cell.direction == "backward":
            cell.samples["cupyflash, any order"] = [flops / 1e12 / (1 + tax)] * 3
        if not cell.long:
            cell.samples["torch cuDNN"] = [flops / 1e12 * x for x in (gain - 0.2, gain, gain + 0.02)]
            cell.rms = {name: {"a": 1e-3, "b": 1e-3 * error} for name in cell.samples if name.startswith("cupyflash")}
            cell.rms["torch cuDNN"] = {"a": 1e-3, "b": 1e-3}
    return cells


def test_bars_hold_and_fail_by_the_samples(attention_benchmark: ModuleType, verdict: ModuleType) -> None:
    good = verdict.bars(judged(attention_benchmark, 1.2, 0.02, 1.02, 0.97))
    assert [bar.name for bar in good if not bar.held] == []
    assert all(bar.cells == bar.of > 0 for bar in good)
    assert good[0].found == pytest.approx(1.2)
    assert good[1].found == pytest.approx(1.21)  # the upper quartile of 1, 1.2 and 1.22
    bad = verdict.bars(judged(attention_benchmark, 0.95, 0.11, 1.04, 0.9))
    assert [bar.name for bar in bad if bar.held] == [
        "backward, any order, d=64 and 128: least",  # 0.95 x 1.11
        "backward, any order, d=256: mean",
        "backward, deterministic, d=256: mean",
    ]
    assert [bar.held for bar in verdict.bars([])] == [None] * len(bad)


def test_one_slow_cell_is_found(attention_benchmark: ModuleType, verdict: ModuleType) -> None:
    cells = judged(attention_benchmark, 1.2, 0.02, 1.02, 0.97)
    (slow,) = verdict.chosen(cells, "forward", (128,), True, (8192,))
    slow.samples["cupyflash"] = [1.3 * x for x in slow.samples["cupyflash"]]
    missed = {bar.name: bar.found for bar in verdict.bars(cells) if not bar.held}
    assert missed == pytest.approx(
        {"forward: least upper quartile": 1.21 / 1.3, "forward, d=128 causal, 8k and 16k: least": 1.2 / 1.3}
    )
    text = attention_benchmark.summary(verdict.chosen(cells, "forward"), "forward", "cupyflash")
    mean = (1.2**36 / 1.3) ** (1 / 36)
    assert text.splitlines()[0].startswith(f"geometric mean: all {mean:.3f}, d=64 1.200, ")
    assert text.splitlines()[1] == "worst: forward  d=128 causal  2 x 8192   x 16 heads, 0.923 (0.846 to 0.931)"


def test_jax_stands_in_for_torchs_cudnn(attention_benchmark: ModuleType, verdict: ModuleType) -> None:
    cell = judged(attention_benchmark, 1.2, 0.0, 1.0, 1.0)[0]
    cell.samples["JAX cuDNN"] = [2 * x for x in cell.samples["cupyflash"]]
    assert (cell.reference, cell.gain()) == ("torch cuDNN", pytest.approx(1.2))
    del cell.samples["torch cuDNN"], cell.rms["torch cuDNN"]
    assert (cell.reference, cell.gain(), cell.error()) == ("JAX cuDNN", 2, None)
    del cell.samples["JAX cuDNN"]
    assert (cell.reference, cell.gain(), cell.upper()) == (None, None, None)


@pytest.mark.parametrize("causal", [False, True])
def test_the_devices_float64_is_the_specification(causal: bool) -> None:
    exact = benchmark("exact")
    q, k, v, dout = (x[0, 0] for x in Workload(1, 1, 37, 8, "bfloat16").arrays(np))
    found = exact.attention(q, k, v, dout, causal=causal, xp=np, numbers=5 * 37)
    out, lse = reference.forward(q, k, v, causal=causal)
    gradients = reference.backward(dout, q, k, v, out, lse, causal=causal)._asdict()
    wanted = {"out": out} | {name: x for name, x in gradients.items() if x is not None}
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        np.testing.assert_allclose(found[name], want, rtol=1e-12, atol=1e-13, err_msg=name)


def test_the_plot_has_a_panel_for_each_problem(attention_benchmark: ModuleType, tmp_path: Path) -> None:
    plot = benchmark("plot")
    cells = judged(attention_benchmark, 1.2, 0.02, 1.02, 0.97)
    result = {"device": "a GPU", "cells": [cell.as_dict() for cell in cells]}
    panels = plot.panels(result)
    directions = [("forward", False), ("forward", True), ("backward", False), ("backward", True)]
    assert list(panels) == [("bfloat16", d, *kind) for d in (64, 128, 256) for kind in directions]
    lines = panels["bfloat16", 128, "backward", True]
    assert list(lines) == ["cupyflash", "cupyflash, any order", "torch cuDNN"]
    assert lines["torch cuDNN"][1] == (1024, pytest.approx(1 / 1.2))
    assert [x for x, _ in panels["bfloat16", 64, "forward", False]["cupyflash"]] == [
        512, 1024, 2048, 4096, 8192, 16384, 32768,
    ]  # fmt: skip
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib, which draws, is not installed")
    plot.draw(result, tmp_path / "a.svg")
    assert "a GPU" in (tmp_path / "a.svg").read_text() or (tmp_path / "a.svg").stat().st_size > 10_000


# ----------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_demo_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = in_process(capsys, "demo", "--seqlen", "256")
    assert (code, found["ok"], found["backend"]) == (0, True, "cupy")
    assert found["memory"]["cupyflash"]["forward"] >= 8 * 256 * 64 * 4
    assert all(cell["contenders"][0]["seconds"] > 0 for cell in found["cells"])


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_selftest_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = in_process(capsys, "selftest", "--seconds", "2", "--seed", "4")
    assert (code, found["ok"], found["backend"]) == (0, True, "cupy"), found["failures"]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_bench_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = in_process(capsys, "bench", "--family", "simt", "--seqlen", "256", "--heads", "2", "--rounds", "2")
    assert code == 0
    assert [c["contenders"][0]["name"] for c in found["cells"]] == ["cupyflash"] * 2
    # Rounds that take too long are left out, and on a busy GPU two may.
    assert all(1 <= len(c["contenders"][0]["samples"]) <= 2 for c in found["cells"])


@pytest.mark.gpu
def test_benchmark_on_a_gpu(
    gpu: Any, gpu_benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_benchmark, "ROWS", 256)
    monkeypatch.setattr(gpu_benchmark, "CAUSAL_SEQLENS", (128,))
    path = tmp_path / "gpu.json"
    args = ["--dtypes", "float32", "--head-dims", "64", "--seqlens", "128", "--rounds", "2", "--out", str(path)]
    assert gpu_benchmark.main(args) == 0
    found = json.loads(path.read_text())
    assert len(found["cells"]) == 4
    assert found["versions"]["CUDA runtime"]
    assert len(found["host_seconds"]) >= 6


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_bench_host_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(host.CALLS, "cupy", 5)
    code, found = in_process(capsys, "bench", "--host", "--family", "simt", "--rounds", "2")
    assert code == 0
    assert found["workload"]["dtype"] == "bfloat16"
    assert len([call for call in found["calls"] if call["name"].startswith("cupyflash")]) == 6


@pytest.mark.gpu
def test_attention_benchmark_on_a_gpu(
    gpu: Any, attention_benchmark: ModuleType, verdict: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (attention_benchmark, verdict):
        monkeypatch.setattr(module, "ROWS", 256)
    for name, value in {"FAMILY": None, "COLUMNS": 256, "WARM_UP": 0.1}.items():
        monkeypatch.setattr(attention_benchmark, name, value)
    path = tmp_path / "attention.json"
    args = ["--head-dims", "64", "--seqlens", "128", "--long", "512", "--rounds", "2", "--jax-seqlens"]
    assert attention_benchmark.main([*args, "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert len(found["cells"]) == 4 + 2
    for cell in found["cells"][:4]:
        assert all(0 < x < 0.01 for x in cell["rms"]["cupyflash"].values()), cell


def test_directions_are_those_of_contenders() -> None:
    assert all(hasattr(contenders.Ours, name) and hasattr(contenders.Torch, name) for name in DIRECTIONS)


def test_options_reach_the_result() -> None:
    parser = argparse.ArgumentParser()
    selftest.add_arguments(parser)
    assert vars(parser.parse_args([])) == {"backend": None, "seconds": 10.0, "seed": None, "case": None}

"""What a result says of where it came from: commit, versions, the GPU and its clocks."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cupyflash._program.backend import Backend
from cupyflash._program.terminal import as_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUERY = {  # nvidia-smi's names, and ours
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "sm_mhz_at_most",
    "power.draw": "watts",
    "power.limit": "watts_at_most",
    "temperature.gpu": "celsius",
}


def now() -> str:
    """The date and time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        name = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        return name + ("+" if git(["git", "status", "--porcelain", "-uno"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def clocks(device: int = 0, command: str = "nvidia-smi") -> Callable[[], dict[str, str] | None]:
    """Ask for a GPU's clocks while it works; the answer, or None, when called."""
    arguments = [command, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", f"--id={device}"]
    try:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return lambda: None

    def answer() -> dict[str, str] | None:
        try:
            text, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        values = [value.strip() for value in text.strip().split(",")]
        return dict(zip(QUERY.values(), values, strict=True)) if len(values) == len(QUERY) else None

    return answer


def versions(backend: Backend) -> dict[str, str | None]:
    """Versions of everything that takes part, and of peers that have been imported."""
    machine = backend.machine
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    return machine.versions | {
        "driver": machine.driver.cuda if machine.driver else None,
        "CUDA runtime": str(backend.xp.cuda.runtime.runtimeGetVersion()) if backend.name == "cupy" else None,
        "CuPy": machine.cupy.version,
        "NVRTC": machine.cupy.nvrtc,
        "torch": str(torch.__version__) if torch else None,
        "cuDNN (torch)": str(torch.backends.cudnn.version()) if torch else None,
        "JAX": str(jax.__version__) if jax else None,
    }


def place(backend: Backend, device: int = 0) -> dict[str, Any]:
    """Where a result was measured."""
    return {
        "date": now(),
        "commit": commit(),
        "device": backend.device,
        "gpus": [asdict(gpu) for gpu in backend.machine.cupy.gpus],
        "versions": versions(backend),
        "clocks": clocks(device)(),
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """A result as JSON: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(as_json(found) + "\n", encoding="utf-8")
    part.replace(path)

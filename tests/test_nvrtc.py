"""Every kernel compiles for every architecture its family claims, without a GPU, and keeps its numbers in registers.

Each architecture gets each kernel, for each row of the tile table that it takes. Over dtypes, widths and causal the
``ci`` profile draws a share by the printed seed; ``nightly`` compiles all of them.
"""

import itertools
import json
import random
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from conftest import PROFILE, SEED
from nvrtc import (
    COLUMNS,
    TABLE,
    ampere_specs,
    compile_spec,
    decode_rows,
    decode_specs,
    hopper_candidates,
    hopper_specs,
    two_part_specs,
    version,
    wide_specs,
)

from cupyflash import _plan_sm90, _tiles, explain
from cupyflash._compile import Spec, kernels_dir, source
from cupyflash._options import PLAIN
from cupyflash._plan import rest_kernel
from cupyflash._problem import read_problem

pytestmark = pytest.mark.nvrtc
# Hopper is compiled as 90a, where its own instructions exist.
ARCHS = {"sm_60": "sm_60", "sm_70": "sm_70", "sm_75": "sm_75", "sm_80": "sm_80", "sm_86": "sm_86", "sm_87": "sm_87"}
ARCHS |= {"sm_89": "sm_89", "sm_90": "sm_90a", "sm_100": "sm_100", "sm_120": "sm_120", "sm_121": "sm_121"}
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
# The tile tables were made for these. On the others ptxas spills some words of some widths above 64 (464 bytes at
# worst, dk and dv of width 256 on sm_100): slower, not wrong. Rows of their own would mend it, and want a card to
# measure on.
TUNED = {"sm_80", "sm_86", "sm_87", "sm_89", "sm_90"}
SPILLED = 512
SHARE = 2  # variants of one kernel for one architecture in the ci profile


def specs(device: str) -> dict[str, list[tuple[Spec, int]]]:
    """All Specs that calls on a device can ask for, with their shared memory, by kernel."""
    found: dict[tuple[Spec, int], None] = {}
    for dtype, dim, causal, shared in itertools.product(DTYPES, _tiles.WIDTHS, (False, True), (False, True)):
        q = np.zeros((2, 1, 4, dim), dtype)
        k = q[0] if shared else q
        for options in ({}, {"backward": True}, {"backward": True, "deterministic": False}):
            made = explain(q, k, k, causal=causal, device=device, **options)
            found.update(dict.fromkeys((step.spec, step.smem) for step in made.kernels))
    by_kernel: dict[str, list[tuple[Spec, int]]] = {}
    for spec, smem in found:
        by_kernel.setdefault(spec.kernel, []).append((spec, smem))
    return by_kernel


@pytest.mark.parametrize("device", ARCHS)
@pytest.mark.parametrize("kernel", ["fwd_simt", "bwd_delta", "bwd_simt_dkdv", "bwd_simt_dq", "bwd_finish"])
def test_kernel_compiles_into_registers(device, kernel):
    every = specs(device)[kernel]
    chosen = every if PROFILE == "nightly" else random.Random(f"{SEED} {device} {kernel}").sample(every, SHARE)
    for spec, smem in chosen:
        compiled = compile_spec(spec, smem, ARCHS[device])
        room = 0 if device in TUNED else SPILLED
        assert compiled.spill_bytes <= room, f"{spec}\n{compiled.log}"
        if device in TUNED:  # a stack frame without spills is an array that is not in registers
            assert compiled.stack_bytes == 0, f"{spec}\n{compiled.log}"


@pytest.mark.share(5)
@pytest.mark.parametrize("device", ARCHS)
def test_decoding_compiles_into_registers(device):
    for kernel, every in decode_specs(device).items():
        chosen = every if PROFILE == "nightly" else random.Random(f"{SEED} {device} {kernel}").sample(every, SHARE)
        for spec, smem in chosen:
            compiled = compile_spec(spec, smem, ARCHS[device])
            room = 0 if device in TUNED or kernel != "decode_sm80" else SPILLED
            assert compiled.spill_bytes <= room, f"{spec}\n{compiled.log}"
            assert compiled.stack_bytes <= room, f"{spec}\n{compiled.log}"


HOPPER = hopper_specs()


@pytest.mark.parametrize("text", HOPPER)
@pytest.mark.share(24)
def test_hopper_kernels_keep_what_they_had(text):
    """Registers, spills and serialised products of all that the sm90 family ships, as the table has them."""
    table = json.loads(TABLE.read_text())
    spec, smem = HOPPER[text]
    compiled = compile_spec(spec, smem, "sm_90a")
    assert compiled.spill_bytes == 0, compiled.log
    assert not compiled.serialised, compiled.log
    if version() == table["nvrtc"]:
        assert compiled.row() == table[COLUMNS][text], f"python {TABLE.parent.name}/nvrtc.py"


CANDIDATES = hopper_candidates()


@pytest.mark.parametrize("text", CANDIDATES)
@pytest.mark.share(6)
def test_what_the_tuner_tries_on_hopper_compiles(text):
    """A slow candidate loses, and may spill; one that does not compile should not have been offered."""
    compile_spec(*CANDIDATES[text], "sm_90a")


AMPERE = ampere_specs()
TWO_PARTS = two_part_specs()
WIDE = wide_specs()
DECODE = decode_rows()


@pytest.mark.parametrize("text", DECODE)
@pytest.mark.share(6)
def test_decode_kernels_keep_what_they_had(text):
    """Registers of decoding on tensor cores, as the table has them; no spills."""
    table = json.loads(TABLE.read_text())
    compiled = compile_spec(*DECODE[text])
    assert compiled.spill_bytes == compiled.stack_bytes == 0, compiled.log
    if version() == table["nvrtc"]:
        assert compiled.row() == table[COLUMNS][text], f"python {TABLE.parent.name}/nvrtc.py"


@pytest.mark.parametrize("text", AMPERE)
@pytest.mark.share(16)
def test_ampere_kernels_keep_what_they_had(text):
    """Registers and spills of all that the sm80 family ships, for each kind of card, as the table has them."""
    table = json.loads(TABLE.read_text())
    compiled = compile_spec(*AMPERE[text])
    if AMPERE[text][2] in TUNED:
        assert compiled.spill_bytes == compiled.stack_bytes == 0, compiled.log
    if version() == table["nvrtc"]:
        assert compiled.row() == table[COLUMNS][text], f"python {TABLE.parent.name}/nvrtc.py"


@pytest.mark.parametrize("text", TWO_PARTS)
@pytest.mark.share(6)
def test_two_parts_stay_in_registers(text):
    """Of every row that precision="highest" takes: the second parts of P and dS push nothing out."""
    table = json.loads(TABLE.read_text())
    compiled = compile_spec(*TWO_PARTS[text])
    assert compiled.spill_bytes == compiled.stack_bytes == 0, compiled.log
    if version() == table["nvrtc"]:
        assert compiled.row() == table[COLUMNS][text], f"python {TABLE.parent.name}/nvrtc.py"


@pytest.mark.parametrize("text", WIDE)
@pytest.mark.share(12)
def test_wide_kernels_keep_what_they_had(text):
    """Registers and spills of float64 and float32 on tensor cores, as the table has them.

    ptxas copies operands of float64's large shape; 12 warps of the backward spill for it, and were the fastest all the
    same. The backward of float32 lacks up to four registers; smaller tiles would read everything once more.
    """
    table = json.loads(TABLE.read_text())
    compiled = compile_spec(*WIDE[text])
    double = SPILLED if "12 warps" in text else 32
    assert compiled.spill_bytes <= (double if "float64" in text else 16 if "bwd_wide" in text else 8), compiled.log
    if version() == table["nvrtc"]:
        assert compiled.row() == table[COLUMNS][text], f"python {TABLE.parent.name}/nvrtc.py"


def test_the_table_has_what_is_shipped():
    shipped = {*HOPPER, *AMPERE, *TWO_PARTS, *WIDE, *DECODE}
    assert set(json.loads(TABLE.read_text())[COLUMNS]) == shipped


def _broadcast(shape, dtype=np.float32):
    return np.broadcast_to(np.zeros((), dtype), shape)


SEQLEN = 512
OPTIONS = {
    "window": {"window": (100, 0)},
    "softcap": {"softcap": 30.0, "causal": True},
    "alibi": {"alibi_slopes": _broadcast((4,))},
    "bias": {"bias": _broadcast((1, 4, SEQLEN, SEQLEN), ml_dtypes.bfloat16)},
    "bias of keys": {"bias": _broadcast((2, 1, 1, SEQLEN)), "causal": True},
    "mask": {"mask": _broadcast((1, 4, SEQLEN, SEQLEN), bool)},
    "segments": {"segment_ids": (_broadcast((2, SEQLEN), np.int64),) * 2},
    "sinks": {"sinks": _broadcast((4,)), "causal": True},
    "lens": {"kv_lens": _broadcast((2,), np.int64)},
    "dropout": {"dropout": 0.1, "seed": 1},
}
OPTIONS["all"] = {name: value for options in OPTIONS.values() for name, value in options.items()}


def option_specs() -> dict[str, tuple[Spec, int, str]]:
    """Kernels of every option, family and direction, with shared memory and architecture, by a text."""
    found = {}
    families = {"sm_60": ("simt",), "sm_90": ("simt", "sm80", "sm90")}
    for device, name, dim in itertools.product(("sm_60", "sm_80", "sm_86", "sm_90", "sm_120"), OPTIONS, (64, 128, 256)):
        some = [(f, np.float32 if f == "simt" else ml_dtypes.bfloat16) for f in families.get(device, ("simt", "sm80"))]
        for family, dtype in [*some, ("sm80", np.float64)] if device in ("sm_80", "sm_90") and dim <= 128 else some:
            x = _broadcast((2, 4, SEQLEN, dim), dtype)
            for backward in (False, True):
                plan = explain(x, x, x, backward=backward, device=device, family=family, **OPTIONS[name])
                for step in plan.kernels:
                    text = f"{device}, {family}, {np.dtype(dtype)}, {name}, {dim}, {step.name}"
                    found[text] = step.spec, step.smem, ARCHS[device]
    return found


with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_plan_sm90, "TAKES_LENGTHS", True)
    OPTION_SPECS = option_specs()


@pytest.mark.parametrize("text", OPTION_SPECS)
@pytest.mark.share(8)
def test_kernels_with_options_compile(text):
    """What they spill costs time; the tables say for which tiles that was measured."""
    compiled = compile_spec(*OPTION_SPECS[text])
    assert not compiled.serialised, compiled.log


@pytest.mark.parametrize("device", ARCHS)
@pytest.mark.share(2)
def test_the_rest_of_packed_rows_compiles(device):
    x = np.zeros((4, 16, 8), np.float16)
    problem = read_problem(x, x, x, scale=None, causal=False, q_offset=None, layout="hsd", precision=None)
    step = rest_kernel(replace(problem, options=replace(PLAIN, packed=(64, 64))), None)
    compile_spec(step.spec, step.smem, ARCHS[device])


IN_TEST_SCORE_ARGS = {"bwd_score_simt", "bwd_score_sm80", "bwd_score_args"}
IN_TEST_MERGE = {"combine", "combine_backward"}


def test_every_kernel_file_is_compiled_here():
    kernels = {path.stem for path in kernels_dir().glob("*.cu")}
    made = (*HOPPER.values(), *AMPERE.values(), *TWO_PARTS.values(), *WIDE.values(), *OPTION_SPECS.values())
    elsewhere = {"packed_rest"} | IN_TEST_SCORE_ARGS | IN_TEST_MERGE
    here = set(specs("sm_90")) | set(decode_specs("sm_90")) | {spec.kernel for spec, *_ in made}
    assert kernels == here | elsewhere


def test_messages_point_at_the_real_file():
    text = source(specs("sm_90")["fwd_simt"][0][0])
    assert '#line 1 "kernels/fwd_simt.cu"' in text
    assert '#line 1 "kernels/mask.cuh"' in text
    assert "#include" not in text

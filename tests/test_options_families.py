"""Every two options in every kernel family: the pairwise table on a GPU, and a share of it under the emulator."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import PROFILE
from emulator import Device, Schedule, why_not

from cupyflash import _call, _plan_sm90, attention, attention_backward
from cupyflash._plan_wide import WITH_FLOAT64_CORES
from cupyflash.testing import cases, data

TABLE = cases.options_table()
FAMILIES = {"simt": 90, "sm80": 80, "sm90": 90}  # and a compute capability for the emulator
WIDTHS = ((64, 64), (128, 128), (8, 24), (80, 48), (256, 256), (192, 128))
SHARE = int(os.environ.get("CUPYFLASH_OPTIONS_SHARE", "4" if PROFILE == "ci" else "1000000"))
SEED = int(os.environ.get("CUPYFLASH_OPTIONS_SEED", "1"))


def rows(widths):
    """(row of the table, family, the case as this family takes it)."""
    found = []
    for number, case in enumerate(TABLE):
        for family in FAMILIES:
            if family == "simt":
                found.append(pytest.param(case, family, id=f"{number}-{family}"))
                continue
            dtype = ("bfloat16", "float16")[number % 2] if case.dtype in ("float32", "float64") else case.dtype
            this = _widened(replace(case, dtype=dtype), number) if widths else replace(case, dtype=dtype)
            found.append(pytest.param(this, family, id=f"{number}-{family}"))
        for dtype in ("float64", "float32"):
            this = replace(case, dtype=dtype, out=None if case.out == "float32" else case.out)
            this = _widened(this, number) if widths and max(WIDTHS[number % len(WIDTHS)]) <= 128 else this
            found.append(pytest.param(this, "sm80", id=f"{number}-sm80-{dtype}"))
        found.append(pytest.param(this, "sm90", id=f"{number}-sm90-float32"))
    return found


def asked(case, family):
    """What makes a family take a case; float32 is sm90's own forward, and sm80's backward."""
    if case.dtype == "float32" and family != "simt":
        return {"family": None if family == "sm90" else family, "precision": "highest"}
    return {"family": family}


def _widened(case, number):
    head_dim, head_dim_v = WIDTHS[number % len(WIDTHS)]
    return replace(case, head_dim=head_dim, head_dim_v=head_dim_v)


def share(found):
    """A share that a seed has drawn; its ids say which."""
    drawn = {row.id for row in random.Random(SEED).sample(found, min(SHARE, len(found)))}
    return [row for row in found if row.id in drawn]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "family"), rows(widths=True))
def test_every_two_options_on_a_gpu(gpu, case, family):
    arch = int(gpu.xp.cuda.Device().compute_capability)
    if arch < {"simt": 60, "sm80": 80, "sm90": 90}[family]:
        pytest.skip("an older GPU")
    if family == "sm90" and case.dtype != "float32" and not _plan_sm90.TAKES_LENGTHS and (case.q_lens or case.kv_lens):
        pytest.skip("sm90 leaves lengths to sm80")
    if case.dtype == "float64" and family == "sm80" and arch not in WITH_FLOAT64_CORES:
        pytest.skip("a GPU without tensor cores for float64")
    report = cases.run(case, gpu.xp, **asked(case, family))
    assert report.ok, f"{case!r}\n{report}"


@pytest.mark.parametrize(("case", "family"), share(rows(widths=False)))
def test_every_two_options_under_the_emulator(case, family):
    """Under the race checker, each launch with a schedule of its own."""
    why_not()
    with Device(lambda n: Schedule.draw(100 * case.seed + n), arch=FAMILIES[family], undefined=True) as xp:
        report = cases.run(case, xp, **asked(case, family))
    assert report.ok, f"{case!r}\n{report}"


def test_a_tile_that_begins_before_the_first_row():
    """In sm90 the first tile of a causal head may: pairs there have no bias and no mask to load."""
    why_not()
    case = data.Case(
        1, dtype="float16", causal=True, seqlen_q=60, seqlen_k=60, head_dim=136, head_dim_v=24, bias="full",
        mask="heads",
    )
    with Device(lambda n: Schedule.draw(n), arch=90, undefined=True) as xp:
        report = cases.run(case, xp, family="sm90")
    assert report.ok, report


def test_lengths_on_the_host_beside_arrays_on_a_device():
    """They are copied at each call, and what the first one leaves is not taken for the second."""
    why_not()
    q = np.random.default_rng(1).standard_normal((2, 1, 20, 8), np.float32)
    with Device(arch=80) as xp:
        x = xp.asarray(q)
        for lens in (np.array([20, 7]), np.array([3, 0])):
            np.testing.assert_allclose(
                attention(x, x, x, kv_lens=lens).get(), attention(q, q, q, kv_lens=lens), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("lens", [True, False], ids=["lengths", "no lengths"])
def test_leading_axes_that_the_host_walks(lens):
    """sm90 takes one or two in a launch; each launch has its own ticket, or the second would find the first one's."""
    why_not()
    rng = np.random.default_rng(2)
    batch = ((3, 2, 2), (3, 1, 2), (1, 2, 1))  # of q, k and v: none of the axes walks as another does
    q, k, v = (rng.standard_normal((*lead, 1, 130, 16)).astype(np.float16) for lead in batch)
    options = {"q_lens": rng.integers(0, 131, (3, 2, 2)), "kv_lens": rng.integers(0, 131, (2, 1))} if lens else {}
    want = attention(q, k, v, causal=True, return_lse=True, **options)
    grads = attention_backward(q, q, k, v, *want, causal=True, **options)
    with Device(lambda n: Schedule.draw(n), arch=90, undefined=False) as xp:
        x, on = [xp.asarray(x) for x in (q, k, v)], {name: xp.asarray(x) for name, x in options.items()}
        got = attention(*x, causal=True, return_lse=True, family="sm90", **on)
        given = [xp.asarray(r) for r in want]
        got = [*got, *attention_backward(x[0], *x, *given, causal=True, family="sm90", **on)[:3]]
        for a, b in zip(got, (*want, *grads[:3]), strict=True):
            np.testing.assert_allclose(a.get().astype(float), b.astype(float), rtol=1e-2, atol=1e-2)


def test_a_call_with_options_is_found_again(monkeypatch):
    """What is kept of a call reads the arrays that the next call brings, not those of the first."""
    why_not()
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 20, 8), np.float32) for _ in range(3))
    options = {"window": (9, None), "softcap": 3.0, "q_lens": np.array(17), "segment_ids": (np.arange(20) // 8,) * 2}
    with Device(arch=80) as xp:
        qkv = [xp.asarray(x) for x in (q, k, v)]
        here = options | {"q_lens": xp.asarray(options["q_lens"])}
        here["segment_ids"] = tuple(xp.asarray(x) for x in options["segment_ids"])
        for seed in range(2):
            r = np.random.default_rng(seed)
            beside = {"bias": r.standard_normal((20, 20)), "mask": r.random((20, 20)) < 0.8}
            beside |= {"sinks": r.standard_normal(2), "alibi_slopes": r.random(2)}
            out = attention(*qkv, **here, **{name: xp.asarray(x) for name, x in beside.items()})
            np.testing.assert_allclose(out.get(), attention(q, k, v, **options, **beside), rtol=1e-5, atol=1e-6)
            monkeypatch.setattr(_call.Call, "__init__", None)  # for CuPy arrays nothing calls it again
            attention(*qkv, **here, **{name: xp.asarray(x) for name, x in beside.items()})
            monkeypatch.undo()

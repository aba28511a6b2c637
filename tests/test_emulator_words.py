"""The instruction words compile for every architecture they claim: no spills, no serialised wgmma."""

import re

import pytest
from emulator import golden, removals, samples
from nvrtc import nvrtc

pytestmark = pytest.mark.nvrtc
SINCE_80 = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100", "sm_120")
EVERY_N = tuple(range(8, 257, 8))

SM80 = """#include "mma_sm80.cuh"
extern "C" __global__ void words(const unsigned* in, float* out, double* out64, int* flag) {
  extern __shared__ unsigned smem[];
  const unsigned at = shared_address(smem + 4 * threadIdx.x);
  float d[4] = {};
  double e[2] = {};
  unsigned a[4], b[2], one[1];
  cp_async<16>(at, in); cp_async<8>(at, in, 4); cp_async<4>(at, in, 0); cp_async_commit(); cp_async_wait<0>();
  ldmatrix_x1(one, at); ldmatrix_x2(b, at); ldmatrix_x4(a, at);
  a[0] ^= movmatrix_trans(one[0]);
  mma_m16n8k16<Float16>(d, a, b); mma_m16n8k16<Bfloat16>(d, a, b); mma_m16n8k8_tf32(d, a, b);
  ldmatrix_x1_trans(one, at); ldmatrix_x2_trans(b, at); ldmatrix_x4_trans(a, at);
  mma_m16n8k8<Float16>(d, b, one[0]); mma_m16n8k8<Bfloat16>(d, b, one[0]); mma_m16n8k4_tf32(d, b, one[0]);
  mma_m8n8k4_f64(e, d[0], d[1]);
  barrier_arrive(1, 64); barrier_sync(2, 64);
  add_release(flag, load_acquire(flag + 1));
  store_release(flag + 2, pack<Float16>(d[0], d[1]) + pack<Bfloat16>(d[2], d[3]));
  for (int i = 0; i < 4; ++i) out[i] = d[i] + a[i];
  out64[0] = e[0] + e[1];
}
"""


def compile_text(text, arch):
    """ptxas's log. The options are a launch's; CuPy adds -ftz=true."""
    binding = nvrtc()
    program = binding.createProgram(text, "words.cu", (), ())
    try:
        binding.compileProgram(program, ("-std=c++17", f"-arch={arch}", "-ftz=true", "--ptxas-options=-v"))
    except binding.NVRTCError as error:
        pytest.fail(f"{arch}: {error}\n{binding.getProgramLog(program)}")
    log = binding.getProgramLog(program)
    binding.destroyProgram(program)
    return log


def assert_lean(log):
    assert "C7512" not in log, log
    spills = re.findall(r"(\d+) bytes spill", log)
    assert spills, log
    assert set(spills) == {"0"}, log


@pytest.mark.parametrize("arch", SINCE_80)
def test_sm80_words(arch, tmp_path):
    path = tmp_path / "words.cu"
    path.write_text(SM80, encoding="utf-8")
    assert_lean(compile_text(golden.inline_text(path), arch))


@pytest.mark.parametrize("file", sorted({case.file for case in golden.cases()}))
def test_probes(file):
    """Together they call every word of sm_90."""
    assert_lean(compile_text(golden.inline_text(golden.HERE / "probes" / file), "sm_90a"))


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_samples(name):
    assert_lean(compile_text(samples.text(name), "sm_90a"))


@pytest.mark.share(6)
@pytest.mark.parametrize("n", EVERY_N)
def test_wgmma_of_every_n(n, tmp_path):
    path = tmp_path / "wgmma.cu"
    path.write_text(_products(n), encoding="utf-8")
    log = compile_text(golden.inline_text(path), "sm_90a")
    assert_lean(log)


def _products(n):
    """One product of each form; more of them would want more registers than N = 256 leaves."""
    kernels = ['#include "mma_sm90.cuh"']
    for element in ("Float16", "Bfloat16"):
        for form in ("ss", "rs"):
            majors = "Major::K, Major::MN" if form == "ss" else "Major::MN"
            a = "a" if form == "ss" else "r"
            kernels.append(f"""
extern "C" __global__ void __launch_bounds__(128) {form}_{element}(
    float* out, const unsigned* in, unsigned long long a, unsigned long long b) {{
  float d[{n // 2}];
  unsigned r[4] = {{in[0], in[1], in[2], in[3]}};
  (void)r;
  wgmma_fence();
  wgmma_first_{form}<{element}, {majors}>(d, {a}, b);
  wgmma_{form}<{element}, {majors}>(d, {a}, b + 2);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(d);
  for (int i = 0; i < {n // 2}; ++i) out[128 * i + threadIdx.x] = d[i];
}}""")
    return "\n".join(kernels)


def test_every_word_of_sm90_is_probed():
    text = (golden.KERNELS / "mma_sm90.cuh").read_text(encoding="utf-8")
    words = set(re.findall(r"^__device__ __forceinline__ \w+ (\w+)\(", text, re.MULTILINE))
    users = [*(golden.HERE / "probes").glob("*.cu"), *(golden.HERE / "samples").glob("*.cu")]
    used = "".join(path.read_text(encoding="utf-8") for path in users)
    assert len(words) > 40
    assert {word for word in words if not re.search(rf"\b{word}\b", used)} == set()
    assert removals.removals()

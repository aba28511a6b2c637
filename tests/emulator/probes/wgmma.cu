// wgmma: shared memory is filled with numbers everywhere, so that a wrong address gives a wrong number.
#include "types.cuh"
#include "memory.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"

constexpr int WORDS = 24 * 1024;  // 96 KB
struct Smem {
  unsigned at[WORDS + 256];
};

template <int REGISTERS>
__device__ void put(float* out, float (&d)[REGISTERS]) {
  for (int i = 0; i < REGISTERS; ++i) out[128 * i + thread_index()] = d[i];
}

__device__ unsigned fill(Smem& smem, const unsigned* in) {
  const unsigned tile = (shared_address(&smem) + 1023) / 1024 * 1024,
                 offset = (tile - shared_address(&smem)) / 4;
  for (int i = thread_index(); i < WORDS; i += 128) smem.at[offset + i] = in[i];
  fence_proxy_async_shared();
  sync_block();
  return (tile & 0x3ffff) >> 4;
}

// d = a b, then d += a b' with operands one k step on; a, b: descriptors without the tile's address.
template <typename Element, Major A, Major B, int N>
__device__ void product(const unsigned* in, unsigned long long a, unsigned long long b, int step_a, int step_b,
                        float* out) {
  DYNAMIC_SHARED(Smem, smem);
  const unsigned long long start = fill(smem, in);
  float d[N / 2];
  wgmma_fence();
  wgmma_first_ss<Element, A, B>(d, a + start, b + start);
  wgmma_ss<Element, A, B>(d, a + start + (step_a >> 4), b + start + (step_b >> 4));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(d);
  put(out, d);
}

template <typename Element, Major B, int N>
__device__ void product_rs(const unsigned* in, const unsigned* fragments, unsigned long long b, int step_b,
                           float* out) {
  DYNAMIC_SHARED(Smem, smem);
  const unsigned long long start = fill(smem, in);
  unsigned a[2][4];
  for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = fragments[128 * i + thread_index()];
  float d[N / 2];
  wgmma_fence();
  wgmma_first_rs<Element, B>(d, a[0], b + start);
  wgmma_rs<Element, B>(d, a[1], b + start + (step_b >> 4));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(d);
  put(out, d);
}

#define SS(name, Element, A, B, N)                                                                          \
  extern "C" __global__ void __launch_bounds__(128) name(                                                   \
      const unsigned* in, unsigned long long a, unsigned long long b, int step_a, int step_b, float* out) { \
    product<Element, Major::A, Major::B, N>(in, a, b, step_a, step_b, out);                                 \
  }
#define RS(name, Element, B, N)                                                                           \
  extern "C" __global__ void __launch_bounds__(128)                                                       \
      name(const unsigned* in, const unsigned* fragments, unsigned long long b, int step_b, float* out) { \
    product_rs<Element, Major::B, N>(in, fragments, b, step_b, out);                                      \
  }
SS(ss_k_k_64, Float16, K, K, 64)
SS(ss_k_mn_64, Float16, K, MN, 64)
SS(ss_mn_k_64, Float16, MN, K, 64)
SS(ss_mn_mn_64, Float16, MN, MN, 64)
SS(ss_k_k_64_bfloat16, Bfloat16, K, K, 64)
SS(ss_k_k_8, Float16, K, K, 8)
SS(ss_k_k_80, Float16, K, K, 80)
SS(ss_k_k_176, Bfloat16, K, K, 176)
SS(ss_k_mn_192, Float16, K, MN, 192)
SS(ss_k_k_256, Float16, K, K, 256)
RS(rs_k_64, Float16, K, 64)
RS(rs_mn_128, Bfloat16, MN, 128)

// Every mma.sync: one warp, operands as fragments, straight from memory.
#include "types.cuh"
#include "memory.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"

template <typename T, int N>
__device__ void load(T (&r)[N], const T* p) {
  for (int i = 0; i < N; ++i) r[i] = p[N * thread_index() + i];
}
template <typename T, int N>
__device__ void store(T* p, const T (&r)[N]) {
  for (int i = 0; i < N; ++i) p[N * thread_index() + i] = r[i];
}

#define PROBE(name, Number, Operand, D, A, B, call)                                                         \
  extern "C" __global__ void name(const Operand* a_in, const Operand* b_in, const Number* c, Number* out) { \
    Number d[D];                                                                                            \
    Operand a[A], b[B];                                                                                     \
    load(a, a_in);                                                                                          \
    load(b, b_in);                                                                                          \
    load(d, c);                                                                                             \
    call;                                                                                                   \
    store(out, d);                                                                                          \
  }
PROBE(m16n8k16_float16, float, unsigned, 4, 4, 2, mma_m16n8k16<Float16>(d, a, b))
PROBE(m16n8k16_bfloat16, float, unsigned, 4, 4, 2, mma_m16n8k16<Bfloat16>(d, a, b))
PROBE(m16n8k8_float16, float, unsigned, 4, 2, 1, mma_m16n8k8<Float16>(d, a, b[0]))
PROBE(m16n8k8_bfloat16, float, unsigned, 4, 2, 1, mma_m16n8k8<Bfloat16>(d, a, b[0]))
PROBE(m16n8k4_tf32, float, unsigned, 4, 2, 1, mma_m16n8k4_tf32(d, a, b[0]))
PROBE(m16n8k8_tf32, float, unsigned, 4, 4, 2, mma_m16n8k8_tf32(d, a, b))
PROBE(m8n8k4_f64, double, double, 2, 1, 1, mma_m8n8k4_f64(d, a[0], b[0]))
PROBE(m16n8k4_f64, double, double, 4, 2, 1, mma_m16n8k4_f64(d, a, b[0]))
PROBE(m16n8k8_f64, double, double, 4, 4, 2, mma_m16n8k8_f64(d, a, b))
PROBE(m16n8k16_f64, double, double, 4, 8, 4, mma_m16n8k16_f64(d, a, b))

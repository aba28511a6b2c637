// Conversions and functions of types.cuh and mma_sm80.cuh, element by element.
#include "types.cuh"
#include "memory.cuh"
#include "mma_sm80.cuh"

extern "C" __global__ void widen(const unsigned short* bits, float* from_float16, float* from_bfloat16, int n) {
  const int i = block_index() * 256 + thread_index();
  if (i >= n) return;
  from_float16[i] = to_accumulator(Float16{bits[i]});
  from_bfloat16[i] = to_accumulator(Bfloat16{bits[i]});
}

extern "C" __global__ void narrow(const float* x, unsigned short* float16, unsigned short* bfloat16,
                                  unsigned* packed16, unsigned* packedb16, int n) {
  const int i = block_index() * 256 + thread_index();
  if (i >= n) return;
  float16[i] = from_accumulator<Float16>(x[i]).bits;
  bfloat16[i] = from_accumulator<Bfloat16>(x[i]).bits;
  packed16[i] = pack<Float16>(x[i], x[n - 1 - i]);
  packedb16[i] = pack<Bfloat16>(x[i], x[n - 1 - i]);
}

extern "C" __global__ void functions(const float* x, float* power, float* logarithm, float* larger, int n) {
  const int i = block_index() * 256 + thread_index();
  if (i >= n) return;
  power[i] = math::exp2(x[i]);
  logarithm[i] = math::log(x[i]);
  larger[i] = math::max(x[i], x[n - 1 - i]);
}

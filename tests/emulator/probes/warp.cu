// Shuffles, votes, reductions and atomics: one warp, every lane writes what it got.
#include "types.cuh"
#include "memory.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"

extern "C" __global__ void shuffles(const int* x, int* out) {
  const int lane = thread_index();
  int row = 0;
  auto put = [&](int value) { out[32 * row++ + lane] = value; };
  for (int width = 32; width >= 2; width /= 2) {
    for (int n = 0; n < 36; n += 5) {
      put(__shfl_sync(~0u, x[lane], n, width));
      put(__shfl_up_sync(~0u, x[lane], n % 32, width));
      put(__shfl_down_sync(~0u, x[lane], n % 32, width));
      put(__shfl_xor_sync(~0u, x[lane], n % 32, width));
    }
  }
}

extern "C" __global__ void words(const float* x, float* out, const double* y, double* out2) {
  const int lane = thread_index();
  for (int mask = 1; mask < 32; mask *= 2) out[lane + 32 * (mask & 7)] = shuffle_xor(x[lane], mask);
  for (int mask = 1; mask < 32; mask *= 2) out2[lane + 32 * (mask & 7)] = shuffle_xor(y[lane], mask);
}

extern "C" __global__ void votes(const int* x, int* out) {
  const int lane = thread_index();
  out[lane] = __ballot_sync(~0u, x[lane] & 1);
  out[32 + lane] = __all_sync(~0u, x[lane] >= 0);
  out[64 + lane] = __any_sync(~0u, x[lane] == x[0]);
  out[96 + lane] = __reduce_add_sync(~0u, x[lane]);
  out[128 + lane] = __reduce_min_sync(~0u, x[lane]);
  out[160 + lane] = __reduce_max_sync(~0u, x[lane]);
  out[192 + lane] = __reduce_min_sync(~0u, static_cast<unsigned>(x[lane]));
  out[224 + lane] = __reduce_max_sync(~0u, static_cast<unsigned>(x[lane]));
  out[256 + lane] = __reduce_and_sync(~0u, static_cast<unsigned>(x[lane]));
  out[288 + lane] = __reduce_or_sync(~0u, static_cast<unsigned>(x[lane]));
  out[320 + lane] = __reduce_xor_sync(~0u, static_cast<unsigned>(x[lane]));
  if (lane < 12) out[352 + lane] = __ballot_sync(0xfffu, x[lane] & 2);
  out[384 + lane] = elect_one();
}

extern "C" __global__ void block_votes(const int* x, int* out) {
  const int thread = thread_index();
  out[thread] = __syncthreads_count(x[thread] & 1);
  out[128 + thread] = __syncthreads_and(x[thread] != 3);
  out[256 + thread] = __syncthreads_or(x[thread] == 3);
}

extern "C" __global__ void atomics(const int* x, int* i32, unsigned* u32, unsigned long long* u64, float* f32,
                                   double* f64) {
  const int v = x[thread_index()];
  atomicAdd(&i32[0], v);
  atomicMin(&i32[1], v);
  atomicMax(&i32[2], v);
  atomicMin(&u32[0], static_cast<unsigned>(v));
  atomicMax(&u32[1], static_cast<unsigned>(v));
  atomicAnd(&u32[2], static_cast<unsigned>(v));
  atomicOr(&u32[3], static_cast<unsigned>(v));
  atomicXor(&u32[4], static_cast<unsigned>(v));
  atomicAdd(&u64[0], static_cast<unsigned long long>(v));
  atomicAdd(&f32[0], static_cast<float>(v % 1000));
  atomicAdd(&f64[0], static_cast<double>(v));
  if (thread_index() == 0) {
    i32[3] = atomicExch(&i32[4], 7);
    i32[5] = atomicCAS(&i32[6], 5, 9);
    i32[7] = atomicCAS(&i32[8], 6, 9);
  }
  const float pair[2] = {static_cast<float>(v % 10), 1.0f};
  const float four[4] = {1.0f, static_cast<float>(v % 10), 2.0f, 3.0f};
  add_global(f32 + 4, pair);
  add_global(f32 + 8, four);
}

// Block 1 tells block 0 what it wrote.
extern "C" __global__ void flags(int* data, int* flag, int* out) {
  if (block_index() == 1) {
    data[thread_index()] = 100 + thread_index();
    sync_block();
    if (thread_index() == 0) add_release(flag, 1);
    if (thread_index() == 1) {
      while (load_acquire(flag + 1) != 5) {}
      out[64] = data[64];
    }
  } else {
    if (thread_index() == 0) {
      data[64] = 17;
      store_release(flag + 1, 5);
      while (load_acquire(flag) == 0) {}
    }
    sync_block();
    out[thread_index()] = data[thread_index()];
  }
}

// Half of the block waits, the other half only arrives.
extern "C" __global__ void barriers(const int* x, int* out) {
  struct Smem {
    int at[128];
  };
  DYNAMIC_SHARED(Smem, smem);
  smem.at[thread_index()] = x[thread_index()];
  if (thread_index() >= 64) {
    barrier_arrive(3, 128);
  } else {
    barrier_sync(3, 128);
    out[thread_index()] = smem.at[thread_index() + 64];
  }
}

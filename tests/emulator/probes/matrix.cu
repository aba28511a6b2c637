// ldmatrix, stmatrix, movmatrix and cp.async: shared memory is 4 KB, copied in and out whole.
#include "types.cuh"
#include "memory.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"

struct Smem {
  unsigned at[1024];
};

__device__ void fill(Smem& smem, const unsigned* in) {
  for (int i = thread_index(); i < 1024; i += 32) smem.at[i] = in[i];
  sync_block();
}
__device__ void dump(const Smem& smem, unsigned* out) {
  sync_block();
  for (int i = thread_index(); i < 1024; i += 32) out[i] = smem.at[i];
}

// rows[lane]: the byte offset that a lane gives.
extern "C" __global__ void load_matrices(const unsigned* in, const int* rows, unsigned* out) {
  DYNAMIC_SHARED(Smem, smem);
  fill(smem, in);
  const unsigned row = shared_address(&smem) + rows[thread_index()];
  unsigned one[1], two[2], four[4];
  int n = 0;
  auto put = [&](unsigned r) { out[32 * n++ + thread_index()] = r; };
  ldmatrix_x1(one, row);
  put(one[0]);
  ldmatrix_x2(two, row);
  for (int i = 0; i < 2; ++i) put(two[i]);
  ldmatrix_x4(four, row);
  for (int i = 0; i < 4; ++i) put(four[i]);
  ldmatrix_x1_trans(one, row);
  put(one[0]);
  ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 2; ++i) put(two[i]);
  ldmatrix_x4_trans(four, row);
  for (int i = 0; i < 4; ++i) put(four[i]);
  put(movmatrix_trans(four[0]));
}

#define STORE(name, COUNT, call)                                                               \
  extern "C" __global__ void name(const unsigned* in, const int* rows, const unsigned* values, \
                                  unsigned* out) {                                             \
    DYNAMIC_SHARED(Smem, smem);                                                                \
    fill(smem, in);                                                                            \
    const unsigned row = shared_address(&smem) + rows[thread_index()];                         \
    unsigned r[COUNT];                                                                         \
    for (int i = 0; i < COUNT; ++i) r[i] = values[32 * i + thread_index()];                    \
    call(row, r);                                                                              \
    dump(smem, out);                                                                           \
  }
STORE(store_x1, 1, stmatrix_x1)
STORE(store_x2, 2, stmatrix_x2)
STORE(store_x4, 4, stmatrix_x4)
STORE(store_x1_trans, 1, stmatrix_x1_trans)
STORE(store_x2_trans, 2, stmatrix_x2_trans)
STORE(store_x4_trans, 4, stmatrix_x4_trans)

extern "C" __global__ void copies(const unsigned* in, const unsigned char* from, unsigned* out) {
  DYNAMIC_SHARED(Smem, smem);
  fill(smem, in);
  const int lane = thread_index();
  const unsigned base = shared_address(&smem);
  cp_async<16>(base + 16 * lane, from + 16 * lane);
  cp_async_commit();
  cp_async<16>(base + 512 + 16 * lane, from + 16 * (31 - lane), lane % 17);
  cp_async<8>(base + 1024 + 8 * lane, from + 8 * lane);
  cp_async_commit();
  cp_async<8>(base + 1280 + 8 * lane, from + 24 * lane, lane % 9);
  cp_async<4>(base + 1536 + 4 * lane, from + 4 * lane);
  cp_async<4>(base + 1664 + 4 * lane, from + 12 * lane, lane % 5);
  cp_async_commit();
  cp_async_wait<1>();
  const unsigned early = smem.at[4 * lane];
  cp_async_wait<0>();
  dump(smem, out);
  out[1024 + lane] = early;
}

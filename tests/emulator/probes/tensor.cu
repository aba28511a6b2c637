// TMA: a box in, shared memory out as it lies; or shared memory in, a box out. 128 threads, up to 32 KB.
#include "types.cuh"
#include "memory.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"

constexpr int WORDS = 8192;
struct Smem {
  unsigned at[WORDS + 256];  // room to start at a multiple of 1024 bytes
  unsigned long long mbarrier;
};

__device__ unsigned aligned_start(const Smem& smem) { return (shared_address(&smem) + 1023) / 1024 * 1024; }

__device__ void load_box(unsigned tile, const TensorMap& map, unsigned mbarrier, int rank, int c0, int c1,
                         int c2, int c3, int c4) {
  if (rank == 2) tensor_load(tile, map, mbarrier, c0, c1);
  if (rank == 3) tensor_load(tile, map, mbarrier, c0, c1, c2);
  if (rank == 4) tensor_load(tile, map, mbarrier, c0, c1, c2, c3);
  if (rank == 5) tensor_load(tile, map, mbarrier, c0, c1, c2, c3, c4);
}

extern "C" __global__ void box_in(const __grid_constant__ TensorMap map, unsigned* out, int rank, int bytes,
                                  int c0, int c1, int c2, int c3, int c4) {
  DYNAMIC_SHARED(Smem, smem);
  const unsigned tile = aligned_start(smem), offset = (tile - shared_address(&smem)) / 4;
  const unsigned mbarrier = shared_address(&smem.mbarrier);
  if (thread_index() == 0) {
    mbarrier_init(mbarrier, 1);
    fence_mbarrier_init();
    prefetch_tensor_map(map);
    mbarrier_arrive_expect_tx(mbarrier, bytes);
    load_box(tile, map, mbarrier, rank, c0, c1, c2, c3, c4);
  }
  sync_block();
  mbarrier_wait(mbarrier, 0);
  for (int i = thread_index(); i < bytes / 4; i += 128) out[i] = smem.at[offset + i];
}

extern "C" __global__ void box_out(const __grid_constant__ TensorMap map, const unsigned* in, int add, int rank,
                                   int bytes, int c0, int c1, int c2, int c3, int c4) {
  DYNAMIC_SHARED(Smem, smem);
  const unsigned tile = aligned_start(smem), offset = (tile - shared_address(&smem)) / 4;
  for (int i = thread_index(); i < bytes / 4; i += 128) smem.at[offset + i] = in[i];
  fence_proxy_async_shared();
  sync_block();
  if (thread_index() == 0) {
    if (add) tensor_add(map, tile, c0, c1, c2, c3);
    if (!add && rank == 2) tensor_store(map, tile, c0, c1);
    if (!add && rank == 3) tensor_store(map, tile, c0, c1, c2);
    if (!add && rank == 4) tensor_store(map, tile, c0, c1, c2, c3);
    if (!add && rank == 5) tensor_store(map, tile, c0, c1, c2, c3, c4);
    bulk_commit();
    bulk_wait<0>();
  }
}

// Bulk copies and mbarriers: one block of 128 threads; shared memory is 4 KB behind an mbarrier.
#include "types.cuh"
#include "memory.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"

struct Smem {
  alignas(128) float at[1024];
  unsigned long long mbarrier[4];
};

__device__ void start(unsigned mbarrier, int count) {
  if (thread_index() == 0) {
    mbarrier_init(mbarrier, count);
    fence_mbarrier_init();
  }
  sync_block();
}

extern "C" __global__ void bulk_in(const float* from, float* out, int first, int count) {
  DYNAMIC_SHARED(Smem, smem);
  for (int i = thread_index(); i < 1024; i += 128) smem.at[i] = -1;
  fence_proxy_async_shared();
  const unsigned mbarrier = shared_address(&smem.mbarrier[0]);
  start(mbarrier, 1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect_tx(mbarrier, 4 * count);
    bulk_load(shared_address(&smem.at[first]), from, 2 * count, mbarrier);
    bulk_load(shared_address(&smem.at[first + count / 2]), from + 512, 2 * count, mbarrier);
  }
  mbarrier_wait(mbarrier, 0);
  for (int i = thread_index(); i < 1024; i += 128) out[i] = smem.at[i];
}

extern "C" __global__ void bulk_out(const float* from, float* stored, float* added, double* added64,
                                    float* out) {
  DYNAMIC_SHARED(Smem, smem);
  for (int i = thread_index(); i < 1024; i += 128) smem.at[i] = from[i];
  fence_proxy_async_shared();
  sync_block();
  if (thread_index() == 0) {
    bulk_store(stored, shared_address(&smem.at[0]), 4096);
    bulk_commit();
    bulk_add(added, shared_address(&smem.at[512]), 2048);
    bulk_commit();
    bulk_wait<0>();
    out[0] = stored[1023];
    bulk_add(added64, shared_address(&smem.at[0]), 1024);
    bulk_commit();
    bulk_wait_read<0>();
    bulk_wait<0>();
  }
}

// What try_wait says of both parities, after each step of two phases.
extern "C" __global__ void phases(int* out) {
  DYNAMIC_SHARED(Smem, smem);
  const unsigned mbarrier = shared_address(&smem.mbarrier[1]);
  start(mbarrier, 3);
  int n = 0;
  auto look = [&] {
    if (thread_index() == 0) {
      out[n++] = mbarrier_try_wait(mbarrier, 0);
      out[n++] = mbarrier_try_wait(mbarrier, 1);
    }
  };
  if (thread_index() == 0) {
    look();
    mbarrier_arrive(mbarrier);
    look();
    mbarrier_arrive(mbarrier);
    mbarrier_arrive(mbarrier);
    look();
    mbarrier_arrive(mbarrier);
    mbarrier_arrive(mbarrier);
    look();
    mbarrier_arrive(mbarrier);
    look();
    mbarrier_inval(mbarrier);
  }
}

// Global memory written by ordinary stores, then read by a bulk load of the same kernel.
extern "C" __global__ void round_trip(const float* from, float* through, float* out) {
  DYNAMIC_SHARED(Smem, smem);
  const unsigned mbarrier = shared_address(&smem.mbarrier[2]);
  start(mbarrier, 1);
  for (int turn = 0; turn < 2; ++turn) {
    through[128 * turn + thread_index()] = 2 * from[128 * turn + thread_index()];
    if (turn == 0) fence_proxy_async();
    if (turn == 1) fence_proxy_async_global();
    sync_block();
    if (thread_index() == 0) {
      mbarrier_expect_tx(mbarrier, 512);
      bulk_load(shared_address(&smem.at[128 * turn]), through + 128 * turn, 512, mbarrier);
      mbarrier_arrive(mbarrier);
    }
    mbarrier_wait(mbarrier, turn);
    out[128 * turn + thread_index()] = smem.at[128 * turn + (thread_index() ^ 5)];
  }
}

// Blocks that add to one row of numbers, one after another in the order of their tickets, for the checker's own
// tests: float addition in a fixed order. 64 numbers a block, added by a bulk reduction behind a flag.
#include "types.cuh"
#include "memory.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"

struct Smem {
  alignas(128) float part[64];
  int ticket;
};

// state[0]: the next ticket; state[1]: how many blocks have added. log[i]: what the sum was before ticket i,
// and its block.
extern "C" __global__ void __launch_bounds__(64)
    sample_ordered(const float* in, float* sum, float* log, int* state) {
  DYNAMIC_SHARED(Smem, smem);
  if (thread_index() == 0) smem.ticket = atomicAdd(&state[0], 1);
  sync_block();  // the ticket is there
  const int ticket = smem.ticket;
  smem.part[thread_index()] = 2 * in[64 * ticket + thread_index()];
  fence_proxy_async_shared();  // the reduction reads through the async proxy
  sync_block();                // all of part is written
  if (thread_index() == 0) {
    while (load_acquire(&state[1]) != ticket) {}
    log[ticket] = sum[0];
    bulk_add(sum, shared_address(smem.part), 256);
    bulk_commit();
    bulk_wait<0>();  // sum is written
    store_release(&state[1], ticket + 1);
  }
}

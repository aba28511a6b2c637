// After bwd_sm90 in arrival order: dq from its float32 sums, scaled and rounded. (In a fixed order the last key block
// of a tile does this.)
//
// A thread block owns the BLOCK_M queries of one tile; its two warpgroups hold what the two consumers of bwd_sm90 held.
// No shared memory.
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "score.cuh"
#include "tile_sm90.cuh"
#include "gradients_sm90.cuh"

constexpr int SMEM_BYTES = 0;
static_assert(NUM_WARPS == 8, "a warpgroup for each consumer");

template <int N>
__device__ __forceinline__ void finish(const Params& params, const Work& work, int consumer) {
  if constexpr (N > 0) {
    const Sequence seq = sequence_of(params, work.batch);
    Fragment<N> dq;
    clear(dq);
    add_part<128>(dq, own_part(tile_sums(params, seq.batch_index, work.head, work.block), consumer));
    finish_dq(params, seq, rows_of<Gradient_q>(params.dq, seq.batch_index, work.head), work.block, consumer, dq);
  }
}

extern "C" __global__ void __launch_bounds__(32 * NUM_WARPS) bwd_dq_sm90(const Params params) {
  const Work work = scheduled_work(params, ceil_div(params.seqlen_q, BLOCK_M), params.num_heads, Longest::LAST_BLOCK);
  const int consumer = warp_uniform(thread_index() / 128);
  if constexpr (!WIDE) {
    finish<DQ_COLS>(params, work, consumer);
  } else if (consumer == 0) {
    finish<first_share(HEAD_DIM)>(params, work, 0);
  } else {
    finish<second_share(HEAD_DIM)>(params, work, 1);
  }
}

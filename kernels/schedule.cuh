// Which tile a thread block computes. The grid has one dimension, blocks x heads x batch entries, so that neither
// 65535 heads nor 65535 entries is a limit.
#pragma once
#include "params.cuh"
#include "memory.cuh"
#include "basics.cuh"

struct Work {
  int block;  // m_block or n_block
  int head;
  int batch;
};

enum class Longest { FIRST_BLOCK, LAST_BLOCK };  // which block of a causal head has most to do

__device__ __forceinline__ Work scheduled_work(const Params& params, int num_blocks, int num_heads, Longest longest) {
  const int index = block_index();
  Work work;
  int entry_head;
  if constexpr (CAUSAL) {  // the longest tiles of all heads first: short ones fill the gaps at the end
    const int pairs =
        num_heads * params.batch_shape[0] * params.batch_shape[1] * params.batch_shape[2] * params.batch_shape[3];
    const int rank = index / pairs;
    work.block = longest == Longest::FIRST_BLOCK ? rank : num_blocks - 1 - rank;
    entry_head = index % pairs;
  } else {  // all tiles take the same time: neighbours share a head, and so its lines of L2
    work.block = index % num_blocks;
    entry_head = index / num_blocks;
  }
  work.head = entry_head % num_heads;
  work.batch = entry_head / num_heads;
  return work;
}

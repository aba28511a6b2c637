// The turns of a job, in the sm80 family's backward: a block of keys goes through the query tiles that see it, of each
// head that reads its kv head. What a family calls Job stands in the text before this.
#pragma once
#include "schedule.cuh"
#include "mask.cuh"
#include "block_walk.cuh"

// One turn: a query tile of one head. From the last tile of the first head on.
struct TurnOf {
  int head, m_block, slot;  // head: behind the first

  __device__ __forceinline__ TurnOf(const Params& params, const Job& job)
      : head(job.begin < job.end ? 0 : job.heads), m_block(job.end - 1), slot(0) {
    if constexpr (HIDES_PAIRS) find(params, job);
  }
  __device__ __forceinline__ bool exists(const Job& job) const { return head < job.heads; }
  __device__ __forceinline__ void advance(const Params& params, const Job& job) {
    slot ^= 1;
    if (--m_block < job.begin) {
      m_block = job.end - 1;
      ++head;
    }
    if constexpr (HIDES_PAIRS) find(params, job);
  }
  __device__ __forceinline__ BlockWalk walk(const Params& params, const Job& job) const {
    return query_walk(params, job.seq, job.first_head + head, job.n_block);
  }

 private:
  // From here on, the first tile that sees the keys.
  __device__ __forceinline__ void find(const Params& params, const Job& job) {
    for (; exists(job); ++head) {
      m_block = walk(params, job).down(m_block, job.begin);
      if (m_block >= job.begin) return;
      m_block = job.end - 1;
    }
  }
};

// The key blocks that a turn's tile sees, of which its dQ is the sum.
struct Adders {
  BlockWalk walk;
  BlockRange range;

  __device__ __forceinline__ Adders(const Params& params, const Job& job, const TurnOf& turn)
      : walk(key_walk(params, job.seq, job.first_head + turn.head, turn.m_block)),
        range(walk.within(mask_of(params, job.seq).key_blocks(turn.m_block * BLOCK_M, BLOCK_M))) {}
  __device__ __forceinline__ int below(int n_block) const { return walk.count(range.begin, n_block); }
};

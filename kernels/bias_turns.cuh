// Which tile of dbias a thread block owns, and what it adds up there: the turns of bwd_bias_*.
//
// params.batch_shape is dbias's own, 1 on axes over which it is a sum, and reduce_shape counts what is summed there.
// SUM_ROWS, SUM_COLS: dbias has one row, one column. SUM_HEADS: the heads are summed too, with the entries.
#pragma once
#include "params.cuh"
#include "types.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "block_walk.cuh"

struct BiasTile {
  int m_block, n_block;  // 0 along what is summed
  int head;
  int own_index[4];  // along the leading axes

  __device__ __forceinline__ explicit BiasTile(const Params& params) {
    const int m_blocks = SUM_ROWS ? 1 : ceil_div(params.seqlen_q, BLOCK_M);
    const int n_blocks = SUM_COLS ? 1 : ceil_div(params.seqlen_k, BLOCK_N);
    int index = block_index();
    n_block = index % n_blocks;
    index /= n_blocks;
    m_block = index % m_blocks;
    index /= m_blocks;
    const int heads = SUM_HEADS ? 1 : params.num_heads;
    head = index % heads;
    unravel(own_index, params.batch_shape, index / heads);
  }
  __device__ __forceinline__ Rows<Gradient> rows(const Params& params) const {
    return rows_of<Gradient>(params.dbias, own_index, head);
  }
};

// One turn: one block of pairs of one head of one entry. Those that nobody sees are left out. The entry is described
// once, when its turn comes: that takes divisions.
struct BiasTurn {
  BiasTile tile;
  int m_block, n_block, head, entry;  // entry: of those that are summed
  int group, head_k;                  // heads that share a kv head, and the one of this head
  Sequence seq;

  __device__ __forceinline__ explicit BiasTurn(const Params& params)
      : tile(params), m_block(tile.m_block), n_block(tile.n_block), head(tile.head), entry(0) {
    group = params.num_heads / params.num_heads_k;
    head_k = head / group;
    if (ceil_div(params.seqlen_q, BLOCK_M) == 0 || ceil_div(params.seqlen_k, BLOCK_N) == 0) entry = entries(params);
    describe_entry(params);
    skip_unseen(params);
  }
  __device__ __forceinline__ bool exists(const Params& params) const { return entry < entries(params); }
  __device__ __forceinline__ void advance(const Params& params) {
    step(params);
    skip_unseen(params);
  }

 private:
  static __device__ __forceinline__ int entries(const Params& params) {
    const int* count = params.reduce_shape;
    return count[0] * count[1] * count[2] * count[3];
  }
  __device__ __forceinline__ void describe_entry(const Params& params) {
    if (!exists(params)) return;
    unravel(seq.batch_index, params.reduce_shape, entry);
#pragma unroll
    for (int axis = 0; axis < 4; ++axis) seq.batch_index[axis] += tile.own_index[axis];
    describe(seq, params);
  }
  __device__ __forceinline__ void step(const Params& params) {
    if (SUM_COLS && ++n_block < ceil_div(params.seqlen_k, BLOCK_N)) return;
    if (SUM_COLS) n_block = 0;
    if (SUM_ROWS && ++m_block < ceil_div(params.seqlen_q, BLOCK_M)) return;
    if (SUM_ROWS) m_block = 0;
    if constexpr (SUM_HEADS) {
      head = head + 1 < params.num_heads ? head + 1 : 0;
      head_k = head / group;
      if (head > 0) return;
    }
    ++entry;
    describe_entry(params);
  }
  __device__ __forceinline__ void skip_unseen(const Params& params) {
    while (exists(params)) {
      const BlockRange blocks = mask_of(params, seq).key_blocks(m_block * BLOCK_M, BLOCK_M);
      const bool seen = key_walk(params, seq, head, m_block).up(n_block, n_block + 1) == n_block;
      if (n_block >= blocks.begin && n_block < blocks.end && seen) return;
      step(params);
    }
  }
};

__device__ __forceinline__ void store_gradient(const Rows<Gradient>& rows, int row, int col, Accumulator x) {
  store_global(rows.at(row, col), Vector<Gradient, 1>{{from_accumulator<Gradient>(x)}});
}

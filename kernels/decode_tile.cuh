// What decoding kernels share: which rows and keys a thread block has, and how its warps' sums become a result.
//
// A tile is BLOCK_M (query, head) pairs of the heads that share a kv head: row p is query p / heads of head p % heads,
// so that K and V are read once for all of them. Its keys are those of one split; each warp takes every NUM_WARPS-th
// block of them, has a softmax and an acc_o of its own, and nothing to tell the others until the end.
#pragma once
#include "basics.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "seqlen.cuh"
#include "cache.cuh"
#include "mask.cuh"
#include "features.cuh"

struct DecodeTile {
  Sequence seq;
  int batch, head_k, head;  // its kv head, and the first of its heads
  int heads;                // that share the kv head
  int row0, row_end;
  int split;

  // Tiles of one split follow one another: they read the same keys.
  __device__ __forceinline__ explicit DecodeTile(const DecodeParams& decode) {
    const Params& params = decode.params;
    heads = params.num_heads / params.num_heads_k;
    row_end = params.seqlen_q * heads;
    const int tiles = ceil_div(row_end, BLOCK_M), splits = SPLITS ? decode.num_splits : 1;
    int index = block_index();
    row0 = index % tiles * BLOCK_M;
    index /= tiles;
    split = index % splits;
    index /= splits;
    head_k = index % params.num_heads_k;
    batch = index / params.num_heads_k;
    head = head_k * heads;
    seq = cached_sequence(decode, batch);
  }
  // Rows beyond the end are the last one, which is not stored for them.
  __device__ __forceinline__ int inside(int row) const { return smaller(row0 + row, row_end - 1); }
  __device__ __forceinline__ int query(int row) const { return inside(row) / heads; }
  __device__ __forceinline__ int head_of(int row) const { return head + inside(row) % heads; }

  // Of the split, the blocks that some row sees.
  __device__ __forceinline__ BlockRange key_blocks(const DecodeParams& decode, const Mask& mask) const {
    const int first = query(0), last = query(BLOCK_M - 1);
    BlockRange range = mask.key_blocks(first, last - first + 1);
    if constexpr (SPLITS) {
      const int blocks = decode.split_length / BLOCK_N;
      const int begin = split * blocks, end = begin + blocks;
      range.begin = range.begin > begin ? range.begin : begin;
      range.end = smaller(range.end, end);
    }
    return range;
  }
};

// The largest logits and the sums of each warp's keys, by row.
struct WarpStates {
  Accumulator row_max[NUM_WARPS][BLOCK_M], row_sum[NUM_WARPS][BLOCK_M];
};

// One row over all warps, and the head's sink, if it belongs to this split.
struct RowTotal {
  Accumulator less;  // what exponents subtract: the largest of all
  Accumulator sum;   // 0 where there is no key and no sink

  __device__ __forceinline__ RowTotal(
      const WarpStates& states, int row, const Score& score, bool has_sink, Accumulator sink) {
    less = -math::infinity<Accumulator>();
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) less = math::max(less, exponent(states, warp, row, score));
    const Accumulator own = has_sink ? sink * Accumulator(math::LOG2E) : -math::infinity<Accumulator>();
    less = math::max(less, own);
    // -inf - -inf would be NaN, so a row that has seen nothing subtracts 0.
    if (less == -math::infinity<Accumulator>()) less = 0;
    sum = has_sink ? math::exp2(own - less) : Accumulator(0);
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) {
      const Accumulator part = states.row_sum[warp][row];
      sum += nothing(states, warp, row) ? Accumulator(0) : part * factor(states, warp, row, score);
    }
  }
  // A warp that has seen no key for the row. (Of NaN alone row_max is -inf, and the sum NaN.)
  static __device__ __forceinline__ bool nothing(const WarpStates& states, int warp, int row) {
    return states.row_max[warp][row] == -math::infinity<Accumulator>() && states.row_sum[warp][row] == 0;
  }
  static __device__ __forceinline__ Accumulator exponent(
      const WarpStates& states, int warp, int row, const Score& score) {
    return states.row_max[warp][row] * score.exponent;
  }
  // What a warp's sums of the row are multiplied by.
  __device__ __forceinline__ Accumulator factor(const WarpStates& states, int warp, int row, const Score& score) const {
    const Accumulator own = states.row_max[warp][row];
    const Accumulator before = own == -math::infinity<Accumulator>() ? Accumulator(0) : own * score.exponent;
    return math::exp2(before - less);
  }
  __device__ __forceinline__ Accumulator lse() const {
    return math::fma(less, Accumulator(math::LN2), math::log(sum));
  }
};

__device__ __forceinline__ RowTotal total_of(
    const DecodeParams& decode, const DecodeTile& tile, const WarpStates& states, int row) {
  // A sink belongs to one split.
  const bool has_sink = SINKS && tile.split == 0;
  const Accumulator sink = has_sink ? lse_of_nothing(decode.params, tile.seq, tile.head_of(row)) : Accumulator(0);
  return RowTotal(states, row, score_of(decode.params), has_sink, sink);
}

// Each warp's acc_o, unscaled, by row; what a warp has not seen is never read.
template <int COLUMNS>
struct WarpOutputs {
  Accumulator at[BLOCK_M][COLUMNS + 16 / sizeof(Accumulator)];
};

// The result of the tile's rows, from what all warps have put down: states and outputs(warp, row, col).
// By the whole block.
template <typename Out, typename Outputs>
__device__ __forceinline__ void store_decoded(
    const DecodeParams& decode, const DecodeTile& tile, const WarpStates& states, const Tensor& out_tensor,
    const Tensor& lse_tensor, long long out_ahead, long long lse_ahead, const Outputs& outputs) {
  constexpr int RUN = 16 / sizeof(Accumulator), GROUPS = HEAD_DIM_V / RUN;
  const Params& params = decode.params;
  const Score score = score_of(params);
  for (int i = thread_index(); i < BLOCK_M * GROUPS; i += NUM_THREADS) {
    const int row = i / GROUPS, col = i % GROUPS * RUN;
    if (tile.row0 + row >= tile.row_end) continue;
    const RowTotal total = total_of(decode, tile, states, row);
    const Accumulator share = total.sum == 0 ? Accumulator(1) : 1 / total.sum;
    Accumulator numbers[RUN] = {};
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) {
      if (RowTotal::nothing(states, warp, row)) continue;
      const Accumulator factor = total.factor(states, warp, row, score);
#pragma unroll
      for (int e = 0; e < RUN; ++e) numbers[e] = math::fma(factor, outputs(warp, row, col + e), numbers[e]);
    }
#pragma unroll
    for (int e = 0; e < RUN; ++e) numbers[e] *= share;
    const int query = tile.query(row), head = tile.head_of(row);
    Rows<Out> out = rows_of<Out>(out_tensor, tile.seq.batch_index, head);  // (seqlen_q, head_dim_v)
    out.data += out_ahead;
    out.vectors = out.vectors && is_aligned(out.data, 16);
    store_columns(out, query, col, params.head_dim_v, numbers);
    if (col == 0) {
      Rows<Accumulator> lse = rows_of<Accumulator>(lse_tensor, tile.seq.batch_index, head);  // (seqlen_q)
      if (lse.data != nullptr) lse.data += lse_ahead;
      store_number(lse, query, total.lse());
    }
  }
}
template <typename Outputs>
__device__ __forceinline__ void store_decoded(
    const DecodeParams& decode, const DecodeTile& tile, const WarpStates& states, const Outputs& outputs) {
  if constexpr (SPLITS) {
    const long long out = tile.split * decode.split_stride, lse = tile.split * decode.split_lse_stride;
    store_decoded<Accumulator>(decode, tile, states, decode.partial, decode.partial_lse, out, lse, outputs);
  } else {
    store_decoded<Output>(decode, tile, states, decode.params.out, decode.params.lse, 0, 0, outputs);
  }
}

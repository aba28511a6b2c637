// What decoding kernels share: which rows and keys a thread block has, and how its warps' sums become a result.
//
// A tile is BLOCK_M (query, head) pairs of the heads that share a kv head: row p is query p / heads of head p % heads,
// so that K and V are read once for all of them. The keys that it sees are cut into splits, each of which has a partial
// result; a thread block has some of them. Of a split each warp takes every NUM_WARPS-th block of keys, has a softmax
// and an acc_o of its own, and nothing to tell the others until the end.
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
  int first_split;  // of the thread block
  BlockRange seen;  // the blocks of keys that some row sees

  // Tiles that read the same keys follow one another; then heads, whose rows lie side by side in a page.
  __device__ __forceinline__ explicit DecodeTile(const DecodeParams& decode) {
    const Params& params = decode.params;
    heads = params.num_heads / params.num_heads_k;
    row_end = params.seqlen_q * heads;
    const int tiles = ceil_div(row_end, BLOCK_M), blocks = SPLITS ? decode.blocks_of_tile : 1;
    int index = block_index();
    row0 = index % tiles * BLOCK_M;
    index /= tiles;
    head_k = index % params.num_heads_k;
    index /= params.num_heads_k;
    first_split = index % blocks;
    batch = index / blocks;
    head = head_k * heads;
    seq = cached_sequence(decode, batch);
    const int first = query(0), last = query(BLOCK_M - 1);
    seen = mask_of(params, seq).key_blocks(first, last - first + 1);
  }
  // Rows beyond the end are the last one, which is not stored for them.
  __device__ __forceinline__ int inside(int row) const { return smaller(row0 + row, row_end - 1); }
  __device__ __forceinline__ int query(int row) const { return inside(row) / heads; }
  __device__ __forceinline__ int head_of(int row) const { return head + inside(row) % heads; }

  // The blocks of a split. Splits are as long as the entry needs, not as the cache has room for: the last ones may have
  // none. Nobody else's length matters, so an entry's bits depend on no other.
  __device__ __forceinline__ BlockRange blocks_of(const DecodeParams& decode, int split) const {
    BlockRange range = seen;
    if constexpr (SPLITS) {
      const int least = decode.split_length / BLOCK_N;
      const int even = ceil_div(ceil_div(seen.end - seen.begin, decode.num_splits), NUM_WARPS) * NUM_WARPS;
      const int length = even > least ? even : least;
      range.begin = smaller(seen.begin + split * length, seen.end);
      range.end = smaller(range.begin + length, seen.end);
    }
    return range;
  }
};

// A sink belongs to one split.
__device__ __forceinline__ bool has_sink(int split) { return SINKS && split == 0; }

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
    const DecodeParams& decode, const DecodeTile& tile, int split, const WarpStates& states, int row) {
  const bool sinks = has_sink(split);
  const Accumulator sink = sinks ? lse_of_nothing(decode.params, tile.seq, tile.head_of(row)) : Accumulator(0);
  return RowTotal(states, row, score_of(decode.params), sinks, sink);
}

// Each warp's acc_o, unscaled, by row; what a warp has not seen is never read.
template <int COLUMNS>
struct WarpOutputs {
  Accumulator at[BLOCK_M][COLUMNS + 16 / sizeof(Accumulator)];
};

// A partial result is not rounded.
template <bool PARTIAL>
struct ResultOf {
  using Type = Output;
};
template <>
struct ResultOf<true> {
  using Type = Accumulator;
};

// Where a split's results go: to out and lse where it is the only one.
struct DecodeResults {
  using Number = ResultOf<SPLITS>::Type;
  const Tensor &out, &lse;
  long long out_ahead, lse_ahead;

  __device__ __forceinline__ DecodeResults(const DecodeParams& decode, int split)
      : out(SPLITS ? decode.partial : decode.params.out),
        lse(SPLITS ? decode.partial_lse : decode.params.lse),
        out_ahead(SPLITS ? split * decode.split_stride : 0),
        lse_ahead(SPLITS ? split * decode.split_lse_stride : 0) {}
  __device__ __forceinline__ Rows<Number> out_of(const DecodeTile& tile, int head) const {
    Rows<Number> rows = rows_of<Number>(out, tile.seq.batch_index, head);  // (seqlen_q, head_dim_v)
    rows.data += out_ahead;
    rows.vectors = rows.vectors && is_aligned(rows.data, 16);
    return rows;
  }
  // Nothing where the call does without.
  __device__ __forceinline__ void store_lse(const DecodeTile& tile, int row, Accumulator number) const {
    Rows<Accumulator> rows = rows_of<Accumulator>(lse, tile.seq.batch_index, tile.head_of(row));  // (seqlen_q)
    if (rows.data != nullptr) rows.data += lse_ahead;
    store_number(rows, tile.query(row), number);
  }
};

// A split without keys, of several: combine reads of it that its lse is -inf, and nothing else.
__device__ __forceinline__ void store_nothing(const DecodeParams& decode, const DecodeTile& tile, int split) {
  for (int row = thread_index(); row < BLOCK_M && tile.row0 + row < tile.row_end; row += NUM_THREADS) {
    DecodeResults(decode, split).store_lse(tile, row, -math::infinity<Accumulator>());
  }
}

// The result of the tile's rows over a split, from what all warps have put down: states and outputs(warp, row, col).
// By the whole block.
template <typename Outputs>
__device__ __forceinline__ void store_decoded(
    const DecodeParams& decode, const DecodeTile& tile, int split, const WarpStates& states, const Outputs& outputs) {
  constexpr int RUN = 16 / sizeof(Accumulator), GROUPS = HEAD_DIM_V / RUN;
  const DecodeResults results(decode, split);
  const Score score = score_of(decode.params);
  for (int i = thread_index(); i < BLOCK_M * GROUPS; i += NUM_THREADS) {
    const int row = i / GROUPS, col = i % GROUPS * RUN;
    if (tile.row0 + row >= tile.row_end) continue;
    const RowTotal total = total_of(decode, tile, split, states, row);
    const Accumulator share = (total.sum == 0 ? Accumulator(1) : 1 / total.sum) / Accumulator(P_FACTOR);
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
    store_columns(results.out_of(tile, tile.head_of(row)), tile.query(row), col, decode.params.head_dim_v, numbers);
    if (col == 0) results.store_lse(tile, row, total.lse());
  }
}

// Decoding by FMA on any GPU since sm_60, for every type.
//
// A thread block has a tile of (query, head) pairs and some splits of the keys (decode_tile.cuh). Its warps share Q and
// nothing else. BLOCK_N is 32: in the first product a lane has one key and all rows, in the second one all keys and
// every 32nd column.
//
//     one turn of a warp, block n:   acc_s = Q K(n)^T      lane j: its key from global memory, q broadcast
//                                    logits, hidden pairs, softmax over the lanes
//                                    p = acc_s             registers -> shared, for all lanes of the warp
//                                    acc_o += P V(n)       lane c: its columns of each key from global memory
//
//     shared memory:   q (BLOCK_M, HEAD_DIM)  |  p (NUM_WARPS, BLOCK_M, 32)  |  states  |
//                      acc_o of each warp (BLOCK_M, HEAD_DIM_V), at the end of a split
#include "basics.cuh"
#include "params_decode.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "seqlen.cuh"
#include "mask.cuh"
#include "score.cuh"

// Over a whole warp, which shares each row here.
__device__ __forceinline__ Accumulator row_sum_of(Accumulator x) {
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) x += shuffle_xor(x, lane);
  return x;
}
__device__ __forceinline__ Accumulator row_max_of(Accumulator x) {
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) x = math::max(x, shuffle_xor(x, lane));
  return x;
}
#include "softmax.cuh"

constexpr int NUM_THREADS = 32 * NUM_WARPS;
#include "decode_tile.cuh"

static_assert(BLOCK_N == 32, "a lane has one key of a block");
constexpr int COLS_V = ceil_div(HEAD_DIM_V, 32);  // columns of a lane
constexpr int RUN = 16 / sizeof(Accumulator), PART = 4 * RUN;  // columns of a key that are loaded before any is used
constexpr int PARTS_AHEAD = sizeof(Accumulator) == 4 ? 2 : 1;  // registers hold no more of float64
static_assert(HEAD_DIM % PART == 0, "q is padded with zeros to whole parts");

// A lane's part of (BLOCK_M, 32) scores: one column of every row.
struct LaneScores {
  static constexpr int ROWS = BLOCK_M, COLS = 1;
  Accumulator at[BLOCK_M];

  __device__ __forceinline__ Accumulator& operator()(int r, int) { return at[r]; }
  __device__ __forceinline__ Accumulator operator()(int r, int) const { return at[r]; }
};

struct Smem {
  Accumulator q[BLOCK_M][HEAD_DIM];
  Accumulator p[NUM_WARPS][BLOCK_M][32];
  WarpStates states;
  WarpOutputs<HEAD_DIM_V> out[NUM_WARPS];
};
constexpr int SMEM_BYTES = sizeof(Smem);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) decode_simt(const DecodeParams decode) {
  DYNAMIC_SHARED(Smem, smem);
  const Params& params = decode.params;
  const DecodeTile tile(decode);
  const Mask mask = mask_of(params, tile.seq);
  const Score score = score_of(params);
  const int warp = thread_index() / 32, lane = thread_index() % 32, keys_end = tile.seq.seqlen_k;
  const auto keys = keys_of<const Element>(decode, tile.batch, tile.head_k);
  const auto values = values_of<const Element>(decode, tile.batch, tile.head_k);

  for (int i = thread_index(); i < BLOCK_M * HEAD_DIM; i += NUM_THREADS) {
    const int row = i / HEAD_DIM, col = i % HEAD_DIM;
    Accumulator x = 0;
    if (tile.row0 + row < tile.row_end && col < params.head_dim) {
      const auto q = rows_of<const Element>(params.q, tile.seq.batch_index, tile.head_of(row));  // (seqlen_q, head_dim)
      x = to_accumulator(load_global<1>(q.at(tile.query(row), col)).at[0]);
    }
    smem.q[row][col] = x;
  }
  sync_block();  // Q is written, by all threads

#pragma unroll 1
  for (int split = tile.first_split; split < (SPLITS ? decode.num_splits : 1); split += decode.blocks_of_tile) {
    const BlockRange blocks = tile.blocks_of(decode, split);
    if (SPLITS && blocks.begin >= blocks.end && !has_sink(split)) {
      store_nothing(decode, tile, split);
      continue;
    }
    Accumulator acc_o[BLOCK_M][COLS_V] = {};  // columns lane, lane + 32, ...
    Softmax<BLOCK_M> softmax;
    softmax.clear();

#pragma unroll 1
    for (int n_block = blocks.begin + warp; n_block < blocks.end; n_block += NUM_WARPS) {
      const int key = n_block * BLOCK_N + lane, here = smaller(keys_end - n_block * BLOCK_N, BLOCK_N);
      LaneScores acc_s = {};
      // Lanes beyond the end read the last key, which counts for nobody.
      const Rows<const Element> k = keys.row(smaller(key, keys_end - 1));
#pragma unroll PARTS_AHEAD
      for (int col = 0; col < params.head_dim; col += PART) {
        Accumulator k_part[PART];
        load_columns(k, 0, col, params.head_dim, k_part);
#pragma unroll
        for (int run = 0; run < PART; run += RUN) {
#pragma unroll
          for (int r = 0; r < BLOCK_M; ++r) {
            const Vector<Accumulator, RUN> q_part = load_shared<RUN>(&smem.q[r][col + run]);
#pragma unroll
            for (int e = 0; e < RUN; ++e) acc_s.at[r] = math::fma(q_part.at[e], k_part[run + e], acc_s.at[r]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < BLOCK_M; ++r) {
        const int query = tile.query(r);
        const Features features(params, tile.seq, tile.head_of(r));
        const Accumulator logit = features.logit(score, score.scaled(acc_s.at[r]), Pair{query, key});
        acc_s.at[r] = mask.visible(query, key) ? logit : -math::infinity<Accumulator>();
        softmax.raise(acc_s, r, score);
        softmax.weigh(acc_s, r, score);
#pragma unroll
        for (int c = 0; c < COLS_V; ++c) acc_o[r][c] *= softmax.shrink[r];
        smem.p[warp][r][lane] = acc_s.at[r];
      }
      sync_warp();  // P is written
#pragma unroll 4
      for (int j = 0; j < here; ++j) {
        const Element* v = values.at(n_block * BLOCK_N + j);
#pragma unroll
        for (int c = 0; c < COLS_V; ++c) {
          const int col = lane + 32 * c;
          if (col >= params.head_dim_v) continue;
          const Accumulator number = to_accumulator(load_global<1>(v + col * values.col_stride).at[0]);
#pragma unroll
          for (int r = 0; r < BLOCK_M; ++r) {
            acc_o[r][c] = math::fma(load_shared<1>(&smem.p[warp][r][j]).at[0], number, acc_o[r][c]);
          }
        }
      }
      sync_warp();  // P is read: the next block's may be written
    }

#pragma unroll
    for (int r = 0; r < BLOCK_M; ++r) {
      const Accumulator sum = row_sum_of(softmax.row_sum[r]);
      if (lane == 0) {
        smem.states.row_max[warp][r] = softmax.row_max[r];
        smem.states.row_sum[warp][r] = sum;
      }
#pragma unroll
      for (int c = 0; c < COLS_V; ++c) {
        if (lane + 32 * c < HEAD_DIM_V) smem.out[warp].at[r][lane + 32 * c] = acc_o[r][c];
      }
    }
    sync_block();  // states and outputs of all warps are written
    store_decoded(decode, tile, split, smem.states, [&](int from, int row, int col) {
      return load_shared<1>(&smem.out[from].at[row][col]).at[0];
    });
    if constexpr (SPLITS) sync_block();  // states and outputs are read: the next split's may be written
  }
}

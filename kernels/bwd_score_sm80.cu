// Backward, arguments of a score function, on tensor cores since Ampere, for both families that have them: what the
// pairs add to one use of an element. As bwd_score_simt, but S and dP are there at the same time, in registers.
//
// A warp owns 16 * FRAGMENTS queries of a tile. One turn's loads wait for the turn before; two thread blocks on a
// multiprocessor fill each other's gaps.
//
//     shared memory:   q (BLOCK_M, HEAD_DIM)   k (BLOCK_N, HEAD_DIM)   dout (BLOCK_M, HEAD_DIM_V)
//                      v (BLOCK_N, HEAD_DIM_V), all read before, in their place, tile (BLOCK_M, BLOCK_N) is written
//                      lse and delta of the rows
#include "basics.cuh"
#include "terms.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "tile_sm80.cuh"
#include "softmax.cuh"
#include "term_turns.cuh"

constexpr int FRAGMENTS = BLOCK_M / (16 * NUM_WARPS);
static_assert(BLOCK_M == 16 * NUM_WARPS * FRAGMENTS && BLOCK_N % 16 == 0, "products are dealt out in steps of 16");
static_assert(BLOCK_M <= NUM_THREADS, "a thread for the numbers of each row");

struct Operands {
  SwizzledTile<BLOCK_M, HEAD_DIM> q;
  SwizzledTile<BLOCK_N, HEAD_DIM> k;
  SwizzledTile<BLOCK_M, HEAD_DIM_V> dout;
  SwizzledTile<BLOCK_N, HEAD_DIM_V> v;
};
union Place {
  Operands in;
  TermTile tile;
};
struct Smem {
  Place at;
  Accumulator exponents[BLOCK_M], delta[BLOCK_M];
};
constexpr int SMEM_BYTES = sizeof(Smem);

template <int ROWS, int COLS>
__device__ __forceinline__ void load_rows(
    SwizzledTile<ROWS, COLS>& tile, const Tensor& tensor, const Sequence& seq, int head, int first, int length,
    int width) {
  const auto rows = rows_of<const Element>(tensor, seq.batch_index, head);
  load_tile(tile, rows, bytes_at_a_time(rows), first, length, width);
}

// By the whole block: all that a turn reads. p of rows beyond the end is 0 by an lse of +inf.
__device__ __forceinline__ void load_turn(const Params& params, Smem& smem, const TermTurn& turn) {
  const Sequence& seq = turn.seq;
  const int m0 = turn.m_block * BLOCK_M, n0 = turn.n_block * BLOCK_N, row = m0 + thread_index();
  load_rows(smem.at.in.q, params.q, seq, turn.head, m0, seq.seqlen_q, params.head_dim);
  load_rows(smem.at.in.k, params.k, seq, turn.head_k, n0, seq.seqlen_k, params.head_dim);
  load_rows(smem.at.in.dout, params.dout, seq, turn.head, m0, seq.seqlen_q, params.head_dim_v);
  load_rows(smem.at.in.v, params.v, seq, turn.head_k, n0, seq.seqlen_k, params.head_dim_v);
  cp_async_commit();
  if (thread_index() >= BLOCK_M) return;
  Accumulator exponent = math::infinity<Accumulator>(), delta = 0;
  if (row < seq.seqlen_q) {
    exponent = load_number(rows_of<const Accumulator>(params.exponents, seq.batch_index, turn.head), row);
    delta = load_number(rows_of<const Accumulator>(params.delta, seq.batch_index, turn.head), row);
  }
  store_shared(&smem.exponents[thread_index()], Vector<Accumulator, 1>{{exponent}});
  store_shared(&smem.delta[thread_index()], Vector<Accumulator, 1>{{delta}});
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS) bwd_score_sm80(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const Score score = score_of(params);
  const int first_row = warp_uniform(thread_index() / 32) * 16 * FRAGMENTS;
  TermSums sums;
  TermTurn turn(params);
#pragma unroll 1
  for (; turn.exists; turn.advance(params)) {
    Fragment<BLOCK_N> acc_s[FRAGMENTS], acc_dp[FRAGMENTS];
    const Mask mask = mask_of(params, turn.seq);
    const Features features(params, turn.seq, turn.head);
    load_turn(params, smem, turn);
    clear(acc_s);
    clear(acc_dp);
    cp_async_wait<0>();
    sync_block();  // all tiles are written, by all threads, and the rows' numbers
    const Operands& in = smem.at.in;
    add_product<HEAD_DIM / 16>(
        acc_s, operand<Side::LEFT, Major::K>(in.q, first_row), operand<Side::RIGHT, Major::K>(in.k));
    add_product<HEAD_DIM_V / 16>(
        acc_dp, operand<Side::LEFT, Major::K>(in.dout, first_row), operand<Side::RIGHT, Major::K>(in.v));
    sync_block();  // they are read
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + 16 * f + acc_s[f].warp_row(r);
        const Accumulator lse = load_shared<1>(&smem.exponents[row]).at[0];
        const Accumulator delta = load_shared<1>(&smem.delta[row]).at[0];
#pragma unroll
        for (int c = 0; c < acc_s[f].COLS; ++c) {
          const int col = acc_s[f].first_col() + acc_s[f].ahead(c);
          const Pair pair = {turn.m_block * BLOCK_M + row, turn.n_block * BLOCK_N + col};
          const Accumulator x = term_of_pair(
              params, score, features, acc_s[f](r, c), acc_dp[f](r, c), lse, delta, features.sees(mask, pair), pair);
          store_shared(&smem.at.tile.at[row][col], Vector<Accumulator, 1>{{x}});
        }
      }
    }
    sync_block();  // the tile is whole, and the rows' numbers are read
    if constexpr (THIS.sum != Sum::ARRIVAL) sums.add(smem.at.tile);
    sync_block();  // the tile is read
  }
  if constexpr (THIS.sum != Sum::ARRIVAL) sums.store(params, turn, smem.at.tile);
}

// Backward, arguments of a score function: what the pairs add to one use of an element, by FMA on any GPU since sm_60.
//
// A thread block sums along a lane of tiles, in order; what it keeps goes to `partial`, from which bwd_score_args takes
// it (terms.cuh): no atomics, unless in order of arrival, and memory that grows with the sequence.
//
//     one turn:   acc = dO V^T           (BLOCK_M, BLOCK_N), registers -> tile, each thread's own
//                 acc = Q K^T            the logit, P and the slope by the element
//                 tile = P * slope * (dP - delta), of which each thread adds up what it keeps
//
//     shared memory:  tile (BLOCK_M, BLOCK_N) | Q (BLOCK_M, CHUNK) and K (BLOCK_N, CHUNK), or dO and V (.., CHUNK_V) |
//                     lse, delta (BLOCK_M)
#include "basics.cuh"
#include "terms.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "tile.cuh"
#include "mma_simt.cuh"
#include "softmax.cuh"
#include "term_turns.cuh"

struct Smem {
  TermTile tile;
  QueryTile queries;
  KeyTile keys;
  Accumulator lse[BLOCK_M], delta[BLOCK_M];
};
constexpr int SMEM_BYTES = sizeof(Smem);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_score_simt(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const Score score = score_of(params);
  using ScoreTile = Scores<BLOCK_M, BLOCK_N>;
  TermSums sums;
  TermTurn turn(params);
#pragma unroll 1
  for (; turn.exists; turn.advance(params)) {
    const Sequence& seq = turn.seq;
    const Mask mask = mask_of(params, seq);
    const Features features(params, seq, turn.head);
    const int m0 = turn.m_block * BLOCK_M, n0 = turn.n_block * BLOCK_N;
    ScoreTile acc;

    load_numbers(smem.lse, rows_of<const Accumulator>(params.lse, seq.batch_index, turn.head), m0, seq.seqlen_q, true,
                 math::infinity<Accumulator>());
    load_numbers(smem.delta, rows_of<const Accumulator>(params.delta, seq.batch_index, turn.head), m0, seq.seqlen_q);
    const auto dout = rows_of<const Element>(params.dout, seq.batch_index, turn.head);  // (seqlen_q, head_dim_v)
    const auto v = rows_of<const Element>(params.v, seq.batch_index, turn.head_k);      // (seqlen_k, head_dim_v)
    clear(acc);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
      load_tile(smem.queries.dout, dout, m0, seq.seqlen_q, chunk * CHUNK_V, params.head_dim_v);
      load_tile(smem.keys.v, v, n0, seq.seqlen_k, chunk * CHUNK_V, params.head_dim_v);
      wait_copies();
      sync_block();  // the chunk is there, and the rows' numbers; the tile of the turn before is read
      multiply_nt(acc, smem.queries.dout, smem.keys.v);
      sync_block();  // it is read
    }
#pragma unroll
    for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < acc.COLS; ++c) {
        store_shared(&smem.tile.at[acc.row(r)][acc.col(c)], Vector<Accumulator, 1>{{acc(r, c)}});
      }
    }

    const auto q = rows_of<const Element>(params.q, seq.batch_index, turn.head);    // (seqlen_q, head_dim)
    const auto k = rows_of<const Element>(params.k, seq.batch_index, turn.head_k);  // (seqlen_k, head_dim)
    clear(acc);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      load_tile(smem.queries.q, q, m0, seq.seqlen_q, chunk * CHUNK, params.head_dim);
      load_tile(smem.keys.k, k, n0, seq.seqlen_k, chunk * CHUNK, params.head_dim);
      wait_copies();
      sync_block();  // the chunk is there
      multiply_nt(acc, smem.queries.q, smem.keys.k);
      sync_block();  // it is read
    }
#pragma unroll
    for (int r = 0; r < acc.ROWS; ++r) {
      const Accumulator lse = lse_exponent(load_shared<1>(&smem.lse[acc.row(r)]).at[0]);
      const Accumulator delta = load_shared<1>(&smem.delta[acc.row(r)]).at[0];
#pragma unroll
      for (int c = 0; c < acc.COLS; ++c) {
        Accumulator* own = &smem.tile.at[acc.row(r)][acc.col(c)];
        const Pair pair = {m0 + ScoreTile::row(r), n0 + ScoreTile::col(c)};
        const Accumulator x = term_of_pair(
            params, score, features, acc(r, c), load_shared<1>(own).at[0], lse, delta, features.sees(mask, pair), pair);
        store_shared(own, Vector<Accumulator, 1>{{x}});
      }
    }
    sync_block();  // the tile is whole, and the rows' numbers are read
    if constexpr (THIS.sum != Sum::ARRIVAL) sums.add(smem.tile);
  }
  if constexpr (THIS.sum != Sum::ARRIVAL) sums.store(params, turn, smem.tile);
}

// Backward, bias: dbias, by FMA on any GPU since sm_60. ds itself is the gradient of a bias, times the slope of a score
// function; where the bias was broadcast it is a sum of them.
//
// A thread block owns a tile of dbias and adds up the ds of all that shares it, always in the same order, in registers;
// P is computed again from lse, as it was in the other kernels: no atomics, no workspace, the same bits every time.
//
//     a bias of queries and keys            the tile (BLOCK_M, BLOCK_N) of one head of one entry of dbias; turns: the
//                                           batch entries and, SUM_HEADS, the heads that share it
//     SUM_ROWS, one of keys alone           BLOCK_N keys of each head of each entry; turns: all query blocks
//     SUM_COLS, one of queries alone        BLOCK_M queries of each head of each entry; turns: all key blocks
//     both                                  each head of each entry; turns: all blocks
//
// The latter three leave sums over heads and entries to bwd_finish.
//
//     one turn:                  Q, K arrive, dO, V are sent for    global -> shared, as Accumulator
//                                acc = Q K^T                        (BLOCK_M, BLOCK_N), registers
//                                tile_p = P = exp2(acc - lse)       registers -> shared
//                                dO, V arrive, the next turn is sent for
//                                acc = dO V^T
//                                acc_ds += P * (acc - delta)        (BLOCK_M, BLOCK_N), registers
//
//     shared memory:  tile_p (BLOCK_M, BLOCK_N) | lse, delta of two turns (BLOCK_M) |
//                     two slots: Q (BLOCK_M, CHUNK) and K (BLOCK_N, CHUNK), or dO and V (.., CHUNK_V)
#include "basics.cuh"
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
#include "bias_turns.cuh"

constexpr int PORTIONS = CHUNKS + CHUNKS_V;

struct Smem {
  Tile<BLOCK_M, BLOCK_N> tile_p;
  QueryTile queries[2];
  KeyTile keys[2];
  Accumulator lse[2][BLOCK_M], delta[2][BLOCK_M];
};
constexpr int SMEM_BYTES = sizeof(Smem);

// What each row of threads has of the sums over rows, to tile_p: row thread_y(), by columns, where nobody else has
// read. By the whole block.
__device__ __forceinline__ void share_sums(Smem& smem, const Scores<BLOCK_M, BLOCK_N>& acc) {
  static_assert(THREADS_Y <= BLOCK_M, "a row of tile_p for each");
#pragma unroll
  for (int c = 0; c < acc.COLS; ++c) {
    Accumulator sum = 0;
#pragma unroll
    for (int r = 0; r < acc.ROWS; ++r) sum += acc(r, c);
    store_shared(&smem.tile_p.at[thread_y()][acc.col(c)], Vector<Accumulator, 1>{{sum}});
  }
  sync_block();  // they are written
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_bias_simt(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const Score score = score_of(params);
  using ScoreTile = Scores<BLOCK_M, BLOCK_N>;
  ScoreTile acc_ds;
  clear(acc_ds);
  BiasTurn turn(params);
  int slot = 0, rows_slot = 0;  // of the portion to come; of lse and delta of the turn to come

  const auto load = [&](const BiasTurn& of, int portion, int to, int rows_to) ALWAYS_INLINE {
    const Sequence& seq = of.seq;
    const int m0 = of.m_block * BLOCK_M, n0 = of.n_block * BLOCK_N;
    if (portion == 0) {
      const auto lse = rows_of<const Accumulator>(params.lse, seq.batch_index, of.head);      // (seqlen_q)
      const auto delta = rows_of<const Accumulator>(params.delta, seq.batch_index, of.head);  // (seqlen_q)
      load_numbers(smem.lse[rows_to], lse, m0, seq.seqlen_q, true, math::infinity<Accumulator>());
      load_numbers(smem.delta[rows_to], delta, m0, seq.seqlen_q);
    }
    if (portion < CHUNKS) {
      const auto q = rows_of<const Element>(params.q, seq.batch_index, of.head);  // (seqlen_q, head_dim)
      const auto k = rows_of<const Element>(params.k, seq.batch_index, of.head_k);   // (seqlen_k, head_dim)
      load_tile(smem.queries[to].q, q, m0, seq.seqlen_q, portion * CHUNK, params.head_dim);
      load_tile(smem.keys[to].k, k, n0, seq.seqlen_k, portion * CHUNK, params.head_dim);
    } else {
      const int col0 = (portion - CHUNKS) * CHUNK_V;
      const auto dout = rows_of<const Element>(params.dout, seq.batch_index, of.head);  // (seqlen_q, head_dim_v)
      const auto v = rows_of<const Element>(params.v, seq.batch_index, of.head_k);         // (seqlen_k, head_dim_v)
      load_tile(smem.queries[to].dout, dout, m0, seq.seqlen_q, col0, params.head_dim_v);
      load_tile(smem.keys[to].v, v, n0, seq.seqlen_k, col0, params.head_dim_v);
    }
  };
  // Waits for a portion, sends for the one after it, and says in which slot the portion lies.
  const auto arrive = [&](int portion) ALWAYS_INLINE {
    wait_copies();
    // The portion is written, by all threads; the portion before is read: refill its slot.
    sync_block();
    const int here = slot;
    slot ^= 1;
    if (portion + 1 < PORTIONS) {
      load(turn, portion + 1, slot, rows_slot);
    } else {
      BiasTurn next = turn;
      next.advance(params);
      if (next.exists(params)) load(next, 0, slot, rows_slot ^ 1);
    }
    return here;
  };

  if (turn.exists(params)) load(turn, 0, slot, rows_slot);
#pragma unroll 1
  for (; turn.exists(params); turn.advance(params), rows_slot ^= 1) {
    const Sequence& seq = turn.seq;
    const Mask mask = mask_of(params, seq);
    const Features features(params, seq, turn.head);
    const auto at = [&](int r, int c) {
      return Pair{turn.m_block * BLOCK_M + ScoreTile::row(r), turn.n_block * BLOCK_N + ScoreTile::col(c)};
    };
    const auto visible = [&](int r, int c) { return features.sees(mask, at(r, c)); };
    ScoreTile acc;
    clear(acc);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int here = arrive(chunk);
      multiply_nt(acc, smem.queries[here].q, smem.keys[here].k);
    }
#pragma unroll
    for (int r = 0; r < acc.ROWS; ++r) {
      const Accumulator lse = lse_exponent(load_shared<1>(&smem.lse[rows_slot][acc.row(r)]).at[0]);
#pragma unroll
      for (int c = 0; c < acc.COLS; ++c) {  // P waits there for its own thread, so that acc can be used again
        const Accumulator s = features.unscored(score, score.scaled(acc(r, c)), at(r, c));
        const Accumulator p = bias_weight_of(score, features, s, lse, visible(r, c), at(r, c));
        store_shared(&smem.tile_p.at[acc.row(r)][acc.col(c)], Vector<Accumulator, 1>{{p}});
      }
    }

    clear(acc);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
      const int here = arrive(CHUNKS + chunk);
      multiply_nt(acc, smem.queries[here].dout, smem.keys[here].v);
    }
    score_gradients(acc, features, visible, at,
                    [&](int r, int c) { return load_shared<1>(&smem.tile_p.at[acc.row(r)][acc.col(c)]).at[0]; },
                    [&](int r, int) { return load_shared<1>(&smem.delta[rows_slot][acc.row(r)]).at[0]; });
#pragma unroll
    for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < acc.COLS; ++c) acc_ds(r, c) += acc(r, c);
    }
  }

  const BiasTile& tile = turn.tile;
  const auto dbias = tile.rows(params);  // (seqlen_q or 1, seqlen_k or 1)
  if constexpr (SUM_ROWS) {
    if constexpr (SUM_COLS) {
      // All columns of a row, then all rows.
#pragma unroll
      for (int r = 0; r < acc_ds.ROWS; ++r) {
        Accumulator sum = 0;
#pragma unroll
        for (int c = 0; c < acc_ds.COLS; ++c) sum += acc_ds(r, c);
        clear_row(acc_ds, r);
        acc_ds(r, 0) = row_sum_of(sum);
      }
    }
    share_sums(smem, acc_ds);
    const int columns = SUM_COLS ? 1 : BLOCK_N;
    for (int col = thread_index(); col < columns; col += NUM_THREADS) {
      const int n = tile.n_block * BLOCK_N + col;
      Accumulator sum = 0;
#pragma unroll 1
      for (int y = 0; y < THREADS_Y; ++y) sum += load_shared<1>(&smem.tile_p.at[y][col]).at[0];
      if (SUM_COLS || n < params.seqlen_k) store_gradient(dbias, 0, SUM_COLS ? 0 : n, sum);
    }
  } else {
#pragma unroll
    for (int r = 0; r < acc_ds.ROWS; ++r) {
      const int m = tile.m_block * BLOCK_M + acc_ds.row(r);
      Accumulator sum = 0;
#pragma unroll
      for (int c = 0; c < acc_ds.COLS; ++c) {
        const int n = tile.n_block * BLOCK_N + acc_ds.col(c);
        sum += acc_ds(r, c);
        if (!SUM_COLS && m < params.seqlen_q && n < params.seqlen_k) store_gradient(dbias, m, n, acc_ds(r, c));
      }
      if constexpr (SUM_COLS) {
        sum = row_sum_of(sum);
        if (thread_x() == 0 && m < params.seqlen_q) store_gradient(dbias, m, 0, sum);
      }
    }
  }
}

// Backward, queries: dq, by FMA on any GPU since sm_60.
//
// A thread block owns BLOCK_M queries of one head and walks the key blocks it can see, in order; P is computed again
// from lse, as it was in bwd_simt_dkdv. Seven products instead of five is the price of a backward that needs neither
// atomics nor workspace and gives the same bits every time.
//
//     one turn, key block n:     K(n) arrives, V(n) is sent for     global -> shared, as Accumulator
//                                acc = Q K(n)^T                     (BLOCK_M, BLOCK_N), registers
//                                tile_p = P = exp2(acc - lse)       registers -> shared
//                                V(n) arrives
//                                acc = dO V(n)^T                    (BLOCK_M, BLOCK_N), registers
//                                tile_p = dS = P * (acc - delta)    each thread over its own numbers
//                                K(n + 1) is sent for, into the place of V(n)
//                                acc_dq += dS K(n)                  (BLOCK_M, HEAD_DIM), registers
//
//     shared memory:  tile_p (BLOCK_M, BLOCK_N) | lse, delta (BLOCK_M) |
//                     two of Q (BLOCK_M, CHUNK) or dO (BLOCK_M, CHUNK_V) |
//                     two slots: K (BLOCK_N, CHUNK) or V (BLOCK_N, CHUNK_V)
//
// Heads up to DIM_CHUNK wide have one chunk, and Q and dO are loaded once and stay. Wider ones stream all four in
// chunks of columns. Either way a turn is a row of portions: CHUNKS of Q and K, CHUNKS_V of dO and V, and CHUNKS of K
// again, backwards, since the last one may still be there. Each goes to the slot that the one before does not occupy
// and is loaded while that one is worked on.
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "block_walk.cuh"
#include "score.cuh"
#include "tile.cuh"
#include "mma_simt.cuh"
#include "softmax.cuh"

constexpr bool RESIDENT = CHUNKS == 1 && CHUNKS_V == 1;
constexpr int PORTIONS = CHUNKS + CHUNKS_V + CHUNKS;

struct Smem {
  Tile<BLOCK_M, BLOCK_N> tile_p;
  QueryTile owned[2];  // resident: Q, then dO; else a chunk lies beside its chunk of K or V
  KeyTile slot[2];
  Accumulator lse[BLOCK_M], delta[BLOCK_M];
  int batch_index[4];
};
constexpr int SMEM_BYTES = sizeof(Smem);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_simt_dq(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const int num_blocks = ceil_div(params.seqlen_q, BLOCK_M);
  const Work work = scheduled_work(params, num_blocks, params.num_heads, Longest::LAST_BLOCK);
  const Sequence seq = sequence_of(params, work.batch);
  if (PACKED && work.block * BLOCK_M >= seq.seqlen_q) return;
  share_batch_index(smem.batch_index, seq);
  const Mask mask = mask_of(params, seq);
  const Score score = score_of(params);
  const Features features(params, seq, work.head);
  const int head_k = work.head / (params.num_heads / params.num_heads_k);
  const int m0 = work.block * BLOCK_M;

  Outputs<BLOCK_M, CHUNK> acc_dq[CHUNKS];  // (BLOCK_M, HEAD_DIM)
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) clear(acc_dq[chunk]);

  const BlockWalk walk = key_walk(params, seq, work.head, work.block);
  const BlockRange blocks = walk.within(mask.key_blocks(work.block * BLOCK_M, BLOCK_M));
  int slot = 0;  // of the portion to come
  const auto load_q = [&](int chunk, int to) ALWAYS_INLINE {
    const auto q = rows_of<const Element>(params.q, smem.batch_index, work.head);  // (seqlen_q, head_dim)
    load_tile(smem.owned[to].q, q, m0, seq.seqlen_q, chunk * CHUNK, params.head_dim);
  };
  const auto load_do = [&](int chunk, int to) ALWAYS_INLINE {
    const auto dout = rows_of<const Element>(params.dout, smem.batch_index, work.head);  // (seqlen_q, head_dim_v)
    load_tile(smem.owned[to].dout, dout, m0, seq.seqlen_q, chunk * CHUNK_V, params.head_dim_v);
  };
  const auto load_k = [&](int n0, int chunk, int to) ALWAYS_INLINE {
    const auto k = rows_of<const Element>(params.k, smem.batch_index, head_k);  // (seqlen_k, head_dim)
    load_tile(smem.slot[to].k, k, n0, seq.seqlen_k, chunk * CHUNK, params.head_dim);
  };
  const auto load = [&](int n_block, int portion, int to) ALWAYS_INLINE {
    const int n0 = n_block * BLOCK_N;
    if (portion < CHUNKS) {
      if (!RESIDENT) load_q(portion, to);
      load_k(n0, portion, to);
    } else if (portion < CHUNKS + CHUNKS_V) {
      const int chunk = portion - CHUNKS;
      if (!RESIDENT) load_do(chunk, to);
      const auto v = rows_of<const Element>(params.v, smem.batch_index, head_k);  // (seqlen_k, head_dim_v)
      load_tile(smem.slot[to].v, v, n0, seq.seqlen_k, chunk * CHUNK_V, params.head_dim_v);
    } else {
      const int chunk = PORTIONS - 1 - portion;
      const bool still_there = CHUNKS_V == 1 && chunk == CHUNKS - 1;  // in the slot that it had for the scores
      if (!still_there) load_k(n0, chunk, to);
    }
  };
  // Waits for a portion, sends for the one after it, and says in which slot the portion lies.
  const auto arrive = [&](int n_block, int portion) ALWAYS_INLINE {
    wait_copies();
    // The portion is written, by all threads, and so is tile_p; the portion before is read: refill its slot.
    sync_block();
    const int here = slot;
    slot ^= 1;
    if (portion + 1 < PORTIONS) {
      load(n_block, portion + 1, slot);
    } else if (n_block + 1 < blocks.end) {
      load(walk.up(n_block + 1, blocks.end), 0, slot);
    }
    return here;
  };

  const auto step = [&](int n_block, bool masked) ALWAYS_INLINE {
    Scores<BLOCK_M, BLOCK_N> acc;
    clear(acc);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int here = arrive(n_block, chunk);
      multiply_nt(acc, smem.owned[RESIDENT ? 0 : here].q, smem.slot[here].k);
    }
    const auto at = [&](int r, int c) { return Pair{m0 + acc.row(r), n_block * BLOCK_N + acc.col(c)}; };
    const auto visible = [&](int r, int c) { return !masked || features.sees(mask, at(r, c)); };
    // P, with nothing dropped, waits in tile_p for its own thread, so that acc can be used again.
    const auto keep = [&](int r, int c, Accumulator p) {
      store_shared(&smem.tile_p.at[acc.row(r)][acc.col(c)], Vector<Accumulator, 1>{{p}});
    };
    probabilities(acc, score, features, visible, at, [&](int r, int) { return smem.lse[acc.row(r)]; }, keep);

    clear(acc);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
      const int here = arrive(n_block, CHUNKS + chunk);
      multiply_nt(acc, smem.owned[RESIDENT ? 1 : here].dout, smem.slot[here].v);
    }
    score_gradients(acc, features, visible, at, [&](int r, int c) { return smem.tile_p.at[acc.row(r)][acc.col(c)]; },
                    [&](int r, int) { return smem.delta[acc.row(r)]; });
    store_scores(smem.tile_p, acc);

#pragma unroll 1
    for (int chunk = CHUNKS - 1; chunk >= 0; --chunk) {
      const int here = arrive(n_block, PORTIONS - 1 - chunk);
      multiply_nn(acc_dq, chunk, smem.tile_p, smem.slot[here].k);
    }
  };

  if (blocks.begin < blocks.end) {
    const auto lse = rows_of<const Accumulator>(params.lse, smem.batch_index, work.head);      // (seqlen_q)
    const auto delta = rows_of<const Accumulator>(params.delta, smem.batch_index, work.head);  // (seqlen_q)
    load_numbers(smem.lse, lse, m0, seq.seqlen_q, NO_ROW_BEYOND, math::infinity<Accumulator>());
    load_numbers(smem.delta, delta, m0, seq.seqlen_q);
    if (RESIDENT) {
      load_q(0, 0);
      load_do(0, 1);
    }
    load(blocks.begin, 0, slot);
  }
  walk_up(walk, blocks, step);

  // Where the block stands, once more: kept through the loop it would hold registers.
  const Work here = scheduled_work(params, num_blocks, params.num_heads, Longest::LAST_BLOCK);
  const Sequence entry = sequence_of(params, here.batch);
  const auto dq = rows_of<Gradient>(params.dq, entry.batch_index, here.head);  // (seqlen_q, head_dim)
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int row0 = here.block * BLOCK_M;
    multiply(acc_dq[chunk], score_of(params).gradient);
    if constexpr (LENS) clear_rows_beyond(acc_dq[chunk], entry.seqlen_q - row0);
    store_outputs(dq, row0, rows_to_write(params, entry), chunk * CHUNK, params.head_dim, acc_dq[chunk]);
  }
}

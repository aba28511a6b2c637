// Backward, queries: dq, by FMA on any GPU since sm_60.
//
// A thread block owns BLOCK_M queries of one head and walks the key blocks it can see, in order; P is computed again
// from lse, as it was in bwd_simt_dkdv. Seven products instead of five is the price of a backward that needs neither
// atomics nor workspace and gives the same bits every time.
//
//     one turn, key block n:     load K(n), V(n)              global -> shared, as Accumulator
//                                acc = Q K(n)^T               (BLOCK_M, BLOCK_N), registers
//                                tile_p = P = exp2(acc - lse)           registers -> shared
//                                acc = dO V(n)^T              (BLOCK_M, BLOCK_N), registers
//                                tile_p = dS = P * (acc - delta)        each thread over its own numbers
//                                acc_dq += dS K(n)            (BLOCK_M, HEAD_DIM), registers
//
//     shared memory:  tile_q (BLOCK_M, CHUNK) | tile_do (BLOCK_M, CHUNK_V) | tile_k (BLOCK_N, CHUNK) |
//                     tile_v (BLOCK_N, CHUNK_V) | tile_p (BLOCK_M, BLOCK_N) | lse_log2, delta (BLOCK_M)
//
// Heads up to DIM_CHUNK wide have one chunk: Q and dO are loaded once and stay. Wider ones stream all four in chunks
// of columns; the product with K walks them backwards and so begins with the chunk that the scores ended with.
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

struct Smem {
  Tile<BLOCK_M, CHUNK> tile_q;
  Tile<BLOCK_M, CHUNK_V> tile_do;
  Tile<BLOCK_N, CHUNK> tile_k;
  Tile<BLOCK_N, CHUNK_V> tile_v;
  Tile<BLOCK_M, BLOCK_N> tile_p;
  Accumulator lse_log2[BLOCK_M], delta[BLOCK_M];
};
constexpr int SMEM_BYTES = sizeof(Smem);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_simt_dq(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const Work work =
      scheduled_work(params, ceil_div(params.seqlen_q, BLOCK_M), params.num_heads, Longest::LAST_BLOCK);
  const Sequence seq = sequence_of(params, work.batch);
  const Mask mask = mask_of(seq);
  const Score score = score_of(params);
  const int head_k = work.head / (params.num_heads / params.num_heads_k);
  const auto q = rows_of<const Element>(params.q, seq, work.head);        // (seqlen_q, head_dim)
  const auto dout = rows_of<const Element>(params.dout, seq, work.head);  // (seqlen_q, head_dim_v)
  const auto k = rows_of<const Element>(params.k, seq, head_k);           // (seqlen_k, head_dim)
  const auto v = rows_of<const Element>(params.v, seq, head_k);           // (seqlen_k, head_dim_v)
  const int m0 = work.block * BLOCK_M;

  Outputs<BLOCK_M, CHUNK> acc_dq[CHUNKS];  // (BLOCK_M, HEAD_DIM)
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) clear(acc_dq[chunk]);

  const auto load_q = [&](int chunk) {
    load_tile(smem.tile_q, q, m0, seq.seqlen_q, chunk * CHUNK, params.head_dim);
  };
  const auto load_do = [&](int chunk) {
    load_tile(smem.tile_do, dout, m0, seq.seqlen_q, chunk * CHUNK_V, params.head_dim_v);
  };
  const auto load_k = [&](int n_block, int chunk) {
    load_tile(smem.tile_k, k, n_block * BLOCK_N, seq.seqlen_k, chunk * CHUNK, params.head_dim);
  };
  const auto load_v = [&](int n_block, int chunk) {
    load_tile(smem.tile_v, v, n_block * BLOCK_N, seq.seqlen_k, chunk * CHUNK_V, params.head_dim_v);
  };

  const auto step = [&](int n_block, bool masked) {
    Scores<BLOCK_M, BLOCK_N> acc;
    clear(acc);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      if (CHUNKS > 1) load_q(chunk);
      load_k(n_block, chunk);
      if (chunk == CHUNKS - 1) {
        if (CHUNKS_V > 1) load_do(0);
        load_v(n_block, 0);
      }
      sync_block();  // the tiles are written, by all threads: any may read them
      multiply_nt(acc, smem.tile_q, smem.tile_k);
      if (chunk < CHUNKS - 1) sync_block();  // this chunk of Q and K is read: the next may take its place
    }

    const auto visible = [&](int r, int c) {
      return !masked || mask.visible(m0 + acc.row(r), n_block * BLOCK_N + acc.col(c));
    };
    probabilities(acc, score, visible, [&](int r, int) { return smem.lse_log2[acc.row(r)]; });
    store_scores(smem.tile_p, acc);  // P waits there for its own thread, so that acc can be used again

    clear(acc);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
      if (chunk > 0) {
        sync_block();  // the chunk of dO and V before is read
        load_do(chunk);
        load_v(n_block, chunk);
        sync_block();  // this one is written
      }
      multiply_nt(acc, smem.tile_do, smem.tile_v);
    }
    score_gradients(acc, visible, [&](int r, int c) { return smem.tile_p.at[acc.row(r)][acc.col(c)]; },
                    [&](int r, int) { return smem.delta[acc.row(r)]; });
    store_scores(smem.tile_p, acc);
    sync_warp();  // dS is written: its rows are read by this warp alone

#pragma unroll
    for (int chunk = CHUNKS - 1; chunk >= 0; --chunk) {
      if (chunk < CHUNKS - 1) {
        sync_block();  // the chunk of K after this one is read
        load_k(n_block, chunk);
        sync_block();  // this one is written
      }
      multiply_nn(acc_dq[chunk], smem.tile_p, smem.tile_k);
    }
    sync_block();  // K, V and dS are read: the next turn may overwrite them
  };

  load_row_statistics(smem.lse_log2, smem.delta, params, seq, work.head, m0);
  if (CHUNKS == 1) load_q(0);
  if (CHUNKS_V == 1) load_do(0);
  const BlockRange blocks = mask.key_blocks(work.block);
  for (int n_block = blocks.begin; n_block < blocks.full_begin; ++n_block) step(n_block, MASKED);
  for (int n_block = blocks.full_begin; n_block < blocks.full_end; ++n_block) step(n_block, UNMASKED);
  for (int n_block = blocks.full_end; n_block < blocks.end; ++n_block) step(n_block, MASKED);

  const auto dq = rows_of<Gradient>(params.dq, seq, work.head);  // (seqlen_q, head_dim)
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    multiply(acc_dq[chunk], score.gradient);
    store_outputs(dq, m0, seq.seqlen_q, chunk * CHUNK, params.head_dim, acc_dq[chunk]);
  }
}

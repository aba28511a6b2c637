// Forward: out = softmax(scale * q k^T) v and lse, by FMA on any GPU since sm_60.
//
// A thread block owns BLOCK_M queries of one head and walks the key blocks it can see. Everything that belongs to a
// query row stays with the 8 lanes that own the row (mma_simt.cuh): row_max, row_sum, acc_o, and P, which passes
// through shared memory only to change hands inside a warp.
//
//     one turn, key block n:     load K(n), V(n)              global -> shared, as Accumulator
//                                acc_s = Q K(n)^T             (BLOCK_M, BLOCK_N), registers
//                                softmax.step                 acc_s becomes P; row_max, row_sum, acc_o move on
//                                tile_p = acc_s               registers -> shared
//                                acc_o += P V(n)              (BLOCK_M, HEAD_DIM_V), registers
//
//     shared memory:  tile_q (BLOCK_M, CHUNK) | tile_k (BLOCK_N, CHUNK) | tile_v (BLOCK_N, CHUNK_V) |
//                     tile_p (BLOCK_M, BLOCK_N)
//
// Heads up to DIM_CHUNK wide have one chunk: Q is loaded once and stays. Wider ones stream: Q and K come in chunks of
// columns that add up to acc_s, as in a blocked matrix product, and V in chunks that each complete their part of acc_o.
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
  Tile<BLOCK_N, CHUNK> tile_k;
  Tile<BLOCK_N, CHUNK_V> tile_v;
  Tile<BLOCK_M, BLOCK_N> tile_p;
};
constexpr int SMEM_BYTES = sizeof(Smem);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) fwd_simt(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const Work work =
      scheduled_work(params, ceil_div(params.seqlen_q, BLOCK_M), params.num_heads, Longest::LAST_BLOCK);
  const Sequence seq = sequence_of(params, work.batch);
  const Mask mask = mask_of(seq);
  const Score score = score_of(params);
  const int head_k = work.head / (params.num_heads / params.num_heads_k);
  const auto q = rows_of<const Element>(params.q, seq, work.head);   // (seqlen_q, head_dim)
  const auto k = rows_of<const Element>(params.k, seq, head_k);      // (seqlen_k, head_dim)
  const auto v = rows_of<const Element>(params.v, seq, head_k);      // (seqlen_k, head_dim_v)
  const int m0 = work.block * BLOCK_M;

  using ScoreTile = Scores<BLOCK_M, BLOCK_N>;
  Outputs<BLOCK_M, CHUNK_V> acc_o[CHUNKS_V];  // (BLOCK_M, HEAD_DIM_V)
  Softmax<ScoreTile::ROWS> softmax;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS_V; ++chunk) clear(acc_o[chunk]);
  softmax.clear();

  const auto load_q = [&](int chunk) {
    load_tile(smem.tile_q, q, m0, seq.seqlen_q, chunk * CHUNK, params.head_dim);
  };
  const auto load_k = [&](int n_block, int chunk) {
    load_tile(smem.tile_k, k, n_block * BLOCK_N, seq.seqlen_k, chunk * CHUNK, params.head_dim);
  };
  const auto load_v = [&](int n_block, int chunk) {
    load_tile(smem.tile_v, v, n_block * BLOCK_N, seq.seqlen_k, chunk * CHUNK_V, params.head_dim_v);
  };

  const auto step = [&](int n_block, bool masked) {
    ScoreTile acc_s;
    clear(acc_s);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      if (CHUNKS > 1) load_q(chunk);
      load_k(n_block, chunk);
      if (chunk == CHUNKS - 1) load_v(n_block, 0);
      sync_block();  // the tiles are written, by all threads: any may read them
      multiply_nt(acc_s, smem.tile_q, smem.tile_k);
      if (chunk < CHUNKS - 1) sync_block();  // this chunk of Q and K is read: the next may take its place
    }

    softmax.step(acc_s, acc_o, score, [&](int r, int c) {
      return !masked || mask.visible(m0 + acc_s.row(r), n_block * BLOCK_N + acc_s.col(c));
    });
    store_scores(smem.tile_p, acc_s);
    sync_warp();  // P is written: its rows are read by this warp alone

#pragma unroll
    for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
      if (chunk > 0) {
        load_v(n_block, chunk);
        sync_block();  // the chunk of V is written
      }
      multiply_nn(acc_o[chunk], smem.tile_p, smem.tile_v);
      sync_block();  // K, V and P are read: the next chunk or turn may overwrite them
    }
  };

  if (CHUNKS == 1) load_q(0);
  const BlockRange blocks = mask.key_blocks(work.block);
  for (int n_block = blocks.begin; n_block < blocks.full_begin; ++n_block) step(n_block, MASKED);
  for (int n_block = blocks.full_begin; n_block < blocks.full_end; ++n_block) step(n_block, UNMASKED);
  for (int n_block = blocks.full_end; n_block < blocks.end; ++n_block) step(n_block, MASKED);

  const auto out = rows_of<Output>(params.out, seq, work.head);       // (seqlen_q, head_dim_v)
  const auto lse = rows_of<Accumulator>(params.lse, seq, work.head);  // (seqlen_q)
  softmax.finish(acc_o);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
    store_outputs(out, m0, seq.seqlen_q, chunk * CHUNK_V, params.head_dim_v, acc_o[chunk]);
  }
#pragma unroll
  for (int r = 0; r < ScoreTile::ROWS; ++r) {
    const int row = ScoreTile::row(r);
    if (thread_x() == 0 && row < seq.seqlen_q - m0) store_number(lse, m0 + row, softmax.lse(r));
  }
}

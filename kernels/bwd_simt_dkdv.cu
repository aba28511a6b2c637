// Backward, keys: dk and dv, by FMA on any GPU since sm_60.
//
// A thread block owns BLOCK_N keys of one kv head. It walks the query heads that read this kv head, and of each the
// query blocks that see its keys, always in this order, and adds up dk and dv in registers: no atomics, no workspace,
// the same bits every time. Scores are transposed, so that a key row belongs to 8 lanes (mma_simt.cuh).
//
//     one turn, query block m:    load Q(m), dO(m), lse(m), delta(m)        global -> shared
//                                 acc = K Q(m)^T                            (BLOCK_N, BLOCK_M), registers
//                                 tile_p = P^T = exp2(acc - lse)            registers -> shared
//                                 acc_dv += P^T dO(m)                       (BLOCK_N, HEAD_DIM_V), registers
//                                 acc = V dO(m)^T                           (BLOCK_N, BLOCK_M), registers
//                                 tile_p = dS^T = P^T * (acc - delta)       each thread over its own numbers
//                                 acc_dk += dS^T Q(m)                       (BLOCK_N, HEAD_DIM), registers
//
//     shared memory:  tile_k (BLOCK_N, CHUNK) | tile_v (BLOCK_N, CHUNK_V) | tile_q (BLOCK_M, CHUNK) |
//                     tile_do (BLOCK_M, CHUNK_V) | tile_p (BLOCK_N, BLOCK_M) | lse_log2, delta (BLOCK_M)
//
// Heads up to DIM_CHUNK wide have one chunk: K and V are loaded once and stay. Wider ones stream all four in chunks of
// columns; the product with Q walks them backwards and so begins with the chunk that the scores ended with.
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
  Tile<BLOCK_N, CHUNK> tile_k;
  Tile<BLOCK_N, CHUNK_V> tile_v;
  Tile<BLOCK_M, CHUNK> tile_q;
  Tile<BLOCK_M, CHUNK_V> tile_do;
  Tile<BLOCK_N, BLOCK_M> tile_p;
  Accumulator lse_log2[BLOCK_M], delta[BLOCK_M];
};
constexpr int SMEM_BYTES = sizeof(Smem);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_simt_dkdv(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const Work work =
      scheduled_work(params, ceil_div(params.seqlen_k, BLOCK_N), params.num_heads_k, Longest::FIRST_BLOCK);
  const Sequence seq = sequence_of(params, work.batch);
  const Mask mask = mask_of(seq);
  const Score score = score_of(params);
  const bool want_dk = params.dk.data != nullptr, want_dv = params.dv.data != nullptr;
  const auto k = rows_of<const Element>(params.k, seq, work.head);  // (seqlen_k, head_dim)
  const auto v = rows_of<const Element>(params.v, seq, work.head);  // (seqlen_k, head_dim_v)
  const int n0 = work.block * BLOCK_N;

  Outputs<BLOCK_N, CHUNK> acc_dk[CHUNKS];      // (BLOCK_N, HEAD_DIM)
  Outputs<BLOCK_N, CHUNK_V> acc_dv[CHUNKS_V];  // (BLOCK_N, HEAD_DIM_V)
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) clear(acc_dk[chunk]);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS_V; ++chunk) clear(acc_dv[chunk]);

  const auto load_k = [&](int chunk) {
    load_tile(smem.tile_k, k, n0, seq.seqlen_k, chunk * CHUNK, params.head_dim);
  };
  const auto load_v = [&](int chunk) {
    load_tile(smem.tile_v, v, n0, seq.seqlen_k, chunk * CHUNK_V, params.head_dim_v);
  };

  const auto step = [&](int head, int m_block, bool masked) {
    const int m0 = m_block * BLOCK_M;
    const auto load_q = [&](int chunk) {
      const auto q = rows_of<const Element>(params.q, seq, head);  // (seqlen_q, head_dim)
      load_tile(smem.tile_q, q, m0, seq.seqlen_q, chunk * CHUNK, params.head_dim);
    };
    const auto load_do = [&](int chunk) {
      const auto dout = rows_of<const Element>(params.dout, seq, head);  // (seqlen_q, head_dim_v)
      load_tile(smem.tile_do, dout, m0, seq.seqlen_q, chunk * CHUNK_V, params.head_dim_v);
    };

    load_row_statistics(smem.lse_log2, smem.delta, params, seq, head, m0);
    Scores<BLOCK_N, BLOCK_M> acc;
    clear(acc);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      load_q(chunk);
      if (CHUNKS > 1) load_k(chunk);
      if (chunk == CHUNKS - 1) {
        load_do(0);
        if (CHUNKS_V > 1) load_v(0);
      }
      sync_block();  // the tiles are written, by all threads: any may read them
      multiply_nt(acc, smem.tile_k, smem.tile_q);
      if (chunk < CHUNKS - 1) sync_block();  // this chunk of Q and K is read: the next may take its place
    }

    const auto visible = [&](int r, int c) { return !masked || mask.visible(m0 + acc.col(c), n0 + acc.row(r)); };
    probabilities(acc, score, visible, [&](int, int c) { return smem.lse_log2[acc.col(c)]; });
    store_scores(smem.tile_p, acc);
    sync_warp();  // P^T is written: its rows are read by this warp alone

#pragma unroll
    for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
      if (chunk > 0) {
        sync_block();  // the chunk of dO and V before is read
        load_do(chunk);
        load_v(chunk);
        sync_block();  // this one is written
      }
      if (want_dv) multiply_nn(acc_dv[chunk], smem.tile_p, smem.tile_do);
      if (chunk == 0) clear(acc);  // here and not before: registers are scarce during the product above
      if (want_dk) multiply_nt(acc, smem.tile_v, smem.tile_do);
    }
    if (want_dk) {
      sync_warp();  // P^T is read by all lanes: its owners may overwrite it
      score_gradients(acc, visible, [&](int r, int c) { return smem.tile_p.at[acc.row(r)][acc.col(c)]; },
                      [&](int, int c) { return smem.delta[acc.col(c)]; });
      store_scores(smem.tile_p, acc);
      sync_warp();  // dS^T is written
#pragma unroll
      for (int chunk = CHUNKS - 1; chunk >= 0; --chunk) {
        if (chunk < CHUNKS - 1) {
          sync_block();  // the chunk of Q after this one is read
          load_q(chunk);
          sync_block();  // this one is written
        }
        multiply_nn(acc_dk[chunk], smem.tile_p, smem.tile_q);
      }
    }
    sync_block();  // everything of this query block is read: the next may take its place
  };

  if (CHUNKS == 1) load_k(0);
  if (CHUNKS_V == 1) load_v(0);
  const BlockRange blocks = mask.query_blocks(work.block);
  const int group = params.num_heads / params.num_heads_k;
  for (int head = work.head * group; head < (work.head + 1) * group; ++head) {
    for (int m_block = blocks.begin; m_block < blocks.full_begin; ++m_block) step(head, m_block, MASKED);
    for (int m_block = blocks.full_begin; m_block < blocks.full_end; ++m_block) step(head, m_block, UNMASKED);
    for (int m_block = blocks.full_end; m_block < blocks.end; ++m_block) step(head, m_block, MASKED);
  }

  if (want_dk) {
    const auto dk = rows_of<Gradient>(params.dk, seq, work.head);  // (seqlen_k, head_dim)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      multiply(acc_dk[chunk], score.gradient);
      store_outputs(dk, n0, seq.seqlen_k, chunk * CHUNK, params.head_dim, acc_dk[chunk]);
    }
  }
  if (want_dv) {
    const auto dv = rows_of<Gradient>(params.dv, seq, work.head);  // (seqlen_k, head_dim_v)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
      store_outputs(dv, n0, seq.seqlen_k, chunk * CHUNK_V, params.head_dim_v, acc_dv[chunk]);
    }
  }
}

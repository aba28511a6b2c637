// Forward: out = softmax(scale * q k^T) v and lse, by FMA on any GPU since sm_60.
//
// A thread block owns BLOCK_M queries of one head and walks the key blocks it can see. Everything that belongs to a
// query row stays with the 8 lanes that own the row (mma_simt.cuh): row_max, row_sum, acc_o, and P, which passes
// through shared memory only to change hands inside a warp.
//
//     one turn, key block n:     K(n) arrives, V(n) is sent for     global -> shared, as Accumulator
//                                acc_s = Q K(n)^T                   (BLOCK_M, BLOCK_N), registers
//                                to_logits, hide, softmax, drop     acc_s becomes P; row_max, row_sum, acc_o move on
//                                tile_p = acc_s                     registers -> shared
//                                V(n) arrives, K(n + 1) is sent for
//                                acc_o += P V(n)                    (BLOCK_M, HEAD_DIM_V), registers
//
//     shared memory:  tile_q (BLOCK_M, CHUNK) | tile_p (BLOCK_M, BLOCK_N) |
//                     two slots: K (BLOCK_N, CHUNK) or V (BLOCK_N, CHUNK_V)
//
// Heads up to DIM_CHUNK wide have one chunk, and Q is loaded once and stays. Wider ones stream: Q and K come in chunks
// of columns that add up to acc_s, as in a blocked matrix product, and V in chunks that each complete their part of
// acc_o. Either way a turn is a row of portions, CHUNKS of Q and K, then CHUNKS_V of V; each goes to the slot that the
// one before does not occupy and is loaded while that one is worked on.
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

constexpr int PORTIONS = CHUNKS + CHUNKS_V;

struct Smem {
  Tile<BLOCK_M, CHUNK> tile_q[CHUNKS > 1 ? 2 : 1];  // a chunk lies beside its chunk of K
  Tile<BLOCK_M, BLOCK_N> tile_p;
  KeyTile slot[2];
  int batch_index[4];
};
constexpr int SMEM_BYTES = sizeof(Smem);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) fwd_simt(const Params params) {
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

  using ScoreTile = Scores<BLOCK_M, BLOCK_N>;
  Outputs<BLOCK_M, CHUNK_V> acc_o[CHUNKS_V];  // (BLOCK_M, HEAD_DIM_V)
  Softmax<ScoreTile::ROWS> softmax;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS_V; ++chunk) clear(acc_o[chunk]);
  softmax.clear();

  const BlockWalk walk = key_walk(params, seq, work.head, work.block);
  const BlockRange blocks = walk.within(mask.key_blocks(m0, BLOCK_M));
  int slot = 0;  // of the portion to come
  const auto load_q = [&](int chunk, int to) ALWAYS_INLINE {
    const auto q = rows_of<const Element>(params.q, smem.batch_index, work.head);  // (seqlen_q, head_dim)
    load_tile(smem.tile_q[to], q, m0, seq.seqlen_q, chunk * CHUNK, params.head_dim);
  };
  const auto load = [&](int n_block, int portion, int to) ALWAYS_INLINE {
    const int n0 = n_block * BLOCK_N;
    if (portion < CHUNKS) {
      if (CHUNKS > 1) load_q(portion, to);
      const auto k = rows_of<const Element>(params.k, smem.batch_index, head_k);  // (seqlen_k, head_dim)
      load_tile(smem.slot[to].k, k, n0, seq.seqlen_k, portion * CHUNK, params.head_dim);
    } else {
      const auto v = rows_of<const Element>(params.v, smem.batch_index, head_k);  // (seqlen_k, head_dim_v)
      load_tile(smem.slot[to].v, v, n0, seq.seqlen_k, (portion - CHUNKS) * CHUNK_V, params.head_dim_v);
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
    ScoreTile acc_s;
    clear(acc_s);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int here = arrive(n_block, chunk);
      multiply_nt(acc_s, smem.tile_q[CHUNKS > 1 ? here : 0], smem.slot[here].k);
    }

    const auto at = [&](int r, int c) { return Pair{m0 + acc_s.row(r), n_block * BLOCK_N + acc_s.col(c)}; };
    to_logits(acc_s, score, features, at);
    if (masked) {
      hide(acc_s, [&](int r, int c) {
        return features.sees(mask, at(r, c));
      });
    }
#pragma unroll
    for (int r = 0; r < ScoreTile::ROWS; ++r) {
      softmax.raise(acc_s, r, score);
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS_V; ++chunk) multiply_row(acc_o[chunk], r, softmax.shrink[r]);
      softmax.weigh(acc_s, r, score);
    }
    drop(acc_s, [&](int r, int c) { return features.keeps(at(r, c)); });
    store_scores(smem.tile_p, acc_s);

#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
      const int here = arrive(n_block, CHUNKS + chunk);
      multiply_nn(acc_o, chunk, smem.tile_p, smem.slot[here].v);
    }
  };

  if (blocks.begin < blocks.end) {
    if (CHUNKS == 1) load_q(0, 0);
    load(blocks.begin, 0, slot);
  }
  walk_up(walk, blocks, step);

  // Where the block stands, once more: kept through the loop it would hold registers.
  const Work here = scheduled_work(params, num_blocks, params.num_heads, Longest::LAST_BLOCK);
  const Sequence entry = sequence_of(params, here.batch);
  finish(params, entry, here.head, softmax, acc_o);
  const int row0 = here.block * BLOCK_M;
  const auto out = rows_of<Output>(params.out, entry.batch_index, here.head);       // (seqlen_q, head_dim_v)
  const auto lse = rows_of<Accumulator>(params.lse, entry.batch_index, here.head);  // (seqlen_q)
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
    if constexpr (LENS) clear_rows_beyond(acc_o[chunk], entry.seqlen_q - row0);
    store_outputs(out, row0, rows_to_write(params, entry), chunk * CHUNK_V, params.head_dim_v, acc_o[chunk]);
  }
#pragma unroll
  for (int r = 0; r < ScoreTile::ROWS; ++r) {
    const int row = ScoreTile::row(r);
    if (thread_x() == 0 && row < rows_to_write(params, entry) - row0) {
      store_number(lse, row0 + row, lse_of(softmax, r, score_of(params), !LENS || row0 + row < entry.seqlen_q));
    }
  }
}

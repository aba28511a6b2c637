// Backward, keys: dk and dv, by FMA on any GPU since sm_60.
//
// A thread block owns BLOCK_N keys of one kv head. It walks the query heads that read this kv head, and of each the
// query blocks that see its keys, always in this order, and adds up dk and dv in registers: no atomics, no workspace,
// the same bits every time. Scores are transposed, so that a key row belongs to 8 lanes (mma_simt.cuh).
//
//     one turn, query block m:    Q(m), lse(m), delta(m) arrive, dO(m) is sent for     global -> shared
//                                 acc = K Q(m)^T                            (BLOCK_N, BLOCK_M), registers
//                                 tile_p = P^T = exp2(acc - lse)            registers -> shared
//                                 dO(m) arrives
//                                 acc_dv += P^T dO(m)                       (BLOCK_N, HEAD_DIM_V), registers
//                                 acc = V dO(m)^T                           (BLOCK_N, BLOCK_M), registers
//                                 tile_p = dS^T = P^T * (acc - delta)       each thread over its own numbers
//                                 Q(m + 1) is sent for, into the place of dO(m)
//                                 acc_dk += dS^T Q(m)                       (BLOCK_N, HEAD_DIM), registers
//
//     shared memory:  tile_p (BLOCK_N, BLOCK_M) | lse, delta (BLOCK_M) |
//                     two of K (BLOCK_N, CHUNK) or V (BLOCK_N, CHUNK_V) |
//                     two slots: Q (BLOCK_M, CHUNK) or dO (BLOCK_M, CHUNK_V)
//
// Heads up to DIM_CHUNK wide have one chunk, and K and V are loaded once and stay. Wider ones stream all four in chunks
// of columns. Either way a turn is a row of portions: CHUNKS of K and Q, CHUNKS_V of V and dO, and for dk CHUNKS of Q
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

// What dS is a multiple of, where that is not the P that dv is made of. A base, since that takes no room when empty.
template <bool ON>
struct ApartOf {
  __device__ __forceinline__ void keep(int, int, Accumulator) {}
  __device__ __forceinline__ const Tile<BLOCK_N, BLOCK_M>& or_else(const Tile<BLOCK_N, BLOCK_M>& p) { return p; }
};
template <>
struct ApartOf<true> {
  Tile<BLOCK_N, BLOCK_M> weights;

  __device__ __forceinline__ void keep(int row, int col, Accumulator weight) {
    store_shared(&weights.at[row][col], Vector<Accumulator, 1>{{weight}});
  }
  __device__ __forceinline__ const Tile<BLOCK_N, BLOCK_M>& or_else(const Tile<BLOCK_N, BLOCK_M>&) { return weights; }
};
struct Smem : ApartOf<WEIGHTS_APART> {
  Tile<BLOCK_N, BLOCK_M> tile_p;
  KeyTile owned[2];  // resident: K, then V; else a chunk lies beside its chunk of Q or dO
  QueryTile slot[2];
  Accumulator lse[BLOCK_M], delta[BLOCK_M];
  int batch_index[4];
};
constexpr int SMEM_BYTES = sizeof(Smem);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_simt_dkdv(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const int num_blocks = ceil_div(params.seqlen_k, BLOCK_N);
  const Work work = scheduled_work(params, num_blocks, params.num_heads_k, Longest::FIRST_BLOCK);
  const Sequence seq = sequence_of(params, work.batch);
  if (PACKED && work.block * BLOCK_N >= seq.seqlen_k) return;
  share_batch_index(smem.batch_index, seq);
  const Mask mask = mask_of(params, seq);
  const Score score = score_of(params);
  const bool want_dk = params.dk.data != nullptr, want_dv = params.dv.data != nullptr;
  const int n0 = work.block * BLOCK_N;

  Outputs<BLOCK_N, CHUNK> acc_dk[CHUNKS];      // (BLOCK_N, HEAD_DIM)
  Outputs<BLOCK_N, CHUNK_V> acc_dv[CHUNKS_V];  // (BLOCK_N, HEAD_DIM_V)
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) clear(acc_dk[chunk]);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS_V; ++chunk) clear(acc_dv[chunk]);

  const BlockRange all_blocks = mask.query_blocks(work.block);
  const int group = params.num_heads / params.num_heads_k;
  const int first_head = work.head * group, end_head = first_head + group;
  const auto walk_of = [&](int head) ALWAYS_INLINE { return query_walk(params, seq, head, work.block); };
  const auto blocks_of = [&](int head) ALWAYS_INLINE { return walk_of(head).within(all_blocks); };
  // The first head from `head` on that sees the keys, or end_head.
  const auto head_from = [&](int head) ALWAYS_INLINE {
    if constexpr (HIDES_PAIRS) {
      while (head < end_head && walk_of(head).up(all_blocks.begin, all_blocks.end) == all_blocks.end) ++head;
    }
    return head;
  };
  const int portions = CHUNKS + CHUNKS_V + (want_dk ? CHUNKS : 0);
  int slot = 0;  // of the portion to come
  const auto load_k = [&](int chunk, int to) ALWAYS_INLINE {
    const auto k = rows_of<const Element>(params.k, smem.batch_index, work.head);  // (seqlen_k, head_dim)
    load_tile(smem.owned[to].k, k, n0, seq.seqlen_k, chunk * CHUNK, params.head_dim);
  };
  const auto load_v = [&](int chunk, int to) ALWAYS_INLINE {
    const auto v = rows_of<const Element>(params.v, smem.batch_index, work.head);  // (seqlen_k, head_dim_v)
    load_tile(smem.owned[to].v, v, n0, seq.seqlen_k, chunk * CHUNK_V, params.head_dim_v);
  };
  const auto load_q = [&](int head, int m0, int chunk, int to) ALWAYS_INLINE {
    const auto q = rows_of<const Element>(params.q, smem.batch_index, head);  // (seqlen_q, head_dim)
    load_tile(smem.slot[to].q, q, m0, seq.seqlen_q, chunk * CHUNK, params.head_dim);
  };
  // Rows beyond the end are zeros everywhere: they add p * 0 to dv and p * (0 - 0) * 0 to dk.
  const auto load = [&](int head, int m_block, int portion, int to) ALWAYS_INLINE {
    const int m0 = m_block * BLOCK_M;
    if (portion == 0) {
      const auto lse = rows_of<const Accumulator>(params.lse, smem.batch_index, head);      // (seqlen_q)
      const auto delta = rows_of<const Accumulator>(params.delta, smem.batch_index, head);  // (seqlen_q)
      load_numbers(smem.lse, lse, m0, seq.seqlen_q, NO_ROW_BEYOND, math::infinity<Accumulator>());
      load_numbers(smem.delta, delta, m0, seq.seqlen_q);
    }
    if (portion < CHUNKS) {
      if (!RESIDENT) load_k(portion, to);
      load_q(head, m0, portion, to);
    } else if (portion < CHUNKS + CHUNKS_V) {
      const int chunk = portion - CHUNKS;
      if (!RESIDENT) load_v(chunk, to);
      const auto dout = rows_of<const Element>(params.dout, smem.batch_index, head);  // (seqlen_q, head_dim_v)
      load_tile(smem.slot[to].dout, dout, m0, seq.seqlen_q, chunk * CHUNK_V, params.head_dim_v);
    } else {
      const int chunk = 2 * CHUNKS + CHUNKS_V - 1 - portion;
      const bool still_there = CHUNKS_V == 1 && chunk == CHUNKS - 1;  // in the slot that it had for the scores
      if (!still_there) load_q(head, m0, chunk, to);
    }
  };
  // HIDES_PAIRS: the turn after this one is of the next block that sees the keys, maybe in another head.
  const auto load_next_turn = [&](int head, int m_block) ALWAYS_INLINE {
    m_block = walk_of(head).up(m_block + 1, all_blocks.end);
    if (m_block == all_blocks.end) {
      head = head_from(head + 1);
      if (head == end_head) return;
      m_block = blocks_of(head).begin;
    }
    load(head, m_block, 0, slot);
  };
  // Waits for a portion, sends for the one after it, and says in which slot the portion lies.
  const auto arrive = [&](int head, int m_block, int portion) ALWAYS_INLINE {
    wait_copies();
    // The portion is written, by all threads, and so is tile_p; the portion before is read: refill its slot.
    sync_block();
    const int here = slot;
    slot ^= 1;
    const bool same_head = !HIDES_PAIRS && m_block + 1 < all_blocks.end;
    if (portion + 1 < portions) {
      load(head, m_block, portion + 1, slot);
    } else if (HIDES_PAIRS) {
      load_next_turn(head, m_block);
    } else if (same_head || head + 1 < end_head) {
      load(same_head ? head : head + 1, same_head ? m_block + 1 : all_blocks.begin, 0, slot);
    }
    return here;
  };

  const auto step = [&](int head, int m_block, bool masked) ALWAYS_INLINE {
    Scores<BLOCK_N, BLOCK_M> acc;
    clear(acc);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int here = arrive(head, m_block, chunk);
      multiply_nt(acc, smem.owned[RESIDENT ? 0 : here].k, smem.slot[here].q);
    }
    const Features features(params, seq, head);
    const auto at = [&](int r, int c) { return Pair{m_block * BLOCK_M + acc.col(c), n0 + acc.row(r)}; };
    const auto visible = [&](int r, int c) { return !masked || features.sees(mask, at(r, c)); };
    const auto keep = [&](int r, int c, Accumulator p) { smem.keep(acc.row(r), acc.col(c), p); };
    probabilities(acc, score, features, visible, at, [&](int, int c) { return smem.lse[acc.col(c)]; }, keep);
    store_scores(smem.tile_p, acc);

#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
      const int here = arrive(head, m_block, CHUNKS + chunk);
      if (want_dv) multiply_nn(acc_dv, chunk, smem.tile_p, smem.slot[here].dout);
      if (chunk == 0) clear(acc);  // here and not before: registers are scarce during the product above
      if (want_dk) multiply_nt(acc, smem.owned[RESIDENT ? 1 : here].v, smem.slot[here].dout);
    }
    if (!want_dk) return;

    sync_warp();  // P^T is read by all lanes of the warp that owns its rows: they may overwrite it
    const auto& weights = smem.or_else(smem.tile_p);  // of which each thread reads its own numbers
    score_gradients(acc, features, visible, at, [&](int r, int c) { return weights.at[acc.row(r)][acc.col(c)]; },
                    [&](int, int c) { return smem.delta[acc.col(c)]; });
    store_scores(smem.tile_p, acc);
#pragma unroll 1
    for (int chunk = CHUNKS - 1; chunk >= 0; --chunk) {
      const int here = arrive(head, m_block, 2 * CHUNKS + CHUNKS_V - 1 - chunk);
      multiply_nn(acc_dk, chunk, smem.tile_p, smem.slot[here].q);
    }
  };

  const int first = head_from(first_head);
  if (all_blocks.begin < all_blocks.end && (!HIDES_PAIRS || first < end_head)) {
    if (RESIDENT) {
      load_k(0, 0);
      load_v(0, 1);
    }
    load(first, blocks_of(first).begin, 0, slot);
  }
  for (int head = first_head; head < end_head; ++head) {
    walk_up(walk_of(head), blocks_of(head), [&](int m_block, bool masked) ALWAYS_INLINE {
      step(head, m_block, masked);
    });
  }

  // Where the block stands, once more: kept through the loop it would hold registers.
  const Work here = scheduled_work(params, num_blocks, params.num_heads_k, Longest::FIRST_BLOCK);
  const Sequence entry = sequence_of(params, here.batch);
  const int row0 = here.block * BLOCK_N;
  if (want_dk) {
    const auto dk = rows_of<Gradient>(params.dk, entry.batch_index, here.head);  // (seqlen_k, head_dim)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      multiply(acc_dk[chunk], score_of(params).gradient);
      if constexpr (LENS) clear_rows_beyond(acc_dk[chunk], entry.seqlen_k - row0);
      store_outputs(dk, row0, keys_to_write(params, entry), chunk * CHUNK, params.head_dim, acc_dk[chunk]);
    }
  }
  if (want_dv) {
    const auto dv = rows_of<Gradient>(params.dv, entry.batch_index, here.head);  // (seqlen_k, head_dim_v)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS_V; ++chunk) {
      if constexpr (DROPOUT) multiply(acc_dv[chunk], static_cast<Accumulator>(params.undropped));
      if constexpr (LENS) clear_rows_beyond(acc_dv[chunk], entry.seqlen_k - row0);
      store_outputs(dv, row0, keys_to_write(params, entry), chunk * CHUNK_V, params.head_dim_v, acc_dv[chunk]);
    }
  }
}

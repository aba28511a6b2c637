// Forward in float64 or float32 on tensor cores since Ampere: out = softmax(scale * q k^T) v and lse; tiles come by
// cp.async, products by mma.sync, of float32 in three bfloat16 parts (parts.cuh).
//
// A thread block owns BLOCK_M queries of one head. SHARERS warps own the same 16 of them, each its own part of the
// columns of O; one, unless the head is too wide for its registers: they compute S and P each for itself. S, P and O
// never leave the registers, and the warps have nothing to tell one another.
//
//     one turn, key block n:     K(n) arrives; later tiles are sent for       global -> shared
//                                acc_s = Q K(n)^T                             (16, BLOCK_N) of a warp
//                                to_logits, hide, softmax, drop               acc_s becomes P; acc_o shrinks if it must
//                                V(n) arrives
//                                acc_o += P V(n)                              (16, COLS_V) of a warp
//
//     shared memory:   q (BLOCK_M, HEAD_DIM)  |  NUM_STAGES slots: K (BLOCK_N, HEAD_DIM) or V (BLOCK_N, HEAD_DIM_V)  |
//                      powers of 2 in float64
//     order of tiles:  K(0) V(0) K(1) V(1) ...
//
// The slots are a ring. PAIRED, of four or more: when all warps have met over K and V of a block, those before are
// read, and their slots are filled with tiles of a later block: one barrier a turn, between which some warps may be at
// their products while others are at their softmax. Else one barrier a tile, which gives the slot of the tile before.
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "block_walk.cuh"
#include "score.cuh"
#include "tile_wide.cuh"
#include "exp2_table.cuh"
#include "softmax_wide.cuh"

constexpr int SHARERS = 16 * NUM_WARPS / BLOCK_M, COLS_V = HEAD_DIM_V / SHARERS;
static_assert(BLOCK_M * SHARERS == 16 * NUM_WARPS && COLS_V * SHARERS == HEAD_DIM_V, "rows and columns are dealt out");
static_assert(BLOCK_N % 16 == 0 && COLS_V % PANEL == 0, "products are dealt out in steps of 16 and panels");
constexpr int STEPS = HEAD_DIM / 16, UNROLL = HEAD_DIM > 128 ? 1 : STEPS;  // of the scores' sums
constexpr bool PAIRED = NUM_STAGES >= 4 && NUM_STAGES % 2 == 0;
constexpr int AHEAD = PAIRED ? NUM_STAGES - 2 : NUM_STAGES - 1;  // tiles from the one at hand to the one sent for
constexpr int POWER_COPIES = HEAD_DIM > 96 || HEAD_DIM_V > 96 ? 4 : 16;  // 16 keep half a warp free of conflicts
static_assert(NUM_STAGES >= 2, "one tile is worked on while the next arrives");

union Slot {
  SwizzledTile<BLOCK_N, HEAD_DIM> k;
  SwizzledTile<BLOCK_N, HEAD_DIM_V> v;
};
struct Smem {
  SwizzledTile<BLOCK_M, HEAD_DIM> q;
  Slot slot[NUM_STAGES];
  Exp2Table<POWER_COPIES> powers;
  Rows<const Element> k, v;  // of the head; kept in registers they would push accumulators out of them
};
constexpr int SMEM_BYTES = sizeof(Smem);

// This warp's first row of the tile, and its first column of O.
__device__ __forceinline__ int warp_row() { return thread_index_again() / 32 / SHARERS * 16; }
__device__ __forceinline__ int warp_col() { return thread_index_again() / 32 % SHARERS * COLS_V; }

__device__ __forceinline__ void store_results(
    const Params& params, const Sequence& seq, int head, int row0, const Outputs<COLS_V>& acc_o,
    const Softmax<2>& softmax) {
  auto out = rows_of<Output>(params.out, seq.batch_index, head);             // (seqlen_q, head_dim_v)
  const auto lse = rows_of<Accumulator>(params.lse, seq.batch_index, head);  // (seqlen_q)
  const int col0 = warp_col(), row_end = rows_to_write(params, seq);
  out.data = out.at(0, col0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + acc_o.row(r);
    if (row >= row_end) continue;
    store_row(out, row, params.head_dim_v - col0, acc_o, r);
    if (col0 == 0 && lane_index() % 4 == 0) {
      store_number(lse, row, lse_of(softmax, r, score_of(params), !LENS || row < seq.seqlen_q));
    }
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS) fwd_wide(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const int num_blocks = ceil_div(params.seqlen_q, BLOCK_M);
  const Work work = scheduled_work(params, num_blocks, params.num_heads, Longest::LAST_BLOCK);
  const Sequence seq = sequence_of(params, work.batch);
  if (PACKED && work.block * BLOCK_M >= seq.seqlen_q) return;
  const Mask mask = mask_of(params, seq);
  const Score score = score_of(params);
  const Features features(params, seq, work.head);
  const int m0 = work.block * BLOCK_M;
  const BlockWalk walk = key_walk(params, seq, work.head, work.block);
  const BlockRange blocks = walk.within(mask.key_blocks(m0, BLOCK_M));
  if (thread_index() == 0) {
    const int head_k = work.head / (params.num_heads / params.num_heads_k);
    smem.k = rows_of<const Element>(params.k, seq.batch_index, head_k);  // (seqlen_k, head_dim)
    smem.v = rows_of<const Element>(params.v, seq.batch_index, head_k);  // (seqlen_k, head_dim_v)
  }
  smem.powers.fill(NUM_THREADS);
  sync_block();  // they are written
  const Exp2<POWER_COPIES> exp2(smem.powers);

  Scores<BLOCK_N> acc[1];
  Scores<BLOCK_N>& acc_s = acc[0];
  Outputs<COLS_V> acc_o[1];
  WideSoftmax<2> softmax;
  clear(acc_o[0]);
  softmax.clear();

  constexpr bool K = true, V = false;
  int slot = 0;                // of the tile at hand
  int coming = blocks.begin;  // whose tile is sent for next
  // Sends for a tile, or for nothing: either way a group of copies, so that waits can count.
  const auto send_for = [&](bool is_k, int to) ALWAYS_INLINE {
    if (coming < blocks.end) {
      const int n0 = coming * BLOCK_N;
      if (is_k) load_tile(smem.slot[to].k, smem.k, n0, seq.seqlen_k, params.head_dim);
      if (!is_k) load_tile(smem.slot[to].v, smem.v, n0, seq.seqlen_k, params.head_dim_v);
    }
    cp_async_commit();
    if (!is_k) coming = walk.up(coming + 1, blocks.end);
  };
  const auto arrive = [&]() ALWAYS_INLINE {
    cp_async_wait<PAIRED ? AHEAD - 2 : AHEAD - 1>();
    sync_block();  // what is due is written, by all threads; what was before is read: refill its slots
  };
  const auto behind = [&](int tiles) ALWAYS_INLINE { return slot < tiles ? slot + NUM_STAGES - tiles : slot - tiles; };
  const auto leave = [&]() ALWAYS_INLINE { slot = slot == NUM_STAGES - 1 ? 0 : slot + 1; };

  const auto step = [&](int n_block, bool masked) ALWAYS_INLINE {
    arrive();
    clear(acc_s);
    const auto q = along_rows(smem.q, warp_row());
    add_scores<STEPS, UNROLL>(acc, q, along_rows(smem.slot[slot].k), [&](int part) ALWAYS_INLINE {
      if (PAIRED && part == 0) send_for(K, behind(2));
      if (PAIRED && part == STEPS / 2) send_for(V, behind(1));
      if (!PAIRED && part == 0) send_for(AHEAD % 2 == 1 ? V : K, behind(1));
    });
    leave();

    const int row0 = m0 + warp_row(), col0 = n_block * BLOCK_N + acc_s.first_col();
    const auto at = [&](int r, int c) { return Pair{row0 + acc_s.row(r), col0 + acc_s.ahead(c)}; };
    to_logits(acc_s, score, features, at);
    if (masked) {
      const MaskRow row[2] = {mask.row(row0 + acc_s.row(0), col0), mask.row(row0 + acc_s.row(1), col0)};
      hide(acc_s, [&](int r, int c) {
        const bool visible = row[r].visible(acc_s.ahead(c));
        return HIDES_PAIRS ? visible && features.sees(mask, at(r, c)) : visible;
      });
    }
    if (softmax.to_exponents(acc_s, score)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) multiply_row(acc_o[0], r, softmax.shrink[r]);
    }
    softmax.weigh(acc_s, exp2);
    drop(acc_s, [&](int r, int c) { return features.keeps(at(r, c)); });

    if constexpr (!PAIRED) arrive();
    const auto v = across_rows(smem.slot[slot].v, warp_col());
    add_outputs<BLOCK_N / 16>(acc_o, acc, v, [&](int part) ALWAYS_INLINE {
      if (part == 0 && !PAIRED) send_for(AHEAD % 2 == 1 ? K : V, behind(1));
    });
    leave();
  };

  if (blocks.begin < blocks.end) {
    const auto q = rows_of<const Element>(params.q, seq.batch_index, work.head);  // (seqlen_q, head_dim)
    load_tile(smem.q, q, m0, seq.seqlen_q, params.head_dim);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) send_for(i % 2 == 0 ? K : V, i);
  }
  walk_up(walk, blocks, step);

  // Where the block stands, once more: kept through the loop it would hold registers.
  const Work here = scheduled_work(params, num_blocks, params.num_heads, Longest::LAST_BLOCK);
  const Sequence entry = sequence_of(params, here.batch);
  finish(params, entry, here.head, softmax, acc_o);
  const int row0 = here.block * BLOCK_M + warp_row();
  if constexpr (LENS) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row0 + acc_o[0].row(r) >= entry.seqlen_q) clear_row(acc_o[0], r);
    }
  }
  store_results(params, entry, here.head, row0, acc_o[0], softmax);
}

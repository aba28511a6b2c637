// Forward on tensor cores since Ampere: out = softmax(scale * q k^T) v and lse; tiles come by cp.async, products by
// mma.sync.
//
// A thread block owns BLOCK_M queries of one head, or, PACK_HEADS, as many (query, head) pairs of the heads that share
// a kv head. Each warp owns FRAGMENTS times 16 of them and all that belongs to them: S, P and O never leave its
// registers, and the warps have nothing to tell one another. Key blocks are taken from the last to the first: those
// that the diagonal cuts come first, what follows is a straight loop.
//
//     one after the other         S(n) = Q K(n)^T;  maxima, O shrunk, first steps of P(n) = exp2(S(n) - max)
//                                 O += P(n) V(n)          between its parts: the other steps of P(n)
//                                 the warps of the MIN_BLOCKS thread blocks on a multiprocessor fill each other's gaps
//     OVERLAP, one turn:          S(n) = Q K(n)^T         between its parts: P(n + 1) = exp2(S(n + 1) - max)
//                                 O shrunk
//                                 O += P(n + 1) V(n + 1)  between its parts: the new maxima of S(n)
//
//     shared memory:   q (BLOCK_M, HEAD_DIM)  |  NUM_STAGES slots: K (BLOCK_N, HEAD_DIM) or V (BLOCK_N, HEAD_DIM_V)
//     order of tiles:  K(0) V(0) K(1) V(1) ...,  OVERLAP: K(0) -- K(1) V(0) K(2) V(1) ..., counted from the last block
//
// SPLIT_P: P is the sum of two 16-bit numbers, and P V takes both. They take the registers of the scores.
//
// The slots are a ring: when all warps have met over a tile, its predecessor is read, and its slot is filled with the
// tile that is NUM_STAGES - 1 further on. One barrier a tile; what is sent for has NUM_STAGES - 2 whole tiles' time to
// come.
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "block_walk.cuh"
#include "score.cuh"
#include "tile_sm80.cuh"
#include "softmax.cuh"
#include "fragment_pairs.cuh"

constexpr int FRAGMENTS = BLOCK_M / (16 * NUM_WARPS);  // of 16 rows, a warp
static_assert(BLOCK_M == 16 * NUM_WARPS * FRAGMENTS && BLOCK_N % 16 == 0, "products are dealt out in steps of 16");
static_assert(NUM_STAGES >= 2, "one tile is worked on while the next arrives");

constexpr int STEPS = HEAD_DIM / 16, STEPS_V = BLOCK_N / 16;  // of the products' sums
constexpr int HELD = Q_HELD > 0 ? Q_HELD : 1;                 // an array has a length
static_assert(Q_HELD <= STEPS, "Q has no more steps to hold");

union Slot {
  SwizzledTile<BLOCK_N, HEAD_DIM> k;
  SwizzledTile<BLOCK_N, HEAD_DIM_V> v;
};
struct Smem {
  SwizzledTile<BLOCK_M, HEAD_DIM> q;
  Slot slot[NUM_STAGES];
  const Element *k, *v;  // of the head; kept in registers they would push accumulators out of them
  int k_bytes, v_bytes;  // at a time
};
constexpr int SMEM_BYTES = sizeof(Smem);

// The rows of this thread block. Row p is query p of one head or, PACK_HEADS, query p / heads of one of several.
struct QueryTile {
  Sequence seq;
  int head, head_k;  // the first of its heads, and theirs of k and v
  int heads;         // of the rows
  int row0, row_end;

  __device__ __forceinline__ explicit QueryTile(const Params& params) {
    const int group = params.num_heads / params.num_heads_k;
    heads = PACK_HEADS ? group : 1;
    const int num_blocks = ceil_div(params.seqlen_q * heads, BLOCK_M);
    const Work work =
        scheduled_work(params, num_blocks, PACK_HEADS ? params.num_heads_k : params.num_heads, Longest::LAST_BLOCK);
    seq = sequence_of(params, work.batch);
    head = work.head * heads;
    head_k = PACK_HEADS ? work.head : work.head / group;
    row0 = work.block * BLOCK_M;
    row_end = seq.seqlen_q * heads;
    static_assert(!PACK_HEADS || !(CHANGES_LOGITS || HIDES_PAIRS || SINKS || DROPOUT), "these are of one head");
  }
  __device__ __forceinline__ int query(int row) const { return PACK_HEADS ? row / heads : row; }
  __device__ __forceinline__ int head_of(int row) const { return PACK_HEADS ? head + row % heads : head; }

  __device__ __forceinline__ BlockRange key_blocks(const Mask& mask) const {
    const int first = query(row0), last = query(row0 + BLOCK_M - 1);
    return mask.key_blocks(first, last - first + 1);
  }
};

__device__ __forceinline__ void load_q(const Params& params, Smem& smem, const QueryTile& tile) {
  const auto rows = rows_of<const Element>(params.q, tile.seq.batch_index, tile.head);  // (seqlen_q, head_dim)
  if constexpr (PACK_HEADS) {
    const PackedRows<const Element> packed = {rows, params.q.head_stride, tile.heads};
    load_tile(smem.q, packed, bytes_at_a_time(packed), tile.row0, tile.row_end, params.head_dim);
  } else {
    load_tile(smem.q, rows, bytes_at_a_time(rows), tile.row0, tile.row_end, params.head_dim);
  }
}

// How far tiles of K, or of V, have been sent for, where the walk has gaps.
struct Ahead {
  int next;

  __device__ __forceinline__ explicit Ahead(const BlockRange& blocks) : next(blocks.end - 1) {}
  __device__ __forceinline__ int take(const BlockWalk& walk, const BlockRange& blocks) {
    const int n_block = next;
    next = walk.down(n_block - 1, blocks.begin);
    return n_block;
  }
};

// First row of a warp's fragment in the tile.
__device__ __forceinline__ int fragment_row(int fragment) {
  return (thread_index_again() / 32u * FRAGMENTS + fragment) * 16;
}

// acc = Q K^T, and acc += P V. between(part) is other work, see add_product().
template <typename Between>
__device__ __forceinline__ void score_tile(
    Fragment<BLOCK_N> (&acc)[FRAGMENTS], const Smem& smem, int slot, const unsigned (&q_held)[FRAGMENTS][HELD][4],
    const Between& between) {
  clear(acc);
  const auto q = operand<Side::LEFT, Major::K>(smem.q, fragment_row(0));
  const auto k = operand<Side::RIGHT, Major::K>(smem.slot[slot].k);
  if constexpr (Q_HELD > 0) {
    add_product<STEPS>(acc, HeldOperand<FRAGMENTS, HELD, decltype(q)>{q_held, q}, k, between);
  } else {
    add_product<STEPS>(acc, q, k, between);
  }
}
template <typename Between>
__device__ __forceinline__ void accumulate_pv(
    Fragment<HEAD_DIM_V> (&acc)[FRAGMENTS], const Smem& smem, int slot, const unsigned (&p)[FRAGMENTS][STEPS_V][4],
    const unsigned (&p_low)[FRAGMENTS][STEPS_V][4], const Between& between) {
  const auto left = with_low_part<FRAGMENTS>(in_registers(p), in_registers(p_low));
  add_product<STEPS_V>(acc, left, operand<Side::RIGHT, Major::MN>(smem.slot[slot].v), between);
}

__device__ __forceinline__ void store_results(
    const Params& params, const QueryTile& tile, Fragment<HEAD_DIM_V> (&acc_o)[FRAGMENTS],
    const Softmax<2> (&softmax)[FRAGMENTS]) {
  // Packed rows go in 16 bytes where those of every head can: lanes of several rows take part in an exchange.
  const bool vectors = !PACK_HEADS || params.out.head_stride * sizeof(Output) % 16 == 0;
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile.row0 + fragment_row(f) + acc_o[f].warp_row(r);
      const int query = tile.query(row), head = tile.head_of(row);
      auto out = rows_of<Output>(params.out, tile.seq.batch_index, head);                     // (seqlen_q, head_dim_v)
      const auto lse = rows_of<Accumulator>(params.lse, tile.seq.batch_index, head);          // (seqlen_q)
      out.vectors = rows_of<Output>(params.out, tile.seq.batch_index, tile.head).vectors && vectors;
      if (LENS && query >= tile.seq.seqlen_q) clear_row(acc_o[f], r);
      store_row(out, query, rows_to_write(params, tile.seq), params.head_dim_v, acc_o[f], r);
      if (lane_index() % 4 == 0 && query < rows_to_write(params, tile.seq)) {
        store_number(lse, query, lse_of(softmax[f], r, score_of(params), !LENS || query < tile.seq.seqlen_q));
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS) fwd_sm80(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const QueryTile tile(params);
  if (PACKED && tile.row0 >= tile.row_end) return;
  const Mask mask = mask_of(params, tile.seq);
  const Score score = score_of(params);
  const Features features(params, tile.seq, tile.head);
  const int keys_end = LENS ? tile.seq.seqlen_k : params.seqlen_k;
  const BlockWalk walk = key_walk(params, tile.seq, tile.head, tile.row0 / BLOCK_M);
  const BlockRange blocks = walk.within(tile.key_blocks(mask));
  if (thread_index() == 0) {
    const auto k = rows_of<const Element>(params.k, tile.seq.batch_index, tile.head_k);  // (seqlen_k, head_dim)
    const auto v = rows_of<const Element>(params.v, tile.seq.batch_index, tile.head_k);  // (seqlen_k, head_dim_v)
    smem.k = k.data;
    smem.v = v.data;
    smem.k_bytes = bytes_at_a_time(k);
    smem.v_bytes = bytes_at_a_time(v);
  }
  sync_block();  // they are written

  Fragment<BLOCK_N> acc_s[FRAGMENTS];           // (16 FRAGMENTS, BLOCK_N) of this warp: products, logits, P
  Fragment<HEAD_DIM_V> acc_o[FRAGMENTS];        // (16 FRAGMENTS, HEAD_DIM_V)
  unsigned p[FRAGMENTS][STEPS_V][4];            // P, rounded
  unsigned p_low[FRAGMENTS][STEPS_V][4];        // SPLIT_P: its second part
  unsigned q_held[FRAGMENTS][HELD][4];
  Softmax<2> softmax[FRAGMENTS];
  int slot = 0;  // of the tile at hand

  // HIDES_PAIRS: K and V are each sent for in the order of the walk.
  Ahead ahead_k(blocks), ahead_v(blocks);
  // Sends for a tile, or for nothing: either way a group of copies, so that waits can count.
  const auto load_k = [&](int n_block, int to) ALWAYS_INLINE {
    if constexpr (HIDES_PAIRS) n_block = ahead_k.take(walk, blocks);
    if (n_block >= blocks.begin) {
      const auto k = rows_from(params.k, smem.k);
      load_tile(smem.slot[to].k, k, smem.k_bytes, n_block * BLOCK_N, keys_end, params.head_dim);
    }
    cp_async_commit();
  };
  const auto load_v = [&](int n_block, int to) ALWAYS_INLINE {
    if (HIDES_PAIRS && (!OVERLAP || n_block < blocks.end)) n_block = ahead_v.take(walk, blocks);
    if (n_block >= blocks.begin && (!OVERLAP || n_block < blocks.end)) {
      const auto v = rows_from(params.v, smem.v);
      load_tile(smem.slot[to].v, v, smem.v_bytes, n_block * BLOCK_N, keys_end, params.head_dim_v);
    }
    cp_async_commit();
  };
  // The tile in `slot` has come, and the one before it is read: that slot is free.
  const auto arrive = [&]() ALWAYS_INLINE {
    cp_async_wait<NUM_STAGES - 2>();
    sync_block();  // the tile is written, by all threads; the one before is read: refill its slot
    return slot == 0 ? NUM_STAGES - 1 : slot - 1;
  };
  // How far on the tile is that takes the place of the one before this: one of the same kind, AHEAD / 2 blocks further
  // on, or one of the other kind. A block of K and its V are PAIR tiles apart.
  constexpr int AHEAD = NUM_STAGES - 1, PAIR = OVERLAP ? 3 : 1;
  // `before`: the block whose turn was before.
  const auto arrive_k = [&](int n_block, int before) ALWAYS_INLINE {
    const int free = arrive();
    if constexpr (AHEAD % 2 == 0) {
      load_k(n_block - AHEAD / 2, free);
    } else {
      load_v(AHEAD < PAIR ? before : n_block - (AHEAD - PAIR) / 2, free);
    }
  };
  const auto arrive_v = [&](int n_block) ALWAYS_INLINE {
    const int free = arrive();
    if constexpr (AHEAD % 2 == 0) {
      load_v(n_block - AHEAD / 2, free);
    } else {
      load_k(n_block - (AHEAD + PAIR) / 2, free);
    }
  };
  const auto leave = [&]() ALWAYS_INLINE { slot = slot == NUM_STAGES - 1 ? 0 : slot + 1; };

  const auto pair_at = [&](int f, int n_block, int r, int c) ALWAYS_INLINE {
    using Part = Fragment<BLOCK_N>;
    const int row = tile.row0 + fragment_row(f) + Part::warp_row(r);
    return Pair{tile.query(row), n_block * BLOCK_N + Part::first_col() + Part::ahead(c)};
  };
  const auto hide_invisible = [&](Fragment<BLOCK_N>(&acc)[FRAGMENTS], int n_block) ALWAYS_INLINE {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      const int origin = n_block * BLOCK_N + acc[f].first_col(), row0 = tile.row0 + fragment_row(f);
      const MaskRow row[2] = {mask.row(tile.query(row0 + acc[f].warp_row(0)), origin),
                              mask.row(tile.query(row0 + acc[f].warp_row(1)), origin)};
      const Pair first = pair_at(f, n_block, 0, 0);
      const auto shown = shown_pairs<RowIs::QUERY, BLOCK_N>(features.hidden, mask, first.i, first.j);
      hide(acc[f], [&](int r, int c) {
        const bool visible = row[r].visible(acc[f].ahead(c));
        return HIDES_PAIRS ? visible && shown(r, c) && features.accepts(mask, pair_at(f, n_block, r, c)) : visible;
      });
    }
  };
  const auto become_logits = [&](Fragment<BLOCK_N>& acc, int f, int n_block) ALWAYS_INLINE {
    const Pair first = pair_at(f, n_block, 0, 0);
    const FragmentPairs<RowIs::QUERY, BLOCK_N> pairs(features.added, first.i, first.j);
    to_logits(acc, score, features, [&](int r, int c) { return pairs.at(features.added, r, c); });
  };
  // Columns of one step of P's product: logits become P.
  const auto weigh = [&](int f, int step, int n_block) ALWAYS_INLINE {
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax[f].weigh(acc_s[f], r, score, 4 * step, 4 * step + 4);
    const Pair first = pair_at(f, n_block, 0, 4 * step);
    const auto kept = kept_pairs<RowIs::QUERY, 16>(features.kept, first.i, first.j);
    drop(acc_s[f], kept, 4 * step, 4 * step + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* at = acc_s[f].at + 8 * step + 2 * i;
      pack_parts<Element>(p[f][step][i], p_low[f][step][i], P_FACTOR * at[0], P_FACTOR * at[1]);
    }
  };
  const auto shrink_outputs = [&]() ALWAYS_INLINE {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      if (!warp_any(softmax[f].rose())) continue;  // mostly none did
      multiply_row(acc_o[f], 0, softmax[f].shrink[0]);
      multiply_row(acc_o[f], 1, softmax[f].shrink[1]);
    }
  };
  const auto nothing = [](int) {};

  // One turn, see above. OVERLAP: acc_s has the logits of the block `before`, and their maxima are known.
  const auto step = [&](int n_block, int before, bool masked) ALWAYS_INLINE {
    if constexpr (OVERLAP) {
      Fragment<BLOCK_N> next[FRAGMENTS];
      arrive_k(n_block, before);
      constexpr int PARTS = PARTS_OF<STEPS, BLOCK_N>, SLICES = FRAGMENTS * STEPS_V;
      score_tile(next, smem, slot, q_held, [&](int part) ALWAYS_INLINE {
#pragma unroll
        for (int i = part * SLICES / PARTS; i < (part + 1) * SLICES / PARTS; ++i) {
          weigh(i % FRAGMENTS, i / FRAGMENTS, before);
        }
      });
      leave();
      shrink_outputs();
      if (masked) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) become_logits(next[f], f, n_block);
        hide_invisible(next, n_block);
      }
      arrive_v(before);
      constexpr int PARTS_V = PARTS_OF<STEPS_V, HEAD_DIM_V>, ROWS = 2 * FRAGMENTS;
      accumulate_pv(acc_o, smem, slot, p, p_low, [&](int part) ALWAYS_INLINE {
#pragma unroll
        for (int i = part * ROWS / PARTS_V; i < (part + 1) * ROWS / PARTS_V; ++i) {
          if (!masked && i % 2 == 0) become_logits(next[i / 2], i / 2, n_block);
          softmax[i / 2].raise(next[i / 2], i % 2, score);
        }
      });
      leave();
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) acc_s[f] = next[f];
    } else {
      arrive_k(n_block, before);
      score_tile(acc_s, smem, slot, q_held, nothing);
      leave();
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) become_logits(acc_s[f], f, n_block);
      if (masked) hide_invisible(acc_s, n_block);
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
        for (int r = 0; r < 2; ++r) softmax[f].raise(acc_s[f], r, score);
      }
      shrink_outputs();
      // P: of the first steps of its product at once, of the others between the product's parts. Not where pairs are
      // masked: that takes registers, and a block has few such turns.
      constexpr int PARTS = HEAD_DIM_V / 16;
      const int early = masked ? STEPS_V : smaller(STEPS_V, 2);
#pragma unroll
      for (int i = 0; i < FRAGMENTS * STEPS_V; ++i) {
        if (i / FRAGMENTS < early) weigh(i % FRAGMENTS, i / FRAGMENTS, n_block);
      }
      const auto weigh_next = [&](int part) ALWAYS_INLINE {
        const int step = part / PARTS + early, at = part % PARTS;
        if (step >= STEPS_V) return;
#pragma unroll
        for (int f = at * FRAGMENTS / PARTS; f < (at + 1) * FRAGMENTS / PARTS; ++f) weigh(f, step, n_block);
      };
      arrive_v(n_block);
      accumulate_pv(acc_o, smem, slot, p, p_low, weigh_next);
      leave();
    }
  };

  clear(acc_o);
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) softmax[f].clear();
  int n_block = blocks.end - 1, before = blocks.end;
  if (blocks.begin < blocks.end) {
    load_q(params, smem, tile);
    load_k(n_block, 0);
#pragma unroll
    for (int i = 1; i < AHEAD; ++i) {
      // Tile i of the order above; OVERLAP leaves out tile 1.
      if constexpr (OVERLAP) {
        if (i == 1) cp_async_commit();
        if (i > 1 && i % 2 == 0) load_k(n_block - i / 2, i);
        if (i > 1 && i % 2 == 1) load_v(n_block - (i - 3) / 2, i);
      } else {
        if (i % 2 == 0) load_k(n_block - i / 2, i);
        if (i % 2 == 1) load_v(n_block - i / 2, i);
      }
    }
    if constexpr (Q_HELD > 0) {
      cp_async_wait<AHEAD - 1>();
      sync_block();  // Q is written, by all threads
      const auto q = operand<Side::LEFT, Major::K>(smem.q, fragment_row(0));
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
        for (int i = 0; i < Q_HELD; ++i) q.load(q_held[f][i], f, i);
      }
    }
    if constexpr (OVERLAP) {
      arrive_k(n_block, n_block + 1);
      score_tile(acc_s, smem, slot, q_held, nothing);
      leave();
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) become_logits(acc_s[f], f, n_block);
      if (!needs_no_look(walk, blocks, n_block)) hide_invisible(acc_s, n_block);
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
        for (int r = 0; r < 2; ++r) softmax[f].raise(acc_s[f], r, score);
      }
      // Tile 1 of the order, which does not exist, has its turn.
      const int free = arrive();
      if constexpr (AHEAD % 2 == 0) {
        load_v(n_block - (AHEAD - 2) / 2, free);
      } else {
        load_k(n_block - (AHEAD + 1) / 2, free);
      }
      leave();
      before = n_block;
      n_block = walk.down(n_block - 1, blocks.begin);
    }
    if constexpr (HIDES_PAIRS) {
#pragma unroll 1
      for (; n_block >= blocks.begin; before = n_block, n_block = walk.down(n_block - 1, blocks.begin)) {
        if (needs_no_look(walk, blocks, n_block)) {
          step(n_block, before, UNMASKED);
        } else {
          step(n_block, before, MASKED);
        }
      }
    } else {
      if (!OVERLAP || CUT_AT_END) {
#pragma unroll 1
        for (; n_block >= blocks.begin && n_block >= blocks.full_end; --n_block) step(n_block, n_block + 1, MASKED);
      }
#pragma unroll 1
      for (; n_block >= blocks.begin && n_block >= blocks.full_begin; --n_block) step(n_block, n_block + 1, UNMASKED);
      if (CUT_AT_BEGIN) {
#pragma unroll 1
        for (; n_block >= blocks.begin; --n_block) step(n_block, n_block + 1, MASKED);
      }
      before = n_block + 1;
    }
    if constexpr (OVERLAP) {
#pragma unroll
      for (int i = 0; i < FRAGMENTS * STEPS_V; ++i) weigh(i / STEPS_V, i % STEPS_V, before);
      shrink_outputs();
      arrive_k(n_block, before);  // nor does this tile exist
      leave();
      arrive_v(before);
      accumulate_pv(acc_o, smem, slot, p, p_low, nothing);
    }
  }

  // Where the block stands, once more: kept through the loop it would hold registers.
  const QueryTile here(params);
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) {
    finish(params, here.seq, here.head, softmax[f], reinterpret_cast<Fragment<HEAD_DIM_V>(&)[1]>(acc_o[f]));
  }
  store_results(params, here, acc_o, softmax);
}

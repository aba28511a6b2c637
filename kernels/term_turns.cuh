// Which lane of tiles a thread block of bwd_score_* sums along, and what it keeps of each tile: see terms.cuh.
#pragma once
#include "terms.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "block_walk.cuh"
#include "features.cuh"
#include "softmax.cuh"

constexpr Term THIS = TERMS[TERM];
constexpr bool WALKS_HEADS = THIS.sum == Sum::PAIRS && !THIS.of_head;
constexpr bool WALKS_ENTRIES = THIS.sum == Sum::PAIRS && !THIS.of_entry;

// What the pairs of a tile add. A row of padding keeps neighbours of a column and of a diagonal in different banks.
struct TermTile {
  Accumulator at[BLOCK_M][BLOCK_N + 16 / sizeof(Accumulator)];
};

// One turn: one tile of pairs of one head of one entry. Tiles that nobody sees are left out.
struct TermTurn {
  int lane, m_block, n_block, head, entry;  // entry: of this launch
  bool exists;
  int group, head_k;  // heads that share a kv head, and the one of this head
  Sequence seq;

  __device__ __forceinline__ explicit TermTurn(const Params& params) : m_block(0), n_block(0), exists(true) {
    const TermLanes all(params, THIS, all_entries(params));
    lane = block_index() % all.lanes;
    const int rest = block_index() / all.lanes;
    head = rest % all.heads;
    entry = rest / all.heads;
    group = params.num_heads / params.num_heads_k;
    const int n_blocks = ceil_div(params.seqlen_k, BLOCK_N);
    if constexpr (THIS.sum == Sum::KEYS) {
      n_block = lane;
    } else if constexpr (THIS.sum == Sum::PAIRS) {
      m_block = lane / n_blocks;
      n_block = lane % n_blocks;
    } else if constexpr (THIS.sum == Sum::DIAGONALS) {
      n_block = lane - (ceil_div(params.seqlen_q, BLOCK_M) - 1) * STEP;
      m_block = n_block < 0 ? ceil_div(-n_block, STEP) : 0;
      n_block += m_block * STEP;
      exists = n_block < n_blocks;
    } else {
      m_block = lane;
    }
    describe_entry(params);
    skip_unseen(params);
  }
  __device__ __forceinline__ void advance(const Params& params) {
    step(params);
    skip_unseen(params);
  }

 private:
  __device__ __forceinline__ void describe_entry(const Params& params) {
    head_k = head / group;
    if constexpr (WALKS_ENTRIES) {
      unravel(seq.batch_index, params.reduce_shape, entry);
    } else {
      unravel(seq.batch_index, params.batch_shape, entry);
    }
    describe(seq, params);
  }
  __device__ __forceinline__ void step(const Params& params) {
    if constexpr (THIS.sum == Sum::PAIRS) {
      if (WALKS_HEADS && ++head < params.num_heads) return describe_entry(params);
      if (WALKS_HEADS) head = 0;
      exists = WALKS_ENTRIES && ++entry < all_entries(params);
      if (exists) describe_entry(params);
      return;
    }
    if constexpr (THIS.sum == Sum::KEYS || THIS.sum == Sum::DIAGONALS) ++m_block;
    if constexpr (THIS.sum != Sum::KEYS) n_block += THIS.sum == Sum::DIAGONALS ? STEP : 1;
    exists = m_block < ceil_div(params.seqlen_q, BLOCK_M) && n_block < ceil_div(params.seqlen_k, BLOCK_N);
  }
  __device__ __forceinline__ void skip_unseen(const Params& params) {
    while (exists) {
      const BlockRange blocks = mask_of(params, seq).key_blocks(m_block * BLOCK_M, BLOCK_M);
      const bool seen = key_walk(params, seq, head, m_block).up(n_block, n_block + 1) == n_block;
      if (n_block >= blocks.begin && n_block < blocks.end && seen) return;
      step(params);
    }
  }
};

// What a pair adds: 0 where it is hidden, by selection. In order of arrival it is added at once.
__device__ __forceinline__ Accumulator term_of_pair(
    const Params& params, const Score& score, const Features& features, Accumulator product, Accumulator dp,
    Accumulator lse, Accumulator delta, bool visible, Pair pair) {
  const Accumulator s = features.unscored(score, score.scaled(product), pair);
  // As Scored has it: a pair beyond the ends is one inside to the function.
  const int query = pair.i < 0 ? 0 : smaller(pair.i, features.seqlen_q - 1);
  const int key = smaller(pair.j, features.seqlen_k - 1);
  int index[4];
  const Accumulator slope = score_term_0(s, features.batch, features.head, query, key, *features.args, index);
  const Accumulator p = weight_of(score, Dual(features.scored(s, pair.i, pair.j), slope), lse, visible).sloped;
  const Accumulator x = score_gradient(features, p, dp, delta, visible, features.keeps(pair));
  if constexpr (THIS.sum == Sum::ARRIVAL) {
    const ArgumentArray& array = params.score_args.array[THIS.argument];
    long long place = 0;
#pragma unroll
    for (int axis = 0; axis < 4; ++axis) place = place * array.length[axis] + index[axis];
    Accumulator* sums = static_cast<Accumulator*>(params.partial.data) + first_number(params, TERM);
    if (x != 0) add_global(sums + place, x);
  }
  return x;
}

// What a thread keeps of the tiles of a lane: a number of its own, or, of pairs, some.
struct TermSums {
  static constexpr int KEPT = THIS.sum == Sum::PAIRS ? BLOCK_M * BLOCK_N / NUM_THREADS : 1;
  static_assert(BLOCK_M * BLOCK_N % NUM_THREADS == 0, "a tile's pairs are dealt out evenly");
  static_assert(THIS.sum != Sum::DIAGONALS || BLOCK_M + BLOCK_N - 1 <= NUM_THREADS, "a thread for each distance");
  static_assert(BLOCK_M <= NUM_THREADS && BLOCK_N <= NUM_THREADS, "a thread for each row and column");
  Accumulator kept[KEPT];

  __device__ __forceinline__ TermSums() {
#pragma unroll
    for (int i = 0; i < KEPT; ++i) kept[i] = 0;
  }
  // All have written their part of the tile, and met.
  __device__ __forceinline__ void add(const TermTile& tile) {
    const auto at = [&](int r, int c) ALWAYS_INLINE { return load_shared<1>(&tile.at[r][c]).at[0]; };
    const int own = thread_index();
    if constexpr (THIS.sum == Sum::QUERIES) {
      for (int c = 0; own < BLOCK_M && c < BLOCK_N; ++c) kept[0] += at(own, c);
    } else if constexpr (THIS.sum == Sum::KEYS) {
      for (int r = 0; own < BLOCK_N && r < BLOCK_M; ++r) kept[0] += at(r, own);
    } else if constexpr (THIS.sum == Sum::DIAGONALS) {
      for (int r = 0; r < BLOCK_M; ++r) {
        const int c = own - (BLOCK_M - 1) + r;
        if (c >= 0 && c < BLOCK_N) kept[0] += at(r, c);
      }
    } else {
#pragma unroll
      for (int i = 0; i < BLOCK_M * BLOCK_N / NUM_THREADS; ++i) {
        const int place = own + NUM_THREADS * i;
        kept[THIS.sum == Sum::PAIRS ? i : 0] += at(place / BLOCK_N, place % BLOCK_N);
      }
    }
  }
  // By the whole block. Of all pairs there is one sum, over threads, where the tile was.
  __device__ __forceinline__ void store(const Params& params, const TermTurn& turn, TermTile& tile) {
    const TermLanes all(params, THIS, all_entries(params));
    const long long entry = WALKS_ENTRIES ? 0 : flat_batch(params, turn.seq.batch_index);
    Accumulator* numbers = static_cast<Accumulator*>(params.partial.data) + first_number(params, TERM) +
                           all.place(entry, WALKS_HEADS ? 0 : turn.head, turn.lane);
    if constexpr (THIS.sum == Sum::ALL) {
      sync_block();  // the last tile is read
      kept[0] = sum_of_block(kept[0], &tile.at[0][0]);
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int place = thread_index() + NUM_THREADS * i;
      if (place < all.numbers) store_global(numbers + place, Vector<Accumulator, 1>{{kept[i]}});
    }
  }
};

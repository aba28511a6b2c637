// Forward on Hopper: out = softmax(scale * q k^T) v and lse; tiles come by TMA, products by wgmma.
//
// Thread blocks are persistent: each works on one tile after another, BLOCK_M queries of one head. In warpgroup 0,
// warp 3 walks the list of tiles and tells the others, warp 0 sends for K, warp 1 for V, warp 2 for Q, all of them
// ahead of the work. Each of the other warpgroups, the consumers, owns 64 of the queries; S and P never leave its
// registers. Key blocks are taken from the last to the first: those that the diagonal cuts come first, what follows
// is a straight loop.
//
//     OVERLAP: the products of one block run under the softmax of the one before     two consumers, 240 registers
//
//         S(n) = Q K(n)^T        issued          | tensor cores: S(n), then O
//         O += P(n + 1) V(n + 1) issued          |
//         S(n) is there:  softmax, while the tensor cores are still at O
//         O is there:     P(n) rounded, O shrunk
//
//     otherwise: one after the other; three consumers, 160 registers, keep the tensor cores busy for one another, or
//     four, 104 registers, of two thread blocks, whose tiles begin and end at different times
//
//         S(n) = Q K(n)^T;  softmax, P(n) rounded, O shrunk;  O += P(n) V(n)
//
//     TAKE_TURNS: two consumers issue their products in turn, so that one is at its softmax while the other's run.
//
//     shared memory:   q  Q_STAGES x consumers x (64, HEAD_DIM)     k  NUM_STAGES x (BLOCK_N, HEAD_DIM)
//                      v  NUM_STAGES x (BLOCK_N, HEAD_DIM_V)        and the rings
//     who arrives:     full   q, k, v: the sender's announcement, and the bytes;  work: its sender
//                      empty  every warp that reads: 4 of one consumer for q, 4 of each consumer for k and v; for work
//                             4 of each consumer and the 3 senders
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "packed_walk.cuh"
#include "mask.cuh"
#include "block_walk.cuh"
#include "score.cuh"
#include "params_sm90.cuh"
#include "tile_sm90.cuh"
#include "softmax.cuh"
#include "fragment_pairs.cuh"

constexpr int CONSUMERS = BLOCK_M / 64;
static_assert(BLOCK_M % 64 == 0 && NUM_WARPS == 4 * (1 + CONSUMERS), "a warpgroup for every 64 rows, and the senders");
static_assert(!TAKE_TURNS || (OVERLAP && CONSUMERS == 2), "two take turns");
static_assert(BLOCK_N % 16 == 0, "P is an operand of whole steps of 16 keys");

static_assert(MIN_BLOCKS == 1 || (MIN_BLOCKS == 2 && CONSUMERS == 2), "registers for four consumers, not for more");

// Their sum over warpgroups stays within what the block has at entry, or setmaxnreg would wait for ever.
// To find packed sequences takes more than to send for tiles.
constexpr int CONSUMER_REGISTERS = MIN_BLOCKS == 2 ? 104 : CONSUMERS == 3 ? 160 : PACKED ? 232 : 240;
constexpr int SENDER_REGISTERS = MIN_BLOCKS == 2 || CONSUMERS == 3 ? 32 : PACKED ? 40 : 24;
constexpr int REGISTERS_AT_ENTRY = 65536 / (MIN_BLOCKS * 32 * NUM_WARPS) / 8 * 8;
static_assert(CONSUMERS * CONSUMER_REGISTERS + SENDER_REGISTERS <= (1 + CONSUMERS) * REGISTERS_AT_ENTRY, "registers");

// The first products of a tile are issued before the results of the last one are stored: where registers allow it, and
// Q of both is there.
constexpr bool EARLY = OVERLAP && Q_STAGES > 1;

// So far the walk may be ahead of the slowest reader. Tiles that are taken early are not there for whoever is free:
// with 4 slots, calls of a few tiles for each block take up to 15 % longer.
constexpr int WORK_SLOTS = 1;

struct Smem {
  SwizzledTile<64, HEAD_DIM> q[Q_STAGES][CONSUMERS];
  SwizzledTile<BLOCK_N, HEAD_DIM> k[NUM_STAGES];
  SwizzledTile<BLOCK_N, HEAD_DIM_V> v[NUM_STAGES];
  Ring<Q_STAGES> q_ring[CONSUMERS];
  Ring<NUM_STAGES> k_ring, v_ring;
  WorkRing<WORK_SLOTS> work_ring;
};
constexpr int SMEM_BYTES = sizeof(Smem);

// The first query of a tile. Where a tile has warpgroups without rows it is the last one; or, in a causal head, where
// the last one is the longest, the first one, whose row0 is then below 0 by whole warpgroups. (Where BLOCK_M is no
// more than BLOCK_N, every tile that begins at a multiple of it has one block on the diagonal, which is worth more; a
// map of blocks counts from row 0; and before an entry of its own length another one's rows may lie.)
__device__ __forceinline__ int row0_of(const Sequence& seq, const Work& work) {
  constexpr bool FIRST_IS_CUT = CAUSAL && BLOCK_N < BLOCK_M && !HIDES_PAIRS && !LENS;
  const int missing = FIRST_IS_CUT ? (ceil_div(seq.seqlen_q, BLOCK_M) * BLOCK_M - seq.seqlen_q) / 64 * 64 : 0;
  return work.block * BLOCK_M - missing;
}

// The key blocks of a tile, for all of its consumers.
struct KeyBlocks {
  BlockWalk walk;
  BlockRange range;

  __device__ __forceinline__ KeyBlocks(const Params& params, const Sequence& seq, const Work& work)
      : walk(key_walk(params, seq, work.head, work.block)),
        range(walk.within(mask_of(params, seq).key_blocks(row0_of(seq, work), BLOCK_M))) {}
  // The next block, or one before range.begin.
  __device__ __forceinline__ int below(int n_block) const { return walk.down(n_block - 1, range.begin); }
};

// ---- the senders, one thread each; but a whole warp looks for packed sequences

__device__ __forceinline__ void send_work(const Params& params, Smem& smem) {
  Turn<WORK_SLOTS> turn;
  if constexpr (PACKED) {
    PackedWalk walk(params, params.cu_seqlens_q, params.rows_q, params.seqlen_q, BLOCK_M, params.num_heads);
    Work work;
    do {
      work = walk.next(Longest::LAST_BLOCK);
      if (lane_index() == 0) smem.work_ring.send(turn, work);
      turn.advance();
    } while (work.block >= 0);
  } else {
    TileWalk walk(params, ceil_div(params.seqlen_q, BLOCK_M), params.num_heads);
    for (; walk.more(); walk.advance(), turn.advance()) smem.work_ring.send(turn, walk.work(Longest::LAST_BLOCK));
    smem.work_ring.send(turn, {-1, 0, 0});
  }
}

// K or V.
template <int COLS>
__device__ __forceinline__ void send_keys(
    const Params& params, const Tensor& tensor, const TensorMap& map, SwizzledTile<BLOCK_N, COLS> (&tiles)[NUM_STAGES],
    Ring<NUM_STAGES>& ring, WorkRing<WORK_SLOTS>& work_ring) {
  const int group = params.num_heads / params.num_heads_k;
  Turn<WORK_SLOTS> work_turn;
  Turn<NUM_STAGES> turn;
  for (Work work = work_ring.take(work_turn); work.block >= 0; work = work_ring.take(work_turn)) {
    const Sequence seq = sequence_of(params, work.batch);
    const KeyBlocks blocks(params, seq, work);
    const MapPlace place = key_place(params, tensor, seq, work.head / group);
#pragma unroll 1
    for (int n_block = blocks.range.end - 1; n_block >= blocks.range.begin; n_block = blocks.below(n_block)) {
      const unsigned full = ring.refill(turn, sizeof tiles[0]);
      load_tile(tiles[turn.slot], map, full, n_block * BLOCK_N, place);
      turn.advance();
    }
  }
}

// Q, each consumer's rows for themselves.
__device__ __forceinline__ void send_queries(const Params& params, const TensorMap& map, Smem& smem) {
  Turn<WORK_SLOTS> work_turn;
  Turn<Q_STAGES> turn;
  for (Work work = smem.work_ring.take(work_turn); work.block >= 0; work = smem.work_ring.take(work_turn)) {
    const Sequence seq = sequence_of(params, work.batch);
    const int row0 = row0_of(seq, work);
    const BlockRange blocks = KeyBlocks(params, seq, work).range;
    if (blocks.begin == blocks.end) continue;  // rows that see nothing need no Q
    const MapPlace place = query_place(params, params.q, seq, work.head);
#pragma unroll 1
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
      const unsigned full = smem.q_ring[consumer].refill(turn, sizeof smem.q[0][0]);
      load_tile(smem.q[turn.slot][consumer], map, full, row0 + 64 * consumer, place);
    }
    turn.advance();
  }
}

// ---- a consumer, one warpgroup

// TAKE_TURNS: named barriers 1 and 2, one for each consumer. Whoever has issued its products lets the other go.
__device__ __forceinline__ void take_turn(int consumer) {
  if (TAKE_TURNS) barrier_sync(1 + consumer, 256);
}
__device__ __forceinline__ void pass_turn(int consumer) {
  if (TAKE_TURNS) barrier_arrive(2 - consumer, 256);
}

// One consumer's part of a tile: 64 queries from row0 on.
struct QueryTile {
  Work work;
  Features features;  // of its head
  int row0;
  Mask mask;
  BlockWalk walk;
  int begin, end;  // the key blocks of all consumers
  BlockRange own;  // of this one

  __device__ __forceinline__ QueryTile(const Params& params, const Work& taken, int consumer)
      : QueryTile(params, taken, sequence_of(params, taken.batch), consumer) {}
  __device__ __forceinline__ QueryTile(const Params& params, const Work& taken, const Sequence& seq, int consumer)
      : work(taken),
        features(params, seq, taken.head),
        mask(mask_of(params, seq)),
        walk(key_walk(params, seq, taken.head, taken.block)) {
    const int tile_row0 = row0_of(seq, work);
    row0 = tile_row0 + 64 * consumer;
    // Read from memory, maybe: without this no loop's length would be known to be the same in all lanes.
    if (CAUSAL || WINDOW) mask.q_offset = warp_uniform(mask.q_offset);
    BlockRange blocks = mask.key_blocks(tile_row0, BLOCK_M);
    if constexpr (HIDES_PAIRS) {
      if (!exists()) blocks.end = blocks.begin;  // the map has no such row
      blocks = walk.within(blocks);
      blocks.begin = warp_uniform(blocks.begin);
      blocks.end = warp_uniform(blocks.end);
    }
    begin = blocks.begin;
    end = blocks.end;
    own = mask.key_blocks(row0, 64);
    // It takes one block in any case, of rows that see nothing, and of rows that there are none of.
    const bool takes_one = own.end <= begin || row_end() <= row0;
    own.end = takes_one ? begin + 1 : own.end;
    if constexpr (CUT_AT_BEGIN) own.begin = !takes_one && own.begin > begin ? own.begin : begin;
  }
  __device__ __forceinline__ bool exists() const { return work.block >= 0; }
  // Where its rows end; it has none where that is not behind row0.
  __device__ __forceinline__ int row_end() const { return row0 < 0 ? row0 : mask.seqlen_q; }
  // Where its results end, which rows beyond an entry's own length have too.
  __device__ __forceinline__ int results_end(const Params& params) const {
    return LENS && !PACKED ? params.seqlen_q : row_end();
  }
  __device__ __forceinline__ bool sees_keys() const { return begin < end; }
  __device__ __forceinline__ int own_begin() const { return CUT_AT_BEGIN ? own.begin : begin; }
  // The next key block, or one before `begin`.
  __device__ __forceinline__ int below(int n_block) const {
    if constexpr (!HIDES_PAIRS) return n_block - 1;
    return warp_uniform(walk.down(n_block - 1, begin));
  }
};

// Rows that see no key: out = 0, lse = -inf, or the head's sink. By one warpgroup.
__device__ __forceinline__ void store_nothing(const Params& params, const QueryTile& tile) {
  const Sequence seq = sequence_of(params, tile.work.batch);
  const auto out = rows_of<Output>(params.out, seq.batch_index, tile.work.head);       // (seqlen_q, head_dim_v)
  const auto lse = rows_of<Accumulator>(params.lse, seq.batch_index, tile.work.head);  // (seqlen_q)
  const int rows = smaller(tile.results_end(params) - tile.row0, 64);
#pragma unroll 1
  for (int row = thread_index() % 128 / 32; row < rows; row += 4) {
#pragma unroll 1
    for (int col = lane_index(); col < params.head_dim_v; col += 32) {
      store_global(out.at(tile.row0 + row, col), Vector<Output, 1>{{from_accumulator<Output>(Accumulator(0))}});
    }
    const bool is_own = !LENS || tile.row0 + row < seq.seqlen_q;
    if (lane_index() == 0) {
      store_number(lse, tile.row0 + row,
                   is_own ? lse_of_nothing(params, seq, tile.work.head) : -math::infinity<Accumulator>());
    }
  }
}

// In one form of the loop nvcc sees that all control is uniform; in the others descriptors are made so.
template <int ROWS, Major MAJOR>
__device__ __forceinline__ Operand<ROWS, MAJOR> in_place(const Operand<ROWS, MAJOR>& operand) {
  if constexpr (OVERLAP && !EARLY) return operand;
  return uniform(operand);
}

__device__ __forceinline__ void consume(const Params& params, Smem& smem, int consumer) {
  const Score score = score_of(params);
  Fragment<BLOCK_N> acc_s;        // (64, BLOCK_N): products, logits, P
  Fragment<HEAD_DIM_V> acc_o[1];  // (64, HEAD_DIM_V)
  unsigned p[BLOCK_N / 16][4];    // P, rounded
  Softmax<2> softmax;
  Turn<NUM_STAGES> turn;  // of K, and of V: they come alternately
  Turn<Q_STAGES> q_turn;
  Turn<WORK_SLOTS> work_turn;
  int n_block = 0;

  // Issued: acc_s = Q K^T, acc_o += P V.
  const auto score_tile = [&]() ALWAYS_INLINE {
    wgmma_fence();
    const auto q = in_place(operand<Major::K>(smem.q[q_turn.slot][consumer]));
    product<HEAD_DIM / 16>(acc_s, q, in_place(operand<Major::K>(smem.k[turn.slot])));
    wgmma_commit();
  };
  const auto accumulate_pv = [&](const Turn<NUM_STAGES>& v_turn) ALWAYS_INLINE {
    smem.v_ring.await(v_turn);
    wgmma_fence();
    multiply_nn(acc_o[0], p, in_place(operand<Major::MN>(smem.v[v_turn.slot])));
    wgmma_commit();
  };
  // acc_s is there, its tile may be refilled; acc_o's products, where issued behind, may be under way.
  const auto await_scores = [&](bool outputs_behind) ALWAYS_INLINE {
    if (outputs_behind) {
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    wgmma_hold(acc_s.at);
    smem.k_ring.release(turn);
  };
  const auto await_outputs = [&](const Turn<NUM_STAGES>& v_turn) ALWAYS_INLINE {
    wgmma_wait<0>();
    wgmma_hold(acc_o[0].at);
    smem.v_ring.release(v_turn);
  };
  // EARLY: the next tile with something to see; the others end here.
  const auto next_tile = [&]() ALWAYS_INLINE {
    while (true) {
      const QueryTile tile(params, smem.work_ring.take_by_warp(work_turn), consumer);
      if (!EARLY || !tile.exists() || tile.sees_keys()) return tile;
      store_nothing(params, tile);
    }
  };
  // Blocks down to `last` that only other consumers see.
  const auto leave_out = [&](const QueryTile& tile, int last) ALWAYS_INLINE {
#pragma unroll 1
    for (; n_block >= last; n_block = tile.below(n_block)) {
      smem.k_ring.await(turn);
      smem.v_ring.await(turn);
      take_turn(consumer);
      pass_turn(consumer);
      sync_warp();  // all lanes have seen them come: released by one, they may come and go again unseen
      smem.k_ring.release(turn);
      smem.v_ring.release(turn);
      turn.advance();
    }
  };
  // Up to the first block that this consumer takes: its Q and K are there.
  const auto await_tile = [&](const QueryTile& tile) ALWAYS_INLINE {
    n_block = tile.end - 1;
    leave_out(tile, tile.own.end);
    smem.q_ring[consumer].await(q_turn);
    smem.k_ring.await(turn);
  };
  // What options say of the block's pairs, while its products are under way.
  struct Beside {
    FragmentPairs<RowIs::QUERY, BLOCK_N> pairs;
    FragmentBits<RowIs::QUERY, BLOCK_N> bits;
  };
  const auto beside = [&](const QueryTile& tile, bool masked) ALWAYS_INLINE {
    const int i = tile.row0 + acc_s.row(0), j = n_block * BLOCK_N + acc_s.first_col();
    return Beside{{tile.features.added, i, j}, {tile.features, tile.mask, i, j, masked}};
  };
  const auto soften = [&](const QueryTile& tile, const Beside& of, bool masked) ALWAYS_INLINE {
    const auto at = [&](int r, int c) ALWAYS_INLINE { return of.pairs.at(tile.features.added, r, c); };
    to_logits(acc_s, score, tile.features, at);
    if (masked) {
      const int origin = n_block * BLOCK_N + acc_s.first_col();
      const MaskRow row[2] = {
          tile.mask.row(tile.row0 + acc_s.row(0), origin), tile.mask.row(tile.row0 + acc_s.row(1), origin)};
      hide(acc_s, [&](int r, int c) {
        const bool visible = row[r].visible(acc_s.ahead(c));
        return HIDES_PAIRS ? visible && of.bits.shown(r, c) && tile.features.accepts(tile.mask, at(r, c)) : visible;
      });
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax.raise(acc_s, r, score);
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax.weigh(acc_s, r, score);
    drop(acc_s, of.bits.kept);
  };
  const auto shrink_outputs = [&]() ALWAYS_INLINE {
    if (!warp_any(softmax.rose())) return;  // mostly none did
    multiply_row(acc_o[0], 0, softmax.shrink[0]);
    multiply_row(acc_o[0], 1, softmax.shrink[1]);
  };
  // One turn, see above. OVERLAP: before it, P of block n_block + 1 waits in p.
  const auto step = [&](const QueryTile& tile, bool masked) ALWAYS_INLINE {
    if constexpr (OVERLAP) {
      const Turn<NUM_STAGES> v_turn = turn;
      turn.advance();
      smem.k_ring.await(turn);
      take_turn(consumer);
      score_tile();
      accumulate_pv(v_turn);
      pass_turn(consumer);
      const Beside of = beside(tile, masked);
      await_scores(true);
      soften(tile, of, masked);
      await_outputs(v_turn);
      round_to(p, acc_s);
      shrink_outputs();
    } else {
      smem.k_ring.await(turn);
      score_tile();
      const Beside of = beside(tile, masked);
      await_scores(false);
      soften(tile, of, masked);
      round_to(p, acc_s);
      shrink_outputs();
      accumulate_pv(turn);
      await_outputs(turn);
      turn.advance();
    }
    n_block = tile.below(n_block);
  };
  if (TAKE_TURNS && consumer == 1) pass_turn(consumer);  // the first turn is consumer 0's
  QueryTile tile = next_tile();
  if (EARLY && tile.exists()) {
    await_tile(tile);
    score_tile();
  }
  while (tile.exists()) {
    softmax.clear();
    clear(acc_o[0]);
    if (EARLY || tile.sees_keys()) {
      if (!EARLY) await_tile(tile);
      if constexpr (OVERLAP) {
        if (!EARLY) score_tile();
        const bool masked = !needs_no_look(tile.walk, tile.own, n_block);
        const Beside of = beside(tile, masked);
        await_scores(false);
        soften(tile, of, masked);
        round_to(p, acc_s);
        n_block = tile.below(n_block);
      }
      if constexpr (HIDES_PAIRS) {
#pragma unroll 1
        while (n_block >= tile.own_begin()) step(tile, !needs_no_look(tile.walk, tile.own, n_block));
      } else {
        if (!OVERLAP || CUT_AT_END) {
#pragma unroll 1
          while (n_block >= tile.own_begin() && n_block >= tile.own.full_end) step(tile, MASKED);
        }
#pragma unroll 1
        while (n_block >= tile.own_begin() && n_block >= tile.own.full_begin) step(tile, UNMASKED);
        if (CUT_AT_BEGIN) {
#pragma unroll 1
          while (n_block >= tile.own_begin()) step(tile, MASKED);
        }
      }
      smem.q_ring[consumer].release(q_turn);
      q_turn.advance();
      if constexpr (OVERLAP) {
        accumulate_pv(turn);
        await_outputs(turn);
        turn.advance();
      }
      if constexpr (CUT_AT_BEGIN) leave_out(tile, tile.begin);
    }

    QueryTile next = tile;
    if constexpr (EARLY) {
      next = next_tile();
      // These products run under what follows. Behind the last tile they are some that nobody reads, of buffers that
      // were filled once: were they issued in a branch, nvcc would wait for them where it ends.
      if (next.exists()) {
        await_tile(next);
      } else {
        q_turn = {};
        turn = {};
      }
      score_tile();
    }
    const Sequence seq = sequence_of(params, tile.work.batch);
    finish(params, seq, tile.work.head, softmax, acc_o);
    const auto out = rows_of<Output>(params.out, seq.batch_index, tile.work.head);       // (seqlen_q, head_dim_v)
    const auto lse = rows_of<Accumulator>(params.lse, seq.batch_index, tile.work.head);  // (seqlen_q)
    const int results_end = tile.results_end(params);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (LENS && tile.row0 + acc_s.row(r) >= seq.seqlen_q) clear_row(acc_o[0], r);
    }
    store_fragment(out, tile.row0, results_end, params.head_dim_v, acc_o[0]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile.row0 + acc_s.row(r);
      if (lane_index() % 4 == 0 && row < results_end) {
        store_number(lse, row, lse_of(softmax, r, score, !LENS || row < seq.seqlen_q));
      }
    }
    tile = EARLY ? next : next_tile();
  }
  if (EARLY) wgmma_wait<0>();
  if (TAKE_TURNS && consumer == 0) take_turn(consumer);  // the last turn, which the other has passed
}

extern "C" __global__ void __launch_bounds__(32 * NUM_WARPS, MIN_BLOCKS)
fwd_sm90(const __grid_constant__ MappedParams launch) {
  DYNAMIC_SHARED(Smem, smem);
  const Params& params = launch.params;
  const int warpgroup = warp_uniform(thread_index() / 128), warp = warp_uniform(thread_index() / 32 % 4);
  if (thread_index() == 0) {
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) smem.q_ring[consumer].init(4);
    smem.k_ring.init(4 * CONSUMERS);
    smem.v_ring.init(4 * CONSUMERS);
    smem.work_ring.init(4 * CONSUMERS + 3);
    fence_mbarrier_init();
  }
  sync_block();  // the rings are there
  if (warpgroup == 0) {
    setmaxnreg_dec<SENDER_REGISTERS>();
    if (PACKED && warp == 3) send_work(params, smem);
    if (lane_index() != 0) return;
    if (warp == 0) send_keys(params, params.k, launch.map_k, smem.k, smem.k_ring, smem.work_ring);
    if (warp == 1) send_keys(params, params.v, launch.map_v, smem.v, smem.v_ring, smem.work_ring);
    if (warp == 2) send_queries(params, launch.map_q, smem);
    if (!PACKED && warp == 3) send_work(params, smem);
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume(params, smem, warpgroup - 1);
  }
}

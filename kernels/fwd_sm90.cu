// Forward on Hopper: out = softmax(scale * q k^T) v and lse; tiles come by TMA, products by wgmma.
//
// Thread blocks are persistent: each walks its tiles of BLOCK_M queries of one head (TileWalk). Warpgroup 0 sends for
// tiles, warp 0 K, warp 1 V, warp 2 Q; each of the others, the consumers, owns 64 of the queries, S and P never leave
// its registers. Key blocks are taken from the last to the first: those that the diagonal cuts come first, what
// follows is a straight loop.
//
//     OVERLAP: the products of one block run under the softmax of the one before     two consumers, 240 registers
//
//         S(n) = Q K(n)^T        issued          | tensor cores: S(n), then O
//         O += P(n + 1) V(n + 1) issued          |
//         S(n) is there:  softmax, while the tensor cores are still at O
//         O is there:     P(n) rounded, O shrunk
//
//     otherwise: one after the other; three consumers, 160 registers, keep the tensor cores busy for one another
//
//         S(n) = Q K(n)^T;  softmax, P(n) rounded, O shrunk;  O += P(n) V(n)
//
//     TAKE_TURNS: two consumers issue their products in turn, so that one is at its softmax while the other's run.
//
//     shared memory:   q  Q_STAGES x consumers x (64, HEAD_DIM)     k  NUM_STAGES x (BLOCK_N, HEAD_DIM)
//                      v  NUM_STAGES x (BLOCK_N, HEAD_DIM_V)        and their rings
//     who arrives:     full   the sender's announcement, and the bytes
//                      empty  every warp that reads the buffer: 4 of one consumer for q, 4 of each for k and v
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "params_sm90.cuh"
#include "tile_sm90.cuh"
#include "softmax.cuh"

constexpr int CONSUMERS = BLOCK_M / 64;
static_assert(BLOCK_M % 64 == 0 && NUM_WARPS == 4 * (1 + CONSUMERS), "a warpgroup for every 64 rows, and the senders");
static_assert(!TAKE_TURNS || CONSUMERS == 2, "two take turns");
static_assert(BLOCK_N % 16 == 0, "P is an operand of whole steps of 16 keys");

// Their sum over warpgroups stays within what the block has at entry, or setmaxnreg would wait for ever.
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 240, SENDER_REGISTERS = CONSUMERS == 3 ? 32 : 24;
constexpr int REGISTERS_AT_ENTRY = 65536 / (32 * NUM_WARPS) / 8 * 8;
static_assert(CONSUMERS * CONSUMER_REGISTERS + SENDER_REGISTERS <= (1 + CONSUMERS) * REGISTERS_AT_ENTRY, "registers");

using KRing = Ring<NUM_STAGES>;
using VRing = Ring<NUM_STAGES>;
using QRing = Ring<Q_STAGES>;

struct Smem {
  SwizzledTile<64, HEAD_DIM> q[Q_STAGES][CONSUMERS];
  SwizzledTile<BLOCK_N, HEAD_DIM> k[NUM_STAGES];
  SwizzledTile<BLOCK_N, HEAD_DIM_V> v[NUM_STAGES];
  QRing q_ring[CONSUMERS];
  KRing k_ring;
  VRing v_ring;
};
constexpr int SMEM_BYTES = sizeof(Smem);

// One tile of the walk: whose queries, which keys they see.
struct QueryTile {
  Sequence seq;
  Mask mask;
  int head, row0;
  BlockRange blocks;  // of all consumers

  __device__ __forceinline__ QueryTile(const Params& params, const TileWalk& walk) {
    const Work work = walk.work(Longest::LAST_BLOCK);
    seq = sequence_of(params, work.batch);
    mask = mask_of(seq);
    head = work.head;
    row0 = work.block * BLOCK_M;
    blocks = mask.key_blocks(row0, BLOCK_M);
  }
  __device__ __forceinline__ int head_k(const Params& params) const {
    return head / (params.num_heads / params.num_heads_k);
  }
};

// K or V of all tiles, by one thread.
template <int COLS>
__device__ __forceinline__ void send_keys(const Params& params, const Tensor& tensor, const TensorMap& map,
                                          SwizzledTile<BLOCK_N, COLS> (&buffers)[NUM_STAGES], Ring<NUM_STAGES>& ring) {
  Turn<NUM_STAGES> turn;
  for (TileWalk walk(params, ceil_div(params.seqlen_q, BLOCK_M), params.num_heads); walk.more(); walk.advance()) {
    const QueryTile tile(params, walk);
    const MapPlace place = map_place(tensor, tile.seq.batch_index, tile.head_k(params));
#pragma unroll 1
    for (int n_block = tile.blocks.end - 1; n_block >= tile.blocks.begin; --n_block) {
      const unsigned full = ring.refill(turn, sizeof buffers[0]);
      load_tile(buffers[turn.slot], map, full, n_block * BLOCK_N, place);
      turn.advance();
    }
  }
}

// Q of all tiles, by one thread, each consumer's rows for themselves.
__device__ __forceinline__ void send_queries(const Params& params, const TensorMap& map, Smem& smem) {
  Turn<Q_STAGES> turn;
  for (TileWalk walk(params, ceil_div(params.seqlen_q, BLOCK_M), params.num_heads); walk.more(); walk.advance()) {
    const QueryTile tile(params, walk);
    if (tile.blocks.begin == tile.blocks.end) continue;  // rows that see nothing need no Q
    const MapPlace place = map_place(params.q, tile.seq.batch_index, tile.head);
#pragma unroll 1
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
      const unsigned full = smem.q_ring[consumer].refill(turn, sizeof smem.q[0][0]);
      load_tile(smem.q[turn.slot][consumer], map, full, tile.row0 + 64 * consumer, place);
    }
    turn.advance();
  }
}

// TAKE_TURNS: named barriers 1 and 2, one for each consumer. Whoever has issued its products lets the other go.
__device__ __forceinline__ void take_turn(int consumer) {
  if (TAKE_TURNS) barrier_sync(1 + consumer, 256);
}
__device__ __forceinline__ void pass_turn(int consumer) {
  if (TAKE_TURNS) barrier_arrive(2 - consumer, 256);
}

__device__ __forceinline__ void consume(const Params& params, Smem& smem, int consumer) {
  const Score score = score_of(params);
  Fragment<BLOCK_N> acc_s;        // (64, BLOCK_N): logits, then P
  Fragment<HEAD_DIM_V> acc_o[1];  // (64, HEAD_DIM_V)
  unsigned p[BLOCK_N / 16][4];    // P, rounded
  Softmax<2> softmax;
  Turn<NUM_STAGES> turn;  // K's buffer, and V's
  Turn<Q_STAGES> q_turn;
  if (TAKE_TURNS && consumer == 1) pass_turn(consumer);  // the first turn is consumer 0's

  for (TileWalk walk(params, ceil_div(params.seqlen_q, BLOCK_M), params.num_heads); walk.more(); walk.advance()) {
    const QueryTile tile(params, walk);
    Mask mask = tile.mask;
    // Read from memory, maybe: without this no loop's length would be known to be the same in all lanes.
    if (CAUSAL) mask.q_offset = warp_uniform(mask.q_offset);
    const int row0 = tile.row0 + 64 * consumer;
    const BlockRange blocks = mask.key_blocks(tile.row0, BLOCK_M);
    const int begin = blocks.begin, end = blocks.end;
    // The consumer's own rows may see less than the tile's; one block it takes in any case.
    BlockRange own = mask.key_blocks(row0, 64);
    own.end = own.end > begin || begin == end ? own.end : begin + 1;

    const auto q = operand<Major::K>(smem.q[q_turn.slot][consumer]);
    const auto soften = [&](int n_block, bool masked) ALWAYS_INLINE {
      const int origin = n_block * BLOCK_N + acc_s.first_col();
      const MaskRow seen[2] = {mask.row(row0 + acc_s.row(0), origin), mask.row(row0 + acc_s.row(1), origin)};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        softmax.raise(acc_s, r, score, [&](int row, int c) { return !masked || seen[row].visible(acc_s.ahead(c)); });
        softmax.weigh(acc_s, r, score);
      }
    };
    const auto shrink = [&]() ALWAYS_INLINE {
      if (!warp_any(softmax.shrink[0] != 1 || softmax.shrink[1] != 1)) return;  // mostly no row_max rose
      multiply_row(acc_o[0], 0, softmax.shrink[0]);
      multiply_row(acc_o[0], 1, softmax.shrink[1]);
    };

    softmax.clear();
    clear(acc_o[0]);
    if (begin < end) smem.q_ring[consumer].await(q_turn);
    int n_block = end - 1;
    for (; n_block >= own.end; --n_block) {  // blocks that only the other consumers see
      smem.k_ring.await(turn);
      smem.v_ring.await(turn);
      take_turn(consumer);
      pass_turn(consumer);
      smem.k_ring.release(turn);
      smem.v_ring.release(turn);
      turn.advance();
    }

    if constexpr (OVERLAP) {
      const auto step = [&](int n, bool masked) ALWAYS_INLINE {
        const Turn<NUM_STAGES> v_turn = turn;  // of the block before
        turn.advance();
        smem.k_ring.await(turn);
        take_turn(consumer);
        wgmma_fence();
        multiply_nt<HEAD_DIM>(acc_s, q, operand<Major::K>(smem.k[turn.slot]));
        wgmma_commit();
        smem.v_ring.await(v_turn);
        multiply_nn(acc_o[0], p, operand<Major::MN>(smem.v[v_turn.slot]));
        wgmma_commit();
        pass_turn(consumer);
        wgmma_wait<1>();
        wgmma_hold(acc_s.at);
        smem.k_ring.release(turn);
        soften(n, masked);
        wgmma_wait<0>();
        wgmma_hold(acc_o[0].at);
        smem.v_ring.release(v_turn);
        round_to(p, acc_s);
        shrink();
      };
      if (begin < end) {
        smem.k_ring.await(turn);
        wgmma_fence();
        multiply_nt<HEAD_DIM>(acc_s, q, operand<Major::K>(smem.k[turn.slot]));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(acc_s.at);
        smem.k_ring.release(turn);
        soften(n_block, MASKED);
        round_to(p, acc_s);
        --n_block;
#pragma unroll 1
        for (; n_block >= begin && n_block >= own.full_end; --n_block) step(n_block, MASKED);
#pragma unroll 1
        for (; n_block >= begin && n_block >= own.full_begin; --n_block) step(n_block, UNMASKED);
#pragma unroll 1
        for (; n_block >= begin; --n_block) step(n_block, MASKED);
        smem.q_ring[consumer].release(q_turn);
        smem.v_ring.await(turn);
        wgmma_fence();
        multiply_nn(acc_o[0], p, operand<Major::MN>(smem.v[turn.slot]));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(acc_o[0].at);
        smem.v_ring.release(turn);
        turn.advance();
      }
    } else {
      const auto step = [&](int n, bool masked) ALWAYS_INLINE {
        smem.k_ring.await(turn);
        take_turn(consumer);
        wgmma_fence();
        multiply_nt<HEAD_DIM>(acc_s, q, operand<Major::K>(smem.k[turn.slot]));
        wgmma_commit();
        pass_turn(consumer);
        wgmma_wait<0>();
        wgmma_hold(acc_s.at);
        smem.k_ring.release(turn);
        soften(n, masked);
        round_to(p, acc_s);
        shrink();
        smem.v_ring.await(turn);
        wgmma_fence();
        multiply_nn(acc_o[0], p, operand<Major::MN>(smem.v[turn.slot]));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(acc_o[0].at);
        smem.v_ring.release(turn);
        turn.advance();
      };
#pragma unroll 1
      for (; n_block >= begin && n_block >= own.full_end; --n_block) step(n_block, MASKED);
#pragma unroll 1
      for (; n_block >= begin && n_block >= own.full_begin; --n_block) step(n_block, UNMASKED);
#pragma unroll 1
      for (; n_block >= begin; --n_block) step(n_block, MASKED);
      if (begin < end) smem.q_ring[consumer].release(q_turn);
    }
    if (begin < end) q_turn.advance();

    softmax.finish(acc_o);
    const auto out = rows_of<Output>(params.out, tile.seq.batch_index, tile.head);       // (seqlen_q, head_dim_v)
    const auto lse = rows_of<Accumulator>(params.lse, tile.seq.batch_index, tile.head);  // (seqlen_q)
    store_fragment(out, row0, tile.seq.seqlen_q, params.head_dim_v, acc_o[0]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + acc_s.row(r);
      if (lane_index() % 4 == 0 && row < tile.seq.seqlen_q) store_number(lse, row, softmax.lse(r, score));
    }
  }
  if (TAKE_TURNS && consumer == 0) take_turn(consumer);  // the last turn that the other passed
}

extern "C" __global__ void __launch_bounds__(32 * NUM_WARPS, 1) fwd_sm90(const __grid_constant__ MappedParams launch) {
  DYNAMIC_SHARED(Smem, smem);
  const Params& params = launch.params;
  const int warpgroup = warp_uniform(thread_index() / 128), warp = warp_uniform(thread_index() / 32 % 4);
  if (thread_index() == 0) {
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) smem.q_ring[consumer].init(4);
    smem.k_ring.init(4 * CONSUMERS);
    smem.v_ring.init(4 * CONSUMERS);
    fence_mbarrier_init();
  }
  sync_block();  // the rings are there
  if (warpgroup == 0) {
    setmaxnreg_dec<SENDER_REGISTERS>();
    if (lane_index() != 0) return;
    if (warp == 0) send_keys(params, params.k, launch.map_k, smem.k, smem.k_ring);
    if (warp == 1) send_keys(params, params.v, launch.map_v, smem.v, smem.v_ring);
    if (warp == 2) send_queries(params, launch.map_q, smem);
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume(params, smem, warpgroup - 1);
  }
}

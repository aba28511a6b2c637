// Forward in float32 on Hopper: out = softmax(scale * q k^T) v and lse; products by wgmma, of three bfloat16 parts
// (parts.cuh).
//
// A thread block owns BLOCK_M queries of one head. Warpgroup 0 makes the parts: it reads K and V from global memory,
// any strides, and writes them, split, to where wgmma wants them. Each of the other warpgroups, two consumers, owns 64
// of the queries, of which it splits Q itself; S, P and O never leave its registers.
//
//     one turn, key block n:   K(n) is made     acc_s = Q K(n)^T          six products, the small ones first
//                              softmax          P as three parts; acc_o is to shrink
//                              V(n) is made     acc_pv = P V(n)           six products
//                                               acc_o = shrink acc_o + acc_pv
//
// The tensor cores cut off where float32 additions round: their sums end with the block. Consumers issue in turn, so
// that one is at its softmax while the other's products run.
//
//     shared memory:   q  2 x 3 x (64, HEAD_DIM)   |  NUM_STAGES slots: K or V, 3 x (BLOCK_N, width)  |  the ring
//     order of tiles:  K(0) V(0) K(1) V(1) ...
//     who arrives:     full   4 maker warps, once their writes are seen by the tensor cores
//                      empty  the 8 warps of both consumers
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "block_walk.cuh"
#include "score.cuh"
#include "params_sm90.cuh"
#include "tile_sm90.cuh"
#include "parts.cuh"
#include "softmax.cuh"
#include "fragment_pairs.cuh"

constexpr int WARPGROUP = 128;  // threads
static_assert(BLOCK_M == 128 && NUM_WARPS == 12, "two consumers, and a warpgroup that makes the parts");
static_assert(BLOCK_N % 16 == 0, "P is an operand of whole steps of 16 keys");
static_assert(NUM_STAGES >= 2, "K and V of a block are in two slots");
constexpr int MAKER_REGISTERS = 88, CONSUMER_REGISTERS = 208;
static_assert(MAKER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * (65536 / (32 * NUM_WARPS) / 8 * 8), "registers");

template <int ROWS, int COLS>
struct Parts {
  SwizzledTile<ROWS, COLS> part[3];
};
union Slot {
  Parts<BLOCK_N, HEAD_DIM> k;
  Parts<BLOCK_N, HEAD_DIM_V> v;
};
struct Smem {
  Parts<64, HEAD_DIM> q[2];
  Slot slot[NUM_STAGES];
  Ring<NUM_STAGES> ring;
};
constexpr int SMEM_BYTES = sizeof(Smem);

// Named barriers; 0 is sync_block()'s. Of each consumer: it may issue its products.
constexpr int TURN = 1;

// ---- parts

// Eight columns of a row of a tile, which are 16 bytes of each part.
template <int ROWS, int COLS>
__device__ __forceinline__ void store_parts(Parts<ROWS, COLS>& tile, int row, int col, const float (&x)[8]) {
  unsigned part[3][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) split(part[0][i], part[1][i], part[2][i], x[2 * i], x[2 * i + 1]);
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    Bfloat16* to = &tile.part[p].at[col / 64][row][(col % 64 / 8 ^ row % 8) * 8];  // as a tensor copy swizzles
    const Vector<unsigned, 4> words = {{part[p][0], part[p][1], part[p][2], part[p][3]}};
    store_shared(reinterpret_cast<unsigned*>(to), words);
  }
}

// Rows [row0, row_end) and columns [0, col_end) of a tensor, the rest of the tile zero; what lies outside is never
// read. By a warpgroup, of which LANES neighbours take a row; before_stores() waits until the tile may be written.
template <int ROWS, int COLS, typename BeforeStores>
__device__ __forceinline__ void make_parts(
    Parts<ROWS, COLS>& tile, const Rows<const float>& rows, int row0, int row_end, int col_end,
    const BeforeStores& before_stores) {
  constexpr int LANES = POWER_IN<COLS / 8, 16>, ACROSS = COLS / 8 / LANES;  // eight columns each, so many times
  constexpr int ROW_STEP = WARPGROUP / LANES, DOWN = ceil_div(ROWS, ROW_STEP);
  constexpr int EACH = smaller(DOWN, ACROSS >= 6 ? 1 : 6 / ACROSS), ROUNDS = ceil_div(DOWN, EACH);  // loaded at once
  const int thread = static_cast<int>(thread_index_again() % WARPGROUP), col = thread % LANES * 8;
  const bool vectors = rows.vectors && col_end % 4 == 0;
  int row = thread / LANES;
  const float* from = rows.at(row0 + row, col);
  const auto missing = [&](int ahead) ALWAYS_INLINE { return ROWS % (EACH * ROW_STEP) && row + ahead >= ROWS; };
#pragma unroll 1
  for (int round = 0; round < ROUNDS; ++round) {
    float x[EACH][ACROSS][8];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const bool inside = !missing(i * ROW_STEP) && row + i * ROW_STEP < row_end - row0;
#pragma unroll
      for (int k = 0; k < ACROSS; ++k) {
        const int left = inside ? col_end - col - 8 * LANES * k : 0;  // columns
        if (vectors) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Vector<float, 4> four = {{0, 0, 0, 0}};
            if (left > 4 * half) four = load_global<4>(from + 8 * LANES * k + 4 * half);
#pragma unroll
            for (int e = 0; e < 4; ++e) x[i][k][4 * half + e] = four.at[e];
          }
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const float* one = from + (8 * LANES * k + e) * rows.col_stride;
            x[i][k][e] = left > e ? load_global<1>(one).at[0] : 0.0f;
          }
        }
      }
      from += ROW_STEP * rows.row_stride;
    }
    if (round == 0) before_stores();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      if (missing(i * ROW_STEP)) continue;
#pragma unroll
      for (int k = 0; k < ACROSS; ++k) store_parts(tile, row + i * ROW_STEP, col + 8 * LANES * k, x[i][k]);
    }
    row += EACH * ROW_STEP;
  }
  fence_proxy_async_shared();  // wgmma reads by another way than these stores go
}

// What all warpgroups must agree on.
struct Job {
  Work work;
  Sequence seq;
  Mask mask;
  BlockWalk walk;
  BlockRange blocks;  // of keys, for both consumers
  int m0;

  __device__ __forceinline__ Job(const Params& params, const Work& given)
      : work(given),
        seq(sequence_of(params, given.batch)),
        mask(mask_of(params, seq)),
        walk(key_walk(params, seq, given.head, given.block)),
        m0(given.block * BLOCK_M) {
    blocks = walk.within(mask.key_blocks(m0, BLOCK_M));
    blocks.begin = warp_uniform(blocks.begin);
    blocks.full_begin = warp_uniform(blocks.full_begin);
    blocks.full_end = warp_uniform(blocks.full_end);
    blocks.end = warp_uniform(blocks.end);
  }
};

// ---- the makers

__device__ __forceinline__ void make_keys(const Params& params, Smem& smem, const Job& job) {
  const int head_k = job.work.head / (params.num_heads / params.num_heads_k);
  const auto k = rows_of<const float>(params.k, job.seq.batch_index, head_k);  // (seqlen_k, head_dim)
  const auto v = rows_of<const float>(params.v, job.seq.batch_index, head_k);  // (seqlen_k, head_dim_v)
  Turn<NUM_STAGES> turn;
  const auto free = [&]() ALWAYS_INLINE { smem.ring.await_free(turn); };
  const auto hand_over = [&]() ALWAYS_INLINE {
    sync_warp();  // all lanes have written
    smem.ring.hand_over(turn);
    turn.advance();
  };
  walk_up(job.walk, job.blocks, [&](int n_block, bool) ALWAYS_INLINE {
    make_parts(smem.slot[turn.slot].k, k, n_block * BLOCK_N, job.seq.seqlen_k, params.head_dim, free);
    hand_over();
    make_parts(smem.slot[turn.slot].v, v, n_block * BLOCK_N, job.seq.seqlen_k, params.head_dim_v, free);
    hand_over();
  });
}

// ---- a consumer

// Whoever has issued its products lets the other go.
__device__ __forceinline__ void take_turn(int consumer) { barrier_sync(TURN + consumer, 2 * WARPGROUP); }
__device__ __forceinline__ void pass_turn(int consumer) { barrier_arrive(TURN + 1 - consumer, 2 * WARPGROUP); }

// acc_s = Q K^T. Issued, not waited for.
__device__ __forceinline__ void score_tile(
    Fragment<BLOCK_N>& acc_s, const Parts<64, HEAD_DIM>& q, const Parts<BLOCK_N, HEAD_DIM>& k) {
  constexpr int STEPS = HEAD_DIM / 16;
#pragma unroll
  for (int i = 0; i < PRODUCTS; ++i) {
    const auto a = not_kept(operand<Major::K>(q.part[left_part(i)]));
    const auto b = not_kept(operand<Major::K>(k.part[right_part(i)]));
    if (i == 0) {
      product<STEPS>(acc_s, a, b);
    } else {
      add_product<STEPS>(acc_s, a, b);
    }
  }
}

// acc = P V. Issued, not waited for.
__device__ __forceinline__ void multiply_pv(
    Fragment<HEAD_DIM_V>& acc, const unsigned (&p)[3][BLOCK_N / 16][4], const Parts<BLOCK_N, HEAD_DIM_V>& v) {
#pragma unroll
  for (int i = 0; i < PRODUCTS; ++i) {
    const auto b = not_kept(operand<Major::MN>(v.part[right_part(i)]));
#pragma unroll
    for (int step = 0; step < BLOCK_N / 16; ++step) {
      if (i == 0 && step == 0) {
        wgmma_first_rs<Factor, Major::MN>(acc.at, p[left_part(i)][step], b.at(step));
      } else {
        wgmma_rs<Factor, Major::MN>(acc.at, p[left_part(i)][step], b.at(step));
      }
    }
  }
}

__device__ __forceinline__ void consume(const Params& params, Smem& smem, const Job& job, int consumer) {
  const Score score = score_of(params);
  const Features features(params, job.seq, job.work.head);
  const int row0 = job.m0 + 64 * consumer;
  Fragment<BLOCK_N> acc_s;         // (64, BLOCK_N): products, logits, P
  Fragment<HEAD_DIM_V> acc_o[1];   // (64, HEAD_DIM_V)
  Fragment<HEAD_DIM_V> acc_pv;     // of one block
  unsigned p[3][BLOCK_N / 16][4];  // the parts of P
  Softmax<2> softmax;
  Turn<NUM_STAGES> turn;
  softmax.clear();
  clear(acc_o[0]);

  const auto step = [&](int n_block, bool masked) ALWAYS_INLINE {
    smem.ring.await(turn);
    take_turn(consumer);
    wgmma_fence();
    score_tile(acc_s, smem.q[consumer], smem.slot[turn.slot].k);
    wgmma_commit();
    pass_turn(consumer);
    const int i = row0 + acc_s.row(0), j = n_block * BLOCK_N + acc_s.first_col();
    const FragmentPairs<RowIs::QUERY, BLOCK_N> pairs(features.added, i, j);
    const FragmentBits<RowIs::QUERY, BLOCK_N> bits(features, job.mask, i, j, masked);
    wgmma_wait<0>();
    wgmma_hold(acc_s.at);
    smem.ring.release(turn);
    turn.advance();

    const auto at = [&](int r, int c) ALWAYS_INLINE { return pairs.at(features.added, r, c); };
    to_logits(acc_s, score, features, at);
    if (masked) {
      const MaskRow row[2] = {job.mask.row(i, j), job.mask.row(i + 8, j)};
      hide(acc_s, [&](int r, int c) {
        const bool visible = row[r].visible(acc_s.ahead(c));
        return HIDES_PAIRS ? visible && bits.shown(r, c) && features.accepts(job.mask, at(r, c)) : visible;
      });
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax.raise(acc_s, r, score);
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax.weigh(acc_s, r, score);
    drop(acc_s, bits.kept);
#pragma unroll
    for (int e = 0; e < BLOCK_N / 4; ++e) {
      split(p[0][e / 4][e % 4], p[1][e / 4][e % 4], p[2][e / 4][e % 4], acc_s.at[2 * e], acc_s.at[2 * e + 1]);
    }

    smem.ring.await(turn);
    take_turn(consumer);
    wgmma_fence();
    multiply_pv(acc_pv, p, smem.slot[turn.slot].v);
    wgmma_commit();
    pass_turn(consumer);
    wgmma_wait<0>();
    wgmma_hold(acc_pv.at);
    smem.ring.release(turn);
    turn.advance();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < acc_pv.COLS; ++c) {
        acc_o[0](r, c) = math::fma(acc_o[0](r, c), softmax.shrink[r], acc_pv(r, c));
      }
    }
  };

  if (job.blocks.begin < job.blocks.end) {
    const auto q = rows_of<const float>(params.q, job.seq.batch_index, job.work.head);  // (seqlen_q, head_dim)
    make_parts(smem.q[consumer], q, row0, job.seq.seqlen_q, params.head_dim, []() {});
  }  // Q is made by all threads: they meet before its products, where they take their turn
  if (consumer == 1) pass_turn(consumer);  // the first turn is consumer 0's
  walk_up(job.walk, job.blocks, step);
  if (consumer == 0) take_turn(consumer);  // the last turn, which the other has passed

  finish(params, job.seq, job.work.head, softmax, acc_o);
  const auto out = rows_of<Output>(params.out, job.seq.batch_index, job.work.head);       // (seqlen_q, head_dim_v)
  const auto lse = rows_of<Accumulator>(params.lse, job.seq.batch_index, job.work.head);  // (seqlen_q)
  const int row_end = rows_to_write(params, job.seq);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (LENS && row0 + acc_s.row(r) >= job.seq.seqlen_q) clear_row(acc_o[0], r);
  }
  store_fragment(out, row0, row_end, params.head_dim_v, acc_o[0]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + acc_s.row(r);
    if (lane_index() % 4 == 0 && row < row_end) {
      store_number(lse, row, lse_of(softmax, r, score, !LENS || row < job.seq.seqlen_q));
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * NUM_WARPS, 1)
fwd_parts_sm90(const __grid_constant__ Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const int warpgroup = warp_uniform(thread_index() / WARPGROUP);
  const int num_blocks = ceil_div(params.seqlen_q, BLOCK_M);
  const Work work = scheduled_work(params, num_blocks, params.num_heads, Longest::LAST_BLOCK);
  if (PACKED && work.block * BLOCK_M >= sequence_of(params, work.batch).seqlen_q) return;
  if (thread_index() == 0) smem.ring.init(8, 4);
  sync_block();  // the ring is there; no copy arrives at it, so that no fence is needed
  if (warpgroup == 0) {
    setmaxnreg_dec<MAKER_REGISTERS>();
    make_keys(params, smem, Job(params, work));
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume(params, smem, Job(params, work), warpgroup - 1);
  }
}

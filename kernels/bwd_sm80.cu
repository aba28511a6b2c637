// Backward on tensor cores since Ampere: dq, dk and dv in one pass over the scores; tiles come by cp.async, products by
// mma.sync.
//
// A thread block owns BLOCK_N keys of one kv head. It walks the query heads that read this kv head, in order, and of
// each the query tiles that see its keys, from the last to the first; dk and dv add up in registers. Scores are
// transposed: a row belongs to a key. The keys are dealt out to GROUPS of two warps, 16 * FRAGMENTS to each; of a
// group one warp makes P and dv, the other one dS and dk. So each holds one of the two sums, and has rows enough to
// use what it reads twice. A tile of 128 queries goes from one to the other in two PARTS: one is made while the other
// is used.
//
//     one turn, query tile m:    values warp                      keys warp
//                                S^T  = K Q(m)^T                  dP^T = V dO(m)^T
//                                P^T  = exp2(S^T - lse)
//                                     P^T, float32      ------->  dS^T = P^T * (dP^T - delta)
//                                dV  += P^T dO(m)                 dK  += dS^T Q(m)
//                                     all warps         <-------  dS^T, rounded
//                                dQ   = dS K, dealt out in UNITS of queries and columns to all warps
//
// A fixed order (DETERMINISTIC): a unit of dQ is the sum over key blocks in ascending order. The tile's semaphore
// counts the blocks that have added theirs; the first stores, the last adds the sum to its own numbers, scales,
// rounds and writes dq. A block takes a ticket before it begins, and waits only for blocks of the same head with
// lower tickets, which have begun too: whoever holds the lowest unfinished ticket waits for nobody, whichever blocks
// are resident. Otherwise all add in the order of arrival, and who arrives last writes dq.
//
// SPLIT_P: P and dS are each the sum of two 16-bit numbers, and products take both. A power of 2 before the rounding
// keeps them in float16's range: of P always the same; of dS one that the largest dS so far asks for, the keys' warps
// tell each other (DsRange).
//
//     shared memory:   k (BLOCK_N, HEAD_DIM)   v (BLOCK_N, HEAD_DIM_V)   ds (BLOCK_N, BLOCK_M)   p, as lanes hold it
//                      q, dout  2 x (BLOCK_M, width), and lse, delta of their rows
//     who waits:       all, once a turn: the next tiles have come, the last ones are read
//                      a keys warp for P of its group; all for dS
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
#include "gradients.cuh"

static_assert(NUM_STAGES == 2, "one tile of queries is worked on while the next arrives");
constexpr int GROUPS = NUM_WARPS / 2, FRAGMENTS = BLOCK_N / (16 * GROUPS);  // of 16 keys, a group
static_assert(NUM_WARPS == 2 * GROUPS && BLOCK_N == 16 * GROUPS * FRAGMENTS, "keys are dealt out in sixteens");
static_assert(BLOCK_M % 16 == 0, "products sum over queries in steps of 16");
static_assert(BLOCK_M <= NUM_THREADS, "half of the threads send for lse and delta of a tile, four numbers each");

constexpr bool WANT_DS = WANT_DQ || WANT_DK;

// A tile's queries are worked on in PARTS: P of one is handed over while the other is made, and registers hold one.
constexpr int PART_M = BLOCK_M % 64 == 0 ? 64 : BLOCK_M, PARTS = BLOCK_M / PART_M;

// dQ of a tile in units of UNIT_ROWS queries and UNIT_COLS columns: as large as the registers allow that dv or dk
// leave, 16 or 32, and as leaves every warp one, since a larger one reads less for what it computes.
constexpr __device__ __forceinline__ int units_of(int rows, int cols) { return BLOCK_M / rows * (HEAD_DIM / cols); }
constexpr __device__ __forceinline__ int unit_cols_of(int rows) {
  int cols = smaller(POWER_IN<HEAD_DIM, 64>, (FRAGMENTS > 1 && HEAD_DIM + HEAD_DIM_V > 128 ? 512 : 1024) / rows);
  while (cols > 16 && units_of(rows, cols) < NUM_WARPS) cols /= 2;
  return cols;
}
constexpr int UNIT_ROWS = BLOCK_M % 32 == 0 && units_of(32, unit_cols_of(32)) >= NUM_WARPS ? 32 : 16;
constexpr int UNIT_COLS = unit_cols_of(UNIT_ROWS), UNITS = units_of(UNIT_ROWS, UNIT_COLS);
constexpr int UNIT_FRAGMENTS = UNIT_ROWS / 16;

// Named barriers; 0 is sync_block()'s. P goes from warp to warp by parts or, where there is one, by fragments: piece i
// of group g has HANDED_OVER + PIECES * g + i.
constexpr int PIECES = PARTS > 1 ? PARTS : FRAGMENTS;
constexpr int NEXT_TURN = 1, SCORES_READY = 2, KEYS_WARPS = 3, HANDED_OVER = 4;
static_assert(HANDED_OVER + GROUPS * PIECES <= 16, "there are 16 named barriers");

// What this thread block works on: worked out once, by one thread, and read from shared memory, since what all turns
// have in common would fill the registers.
struct Job : FullEndOf<CUT_AT_BEGIN> {
  Sequence seq;
  int n_block, head_k;
  int first_head, heads;       // that read head_k
  int begin, full_begin, end;  // query tiles; unmasked from full_begin on
  // Of the first head.
  Rows<const Element> q, dout;
  int q_bytes, dout_bytes;  // that can be copied as one
  const Accumulator *exponents, *delta;
  Rows<Gradient_q> dq;
  float* dq_sums;
  int* semaphores;
  Score score;

  __device__ __forceinline__ void describe(const Params& params, int ticket) {
    TileWalk walk(params, ceil_div(params.seqlen_k, BLOCK_N), params.num_heads_k);
    walk.index = ticket;
    const Work work = walk.work(Longest::FIRST_BLOCK);
    seq = sequence_of(params, work.batch);
    score = score_of(params);
    n_block = work.block;
    head_k = work.head;
    heads = params.num_heads / params.num_heads_k;
    first_head = work.head * heads;
    const BlockRange blocks = mask_of(params, seq).query_blocks(n_block);
    begin = blocks.begin;
    end = blocks.end;
    end_whole_tiles(blocks.full_end);
    // Keys beyond the end are masked in every turn: their logit of 0 may be far above lse.
    full_begin = seq.seqlen_k - BLOCK_N < n_block * BLOCK_N ? blocks.end : blocks.full_begin;
    const auto place = [&](const Tensor& tensor) ALWAYS_INLINE {
      return entry_offset(tensor, seq.batch_index) + first_head * tensor.head_stride;
    };
    q = rows_of<const Element>(params.q, seq.batch_index, first_head);           // (seqlen_q, head_dim)
    dout = rows_of<const Element>(params.dout, seq.batch_index, first_head);     // (seqlen_q, head_dim_v)
    q_bytes = bytes_at_a_time(PackedRows<const Element>{q, params.q.head_stride, heads});
    dout_bytes = bytes_at_a_time(PackedRows<const Element>{dout, params.dout.head_stride, heads});
    exponents = static_cast<const Accumulator*>(params.exponents.data) + place(params.exponents);  // (m_block, BLOCK_M)
    delta = static_cast<const Accumulator*>(params.delta.data) + place(params.delta);              // (m_block, BLOCK_M)
    dq = rows_of<Gradient_q>(params.dq, seq.batch_index, first_head);            // (seqlen_q, head_dim)
    dq_sums = static_cast<float*>(params.dq_sums.data) + place(params.dq_sums);  // (m_block, BLOCK_M * HEAD_DIM)
    semaphores = static_cast<int*>(params.semaphores.data) + place(params.semaphores);  // (m_block, one or NUM_WARPS)
  }
};

#include "job_turns.cuh"

// A unit of dQ, see add_dq().
using Unit = Fragment<UNIT_COLS>[UNIT_FRAGMENTS];

// SPLIT_P, float16: a power of 2 that dS is multiplied by. Its exponent falls with the largest |dS| that this thread
// block has met, which becomes less than 2^15 and, where it fell, at least 2^14: what second parts lose below the least
// float16, 2^-24, is at most 2^-39 of that largest one. A base of Smem, since it takes no room when empty: it is, where
// dS needs no such thing.
constexpr bool SCALES_DS = SPLIT_P && P_FACTOR != 1;
constexpr int FIRST_EXPONENT = 60;  // dS of at most 2^-45 all along may lose 2^-85

// Of at least -126: what is so much smaller than what comes to it may be larger than it was.
__device__ __forceinline__ float power_of_2(int exponent) {
  return __uint_as_float(static_cast<unsigned>((exponent < -126 ? -126 : exponent) + 127) << 23);
}

template <bool ON>
struct DsRange {
  template <int R>
  __device__ __forceinline__ void fit(Fragment<PART_M> (&)[R], Fragment<HEAD_DIM> (&)[R], int&, int) {}
  __device__ __forceinline__ void restore(Unit&, int) const {}
};
template <>
struct DsRange<true> {
  unsigned largest[2][GROUPS];  // the bits of each keys warp's largest |dS| of a part, in two places by turns
  float restoring[PARTS];       // of a part's dS: what takes the power of 2 away again

  // ds of a part is multiplied, and so is the dK of the parts before, where the exponent falls; it is the same in all
  // keys warps. NaN does not count. Infinity leaves the exponent as it is, which may make other rows' dS NaN; if it
  // counted, they would become 0.
  template <int R>
  __device__ __forceinline__ void fit(
      Fragment<PART_M> (&ds)[R], Fragment<HEAD_DIM> (&acc_dk)[R], int& exponent, int part) {
    float most = 0;
#pragma unroll
    for (int f = 0; f < R; ++f) {
#pragma unroll
      for (int i = 0; i < PART_M / 2; ++i) most = math::max(most, ds[f].at[i] < 0 ? -ds[f].at[i] : ds[f].at[i]);
    }
    // Of numbers that are not negative, the larger has the larger bits; warp_uniform() is the largest lane's.
    const unsigned bits = warp_uniform(__float_as_uint(most));
    const int warp = warp_uniform(thread_index() / 32 % GROUPS);
    unsigned(&place)[GROUPS] = largest[part % 2];  // that of the part before may still be read
    if (lane_index() == 0) store_shared(&place[warp], Vector<unsigned, 1>{{bits}});
    barrier_sync(KEYS_WARPS, NUM_THREADS / 2);  // those of all keys warps are there, those of the part before are read
    const int before = exponent;
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
      // A number of the biased exponent b is less than 2^(b - 126); of 255 it is infinity.
      const int biased = static_cast<int>(load_shared<1>(&place[i]).at[0] >> 23);
      if (biased < 255) exponent = smaller(exponent, 15 + 126 - biased);
    }
    if (exponent != before) multiply_all(acc_dk, power_of_2(exponent - before));
    multiply_all(ds, power_of_2(exponent));
    if (thread_index_again() == NUM_THREADS / 2) restoring[part] = power_of_2(-exponent);
  }
  __device__ __forceinline__ void restore(Unit& dq, int row0) const { multiply_all(dq, restoring[row0 / PART_M]); }
};
static_assert(PART_M % UNIT_ROWS == 0, "a unit of dQ has rows of one part");

struct Smem : DsRange<SCALES_DS> {
  SwizzledTile<BLOCK_N, HEAD_DIM> k;
  SwizzledTile<BLOCK_N, HEAD_DIM_V> v;
  SwizzledTile<BLOCK_M, HEAD_DIM> q[2];
  SwizzledTile<BLOCK_M, HEAD_DIM_V> dout[2];
  SwizzledTile<BLOCK_N, BLOCK_M> ds[SPLIT_P ? 2 : 1];                 // dS^T, rounded; its second part
  // P^T, as the lanes of a values warp hold it.
  alignas(16) Accumulator p[GROUPS][PARTS][FRAGMENTS * PART_M / 8][32][4];
  alignas(16) Accumulator exponents[2][BLOCK_M], delta[2][BLOCK_M];
  int* added;  // the semaphore that has still to be told of a turn
  Job job;
};
constexpr int SMEM_BYTES = sizeof(Smem);

// ---- loads

// The numbers of a tile's rows, which bwd_delta has padded to whole tiles, 16 bytes a thread.
__device__ __forceinline__ void load_numbers(Accumulator (&numbers)[BLOCK_M], const Accumulator* from, int thread) {
  const int first = 4 * thread;
  if (first >= 0 && first < BLOCK_M) cp_async<16>(shared_address(&numbers[first]), from + first);
}

// By THREADS threads of the block; the first ones also send for lse and delta.
template <int THREADS>
__device__ __forceinline__ void load_queries(const Params& params, Smem& smem, const TurnOf& turn) {
  const Job& job = smem.job;
  const int row0 = turn.m_block * BLOCK_M, row_end = job.seq.seqlen_q;
  Rows<const Element> q = job.q, dout = job.dout;
  q.data += turn.head * params.q.head_stride;
  dout.data += turn.head * params.dout.head_stride;
  load_tile<THREADS>(smem.q[turn.slot], q, job.q_bytes, row0, row_end, params.head_dim);
  load_tile<THREADS>(smem.dout[turn.slot], dout, job.dout_bytes, row0, row_end, params.head_dim_v);
  const int thread = thread_index_again() % THREADS;
  load_numbers(smem.exponents[turn.slot], job.exponents + turn.head * params.exponents.head_stride + row0, thread);
  load_numbers(
      smem.delta[turn.slot], job.delta + turn.head * params.delta.head_stride + row0, thread - BLOCK_M / 4);
}

// By the whole block.
__device__ __forceinline__ void load_keys(const Params& params, Smem& smem) {
  const Job& job = smem.job;
  const int row0 = job.n_block * BLOCK_N;
  const auto k = rows_of<const Element>(params.k, job.seq.batch_index, job.head_k);  // (seqlen_k, head_dim)
  const auto v = rows_of<const Element>(params.v, job.seq.batch_index, job.head_k);  // (seqlen_k, head_dim_v)
  load_tile(smem.k, k, bytes_at_a_time(k), row0, job.seq.seqlen_k, params.head_dim);
  load_tile(smem.v, v, bytes_at_a_time(v), row0, job.seq.seqlen_k, params.head_dim_v);
}

// ---- dQ

// A unit, whole: scaled, rounded, to its rows and columns of dq.
__device__ __forceinline__ void store_unit(
    const Params& params, const Job& job, const TurnOf& turn, int row0, int col0,
    Fragment<UNIT_COLS> (&dq)[UNIT_FRAGMENTS]) {
  auto rows = job.dq;
  rows.data = rows.at(0, col0) + turn.head * params.dq.head_stride;
  const Accumulator factor = job.score.gradient;
#pragma unroll
  for (int f = 0; f < UNIT_FRAGMENTS; ++f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      multiply_row(dq[f], r, factor);
      const int row = turn.m_block * BLOCK_M + row0 + 16 * f + dq[f].warp_row(r);
      if (LENS && row >= job.seq.seqlen_q) clear_row(dq[f], r);
      store_row(rows, row, rows_to_write(params, job.seq), params.head_dim - col0, dq[f], r);
    }
  }
}

// How many key blocks have added their parts of a tile.
__device__ __forceinline__ int* semaphore_of(const Params& params, const Job& job, const TurnOf& turn) {
  return job.semaphores + turn.head * params.semaphores.head_stride + turn.m_block;
}

// The order of the sums is kept by one lane of the first keys warp, where that would wait for P anyway: to tell is to
// wait until memory has what was written, and to learn takes as long as a load.
//
// The key block above may go on: behind the barrier that ended the turn before, and at the end.
__device__ __forceinline__ void tell_block_above(Smem& smem) {
  if constexpr (!DETERMINISTIC) return;
  if (thread_index_again() != NUM_THREADS / 2) return;
  if (smem.added != nullptr) add_release(smem.added, 1);
}
// The key blocks below have added theirs: before the barriers that all pass before they add.
__device__ __forceinline__ void await_blocks_below(const Params& params, Smem& smem, const TurnOf& turn) {
  if constexpr (!DETERMINISTIC) return;
  if (thread_index_again() != NUM_THREADS / 2) return;
  const Job& job = smem.job;
  const Adders adders(params, job, turn);
  int* semaphore = semaphore_of(params, job, turn);
  smem.added = job.n_block == adders.range.end - 1 ? nullptr : semaphore;
  const int below = adders.below(job.n_block);
  while (load_acquire(semaphore) < below) {}
}

// A unit in dq_sums, this thread's numbers of it.
__device__ __forceinline__ void store_unit_parts(float* sums, const Unit& dq) {
#pragma unroll
  for (int f = 0; f < UNIT_FRAGMENTS; ++f) store_part<32>(sums + f * 16 * UNIT_COLS, dq[f]);
}
__device__ __forceinline__ void add_to_unit_parts(float* sums, const Unit& dq) {
#pragma unroll
  for (int f = 0; f < UNIT_FRAGMENTS; ++f) add_to_part<32>(sums + f * 16 * UNIT_COLS, dq[f]);
}
__device__ __forceinline__ void add_unit_parts(Unit& dq, const float* sums) {
#pragma unroll
  for (int f = 0; f < UNIT_FRAGMENTS; ++f) add_part<32>(dq[f], sums + f * 16 * UNIT_COLS);
}

// dQ = dS K, this warp's units of it, which join those of other key blocks.
__device__ __forceinline__ void add_dq(
    const Params& params, Smem& smem, const TurnOf& turn, const Adders& adders) {
  constexpr int DOWN = BLOCK_M / UNIT_ROWS;
  const int warp = thread_index_again() / 32u;
  const Job& job = smem.job;
  const bool first = job.n_block == adders.range.begin, last = job.n_block == adders.range.end - 1;
  float* const sums = job.dq_sums + turn.head * params.dq_sums.head_stride + turn.m_block * params.dq_sums.row_stride +
                      4 * (thread_index_again() % 32u);
  Unit dq;
#pragma unroll 1
  for (int unit = warp; unit < UNITS; unit += NUM_WARPS) {
    const int row0 = unit % DOWN * UNIT_ROWS, col0 = unit / DOWN * UNIT_COLS;
    float* const here = sums + unit * UNIT_ROWS * UNIT_COLS;
    clear(dq);
    const auto high = operand<Side::LEFT, Major::MN>(smem.ds[0], 0, row0);
    const auto low = operand<Side::LEFT, Major::MN>(smem.ds[SPLIT_P ? 1 : 0], 0, row0);
    const auto ds = with_low_part<UNIT_FRAGMENTS>(high, low);
    add_product<BLOCK_N / 16>(dq, ds, operand<Side::RIGHT, Major::MN>(smem.k, 0, col0));
    smem.restore(dq, row0);
    if (DETERMINISTIC && last) {
      if (!first) add_unit_parts(dq, here);
      store_unit(params, job, turn, row0, col0, dq);
    } else if (DETERMINISTIC && first) {
      store_unit_parts(here, dq);
    } else {
      add_to_unit_parts(here, dq);
    }
  }
  if constexpr (DETERMINISTIC) return;
  sync_warp();  // all lanes have added: one may say so
  // A tile has one semaphore for each warp then: of its units.
  int* arrivals = semaphore_of(params, job, turn) + turn.m_block * (NUM_WARPS - 1) + warp;
  int before = 0;
  if (lane_index() == 0) before = add_acquire_release(arrivals, 1);
  if (!warp_any(before == adders.below(adders.range.end) - 1)) return;  // of one block all lanes say so
  sync_warp();  // all lanes know
#pragma unroll 1
  for (int unit = warp; unit < UNITS; unit += NUM_WARPS) {
    clear(dq);
    add_unit_parts(dq, sums + unit * UNIT_ROWS * UNIT_COLS);
    store_unit(params, job, turn, unit % DOWN * UNIT_ROWS, unit / DOWN * UNIT_COLS, dq);
  }
}

// ---- the two warps of a group

// First key of a group's fragment, in the block.
__device__ __forceinline__ int fragment_key(int fragment) {
  return (thread_index_again() / 32u % GROUPS * FRAGMENTS + fragment) * 16;
}

__device__ __forceinline__ Seen seen_by(
    const Params& params, const Job& job, const TurnOf& turn, int part, int fragment) {
  const int key = job.n_block * BLOCK_N + fragment_key(fragment) + Fragment<8>::warp_row(0);
  return {params, job.seq, job.first_head + turn.head, key, turn.m_block * BLOCK_M + part * PART_M};
}

// All turns of the job: step(turn, masked), with its tiles in shared memory. LOADS: these warps send for the next ones.
template <bool LOADS, typename Step>
__device__ __forceinline__ void for_each_turn(const Params& params, Smem& smem, Step step) {
  const int full_begin = warp_uniform(smem.job.full_begin);
  const int full_end = CUT_AT_BEGIN ? warp_uniform(smem.job.whole_tiles_end()) : 0;
  TurnOf turn(params, smem.job);
#pragma unroll 1
  while (turn.exists(smem.job)) {
    cp_async_wait<0>();
    // This turn's tiles are there, those of the turn before are read, and so are ds and p.
    barrier_sync(NEXT_TURN, NUM_THREADS);
    if constexpr (LOADS) {
      TurnOf next = turn;
      next.advance(params, smem.job);
      if (next.exists(smem.job)) load_queries<NUM_THREADS / 2>(params, smem, next);
    }
    cp_async_commit();
    const bool whole = !HIDES_PAIRS || warp_any(turn.walk(params, smem.job).whole(turn.m_block));
    if (whole && turn.m_block >= full_begin && (!CUT_AT_BEGIN || turn.m_block < full_end)) {
      step(turn, UNMASKED);
    } else {
      step(turn, MASKED);
    }
    turn.advance(params, smem.job);
  }
}

// A gradient of keys, times a factor, to its rows.
template <int N>
__device__ __forceinline__ void store_keys(
    const Params& params, const Tensor& tensor, const Job& job, int col_end, Accumulator factor,
    Fragment<N> (&gradient)[FRAGMENTS]) {
  const auto rows = rows_of<Gradient>(tensor, job.seq.batch_index, job.head_k);  // (seqlen_k, columns)
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = job.n_block * BLOCK_N + fragment_key(f) + gradient[f].warp_row(r);
      multiply_row(gradient[f], r, factor);
      if (LENS && row >= job.seq.seqlen_k) clear_row(gradient[f], r);
      store_row(rows, row, keys_to_write(params, job.seq), col_end, gradient[f], r);
    }
  }
}

// P^T, and dV.
__device__ __forceinline__ void make_values(const Params& params, Smem& smem) {
  const Job& job = smem.job;
  const int group = warp_uniform(thread_index() / 32 % GROUPS);
  Fragment<HEAD_DIM_V> acc_dv[FRAGMENTS];
  clear(acc_dv);
  for_each_turn<false>(params, smem, [&](const TurnOf& turn, bool masked) ALWAYS_INLINE {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      Fragment<PART_M> acc[FRAGMENTS];
      unsigned p[FRAGMENTS][PART_M / 16][4], p_low[FRAGMENTS][PART_M / 16][4];
      // S^T = K Q^T
      clear(acc);
      const auto k = operand<Side::LEFT, Major::K>(smem.k, fragment_key(0));
      add_product<HEAD_DIM / 16>(acc, k, operand<Side::RIGHT, Major::K>(smem.q[turn.slot], part * PART_M));
      // P^T = exp2(S^T - lse)
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) {
        const Seen seen = seen_by(params, job, turn, part, f);
        to_probabilities(
            acc[f], p[f], p_low[f], job.score, &smem.exponents[turn.slot][part * PART_M], seen,
            seen.bits<PART_M>(masked), masked);
        if constexpr (WANT_DS) {
#pragma unroll
          for (int i = 0; i < PART_M / 8; ++i) {
            const float* at = acc[f].at + 4 * i;
            store_shared(smem.p[group][part][f * PART_M / 8 + i][lane_index()],
                         Vector<Accumulator, 4>{{at[0], at[1], at[2], at[3]}});
          }
          if (PARTS == 1 || f == FRAGMENTS - 1) {
            barrier_arrive(HANDED_OVER + PIECES * group + (PARTS == 1 ? f : part), 64);
          }
        }
        if constexpr (!WEIGHTS_APART) {
          if constexpr (P_FACTOR != 1) multiply_all(acc[f], P_FACTOR);
          round_to(p[f], p_low[f], acc[f]);
        }
      }
      // dV += P^T dO
      if constexpr (WANT_DV) {
        const auto dout = operand<Side::RIGHT, Major::MN>(smem.dout[turn.slot], part * PART_M);
        const auto both = with_low_part<FRAGMENTS>(in_registers(p), in_registers(p_low));
        add_product<PART_M / 16>(acc_dv, both, dout);
      }
    }
    if constexpr (WANT_DQ) {
      const Adders adders(params, job, turn);
      barrier_sync(SCORES_READY, NUM_THREADS);
      add_dq(params, smem, turn, adders);
    }
  });
  barrier_arrive(NEXT_TURN, NUM_THREADS);
  if constexpr (WANT_DV) store_keys(params, params.dv, job, params.head_dim_v, factor_of_sums(params), acc_dv);
}

// dS^T, and dK.
__device__ __forceinline__ void make_keys(const Params& params, Smem& smem) {
  const Job& job = smem.job;
  const int group = warp_uniform(thread_index() / 32 % GROUPS);
  Fragment<HEAD_DIM> acc_dk[FRAGMENTS];
  clear(acc_dk);
  int exponent = FIRST_EXPONENT;  // SCALES_DS: of the power of 2 that acc_dk is multiplied by
  for_each_turn<true>(params, smem, [&](const TurnOf& turn, bool masked) ALWAYS_INLINE {
    if constexpr (!WANT_DS) return;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      Fragment<PART_M> acc[FRAGMENTS];
      unsigned ds[FRAGMENTS][PART_M / 16][4], ds_low[FRAGMENTS][PART_M / 16][4];
      // dP^T = V dO^T
      clear(acc);
      const auto v = operand<Side::LEFT, Major::K>(smem.v, fragment_key(0));
      add_product<HEAD_DIM_V / 16>(acc, v, operand<Side::RIGHT, Major::K>(smem.dout[turn.slot], part * PART_M));
      if (WANT_DQ && part == 0) {
        tell_block_above(smem);
        await_blocks_below(params, smem, turn);
      }
      const auto round_ds = [&](int f) ALWAYS_INLINE {
        if constexpr (WANT_DQ) store_rounded(smem.ds, fragment_key(f), part * PART_M, acc[f]);
        round_to(ds[f], ds_low[f], acc[f]);
      };
      // dS^T = P^T * (dP^T - delta)
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) {
        if (PARTS == 1 || f == 0) barrier_sync(HANDED_OVER + PIECES * group + (PARTS == 1 ? f : part), 64);
        const auto p = [&](int c) ALWAYS_INLINE {
          return load_shared<4>(smem.p[group][part][f * PART_M / 8 + c / 2][lane_index()]);
        };
        const Accumulator* delta = &smem.delta[turn.slot][part * PART_M];
        const Seen seen = seen_by(params, job, turn, part, f);
        to_score_gradients(acc[f], p, delta, seen, seen.bits<PART_M>(masked), masked);
        if constexpr (!SCALES_DS) round_ds(f);
      }
      if constexpr (SCALES_DS) {
        smem.fit(acc, acc_dk, exponent, part);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) round_ds(f);
      }
      if (WANT_DQ && part == PARTS - 1) barrier_arrive(SCORES_READY, NUM_THREADS);
      // dK += dS^T Q
      if constexpr (WANT_DK) {
        const auto q = operand<Side::RIGHT, Major::MN>(smem.q[turn.slot], part * PART_M);
        add_product<PART_M / 16>(acc_dk, with_low_part<FRAGMENTS>(in_registers(ds), in_registers(ds_low)), q);
      }
    }
    if constexpr (WANT_DQ) {
      const Adders adders(params, job, turn);
      barrier_sync(KEYS_WARPS, NUM_THREADS / 2);  // dS of all of them is there
      add_dq(params, smem, turn, adders);
    }
  });
  barrier_sync(NEXT_TURN, NUM_THREADS);  // all have added to the last tile
  if constexpr (WANT_DQ) tell_block_above(smem);
  if constexpr (WANT_DK) {
    const Accumulator factor = SCALES_DS ? job.score.gradient * power_of_2(-exponent) : job.score.gradient;
    store_keys(params, params.dk, job, params.head_dim, factor, acc_dk);
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_sm80(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  if (thread_index() == 0) smem.job.describe(params, take_ticket(static_cast<int*>(params.tickets.data)));
  if (thread_index() == 0) smem.added = nullptr;
  sync_block();  // the job is there
  if (PACKED && smem.job.n_block * BLOCK_N >= smem.job.seq.seqlen_k) return;
  const TurnOf first(params, smem.job);
  if (first.exists(smem.job)) {
    load_keys(params, smem);
    load_queries<NUM_THREADS>(params, smem, first);
  }
  cp_async_commit();
  if (warp_uniform(thread_index() / 32) < GROUPS) {
    make_values(params, smem);
  } else {
    make_keys(params, smem);
  }
}

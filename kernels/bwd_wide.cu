// Backward in float64 or float32 on tensor cores since Ampere: dq, dk and dv in one pass over the scores; tiles come by
// cp.async, products by mma.sync, of float32 in three bfloat16 parts (parts.cuh).
//
// A thread block owns BLOCK_N keys of one kv head. It walks the query heads that read this kv head, in order, and of
// each the query tiles that see its keys, from the last to the first; dk and dv add up in registers. Scores are
// transposed: a row belongs to a key. The keys are dealt out to GROUPS of two warps, 16 * FRAGMENTS to each; of a
// group one warp makes P and dv, the other one dS and dk, so that each holds one of the two sums.
//
//     one turn, query tile m:    values warp                      keys warp
//                                S^T  = K Q(m)^T                  dP^T = V dO(m)^T
//                                P^T  = exp2(S^T - lse)
//                                     P^T               ------->  dS^T = P^T * (dP^T - delta)
//                                dV  += P^T dO(m)                 dK  += dS^T Q(m)
//                                     all warps         <-------  dS^T, where P^T was
//                                dQ   = dS K, dealt out in UNITS of queries and columns to all warps
//
// A fixed order: a unit of dQ is the sum over key blocks in ascending order. The tile's semaphore counts the blocks
// that have added theirs; the first stores, the last adds the sum to its own numbers, scales and writes dq. A block
// takes a ticket before it begins, and waits only for blocks of the same head with lower tickets, which have begun too:
// whoever holds the lowest unfinished ticket waits for nobody, whichever blocks are resident.
//
//     shared memory:   k (BLOCK_N, HEAD_DIM)   v (BLOCK_N, HEAD_DIM_V)   scores (BLOCK_N, BLOCK_M)
//                      q, dout  2 x (BLOCK_M, width), and lse, delta of their rows;  float64: powers of 2
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
#include "tile_wide.cuh"
#include "exp2_table.cuh"
#include "softmax.cuh"
#include "gradients.cuh"

static_assert(NUM_STAGES == 2, "one tile of queries is worked on while the next arrives");
constexpr int GROUPS = NUM_WARPS / 2, FRAGMENTS = BLOCK_N / (16 * GROUPS);  // of 16 keys, a group
static_assert(NUM_WARPS == 2 * GROUPS && BLOCK_N == 16 * GROUPS * FRAGMENTS, "keys are dealt out in sixteens");
static_assert(BLOCK_M % 16 == 0, "products sum over queries in steps of 16");
static_assert(BLOCK_M <= CHUNK * NUM_THREADS / 4, "half of the threads send for lse and delta of a tile, a chunk each");

constexpr bool WANT_DS = WANT_DQ || WANT_DK;

// dQ of a tile in units of 16 queries and UNIT_COLS columns, as large as leaves every warp one.
constexpr __device__ __forceinline__ int units_of(int cols) { return BLOCK_M / 16 * (HEAD_DIM / cols); }
constexpr __device__ __forceinline__ int unit_cols() {
  int cols = POWER_IN<HEAD_DIM, 32>;
  while (cols > PANEL && units_of(cols) < NUM_WARPS) cols /= 2;
  return cols;
}
constexpr int UNIT_COLS = unit_cols(), UNITS = units_of(UNIT_COLS);

// Named barriers; 0 is sync_block()'s. Of group g: HANDED_OVER + g.
constexpr int NEXT_TURN = 1, SCORES_READY = 2, HANDED_OVER = 3;
static_assert(HANDED_OVER + GROUPS <= 16, "there are 16 named barriers");

// What this thread block works on: worked out once, by one thread, and read from shared memory, since what all turns
// have in common would fill the registers.
struct Job : FullEndOf<CUT_AT_BEGIN> {
  Sequence seq;
  int n_block, head_k;
  int first_head, heads;       // that read head_k
  int begin, full_begin, end;  // query tiles; unmasked from full_begin on
  // Of the first head.
  Rows<const Element> q, dout;
  const Element *exponents, *delta;
  Rows<Gradient_q> dq;
  Element* dq_sums;
  int* semaphores;

  __device__ __forceinline__ void describe(const Params& params, int ticket) {
    TileWalk walk(params, ceil_div(params.seqlen_k, BLOCK_N), params.num_heads_k);
    walk.index = ticket;
    const Work work = walk.work(Longest::FIRST_BLOCK);
    seq = sequence_of(params, work.batch);
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
    q = rows_of<const Element>(params.q, seq.batch_index, first_head);        // (seqlen_q, head_dim)
    dout = rows_of<const Element>(params.dout, seq.batch_index, first_head);  // (seqlen_q, head_dim_v)
    q.vectors = q.vectors && (heads == 1 || params.q.head_stride % CHUNK == 0);
    dout.vectors = dout.vectors && (heads == 1 || params.dout.head_stride % CHUNK == 0);
    exponents = static_cast<const Element*>(params.exponents.data) + place(params.exponents);  // (m_block, BLOCK_M)
    delta = static_cast<const Element*>(params.delta.data) + place(params.delta);              // (m_block, BLOCK_M)
    dq = rows_of<Gradient_q>(params.dq, seq.batch_index, first_head);                         // (seqlen_q, head_dim)
    dq_sums = static_cast<Element*>(params.dq_sums.data) + place(params.dq_sums);  // (m_block, BLOCK_M * HEAD_DIM)
    semaphores = static_cast<int*>(params.semaphores.data) + place(params.semaphores);  // (m_block)
  }
};

#include "job_turns.cuh"

struct Smem {
  SwizzledTile<BLOCK_N, HEAD_DIM> k;
  SwizzledTile<BLOCK_N, HEAD_DIM_V> v;
  SwizzledTile<BLOCK_M, HEAD_DIM> q[2];
  SwizzledTile<BLOCK_M, HEAD_DIM_V> dout[2];
  SwizzledTile<BLOCK_N, BLOCK_M> scores;  // P^T, then dS^T: a lane finds the numbers of the other warp's same lane
  alignas(16) Element exponents[2][BLOCK_M], delta[2][BLOCK_M];
  Exp2Table<2> powers;
  int* added;  // the semaphore that has still to be told of a turn
  Job job;
};
constexpr int SMEM_BYTES = sizeof(Smem);

// ---- loads

// The numbers of a tile's rows, which bwd_delta has padded to whole tiles, 16 bytes a thread.
__device__ __forceinline__ void load_numbers(Element (&numbers)[BLOCK_M], const Element* from, int thread) {
  const int first = CHUNK * thread;
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
  load_tile<THREADS>(smem.q[turn.slot], q, row0, row_end, params.head_dim);
  load_tile<THREADS>(smem.dout[turn.slot], dout, row0, row_end, params.head_dim_v);
  const int thread = thread_index_again() % THREADS;
  load_numbers(smem.exponents[turn.slot], job.exponents + turn.head * params.exponents.head_stride + row0, thread);
  load_numbers(
      smem.delta[turn.slot], job.delta + turn.head * params.delta.head_stride + row0, thread - BLOCK_M / CHUNK);
}

// By the whole block.
__device__ __forceinline__ void load_keys(const Params& params, Smem& smem) {
  const Job& job = smem.job;
  const int row0 = job.n_block * BLOCK_N;
  const auto k = rows_of<const Element>(params.k, job.seq.batch_index, job.head_k);  // (seqlen_k, head_dim)
  const auto v = rows_of<const Element>(params.v, job.seq.batch_index, job.head_k);  // (seqlen_k, head_dim_v)
  load_tile(smem.k, k, row0, job.seq.seqlen_k, params.head_dim);
  load_tile(smem.v, v, row0, job.seq.seqlen_k, params.head_dim_v);
}

// ---- dQ

// Of a unit: this thread's columns of queries 2 g and 2 g + 1.
using Unit = Outputs<UNIT_COLS>;
__device__ __forceinline__ int unit_query(int r) { return lane_index() / 4 * 2 + r; }

// A unit, whole: scaled, to its rows and columns of dq.
__device__ __forceinline__ void store_unit(
    const Params& params, const Job& job, const TurnOf& turn, int row0, int col0, Unit& dq) {
  auto rows = job.dq;
  rows.data = rows.at(0, col0) + turn.head * params.dq.head_stride;
  rows.vectors = rows.vectors && (job.heads == 1 || params.dq.head_stride % CHUNK == 0);
  const Element factor = score_of(params).gradient;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    multiply_row(dq, r, factor);
    const int row = turn.m_block * BLOCK_M + row0 + unit_query(r);
    if (LENS && row >= job.seq.seqlen_q) clear_row(dq, r);
    if (row < rows_to_write(params, job.seq)) store_row(rows, row, params.head_dim - col0, dq, r);
  }
}

// In dq_sums, 16 bytes a thread: a warp moves 512 at a time.
__device__ __forceinline__ void store_part(Element* part, const Unit& dq) {
#pragma unroll
  for (int i = 0; i < 4 / CHUNK * (UNIT_COLS / 8); ++i) {
    Vector<Element, CHUNK> run;
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) run.at[e] = dq.at[CHUNK * i / 4][CHUNK * i % 4 + e];
    store_global(part + 32 * CHUNK * i, run);
  }
}
__device__ __forceinline__ void load_part(Unit& dq, const Element* part) {
#pragma unroll
  for (int i = 0; i < 4 / CHUNK * (UNIT_COLS / 8); ++i) {
    const Vector<Element, CHUNK> run = load_global_written<CHUNK>(part + 32 * CHUNK * i);
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) dq.at[CHUNK * i / 4][CHUNK * i % 4 + e] = run.at[e];
  }
}

__device__ __forceinline__ void add(Unit& sum, const Unit& part) {
#pragma unroll
  for (int i = 0; i < UNIT_COLS / 8; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.at[i][e] += part.at[i][e];
  }
}

// How many key blocks have added their parts of a tile.
__device__ __forceinline__ int* semaphore_of(const Params& params, const Job& job, const TurnOf& turn) {
  return job.semaphores + turn.head * params.semaphores.head_stride + turn.m_block;
}

// The order of the sums is kept by one lane of the first keys warp, where that would wait for P anyway: to tell is to
// wait until memory has what was written, and to learn takes as long as a load.
__device__ __forceinline__ bool keeps_order() { return thread_index_again() == NUM_THREADS / 2; }

// The key block above may go on: behind the barrier that ended the turn before, and at the end.
__device__ __forceinline__ void tell_block_above(Smem& smem) {
  if (keeps_order() && smem.added != nullptr) add_release(smem.added, 1);
}
// The key blocks below have added theirs: before the barrier that all pass before they add.
__device__ __forceinline__ void await_blocks_below(const Params& params, Smem& smem, const TurnOf& turn) {
  if (!keeps_order()) return;
  const Job& job = smem.job;
  const Adders adders(params, job, turn);
  int* semaphore = semaphore_of(params, job, turn);
  smem.added = job.n_block == adders.range.end - 1 ? nullptr : semaphore;
  const int below = adders.below(job.n_block);
  while (load_acquire(semaphore) < below) {}
}

// dQ = dS K, this warp's units of it, which join those of other key blocks.
__device__ __forceinline__ void add_dq(const Params& params, Smem& smem, const TurnOf& turn) {
  constexpr int DOWN = BLOCK_M / 16;
  const Job& job = smem.job;
  const Adders adders(params, job, turn);
  const bool first = job.n_block == adders.range.begin, last = job.n_block == adders.range.end - 1;
  Element* const sums = job.dq_sums + turn.head * params.dq_sums.head_stride +
                       turn.m_block * params.dq_sums.row_stride + CHUNK * (thread_index_again() % 32);
#pragma unroll 1
  for (int unit = thread_index_again() / 32; unit < UNITS; unit += NUM_WARPS) {
    const int row0 = unit % DOWN * 16, col0 = unit / DOWN * UNIT_COLS;
    Element* const here = sums + unit * 16 * UNIT_COLS;
    Unit dq[1], below;  // what other key blocks have added arrives while the product is under way
    clear(dq);
    clear(below);
    if (!first) load_part(below, here);
    add_outputs<BLOCK_N / 16>(dq, sixteen_across(smem.scores, row0), across_rows(smem.k, col0), [](int) {});
    if (!first) add(dq[0], below);
    if (last) {
      store_unit(params, job, turn, row0, col0, dq[0]);
    } else {
      store_part(here, dq[0]);
    }
  }
}

// ---- the two warps of a group

// First key of a group's fragment, in the block.
__device__ __forceinline__ int fragment_key(int fragment) {
  return (thread_index_again() / 32 % GROUPS * FRAGMENTS + fragment) * 16;
}

__device__ __forceinline__ Seen seen_by(const Params& params, const Job& job, const TurnOf& turn, int fragment) {
  const int key = job.n_block * BLOCK_N + fragment_key(fragment) + lane_index() / 4;
  return {params, job.seq, job.first_head + turn.head, key, turn.m_block * BLOCK_M};
}

// Where a lane's columns c and c + 1 of a fragment's row r lie in smem.scores.
__device__ __forceinline__ Element* scores_at(Smem& smem, int fragment, int r, int c) {
  return smem.scores.pair(fragment_key(fragment) + lane_index() / 4 + 8 * r, 2 * c + lane_index() % 4);
}

// The weight of a pair. float64 takes the power from the table; what a score's slope is part of takes CUDA's own.
template <typename Powers>
__device__ __forceinline__ Weight weight_by(
    const Powers& exp2, const Score& score, const Features& features, Element product, Element lse, bool visible,
    Pair pair) {
  if constexpr (SLOPED) {
    return weight_of(score, features, product, lse, visible, pair);
  } else {
    const Element logit = features.logit(score, score.scaled(product), pair);
    const Element p = visible ? exp2(math::fma(logit, score.exponent, -lse)) : Element(0);
    return {p, p};
  }
}

// All turns of the job: step(turn, masked), with its tiles in shared memory, and then dQ. LOADS: these warps send for
// the next tiles.
template <bool LOADS, typename Step>
__device__ __forceinline__ void for_each_turn(const Params& params, Smem& smem, Step step) {
  const int full_begin = warp_uniform(smem.job.full_begin);
  const int full_end = CUT_AT_BEGIN ? warp_uniform(smem.job.whole_tiles_end()) : 0;
  TurnOf turn(params, smem.job);
#pragma unroll 1
  while (turn.exists(smem.job)) {
    cp_async_wait<0>();
    // This turn's tiles are there; those of the turn before are read, and so are its scores.
    barrier_sync(NEXT_TURN, NUM_THREADS);
    TurnOf next = turn;
    next.advance(params, smem.job);
    if (LOADS && next.exists(smem.job)) load_queries<NUM_THREADS / 2>(params, smem, next);
    cp_async_commit();
    const bool whole = !HIDES_PAIRS || warp_any(turn.walk(params, smem.job).whole(turn.m_block));
    if (whole && turn.m_block >= full_begin && (!CUT_AT_BEGIN || turn.m_block < full_end)) {
      step(turn, UNMASKED);
    } else {
      step(turn, MASKED);
    }
    if constexpr (WANT_DQ) {
      barrier_sync(SCORES_READY, NUM_THREADS);  // dS is there, and the key blocks below have added theirs
      add_dq(params, smem, turn);
    }
    turn = next;
  }
}

// A gradient of keys, times a factor, to its rows.
template <int N>
__device__ __forceinline__ void store_keys(
    const Params& params, const Tensor& tensor, const Job& job, int col_end, Element factor,
    Outputs<N> (&gradient)[FRAGMENTS]) {
  const auto rows = rows_of<Gradient>(tensor, job.seq.batch_index, job.head_k);  // (seqlen_k, columns)
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = job.n_block * BLOCK_N + fragment_key(f) + gradient[f].row(r);
      multiply_row(gradient[f], r, factor);
      if (LENS && row >= job.seq.seqlen_k) clear_row(gradient[f], r);
      if (row < keys_to_write(params, job.seq)) store_row(rows, row, col_end, gradient[f], r);
    }
  }
}

// The pair of row r and the column that is `ahead` of this thread's first, and who sees whom there. Pair by pair:
// beside products of wide numbers that costs little.
__device__ __forceinline__ Pair pair_at(const Seen& seen, int r, int ahead) {
  return pair_of<RowIs::KEY>(seen.query0, seen.first_key, r, ahead);
}
__device__ __forceinline__ bool sees(const Seen& seen, const Pair& pair, int r, int ahead) {
  if constexpr (!HIDES_PAIRS) return seen.visible(r, ahead);
  return seen.key[r].visible(ahead) && seen.features.sees(seen.mask, pair);
}

// P^T, and dV.
__device__ __forceinline__ void make_values(const Params& params, Smem& smem) {
  const Job& job = smem.job;
  const int group = warp_uniform(thread_index() / 32 % GROUPS);
  const Exp2<2> exp2(smem.powers);
  Outputs<HEAD_DIM_V> acc_dv[FRAGMENTS];
  clear(acc_dv);
  for_each_turn<false>(params, smem, [&](const TurnOf& turn, bool masked) ALWAYS_INLINE {
    Scores<BLOCK_M> acc[FRAGMENTS];
    // S^T = K Q^T
    clear(acc);
    const auto k = along_rows(smem.k, fragment_key(0));
    add_scores<HEAD_DIM / 16, 1>(acc, k, along_rows(smem.q[turn.slot]), [](int) {});
    // P^T = exp2(S^T - lse)
    const Score score = score_of(params);
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      const Seen seen = seen_by(params, job, turn, f);
#pragma unroll
      for (int c = 0; c < acc[f].COLS; c += 2) {
        const Vector<Element, 2> lse = load_shared<2>(smem.exponents[turn.slot] + own_col() + acc[f].ahead(c));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          Vector<Element, 2> sloped;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int ahead = acc[f].ahead(c + e);
            const Pair pair = pair_at(seen, r, ahead);
            const bool visible = !masked || sees(seen, pair, r, ahead);
            const Weight weight = weight_by(exp2, score, seen.features, acc[f](r, c + e), lse.at[e], visible, pair);
            sloped.at[e] = weight.sloped;
            acc[f](r, c + e) = seen.features.keeps(pair) ? weight.p : Element(0);
          }
          if constexpr (WANT_DS) store_shared(scores_at(smem, f, r, c), sloped);
        }
      }
    }
    if constexpr (WANT_DS) barrier_arrive(HANDED_OVER + group, 64);
    // dV += P^T dO
    if constexpr (WANT_DV) {
      add_outputs<BLOCK_M / 16>(acc_dv, acc, across_rows(smem.dout[turn.slot]), [](int) {});
    }
  });
  barrier_arrive(NEXT_TURN, NUM_THREADS);
  const Element factor = DROPOUT ? static_cast<Element>(params.undropped) : Element(1);
  if constexpr (WANT_DV) store_keys(params, params.dv, job, params.head_dim_v, factor, acc_dv);
}

// dS^T, and dK.
__device__ __forceinline__ void make_keys(const Params& params, Smem& smem) {
  const Job& job = smem.job;
  const int group = warp_uniform(thread_index() / 32 % GROUPS);
  Outputs<HEAD_DIM> acc_dk[FRAGMENTS];
  clear(acc_dk);
  for_each_turn<true>(params, smem, [&](const TurnOf& turn, bool masked) ALWAYS_INLINE {
    if constexpr (!WANT_DS) return;
    Scores<BLOCK_M> acc[FRAGMENTS];
    // dP^T = V dO^T
    clear(acc);
    const auto v = along_rows(smem.v, fragment_key(0));
    add_scores<HEAD_DIM_V / 16, 1>(acc, v, along_rows(smem.dout[turn.slot]), [](int) {});
    // dS^T = P^T * (dP^T - delta)
    if constexpr (WANT_DQ) {
      tell_block_above(smem);
      await_blocks_below(params, smem, turn);
    }
    barrier_sync(HANDED_OVER + group, 64);
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      const Seen seen = seen_by(params, job, turn, f);
#pragma unroll
      for (int c = 0; c < acc[f].COLS; c += 2) {
        const Vector<Element, 2> delta = load_shared<2>(smem.delta[turn.slot] + own_col() + acc[f].ahead(c));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Vector<Element, 2> p = load_shared<2>(scores_at(smem, f, r, c));
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int ahead = acc[f].ahead(c + e);
            const Pair pair = pair_at(seen, r, ahead);
            const bool visible = !masked || sees(seen, pair, r, ahead);
            Element& ds = acc[f](r, c + e);
            ds = score_gradient(seen.features, p.at[e], ds, delta.at[e], visible, seen.features.keeps(pair));
          }
          if constexpr (WANT_DQ) {
            store_shared(scores_at(smem, f, r, c), Vector<Element, 2>{{acc[f](r, c), acc[f](r, c + 1)}});
          }
        }
      }
    }
    // dK += dS^T Q
    if constexpr (WANT_DK) {
      add_outputs<BLOCK_M / 16>(acc_dk, acc, across_rows(smem.q[turn.slot]), [](int) {});
    }
  });
  barrier_sync(NEXT_TURN, NUM_THREADS);  // all have added to the last tile
  if constexpr (WANT_DQ) tell_block_above(smem);
  if constexpr (WANT_DK) store_keys(params, params.dk, job, params.head_dim, score_of(params).gradient, acc_dk);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_wide(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  if (thread_index() == 0) smem.job.describe(params, take_ticket(static_cast<int*>(params.tickets.data)));
  if (thread_index() == 0) smem.added = nullptr;
  smem.powers.fill(NUM_THREADS);
  sync_block();  // the job is there, and the table
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

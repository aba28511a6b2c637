// Backward on Hopper: dq, dk and dv in one pass over the scores; tiles come by TMA, products by wgmma.
//
// Thread blocks are persistent; a job is one block of BLOCK_N keys of one kv head. It walks the query heads that read
// this kv head, in order, and of each the query tiles that see its keys, from the last to the first; dk and dv add up
// in registers. Scores are transposed: a row belongs to a key. Warpgroup 0 sends, warpgroups 1 and 2 are the consumers.
//
//     one turn, query tile m:   S^T  = K Q(m)^T           dP^T = V dO(m)^T
//                               P^T  = exp2(S^T - lse)
//                               dS^T = P^T * (dP^T - delta)
//                               dV  += P^T dO(m)
//                               dQ   = dS K               added to what other key blocks have made of this tile
//                               dK  += dS^T Q(m)          tensor cores: runs on while dQ is added
//
//     narrow, both widths up to 128: 128 keys, 64 for each consumer; P^T and dS^T stay in registers as left operands,
//     dS goes through shared memory as the right one of dQ^T = K^T dS^T, which needs all keys: one barrier a turn.
//
//         warpgroup c:  S^T, dP^T (64 keys, BLOCK_M)    dK, dV (64 keys, width)    dQ^T: half of the columns or queries
//
//     wide, up to 256: 64 keys, 64 queries. What a consumer has of dK, dV and dQ is a share of the columns, so P^T and
//     dS^T go through shared memory: two barriers a turn.
//
//         warpgroup c:  S^T, dP^T (64 keys, 32 queries)    dK, dV (64 keys, half)    dQ (64 queries, half)
//
// A fixed order (DETERMINISTIC): dQ of a tile is the sum over key blocks in ascending order. The semaphore of a tile
// counts the blocks that have added theirs; the first stores, the last adds the sum to its own numbers, scales, rounds
// and writes dq. A job waits only for jobs of the same head with lower tickets, and a thread block works on its tickets
// in order: whoever holds the lowest unfinished ticket runs, so nobody waits for ever, whichever blocks are resident.
// Heads are interleaved in sections, so that few key blocks of one head are under way at a time. Causal or not, query
// tiles go from the last down: the diagonal then makes the first key blocks the longest, and blocks below in the order
// of tickets are above in no tile. Otherwise: added in the order of arrival, and bwd_dq_sm90 writes dq.
//
//     shared memory:   k (BLOCK_N, HEAD_DIM)    v (BLOCK_N, HEAD_DIM_V)
//                      q, dout  NUM_STAGES x (BLOCK_M, width), and lse, delta of their rows
//                      narrow: ds  NUM_STAGES x (BLOCK_M, BLOCK_N)      wide: p, ds  NUM_STAGES x (BLOCK_N, BLOCK_M)
//     senders:         warp 0  takes tickets; K, Q, lse        warp 3  V, dO, delta
//                      warp 1  waits for the key blocks below  warp 2  tells those above     (in a fixed order)
//     who arrives:     full   the sender's announcement, and the bytes; for a job, its sender; for the order, warp 1
//                      empty  the 8 consumer warps; for a job, also each sender but its own; for the order, warp 2
//                      added  the 8 consumer warps, behind their part of dQ
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
#include "gradients_sm90.cuh"

static_assert(NUM_WARPS == 12, "senders and two consumers");
static_assert(BLOCK_N == (WIDE ? 64 : 128), "wide: a warpgroup's rows; narrow: those of two");
static_assert(NUM_STAGES >= 2, "what a warpgroup reads of one turn is still there while the other writes the next");

constexpr bool WANT_DS = WANT_DQ || WANT_DK;
constexpr bool ORDERED = WANT_DQ && DETERMINISTIC;
constexpr int CONSUMER_WARPS = 8;
// dV is sent for before dS is computed, where registers allow it.
constexpr bool EARLY_DV = BLOCK_M <= 64;
// What consumers can spare the senders have, whose addresses then stay in registers, and who find packed sequences.
constexpr int CONSUMER_REGISTERS = WIDE || BLOCK_M <= 64 || PACKED ? 232 : 240;
constexpr int SENDER_REGISTERS = 3 * 168 - 2 * CONSUMER_REGISTERS;  // 3 x 168: what the block has at entry

// ---- jobs: from the thread that takes tickets to everyone else

// What is the same for all turns is worked out once, by the thread that takes the ticket.
struct Job : FullEndOf<CUT_AT_BEGIN> {
  int n_block;  // -1: there are no more
  int head_k, first_head, end_head;
  int begin, full_begin, end;  // query tiles; unmasked from full_begin on
  int keys_parity;             // of the ring of K, and of V
  Sequence seq;

  __device__ __forceinline__ bool has_turns() const { return begin < end && first_head < end_head; }
};

__device__ __forceinline__ void describe(Job& job, const Params& params, const Work& work) {
  job.n_block = work.block;
  job.head_k = work.head;
  const int group = params.num_heads / params.num_heads_k;
  job.first_head = work.head * group;
  job.end_head = job.first_head + group;
  job.seq = sequence_of(params, work.batch);
  const BlockRange blocks = mask_of(params, job.seq).query_blocks(work.block);
  job.begin = blocks.begin;
  job.end = blocks.end;
  if constexpr (HIDES_PAIRS) {
    bool seen = false;
    for (int head = job.first_head; head < job.end_head; ++head) {
      seen |= query_walk(params, job.seq, head, job.n_block).up(job.begin, job.end) < job.end;
    }
    if (!seen) job.end = job.begin;
  }
  job.end_whole_tiles(blocks.full_end);
  // Keys beyond the end are masked in every turn: their logit of 0 may be far above lse.
  job.full_begin = job.seq.seqlen_k - BLOCK_N < work.block * BLOCK_N ? blocks.end : blocks.full_begin;
}

constexpr int JOB_SLOTS = 2;

// The turn of a job, in one register: consumers have no second one.
struct JobTurn {
  int jobs = 0;  // that were before

  __device__ __forceinline__ int slot() const { return jobs % JOB_SLOTS; }
  __device__ __forceinline__ int parity() const { return jobs / JOB_SLOTS % 2; }
  __device__ __forceinline__ void advance() { jobs = (jobs + 1) % (2 * JOB_SLOTS); }
};

struct JobRing {
  unsigned long long full[JOB_SLOTS], empty[JOB_SLOTS];  // mbarriers
  Job at[JOB_SLOTS];

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < JOB_SLOTS; ++i) {
      mbarrier_init(shared_address(&full[i]), 1);
      mbarrier_init(shared_address(&empty[i]), CONSUMER_WARPS + (ORDERED ? 3 : 1));
    }
  }
  // The sender: waits until all have done with the job that was here, writes the next one, and sends it.
  __device__ __forceinline__ Job& refill(const JobTurn& turn) {
    mbarrier_wait(shared_address(&empty[turn.slot()]), turn.parity() ^ 1);
    return at[turn.slot()];
  }
  __device__ __forceinline__ void send(const JobTurn& turn) {
    mbarrier_arrive(shared_address(&full[turn.slot()]));
  }
  __device__ __forceinline__ const Job& await(const JobTurn& turn) {
    mbarrier_wait(shared_address(&full[turn.slot()]), turn.parity());
    return at[turn.slot()];
  }
  // By one thread, behind its own or its warp's last look at the job.
  __device__ __forceinline__ void release(const JobTurn& turn) {
    mbarrier_arrive(shared_address(&empty[turn.slot()]));
  }
};

// ---- the order of the sums: leave to add, from warp 1 to the consumers, to warp 2

// What warp 1 works out, for which consumers have no registers.
struct alignas(8) Leave {
  int first, last;  // whether this key block is, of those that the tile meets
};

struct OrderRing {
  unsigned long long full[NUM_STAGES], added[NUM_STAGES], empty[NUM_STAGES];  // mbarriers
  Leave at[NUM_STAGES];

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < NUM_STAGES; ++i) {
      mbarrier_init(shared_address(&full[i]), 1);
      mbarrier_init(shared_address(&added[i]), CONSUMER_WARPS);
      mbarrier_init(shared_address(&empty[i]), 1);
    }
  }
};

struct NarrowScores {
  SwizzledTile<BLOCK_M, BLOCK_N> ds[NUM_STAGES];  // dS
};
struct WideScores {
  SwizzledTile<BLOCK_N, BLOCK_M> p[NUM_STAGES], ds[NUM_STAGES];  // P^T, dS^T
};
template <bool IS_WIDE>
struct ScoresOf {
  using Type = NarrowScores;
};
template <>
struct ScoresOf<true> {
  using Type = WideScores;
};

struct Smem {
  SwizzledTile<BLOCK_N, HEAD_DIM> k;
  SwizzledTile<BLOCK_N, HEAD_DIM_V> v;
  SwizzledTile<BLOCK_M, HEAD_DIM> q[NUM_STAGES];
  SwizzledTile<BLOCK_M, HEAD_DIM_V> dout[NUM_STAGES];
  ScoresOf<WIDE>::Type scores;
  alignas(16) Accumulator exponents[NUM_STAGES][BLOCK_M], delta[NUM_STAGES][BLOCK_M];
  Ring<1> k_ring, v_ring;
  Ring<NUM_STAGES> q_ring, dout_ring;  // with exponents; with delta
  OrderRing order;
  JobRing jobs;
};
constexpr int SMEM_BYTES = sizeof(Smem);

// ---- warpgroup 0: one thread of each warp

// The turns of a job, in the order that all keep to. What a head's turns share, of_head(head), is worked out once: a
// sender is one thread, and what it computes between a free buffer and its copy is time in which nothing is on its way.
template <typename OfHead, typename Visit>
__device__ __forceinline__ void for_each_turn(const Params& params, const Job& job, OfHead of_head, Visit visit) {
#pragma unroll 1
  for (int head = job.first_head; head < job.end_head; ++head) {
    const auto shared = of_head(head);
    const int begin = job.begin;
    const BlockWalk walk = query_walk(params, job.seq, head, job.n_block);
    int m_block = walk.down(job.end - 1, begin);
#pragma unroll 1
    for (; m_block >= begin; m_block = walk.down(m_block - 1, begin)) visit(shared, m_block);
  }
}

// Q or dO of a head, and the numbers of its rows, which bwd_delta has padded to whole tiles.
struct QueryRows {
  MapPlace place;
  const Accumulator* numbers;

  __device__ __forceinline__ QueryRows(
      const Params& params, const Tensor& tensor, const Tensor& of_rows, const Sequence& seq, int head)
      : place(query_place(params, tensor, seq, head)),
        numbers(rows_of<const Accumulator>(of_rows, seq.batch_index, head).data) {}
  template <int COLS>
  __device__ __forceinline__ void send(
      SwizzledTile<BLOCK_M, COLS>& tile, Accumulator (&to)[BLOCK_M], const TensorMap& map, int m_block,
      unsigned full) const {
    load_tile(tile, map, full, m_block * BLOCK_M, place);
    bulk_load(shared_address(to), numbers + m_block * BLOCK_M, sizeof to, full);
  }
};

// By one thread; a whole warp looks for packed sequences.
__device__ __forceinline__ void take_jobs(const MappedParams& launch, Smem& smem) {
  const Params& params = launch.params;
  PackedWalk packed(params, params.cu_seqlens_k, params.rows_k, params.seqlen_k, BLOCK_N, params.num_heads_k);
  JobTurn job_turn;
  Turn<1> keys_turn;
  Turn<NUM_STAGES> turn;
  while (true) {
    const Work found = packed.next(Longest::FIRST_BLOCK);
    if (PACKED && lane_index() != 0) {
      if (found.block < 0) return;
      continue;
    }
    Job& job = smem.jobs.refill(job_turn);
    TileWalk walk(params, ceil_div(params.seqlen_k, BLOCK_N), params.num_heads_k);
    if (!PACKED) walk.index = take_ticket(static_cast<int*>(params.tickets.data));
    const bool more = PACKED ? found.block >= 0 : walk.more();
    if (more) {
      describe(job, params, PACKED ? found : walk.work(Longest::FIRST_BLOCK));
      job.keys_parity = keys_turn.parity;
    } else {
      job.n_block = -1;
    }
    smem.jobs.send(job_turn);
    if (!more) return;
    bool first = true;
    const auto of_head = [&](int head) ALWAYS_INLINE {
      return QueryRows(params, params.q, params.exponents, job.seq, head);
    };
    for_each_turn(params, job, of_head, [&](const QueryRows& rows, int m_block) ALWAYS_INLINE {
      const unsigned full = smem.q_ring.refill(turn, sizeof smem.q[0] + sizeof smem.exponents[0]);
      rows.send(smem.q[turn.slot], smem.exponents[turn.slot], launch.map_q, m_block, full);
      turn.advance();
      if (!first) return;
      first = false;  // behind Q: K's buffer becomes free later
      load_tile(smem.k, launch.map_k, smem.k_ring.refill(keys_turn, sizeof smem.k), job.n_block * BLOCK_N,
                key_place(params, params.k, job.seq, job.head_k));
      keys_turn.advance();
    });
    job_turn.advance();
  }
}

__device__ __forceinline__ void send_values(const MappedParams& launch, Smem& smem) {
  const Params& params = launch.params;
  JobTurn job_turn;
  Turn<1> keys_turn;
  Turn<NUM_STAGES> turn;
  while (true) {
    const Job& job = smem.jobs.await(job_turn);
    if (job.n_block < 0) return;
    bool first = true;
    const auto of_head = [&](int head) ALWAYS_INLINE {
      return QueryRows(params, params.dout, params.delta, job.seq, head);
    };
    for_each_turn(params, job, of_head, [&](const QueryRows& rows, int m_block) ALWAYS_INLINE {
      const unsigned full = smem.dout_ring.refill(turn, sizeof smem.dout[0] + sizeof smem.delta[0]);
      rows.send(smem.dout[turn.slot], smem.delta[turn.slot], launch.map_dout, m_block, full);
      turn.advance();
      if (!first) return;
      first = false;
      load_tile(smem.v, launch.map_v, smem.v_ring.refill(keys_turn, sizeof smem.v), job.n_block * BLOCK_N,
                key_place(params, params.v, job.seq, job.head_k));
      keys_turn.advance();
    });
    smem.jobs.release(job_turn);
    job_turn.advance();
  }
}

// The semaphores of a head, one for each query tile.
__device__ __forceinline__ int* semaphores_of(const Params& params, const Job& job, int head) {
  return rows_of<int>(params.semaphores, job.seq.batch_index, head).data;
}

// Leave to add to a tile, once the key blocks below have.
__device__ __forceinline__ void await_blocks_below(const Params& params, Smem& smem) {
  JobTurn job_turn;
  Turn<NUM_STAGES> turn;
  while (true) {
    const Job& job = smem.jobs.await(job_turn);
    if (job.n_block < 0) return;
    struct Head {
      int head;
      const int* semaphores;
    };
    const auto of_head = [&](int head) ALWAYS_INLINE { return Head{head, semaphores_of(params, job, head)}; };
    for_each_turn(params, job, of_head, [&](const Head& of, int m_block) ALWAYS_INLINE {
      const BlockWalk walk = key_walk(params, job.seq, of.head, m_block);
      const BlockRange blocks = walk.within(mask_of(params, job.seq).key_blocks(m_block * BLOCK_M, BLOCK_M));
      mbarrier_wait(shared_address(&smem.order.empty[turn.slot]), turn.parity ^ 1);
      Leave& leave = smem.order.at[turn.slot];
      leave.first = job.n_block == blocks.begin;
      leave.last = job.n_block == blocks.end - 1;
      const int below = walk.count(blocks.begin, job.n_block);
      while (load_acquire(of.semaphores + m_block) < below) {}
      mbarrier_arrive(shared_address(&smem.order.full[turn.slot]));
      turn.advance();
    });
    smem.jobs.release(job_turn);
    job_turn.advance();
  }
}

// This block's part of a tile has been added: the block above may go on.
__device__ __forceinline__ void tell_block_above(const Params& params, Smem& smem) {
  JobTurn job_turn;
  Turn<NUM_STAGES> turn;
  while (true) {
    const Job& job = smem.jobs.await(job_turn);
    if (job.n_block < 0) return;
    const auto of_head = [&](int head) ALWAYS_INLINE { return semaphores_of(params, job, head); };
    for_each_turn(params, job, of_head, [&](int* semaphores, int m_block) ALWAYS_INLINE {
      mbarrier_wait(shared_address(&smem.order.added[turn.slot]), turn.parity);
      add_release(semaphores + m_block, 1);
      mbarrier_arrive(shared_address(&smem.order.empty[turn.slot]));
      turn.advance();
    });
    smem.jobs.release(job_turn);
    job_turn.advance();
  }
}

// ---- warpgroups 1 and 2

// Where 16 bytes of a row lie behind the row's chunk: columns 8 * eighth to 8 * eighth + 7. Unsigned, here and where
// the addresses of a thread are made: they differ by constants then, and hold one register.
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned eighth) {
  return row * 128 + (eighth ^ row % 8) * 16;
}

// (64 keys, N queries) of this warpgroup, rounded, to (queries, keys): columns 64 * chunk on.
template <int STEPS, int ROWS, int COLS>
__device__ __forceinline__ void store_scores_transposed(
    const SwizzledTile<ROWS, COLS>& tile, int chunk, const unsigned (&scores)[STEPS][4]) {
  const unsigned thread = thread_index(), warp = thread / 32 % 4, lane = thread % 32;
  const unsigned first = shared_address(tile.at[chunk]) + swizzled(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
#pragma unroll
  for (int i = 0; i < STEPS; ++i) stmatrix_x4_trans(first + i * 16 * 128, scores[i]);
}
// The same to (keys, queries), from column `col` on.
template <int STEPS, int ROWS, int COLS>
__device__ __forceinline__ void store_scores(
    const SwizzledTile<ROWS, COLS>& tile, int col, const unsigned (&scores)[STEPS][4]) {
  const unsigned thread = thread_index(), row = thread / 32 % 4 * 16 + thread % 16, eighth = col / 8 + thread / 16 % 2;
#pragma unroll
  for (int i = 0; i < STEPS; ++i) stmatrix_x4(shared_address(tile.at[0]) + swizzled(row, eighth + 2 * i), scores[i]);
}

// Where this thread's rows of a fragment begin: Fragment's row(0).
__device__ __forceinline__ int own_row() {
  const unsigned thread = thread_index();
  return static_cast<int>(thread / 32 % 4 * 16 + thread % 32 / 4);
}

// Which consumer this is, where it need not be kept in a register.
__device__ __forceinline__ int consumer_again() { return thread_index_again() / 128 - 1; }

// The blocks below have added their parts of dQ. Asked while the products of this one's part run.
__device__ __forceinline__ Leave await_leave(Smem& smem, const Turn<NUM_STAGES>& turn) {
  if constexpr (!ORDERED) return {};
  mbarrier_wait(shared_address(&smem.order.full[turn.slot]), turn.parity);
  return smem.order.at[turn.slot];
}

// This consumer's part of dQ joins those of other key blocks.
template <int N>
__device__ __forceinline__ void join_dq(
    const Params& params, Smem& smem, const Job& job, const Turn<NUM_STAGES>& turn, const Leave& leave, int head,
    float* head_sums, int m_block, int consumer, Fragment<N>& dq) {
  float* part = own_part(head_sums + m_block * static_cast<long long>(DQ_NUMBERS), consumer);
  if constexpr (!DETERMINISTIC) {
    add_to_part<128>(part, dq);
    return;
  }
  if (leave.last) {
    if (!leave.first) add_part<128>(dq, part);
    finish_dq(params, job.seq, rows_of<Gradient_q>(params.dq, job.seq.batch_index, head), m_block, consumer, dq);
  } else if (leave.first) {
    store_part<128>(part, dq);
  } else {
    add_to_part<128>(part, dq);
  }
  sync_warp();  // all lanes have added: one may say so
  if (lane_index() == 0) mbarrier_arrive(shared_address(&smem.order.added[turn.slot]));
}

// A gradient of keys, from column col0 on; 0 beyond the entry's own length.
template <int N>
__device__ __forceinline__ void store_keys(
    const Params& params, const Tensor& tensor, const Job& job, int key0, int col0, int col_end,
    Fragment<N>& gradient) {
  auto rows = rows_of<Gradient>(tensor, job.seq.batch_index, job.head_k);  // (seqlen_k, columns)
  rows.data = rows.at(0, col0);
  if constexpr (LENS) clear_rows_from(gradient, job.seq.seqlen_k - key0);
  store_rows(rows, key0, keys_to_write(params, job.seq), col_end - col0, gradient);
}
template <int N>
__device__ __forceinline__ void multiply(Fragment<N>& fragment, Accumulator factor) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) fragment.at[i] *= factor;
}

// All jobs of a consumer: begin() a job, turn(job, head, head_sums, m_block, masked) for each query tile, end().
template <typename Begin, typename TurnOf, typename End>
__device__ __forceinline__ void work_on_jobs(const Params& params, Smem& smem, Begin begin, TurnOf turn_of, End end) {
  JobTurn job_turn;
  while (true) {
    const Job& job = smem.jobs.await(job_turn);
    // Read from shared memory: said to be the same in all lanes, so that all control is, and with it what is computed
    // of turns; descriptors then live in uniform registers.
    if (warp_uniform(job.n_block) < 0) return;
    begin();
    const int first_block = warp_uniform(job.begin), full_begin = warp_uniform(job.full_begin);
    const int full_end = CUT_AT_BEGIN ? warp_uniform(job.whole_tiles_end()) : 0;
    if (warp_any(job.has_turns())) {
      smem.k_ring.await({0, job.keys_parity});
      smem.v_ring.await({0, job.keys_parity});
    }
#pragma unroll 1
    for (int head = warp_uniform(job.first_head); head < warp_uniform(job.end_head); ++head) {
      float* head_sums = nullptr;  // of dq
      if constexpr (WANT_DQ) head_sums = tile_sums(params, job.seq.batch_index, head, 0);
      if constexpr (HIDES_PAIRS) {
        const BlockWalk walk = query_walk(params, job.seq, head, job.n_block);
        const auto from = [&](int block) ALWAYS_INLINE { return warp_uniform(walk.down(block, first_block)); };
        const auto whole = [&](int block) ALWAYS_INLINE {
          return block >= full_begin && (!CUT_AT_BEGIN || block < full_end) && warp_any(walk.whole(block));
        };
        int m_block = from(warp_uniform(job.end) - 1);
#pragma unroll 1
        while (m_block >= first_block) {
#pragma unroll 1
          for (; m_block >= first_block && whole(m_block); m_block = from(m_block - 1)) {
            turn_of(job, head, head_sums, m_block, UNMASKED);
          }
#pragma unroll 1
          for (; m_block >= first_block && !whole(m_block); m_block = from(m_block - 1)) {
            turn_of(job, head, head_sums, m_block, MASKED);
          }
        }
      } else {
        int m_block = warp_uniform(job.end) - 1;
        if (CUT_AT_BEGIN) {
#pragma unroll 1
          for (; m_block >= first_block && m_block >= full_end; --m_block) {
            turn_of(job, head, head_sums, m_block, MASKED);
          }
        }
#pragma unroll 1
        for (; m_block >= full_begin; --m_block) turn_of(job, head, head_sums, m_block, UNMASKED);
#pragma unroll 1
        for (; m_block >= first_block; --m_block) turn_of(job, head, head_sums, m_block, MASKED);
      }
    }
    if (warp_any(job.has_turns())) {
      smem.k_ring.release({0, job.keys_parity});
      smem.v_ring.release({0, job.keys_parity});
    }
    end(job);
    sync_warp();  // all lanes have looked at the job for the last time
    if (lane_index() == 0) smem.jobs.release(job_turn);
    job_turn.advance();
  }
}

// Named barrier 1: both consumers have written their part of dS (wide: 1 of P, 2 of dS), and have done with that of the
// turn before, which lies in another buffer.
__device__ __forceinline__ void meet(int barrier) {
  fence_proxy_async_shared();  // wgmma reads what was written
  barrier_sync(barrier, 32 * CONSUMER_WARPS);
}

template <typename Scores>
__device__ __forceinline__ void consume_narrow(const Params& params, Smem& smem, Scores& scores, int consumer) {
  const Score score = score_of(params);
  Fragment<HEAD_DIM> acc_dk;    // (64 keys, HEAD_DIM)
  Fragment<HEAD_DIM_V> acc_dv;  // (64 keys, HEAD_DIM_V)
  Turn<NUM_STAGES> turn;

  const auto begin = [&]() ALWAYS_INLINE {
    clear(acc_dk);
    clear(acc_dv);
  };
  const auto step = [&](const Job& job, int head, float* head_sums, int m_block, bool masked) ALWAYS_INLINE {
    Fragment<BLOCK_M> acc_s, acc_dp;  // (64 keys, BLOCK_M)
    Fragment<DQ_COLS> acc_dq;         // (64 columns, DQ_COLS queries)
    unsigned p[BLOCK_M / 16][4], ds[BLOCK_M / 16][4];
    const Seen seen(
        params, job.seq, head, job.n_block * BLOCK_N + 64 * consumer + own_row(), m_block * BLOCK_M);

    // S^T = K Q^T
    smem.q_ring.await(turn);
    wgmma_fence();
    const auto k = from_row(operand<Major::K>(smem.k), 64 * consumer);
    product<HEAD_DIM / 16>(acc_s, k, operand<Major::K>(smem.q[turn.slot]));
    wgmma_commit();
    // dP^T = V dO^T
    smem.dout_ring.await(turn);
    wgmma_fence();
    if constexpr (WANT_DS) {
      const auto v = from_row(operand<Major::K>(smem.v), 64 * consumer);
      product<HEAD_DIM_V / 16>(acc_dp, v, operand<Major::K>(smem.dout[turn.slot]));
    }
    wgmma_commit();
    const auto bits = seen.bits<BLOCK_M>(masked);
    // P^T = exp2(S^T - lse)
    wgmma_wait<1>();
    wgmma_hold(acc_s.at);
    to_probabilities(acc_s, p, score, smem.exponents[turn.slot], seen, bits, masked);
    // dV += P^T dO
    const auto add_dv = [&]() ALWAYS_INLINE {
      if constexpr (!WEIGHTS_APART) round_to(p, acc_s);
      wgmma_fence();
      if constexpr (WANT_DV) multiply_nn(acc_dv, p, operand<Major::MN>(smem.dout[turn.slot]));
      wgmma_commit();
    };
    if constexpr (WANT_DS) {
      wgmma_wait<0>();
      wgmma_hold(acc_dp.at);
    }
    if (EARLY_DV) add_dv();
    // dS^T = P^T * (dP^T - delta)
    if constexpr (WANT_DS) {
      to_score_gradients(acc_dp, FourOf<BLOCK_M>{acc_s}, smem.delta[turn.slot], seen, bits, masked);
    }
    if constexpr (WANT_DS) round_to(ds, acc_dp);
    if (!EARLY_DV) add_dv();
    // dQ^T = K^T dS^T
    if constexpr (WANT_DQ) {
      const auto k_columns = not_kept(from_chunk(operand<Major::MN>(smem.k), DQ_CHUNKS == 2 ? consumer : 0));
      store_scores_transposed(scores.ds[turn.slot], consumer, ds);
      meet(1);
      wgmma_fence();
      const auto ds_rows = operand<Major::K>(scores.ds[turn.slot]);
      product<BLOCK_N / 16>(acc_dq, k_columns, from_row(ds_rows, DQ_CHUNKS == 2 ? 0 : DQ_COLS * consumer));
    }
    wgmma_commit();
    // dK += dS^T Q
    wgmma_fence();
    if constexpr (WANT_DK) multiply_nn(acc_dk, ds, operand<Major::MN>(smem.q[turn.slot]));
    wgmma_commit();
    wgmma_wait<2>();
    if constexpr (WANT_DV) wgmma_hold(acc_dv.at);
    if constexpr (!WANT_DQ) sync_warp();  // all lanes have read exponents and delta: no barrier has said so
    smem.dout_ring.release(turn);
    const Leave leave = await_leave(smem, turn);
    wgmma_wait<1>();
    if constexpr (WANT_DQ) {
      wgmma_hold(acc_dq.at);
      join_dq(params, smem, job, turn, leave, head, head_sums, m_block, consumer, acc_dq);
    }
    wgmma_wait<0>();
    if constexpr (WANT_DK) wgmma_hold(acc_dk.at);
    smem.q_ring.release(turn);
    turn.advance();
  };
  const auto end = [&](const Job& job) ALWAYS_INLINE {
    const int key0 = job.n_block * BLOCK_N + 64 * consumer;
    if constexpr (DROPOUT) multiply(acc_dv, static_cast<Accumulator>(params.undropped));
    if constexpr (WANT_DV) store_keys(params, params.dv, job, key0, 0, params.head_dim_v, acc_dv);
    if constexpr (WANT_DK) {
      multiply(acc_dk, score.gradient);
      store_keys(params, params.dk, job, key0, 0, params.head_dim, acc_dk);
    }
  };
  work_on_jobs(params, smem, begin, step, end);
}

// COLS of dK and dQ, COLS_V of dV, maybe none: those behind the other consumer's.
template <int COLS, int COLS_V, typename Scores>
__device__ __forceinline__ void consume_wide(const Params& params, Smem& smem, Scores& scores, int consumer) {
  constexpr bool OWN_DV = WANT_DV && COLS_V > 0, OWN_DK = WANT_DK && COLS > 0, OWN_DQ = WANT_DQ && COLS > 0;
  constexpr int HALF = BLOCK_M / 2;  // queries whose scores this consumer makes
  const Score score = score_of(params);
  Fragment<(COLS > 0 ? COLS : 8)> acc_dk;      // (64 keys, COLS)
  Fragment<(COLS_V > 0 ? COLS_V : 8)> acc_dv;  // (64 keys, COLS_V)
  Turn<NUM_STAGES> turn;
  const int col0 = consumer * first_share(HEAD_DIM), col0_v = consumer * first_share(HEAD_DIM_V);

  const auto begin = [&]() ALWAYS_INLINE {
    clear(acc_dk);
    clear(acc_dv);
  };
  const auto step = [&](const Job& job, int head, float* head_sums, int m_block, bool masked) ALWAYS_INLINE {
    Fragment<HALF> acc_s, acc_dp;  // (64 keys, HALF queries)
    Fragment<(COLS > 0 ? COLS : 8)> acc_dq;  // (64 queries, COLS)
    unsigned rounded[HALF / 16][4];
    const int query0 = HALF * consumer;
    const Seen seen(params, job.seq, head, job.n_block * BLOCK_N + own_row(), m_block * BLOCK_M + query0);

    // S^T = K Q^T
    smem.q_ring.await(turn);
    wgmma_fence();
    product<HEAD_DIM / 16>(acc_s, operand<Major::K>(smem.k), from_row(operand<Major::K>(smem.q[turn.slot]), query0));
    wgmma_commit();
    // dP^T = V dO^T
    smem.dout_ring.await(turn);
    wgmma_fence();
    if constexpr (WANT_DS) {
      product<HEAD_DIM_V / 16>(acc_dp, operand<Major::K>(smem.v),
                               from_row(operand<Major::K>(smem.dout[turn.slot]), query0));
    }
    wgmma_commit();
    const auto bits = seen.bits<HALF>(masked);
    // P^T = exp2(S^T - lse)
    wgmma_wait<1>();
    wgmma_hold(acc_s.at);
    to_probabilities(acc_s, rounded, score, smem.exponents[turn.slot] + query0, seen, bits, masked);
    // dV += P^T dO
    if constexpr (WANT_DV) {
      if constexpr (!WEIGHTS_APART) round_to(rounded, acc_s);
      store_scores(scores.p[turn.slot], query0, rounded);
      meet(1);
    }
    wgmma_fence();
    if constexpr (OWN_DV) {
      add_product<BLOCK_M / 16>(acc_dv, operand<Major::K>(scores.p[turn.slot]),
                                from_chunk(operand<Major::MN>(smem.dout[turn.slot]), col0_v / 64));
    }
    wgmma_commit();
    // dS^T = P^T * (dP^T - delta)
    wgmma_wait<1>();
    if constexpr (WANT_DS) {
      wgmma_hold(acc_dp.at);
      to_score_gradients(acc_dp, FourOf<HALF>{acc_s}, smem.delta[turn.slot] + query0, seen, bits, masked);
      round_to(rounded, acc_dp);
      store_scores(scores.ds[turn.slot], query0, rounded);
      meet(2);
    }
    // dQ = dS K
    wgmma_fence();
    if constexpr (OWN_DQ) {
      product<BLOCK_N / 16>(acc_dq, operand<Major::MN>(scores.ds[turn.slot]),
                            from_chunk(operand<Major::MN>(smem.k), col0 / 64));
    }
    wgmma_commit();
    // dK += dS^T Q
    wgmma_fence();
    if constexpr (OWN_DK) {
      add_product<BLOCK_M / 16>(acc_dk, operand<Major::K>(scores.ds[turn.slot]),
                                from_chunk(operand<Major::MN>(smem.q[turn.slot]), col0 / 64));
    }
    wgmma_commit();
    wgmma_wait<2>();
    if constexpr (OWN_DV) wgmma_hold(acc_dv.at);
    smem.dout_ring.release(turn);
    const Leave leave = OWN_DQ ? await_leave(smem, turn) : Leave();
    wgmma_wait<1>();
    if constexpr (OWN_DQ) {
      wgmma_hold(acc_dq.at);
      join_dq(params, smem, job, turn, leave, head, head_sums, m_block, consumer_again(), acc_dq);
    } else if constexpr (ORDERED) {  // nothing to add, and still counted
      if (lane_index() == 0) mbarrier_arrive(shared_address(&smem.order.added[turn.slot]));
    }
    wgmma_wait<0>();
    if constexpr (OWN_DK) wgmma_hold(acc_dk.at);
    smem.q_ring.release(turn);
    turn.advance();
  };
  const auto end = [&](const Job& job) ALWAYS_INLINE {
    const int key0 = job.n_block * BLOCK_N;
    const int col0 = consumer_again() * first_share(HEAD_DIM), col0_v = consumer_again() * first_share(HEAD_DIM_V);
    if constexpr (DROPOUT) multiply(acc_dv, static_cast<Accumulator>(params.undropped));
    if constexpr (OWN_DV) store_keys(params, params.dv, job, key0, col0_v, params.head_dim_v, acc_dv);
    if constexpr (OWN_DK) {
      multiply(acc_dk, score.gradient);
      store_keys(params, params.dk, job, key0, col0, params.head_dim, acc_dk);
    }
  };
  work_on_jobs(params, smem, begin, step, end);
}

__device__ __forceinline__ void consume(const Params& params, Smem& smem, int consumer) {
  constexpr int FIRST = first_share(HEAD_DIM), FIRST_V = first_share(HEAD_DIM_V);
  constexpr int SECOND = second_share(HEAD_DIM), SECOND_V = second_share(HEAD_DIM_V);
  if constexpr (!WIDE) {
    consume_narrow(params, smem, smem.scores, consumer);
  } else if constexpr (FIRST == SECOND && FIRST_V == SECOND_V) {
    consume_wide<FIRST, FIRST_V>(params, smem, smem.scores, consumer);
  } else if (consumer == 0) {
    consume_wide<FIRST, FIRST_V>(params, smem, smem.scores, 0);
  } else {
    consume_wide<SECOND, SECOND_V>(params, smem, smem.scores, 1);
  }
}

extern "C" __global__ void __launch_bounds__(32 * NUM_WARPS, 1) bwd_sm90(const __grid_constant__ MappedParams launch) {
  DYNAMIC_SHARED(Smem, smem);
  const Params& params = launch.params;
  const int warpgroup = warp_uniform(thread_index() / 128), warp = warp_uniform(thread_index() / 32 % 4);
  if (thread_index() == 0) {
    smem.k_ring.init(CONSUMER_WARPS);
    smem.v_ring.init(CONSUMER_WARPS);
    smem.q_ring.init(CONSUMER_WARPS);
    smem.dout_ring.init(CONSUMER_WARPS);
    smem.order.init();
    smem.jobs.init();
    fence_mbarrier_init();
  }
  sync_block();  // the rings are there
  if (warpgroup == 0) {
    setmaxnreg_dec<SENDER_REGISTERS>();
    if (lane_index() != 0 && !(PACKED && warp == 0)) return;
    if (warp == 0) {
      take_jobs(launch, smem);
    } else if (warp == 3) {
      send_values(launch, smem);
    } else if (ORDERED && warp == 1) {
      await_blocks_below(params, smem);
    } else if (ORDERED) {
      tell_block_above(params, smem);
    }
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume(params, smem, warpgroup - 1);
  }
}

// Gradients of a score function's arguments: the uses of their elements, and how the pairs that share one are summed.
//
// A use's gradient is ds_ij times the score's slope by that element, summed over all pairs whose indices lead to it.
// First a thread block sums along a lane of tiles, always in the same order (term_turns.cuh); what it has stays apart
// for what the use's indices tell apart of that lane, in `partial`. Then bwd_score_args adds up, for each element, a
// box of these numbers: an index, clamped or clipped, leads to an element from an interval of positions or distances.
//
//     sum        lane: tiles of                          numbers of a lane
//     ALL        BLOCK_M queries with all keys           one
//     QUERIES    BLOCK_M queries with all keys           one for each query
//     KEYS       BLOCK_N keys with all queries           one for each key
//     DIAGONALS  one diagonal of tiles                   one for each distance j - i
//     PAIRS      one tile, in all heads and entries      one for each pair
//                that the indices do not tell apart
//     ARRIVAL    BLOCK_M queries with all keys           none: atomic additions, in the order of arrival, to one number
//                                                        for each element
//
// What a call's terms are, cupyflash/_terms.py has written behind traced.cuh: TERMS, and here TERM, ARGUMENT.
#pragma once
#include "params.cuh"
#include "basics.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "dual.cuh"
#include "score_args.cuh"

enum class Sum { ALL, QUERIES, KEYS, DIAGONALS, PAIRS, ARRIVAL };
enum class Of { CONSTANT, FROM_END, ENTRY, HEAD, QUERY, KEY, DISTANCE, MINUS_DISTANCE };  // distance: j - i

// clip(of + c, low, high), before it is clamped into its axis.
struct IndexForm {
  Of of;
  long long c, low, high;
};
struct Term {
  int argument, axes;
  Sum sum;
  bool of_entry, of_head;  // among its indices
  IndexForm index[4];
};

#include "traced.cuh"

// Tiles of a diagonal lie this many blocks of keys apart.
constexpr int STEP = BLOCK_M / BLOCK_N;
static_assert(BLOCK_M % BLOCK_N == 0, "a diagonal of tiles begins at one distance");

struct TermLanes {
  int lanes, numbers, heads;
  long long entries;

  __device__ __forceinline__ TermLanes(const Params& params, const Term& term, long long all_entries) {
    const int m_blocks = ceil_div(params.seqlen_q, BLOCK_M), n_blocks = ceil_div(params.seqlen_k, BLOCK_N);
    const bool tells_all = term.sum != Sum::PAIRS;
    heads = tells_all || term.of_head ? params.num_heads : 1;
    entries = tells_all || term.of_entry ? all_entries : 1;
    lanes = m_blocks;
    numbers = 1;
    if (term.sum == Sum::QUERIES) numbers = BLOCK_M;
    if (term.sum == Sum::KEYS) lanes = n_blocks, numbers = BLOCK_N;
    if (term.sum == Sum::DIAGONALS) lanes = (m_blocks - 1) * STEP + n_blocks, numbers = BLOCK_M + BLOCK_N - 1;
    if (term.sum == Sum::PAIRS) lanes = m_blocks * n_blocks, numbers = BLOCK_M * BLOCK_N;
  }
  // Numbers in `partial`.
  __device__ __forceinline__ long long size(const Params& params, const Term& term) const {
    if (term.sum == Sum::ARRIVAL) return elements(params.score_args.array[term.argument]);
    return entries * heads * lanes * numbers;
  }
  __device__ __forceinline__ long long place(long long entry, int head, int lane) const {
    return ((entry * heads + head) * lanes + lane) * numbers;
  }
  static __device__ __forceinline__ long long elements(const ArgumentArray& array) {
    long long count = 1;
#pragma unroll
    for (int axis = 0; axis < 4; ++axis) count *= array.length[axis];
    return count;
  }
};

// params.section: how many entries the call has, in all its launches.
__device__ __forceinline__ long long all_entries(const Params& params) { return params.section; }

// Where a term's numbers begin in `partial`.
__device__ __forceinline__ long long first_number(const Params& params, int term) {
  long long first = 0;
#pragma unroll
  for (int i = 0; i < NUM_TERMS; ++i) {
    if (i < term) first += TermLanes(params, TERMS[i], all_entries(params)).size(params, TERMS[i]);
  }
  return first;
}

// Over all threads, always the same pairs; thread 0 gets the sum. `sums` has a number for each thread, which
// nobody reads any more.
__device__ __forceinline__ Accumulator sum_of_block(Accumulator sum, Accumulator* sums) {
  store_shared(&sums[thread_index()], Vector<Accumulator, 1>{{sum}});
  for (int half = 16 * NUM_WARPS; half > 0; half /= 2) {
    sync_block();  // the sums are there
    if (thread_index() < half) {
      sum += load_shared<1>(&sums[thread_index() + half]).at[0];
      store_shared(&sums[thread_index()], Vector<Accumulator, 1>{{sum}});
    }
  }
  return sum;
}

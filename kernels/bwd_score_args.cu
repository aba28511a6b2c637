// Behind bwd_score_*: the gradient of one of score_args, rounded once. params.score_args.array[ARGUMENT] is that
// gradient.
//
// The pairs that lead to an element are a box: intervals of entries, heads, queries, keys and distances, one for each
// index that names them. A thread block adds up what `partial` has of the box, term after term, always in the same
// order: no atomics, the same bits every time. (Of pairs a thread does it alone: the box is mostly one of them.)
//
//     shared memory:  one sum for each thread
#include "basics.cuh"
#include "terms.cuh"

constexpr int NUM_THREADS = 32 * NUM_WARPS;
constexpr bool ALONE = !SUMS_OF_BLOCKS;  // a thread for each element

struct Smem {
  Accumulator sum[NUM_THREADS];
};
constexpr int SMEM_BYTES = sizeof(Smem);

struct Interval {
  long long begin, end;

  __device__ __forceinline__ void cut(long long from, long long to) {
    begin = begin > from ? begin : from;
    end = end < to ? end : to;
  }
  __device__ __forceinline__ long long length() const { return end > begin ? end - begin : 0; }
};

struct Box {
  Interval entries, heads, queries, keys, distances;

  // What leads to the element at `index`.
  __device__ __forceinline__ Box(const Params& params, const Term& term, const ArgumentArray& array, const int* index)
      : entries{0, all_entries(params)},
        heads{0, params.num_heads},
        queries{0, params.seqlen_q},
        keys{0, params.seqlen_k},
        distances{1 - static_cast<long long>(params.seqlen_q), params.seqlen_k} {
#pragma unroll
    for (int axis = 0; axis < 4; ++axis) {
      if (axis < term.axes) cut(term.index[axis], array.length[axis], index[axis]);
    }
  }

 private:
  // A clipped, clamped index is at x where of + c lies in an interval, without ends where it is clipped.
  __device__ __forceinline__ void cut(const IndexForm& form, int length, int x) {
    constexpr long long FAR = 1ll << 62;
    const long long last = length - 1;
    const long long low = form.low < 0 ? 0 : form.low > last ? last : form.low;
    const long long high = form.high > last ? last : form.high < 0 ? 0 : form.high;
    const long long c = form.of == Of::FROM_END ? form.c + length : form.c;
    const long long from = x == low ? -FAR : x - c, to = x == high ? FAR : x + 1 - c;
    const bool constant = form.of == Of::CONSTANT || form.of == Of::FROM_END;
    if (x < low || x > high || (constant && !(from <= 0 && 0 < to))) entries.end = entries.begin;
    if (form.of == Of::ENTRY) entries.cut(from, to);
    if (form.of == Of::HEAD) heads.cut(from, to);
    if (form.of == Of::QUERY) queries.cut(from, to);
    if (form.of == Of::KEY) keys.cut(from, to);
    if (form.of == Of::DISTANCE) distances.cut(from, to);
    if (form.of == Of::MINUS_DISTANCE) distances.cut(1 - to, 1 - from);
  }
};

// The numbers of a term that belong to a box: count() to ask for, some of which are none, and count as 0.
struct BoxOfTerm {
  Box box;
  const Term& term;
  TermLanes all;
  int m_blocks;
  long long inner;  // numbers of one head of one entry

  __device__ __forceinline__ BoxOfTerm(const Params& params, const Term& of, const Box& in)
      : box(in), term(of), all(params, of, all_entries(params)), m_blocks(ceil_div(params.seqlen_q, BLOCK_M)) {
    if (all.entries == 1) box.entries = {0, box.entries.length() > 0};
    if (all.heads == 1) box.heads = {0, box.heads.length() > 0};
    inner = all.lanes;
    if (term.sum == Sum::QUERIES) inner = box.queries.length();
    if (term.sum == Sum::KEYS) inner = box.keys.length();
    if (term.sum == Sum::DIAGONALS) inner = box.distances.length() * (STEP + 1);
    if (term.sum == Sum::PAIRS) inner = box.queries.length() * box.keys.length();
    if (params.seqlen_q == 0 || params.seqlen_k == 0) inner = 0;
  }
  __device__ __forceinline__ long long count() const {
    return box.entries.length() * box.heads.length() * inner;
  }
  __device__ __forceinline__ Accumulator number(const Accumulator* numbers, long long n) const {
    const long long rest = n / inner, of_head = n - rest * inner;
    const long long entry = box.entries.begin + rest / box.heads.length();
    const int head = static_cast<int>(box.heads.begin + rest % box.heads.length());
    int lane, place = 0;
    if (term.sum == Sum::ALL) {
      lane = static_cast<int>(of_head);
    } else if (term.sum == Sum::QUERIES) {
      const int query = static_cast<int>(box.queries.begin + of_head);
      lane = query / BLOCK_M;
      place = query % BLOCK_M;
    } else if (term.sum == Sum::KEYS) {
      const int key = static_cast<int>(box.keys.begin + of_head);
      lane = key / BLOCK_N;
      place = key % BLOCK_N;
    } else if (term.sum == Sum::DIAGONALS) {
      // From the diagonal of tiles whose first distance is the last one up to this, to those before it.
      const long long distance = box.distances.begin + of_head / (STEP + 1);
      const long long from_first = distance + (m_blocks - 1ll) * BLOCK_M + BLOCK_M - 1;  // at least 0
      lane = static_cast<int>(from_first / BLOCK_N - of_head % (STEP + 1));
      if (lane < 0 || lane >= all.lanes) return 0;
      place = static_cast<int>(from_first - static_cast<long long>(lane) * BLOCK_N);
      if (place >= all.numbers) return 0;
    } else {
      const int query = static_cast<int>(box.queries.begin + of_head / box.keys.length());
      const int key = static_cast<int>(box.keys.begin + of_head % box.keys.length());
      if (key - query < box.distances.begin || key - query >= box.distances.end) return 0;
      lane = query / BLOCK_M * (all.lanes / m_blocks) + key / BLOCK_N;
      place = query % BLOCK_M * BLOCK_N + key % BLOCK_N;
    }
    return load_global<1>(numbers + all.place(entry, head, lane) + place).at[0];
  }
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS) bwd_score_args(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const ArgumentArray& gradient = params.score_args.array[ARGUMENT];
  const long long elements = TermLanes::elements(gradient);
  long long element = block_index();
  if (ALONE) element = element * NUM_THREADS + thread_index();
  if (element >= elements) return;  // ALONE, or not at all
  const int own = ALONE ? 0 : thread_index(), owners = ALONE ? 1 : NUM_THREADS;
  int index[4];
  long long rest = element, offset = 0;
#pragma unroll
  for (int axis = 3; axis >= 0; --axis) {
    index[axis] = static_cast<int>(rest % gradient.length[axis]);
    rest /= gradient.length[axis];
    offset += index[axis] * gradient.stride[axis];
  }

  Accumulator sum = 0;
#pragma unroll 1
  for (int i = 0; i < NUM_TERMS; ++i) {
    const Term term = TERMS[i];
    if (term.argument != ARGUMENT) continue;
    const Accumulator* numbers = static_cast<const Accumulator*>(params.partial.data) + first_number(params, i);
    if (term.sum == Sum::ARRIVAL) {
      if (own == 0) sum += load_global<1>(numbers + element).at[0];
      continue;
    }
    const BoxOfTerm box(params, term, Box(params, term, gradient, index));
    for (long long n = own; n < box.count(); n += owners) sum += box.number(numbers, n);
  }
  if constexpr (!ALONE) sum = sum_of_block(sum, smem.sum);
  Gradient* at = static_cast<Gradient*>(const_cast<void*>(gradient.data)) + offset;
  if (own == 0) store_global(at, Vector<Gradient, 1>{{from_accumulator<Gradient>(sum)}});
}

// Who sees whom, as two questions: which blocks meet a block, and whether one pair is visible.
#pragma once
#include "schedule.cuh"
#include "seqlen.cuh"
#include "dual.cuh"
#include "score_args.cuh"
#include "traced.cuh"

// Blocks [begin, end) hold every visible pair; in [full_begin, full_end) all pairs are visible, so a main loop
// runs masked over [begin, full_begin), unmasked over [full_begin, full_end), masked over [full_end, end).
struct BlockRange {
  int begin, full_begin, full_end, end;
};

// Whether single pairs may be hidden: by a mask, by a function, or because their segments differ. Which blocks that
// leaves, and which whole, is then a matter of block_walk.cuh too.
constexpr bool HIDES_PAIRS = HAS_MASK || MASK_FUNCTION || SEGMENTS;

// Which of these loops a kernel needs at all: whether blocks of keys are cut at the beginning, and whether more than
// one is at the end.
constexpr bool CUT_AT_BEGIN = WINDOW, CUT_AT_END = CAUSAL || WINDOW;

// What a main loop's step is told: whether it must ask visible(). A constant at each call, so each loop is compiled
// for itself.
constexpr bool MASKED = true, UNMASKED = false;

// What one query sees, keys counted from an origin, so that a thread's own columns are constants.
struct MaskRow {
  int begin, end;

  __device__ __forceinline__ bool visible(int key) const { return (!WINDOW || key >= begin) && key < end; }
};

// The transpose: who sees one key, queries counted from an origin.
struct MaskColumn {
  int begin, end;

  __device__ __forceinline__ bool visible(int query) const { return query >= begin && (!WINDOW || query < end); }
};

// How far a row sees beside its diagonal.
constexpr long long NO_BOUND = 1ll << 62;
template <bool ON>
struct WindowOf {
  static constexpr long long left = NO_BOUND, right = NO_BOUND;

  __device__ __forceinline__ explicit WindowOf(const Params&) {}
};
template <>
struct WindowOf<true> {
  long long left, right;  // NO_BOUND: no end

  __device__ __forceinline__ explicit WindowOf(const Params& params)
      : left(params.window_left), right(CAUSAL && params.window_right > 0 ? 0 : params.window_right) {}
};

struct Mask : WindowOf<WINDOW> {
  int seqlen_q, seqlen_k;
  Offset q_offset;

  __device__ __forceinline__ Mask(const Params& params, const Sequence& seq)
      : WindowOf<WINDOW>(params), seqlen_q(seq.seqlen_q), seqlen_k(seq.seqlen_k), q_offset(seq.q_offset) {}

  // Query i sees key j, as far as lengths, diagonal and window say. The difference of two indices never overflows.
  __device__ __forceinline__ bool visible(int i, int j) const {
    if constexpr (WINDOW) return j >= first_key(i) && j < keys_seen(i);
    return j < seqlen_k && (!CAUSAL || j - i <= q_offset);
  }

  // Keys [n, ...) are seen by query i; n is this.
  __device__ __forceinline__ int first_key(int i) const {
    if constexpr (WINDOW) {
      if (left != NO_BOUND) return clamp(i + q_offset - left, seqlen_k);
    }
    return 0;
  }
  // Keys [..., n) are seen by query i; n is this.
  __device__ __forceinline__ int keys_seen(int i) const {
    if constexpr (WINDOW) {
      return right == NO_BOUND ? seqlen_k : clamp(i + q_offset + right + 1, seqlen_k);
    }
    return CAUSAL ? clamp(static_cast<long long>(i) + q_offset + 1, seqlen_k) : seqlen_k;
  }

  __device__ __forceinline__ MaskRow row(int i, int origin) const {
    return {first_key(i) - origin, keys_seen(i) - origin};
  }

  // Queries [n, ...) see key j; n is this.
  __device__ __forceinline__ int first_query(int j) const {
    if constexpr (WINDOW) {
      return right == NO_BOUND ? 0 : clamp(j - q_offset - right, seqlen_q);
    }
    return CAUSAL ? clamp(static_cast<long long>(j) - q_offset, seqlen_q) : 0;
  }
  // Queries [..., n) see key j; n is this.
  __device__ __forceinline__ int queries_seeing(int j) const {
    if constexpr (WINDOW) {
      if (left != NO_BOUND) return clamp(j - q_offset + left + 1, seqlen_q);
    }
    return seqlen_q;
  }

  __device__ __forceinline__ MaskColumn column(int j, int origin) const {
    return {j < seqlen_k ? first_query(j) - origin : 0x7fffffff, queries_seeing(j) - origin};
  }

  // The key blocks that `rows` queries from `first` on see. The first row sees the first keys, the last one the last.
  __device__ __forceinline__ BlockRange key_blocks(int first, int rows) const {
    if (LENS && first >= seqlen_q) return {0, 0, 0, 0};
    const int last = smaller(first, seqlen_q - rows) + rows - 1;
    if constexpr (!WINDOW) {
      const int end = ceil_div(keys_seen(last), BLOCK_N);
      return {0, 0, keys_seen(first) / BLOCK_N, end};
    } else {
      const int begin = first_key(first), end = keys_seen(last);
      if (begin >= end) return {0, 0, 0, 0};
      const int full_begin = ceil_div(first_key(last), BLOCK_N), full_end = keys_seen(first) / BLOCK_N;
      return ordered(begin / BLOCK_N, full_begin, full_end, ceil_div(end, BLOCK_N));
    }
  }

  // The transpose: the query blocks that see key block n_block, exactly those that have it among their key blocks. Its
  // first key is seen by the first rows, its last by the last. Rows and keys beyond the end count as visible here: the
  // backward gives such rows p = 0 by their lse, and stores no such key.
  __device__ __forceinline__ BlockRange query_blocks(int n_block) const {
    const int first = n_block * BLOCK_N;
    const int end = ceil_div(seqlen_q, BLOCK_M);
    if (LENS && first >= seqlen_k) return {end, end, end, end};
    const int last = smaller(first, seqlen_k - BLOCK_N) + BLOCK_N - 1;
    const int seen = first_query(first);
    if constexpr (!WINDOW) {
      const int begin = seen < seqlen_q ? seen / BLOCK_M : end;
      return {begin, smaller(ceil_div(first_query(last), BLOCK_M), end), end, end};
    } else {
      const int cut = queries_seeing(last), cut_first = queries_seeing(first);
      if (seen >= cut) return {end, end, end, end};
      const int full_end = cut_first == seqlen_q ? end : cut_first / BLOCK_M;
      return ordered(seen / BLOCK_M, ceil_div(first_query(last), BLOCK_M), full_end, ceil_div(cut, BLOCK_M));
    }
  }

 private:
  static __device__ __forceinline__ int clamp(long long x, int high) {
    return static_cast<int>(x < 0 ? 0 : x > high ? high : x);
  }
  // Three loops that follow one another, whatever lies where.
  static __device__ __forceinline__ BlockRange ordered(int begin, int full_begin, int full_end, int end) {
    full_begin = smaller(full_begin, end);
    full_end = smaller(full_end, end);
    if (full_end < full_begin) full_begin = full_end = end;
    return {begin, full_begin, full_end, end};
  }
};

__device__ __forceinline__ Mask mask_of(const Params& params, const Sequence& seq) { return Mask(params, seq); }

// What the call's mask function says of pairs of one head of one entry.
template <bool ON>
struct MaskFunctionOf {
  __device__ __forceinline__ MaskFunctionOf(const Params&, const Sequence&, int) {}
  __device__ __forceinline__ bool refuses(int, int) const { return false; }
};
template <>
struct MaskFunctionOf<true> {
  const MaskArgs* args;
  int batch, head;

  __device__ __forceinline__ MaskFunctionOf(const Params& params, const Sequence& seq, int of_head)
      : args(&params.mask_args), batch(flat_batch(params, seq.batch_index)), head(of_head) {}
  __device__ __forceinline__ bool refuses(int i, int j) const { return !mask_function(batch, head, i, j, *args); }
};

// What hides single pairs of one head of one entry.
template <bool ON>
struct HiddenPairsOf {
  __device__ __forceinline__ HiddenPairsOf(const Params&, const Sequence&, int) {}
  __device__ __forceinline__ bool hides(int, int) const { return false; }
  __device__ __forceinline__ bool refuses(int, int) const { return false; }
};
template <>
struct HiddenPairsOf<true> : MaskFunctionOf<MASK_FUNCTION> {
  Rows<const unsigned char> mask;                  // (seqlen_q, seqlen_k), 0: hidden
  Rows<const long long> q_segments, kv_segments;  // (seqlen), one column

  __device__ __forceinline__ HiddenPairsOf(const Params& params, const Sequence& seq, int head)
      : MaskFunctionOf<MASK_FUNCTION>(params, seq, head),
        mask(rows_of<const unsigned char>(params.mask, seq.batch_index, head)),
        q_segments(rows_of<const long long>(params.q_segments, seq.batch_index, 0)),
        kv_segments(rows_of<const long long>(params.kv_segments, seq.batch_index, 0)) {}
  // Of a pair within the entry's lengths.
  __device__ __forceinline__ bool hides(int i, int j) const {
    bool hidden = false;
    if constexpr (HAS_MASK) hidden = load_global<1>(mask.at(i, j)).at[0] == 0;
    if constexpr (SEGMENTS) {
      hidden |= load_global<1>(q_segments.at(i)).at[0] != load_global<1>(kv_segments.at(j)).at[0];
    }
    if constexpr (MASK_FUNCTION) hidden |= refuses(i, j);
    return hidden;
  }
};
using HiddenPairs = HiddenPairsOf<HIDES_PAIRS>;

// Who sees whom, as two questions: which blocks meet a block, and whether one pair is visible.
#pragma once
#include "schedule.cuh"
#include "seqlen.cuh"

// Blocks [begin, end) hold every visible pair; in [full_begin, full_end) all pairs are visible, so a main loop
// runs masked over [begin, full_begin), unmasked over [full_begin, full_end), masked over [full_end, end).
struct BlockRange {
  int begin, full_begin, full_end, end;
};

// Which of these loops a kernel needs at all: whether blocks of keys are cut at the beginning, and whether more than
// one is at the end.
constexpr bool CUT_AT_BEGIN = false, CUT_ALONG_DIAGONAL = CAUSAL;

// What a main loop's step is told: whether it must ask visible(). A constant at each call, so each loop is compiled
// for itself.
constexpr bool MASKED = true, UNMASKED = false;

// What one query sees, keys counted from an origin, so that a thread's own columns are constants.
struct MaskRow {
  int end;

  __device__ __forceinline__ bool visible(int key) const { return key < end; }
};

// The transpose: who sees one key, queries counted from an origin.
struct MaskColumn {
  int begin;

  __device__ __forceinline__ bool visible(int query) const { return query >= begin; }
};

struct Mask {
  int seqlen_q, seqlen_k, q_offset;

  // Query i sees key j. The difference of two indices never overflows.
  __device__ __forceinline__ bool visible(int i, int j) const {
    return j < seqlen_k && (!CAUSAL || j - i <= q_offset);
  }

  // Keys [0, n) are seen by query i; n is this.
  __device__ __forceinline__ int keys_seen(int i) const {
    return CAUSAL ? clamp(static_cast<long long>(i) + q_offset + 1, seqlen_k) : seqlen_k;
  }

  __device__ __forceinline__ MaskRow row(int i, int origin) const { return {keys_seen(i) - origin}; }

  // Queries [n, seqlen_q) see key j; n is this.
  __device__ __forceinline__ int first_query(int j) const {
    return CAUSAL ? clamp(static_cast<long long>(j) - q_offset, seqlen_q) : 0;
  }

  __device__ __forceinline__ MaskColumn column(int j, int origin) const {
    return {j < seqlen_k ? first_query(j) - origin : 0x7fffffff};
  }

  // The key blocks that `rows` queries from `first` on see. The first row sees fewest keys, the last one most.
  __device__ __forceinline__ BlockRange key_blocks(int first, int rows) const {
    const int last = smaller(first, seqlen_q - rows) + rows - 1;
    return {0, 0, keys_seen(first) / BLOCK_N, ceil_div(keys_seen(last), BLOCK_N)};
  }

  // The transpose: the query blocks that see key block n_block. Its first key is seen by most rows, its last by
  // fewest. Rows and keys beyond the end count as visible here: the backward gives such rows p = 0 by their lse,
  // and stores no such key.
  __device__ __forceinline__ BlockRange query_blocks(int n_block) const {
    const int first = n_block * BLOCK_N;
    const int last = smaller(first, seqlen_k - BLOCK_N) + BLOCK_N - 1;
    const int end = ceil_div(seqlen_q, BLOCK_M);
    const int seen = first_query(first);
    const int begin = seen < seqlen_q ? seen / BLOCK_M : end;
    return {begin, smaller(ceil_div(first_query(last), BLOCK_M), end), end, end};
  }

 private:
  static __device__ __forceinline__ int clamp(long long x, int high) {
    return static_cast<int>(x < 0 ? 0 : x > high ? high : x);
  }
};

__device__ __forceinline__ Mask mask_of(const Sequence& seq) { return {seq.seqlen_q, seq.seqlen_k, seq.q_offset}; }

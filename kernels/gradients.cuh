// What the backwards on tensor cores share: P and dS from their products, a row of which belongs to a key; and dq of
// a tile of queries while key blocks have still to add their parts to it.
#pragma once
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "rows.cuh"
#include "fragment.cuh"
#include "fragment_pairs.cuh"
#include "softmax.cuh"

// Where this thread's columns of a fragment begin: Fragment's first_col(). Unsigned, so that addresses made of it
// differ by constants and hold one register.
__device__ __forceinline__ int own_col() {
  const unsigned thread = thread_index();
  return static_cast<int>(thread % 4 * 2);
}

// Where a job's unmasked query tiles end: at its last one, unless a window ends too. A base, since it takes no room
// when empty: what else lies in shared memory keeps its place, and registers are scarce.
template <bool ON>
struct FullEndOf {
  __device__ __forceinline__ void end_whole_tiles(int) {}
  __device__ __forceinline__ int whole_tiles_end() const { return 0; }
};
template <>
struct FullEndOf<true> {
  int full_end;

  __device__ __forceinline__ void end_whole_tiles(int end) { full_end = end; }
  __device__ __forceinline__ int whole_tiles_end() const { return full_end; }
};

// Who sees the two keys of this thread's rows, the first of them and the fragment's first query given; queries counted
// from this thread's first column. And what else a kernel asks of their pairs, all in one head.
struct Seen {
  MaskColumn key[2];
  Mask mask;
  Features features;
  int first_key, query0;

  __device__ __forceinline__ Seen(const Params& params, const Sequence& seq, int head, int key0, int fragment_query0)
      : mask(mask_of(params, seq)),
        features(params, seq, head),
        first_key(key0),
        query0(fragment_query0 + own_col()) {
    key[0] = mask.column(first_key, query0);
    key[1] = mask.column(first_key + 8, query0);
  }
  // The pair of row r and the column that is `ahead` of this thread's first.
  __device__ __forceinline__ bool visible(int r, int ahead) const {
    if constexpr (!MASK_FUNCTION) return key[r].visible(ahead);
    return key[r].visible(ahead) && features.accepts(mask, pair_of<RowIs::KEY>(query0, first_key, r, ahead));
  }
  template <int N>
  __device__ __forceinline__ FragmentBits<RowIs::KEY, N> bits(bool masked) const {
    return {features, mask, query0, first_key, masked};
  }
  // From column `first` on.
  template <int N>
  __device__ __forceinline__ FragmentPairs<RowIs::KEY, N> pairs(int first) const {
    return {features.added, query0 + first, first_key};
  }
};

// S^T becomes P^T; `exponents` of the fragment's queries. WEIGHTS_APART: it becomes what dS^T is a multiple of, and
// P^T, less what is dropped, comes rounded, as an operand; SPLIT_P: times P_FACTOR, and `low` is its second part.
template <int N>
__device__ __forceinline__ void to_probabilities(
    Fragment<N>& acc_s, unsigned (&operand)[N / 16][4], unsigned (&low)[N / 16][4], const Score& score,
    const Accumulator* exponents, const Seen& seen, const FragmentBits<RowIs::KEY, N>& bits, bool masked) {
  constexpr int PART = HAS_BIAS ? POWER_IN<N, 32> : N;  // biases of more would push accumulators out of registers
#pragma unroll
  for (int part = 0; part < N / PART; ++part) {
    const auto pairs = seen.pairs<PART>(part * PART);
#pragma unroll
    for (int at = 0; at < PART / 4; at += 2) {
      const int c = part * PART / 4 + at;
      const Vector<Accumulator, 2> lse = load_shared<2>(exponents + own_col() + acc_s.ahead(c));
      Accumulator p[2][2];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2, col = c + e % 2;
        const bool visible = !masked || (seen.visible(r, acc_s.ahead(col)) && (!HIDES_PAIRS || bits.shown(r, col)));
        const FragmentPair pair = pairs.at(seen.features.added, r, at + e % 2);
        const Weight weight = weight_of(score, seen.features, acc_s(r, col), lse.at[e % 2], visible, pair);
        acc_s(r, col) = weight.sloped;
        if constexpr (WEIGHTS_APART) p[r][e % 2] = !DROPOUT || bits.kept(r, col) ? weight.p : Accumulator(0);
      }
      if constexpr (WEIGHTS_APART) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int step = (c + r) / 4, i = (c + r) % 4;
          pack_parts<Element>(operand[step][i], low[step][i], P_FACTOR * p[r][0], P_FACTOR * p[r][1]);
        }
      }
    }
  }
}
template <int N>
__device__ __forceinline__ void to_probabilities(
    Fragment<N>& acc_s, unsigned (&operand)[N / 16][4], const Score& score, const Accumulator* exponents,
    const Seen& seen, const FragmentBits<RowIs::KEY, N>& bits, bool masked) {
  to_probabilities(acc_s, operand, operand, score, exponents, seen, bits, masked);
}

// dP^T becomes dS^T; p(c) is what it is a multiple of, in columns c and c + 1, of the first row and then of the second.
template <int N, typename P>
__device__ __forceinline__ void to_score_gradients(
    Fragment<N>& acc_dp, const P& p, const Accumulator* delta, const Seen& seen,
    const FragmentBits<RowIs::KEY, N>& bits, bool masked) {
#pragma unroll
  for (int c = 0; c < acc_dp.COLS; c += 2) {
    const Vector<Accumulator, 4> four = p(c);
    const Vector<Accumulator, 2> row = load_shared<2>(delta + own_col() + acc_dp.ahead(c));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = e / 2, col = c + e % 2, ahead = acc_dp.ahead(col);
      const bool visible = !masked || (seen.visible(r, ahead) && (!HIDES_PAIRS || bits.shown(r, col)));
      acc_dp(r, col) =
          score_gradient(seen.features, four.at[e], acc_dp(r, col), row.at[e % 2], visible, bits.kept(r, col));
    }
  }
}
// As a fragment holds it.
template <int N>
struct FourOf {
  const Fragment<N>& p;

  __device__ __forceinline__ Vector<Accumulator, 4> operator()(int c) const {
    return {{p(0, c), p(0, c + 1), p(1, c), p(1, c + 1)}};
  }
};

// ---- dq of a tile, in dq_sums, while it is added up

// As its threads hold it, THREADS to a part, four numbers by four: a warp moves 512 bytes at a time.
template <int THREADS, int N>
__device__ __forceinline__ void store_part(float* part, const Fragment<N>& dq) {
#pragma unroll
  for (int i = 0; i < N / 2; i += 4) {
    store_global(part + THREADS * i, Vector<float, 4>{{dq.at[i], dq.at[i + 1], dq.at[i + 2], dq.at[i + 3]}});
  }
}
template <int THREADS, int N>
__device__ __forceinline__ void add_to_part(float* part, const Fragment<N>& dq) {
#pragma unroll
  for (int i = 0; i < N / 2; i += 4) {
    const float four[4] = {dq.at[i], dq.at[i + 1], dq.at[i + 2], dq.at[i + 3]};
    add_global(part + THREADS * i, four);
  }
}
// What other key blocks have added comes first in the sum, as if this one had added its own.
template <int THREADS, int N>
__device__ __forceinline__ void add_part(Fragment<N>& dq, const float* part) {
#pragma unroll
  for (int i = 0; i < N / 2; i += 4) {
    const Vector<float, 4> four = load_global_written<4>(part + THREADS * i);
#pragma unroll
    for (int e = 0; e < 4; ++e) dq.at[i + e] += four.at[e];
  }
}

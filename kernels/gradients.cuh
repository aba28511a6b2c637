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
#include "softmax.cuh"

// Where this thread's columns of a fragment begin: Fragment's first_col(). Unsigned, so that addresses made of it
// differ by constants and hold one register.
__device__ __forceinline__ int own_col() {
  const unsigned thread = thread_index();
  return static_cast<int>(thread % 4 * 2);
}

// Who sees the two keys of this thread's rows, the first of them and the fragment's first query given; queries counted
// from this thread's first column.
struct Seen {
  MaskColumn key[2];

  __device__ __forceinline__ Seen(const Mask& mask, int first_key, int query0)
      : key{mask.column(first_key, query0 + own_col()), mask.column(first_key + 8, query0 + own_col())} {}
};

// S^T becomes P^T; `exponents` of the fragment's queries.
template <int N>
__device__ __forceinline__ void to_probabilities(
    Fragment<N>& acc_s, const Score& score, const Accumulator* exponents, const Seen& seen, bool masked) {
#pragma unroll
  for (int c = 0; c < acc_s.COLS; c += 2) {
    const Vector<Accumulator, 2> lse = load_shared<2>(exponents + own_col() + acc_s.ahead(c));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = e / 2, col = c + e % 2;
      const bool visible = !masked || seen.key[r].visible(acc_s.ahead(col));
      acc_s(r, col) = probability(score, acc_s(r, col), lse.at[e % 2], visible);
    }
  }
}

// dP^T becomes dS^T; p(c) is P^T in columns c and c + 1, of the first row and then of the second.
template <int N, typename P>
__device__ __forceinline__ void to_score_gradients(
    Fragment<N>& acc_dp, const P& p, const Accumulator* delta, const Seen& seen, bool masked) {
#pragma unroll
  for (int c = 0; c < acc_dp.COLS; c += 2) {
    const Vector<Accumulator, 4> four = p(c);
    const Vector<Accumulator, 2> row = load_shared<2>(delta + own_col() + acc_dp.ahead(c));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = e / 2, col = c + e % 2;
      const bool visible = !masked || seen.key[r].visible(acc_dp.ahead(col));
      acc_dp(r, col) = score_gradient(four.at[e], acc_dp(r, col), row.at[e % 2], visible);
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

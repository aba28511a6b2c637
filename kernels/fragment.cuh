// Accumulators of tensor cores, as mma.m16n8 and wgmma both lay them out, and how they leave the registers. What
// belongs to a row stays with the 4 lanes of a quad.
#pragma once
#include "types.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "mma_sm80.cuh"

__device__ __forceinline__ int lane_index() { return thread_index() % 32; }

// Said to be the same in all lanes, 32 bits at a time.
__device__ __forceinline__ long long warp_uniform(long long x) {
  const unsigned low = warp_uniform(static_cast<unsigned>(x)), high = warp_uniform(static_cast<unsigned>(x >> 32));
  return static_cast<long long>(static_cast<unsigned long long>(high) << 32 | low);
}

// A warp's (16, N) accumulators, this thread's part: rows lane / 4 and 8 below, columns in pairs. A warpgroup's (64, N)
// are those of its four warps.
template <int N>
struct Fragment {
  static constexpr int ROWS = 2, COLS = N / 4;
  static_assert(N % 8 == 0, "a product's N is a multiple of 8");
  float at[N / 2];

  __device__ __forceinline__ float& operator()(int r, int c) { return at[c / 2 * 4 + r * 2 + c % 2]; }
  __device__ __forceinline__ float operator()(int r, int c) const { return at[c / 2 * 4 + r * 2 + c % 2]; }

  // Of a warpgroup's rows; of a warp's.
  static __device__ __forceinline__ int row(int r) { return thread_index() % 128 / 32 * 16 + warp_row(r); }
  static __device__ __forceinline__ int warp_row(int r) { return lane_index() / 4 + 8 * r; }
  // The column is first_col() + ahead(c); ahead() is known when the kernel is compiled.
  static __device__ __forceinline__ int first_col() { return lane_index() % 4 * 2; }
  static constexpr __device__ __forceinline__ int ahead(int c) { return c / 2 * 8 + c % 2; }
};

// Over the four lanes that share a row; all of them get the same bits.
__device__ __forceinline__ float row_sum_of(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
__device__ __forceinline__ float row_max_of(float x) {
  x = math::max(x, shuffle_xor(x, 1));
  return math::max(x, shuffle_xor(x, 2));
}

template <int N>
__device__ __forceinline__ void clear(Fragment<N>& fragment) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) fragment.at[i] = 0;
}

template <int N, int R>
__device__ __forceinline__ void clear(Fragment<N> (&fragments)[R]) {
#pragma unroll
  for (int f = 0; f < R; ++f) clear(fragments[f]);
}

template <int N>
__device__ __forceinline__ void multiply_row(Fragment<N>& fragment, int r, float factor) {
#pragma unroll
  for (int c = 0; c < fragment.COLS; ++c) fragment(r, c) *= factor;
}

template <int N>
__device__ __forceinline__ void multiply_all(Fragment<N>& fragment, float factor) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) fragment.at[i] *= factor;
}

template <int N, int R>
__device__ __forceinline__ void multiply_all(Fragment<N> (&fragments)[R], float factor) {
#pragma unroll
  for (int f = 0; f < R; ++f) multiply_all(fragments[f], factor);
}

template <int N>
__device__ __forceinline__ void clear_row(Fragment<N>& fragment, int r) {
#pragma unroll
  for (int c = 0; c < fragment.COLS; ++c) fragment(r, c) = 0;
}

// Accumulators, rounded, as the left operand of the next product: they lie where it wants them.
template <int N>
__device__ __forceinline__ void round_to(unsigned (&operand)[N / 16][4], const Fragment<N>& fragment) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) operand[i / 4][i % 4] = pack<Element>(fragment.at[2 * i], fragment.at[2 * i + 1]);
}

// Two numbers as a product takes them: rounded, and, SPLIT_P, in a second part what that loses, rounded likewise. The
// difference is exact.
template <typename T>
__device__ __forceinline__ void pack_parts(unsigned& high, unsigned& low, float x, float y) {
  high = pack<T>(x, y);
  if constexpr (SPLIT_P) {
    const T first = {static_cast<unsigned short>(high)}, second = {static_cast<unsigned short>(high >> 16)};
    low = pack<T>(x - to_accumulator(first), y - to_accumulator(second));
  }
}
// round_to(), SPLIT_P with the second part.
template <int N>
__device__ __forceinline__ void round_to(
    unsigned (&high)[N / 16][4], unsigned (&low)[N / 16][4], const Fragment<N>& fragment) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    pack_parts<Element>(high[i / 4][i % 4], low[i / 4][i % 4], fragment.at[2 * i], fragment.at[2 * i + 1]);
  }
}

// ---- results

// Among the 4 lanes of a quad: lane t gives word i to lane i, and gets words t of lanes 0 to 3.
__device__ __forceinline__ void transpose_quad(unsigned (&x)[4]) {
  const bool high = lane_index() & 2, odd = lane_index() & 1;
  const unsigned a = shuffle_xor(high ? x[0] : x[2], 2), b = shuffle_xor(high ? x[1] : x[3], 2);
  x[0] = high ? a : x[0];
  x[1] = high ? b : x[1];
  x[2] = high ? x[2] : a;
  x[3] = high ? x[3] : b;
  const unsigned c = shuffle_xor(odd ? x[0] : x[1], 1), d = shuffle_xor(odd ? x[2] : x[3], 1);
  x[0] = odd ? c : x[0];
  x[1] = odd ? x[1] : c;
  x[2] = odd ? d : x[2];
  x[3] = odd ? x[3] : d;
}

// Row r of a fragment, its columns from FIRST on, two at a time.
template <int FIRST, typename T, int N>
__device__ __forceinline__ void store_pairs(
    const Rows<T>& rows, int row, int row_end, int col_end, const Fragment<N>& fragment, int r) {
#pragma unroll
  for (int c = FIRST; c < fragment.COLS; c += 2) {
    const float numbers[2] = {fragment(r, c), fragment(r, c + 1)};
    if (row < row_end) store_columns(rows, row, fragment.first_col() + fragment.ahead(c), col_end, numbers);
  }
}

// Row r of a fragment to columns [0, col_end) of a tensor's row, if that is before row_end. 16-bit numbers go in 16
// bytes where the tensor allows it: a quad exchanges what its lanes hold of 32 columns. Reached by all 32 lanes, with
// rows of one kind.
template <typename T, int N>
__device__ __forceinline__ void store_row(
    const Rows<T>& rows, int row, int row_end, int col_end, const Fragment<N>& fragment, int r) {
  constexpr int GROUPS = sizeof(T) == 2 ? N / 32 : 0;
  if (GROUPS == 0 || !rows.vectors || col_end % 8) {
    store_pairs<0>(rows, row, row_end, col_end, fragment, r);
    return;
  }
  if constexpr (GROUPS > 0) {
    const int col = lane_index() % 4 * 8;
    T* to = rows.at(row) + col;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      unsigned words[4];  // word i of lane t: columns 8 i + 2 t and the next one
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = pack<T>(fragment(r, 8 * group + 2 * i), fragment(r, 8 * group + 2 * i + 1));
      }
      transpose_quad(words);  // outside the branch: it needs the whole warp. Now columns 8 t to 8 t + 7
      if (row < row_end && col + 32 * group < col_end) store_words(to + 32 * group, words);
    }
    store_pairs<8 * GROUPS>(rows, row, row_end, col_end, fragment, r);
  }
}

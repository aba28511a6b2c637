// How gradients leave the registers on Hopper; and dq of a tile of BLOCK_M queries: which warpgroup holds which part of
// it, how the parts lie in dq_sums while other key blocks have still to add theirs, and how they reach dq.
//
//     narrow, widths up to 128:  dQ^T in (64, DQ_COLS), rows are columns of the head, columns are queries.
//                                DQ_CHUNKS = 2: consumer c has columns 64 c to 64 c + 63 of all queries,
//                                           1: all columns of one half of the queries
//     wide:                      dQ in (64, N): all queries, a share of the head's columns
#pragma once
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "rows.cuh"
#include "tile_sm90.cuh"
#include "gradients.cuh"

constexpr bool WIDE = HEAD_DIM > 128 || HEAD_DIM_V > 128;

// Wide: columns of a tile are shared out in whole chunks of 64, the larger share to consumer 0.
constexpr __device__ __forceinline__ int first_share(int cols) {
  return smaller(cols, ceil_div(ceil_div(cols, 64), 2) * 64);
}
constexpr __device__ __forceinline__ int second_share(int cols) { return cols - first_share(cols); }

constexpr int DQ_CHUNKS = ceil_div(HEAD_DIM, 64);  // narrow
constexpr int DQ_COLS = DQ_CHUNKS == 2 ? BLOCK_M : BLOCK_M / 2;
constexpr int DQ_NUMBERS = WIDE ? BLOCK_M * HEAD_DIM : 128 * DQ_COLS;  // of a tile in dq_sums
constexpr int DQ_SECOND = WIDE ? 64 * first_share(HEAD_DIM) : 64 * DQ_COLS;  // where consumer 1's begin
static_assert(WIDE ? BLOCK_M == 64 : BLOCK_M % 16 == 0, "a tile is dealt out to two warpgroups");

// A tile in dq_sums; and there this thread's first four numbers.
__device__ __forceinline__ float* tile_sums(const Params& params, const int (&batch_index)[4], int head, int m_block) {
  return rows_of<float>(params.dq_sums, batch_index, head).at(m_block);  // (m_block, DQ_NUMBERS)
}
__device__ __forceinline__ float* own_part(float* sums, int consumer) {
  return sums + (consumer * DQ_SECOND + 4 * (static_cast<unsigned>(thread_index_again()) % 128));
}

// ---- to a tensor
//
// Where a thread stands is read anew, and addresses run along: what could be computed before the main loop would be,
// and would hold registers there.
struct Place {
  int warp_row, quad, quad_col;  // of the warpgroup: first row of the warp; of the warp: quad, first column in it
};
__device__ __forceinline__ Place place_again() {
  const unsigned thread = thread_index_again();
  const unsigned warp_row = thread % 128 / 32 * 16, quad = thread % 32 / 4, quad_col = thread % 4 * 2;
  return {static_cast<int>(warp_row), static_cast<int>(quad), static_cast<int>(quad_col)};
}

// Two neighbouring columns of one row, the second one maybe beyond the end.
template <typename T>
__device__ __forceinline__ void store_two(T* to, long long col_stride, bool vectors, int left, T x, T y) {
  if (vectors && left >= 2) {
    store_global(to, Vector<T, 2>{{x, y}});
  } else {
    if (left >= 1) store_global(to, Vector<T, 1>{{x}});
    if (left >= 2) store_global(to + col_stride, Vector<T, 1>{{y}});
  }
}

template <typename T>
__device__ __forceinline__ void store_word(T* to, long long col_stride, bool vectors, int left, unsigned word) {
  const T x = {static_cast<unsigned short>(word)}, y = {static_cast<unsigned short>(word >> 16)};
  store_two(to, col_stride, vectors, left, x, y);
}

// (64, N) to rows from row0 and columns from 0 on.
template <typename T, int N>
__device__ __forceinline__ void store_rows(
    const Rows<T>& rows, int row0, int row_end, int col_end, const Fragment<N>& fragment) {
  const Place place = place_again();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + place.warp_row + place.quad + 8 * r;
    if (row >= row_end) continue;
    T* to = rows.at(row, place.quad_col);
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      const float low = fragment.at[4 * i + 2 * r], high = fragment.at[4 * i + 2 * r + 1];
      const int left = col_end - place.quad_col - 8 * i;
      if constexpr (sizeof(T) == 2) {
        store_word(to, rows.col_stride, rows.vectors, left, pack<T>(low, high));
      } else {
        store_two(to, rows.col_stride, rows.vectors, left, low, high);
      }
      to += 8 * rows.col_stride;
    }
  }
}

// The fragment's rows to columns col0 to col0 + 63 of a tensor, its columns to rows from row0 on.
template <typename T, int N>
__device__ __forceinline__ void store_transposed(
    const Rows<T>& rows, int row0, int row_end, int col0, int col_end, const Fragment<N>& fragment) {
  const Place place = place_again();
  if constexpr (sizeof(T) == 2) {
    const int col = col0 + place.warp_row + place.quad_col;
    int row = row0 + place.quad;
    T* to = rows.at(row, col);
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // columns, and those 8 on
        const int first = 4 * i + 2 * half;
        const unsigned word = movmatrix_trans(pack<T>(fragment.at[first], fragment.at[first + 1]));
        const int left = row < row_end ? col_end - col - 8 * half : 0;
        store_word(to + 8 * half * rows.col_stride, rows.col_stride, rows.vectors, left, word);
      }
      row += 8;
      to += 8 * rows.row_stride;
    }
  } else {
    const int col = col0 + place.warp_row + place.quad;
    T* to = rows.at(row0 + place.quad_col, col);
#pragma unroll
    for (int c = 0; c < fragment.COLS; ++c) {
      const int row = row0 + place.quad_col + fragment.ahead(c);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row < row_end && col + 8 * r < col_end) {
          store_global(to + 8 * r * rows.col_stride, Vector<T, 1>{{fragment(r, c)}});
        }
      }
      to += (c % 2 == 0 ? 1 : 7) * rows.row_stride;
    }
  }
}

// Rows, or columns, from `end` on become 0.
template <int N>
__device__ __forceinline__ void clear_rows_from(Fragment<N>& fragment, int end) {
  const Place place = place_again();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (place.warp_row + place.quad + 8 * r >= end) clear_row(fragment, r);
  }
}
template <int N>
__device__ __forceinline__ void clear_columns_from(Fragment<N>& fragment, int end) {
  const Place place = place_again();
#pragma unroll
  for (int c = 0; c < fragment.COLS; ++c) {
    if (place.quad_col + fragment.ahead(c) < end) continue;
    fragment(0, c) = fragment(1, c) = 0;
  }
}

// A consumer's part of dq, whole: scaled, rounded, stored to the rows of its head, (seqlen_q, head_dim). Rows beyond
// the entry's own length are 0, whatever the sums there.
template <int N>
__device__ __forceinline__ void finish_dq(
    const Params& params, const Sequence& seq, Rows<Gradient_q> rows, int m_block, int consumer, Fragment<N>& dq) {
  const Accumulator factor = score_of(params).gradient;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) dq.at[i] *= factor;
  const int row0 = m_block * BLOCK_M, row_end = PACKED ? seq.seqlen_q : params.seqlen_q;
  if constexpr (WIDE) {
    const int col0 = consumer * first_share(HEAD_DIM);
    rows.data = rows.at(0, col0);
    if constexpr (LENS) clear_rows_from(dq, seq.seqlen_q - row0);
    store_rows(rows, row0, row_end, params.head_dim - col0, dq);
  } else {
    const int first_row = DQ_CHUNKS == 2 ? row0 : row0 + consumer * DQ_COLS;
    if constexpr (LENS) clear_columns_from(dq, seq.seqlen_q - first_row);
    store_transposed(rows, first_row, row_end, DQ_CHUNKS == 2 ? 64 * consumer : 0, params.head_dim, dq);
  }
}

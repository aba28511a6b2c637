// Products of tiles by plain FMA: which thread owns what, and two words, "nt" and "nn".
//
// Eight lanes of one warp share a row, so what one of them knows of a row reaches the others by shuffles, and a row
// of P that they write to shared memory is read back by the same warp alone. Over a tile of (M, N) scores thread
// (y, x) owns rows y + THREADS_Y * r and columns x + 8 * c:
//
//            x = 0 1 2 3 4 5 6 7 0 1 2 ...          a lane is 5 bits:  x has bits 3, 2, 0
//     y = 0      . . . . . . . .                                        y has bits 4, 1
//     y = 1      . . . . . . . .   (one warp:       An operand's row is then shared by lanes t and t ^ 1, its
//     y = 2      . . . . . . . .    4 x 8 lanes)    column by t and t ^ 2, and in both cases a 16-byte shared load of
//     y = 3      . . . . . . . .                    a warp takes 2 wavefronts instead of 4.
#pragma once
#include "tile.cuh"

constexpr int THREADS_X = 8;
constexpr int THREADS_Y = 4 * NUM_WARPS;

__device__ __forceinline__ int thread_x() { return (thread_index() & 1) | ((thread_index() >> 1) & 6); }
__device__ __forceinline__ int thread_y() {
  return thread_index() / 32 * 4 + (((thread_index() >> 1) & 1) | ((thread_index() >> 3) & 2));
}

// Over the eight lanes that share a row; all of them get the same bits.
__device__ __forceinline__ Accumulator row_sum_of(Accumulator x) {
  x += shuffle_xor(x, 1);
  x += shuffle_xor(x, 4);
  return x + shuffle_xor(x, 8);
}
__device__ __forceinline__ Accumulator row_max_of(Accumulator x) {
  x = math::max(x, shuffle_xor(x, 1));
  x = math::max(x, shuffle_xor(x, 4));
  return math::max(x, shuffle_xor(x, 8));
}

// A thread's part of (M, N) scores: row y + THREADS_Y * r, column x + 8 * c at [r][c].
template <int M, int N>
struct Scores {
  static constexpr int ROWS = M / THREADS_Y, COLS = N / THREADS_X;
  static_assert(M % THREADS_Y == 0 && N % THREADS_X == 0, "a tile of scores is dealt out evenly");
  Accumulator at[ROWS][COLS];

  __device__ __forceinline__ Accumulator& operator()(int r, int c) { return at[r][c]; }
  __device__ __forceinline__ Accumulator operator()(int r, int c) const { return at[r][c]; }

  static __device__ __forceinline__ int row(int r) { return thread_y() + THREADS_Y * r; }
  static __device__ __forceinline__ int col(int c) { return thread_x() + THREADS_X * c; }
};

// A thread's part of (M, N) outputs: the same rows; columns in vectors, as they are loaded. Vector g of the thread is
// columns VECTOR * (x + 8 * g) and the VECTOR - 1 after it, at [r][VECTOR * g] and so on.
template <int M, int N>
struct Outputs {
  static constexpr int ROWS = M / THREADS_Y, COLS = N / THREADS_X;
  static constexpr int VECTOR = COLS % WIDTH == 0 ? WIDTH : 2;  // widths like 16 and 48 are dealt out in pairs
  static_assert(M % THREADS_Y == 0 && N % (2 * THREADS_X) == 0, "a tile of outputs is dealt out evenly");
  Accumulator at[ROWS][COLS];

  __device__ __forceinline__ Accumulator& operator()(int r, int c) { return at[r][c]; }
  __device__ __forceinline__ Accumulator operator()(int r, int c) const { return at[r][c]; }

  static __device__ __forceinline__ int row(int r) { return thread_y() + THREADS_Y * r; }
  static __device__ __forceinline__ int col(int g) { return VECTOR * (thread_x() + THREADS_X * g); }
};

template <typename Fragment>
__device__ __forceinline__ void clear(Fragment& fragment) {
#pragma unroll
  for (int r = 0; r < fragment.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < fragment.COLS; ++c) fragment(r, c) = 0;
  }
}

template <typename Fragment>
__device__ __forceinline__ void multiply_row(Fragment& fragment, int r, Accumulator factor) {
#pragma unroll
  for (int c = 0; c < fragment.COLS; ++c) fragment(r, c) *= factor;
}

template <typename Fragment>
__device__ __forceinline__ void clear_row(Fragment& fragment, int r) {
#pragma unroll
  for (int c = 0; c < fragment.COLS; ++c) fragment(r, c) = 0;
}

// Rows from rows_left of the tile on.
template <typename Fragment>
__device__ __forceinline__ void clear_rows_beyond(Fragment& fragment, int rows_left) {
#pragma unroll
  for (int r = 0; r < fragment.ROWS; ++r) {
    if (fragment.row(r) >= rows_left) clear_row(fragment, r);
  }
}

template <typename Fragment>
__device__ __forceinline__ void multiply(Fragment& fragment, Accumulator factor) {
#pragma unroll
  for (int r = 0; r < fragment.ROWS; ++r) multiply_row(fragment, r, factor);
}

// The products' loops stay loops: unrolled whole they overrun the instruction cache. A turn begins with its shared
// loads and waits for them, so narrow fragments take several steps a turn. More would help a little and cost registers.
template <int COLS, int ENOUGH>
constexpr int UNROLL_OF = COLS < ENOUGH ? ENOUGH / COLS : 1;

// acc[m][n] += sum over d of a[m][d] * b[n][d].
// A thread loads ROWS + COLS vectors for ROWS * COLS * WIDTH FMAs.
template <int M, int N, int DEPTH>
__device__ __forceinline__ void multiply_nt(Scores<M, N>& acc, const Tile<M, DEPTH>& a, const Tile<N, DEPTH>& b) {
  constexpr int ROWS = Scores<M, N>::ROWS, COLS = Scores<M, N>::COLS;
  constexpr int UNROLL = UNROLL_OF<COLS, 8>;
#pragma unroll UNROLL
  for (int d = 0; d < DEPTH; d += WIDTH) {
    Vector<Accumulator, WIDTH> b_part[COLS];
#pragma unroll
    for (int c = 0; c < COLS; ++c) b_part[c] = load_shared<WIDTH>(&b.at[acc.col(c)][d]);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const Vector<Accumulator, WIDTH> a_part = load_shared<WIDTH>(&a.at[acc.row(r)][d]);
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {
#pragma unroll
        for (int c = 0; c < COLS; ++c) acc(r, c) = math::fma(a_part.at[e], b_part[c].at[e], acc(r, c));
      }
    }
  }
}

// acc[m][n] += sum over k of p[m][k] * b[k][n].
template <int M, int N, int DEPTH>
__device__ __forceinline__ void multiply_nn(Outputs<M, N>& acc, const Tile<M, DEPTH>& p, const Tile<DEPTH, N>& b) {
  constexpr int ROWS = Outputs<M, N>::ROWS, COLS = Outputs<M, N>::COLS, VECTOR = Outputs<M, N>::VECTOR;
  constexpr int UNROLL = UNROLL_OF<COLS, 16>;
#pragma unroll UNROLL
  for (int k = 0; k < DEPTH; k += WIDTH) {
    Vector<Accumulator, WIDTH> p_part[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) p_part[r] = load_shared<WIDTH>(&p.at[acc.row(r)][k]);
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
#pragma unroll
      for (int g = 0; g < COLS / VECTOR; ++g) {
        const Vector<Accumulator, VECTOR> b_part = load_shared<VECTOR>(&b.at[k + e][acc.col(g)]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) {
            Accumulator& sum = acc(r, VECTOR * g + i);
            sum = math::fma(p_part[r].at[e], b_part.at[i], sum);
          }
        }
      }
    }
  }
}

// The same for one chunk of the outputs, known at run time only. Registers have no index, so each chunk has its code.
template <int M, int N, int DEPTH, int CHUNKS>
__device__ __forceinline__ void multiply_nn(
    Outputs<M, N> (&acc)[CHUNKS], int chunk, const Tile<M, DEPTH>& p, const Tile<DEPTH, N>& b) {
#pragma unroll
  for (int part = 0; part < CHUNKS; ++part) {
    if (part == chunk) multiply_nn(acc[part], p, b);
  }
}

// Scores to shared memory, where the warp that owns the rows reads them back as the left operand of multiply_nn.
template <int M, int N>
__device__ __forceinline__ void store_scores(Tile<M, N>& tile, const Scores<M, N>& acc) {
#pragma unroll
  for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc.COLS; ++c) tile.at[acc.row(r)][acc.col(c)] = acc(r, c);
  }
}

// Outputs to rows [row0, row_end) and columns [col0, col_end) of a tensor.
template <int M, int N, typename T>
__device__ __forceinline__ void store_outputs(
    const Rows<T>& rows, int row0, int row_end, int col0, int col_end, const Outputs<M, N>& acc) {
  constexpr int VECTOR = Outputs<M, N>::VECTOR;
#pragma unroll
  for (int r = 0; r < acc.ROWS; ++r) {
    if (acc.row(r) >= row_end - row0) continue;
#pragma unroll
    for (int g = 0; g < acc.COLS / VECTOR; ++g) {
      Accumulator numbers[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) numbers[i] = acc(r, VECTOR * g + i);
      store_columns(rows, row0 + acc.row(r), col0 + acc.col(g), col_end, numbers);
    }
  }
}

// Tiles of float64 in shared memory since sm_80: how cp.async fills them, how a lane reads them as operands of
// mma.sync, and products of a warp. By plain instructions of every thread, so any strides and any widths will do.
//
// A product may sum in any order, and its columns may be dealt out in any order, as long as both operands agree. So
// that all reads are of 16 bytes and nothing is shuffled, lane 4 g + t reads
//     of an operand whose columns are summed over, from each 16 of them, columns 4 t to 4 t + 3;
//     of one whose rows are summed over, from each 16 of them, rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, which are those
//     columns of Scores that it holds itself, and of each 16 columns 2 g and 2 g + 1: its outputs are columns 4 t to
//     4 t + 3 then.
#pragma once
#include "basics.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"
#include "fragment.cuh"

constexpr int NUM_THREADS = 32 * NUM_WARPS;

// Rows of COLS numbers, without padding: 16-byte chunk c of row r lies at place c ^ r % 8, which stays among its eight.
// What eight neighbouring lanes read at a time then lies in eight different groups of banks, in either way of reading.
template <int ROWS, int COLS>
struct alignas(128) SwizzledTile {
  static_assert(COLS % 16 == 0, "a step of a product is 16 columns");
  double at[ROWS][COLS];

  __device__ __forceinline__ double* chunk(int row, int c) { return &at[row][2 * (c ^ row % 8)]; }
  __device__ __forceinline__ const double* chunk(int row, int c) const { return &at[row][2 * (c ^ row % 8)]; }
};

// ---- from global memory

// By 16 bytes. Eight lanes take a row, 16 columns a step; the threads take ROW_STEP rows at once.
template <int THREADS, int ROWS, int COLS>
__device__ __forceinline__ void load_by_chunk(
    SwizzledTile<ROWS, COLS>& tile, const Rows<const double>& rows, int row0, int row_end, int col_end) {
  constexpr int STEPS = COLS / 16, ROW_STEP = THREADS / 8;
  const int thread = thread_index_again() % THREADS, row = thread / 8, col = thread % 8 * 2;
  const double* from = rows.at(row0 + row) + col;
#pragma unroll
  for (int ahead = 0; ahead < ROWS; ahead += ROW_STEP) {
    if (ROWS % ROW_STEP == 0 || row + ahead < ROWS) {
      const unsigned to = shared_address(tile.chunk(row + ahead, thread % 8));
      const int inside = row + ahead < row_end - row0 ? col_end - col : 0;  // columns from this thread's first on
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int left = inside - 16 * step;
        cp_async<16>(to + 8 * 16 * step, from + 16 * step, left <= 0 ? 0 : left == 1 ? 8 : 16);
      }
    }
    from += ROW_STEP * rows.row_stride;
  }
}

// One by one, any strides. Neighbouring threads take what is nearer in memory: the next column, or the next row.
template <int THREADS, int ROWS, int COLS>
__device__ __forceinline__ void load_by_number(
    SwizzledTile<ROWS, COLS>& tile, const Rows<const double>& rows, int row0, int row_end, int col_end) {
  const bool along_row = rows.col_stride == 1 || rows.col_stride == -1;
#pragma unroll 1
  for (int i = thread_index_again() % THREADS; i < ROWS * COLS; i += THREADS) {
    const int row = along_row ? i / COLS : i % ROWS, col = along_row ? i % COLS : i / ROWS;
    const bool inside = row < row_end - row0 && col < col_end;
    const double* from = inside ? rows.at(row0 + row, col) : rows.data;
    cp_async<8>(shared_address(tile.chunk(row, col / 2) + col % 2), from, inside ? 8 : 0);
  }
}

// Rows [row0, row_end) and columns [0, col_end) of the tensor, the rest of the tile zero; what lies outside is never
// read. By the whole block, or by THREADS neighbours of it, the first one a multiple of THREADS; they then commit and
// wait, and all meet before they read the tile.
template <int THREADS = NUM_THREADS, int ROWS, int COLS>
__device__ __forceinline__ void load_tile(
    SwizzledTile<ROWS, COLS>& tile, const Rows<const double>& rows, int row0, int row_end, int col_end) {
  if (rows.vectors) {
    load_by_chunk<THREADS>(tile, rows, row0, row_end, col_end);
  } else {
    load_by_number<THREADS>(tile, rows, row0, row_end, col_end);
  }
}

// ---- what a thread holds

// Of a warp's (16, N) products: rows lane / 4 and 8 below, columns in pairs, as mma leaves them.
template <int N>
struct Scores {
  static constexpr int ROWS = 2, COLS = N / 4;
  double at[N / 8][4];

  __device__ __forceinline__ double& operator()(int r, int c) { return at[c / 2][2 * r + c % 2]; }
  __device__ __forceinline__ double operator()(int r, int c) const { return at[c / 2][2 * r + c % 2]; }

  static __device__ __forceinline__ int row(int r) { return lane_index() / 4 + 8 * r; }
  // The column is first_col() + ahead(c); ahead() is known when the kernel is compiled.
  static __device__ __forceinline__ int first_col() { return lane_index() % 4 * 2; }
  static constexpr __device__ __forceinline__ int ahead(int c) { return c / 2 * 8 + c % 2; }
};

// Of a warp's (16, N) outputs: the same rows, of each 16 columns four neighbours.
template <int N>
struct Outputs {
  static constexpr int ROWS = 2, COLS = N / 4;
  double at[N / 8][4];

  __device__ __forceinline__ double& operator()(int r, int c) { return at[c / 4 * 2 + c % 2][2 * r + c % 4 / 2]; }
  __device__ __forceinline__ double operator()(int r, int c) const {
    return at[c / 4 * 2 + c % 2][2 * r + c % 4 / 2];
  }

  static __device__ __forceinline__ int row(int r) { return lane_index() / 4 + 8 * r; }
  static __device__ __forceinline__ int first_col() { return lane_index() % 4 * 4; }
  static constexpr __device__ __forceinline__ int ahead(int c) { return c / 4 * 16 + c % 4; }
};

// Over the four lanes that share a row; all of them get the same bits.
__device__ __forceinline__ double row_sum_of(double x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
__device__ __forceinline__ double row_max_of(double x) {
  x = math::max(x, shuffle_xor(x, 1));
  return math::max(x, shuffle_xor(x, 2));
}

template <typename Part>
__device__ __forceinline__ void clear(Part& part) {
#pragma unroll
  for (int r = 0; r < part.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < part.COLS; ++c) part(r, c) = 0;
  }
}
template <typename Part, int PARTS>
__device__ __forceinline__ void clear(Part (&parts)[PARTS]) {
#pragma unroll
  for (int i = 0; i < PARTS; ++i) clear(parts[i]);
}
template <typename Part>
__device__ __forceinline__ void multiply_row(Part& part, int r, double factor) {
#pragma unroll
  for (int c = 0; c < part.COLS; ++c) part(r, c) *= factor;
}
template <typename Part>
__device__ __forceinline__ void clear_row(Part& part, int r) {
#pragma unroll
  for (int c = 0; c < part.COLS; ++c) part(r, c) = 0;
}

// Row r of outputs to columns [0, col_end) of a tensor's row, of which the first is the outputs' first.
template <typename T, int N>
__device__ __forceinline__ void store_row(
    const Rows<T>& rows, int row, int col_end, const Outputs<N>& outputs, int r) {
#pragma unroll
  for (int c = 0; c < outputs.COLS; c += 2) {
    const double numbers[2] = {outputs(r, c), outputs(r, c + 1)};
    store_columns(rows, row, outputs.first_col() + outputs.ahead(c), col_end, numbers);
  }
}

// ---- operands: where this lane reads a tile

// The tile's columns are summed over; eight of its rows make the product's next eight rows, or columns.
template <int COLS>
struct Along {
  const double *low, *high;  // columns 4 t and 4 t + 1; 4 t + 2 and 4 t + 3

  // Rows from 8 * block on, columns from 16 * step on.
  __device__ __forceinline__ void load(double (&x)[4], int block, int step) const {
    const Vector<double, 2> a = load_shared<2>(low + 8 * COLS * block + 16 * step);
    const Vector<double, 2> b = load_shared<2>(high + 8 * COLS * block + 16 * step);
    x[0] = a.at[0];
    x[1] = a.at[1];
    x[2] = b.at[0];
    x[3] = b.at[1];
  }
};
// From a row on, a multiple of 8.
template <int ROWS, int COLS>
__device__ __forceinline__ Along<COLS> along_rows(const SwizzledTile<ROWS, COLS>& tile, int row0 = 0) {
  const int lane = thread_index_again() % 32, g = lane / 4, t = lane % 4;
  return {tile.chunk(row0 + g, 2 * t), tile.chunk(row0 + g, 2 * t + 1)};
}

// The tile's rows are summed over; 16 of its columns make 16 of the outputs'.
template <int COLS>
struct Across {
  const double *even, *odd;  // rows 2 t and 2 t + 1, columns 2 g and 2 g + 1

  // Rows from 16 * step on, columns from 16 * panel on: x for the outputs' even columns, y for the odd ones.
  __device__ __forceinline__ void load(double (&x)[4], double (&y)[4], int panel, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double* from = (i % 2 == 0 ? even : odd) + 8 * COLS * (2 * step + i / 2) + 16 * panel;
      const Vector<double, 2> pair = load_shared<2>(from);
      x[i] = pair.at[0];
      y[i] = pair.at[1];
    }
  }
};
// From a column on, a multiple of 16.
template <int ROWS, int COLS>
__device__ __forceinline__ Across<COLS> across_rows(const SwizzledTile<ROWS, COLS>& tile, int col0 = 0) {
  const int lane = thread_index_again() % 32, g = lane / 4, t = lane % 4;
  return {tile.chunk(2 * t, g + col0 / 2), tile.chunk(2 * t + 1, g + col0 / 2)};
}

// ---- products of a warp

// d (16, 8) += a (16, 16) b (16, 8), in the fragments of mma_sm80.cuh.
__device__ __forceinline__ void multiply(double (&d)[4], const double (&a)[8], const double (&b)[4]) {
#if __CUDA_ARCH__ >= 900
  mma_m16n8k16_f64(d, a, b);
#else
  double upper[2] = {d[0], d[1]}, lower[2] = {d[2], d[3]};  // rows
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mma_m8n8k4_f64(upper, a[2 * i], b[i]);
    mma_m8n8k4_f64(lower, a[2 * i + 1], b[i]);
  }
  d[0] = upper[0];
  d[1] = upper[1];
  d[2] = lower[0];
  d[3] = lower[1];
#endif
}

// A left operand: 16 rows, and 16 of what is summed over. Rows 16 * block on of a tile whose columns are summed over:
template <int COLS>
__device__ __forceinline__ void load_left(double (&a)[8], const Along<COLS>& tile, int block, int step) {
  double upper[4], lower[4];
  tile.load(upper, 2 * block, step);
  tile.load(lower, 2 * block + 1, step);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = upper[i];
    a[2 * i + 1] = lower[i];
  }
}
// Columns 16 * block on of a tile whose rows are summed over, the even ones above the odd ones:
template <int COLS>
__device__ __forceinline__ void load_left(double (&a)[8], const Across<COLS>& tile, int block, int step) {
  double even[4], odd[4];
  tile.load(even, odd, block, step);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = even[i];
    a[2 * i + 1] = odd[i];
  }
}
// Scores that this warp holds:
template <int N, int R>
__device__ __forceinline__ void load_left(double (&a)[8], const Scores<N> (&scores)[R], int block, int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const double(&columns)[4] = scores[block].at[2 * step + i / 2];  // 8 of them
    a[2 * i] = columns[i % 2];
    a[2 * i + 1] = columns[2 + i % 2];
  }
}

// acc, R times (16, N), += a b^T over 16 * STEPS columns of the tile b, UNROLL steps in one turn of a loop: many need
// registers to load ahead. between(step) is other work, while the products of a step are under way.
template <int STEPS, int UNROLL, int N, int R, typename A, int COLS, typename Between>
__device__ __forceinline__ void add_scores(
    Scores<N> (&acc)[R], const A& a, const Along<COLS>& b, const Between& between) {
#pragma unroll UNROLL
  for (int step = 0; step < STEPS; ++step) {
    double left[R][8], right[4];
#pragma unroll
    for (int f = 0; f < R; ++f) load_left(left[f], a, f, step);
#pragma unroll
    for (int block = 0; block < N / 8; ++block) {
      b.load(right, block, step);
#pragma unroll
      for (int f = 0; f < R; ++f) multiply(acc[f].at[block], left[f], right);
    }
    between(step);
  }
}

// acc, R times (16, N), += a b over 16 * STEPS rows of the tile b.
template <int STEPS, int N, int R, typename A, int COLS, typename Between>
__device__ __forceinline__ void add_outputs(
    Outputs<N> (&acc)[R], const A& a, const Across<COLS>& b, const Between& between) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    double left[R][8];
#pragma unroll
    for (int f = 0; f < R; ++f) load_left(left[f], a, f, step);
#pragma unroll
    for (int panel = 0; panel < N / 16; ++panel) {
      double even[4], odd[4];
      b.load(even, odd, panel, step);
#pragma unroll
      for (int f = 0; f < R; ++f) {
        multiply(acc[f].at[2 * panel], left[f], even);
        multiply(acc[f].at[2 * panel + 1], left[f], odd);
      }
      if (panel == 0) between(step);
    }
  }
}

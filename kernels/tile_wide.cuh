// Tiles of float64 and float32 in shared memory since sm_80: how cp.async fills them, how a lane reads them as operands
// of mma.sync, and products of a warp. By plain instructions of every thread, so any strides and any widths will do.
//
// A product may sum in any order, and its columns may be dealt out in any order, as long as both operands agree. So
// that reads are of 16 bytes, or CHUNK numbers, and nothing is shuffled, lane 4 g + t reads
//     of an operand whose columns are summed over, from each 16 of them, columns 4 t to 4 t + 3;
//     of one whose rows are summed over, from each 16 of them, rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, which are those
//     columns of Scores that it holds itself, and of each panel of 8 CHUNK columns the CHUNK from CHUNK g on: its
//     outputs are the 2 CHUNK columns from 2 CHUNK t on then.
#pragma once
#include "basics.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"
#include "fragment.cuh"
#include "parts.cuh"

constexpr int NUM_THREADS = 32 * NUM_WARPS;
constexpr int CHUNK = 16 / sizeof(Element), PANEL = 8 * CHUNK;  // columns

// Rows of COLS numbers, without padding: 16-byte chunk c of row r lies at place c ^ turn(r), which stays among its
// eight. What eight neighbouring lanes read at a time then lies in eight different groups of banks, in either way of
// reading: along rows, two chunks of four rows, or four chunks of two; across them, two chunks of rows 0, 2, 4 and 6.
// Rows of 16 float32 have four chunks only, which change places among each other.
template <int ROWS, int COLS>
struct alignas(128) SwizzledTile {
  static_assert(COLS % PANEL == 0 || COLS == 16, "as many chunks as change places");
  Element at[ROWS][COLS];

  __device__ __forceinline__ Element* chunk(int row, int c) { return &at[row][CHUNK * (c ^ turn(row))]; }
  __device__ __forceinline__ const Element* chunk(int row, int c) const { return &at[row][CHUNK * (c ^ turn(row))]; }
  // Columns 2 p and 2 p + 1.
  __device__ __forceinline__ Element* pair(int row, int p) { return chunk(row, p / PAIRS) + p % PAIRS * 2; }
  __device__ __forceinline__ const Element* pair(int row, int p) const {
    return chunk(row, p / PAIRS) + p % PAIRS * 2;
  }

 private:
  static constexpr int PAIRS = CHUNK / 2;  // in a chunk

  static __device__ __forceinline__ int turn(int row) {
    return CHUNK == 2 ? row % 8 : COLS == 16 ? row / 2 % 4 : row % 8 ^ row % 2 * 4;
  }
};

// ---- from global memory

// By 16 bytes. Eight lanes take a row, a panel a step; the threads take ROW_STEP rows at once.
template <int THREADS, int ROWS, int COLS>
__device__ __forceinline__ void load_by_chunk(
    SwizzledTile<ROWS, COLS>& tile, const Rows<const Element>& rows, int row0, int row_end, int col_end) {
  constexpr int STEPS = COLS / PANEL, ROW_STEP = THREADS / 8;
  const int thread = thread_index_again() % THREADS, row = thread / 8, col = thread % 8 * CHUNK;
  const Element* from = rows.at(row0 + row) + col;
#pragma unroll
  for (int ahead = 0; ahead < ROWS; ahead += ROW_STEP) {
    if (ROWS % ROW_STEP == 0 || row + ahead < ROWS) {
      const unsigned to = shared_address(tile.chunk(row + ahead, thread % 8));
      // Bytes of the row, from this thread's first on.
      const int inside = row + ahead < row_end - row0 ? (col_end - col) * static_cast<int>(sizeof(Element)) : 0;
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int left = inside - 128 * step;
        cp_async<16>(to + 128 * step, from + PANEL * step, left <= 0 ? 0 : left < 16 ? left : 16);
      }
    }
    from += ROW_STEP * rows.row_stride;
  }
}

// One by one, any strides. Neighbouring threads take what is nearer in memory: the next column, or the next row.
template <int THREADS, int ROWS, int COLS>
__device__ __forceinline__ void load_by_number(
    SwizzledTile<ROWS, COLS>& tile, const Rows<const Element>& rows, int row0, int row_end, int col_end) {
  const bool along_row = rows.col_stride == 1 || rows.col_stride == -1;
#pragma unroll 1
  for (int i = thread_index_again() % THREADS; i < ROWS * COLS; i += THREADS) {
    const int row = along_row ? i / COLS : i % ROWS, col = along_row ? i % COLS : i / ROWS;
    const bool inside = row < row_end - row0 && col < col_end;
    const Element* from = inside ? rows.at(row0 + row, col) : rows.data;
    constexpr int BYTES = sizeof(Element);
    cp_async<BYTES>(shared_address(tile.chunk(row, col / CHUNK) + col % CHUNK), from, inside ? BYTES : 0);
  }
}

// Rows [row0, row_end) and columns [0, col_end) of the tensor, the rest of the tile zero; what lies outside is never
// read. By the whole block, or by THREADS neighbours of it, the first one a multiple of THREADS; they then commit and
// wait, and all meet before they read the tile.
template <int THREADS = NUM_THREADS, int ROWS, int COLS>
__device__ __forceinline__ void load_tile(
    SwizzledTile<ROWS, COLS>& tile, const Rows<const Element>& rows, int row0, int row_end, int col_end) {
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
  Element at[N / 8][4];

  __device__ __forceinline__ Element& operator()(int r, int c) { return at[c / 2][2 * r + c % 2]; }
  __device__ __forceinline__ Element operator()(int r, int c) const { return at[c / 2][2 * r + c % 2]; }

  static __device__ __forceinline__ int row(int r) { return lane_index() / 4 + 8 * r; }
  // The column is first_col() + ahead(c); ahead() is known when the kernel is compiled.
  static __device__ __forceinline__ int first_col() { return lane_index() % 4 * 2; }
  static constexpr __device__ __forceinline__ int ahead(int c) { return c / 2 * 8 + c % 2; }
};

// Of a warp's (16, N) outputs: the same rows, of each panel 2 CHUNK neighbours.
template <int N>
struct Outputs {
  static constexpr int ROWS = 2, COLS = N / 4;
  static_assert(N % PANEL == 0, "whole panels");
  Element at[N / 8][4];

  __device__ __forceinline__ Element& operator()(int r, int c) { return at[block(c)][2 * r + c % OWN / CHUNK]; }
  __device__ __forceinline__ Element operator()(int r, int c) const { return at[block(c)][2 * r + c % OWN / CHUNK]; }

  static __device__ __forceinline__ int row(int r) { return lane_index() / 4 + 8 * r; }
  static __device__ __forceinline__ int first_col() { return lane_index() % 4 * OWN; }
  static constexpr __device__ __forceinline__ int ahead(int c) { return c / OWN * PANEL + c % OWN; }

 private:
  static constexpr int OWN = 2 * CHUNK;
  static constexpr __device__ __forceinline__ int block(int c) { return c / OWN * CHUNK + c % CHUNK; }
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
__device__ __forceinline__ void multiply_row(Part& part, int r, Accumulator factor) {
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
  for (int c = 0; c < outputs.COLS; c += CHUNK) {
    Element numbers[CHUNK];
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) numbers[e] = outputs(r, c + e);
    store_columns(rows, row, outputs.first_col() + outputs.ahead(c), col_end, numbers);
  }
}

// ---- operands: where this lane reads a tile

// The tile's columns are summed over; eight of its rows make the product's next eight rows, or columns.
template <int COLS>
struct Along {
  // float64: of each 16 columns, 4 t and 4 t + 1; 4 t + 2 and 4 t + 3. float32: 4 t to 4 t + 3 of each even 16 columns;
  // of each odd 16.
  const Element *first, *second;

  // Rows from 8 * block on, columns from 16 * step on.
  __device__ __forceinline__ void load(Element (&x)[4], int block, int step) const {
    if constexpr (CHUNK == 2) {
      const Vector<Element, 2> a = load_shared<2>(first + 8 * COLS * block + 16 * step);
      const Vector<Element, 2> b = load_shared<2>(second + 8 * COLS * block + 16 * step);
      x[0] = a.at[0];
      x[1] = a.at[1];
      x[2] = b.at[0];
      x[3] = b.at[1];
    } else {
      const Element* from = (step % 2 == 0 ? first : second) + 8 * COLS * block + 32 * (step / 2);
      const Vector<Element, 4> a = load_shared<4>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = a.at[i];
    }
  }
};
// From a row on, a multiple of 8.
template <int ROWS, int COLS>
__device__ __forceinline__ Along<COLS> along_rows(const SwizzledTile<ROWS, COLS>& tile, int row0 = 0) {
  const int lane = thread_index_again() % 32, g = lane / 4, t = lane % 4;
  if constexpr (CHUNK == 2) {
    return {tile.chunk(row0 + g, 2 * t), tile.chunk(row0 + g, 2 * t + 1)};
  } else {
    return {tile.chunk(row0 + g, t), tile.chunk(row0 + g, t + 4)};
  }
}

// The tile's rows are summed over; 8 * WIDTH of its columns make as many of the outputs', and lane 4 g + t reads the
// WIDTH from WIDTH * g on.
template <int COLS, int WIDTH>
struct Across {
  const Element *even, *odd;  // rows 2 t and 2 t + 1

  // Rows from 16 * step on, the columns of a panel: x[i] for the i-th of this lane's.
  __device__ __forceinline__ void load(Element (&x)[WIDTH][4], int panel, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Element* from = (i % 2 == 0 ? even : odd) + 8 * COLS * (2 * step + i / 2) + 8 * WIDTH * panel;
      const Vector<Element, WIDTH> run = load_shared<WIDTH>(from);
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) x[e][i] = run.at[e];
    }
  }
};
// From a column on: a multiple of a panel.
template <int ROWS, int COLS>
__device__ __forceinline__ Across<COLS, CHUNK> across_rows(const SwizzledTile<ROWS, COLS>& tile, int col0 = 0) {
  const int lane = thread_index_again() % 32, g = lane / 4, t = lane % 4;
  return {tile.chunk(2 * t, g + col0 / CHUNK), tile.chunk(2 * t + 1, g + col0 / CHUNK)};
}
// 16 columns, of which two belong to a lane: the rows of a left operand.
template <int ROWS, int COLS>
__device__ __forceinline__ Across<COLS, 2> sixteen_across(const SwizzledTile<ROWS, COLS>& tile, int col0) {
  const int lane = thread_index_again() % 32, g = lane / 4, t = lane % 4;
  return {tile.pair(2 * t, g + col0 / 2), tile.pair(2 * t + 1, g + col0 / 2)};
}

// ---- products of a warp

// A left operand: 16 rows, and 16 of what is summed over. Rows 16 * block on of a tile whose columns are summed over:
template <int COLS>
__device__ __forceinline__ void load_left(Left& a, const Along<COLS>& tile, int block, int step) {
  Element upper[4], lower[4];
  tile.load(upper, 2 * block, step);
  tile.load(lower, 2 * block + 1, step);
  a.take(upper, lower);
}
// The 16 columns of a tile whose rows are summed over, the even ones above the odd ones:
template <int COLS>
__device__ __forceinline__ void load_left(Left& a, const Across<COLS, 2>& tile, int, int step) {
  Element columns[2][4];
  tile.load(columns, 0, step);
  a.take(columns[0], columns[1]);
}
// Scores that this warp holds:
template <int N, int R>
__device__ __forceinline__ void load_left(Left& a, const Scores<N> (&scores)[R], int block, int step) {
  const Element(&low)[4] = scores[block].at[2 * step];  // 8 columns
  const Element(&high)[4] = scores[block].at[2 * step + 1];
  const Element upper[4] = {low[0], low[1], high[0], high[1]}, lower[4] = {low[2], low[3], high[2], high[3]};
  a.take(upper, lower);
}

// acc, R times (16, N), += a b^T over 16 * STEPS columns of the tile b, UNROLL steps in one turn of a loop: many need
// registers to load ahead. between(step) is other work, while the products of a step are under way.
template <int STEPS, int UNROLL, int N, int R, typename A, int COLS, typename Between>
__device__ __forceinline__ void add_scores(
    Scores<N> (&acc)[R], const A& a, const Along<COLS>& b, const Between& between) {
  constexpr int SIDE = side_by_side<N / 8>();
#pragma unroll UNROLL
  for (int step = 0; step < STEPS; ++step) {
    Left left[R];
#pragma unroll
    for (int f = 0; f < R; ++f) load_left(left[f], a, f, step);
#pragma unroll
    for (int block = 0; block < N / 8; block += SIDE) {
      Right right[SIDE];
#pragma unroll
      for (int i = 0; i < SIDE; ++i) {
        Element column[4];
        b.load(column, block + i, step);
        right[i].take(column);
      }
      multiply(acc, block, left, right);
    }
    between(step);
  }
}

// acc, R times (16, N), += a b over 16 * STEPS rows of the tile b.
template <int STEPS, int N, int R, typename A, int COLS, typename Between>
__device__ __forceinline__ void add_outputs(
    Outputs<N> (&acc)[R], const A& a, const Across<COLS, CHUNK>& b, const Between& between) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    Left left[R];
#pragma unroll
    for (int f = 0; f < R; ++f) load_left(left[f], a, f, step);
#pragma unroll
    for (int panel = 0; panel < N / PANEL; ++panel) {
      Element columns[CHUNK][4];
      b.load(columns, panel, step);
      Right right[CHUNK];
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) right[i].take(columns[i]);
      multiply(acc, CHUNK * panel, left, right);
      if (panel == 0) between(step);
    }
  }
}

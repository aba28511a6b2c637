// Tiles in shared memory: always in the Accumulator's type, row-major, zero where the tensor has nothing.
#pragma once
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"

constexpr int NUM_THREADS = 32 * NUM_WARPS;
static_assert(NUM_STAGES == 1, "tiles are loaded when the block before has been used; other blocks of the SM fill the wait");

// Accumulators in 16 bytes: what one shared load brings.
constexpr int WIDTH = 16 / sizeof(Accumulator);

// Columns of q and k (of v, out and dout) in shared memory at a time, and how many such chunks make a head. One chunk
// means resident: what a block owns is loaded once and stays.
constexpr int CHUNK = HEAD_DIM < DIM_CHUNK ? HEAD_DIM : DIM_CHUNK, CHUNKS = HEAD_DIM / CHUNK;
constexpr int CHUNK_V = HEAD_DIM_V < DIM_CHUNK ? HEAD_DIM_V : DIM_CHUNK, CHUNKS_V = HEAD_DIM_V / CHUNK_V;
static_assert(HEAD_DIM % CHUNK == 0 && HEAD_DIM_V % CHUNK_V == 0, "a padded width is whole chunks");

// COLS is a multiple of 8, so that 16 bytes of padding make a row an odd number of 16-byte units long: 8 rows
// read at the same column, 16 bytes each, then lie in 8 different groups of banks.
template <int ROWS, int COLS>
struct Tile {
  static_assert(COLS % 8 == 0, "rows of a tile are read 16 bytes at a time");
  static constexpr int NUM_ROWS = ROWS, NUM_COLS = COLS, PITCH = COLS + WIDTH;
  Accumulator at[ROWS][PITCH];
};

// Loads of one thread under way at a time: enough to hide their latency behind each other.
constexpr int BATCH = 8;

// Columns [0, cols) of a tile, 16 bytes a load; cols is a multiple of those. Rows from rows_left on become zero.
template <int ROWS, int COLS, typename T>
__device__ __forceinline__ void load_by_vector(
    Tile<ROWS, COLS>& tile, const T* corner, long long row_stride, int rows_left, int cols) {
  constexpr int RUN = 16 / sizeof(T);  // elements of one load
  constexpr int LOADS = ROWS * (COLS / RUN), TURNS = (LOADS + NUM_THREADS - 1) / NUM_THREADS;
  constexpr int BATCH = TURNS < ::BATCH ? TURNS : ::BATCH;
#pragma unroll 1
  for (int first = thread_index(); first < LOADS; first += NUM_THREADS * BATCH) {
    Vector<T, RUN> run[BATCH] = {};
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int i = first + NUM_THREADS * b, row = i / (COLS / RUN), col = i % (COLS / RUN) * RUN;
      if (row < rows_left && col < cols) run[b] = load_global<RUN>(corner + row * row_stride + col);
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int i = first + NUM_THREADS * b, row = i / (COLS / RUN), col = i % (COLS / RUN) * RUN;
#pragma unroll
      for (int part = 0; part < RUN; part += WIDTH) {
        Vector<Accumulator, WIDTH> numbers;
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) numbers.at[e] = to_accumulator(run[b].at[part + e]);
        if (row < ROWS && col < cols) store_shared(&tile.at[row][col + part], numbers);
      }
    }
  }
}

// Columns [first_col, COLS) of a tile one by one, a warp a row; what lies beyond rows_left or cols_left becomes zero.
template <int ROWS, int COLS, typename T>
__device__ __forceinline__ void load_by_element(
    Tile<ROWS, COLS>& tile, const T* corner, long long row_stride, long long col_stride, int rows_left, int cols_left,
    int first_col) {
#pragma unroll 1
  for (int col = first_col + thread_index() % 32; col < COLS; col += 32) {
#pragma unroll 1
    for (int first = thread_index() / 32; first < ROWS; first += NUM_WARPS * BATCH) {
      Vector<T, 1> element[BATCH] = {};
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const int row = first + NUM_WARPS * b;
        if (row < rows_left && col < cols_left) element[b] = load_global<1>(corner + row * row_stride + col * col_stride);
      }
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const int row = first + NUM_WARPS * b;
        if (row < ROWS) tile.at[row][col] = to_accumulator(element[b].at[0]);
      }
    }
  }
}

// Rows [row0, row_end) and columns [col0, col_end) of the tensor, the rest of the tile zero. By the whole block;
// a barrier must follow before other threads read. What lies outside those rows and columns is never read.
template <int ROWS, int COLS, typename T>
__device__ __forceinline__ void load_tile(
    Tile<ROWS, COLS>& tile, const Rows<const T>& rows, int row0, int row_end, int col0, int col_end) {
  constexpr int RUN = 16 / sizeof(T);
  const int rows_left = row_end - row0;
  const int cols_left = col_end < col0 ? 0 : col_end - col0 < COLS ? col_end - col0 : COLS;
  const T* corner = rows.at(row0, col0);  // (rows_left, cols_left); col0 is a multiple of 16
  const int by_vector = rows.vectors ? cols_left / RUN * RUN : 0;
  load_by_vector(tile, corner, rows.row_stride, rows_left, by_vector);
  load_by_element(tile, corner, rows.row_stride, rows.col_stride, rows_left, cols_left, by_vector);
}

// N neighbouring columns of one row; columns from col_end on are 0 and not read.
template <int N, typename T>
__device__ __forceinline__ void load_columns(
    const Rows<const T>& rows, int row, int col, int col_end, Accumulator (&numbers)[N]) {
  constexpr int RUN = 16 / sizeof(T) < N ? 16 / sizeof(T) : N;  // elements of one load
  if (rows.vectors && col + N <= col_end) {
#pragma unroll
    for (int part = 0; part < N; part += RUN) {
      const Vector<T, RUN> run = load_global<RUN>(rows.at(row, col + part));
#pragma unroll
      for (int e = 0; e < RUN; ++e) numbers[part + e] = to_accumulator(run.at[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      numbers[e] = col + e < col_end ? to_accumulator(load_global<1>(rows.at(row, col + e)).at[0]) : Accumulator(0);
    }
  }
}

// N neighbouring columns of one row, rounded to the tensor's type; columns from col_end on are not stored.
template <int N, typename T>
__device__ __forceinline__ void store_columns(
    const Rows<T>& rows, int row, int col, int col_end, const Accumulator (&numbers)[N]) {
  Vector<T, N> rounded;
#pragma unroll
  for (int e = 0; e < N; ++e) rounded.at[e] = from_accumulator<T>(numbers[e]);
  if (rows.vectors && col + N <= col_end) {
    store_global(rows.at(row, col), rounded);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (col + e < col_end) store_global(rows.at(row, col + e), Vector<T, 1>{{rounded.at[e]}});
    }
  }
}

// One number of a tensor that has rows but no columns: lse, dlse, delta.
__device__ __forceinline__ Accumulator load_number(const Rows<const Accumulator>& rows, int row) {
  return load_global<1>(rows.at(row)).at[0];
}
__device__ __forceinline__ void store_number(const Rows<Accumulator>& rows, int row, Accumulator number) {
  store_global(rows.at(row), Vector<Accumulator, 1>{{number}});
}

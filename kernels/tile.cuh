// Tiles in shared memory: always in the Accumulator's type, row-major, zero where the tensor has nothing.
#pragma once
#include "basics.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "rows.cuh"

constexpr int NUM_THREADS = 32 * NUM_WARPS;

// Accumulators in 16 bytes: what one shared load brings.
constexpr int WIDTH = 16 / sizeof(Accumulator);

// Columns of q and k (of v, out and dout) in shared memory at a time, and how many such chunks make a head.
constexpr int CHUNK = smaller(HEAD_DIM, DIM_CHUNK), CHUNKS = HEAD_DIM / CHUNK;
constexpr int CHUNK_V = smaller(HEAD_DIM_V, DIM_CHUNK), CHUNKS_V = HEAD_DIM_V / CHUNK_V;
static_assert(HEAD_DIM % CHUNK == 0 && HEAD_DIM_V % CHUNK_V == 0, "a padded width is whole chunks");

// What a main loop reads takes turns in two slots: one is worked on while the other is filled.
static_assert(NUM_STAGES == 2, "the simt family has two slots");

// COLS is a multiple of 8, so that 16 bytes of padding make a row an odd number of 16-byte units long: 8 rows
// read at the same column, 16 bytes each, then lie in 8 different groups of banks.
template <int ROWS, int COLS>
struct Tile {
  static_assert(COLS % 8 == 0, "rows of a tile are read 16 bytes at a time");
  Accumulator at[ROWS][COLS + WIDTH];
};

// A chunk of a block of queries, and of a block of keys: of one matrix or the other at a time.
union QueryTile {
  Tile<BLOCK_M, CHUNK> q;
  Tile<BLOCK_M, CHUNK_V> dout;
};
union KeyTile {
  Tile<BLOCK_N, CHUNK> k;
  Tile<BLOCK_N, CHUNK_V> v;
};

template <typename A, typename B>
constexpr bool SAME_TYPE = false;
template <typename A>
constexpr bool SAME_TYPE<A, A> = true;

// N neighbours on their way from global memory to a tile. A thread begins several, then finishes them, so that their
// latencies hide behind each other.
template <typename T, int N, bool ASYNC = ASYNC_COPIES && SAME_TYPE<T, Accumulator>>
struct Transfer {
  Vector<T, N> numbers;

  __device__ __forceinline__ void begin(Accumulator*, const T* global, bool inside) {
    numbers = {};
    if (inside) numbers = load_global<N>(global);
  }
  __device__ __forceinline__ void finish(Accumulator* shared) const {
    constexpr int PART = N < WIDTH ? N : WIDTH;
#pragma unroll
    for (int part = 0; part < N; part += PART) {
      Vector<Accumulator, PART> converted;
#pragma unroll
      for (int e = 0; e < PART; ++e) converted.at[e] = to_accumulator(numbers.at[part + e]);
      store_shared(shared + part, converted);
    }
  }
};

// What needs no conversion does not pass through registers; it arrives at wait_copies().
template <typename T, int N>
struct Transfer<T, N, true> {
  __device__ __forceinline__ void begin(Accumulator* shared, const T* global, bool inside) {
    copy_async<N>(shared, global, inside);
  }
  __device__ __forceinline__ void finish(Accumulator*) const {}
};

// How many a thread begins at a time. Those that nobody waits for need no batches, only short code.
template <typename T, int N>
constexpr int MOST_TRANSFERS = !(ASYNC_COPIES && SAME_TYPE<T, Accumulator>) ? 8 : N > 1 ? 4 : 1;

// Whether a walk in batches of steps has a row of the tile before it; a constant where they divide the tile.
template <int ROWS, int ROW_STEP, int BATCH>
__device__ __forceinline__ bool is_row(int row) {
  return ROWS % (ROW_STEP * BATCH) == 0 || row < ROWS;
}

// Columns [0, cols) of a tile, 16 bytes at a time; cols is a multiple of those. Rows from rows_left on become zero.
// LANES lanes take a row, in STEPS steps; the block takes ROW_STEP rows at once, ROW_STEPS times.
template <int ROWS, int COLS, typename T>
__device__ __forceinline__ void load_by_vector(
    Tile<ROWS, COLS>& tile, const T* corner, long long row_stride, int rows_left, int cols) {
  constexpr int RUN = 16 / sizeof(T), LANES = POWER_IN<COLS / RUN, 32>, STEPS = COLS / RUN / LANES;
  constexpr int ROW_STEP = NUM_THREADS / LANES, ROW_STEPS = ceil_div(ROWS, ROW_STEP);
  constexpr int BATCH = smaller(ceil_div(MOST_TRANSFERS<T, RUN>, STEPS), ROW_STEPS);
  const int thread = thread_index_again(), first_row = thread / LANES, first_col = thread % LANES * RUN;
  const T* source = corner + first_row * row_stride + first_col;
#pragma unroll 1
  for (int turn = 0; turn < ROW_STEPS; turn += BATCH) {
    Transfer<T, RUN> run[BATCH][STEPS];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int row = first_row + (turn + b) * ROW_STEP;
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int ahead = step * LANES * RUN, col = first_col + ahead;
        if (is_row<ROWS, ROW_STEP, BATCH>(row) && col < cols) {
          run[b][step].begin(&tile.at[row][col], source + ahead, row < rows_left);
        }
      }
      source += ROW_STEP * row_stride;
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int row = first_row + (turn + b) * ROW_STEP;
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int col = first_col + step * LANES * RUN;
        if (is_row<ROWS, ROW_STEP, BATCH>(row) && col < cols) run[b][step].finish(&tile.at[row][col]);
      }
    }
  }
}

// Columns [begin, COLS) of a tile one by one, a warp a row; what lies beyond rows_left or cols_left becomes zero.
template <int ROWS, int COLS, typename T>
__device__ __forceinline__ void load_by_element(
    Tile<ROWS, COLS>& tile, const T* corner, long long row_stride, long long col_stride, int rows_left, int cols_left,
    int begin) {
  constexpr int ROW_STEP = NUM_WARPS, ROW_STEPS = ceil_div(ROWS, ROW_STEP);
  constexpr int BATCH = smaller(MOST_TRANSFERS<T, 1>, ROW_STEPS);
  const int thread = thread_index_again(), first_row = thread / 32;
#pragma unroll 1
  for (int col = begin + thread % 32; col < COLS; col += 32) {
    const T* source = corner + first_row * row_stride + col * col_stride;
#pragma unroll 1
    for (int turn = 0; turn < ROW_STEPS; turn += BATCH) {
      Transfer<T, 1> element[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const int row = first_row + (turn + b) * ROW_STEP;
        if (is_row<ROWS, ROW_STEP, BATCH>(row)) {
          element[b].begin(&tile.at[row][col], source, row < rows_left && col < cols_left);
        }
        source += ROW_STEP * row_stride;
      }
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const int row = first_row + (turn + b) * ROW_STEP;
        if (is_row<ROWS, ROW_STEP, BATCH>(row)) element[b].finish(&tile.at[row][col]);
      }
    }
  }
}

// Rows [row0, row_end) and columns [col0, col_end) of the tensor, the rest of the tile zero. By the whole block;
// wait_copies() and a barrier must follow before the tile is read. What lies outside those rows and columns is never
// read.
template <int ROWS, int COLS, typename T>
__device__ __forceinline__ void load_tile(
    Tile<ROWS, COLS>& tile, const Rows<const T>& rows, int row0, int row_end, int col0, int col_end) {
  constexpr int RUN = 16 / sizeof(T);
  const int rows_left = row_end - row0;
  const int cols_left = col_end < col0 ? 0 : col_end - col0 < COLS ? col_end - col0 : COLS;
  const T* corner = rows.at(row0, col0);  // (rows_left, cols_left); col0 is a multiple of 16
  const int by_vector = rows.vectors ? cols_left / RUN * RUN : 0;
  if (by_vector > 0) load_by_vector(tile, corner, rows.row_stride, rows_left, by_vector);
  if (by_vector < COLS) {
    load_by_element(tile, corner, rows.row_stride, rows.col_stride, rows_left, cols_left, by_vector);
  }
}

// Numbers [row0, row_end) of a tensor that has rows but no columns, and zeros to the end of N, or whatever `beyond` is,
// where that is asked for. By the whole block, like load_tile.
template <int N>
__device__ __forceinline__ void load_numbers(
    Accumulator (&numbers)[N], const Rows<const Accumulator>& rows, int row0, int row_end, bool fill = false,
    Accumulator beyond = 0) {
  for (int row = thread_index(); row < N; row += NUM_THREADS) {
    if (fill && row >= row_end - row0) {
      store_shared(&numbers[row], Vector<Accumulator, 1>{{beyond}});
      continue;
    }
    Transfer<Accumulator, 1> number;
    number.begin(&numbers[row], rows.at(row0) + row * rows.row_stride, row < row_end - row0);
    number.finish(&numbers[row]);
  }
}

// Tiles of 16-bit elements in shared memory since sm_80: how cp.async fills them, how ldmatrix reads them as operands
// of mma.sync, and products of a warp. By plain instructions of every thread, so any strides and any widths will do.
#pragma once
#include "basics.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "mma_sm80.cuh"
#include "descriptors.cuh"
#include "fragment.cuh"

constexpr int NUM_THREADS = 32 * NUM_WARPS;

// Rows of COLS elements, without padding. A row is CHUNKS chunks of 16 bytes, chunk c of row r at place c ^ turn(r),
// which stays in the chunk's group. Eight neighbouring rows at one column, what ldmatrix reads at a time, then lie in
// eight different groups of banks whatever the width: rows that begin in the same banks, every (8 / GROUP)-th, have
// different turns. The pattern has 8 rows.
template <int ROWS, int COLS>
struct alignas(128) SwizzledTile {
  static constexpr int CHUNKS = COLS / 8, GROUP = POWER_IN<CHUNKS, 8>;
  static_assert(COLS % 16 == 0, "a step of a product is 16 columns");
  Element at[ROWS][COLS];

  // Unsigned, here and below: a quotient is then a shift, in a loop that computes addresses anew to save registers.
  static __device__ __forceinline__ unsigned turn(unsigned row) { return row / (8 / GROUP) % GROUP; }
  __device__ __forceinline__ Element* chunk(unsigned row, unsigned c) { return &at[row][8 * (c ^ turn(row))]; }
  __device__ __forceinline__ const Element* chunk(unsigned row, unsigned c) const {
    return &at[row][8 * (c ^ turn(row))];
  }
};

// ---- from global memory

// Rows of a tile that are (query, head) pairs: row p is query p / heads of the p % heads-th head from `rows` on.
template <typename T>
struct PackedRows {
  Rows<T> rows;  // of the first head
  long long head_stride;
  int heads;

  __device__ __forceinline__ T* at(int row) const { return rows.at(row / heads) + row % heads * head_stride; }
};

// A thread's walk down the rows that it copies. In bytes, as an integer: each step is one addition then, where of
// pointers to elements each would be worked out from the first row.
template <typename T>
struct RowWalk {
  unsigned long long address;
  long long row_bytes;

  __device__ __forceinline__ RowWalk(const Rows<const T>& rows, unsigned row)
      : address(reinterpret_cast<unsigned long long>(rows.data)),
        row_bytes(rows.row_stride * static_cast<long long>(sizeof(T))) {
    address += row * row_bytes;
  }
  __device__ __forceinline__ const T* here() const { return reinterpret_cast<const T*>(address); }
  __device__ __forceinline__ void advance(int count) { address += count * row_bytes; }
};
template <typename T>
struct PackedWalk {
  PackedRows<const T> rows;
  int row;

  __device__ __forceinline__ PackedWalk(const PackedRows<const T>& rows, unsigned row)
      : rows(rows), row(static_cast<int>(row)) {}
  __device__ __forceinline__ const T* here() const { return rows.at(row); }
  __device__ __forceinline__ void advance(int count) { row += count; }
};
template <typename T>
__device__ __forceinline__ RowWalk<T> walk_from(const Rows<const T>& rows, unsigned row) {
  return {rows, row};
}
template <typename T>
__device__ __forceinline__ PackedWalk<T> walk_from(const PackedRows<const T>& rows, unsigned row) {
  return {rows, row};
}

// How many bytes of a row can be copied as one, counted from its start, in every row: 16, 8 or 4, or 2, an element,
// which takes an ordinary load.
__device__ __forceinline__ int bytes_at_a_time(unsigned long long data_and_strides, long long col_stride) {
  const int low = static_cast<int>(data_and_strides % 16);
  return col_stride != 1 ? 2 : low == 0 ? 16 : low % 8 == 0 ? 8 : low % 4 == 0 ? 4 : 2;
}
template <typename T>
__device__ __forceinline__ int bytes_at_a_time(const Rows<const T>& rows) {
  const auto strides = static_cast<unsigned long long>(rows.row_stride) * sizeof(T);
  return bytes_at_a_time(reinterpret_cast<unsigned long long>(rows.data) | strides, rows.col_stride);
}
template <typename T>
__device__ __forceinline__ int bytes_at_a_time(const PackedRows<const T>& packed) {
  const Rows<const T>& rows = packed.rows;
  const auto strides = static_cast<unsigned long long>(rows.row_stride | packed.head_stride) * sizeof(T);
  return bytes_at_a_time(reinterpret_cast<unsigned long long>(rows.data) | strides, rows.col_stride);
}
template <typename T>
__device__ __forceinline__ long long col_stride_of(const Rows<const T>& rows) {
  return rows.col_stride;
}
template <typename T>
__device__ __forceinline__ long long col_stride_of(const PackedRows<const T>& packed) {
  return packed.rows.col_stride;
}

// Of `size` bytes from column col on, how many lie before col_end.
__device__ __forceinline__ int bytes_inside(int col, int col_end, int size) {
  const int bytes = (col_end - col) * static_cast<int>(sizeof(Element));
  return bytes < 0 ? 0 : smaller(bytes, size);
}

// By 16 bytes: LANES lanes take a row, in STEPS steps; the threads take ROW_STEP rows at once. `whole`, a constant: no
// row and no chunk has to be asked whether it lies inside.
template <int THREADS, int ROWS, int COLS, typename Source>
__device__ __forceinline__ void load_by_chunk(
    SwizzledTile<ROWS, COLS>& tile, const Source& source, int row0, int row_end, int col_end, bool whole) {
  using Tile = SwizzledTile<ROWS, COLS>;
  constexpr unsigned LANES = Tile::GROUP, STEPS = COLS / 8 / LANES, ROW_STEP = THREADS / LANES;
  static_assert(ROW_STEP % 8 == 0, "a thread's rows have one place in the swizzle's pattern");
  const unsigned thread = thread_index_again() % unsigned(THREADS), first_row = thread / LANES;
  const unsigned first_chunk = thread % LANES;
  const unsigned to = shared_address(&tile) + 2 * COLS * first_row + 16 * (first_chunk ^ Tile::turn(first_row));
  auto walk = walk_from(source, row0 + first_row);
#pragma unroll
  for (unsigned ahead = 0; ahead < ROWS; ahead += ROW_STEP) {
    if (ROWS % ROW_STEP == 0 || first_row + ahead < ROWS) {
      const Element* from = walk.here() + 8 * first_chunk;
#pragma unroll
      for (unsigned step = 0; step < STEPS; ++step) {
        const unsigned here = to + 2 * COLS * ahead + 16 * step * LANES;
        if (whole) {
          cp_async<16>(here, from + 8 * step * LANES);
        } else {
          const bool inside = static_cast<int>(first_row + ahead) < row_end - row0;
          const int bytes = bytes_inside(8 * (first_chunk + step * LANES), col_end, 16);
          cp_async<16>(here, from + 8 * step * LANES, inside ? bytes : 0);
        }
      }
    }
    walk.advance(ROW_STEP);
  }
}

// By 8 or 4 bytes, for rows that are aligned to no more.
template <int THREADS, int BYTES, int ROWS, int COLS, typename Source>
__device__ __forceinline__ void load_by_part(
    SwizzledTile<ROWS, COLS>& tile, const Source& source, int row0, int row_end, int col_end) {
  constexpr int WIDTH = BYTES / sizeof(Element), PARTS = COLS / WIDTH;
#pragma unroll 1
  for (unsigned i = thread_index_again() % unsigned(THREADS); i < ROWS * PARTS; i += THREADS) {
    const unsigned row = i / PARTS, col = i % PARTS * WIDTH;
    const int bytes = static_cast<int>(row) < row_end - row0 ? bytes_inside(col, col_end, BYTES) : 0;
    cp_async<BYTES>(
        shared_address(tile.chunk(row, col / 8) + col % 8), walk_from(source, row0 + row).here() + col, bytes);
  }
}

// One by one, any strides. Neighbouring threads take what is nearer in memory: the next chunk of a row, or the next
// row.
template <int THREADS, int ROWS, int COLS, typename Source>
__device__ __forceinline__ void load_by_element(
    SwizzledTile<ROWS, COLS>& tile, const Source& source, int row0, int row_end, int col_end) {
  constexpr int CHUNKS = COLS / 8;
  const long long col_stride = col_stride_of(source);
  const bool along_row = col_stride == 1 || col_stride == -1;
#pragma unroll 1
  for (int i = thread_index_again() % THREADS; i < ROWS * CHUNKS; i += THREADS) {
    const int row = along_row ? i / CHUNKS : i % ROWS, chunk = along_row ? i % CHUNKS : i / ROWS;
    Vector<Element, 8> numbers = {};
    if (row < row_end - row0) {
      const Element* from = walk_from(source, row0 + row).here() + 8 * chunk * col_stride;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (8 * chunk + e < col_end) numbers.at[e] = load_global<1>(from + e * col_stride).at[0];
      }
    }
    store_shared(tile.chunk(row, chunk), numbers);
  }
}

// Rows [row0, row_end) and columns [0, col_end) of the tensor, the rest of the tile zero; what lies outside is never
// read. By the whole block, or by THREADS neighbours of it, the first one a multiple of THREADS; they then commit and
// wait, and all meet before they read the tile. `bytes`: bytes_at_a_time(source), or fewer.
template <int THREADS = NUM_THREADS, int ROWS, int COLS, typename Source>
__device__ __forceinline__ void load_tile(
    SwizzledTile<ROWS, COLS>& tile, const Source& source, int bytes, int row0, int row_end, int col_end) {
  if (bytes == 16 && row_end - row0 >= ROWS && col_end >= COLS) {
    load_by_chunk<THREADS>(tile, source, row0, row_end, col_end, true);
  } else if (bytes == 16) {
    load_by_chunk<THREADS>(tile, source, row0, row_end, col_end, false);
  } else if (bytes == 8) {
    load_by_part<THREADS, 8>(tile, source, row0, row_end, col_end);
  } else if (bytes == 4) {
    load_by_part<THREADS, 4>(tile, source, row0, row_end, col_end);
  } else {
    load_by_element<THREADS>(tile, source, row0, row_end, col_end);
  }
}

// ---- operands: 16 x 16 elements of a tile by one ldmatrix

enum class Side { LEFT, RIGHT };

// K-major: the product sums over the tile's columns, and `outer` counts its rows (those of the left operand, columns of
// the right one's transpose). MN-major: it sums over the tile's rows, and `outer` counts its columns. Both in sixteens.
template <int COLS, Side SIDE, Major MAJOR>
struct Operand {
  static constexpr bool AHEAD = true;  // a step is loaded before the one before it is multiplied
  static constexpr int TERMS = 1;      // of which the operand is the sum
  unsigned lane;  // where this lane's row of the first 16 x 16 elements lies

  // LEFT: r is an A operand. RIGHT: r[0] and r[1] are a B operand, r[2] and r[3] that of the next 8 columns.
  __device__ __forceinline__ void load(unsigned (&r)[4], int outer, int step) const {
    // Steps inside a chunk's group permute with the swizzle, which is bits of the lane's address; others are added.
    constexpr int GROUP = SwizzledTile<16, COLS>::GROUP;
    const int row = MAJOR == Major::K ? outer : step, col = MAJOR == Major::K ? step : outer;
    const int inside = col % (GROUP / 2);
    const unsigned address = (lane ^ 32u * inside) + (32u * (col - inside) + 32u * COLS * row);
    if constexpr (MAJOR == Major::K) {
      ldmatrix_x4(r, address);
    } else {
      ldmatrix_x4_trans(r, address);
    }
  }
};

// From a row on, a multiple of 16, and from a column on, a multiple of 64 (of 8 * GROUP).
template <Side SIDE, Major MAJOR, int ROWS, int COLS>
__device__ __forceinline__ Operand<COLS, SIDE, MAJOR> operand(
    const SwizzledTile<ROWS, COLS>& tile, int row0 = 0, int col0 = 0) {
  // Lanes 8 i to 8 i + 7 give the rows of matrix i; matrix 1 lies 8 rows or 8 columns from matrix 0, as the side asks.
  constexpr bool DOWN_FIRST = (SIDE == Side::LEFT) == (MAJOR == Major::K);
  const unsigned lane = thread_index_again() % 32u, first = lane / 8 % 2, second = lane / 16;
  const unsigned row = row0 + lane % 8 + 8 * (DOWN_FIRST ? first : second);
  return {shared_address(tile.chunk(row, col0 / 8 + (DOWN_FIRST ? second : first)))};
}

// A left operand whose first HELD steps are in registers, and the others in a tile.
template <int R, int HELD, typename Rest>
struct HeldOperand {
  static constexpr bool AHEAD = Rest::AHEAD;
  static constexpr int TERMS = 1;
  const unsigned (&at)[R][HELD][4];
  Rest rest;

  __device__ __forceinline__ void load(unsigned (&r)[4], int outer, int step) const {
    if (step < HELD) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = at[outer][step][i];
    } else {
      rest.load(r, outer, step);
    }
  }
};
struct NoRest {
  static constexpr bool AHEAD = false;
  __device__ __forceinline__ void load(unsigned (&)[4], int, int) const {}
};
// One that is in registers altogether.
template <int R, int STEPS>
__device__ __forceinline__ HeldOperand<R, STEPS, NoRest> in_registers(const unsigned (&at)[R][STEPS][4]) {
  return {at, {}};
}

// A left operand in two parts, of R times 16 rows: what is loaded of the right one is multiplied by both.
template <int R, typename High, typename Low>
struct SplitOperand {
  static constexpr bool AHEAD = High::AHEAD;
  static constexpr int TERMS = 2;
  High high;
  Low low;

  __device__ __forceinline__ void load(unsigned (&r)[4], int outer, int step) const {
    if (outer < R) {
      high.load(r, outer, step);
    } else {
      low.load(r, outer - R, step);
    }
  }
};
// high + low where there is such a part, SPLIT_P, else high.
template <int R, typename High, typename Low>
__device__ __forceinline__ auto with_low_part(const High& high, const Low& low) {
  if constexpr (SPLIT_P) {
    return SplitOperand<R, High, Low>{high, low};
  } else {
    return high;
  }
}

// ---- products of a warp

// acc, columns 8 * block to 8 * block + 7, += a b.
template <int N>
__device__ __forceinline__ void multiply(
    Fragment<N>& acc, int block, const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
  const unsigned b[2] = {b_low, b_high};
  float d[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = acc.at[4 * block + i];
  mma_m16n8k16<Element>(d, a, b);
#pragma unroll
  for (int i = 0; i < 4; ++i) acc.at[4 * block + i] = d[i];
}

// How many parts add_product() has, and so calls of `between`.
template <int STEPS, int N>
constexpr int PARTS_OF = STEPS * (N / 16);

// acc += a b: acc is R times (16, N), a (16 R, 16 STEPS), b (16 STEPS, N). 16 columns at a time: what the next part
// needs is loaded before this one is multiplied, and between(part) is other work to do while the tensor cores are at
// it; of an operand in registers, a step may be made by then that comes after the part's. A left operand of several
// TERMS has R times 16 rows of each, one term after the other.
template <int STEPS, int N, int R, typename A, typename B, typename Between>
__device__ __forceinline__ void add_product(Fragment<N> (&acc)[R], const A& a, const B& b, const Between& between) {
  constexpr int ACROSS = N / 16, PARTS = PARTS_OF<STEPS, N>, FRAGMENTS_A = R * A::TERMS;
  unsigned a_part[2][FRAGMENTS_A][4], b_part[2][4];
#pragma unroll
  for (int f = 0; f < FRAGMENTS_A; ++f) {
    if (A::AHEAD) a.load(a_part[0][f], f, 0);
  }
  b.load(b_part[0], 0, 0);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int block = 0; block < ACROSS; ++block) {
      const int part = step * ACROSS + block, next = part + 1;
      if (next < PARTS) b.load(b_part[next % 2], next % ACROSS, next / ACROSS);
      const int wanted = A::AHEAD ? step + 1 : step;
      if (block == 0 && wanted < STEPS) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS_A; ++f) a.load(a_part[wanted % 2][f], f, wanted);
      }
      const unsigned(&here)[4] = b_part[part % 2];
#pragma unroll
      for (int f = 0; f < FRAGMENTS_A; ++f) {
        multiply(acc[f % R], 2 * block, a_part[step % 2][f], here[0], here[1]);
        multiply(acc[f % R], 2 * block + 1, a_part[step % 2][f], here[2], here[3]);
      }
      between(part);
    }
  }
}
template <int STEPS, int N, int R, typename A, typename B>
__device__ __forceinline__ void add_product(Fragment<N> (&acc)[R], const A& a, const B& b) {
  add_product<STEPS>(acc, a, b, [](int) {});
}

// ---- fragments to a tile

// Rounded, to rows row0 to row0 + 15 and columns from col0 on, a multiple of 8: a quad writes 16 bytes of a row, a warp
// all banks once. SPLIT_P: the second parts to another tile.
template <int ROWS, int COLS, int TILES, int N>
__device__ __forceinline__ void store_rounded(
    SwizzledTile<ROWS, COLS> (&tile)[TILES], int row0, int col0, const Fragment<N>& fragment) {
#pragma unroll
  for (int r = 0; r < fragment.ROWS; ++r) {
    const int row = row0 + fragment.warp_row(r);
#pragma unroll
    for (int c = 0; c < fragment.COLS; c += 2) {
      unsigned high, low;
      auto* to = reinterpret_cast<unsigned*>(tile[0].chunk(row, col0 / 8 + c / 2) + fragment.first_col());
      pack_parts<Element>(high, low, fragment(r, c), fragment(r, c + 1));
      store_shared(to, Vector<unsigned, 1>{{high}});
      if constexpr (TILES > 1) {
        to = reinterpret_cast<unsigned*>(tile[1].chunk(row, col0 / 8 + c / 2) + fragment.first_col());
        store_shared(to, Vector<unsigned, 1>{{low}});
      }
    }
  }
}

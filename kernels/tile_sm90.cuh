// Warpgroups, their tiles and what moves tiles, on sm_90. A warpgroup's product is (64, N): its warp w has rows 16 w to
// 16 w + 15, so what belongs to a row stays with the 4 lanes of a quad.
#pragma once
#include "basics.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mma_sm90.cuh"
#include "fragment.cuh"

static_assert(!SPLIT_P, "neither registers nor shared memory have room for second parts");

// What products are of: q's own numbers, or the parts of float32.
template <typename Number>
struct FactorOf {
  using Type = Number;
};
template <>
struct FactorOf<float> {
  using Type = Bfloat16;
};
using Factor = FactorOf<Element>::Type;

// ---- tiles in shared memory, as a tensor copy with the 128-byte swizzle writes them and wgmma reads them

// Chunks of 64 columns, one behind the other; a row of a chunk is 128 bytes. Columns beyond the tensor's are zeros.
template <int ROWS, int COLS>
struct alignas(1024) SwizzledTile {
  static constexpr int CHUNKS = ceil_div(COLS, 64);
  static_assert(ROWS % 8 == 0, "the swizzle's pattern has 8 rows");
  Factor at[CHUNKS][ROWS][64];
};

// Where a head of a tensor lies, in the coordinates of its map behind the column. An axis of stride 0, the
// heads' too, has length 1 there. rows: those of the entry, from `begin` on, of at most `longest`.
template <bool OF_OWN_LENGTH>
struct MapPlaceOf {
  int head, inner, outer;

  __device__ __forceinline__ MapPlaceOf(const Tensor& tensor, const int (&batch_index)[4], int of_head, int, int, int)
      : head(tensor.head_stride == 0 ? 0 : of_head),
        inner(tensor.batch_stride[3] == 0 ? 0 : batch_index[3]),
        outer(tensor.batch_stride[2] == 0 ? 0 : batch_index[2]) {}
  __device__ __forceinline__ int row(int row) const { return row; }
};
// What comes from beyond an entry's own rows must be zeros, and the map of all entries has one length of rows,
// `longest`. So every entry is put where its last row is the map's last: row i of n is row longest - n + i there. And
// along the inner axis, which steps from row to row as well, an entry has the coordinate where it ends. Both together
// are `longest` rows too far, and by so much the map begins before the tensor.
template <>
struct MapPlaceOf<true> {
  int first_row, head, inner, outer;

  __device__ __forceinline__ MapPlaceOf(
      const Tensor& tensor, const int (&batch_index)[4], int of_head, int begin, int rows, int longest)
      : first_row(longest - rows),
        head(tensor.head_stride == 0 ? 0 : of_head),
        inner(begin + rows),
        outer(tensor.batch_stride[3] == 0 ? 0 : batch_index[3]) {}
  __device__ __forceinline__ int row(int row) const { return first_row + row; }
};
using MapPlace = MapPlaceOf<LENS>;

// Of a tensor whose rows are queries, and of one whose rows are keys.
__device__ __forceinline__ MapPlace query_place(
    const Params& params, const Tensor& tensor, const Sequence& seq, int head) {
  const int begin = PACKED ? seq.batch_index[FIRST_QUERY] : 0;
  return MapPlace(tensor, seq.batch_index, head, begin, seq.seqlen_q, params.seqlen_q);
}
__device__ __forceinline__ MapPlace key_place(
    const Params& params, const Tensor& tensor, const Sequence& seq, int head) {
  const int begin = PACKED ? seq.batch_index[FIRST_KEY] : 0;
  return MapPlace(tensor, seq.batch_index, head, begin, seq.seqlen_k, params.seqlen_k);
}

// Sends for rows row0 to row0 + ROWS - 1, by one thread; counts sizeof(tile) bytes in the mbarrier. Rows and columns
// that the entry does not have arrive as zeros.
template <int ROWS, int COLS>
__device__ __forceinline__ void load_tile(
    SwizzledTile<ROWS, COLS>& tile, const TensorMap& map, unsigned mbarrier, int row0, const MapPlace& place) {
#pragma unroll
  for (int chunk = 0; chunk < tile.CHUNKS; ++chunk) {
    const unsigned to = shared_address(tile.at[chunk]);
    tensor_load(to, map, mbarrier, 64 * chunk, place.row(row0), place.head, place.inner, place.outer);
  }
}

// A tile as an operand: the low word of its descriptor, which is the same in all lanes of a warp. Where nvcc knows that
// (all control around it is uniform), the steps along a product are added in uniform registers, and nothing is moved
// there first. K_MAJOR: the product sums over the tile's columns; MN_MAJOR: over its rows.
template <int ROWS, Major MAJOR>
struct Operand {
  unsigned low;

  // 16 columns (K_MAJOR) or 16 rows (MN_MAJOR) from 16 * step on.
  __device__ __forceinline__ unsigned long long at(int step) const {
    constexpr unsigned long long HIGH = descriptor_base(Swizzle::BYTES_128, 0, 1024);
    const unsigned bytes = MAJOR == Major::K ? step / 4 * (ROWS * 128) + step % 4 * 32 : step * 2048;
    return HIGH | (low + bytes / 16);
  }
};
template <Major MAJOR, int ROWS, int COLS>
__device__ __forceinline__ Operand<ROWS, MAJOR> operand(const SwizzledTile<ROWS, COLS>& tile) {
  // From one chunk of 64 columns to the next; a K-major swizzled operand does not use it.
  constexpr unsigned LEADING = MAJOR == Major::K ? 16 : ROWS * 128;
  const auto low = static_cast<unsigned>(matrix_descriptor(shared_address(&tile), Swizzle::NONE, LEADING, 0));
  return {low};
}

// The same operand, its low word worked out where this stands: what no turn of a loop changes would be kept in uniform
// registers, which are few.
template <int ROWS, Major MAJOR>
__device__ __forceinline__ Operand<ROWS, MAJOR> not_kept(const Operand<ROWS, MAJOR>& operand) {
  return {not_kept(operand.low)};
}
// The same where control may differ between lanes for all that nvcc knows, and with it whatever it computes.
template <int ROWS, Major MAJOR>
__device__ __forceinline__ Operand<ROWS, MAJOR> uniform(const Operand<ROWS, MAJOR>& operand) {
  return {warp_uniform(operand.low)};
}

// acc = a b, and acc += a b, over 16 * STEPS. Issued, not waited for.
template <int STEPS, int N, int ROWS_A, Major MAJOR_A, int ROWS_B, Major MAJOR_B>
__device__ __forceinline__ void product(
    Fragment<N>& acc, const Operand<ROWS_A, MAJOR_A>& a, const Operand<ROWS_B, MAJOR_B>& b) {
  wgmma_first_ss<Factor, MAJOR_A, MAJOR_B>(acc.at, a.at(0), b.at(0));
#pragma unroll
  for (int step = 1; step < STEPS; ++step) wgmma_ss<Factor, MAJOR_A, MAJOR_B>(acc.at, a.at(step), b.at(step));
}
template <int STEPS, int N, int ROWS_A, Major MAJOR_A, int ROWS_B, Major MAJOR_B>
__device__ __forceinline__ void add_product(
    Fragment<N>& acc, const Operand<ROWS_A, MAJOR_A>& a, const Operand<ROWS_B, MAJOR_B>& b) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) wgmma_ss<Factor, MAJOR_A, MAJOR_B>(acc.at, a.at(step), b.at(step));
}

// The operand from a row on, a multiple of 8; from a chunk of 64 columns on.
template <int ROWS, Major MAJOR>
__device__ __forceinline__ Operand<ROWS, MAJOR> from_row(const Operand<ROWS, MAJOR>& operand, int row) {
  return {operand.low + row * 128 / 16};
}
template <int ROWS, Major MAJOR>
__device__ __forceinline__ Operand<ROWS, MAJOR> from_chunk(const Operand<ROWS, MAJOR>& operand, int chunk) {
  return {operand.low + chunk * ROWS * 128 / 16};
}

// acc += p b: p is (64, DEPTH) in registers, b (DEPTH, N). Issued, not waited for.
template <int N, int STEPS>
__device__ __forceinline__ void multiply_nn(
    Fragment<N>& acc, const unsigned (&p)[STEPS][4], const Operand<16 * STEPS, Major::MN>& b) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) wgmma_rs<Factor, Major::MN>(acc.at, p[step], b.at(step));
}

// ---- rings: buffers in shared memory between one thread that sends for copies and the warps that read them

// Which buffer, and in which of its uses. Both sides start at the first buffer's first use.
template <int SLOTS>
struct Turn {
  int slot = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// full: one arrival and the bytes; empty: one arrival of each reading warp. Every reader is counted, or a buffer would
// be refilled under it.
template <int SLOTS>
struct Ring {
  unsigned long long full[SLOTS], empty[SLOTS];  // mbarriers

  __device__ __forceinline__ void init(int reading_warps, int writing_warps = 1) {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      mbarrier_init(shared_address(&full[i]), writing_warps);
      mbarrier_init(shared_address(&empty[i]), reading_warps);
    }
  }
  // The sender: waits until the buffer is read, and says how many bytes will come; returns where they count.
  __device__ __forceinline__ unsigned refill(const Turn<SLOTS>& turn, int bytes) {
    mbarrier_wait(shared_address(&empty[turn.slot]), turn.parity ^ 1);
    const unsigned mbarrier = shared_address(&full[turn.slot]);
    mbarrier_arrive_expect_tx(mbarrier, bytes);
    return mbarrier;
  }
  // Warps that write the buffer themselves: it is read; this warp has written its share.
  __device__ __forceinline__ void await_free(const Turn<SLOTS>& turn) {
    mbarrier_wait(shared_address(&empty[turn.slot]), turn.parity ^ 1);
  }
  __device__ __forceinline__ void hand_over(const Turn<SLOTS>& turn) {
    if (lane_index() == 0) mbarrier_arrive(shared_address(&full[turn.slot]));
  }
  // The readers: the bytes are there; this warp has read them.
  __device__ __forceinline__ void await(const Turn<SLOTS>& turn) {
    mbarrier_wait(shared_address(&full[turn.slot]), turn.parity);
  }
  __device__ __forceinline__ void release(const Turn<SLOTS>& turn) {
    if (lane_index() == 0) mbarrier_arrive(shared_address(&empty[turn.slot]));
  }
};

// Tiles on their way from the thread that walks the list to all that work on them: the others need no division, and
// the walk is ahead of them.
template <int SLOTS>
struct WorkRing {
  unsigned long long full[SLOTS], empty[SLOTS];  // mbarriers
  Vector<int, 4> work[SLOTS];                    // block, head, batch

  __device__ __forceinline__ void init(int readers) {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      mbarrier_init(shared_address(&full[i]), 1);
      mbarrier_init(shared_address(&empty[i]), readers);
    }
  }
  __device__ __forceinline__ void send(const Turn<SLOTS>& turn, const Work& next) {
    mbarrier_wait(shared_address(&empty[turn.slot]), turn.parity ^ 1);
    store_shared(work[turn.slot].at, Vector<int, 4>{{next.block, next.head, next.batch, 0}});
    mbarrier_arrive(shared_address(&full[turn.slot]));
  }
  // By one thread.
  __device__ __forceinline__ Work take(Turn<SLOTS>& turn) {
    const Work next = read(turn);
    mbarrier_arrive(shared_address(&empty[turn.slot]));
    turn.advance();
    return next;
  }
  // By a warp, which counts as one reader.
  __device__ __forceinline__ Work take_by_warp(Turn<SLOTS>& turn) {
    Work next = read(turn);
    next = {warp_uniform(next.block), warp_uniform(next.head), warp_uniform(next.batch)};
    sync_warp();  // all lanes have read
    if (lane_index() == 0) mbarrier_arrive(shared_address(&empty[turn.slot]));
    turn.advance();
    return next;
  }

 private:
  __device__ __forceinline__ Work read(const Turn<SLOTS>& turn) {
    mbarrier_wait(shared_address(&full[turn.slot]), turn.parity);
    const Vector<int, 4> next = load_shared<4>(work[turn.slot].at);
    return {next.at[0], next.at[1], next.at[2]};
  }
};

// ---- results

// (64, N) to rows [row0, row_end) and columns [0, col_end) of a tensor.
template <typename T, int N>
__device__ __forceinline__ void store_fragment(
    const Rows<T>& rows, int row0, int row_end, int col_end, const Fragment<N>& fragment) {
#pragma unroll
  for (int r = 0; r < fragment.ROWS; ++r) {
    store_row(rows, row0 + fragment.row(r), row_end, col_end, fragment, r);
  }
}

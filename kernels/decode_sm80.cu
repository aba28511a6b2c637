// Decoding on tensor cores since Ampere, 16-bit: few queries, many keys, at the speed of memory.
//
// A thread block has a tile of (query, head) pairs and some splits of the keys (decode_tile.cuh). Its warps share Q and
// nothing else: each takes every NUM_WARPS-th block of keys of a split, and sends for them itself.
//
//     one turn of a warp, block n:   sends for K and V of block n + NUM_WARPS AHEAD     global -> its ring
//                                    K(n) and V(n) have come
//                                    acc_s = Q K(n)^T;  logits, hidden pairs, softmax  (BLOCK_M, BLOCK_N), registers
//                                    acc_o += P V(n)                                   (BLOCK_M, HEAD_DIM_V), registers
//     at the end of a split:         row_max and row_sum of every warp, and its acc_o, meet in shared memory
//
//     shared memory:   q (BLOCK_M, HEAD_DIM)  |  states  |  for each warp: NUM_STAGES slots of K (BLOCK_N, HEAD_DIM)
//                      and V (BLOCK_N, HEAD_DIM_V), or at the end of a split its acc_o
//
// A lane knows where one row of a block lies, in line or in a page, and tells the others. It looks it up a turn before
// they need it, so that nobody waits for the page table.
#include "basics.cuh"
#include "params_decode.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "tile_sm80.cuh"
#include "softmax.cuh"
#include "decode_tile.cuh"

constexpr int FRAGMENTS = BLOCK_M / 16, AHEAD = NUM_STAGES - 1;
static_assert(BLOCK_M % 16 == 0 && BLOCK_N % 16 == 0 && BLOCK_N <= 32, "a lane looks after one row of a block");
static_assert(NUM_STAGES >= 2, "one block is worked on while the next arrives");

constexpr int STEPS = HEAD_DIM / 16, STEPS_V = BLOCK_N / 16;  // of the products' sums
constexpr int HELD = Q_HELD > 0 ? Q_HELD : 1;                 // an array has a length

struct Slot {
  SwizzledTile<BLOCK_N, HEAD_DIM> k;
  SwizzledTile<BLOCK_N, HEAD_DIM_V> v;
};
union WarpMemory {
  Slot slot[NUM_STAGES];
  WarpOutputs<HEAD_DIM_V> out;
};
struct Smem {
  SwizzledTile<BLOCK_M, HEAD_DIM> q;
  WarpMemory warp[NUM_WARPS];
  WarpStates states;
};
constexpr int SMEM_BYTES = sizeof(Smem);

__device__ __forceinline__ unsigned long long address_in(unsigned long long address, int lane) {
  const auto low = static_cast<unsigned>(shuffle(static_cast<int>(address), lane));
  const auto high = static_cast<unsigned>(shuffle(static_cast<int>(address >> 32), lane));
  return static_cast<unsigned long long>(high) << 32 | low;
}

// Three ways to send for a block's rows, of which `row` is where that lane's begins. Rows from rows_left on and columns
// from col_end on become zero, and are not read. Reached by all 32 lanes.

// By 16 bytes: LANES lanes take a row, in STEPS steps. `whole`, a constant: all rows and columns lie inside.
template <int ROWS, int COLS>
__device__ __forceinline__ void copy_chunks(
    SwizzledTile<ROWS, COLS>& tile, unsigned long long row, int rows_left, int col_end, bool whole) {
  using Tile = SwizzledTile<ROWS, COLS>;
  constexpr unsigned LANES = Tile::GROUP, STEPS = COLS / 8 / LANES, ROW_STEP = 32 / LANES;
  static_assert(ROWS % ROW_STEP == 0, "all lanes copy");
  const unsigned first_row = lane_index() / LANES, first_chunk = lane_index() % LANES;
#pragma unroll
  for (unsigned ahead = 0; ahead < ROWS; ahead += ROW_STEP) {
    const unsigned r = first_row + ahead;
    const unsigned long long from = address_in(row, static_cast<int>(r)) + 16 * first_chunk;
    const unsigned to = shared_address(tile.chunk(r, first_chunk));
#pragma unroll
    for (unsigned step = 0; step < STEPS; ++step) {
      const auto* source = reinterpret_cast<const void*>(from + 16 * LANES * step);
      if (whole) {
        cp_async<16>(to + 16 * LANES * step, source);
      } else {
        const int inside = bytes_inside(static_cast<int>(8 * (first_chunk + LANES * step)), col_end, 16);
        cp_async<16>(to + 16 * LANES * step, source, static_cast<int>(r) < rows_left ? inside : 0);
      }
    }
  }
}
// By 8 or 4 bytes.
template <int BYTES, int ROWS, int COLS>
__device__ __forceinline__ void copy_parts(
    SwizzledTile<ROWS, COLS>& tile, unsigned long long row, int rows_left, int col_end) {
  constexpr unsigned PARTS = 16 / BYTES, IN_ROW = COLS / 8 * PARTS;
  static_assert(ROWS * IN_ROW % 32 == 0, "all lanes copy");
#pragma unroll 1
  for (unsigned i = lane_index(); i < ROWS * IN_ROW; i += 32) {
    const unsigned r = i / IN_ROW, part = i % IN_ROW;
    const unsigned long long from = address_in(row, static_cast<int>(r)) + BYTES * part;
    const int inside = bytes_inside(static_cast<int>(BYTES / 2 * part), col_end, BYTES);
    const unsigned to = shared_address(tile.chunk(r, part / PARTS)) + BYTES * (part % PARTS);
    cp_async<BYTES>(to, reinterpret_cast<const void*>(from), static_cast<int>(r) < rows_left ? inside : 0);
  }
}
// Element by element, for any strides.
template <int ROWS, int COLS>
__device__ __forceinline__ void copy_elements(
    SwizzledTile<ROWS, COLS>& tile, unsigned long long row, long long col_stride, int rows_left, int col_end) {
  constexpr unsigned IN_ROW = COLS / 8;
  static_assert(ROWS * IN_ROW % 32 == 0, "all lanes copy");
#pragma unroll 1
  for (unsigned i = lane_index(); i < ROWS * IN_ROW; i += 32) {
    const unsigned r = i / IN_ROW, chunk = i % IN_ROW;
    const auto* from = reinterpret_cast<const Element*>(address_in(row, static_cast<int>(r)));
    Vector<Element, 8> numbers = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int col = static_cast<int>(8 * chunk) + e;
      const bool inside = static_cast<int>(r) < rows_left && col < col_end;
      if (inside) numbers.at[e] = load_global<1>(from + col * col_stride).at[0];
    }
    store_shared(tile.chunk(r, chunk), numbers);
  }
}

// The keys, or the values, of one head of one entry, as a warp sends for them.
struct Stream {
  CacheRows<const Element> rows;
  int bytes;  // that can be copied as one, in every row
  int columns;
  unsigned long long next;  // where this lane's row of the block to send for begins

  __device__ __forceinline__ Stream(const CacheRows<const Element>& cache, int columns)
      : rows(cache), bytes(bytes_at_a_time(cache.alignment(), cache.col_stride)), columns(columns), next(0) {}
  // Looks up this lane's row of a block; keys from keys_end on have none.
  __device__ __forceinline__ void look(int n_block, int keys_end) {
    const int key = n_block * BLOCK_N + lane_index() % BLOCK_N;
    if (key < keys_end) next = reinterpret_cast<unsigned long long>(rows.at(key));
  }
  template <int COLS>
  __device__ __forceinline__ void send(SwizzledTile<BLOCK_N, COLS>& tile, int rows_left) const {
    if (bytes == 16 && rows_left >= BLOCK_N && columns == COLS) {
      copy_chunks(tile, next, rows_left, columns, true);
    } else if (bytes == 16) {
      copy_chunks(tile, next, rows_left, columns, false);
    } else if (bytes == 8) {
      copy_parts<8>(tile, next, rows_left, columns);
    } else if (bytes == 4) {
      copy_parts<4>(tile, next, rows_left, columns);
    } else {
      copy_elements(tile, next, rows.col_stride, rows_left, columns);
    }
  }
};

// What a warp has under way: a block of keys and values in each slot of its ring.
struct Ring {
  Stream keys, values;
  Slot (&slots)[NUM_STAGES];
  int end, keys_end;  // of the split, in blocks; of the entry

  __device__ __forceinline__ Ring(
      const DecodeParams& decode, const DecodeTile& tile, const BlockRange& blocks, WarpMemory& own)
      : keys(keys_of<const Element>(decode, tile.batch, tile.head_k), decode.params.head_dim),
        values(values_of<const Element>(decode, tile.batch, tile.head_k), decode.params.head_dim_v),
        slots(own.slot),
        end(blocks.end),
        keys_end(tile.seq.seqlen_k) {}
  __device__ __forceinline__ void look(int n_block) {
    if (n_block >= end) return;
    keys.look(n_block, keys_end);
    values.look(n_block, keys_end);
  }
  // Sends for a block that was looked up, or for nothing: either way a group of copies, so that waits can count. Then
  // looks up the next one.
  __device__ __forceinline__ void send(int n_block, int slot) {
    if (n_block < end) {
      keys.send(slots[slot].k, keys_end - n_block * BLOCK_N);
      values.send(slots[slot].v, keys_end - n_block * BLOCK_N);
    }
    cp_async_commit();
    look(n_block + NUM_WARPS);
  }
};

__device__ __forceinline__ void load_q(const Params& params, Smem& smem, const DecodeTile& tile) {
  const auto rows = rows_of<const Element>(params.q, tile.seq.batch_index, tile.head);  // (seqlen_q, head_dim)
  const PackedRows<const Element> packed = {rows, params.q.head_stride, tile.heads};
  load_tile(smem.q, packed, bytes_at_a_time(packed), tile.row0, tile.row_end, params.head_dim);
}

// Fragment f of acc_s = Q K(n_block)^T becomes P; acc_o and row_sum shrink where row_max rises.
__device__ __forceinline__ void to_weights(
    const DecodeParams& decode, const DecodeTile& tile, const Mask& mask, int n_block, bool masked, int f,
    Fragment<BLOCK_N>& acc_s, Softmax<2>& softmax, Fragment<HEAD_DIM_V>& acc_o) {
  const Score score = score_of(decode.params);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * f + acc_s.warp_row(r), query = tile.query(row);
    const int origin = n_block * BLOCK_N + acc_s.first_col();
    const Features features(decode.params, tile.seq, tile.head_of(row));
#pragma unroll
    for (int c = 0; c < acc_s.COLS; ++c) {
      acc_s(r, c) = features.logit(score, score.scaled(acc_s(r, c)), Pair{query, origin + acc_s.ahead(c)});
    }
    if (masked) {
      const MaskRow seen = mask.row(query, origin);
#pragma unroll
      for (int c = 0; c < acc_s.COLS; ++c) {
        acc_s(r, c) = seen.visible(acc_s.ahead(c)) ? acc_s(r, c) : -math::infinity<float>();
      }
    }
    softmax.raise(acc_s, r, score);
    softmax.weigh(acc_s, r, score);
  }
  if (warp_any(softmax.rose())) {  // mostly none did
    multiply_row(acc_o, 0, softmax.shrink[0]);
    multiply_row(acc_o, 1, softmax.shrink[1]);
  }
}

// What a warp has found goes to shared memory.
__device__ __forceinline__ void put_down(
    Smem& smem, int warp, int f, const Softmax<2>& softmax, const Fragment<HEAD_DIM_V>& acc_o) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * f + acc_o.warp_row(r);
    const float sum = row_sum_of(softmax.row_sum[r]);
    if (lane_index() % 4 == 0) {
      smem.states.row_max[warp][row] = softmax.row_max[r];
      smem.states.row_sum[warp][row] = sum;
    }
#pragma unroll
    for (int c = 0; c < acc_o.COLS; c += 2) {
      float* to = &smem.warp[warp].out.at[row][acc_o.first_col() + acc_o.ahead(c)];
      store_shared(to, Vector<float, 2>{{acc_o(r, c), acc_o(r, c + 1)}});
    }
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS) decode_sm80(const DecodeParams decode) {
  DYNAMIC_SHARED(Smem, smem);
  const DecodeTile tile(decode);
  const Mask mask = mask_of(decode.params, tile.seq);
  const int warp = thread_index() / 32;

  const BlockRange first = tile.blocks_of(decode, tile.first_split);
  if (first.begin < first.end) load_q(decode.params, smem, tile);  // without keys here there are none behind either
  cp_async_commit();
#pragma unroll 1
  for (int split = tile.first_split; split < (SPLITS ? decode.num_splits : 1); split += decode.blocks_of_tile) {
    const BlockRange blocks = tile.blocks_of(decode, split);
    if (SPLITS && blocks.begin >= blocks.end && !has_sink(split)) {
      store_nothing(decode, tile, split);
      continue;
    }
    Fragment<HEAD_DIM_V> acc_o[FRAGMENTS];  // (16 FRAGMENTS, HEAD_DIM_V)
    Softmax<2> softmax[FRAGMENTS];
    clear(acc_o);
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) softmax[f].clear();

    if (blocks.begin < blocks.end) {
      Ring ring(decode, tile, blocks, smem.warp[warp]);
      int n_block = blocks.begin + warp;
      ring.look(n_block);
#pragma unroll 1  // once more in the loop below; the text is long enough
      for (int i = 0; i < AHEAD; ++i) ring.send(n_block + i * NUM_WARPS, i);
      cp_async_wait<AHEAD>();
      sync_block();  // Q is written, by all threads

      const auto q = operand<Side::LEFT, Major::K>(smem.q);
      unsigned q_held[FRAGMENTS][HELD][4];
      if constexpr (Q_HELD > 0) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
          for (int i = 0; i < Q_HELD; ++i) q.load(q_held[f][i], f, i);
        }
      }
      int slot = 0;  // of the block at hand
#pragma unroll 1
      for (; n_block < blocks.end; n_block += NUM_WARPS) {
        ring.send(n_block + AHEAD * NUM_WARPS, slot == 0 ? AHEAD : slot - 1);
        cp_async_wait<AHEAD>();
        sync_warp();  // the block has come, to all lanes
        Fragment<BLOCK_N> acc_s[FRAGMENTS];  // (16 FRAGMENTS, BLOCK_N)
        clear(acc_s);
        const auto k = operand<Side::RIGHT, Major::K>(ring.slots[slot].k);
        if constexpr (Q_HELD > 0) {
          add_product<STEPS>(acc_s, HeldOperand<FRAGMENTS, HELD, decltype(q)>{q_held, q}, k);
        } else {
          add_product<STEPS>(acc_s, q, k);
        }
        const bool masked = n_block < blocks.full_begin || n_block >= blocks.full_end;
        unsigned p[FRAGMENTS][STEPS_V][4], p_low[FRAGMENTS][STEPS_V][4];  // P, rounded; SPLIT_P: its second part
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
          to_weights(decode, tile, mask, n_block, masked, f, acc_s[f], softmax[f], acc_o[f]);
          if constexpr (SPLIT_P) multiply_all(acc_s[f], P_FACTOR);
          round_to(p[f], p_low[f], acc_s[f]);
        }
        const auto left = with_low_part<FRAGMENTS>(in_registers(p), in_registers(p_low));
        add_product<STEPS_V>(acc_o, left, operand<Side::RIGHT, Major::MN>(ring.slots[slot].v));
        sync_warp();  // the block is read: refill its slot
        slot = slot == AHEAD ? 0 : slot + 1;
      }
    }
    // What is under way are empty groups, and the last turn's barrier ended all reads: acc_o may take the ring's place.
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) put_down(smem, warp, f, softmax[f], acc_o[f]);
    sync_block();  // states and outputs of all warps are written
    store_decoded(decode, tile, split, smem.states, [&](int from, int row, int col) {
      return load_shared<1>(&smem.warp[from].out.at[row][col]).at[0];
    });
    if constexpr (SPLITS) sync_block();  // states and outputs are read: rings and the next split's may be written
  }
}

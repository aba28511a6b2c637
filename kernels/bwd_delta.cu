// Before the backward: delta_i = sum over d of dout_id * out_id - dlse_i, one number for each query row; and, for
// bwd_sm90 and bwd_sm80, all that they find prepared.
//
// A thread block owns BLOCK_M rows of one head, the rows of one tile of theirs; eight lanes share a row
// (mma_simt.cuh) and walk its columns in runs of 16 bytes of dout: lane x takes runs x, x + 8, ... A thread's rows go
// side by side, so that their loads are under way together. The order of a sum depends on dout's type alone, not on
// strides. No shared memory. Where lse is -inf the row has no visible key: delta is 0, whatever dlse is.
//
// For bwd_sm90 and bwd_sm80, where their tensors are given: lse in exponents of 2, +inf in rows beyond the end;
// semaphores of the tile and the tickets are set to 0; so are, in arrival order, the sums of dq, and dq of a tile that
// no key block meets, where nobody else would write it.
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "block_walk.cuh"
#include "tile.cuh"
#include "mma_simt.cuh"
#include "softmax.cuh"

constexpr int SMEM_BYTES = 0;
constexpr int RUN = 16 / sizeof(Element);
constexpr int ROWS = ceil_div(BLOCK_M, THREADS_Y), SIDE_BY_SIDE = ROWS <= 5 ? ROWS : 4;  // of a thread

// RUN neighbouring columns of one row, as they are in memory; converted when all loads are under way.
template <typename T>
struct Run {
  static constexpr int TOGETHER = 16 / sizeof(T) < RUN ? 16 / sizeof(T) : RUN;  // of one load
  Vector<T, TOGETHER> part[RUN / TOGETHER];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < RUN / TOGETHER; ++i) part[i] = load_global<TOGETHER>(from + i * TOGETHER);
  }
  // One by one; columns from col_end on are not read.
  __device__ __forceinline__ void load(const Rows<const T>& rows, int row, int col, int col_end) {
#pragma unroll
    for (int e = 0; e < RUN; ++e) {
      part[e / TOGETHER].at[e % TOGETHER] = col + e < col_end ? load_global<1>(rows.at(row, col + e)).at[0] : T{};
    }
  }
  __device__ __forceinline__ Accumulator operator[](int e) const {
    return to_accumulator(part[e / TOGETHER].at[e % TOGETHER]);
  }
};

__device__ __forceinline__ Accumulator add_products(
    Accumulator sum, const Run<Element>& dout, const Run<Output>& out) {
#pragma unroll
  for (int e = 0; e < RUN; ++e) sum = math::fma(dout[e], out[e], sum);
  return sum;
}

// Of all batch entries of this launch: the main kernel's launches may be others, and each takes that of its first.
__device__ __forceinline__ void clear_tickets(const Params& params) {
  const int entries = count_heads(params, 1);
  for (int batch = thread_index(); batch < entries; batch += NUM_THREADS) {
    const Sequence seq = sequence_of(params, batch);
    int* tickets = static_cast<int*>(params.tickets.data) + entry_offset(params.tickets, seq.batch_index);
    store_global(tickets, Vector<int, 1>{{0}});
  }
}

__device__ __forceinline__ void prepare_dq(const Params& params, const Work& work, const Sequence& seq) {
  // A head has as many for each tile.
  const int packed_tiles = (params.rows_q >> params.tile_shift) + count_heads(params, 1);
  const int tiles = PACKED ? packed_tiles : ceil_div(params.seqlen_q, BLOCK_M);
  const int of_tile = static_cast<int>(params.semaphores.head_stride / tiles);
  int* semaphores = rows_of<int>(params.semaphores, seq.batch_index, work.head).at(work.block * of_tile);
#pragma unroll 1
  for (int i = thread_index(); i < of_tile; i += NUM_THREADS) store_global(semaphores + i, Vector<int, 1>{{0}});
  if constexpr (!DETERMINISTIC) {
    float* sums = rows_of<float>(params.dq_sums, seq.batch_index, work.head).at(work.block);  // row_stride numbers
    for (int i = 4 * thread_index(); i < params.dq_sums.row_stride; i += 4 * NUM_THREADS) {
      store_global(sums + i, Vector<float, 4>{{0, 0, 0, 0}});
    }
    if (params.dq.data == nullptr) return;  // bwd_dq_sm90 will write all of it
  }
  const int m0 = work.block * BLOCK_M, rows = rows_to_write(params, seq);
  const int m_end = rows - m0 < BLOCK_M ? rows : m0 + BLOCK_M;
  const BlockWalk walk = key_walk(params, seq, work.head, work.block);
  const BlockRange blocks = walk.within(mask_of(params, seq).key_blocks(m0, BLOCK_M));
  if (blocks.begin < blocks.end) return;
  const auto dq = rows_of<Gradient_q>(params.dq, seq.batch_index, work.head);  // (seqlen_q, head_dim)
  for (int m = m0 + thread_index() / 32; m < m_end; m += NUM_WARPS) {
    for (int col = thread_index() % 32; col < params.head_dim; col += 32) {
      store_global(dq.at(m, col), Vector<Gradient_q, 1>{{from_accumulator<Gradient_q>(Accumulator(0))}});
    }
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 4) bwd_delta(const Params params) {
  if (params.tickets.data != nullptr && block_index() == 0) clear_tickets(params);
  const int num_blocks = ceil_div(params.seqlen_q, BLOCK_M);
  if (num_blocks * params.num_heads == 0) return;  // no rows: the grid is there for the tickets
  const Work work = scheduled_work(params, num_blocks, params.num_heads, Longest::LAST_BLOCK);
  const Sequence seq = sequence_of(params, work.batch);
  if (PACKED && work.block * BLOCK_M >= seq.seqlen_q) return;
  const auto out = rows_of<const Output>(params.out, seq.batch_index, work.head);          // (seqlen_q, head_dim_v)
  const auto dout = rows_of<const Element>(params.dout, seq.batch_index, work.head);       // (seqlen_q, head_dim_v)
  const auto lse = rows_of<const Accumulator>(params.lse, seq.batch_index, work.head);     // (seqlen_q)
  const auto dlse = rows_of<const Accumulator>(params.dlse, seq.batch_index, work.head);   // (seqlen_q), or no tensor
  const auto delta = rows_of<Accumulator>(params.delta, seq.batch_index, work.head);       // (seqlen_q) or whole tiles
  const auto exponents = rows_of<Accumulator>(params.exponents, seq.batch_index, work.head);  // whole tiles, or none
  const bool whole_tiles = params.exponents.data != nullptr, has_dlse = params.dlse.data != nullptr;
  const int m0 = work.block * BLOCK_M;
  const int m_end = seq.seqlen_q - m0 < BLOCK_M ? seq.seqlen_q : m0 + BLOCK_M;

  // Of a row, `sum` over this thread's columns. Reached by whole warps.
  const auto finish = [&](int row, Accumulator sum, Accumulator row_lse, Accumulator row_dlse) ALWAYS_INLINE {
    const Accumulator whole = row_sum_of(sum);
    const int m = m0 + row;
    if (row >= BLOCK_M || thread_x() != 0) return;
    if (m < m_end) {
      const bool empty = row_lse == -math::infinity<Accumulator>();
      store_number(delta, m, empty ? Accumulator(0) : whole - row_dlse);
      if (whole_tiles) store_number(exponents, m, lse_exponent(row_lse));
    } else if (whole_tiles) {
      store_number(delta, m, 0);
      store_number(exponents, m, math::infinity<Accumulator>());
    }
  };
  if (out.vectors && dout.vectors && params.head_dim_v % RUN == 0 && m0 < m_end) {
#pragma unroll 1
    for (int first = thread_y(); first < BLOCK_M; first += SIDE_BY_SIDE * THREADS_Y) {
      // A row that does not exist is the last one again: no branch, no wait.
      const auto row = [&](int i) ALWAYS_INLINE { return smaller(m0 + first + i * THREADS_Y, m_end - 1); };
      Accumulator sum[SIDE_BY_SIDE], row_lse[SIDE_BY_SIDE], row_dlse[SIDE_BY_SIDE];
#pragma unroll
      for (int i = 0; i < SIDE_BY_SIDE; ++i) {
        sum[i] = 0;
        row_lse[i] = load_number(lse, row(i));
        row_dlse[i] = has_dlse ? load_number(dlse, row(i)) : Accumulator(0);
      }
#pragma unroll 1
      for (int col = thread_x() * RUN; col < params.head_dim_v; col += THREADS_X * RUN) {
        Run<Output> o[SIDE_BY_SIDE];
        Run<Element> d[SIDE_BY_SIDE];
#pragma unroll
        for (int i = 0; i < SIDE_BY_SIDE; ++i) {
          o[i].load(out.at(row(i), col));
          d[i].load(dout.at(row(i), col));
        }
#pragma unroll
        for (int i = 0; i < SIDE_BY_SIDE; ++i) sum[i] = add_products(sum[i], d[i], o[i]);
      }
#pragma unroll
      for (int i = 0; i < SIDE_BY_SIDE; ++i) {
        finish(first + i * THREADS_Y, sum[i], row_lse[i], row_dlse[i]);
      }
    }
  } else {
#pragma unroll 1
    for (int row = thread_y(); row < ROWS * THREADS_Y; row += THREADS_Y) {
      Accumulator sum = 0;
#pragma unroll 1
      for (int col = thread_x() * RUN; m0 + row < m_end && col < params.head_dim_v; col += THREADS_X * RUN) {
        Run<Output> o;
        Run<Element> d;
        o.load(out, m0 + row, col, params.head_dim_v);
        d.load(dout, m0 + row, col, params.head_dim_v);
        sum = add_products(sum, d, o);
      }
      const bool exists = m0 + row < m_end;
      finish(row, sum, exists ? load_number(lse, m0 + row) : Accumulator(0),
             exists && has_dlse ? load_number(dlse, m0 + row) : Accumulator(0));
    }
  }
  if (params.semaphores.data != nullptr) prepare_dq(params, work, seq);
}

// Before the backward: delta_i = sum over d of dout_id * out_id - dlse_i, one number for each query row.
//
// A thread block owns BLOCK_M rows of one head; eight lanes share a row (mma_simt.cuh) and walk its columns in runs
// of 16 bytes of dout: lane x takes runs x, x + 8, ... The order of the sum depends on dout's type alone, not on
// strides. No shared memory. Where lse is -inf the row has no visible key: delta is 0 and dlse is not read.
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "tile.cuh"
#include "mma_simt.cuh"

constexpr int SMEM_BYTES = 0;
constexpr int RUN = 16 / sizeof(Element);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_delta(const Params params) {
  const Work work = scheduled_work(params, ceil_div(params.seqlen_q, BLOCK_M), params.num_heads, Longest::LAST_BLOCK);
  const Sequence seq = sequence_of(params, work.batch);
  const auto out = rows_of<const Output>(params.out, seq.batch_index, work.head);         // (seqlen_q, head_dim_v)
  const auto dout = rows_of<const Element>(params.dout, seq.batch_index, work.head);      // (seqlen_q, head_dim_v)
  const auto lse = rows_of<const Accumulator>(params.lse, seq.batch_index, work.head);    // (seqlen_q)
  const auto dlse = rows_of<const Accumulator>(params.dlse, seq.batch_index, work.head);  // (seqlen_q), or no tensor
  const auto delta = rows_of<Accumulator>(params.delta, seq.batch_index, work.head);      // (seqlen_q)
  const int m0 = work.block * BLOCK_M;
  const int m_end = seq.seqlen_q - m0 < BLOCK_M ? seq.seqlen_q : m0 + BLOCK_M;

  for (int m = m0 + thread_y(); m - thread_y() < m_end; m += THREADS_Y) {
    Accumulator sum = 0;
    if (m < m_end) {
      for (int col = thread_x() * RUN; col < params.head_dim_v; col += THREADS_X * RUN) {
        Accumulator o[RUN], d[RUN];
        load_columns(out, m, col, params.head_dim_v, o);
        load_columns(dout, m, col, params.head_dim_v, d);
#pragma unroll
        for (int e = 0; e < RUN; ++e) sum = math::fma(d[e], o[e], sum);
      }
    }
    sum = row_sum_of(sum);  // outside the branch: shuffles need the whole warp
    if (m < m_end && thread_x() == 0) {
      const bool empty = load_number(lse, m) == -math::infinity<Accumulator>();
      const Accumulator shift = empty || params.dlse.data == nullptr ? Accumulator(0) : load_number(dlse, m);
      store_number(delta, m, empty ? Accumulator(0) : sum - shift);
    }
  }
}

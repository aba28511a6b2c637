// After the backward: a gradient whose input was broadcast, summed over the broadcast axes.
//
// params.partial holds one partial for each entry of the full batch, in Accumulator; params.dq stands for whichever
// gradient it is, and num_heads, seqlen_q, head_dim for that gradient's heads, rows and columns. batch_shape is the
// gradient's own, 1 on broadcast axes, and reduce_shape counts the partials along each.
//
// A thread block owns BLOCK_M rows of one head, a warp takes a row, a lane a number of it, and adds it up in the order
// of the axes, the last one fastest: no atomics, the same bits every time. No shared memory.
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "tile.cuh"

constexpr int SMEM_BYTES = 0;

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_finish(const Params params) {
  const Work work = scheduled_work(params, ceil_div(params.seqlen_q, BLOCK_M), params.num_heads, Longest::LAST_BLOCK);
  const Sequence seq = sequence_of(params, work.batch);
  const auto partial = rows_of<const Accumulator>(params.partial, seq.batch_index, work.head);  // (rows, columns)
  const auto gradient = rows_of<Gradient>(params.dq, seq.batch_index, work.head);               // (rows, columns)
  const long long* stride = params.partial.batch_stride;
  const int* count = params.reduce_shape;
  const int m0 = work.block * BLOCK_M;

  for (int row = thread_index() / 32; row < BLOCK_M && row < params.seqlen_q - m0; row += NUM_WARPS) {
    for (int col = thread_index() % 32; col < params.head_dim; col += 32) {
      const Accumulator* first = partial.at(m0 + row, col);
      Accumulator sum = 0;
      for (int i0 = 0; i0 < count[0]; ++i0) {
        for (int i1 = 0; i1 < count[1]; ++i1) {
          for (int i2 = 0; i2 < count[2]; ++i2) {
            const Accumulator* number = first + i0 * stride[0] + i1 * stride[1] + i2 * stride[2];
            for (int i3 = 0; i3 < count[3]; ++i3) sum += load_global<1>(number + i3 * stride[3]).at[0];
          }
        }
      }
      store_global(gradient.at(m0 + row, col), Vector<Gradient, 1>{{from_accumulator<Gradient>(sum)}});
    }
  }
}

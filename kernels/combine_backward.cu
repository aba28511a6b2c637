// Gradients of merged parts: dout_n = w_n dout, dlse_n = w_n (dout . out_n - delta), delta = dout . out - dlse.
//
// A warp takes a row of one head, a lane some of its columns. lse says what w_n is, so that parts have nothing to tell
// one another: those that one launch does not hold have another. No shared memory.
#include "basics.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "seqlen.cuh"
#include "params_merge.cuh"

constexpr int NUM_THREADS = 32 * NUM_WARPS;
constexpr int SMEM_BYTES = 0;
constexpr int RUN = 16 / sizeof(Accumulator);  // columns of a lane at a time

// x . y, rows of one length, over the warp.
template <typename X, typename Y>
__device__ __forceinline__ Accumulator row_dot(const Rows<const X>& x, const Rows<const Y>& y, int row, int columns) {
  Accumulator sum = 0;
  for (int col = RUN * (thread_index() % 32); col < columns; col += 32 * RUN) {
    Accumulator a[RUN], b[RUN];
    load_columns(x, row, col, columns, a);
    load_columns(y, row, col, columns, b);
#pragma unroll
    for (int i = 0; i < RUN; ++i) sum = math::fma(a[i], b[i], sum);
  }
  return warp_sum(sum);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) combine_backward(const MergeParams params) {
  const int lane = thread_index() % 32, columns = params.columns;
  const long long count = MergeRow::count(params), step = static_cast<long long>(grid_size()) * NUM_WARPS;
  for (long long n = static_cast<long long>(block_index()) * NUM_WARPS + thread_index() / 32; n < count; n += step) {
    const MergeRow at(params, n);
    const int row = at.row;
    const auto dout = at.of<const Output>(params.dout);  // (rows, columns)
    const Accumulator lse = load_number(at.of<const Accumulator>(params.lse), row);
    Accumulator delta = row_dot(dout, at.of<const Output>(params.out), row, columns);
    const bool seen = lse != -math::infinity<Accumulator>();
    if (seen && params.dlse.data != nullptr) delta -= load_number(at.of<const Accumulator>(params.dlse), row);
    for (int part = 0; part < params.count; ++part) {
      const Accumulator own = load_number(at.of<const Accumulator>(params.lses[part]), row);
      Accumulator weight = own == lse ? Accumulator(1) : math::exp2((own - lse) * Accumulator(math::LOG2E));
      if (own == -math::infinity<Accumulator>()) weight = 0;
      const Accumulator dot = row_dot(dout, at.of<const Element>(params.outs[part]), row, columns);
      const auto dpart = at.of<Element>(params.douts[part]);
      for (int col = RUN * lane; col < columns; col += 32 * RUN) {
        Accumulator numbers[RUN];
        load_columns(dout, row, col, columns, numbers);
#pragma unroll
        for (int i = 0; i < RUN; ++i) numbers[i] = weight == 0 ? Accumulator(0) : weight * numbers[i];
        store_columns(dpart, row, col, columns, numbers);
      }
      if (lane == 0) {
        const Accumulator dlse = weight == 0 ? Accumulator(0) : weight * (dot - delta);
        store_number(at.of<Accumulator>(params.dlses[part]), row, dlse);
      }
    }
  }
}

// Parts merged: out = sum of w_n out_n, w_n = exp(lse_n - lse), lse = log(sum of exp(lse_n)).
//
// A warp, or ROW_WARPS of them, take a row of one head; a thread block has BLOCK_M rows.
//
//     1. lane t reads lse of parts t, t + 32, ...: their maximum and their sum, over the warp
//     2. warp w adds up parts w, w + ROW_WARPS, ..., a lane some columns, in the order of the parts
//     3. ROW_WARPS > 1: the warps' sums meet in shared memory, and the first warp adds them up in order
//
//     shared memory, ROW_WARPS > 1: sums (NUM_WARPS, MOST_COLUMNS)
//
// A part of weight 0 is passed over: 0 times an infinite out would be NaN, and decoding writes no out of a split
// without keys.
#include "basics.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "seqlen.cuh"
#include "params_merge.cuh"

constexpr int NUM_THREADS = 32 * NUM_WARPS, ROW_WARPS = NUM_WARPS / BLOCK_M;
constexpr int MOST_COLUMNS = HEAD_DIM_V;  // where warps share a row
constexpr int RUN = 16 / sizeof(Accumulator);  // columns of a lane at a time
static_assert(NUM_WARPS == ROW_WARPS * BLOCK_M, "rows of a block have whole warps");

struct Smem {
  Accumulator sums[NUM_WARPS][MOST_COLUMNS];
};
constexpr int SMEM_BYTES = ROW_WARPS > 1 ? sizeof(Smem) : 0;

// The largest lse of all parts, and from it the sum of their exponentials.
struct Total {
  Accumulator top, sum;

  __device__ __forceinline__ Total(const MergeParams& params, const MergeRow& at) {
    const int lane = thread_index() % 32;
    top = -math::infinity<Accumulator>();
    for (int n = lane; n < params.count; n += 32) top = math::max(top, lse_of(params, at, n));
    top = warp_max(top);
    sum = 0;
    for (int n = lane; n < params.count; n += 32) sum += exponential(lse_of(params, at, n));
    sum = warp_sum(sum);
  }
  static __device__ __forceinline__ Accumulator lse_of(const MergeParams& params, const MergeRow& at, int n) {
    return load_number(at.part<const Accumulator>(params, params.lses, params.lse_step, n), at.row);
  }
  // exp(lse - top), where -inf - -inf and inf - inf would be NaN.
  __device__ __forceinline__ Accumulator exponential(Accumulator lse) const {
    const Accumulator infinite = math::infinity<Accumulator>();
    if (top == infinite) return lse == infinite ? Accumulator(1) : Accumulator(0);
    const Accumulator less = top == -infinite ? Accumulator(0) : top;
    return math::exp2((lse - less) * Accumulator(math::LOG2E));
  }
  __device__ __forceinline__ Accumulator weight(Accumulator lse) const {
    return exponential(lse) / (sum == 0 ? Accumulator(1) : sum);
  }
  __device__ __forceinline__ Accumulator lse() const {
    return sum == 0 || top == math::infinity<Accumulator>() ? top : top + math::log(sum);
  }
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) combine(const MergeParams params) {
  DYNAMIC_SHARED(Smem, smem);
  const int warp = thread_index() / 32, lane = thread_index() % 32, own = warp % ROW_WARPS;
  const long long index = static_cast<long long>(block_index()) * BLOCK_M + warp / ROW_WARPS;
  const bool inside = index < MergeRow::count(params);
  const MergeRow at(params, inside ? index : 0);
  const Total total(params, at);
  const auto out = at.of<Output>(params.out);       // (rows, columns)
  const auto lse = at.of<Accumulator>(params.lse);  // (rows)
  for (int col = RUN * lane; col < params.columns; col += 32 * RUN) {
    Accumulator acc[RUN] = {};
#pragma unroll 4
    for (int n = own; n < params.count; n += ROW_WARPS) {
      const Accumulator weight = total.weight(Total::lse_of(params, at, n));
      if (weight == 0) continue;
      Accumulator part[RUN];
      load_columns(at.part<const Element>(params, params.outs, params.out_step, n), at.row, col, params.columns, part);
#pragma unroll
      for (int i = 0; i < RUN; ++i) acc[i] = math::fma(weight, part[i], acc[i]);
    }
    if constexpr (ROW_WARPS > 1) {
#pragma unroll
      for (int i = 0; i < RUN; ++i) smem.sums[warp][col + i] = acc[i];
    } else if (inside) {
      store_columns(out, at.row, col, params.columns, acc);
    }
  }
  if constexpr (ROW_WARPS > 1) {
    sync_block();  // sums are written
    for (int col = RUN * lane; own == 0 && inside && col < params.columns; col += 32 * RUN) {
      Accumulator acc[RUN] = {};
      for (int w = 0; w < ROW_WARPS; ++w) {
#pragma unroll
        for (int i = 0; i < RUN; ++i) acc[i] += smem.sums[warp + w][col + i];
      }
      store_columns(out, at.row, col, params.columns, acc);
    }
  }
  if (inside && own == 0 && lane == 0) store_number(lse, at.row, total.lse());
}

// What a launch of a kernel that merges parts carries, mirrored by cupyflash/_params_merge.py.
#pragma once
#include "params.cuh"
#include "basics.cuh"

constexpr int MOST_ARRAYS = 8;  // of parts; more than so many parts are merged in levels

struct MergeParams {
  Tensor out, lse, dout, dlse;                                       // (batch axes, head, row, column), lse without it
  Tensor outs[MOST_ARRAYS], lses[MOST_ARRAYS];                       // the parts
  Tensor douts[MOST_ARRAYS], dlses[MOST_ARRAYS];                     // combine_backward: their gradients
  long long out_step, lse_step;  // from one part to the next where one array has them all
  int batch_shape[4];            // leading axes, collapsed, right-aligned, filled up with 1
  int num_heads, rows, columns;
  int count;    // of parts
  int stacked;  // 1: all parts are in outs[0] and lses[0]
  int unused;
};

static_assert(sizeof(MergeParams) == MERGE_PARAMS_BYTES, "params_merge.cuh, _params_merge.py: drifted apart");

// One row of one head of one entry: a result's, and each part's.
struct MergeRow {
  int batch_index[4];
  int head, row;

  __device__ __forceinline__ MergeRow(const MergeParams& params, long long n) {
    row = static_cast<int>(n % params.rows);
    const long long entry_head = n / params.rows;
    head = static_cast<int>(entry_head % params.num_heads);
    unravel(batch_index, params.batch_shape, static_cast<int>(entry_head / params.num_heads));
  }
  static __device__ __forceinline__ long long count(const MergeParams& params) {
    long long rows = static_cast<long long>(params.rows) * params.num_heads;
#pragma unroll
    for (int axis = 0; axis < 4; ++axis) rows *= params.batch_shape[axis];
    return rows;
  }
  template <typename T>
  __device__ __forceinline__ Rows<T> of(const Tensor& tensor) const {
    return rows_of<T>(tensor, batch_index, head);  // (rows, columns)
  }
  // Of part n.
  template <typename T>
  __device__ __forceinline__ Rows<T> part(
      const MergeParams& params, const Tensor (&tensors)[MOST_ARRAYS], long long step, int n) const {
    if (!params.stacked) return of<T>(tensors[n]);
    const Tensor& tensor = tensors[0];
    T* data = static_cast<T*>(tensor.data) + n * step + entry_offset(tensor, batch_index) + head * tensor.head_stride;
    return rows_from(tensor, data);
  }
};

// Over all lanes of a warp, always in the same pairs; all of them get the same bits.
__device__ __forceinline__ Accumulator warp_sum(Accumulator x) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
__device__ __forceinline__ Accumulator warp_max(Accumulator x) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x = math::max(x, shuffle_xor(x, mask));
  return x;
}

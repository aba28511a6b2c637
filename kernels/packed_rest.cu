// Packed sequences: results in the rows behind the last one, which belong to nobody else. out and gradients are 0
// there, lse is -inf.
//
// A warp takes one row of one head, a lane a number of it; the blocks are few and walk all such rows. No shared memory.
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "tile.cuh"

constexpr int SMEM_BYTES = 0;

// Rows from `begin` to `end` of all heads, in `columns` columns, where there is a tensor.
template <typename T>
__device__ __forceinline__ void fill_rows(
    const Tensor& tensor, int begin, int end, int heads, int columns, T value) {
  if (tensor.data == nullptr) return;
  const long long count = static_cast<long long>(end - begin) * heads;
  const int warp = block_index() * NUM_WARPS + thread_index() / 32, warps = grid_size() * NUM_WARPS;
  for (long long n = warp; n < count; n += warps) {
    const long long row = begin + n / heads, head = n % heads;
    T* numbers = static_cast<T*>(tensor.data) + row * tensor.row_stride + head * tensor.head_stride;
    for (int col = thread_index() % 32; col < columns; col += 32) {
      store_global(numbers + col * tensor.col_stride, Vector<T, 1>{{value}});
    }
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) packed_rest(const Params params) {
  const int sequences = count_heads(params, 1);
  const int end_q = params.rows_q, end_k = params.rows_k, heads_k = params.num_heads_k;
  const int q = first_row(params.cu_seqlens_q, sequences, end_q), k = first_row(params.cu_seqlens_k, sequences, end_k);
  if (params.dout.data == nullptr) {  // a backward reads out and lse
    fill_rows(params.out, q, end_q, params.num_heads, params.head_dim_v, from_accumulator<Output>(Accumulator(0)));
    fill_rows(params.lse, q, end_q, params.num_heads, 1, -math::infinity<Accumulator>());
    return;
  }
  const Gradient zero = from_accumulator<Gradient>(Accumulator(0));
  fill_rows(params.dq, q, end_q, params.num_heads, params.head_dim, zero);
  fill_rows(params.dk, k, end_k, heads_k, params.head_dim, zero);
  fill_rows(params.dv, k, end_k, heads_k, params.head_dim_v, zero);
}

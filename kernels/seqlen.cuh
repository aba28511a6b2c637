// Where a batch entry lies in memory, how long it is, where its diagonal runs. What differs between dense and
// packed or paged sequences differs here.
#pragma once
#include "params.cuh"
#include "memory.cuh"
#include "rows.cuh"

struct Sequence {
  int batch_index[4];  // of the entry, along the leading axes
  int seqlen_q, seqlen_k;
  int q_offset;  // query row i sits on key i + q_offset; within [-seqlen_q, seqlen_k], beyond which nothing changes
};

// Elements from the start of a tensor to the start of an entry. All of it in 64 bits: tensors may pass 2**31 elements.
__device__ __forceinline__ long long entry_offset(const Tensor& tensor, const int (&batch_index)[4]) {
  long long offset = 0;
#pragma unroll
  for (int axis = 0; axis < 4; ++axis) offset += batch_index[axis] * tensor.batch_stride[axis];
  return offset;
}

__device__ __forceinline__ Sequence sequence_of(const Params& params, int batch) {
  Sequence seq;
#pragma unroll
  for (int axis = 3; axis >= 0; --axis) {
    const int length = params.batch_shape[axis];
    const int outer = batch < length ? 0 : batch / length;  // most calls have one axis: then no division runs
    seq.batch_index[axis] = batch - outer * length;
    batch = outer;
  }
  seq.seqlen_q = params.seqlen_q;
  seq.seqlen_k = params.seqlen_k;
  long long q_offset = params.q_offset;
  if (params.q_offsets.data != nullptr) {
    const long long* offsets = static_cast<const long long*>(params.q_offsets.data);
    q_offset = load_global<1>(offsets + entry_offset(params.q_offsets, seq.batch_index)).at[0];
  }
  const long long low = -static_cast<long long>(seq.seqlen_q), high = seq.seqlen_k;
  seq.q_offset = static_cast<int>(q_offset < low ? low : q_offset > high ? high : q_offset);
  return seq;
}

// The rows of a head that begins at `data`.
template <typename T>
__device__ __forceinline__ Rows<T> rows_from(const Tensor& tensor, T* data) {
  const bool vectors = tensor.col_stride == 1 && is_aligned(data, 16) && tensor.row_stride * sizeof(T) % 16 == 0;
  return {data, tensor.row_stride, tensor.col_stride, vectors};
}

template <typename T>
__device__ __forceinline__ Rows<T> rows_of(const Tensor& tensor, const int (&batch_index)[4], int head) {
  T* data = static_cast<T*>(tensor.data) + entry_offset(tensor, batch_index) + head * tensor.head_stride;
  return rows_from(tensor, data);
}

// To where the whole block reads it. Main loops find their tensors from there each time: addresses kept in registers
// instead would push accumulators out of them.
__device__ __forceinline__ void share_batch_index(int (&shared)[4], const Sequence& seq) {
  if (thread_index() == 0) {
#pragma unroll
    for (int axis = 0; axis < 4; ++axis) shared[axis] = seq.batch_index[axis];
  }
  sync_block();  // it is written
}

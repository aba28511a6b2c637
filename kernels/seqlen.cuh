// Where a batch entry lies in memory, how long it is, where its diagonal runs. What differs between dense and
// packed or paged sequences differs here.
#pragma once
#include "params.cuh"
#include "basics.cuh"
#include "memory.cuh"
#include "rows.cuh"

// Where distances from the diagonal count, not only its side, an offset is not cut to what 32 bits hold.
constexpr bool FAR_DIAGONAL = WINDOW || ALIBI;
template <bool FAR>
struct OffsetOf {
  using Type = int;
};
template <>
struct OffsetOf<true> {
  using Type = long long;
};
using Offset = OffsetOf<FAR_DIAGONAL>::Type;

// Packed sequences: entries have one leading axis, which is the last of the four. Along two others a tensor that is
// packed has its rows, so that an index there is the entry's first query or first key, and leads to where it begins.
// Along a third, temporaries have their query tiles: what begins at row r of the array, behind n others, has tiles from
// r / 2^tile_shift + n on, which is beyond those of all before, since a tile has at least 2^tile_shift rows.
constexpr int FIRST_QUERY = 0, FIRST_KEY = 1, FIRST_TILE = 2;

struct Sequence {
  int batch_index[4];  // of the entry, along the leading axes
  int seqlen_q, seqlen_k;
  // Query row i sits on key i + q_offset; within [-seqlen_q, seqlen_k], beyond which nothing changes, unless FAR.
  Offset q_offset;
};

// Elements from the start of a tensor to the start of an entry. All of it in 64 bits: tensors may pass 2**31 elements.
__device__ __forceinline__ long long entry_offset(const Tensor& tensor, const int (&batch_index)[4]) {
  long long offset = 0;
#pragma unroll
  for (int axis = 0; axis < 4; ++axis) offset += batch_index[axis] * tensor.batch_stride[axis];
  return offset;
}

// An entry's own length, where it has one; never beyond the tensor, whatever the array says.
__device__ __forceinline__ int own_length(const Tensor& lens, const int (&batch_index)[4], int length) {
  if (lens.data == nullptr) return length;
  const long long* own = static_cast<const long long*>(lens.data) + entry_offset(lens, batch_index);
  const long long n = load_global<1>(own).at[0];
  return n < 0 ? 0 : n > length ? length : static_cast<int>(n);
}

// Where the n-th packed sequence begins; never outside the tensor's `rows`, whatever the array says.
__device__ __forceinline__ int first_row(const Tensor& cu_seqlens, int n, int rows) {
  const int row = load_global<1>(static_cast<const int*>(cu_seqlens.data) + n * cu_seqlens.head_stride).at[0];
  return row < 0 ? 0 : smaller(row, rows);
}

// Of the n-th packed sequence: its length, at most `longest`; `begin` becomes its first row.
__device__ __forceinline__ int packed_length(const Tensor& cu_seqlens, int n, int rows, int longest, int& begin) {
  begin = first_row(cu_seqlens, n, rows);
  const int length = first_row(cu_seqlens, n + 1, rows) - begin;
  return length < 0 ? 0 : smaller(length, longest);
}

// The index along each of some axes, of the n-th in C order.
__device__ __forceinline__ void unravel(int (&index)[4], const int (&shape)[4], int n) {
#pragma unroll
  for (int axis = 3; axis >= 0; --axis) {
    const int length = shape[axis];
    const int outer = n < length ? 0 : n / length;  // most calls have one axis: then no division runs
    index[axis] = n - outer * length;
    n = outer;
  }
}

// The entry at seq.batch_index.
__device__ __forceinline__ void describe(Sequence& seq, const Params& params) {
  seq.seqlen_q = params.seqlen_q;
  seq.seqlen_k = params.seqlen_k;
  long long q_offset = params.q_offset;
  if constexpr (PACKED) {
    const int n = seq.batch_index[3];
    int* first = seq.batch_index;
    seq.seqlen_q = packed_length(params.cu_seqlens_q, n, params.rows_q, params.seqlen_q, first[FIRST_QUERY]);
    seq.seqlen_k = packed_length(params.cu_seqlens_k, n, params.rows_k, params.seqlen_k, first[FIRST_KEY]);
    first[FIRST_TILE] = (first[FIRST_QUERY] >> params.tile_shift) + n;
    if (params.bottom_right) q_offset = static_cast<long long>(seq.seqlen_k) - seq.seqlen_q;
  } else if constexpr (LENS) {
    seq.seqlen_q = own_length(params.q_lens, seq.batch_index, params.seqlen_q);
    seq.seqlen_k = own_length(params.kv_lens, seq.batch_index, params.seqlen_k);
    if (params.bottom_right) q_offset = static_cast<long long>(seq.seqlen_k) - seq.seqlen_q;
  }
  if (params.q_offsets.data != nullptr) {
    const long long* offsets = static_cast<const long long*>(params.q_offsets.data);
    q_offset = load_global<1>(offsets + entry_offset(params.q_offsets, seq.batch_index)).at[0];
  }
  if constexpr (FAR_DIAGONAL) {
    constexpr long long FARTHEST = 1ll << 61;  // sums with indices and windows stay within 64 bits
    seq.q_offset = q_offset < -FARTHEST ? -FARTHEST : q_offset > FARTHEST ? FARTHEST : q_offset;
  } else {
    const long long low = -static_cast<long long>(seq.seqlen_q), high = seq.seqlen_k;
    seq.q_offset = static_cast<int>(q_offset < low ? low : q_offset > high ? high : q_offset);
  }
}

__device__ __forceinline__ Sequence sequence_of(const Params& params, int batch) {
  Sequence seq;
  unravel(seq.batch_index, params.batch_shape, batch);
  describe(seq, params);
  return seq;
}

// The index of an entry among all of a call.
__device__ __forceinline__ int flat_batch(const Params& params, const int (&batch_index)[4]) {
  if constexpr (PACKED) return batch_index[3];
  int batch = 0;
#pragma unroll
  for (int axis = 0; axis < 4; ++axis) {
    batch = batch * params.batch_shape[axis] * params.reduce_shape[axis] + batch_index[axis];
  }
  return static_cast<int>(params.first_batch) + batch;
}

// Rows and keys that a tensor has: an entry of its own length leaves some of them without a meaning, and their results
// are written too. Not so where the next entry's rows follow.
__device__ __forceinline__ int rows_to_write(const Params& params, const Sequence& seq) {
  return LENS && !PACKED ? params.seqlen_q : seq.seqlen_q;
}
__device__ __forceinline__ int keys_to_write(const Params& params, const Sequence& seq) {
  return LENS && !PACKED ? params.seqlen_k : seq.seqlen_k;
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

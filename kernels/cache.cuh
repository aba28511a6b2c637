// Where an entry's keys and values lie, in line or in pages, and how many there are. Whatever lengths and page tables
// hold, no address is outside the cache.
#pragma once
#include "params_decode.cuh"
#include "basics.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "seqlen.cuh"

__device__ __forceinline__ int clamped_index(int x, int count) { return x < 0 ? 0 : smaller(x, count - 1); }

// How many rows an entry has before new ones.
__device__ __forceinline__ int old_rows(const DecodeParams& decode, int batch) {
  const Params& params = decode.params;
  const int* lens = static_cast<const int*>(params.kv_lens.data) + batch * params.kv_lens.batch_stride[3];
  const int most = params.seqlen_k - (APPENDS ? params.seqlen_q : 0);
  const int n = load_global<1>(lens).at[0];
  return n < 0 ? 0 : smaller(n, most);
}

// An entry with its new rows: its last query sits on its last key.
__device__ __forceinline__ Sequence cached_sequence(const DecodeParams& decode, int batch) {
  Sequence seq = {{0, 0, 0, batch}, decode.params.seqlen_q, old_rows(decode, batch), 0};
  if (APPENDS) seq.seqlen_k += seq.seqlen_q;
  seq.q_offset = seq.seqlen_k - seq.seqlen_q;
  return seq;
}

// Row j of an entry, of one head of the cache.
template <typename T>
struct CacheRows {
  T* data;  // of the head; PAGED: in page 0
  long long row_stride, col_stride, page_stride;
  const int* pages;  // of the entry
  long long table_stride;
  int page_size, num_pages;

  __device__ __forceinline__ CacheRows(
      const DecodeParams& decode, const Tensor& cache, long long page_stride, int batch, int head)
      : data(static_cast<T*>(cache.data) + head * cache.head_stride),
        row_stride(cache.row_stride),
        col_stride(cache.col_stride),
        page_stride(page_stride),
        pages(nullptr),
        table_stride(decode.page_table.row_stride),
        page_size(decode.page_size),
        num_pages(decode.num_pages) {
    if constexpr (PAGED) {
      const Tensor& table = decode.page_table;
      pages = static_cast<const int*>(table.data) + batch * table.batch_stride[3];
    } else {
      data += batch * cache.batch_stride[3];
    }
  }
  __device__ __forceinline__ T* at(int j) const {
    if constexpr (PAGED) {
      const int place = j / page_size;
      const int page = clamped_index(load_global<1>(pages + place * table_stride).at[0], num_pages);
      return data + page * page_stride + (j - place * page_size) * row_stride;
    } else {
      return data + j * row_stride;
    }
  }
  // Address and strides of all rows in one word, in bytes: what divides it divides each of them.
  __device__ __forceinline__ unsigned long long alignment() const {
    const long long strides = (PAGED ? row_stride | page_stride : row_stride) * static_cast<long long>(sizeof(T));
    return reinterpret_cast<unsigned long long>(data) | static_cast<unsigned long long>(strides);
  }
  // One row as rows, for load_columns() and store_columns().
  __device__ __forceinline__ Rows<T> row(int j) const {
    return {at(j), 0, col_stride, col_stride == 1 && alignment() % 16 == 0};
  }
};
template <typename T>
__device__ __forceinline__ CacheRows<T> keys_of(const DecodeParams& decode, int batch, int head) {
  return CacheRows<T>(decode, decode.params.k, decode.page_stride_k, batch, head);
}
template <typename T>
__device__ __forceinline__ CacheRows<T> values_of(const DecodeParams& decode, int batch, int head) {
  return CacheRows<T>(decode, decode.params.v, decode.page_stride_v, batch, head);
}

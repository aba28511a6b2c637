// Rows of a tensor in global memory: where they lie, and how a thread reads and writes a few numbers of one.
#pragma once
#include "types.cuh"
#include "memory.cuh"

// One head of one batch entry, (rows, columns) with any strides.
template <typename T>
struct Rows {
  T* data;  // row 0, column 0
  long long row_stride, col_stride;
  bool vectors;  // 16 bytes of a row, counted from its start, can be moved as one

  __device__ __forceinline__ T* at(int row, int col) const { return data + row * row_stride + col * col_stride; }
  __device__ __forceinline__ T* at(int row) const { return data + row * row_stride; }
};

// N neighbouring columns of one row; columns from col_end on are 0 and not read.
template <int N, typename T>
__device__ __forceinline__ void load_columns(
    const Rows<const T>& rows, int row, int col, int col_end, Accumulator (&numbers)[N]) {
  constexpr int RUN = 16 / sizeof(T) < N ? 16 / sizeof(T) : N;  // elements of one load
  if (rows.vectors && col + N <= col_end) {
#pragma unroll
    for (int part = 0; part < N; part += RUN) {
      const Vector<T, RUN> run = load_global<RUN>(rows.at(row, col + part));
#pragma unroll
      for (int e = 0; e < RUN; ++e) numbers[part + e] = to_accumulator(run.at[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      numbers[e] = col + e < col_end ? to_accumulator(load_global<1>(rows.at(row, col + e)).at[0]) : Accumulator(0);
    }
  }
}

// N neighbouring columns of one row, rounded to the tensor's type; columns from col_end on are not stored.
template <int N, typename T>
__device__ __forceinline__ void store_columns(
    const Rows<T>& rows, int row, int col, int col_end, const Accumulator (&numbers)[N]) {
  Vector<T, N> rounded;
#pragma unroll
  for (int e = 0; e < N; ++e) rounded.at[e] = from_accumulator<T>(numbers[e]);
  if (rows.vectors && col + N <= col_end) {
    store_global(rows.at(row, col), rounded);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (col + e < col_end) store_global(rows.at(row, col + e), Vector<T, 1>{{rounded.at[e]}});
    }
  }
}

// Eight neighbouring 16-bit numbers in pairs, the first of each in the low half.
template <typename T>
__device__ __forceinline__ void store_words(T* to, const unsigned (&words)[4]) {
  store_global(reinterpret_cast<unsigned*>(to), Vector<unsigned, 4>{{words[0], words[1], words[2], words[3]}});
}

// One number of a tensor that has rows but no columns: lse, dlse, delta. A call may do without lse: its strides are 0.
__device__ __forceinline__ Accumulator load_number(const Rows<const Accumulator>& rows, int row) {
  return load_global<1>(rows.at(row)).at[0];
}
__device__ __forceinline__ void store_number(const Rows<Accumulator>& rows, int row, Accumulator number) {
  if (rows.data != nullptr) store_global(rows.at(row), Vector<Accumulator, 1>{{number}});
}

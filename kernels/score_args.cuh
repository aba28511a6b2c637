// How an element of score_args and mask_args is found: an index beyond an axis takes its nearest element.
#pragma once
#include "function_args.cuh"
#include "types.cuh"

template <typename Int>
__device__ __forceinline__ int clamped(Int index, int length) {
  return index < 0 ? 0 : index < length ? static_cast<int>(index) : length - 1;
}

template <typename T>
__device__ __forceinline__ T stored(T x) {
  return x;
}
__device__ __forceinline__ float stored(Float16 x) { return to_accumulator(x); }
__device__ __forceinline__ float stored(Bfloat16 x) { return to_accumulator(x); }

// The element, an int, long long, bool or Accumulator, of an array of T at an index: as many numbers, int or long
// long, as the array has axes.
template <typename Number, typename T, typename... Int>
__device__ __forceinline__ Number load_argument(const ArgumentArray& array, Int... index) {
  long long offset = 0;
  int axis = 0;
  ((offset += array.stride[axis] * clamped(index, array.length[axis]), ++axis), ...);
  return static_cast<Number>(stored(static_cast<const T*>(array.data)[offset]));
}

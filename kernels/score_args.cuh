// The arrays of score_args and mask_args: where they lie and how an element is found. Mirrored by
// cupyflash/_score_args.py. Shapes are run-time values; an index beyond an axis takes its nearest element.
#pragma once
#include "types.cuh"

struct ArgumentArray {
  const void* data;
  long long stride[4];  // in elements; axes the array does not have: 0
  int length[4];        // axes it does not have: 1
};

struct FunctionArgs {
  ArgumentArray array[8];  // those that a call does not have: nullptr
};
using ScoreArgs = FunctionArgs;
using MaskArgs = FunctionArgs;

static_assert(sizeof(FunctionArgs) == FUNCTION_ARGS_BYTES, "score_args.cuh and _score_args.py have drifted apart");

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

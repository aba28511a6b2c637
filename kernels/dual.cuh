// Dual numbers: a value and its derivative by one variable, carried through a computation side by side.
#pragma once
#include "types.cuh"

struct Dual {
  Accumulator value, slope;
};

__device__ __forceinline__ Dual operator*(Dual x, Accumulator y) { return {x.value * y, x.slope * y}; }
__device__ __forceinline__ Dual operator+(Dual x, Accumulator y) { return {x.value + y, x.slope}; }
__device__ __forceinline__ Dual operator-(Dual x, Accumulator y) { return {x.value - y, x.slope}; }
__device__ __forceinline__ Dual operator-(Dual x) { return {-x.value, -x.slope}; }

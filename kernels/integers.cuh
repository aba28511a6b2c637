// Small arithmetic of lengths and blocks.
#pragma once

constexpr __device__ __forceinline__ int ceil_div(int a, int b) { return a / b + (a % b != 0); }
constexpr __device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

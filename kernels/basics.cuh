// Small things that every kernel needs.
#pragma once

// Behind the parameters of a lambda that captures accumulators: called instead of inlined, it would find them in
// local memory.
#define ALWAYS_INLINE __attribute__((always_inline))

constexpr __device__ __forceinline__ int ceil_div(int a, int b) { return a / b + (a % b != 0); }
constexpr __device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// The greatest power of two, up to MOST, that divides N.
template <int N, int MOST>
constexpr int POWER_IN = N % MOST == 0 ? MOST : POWER_IN<N, MOST / 2>;
template <int N>
constexpr int POWER_IN<N, 1> = 1;

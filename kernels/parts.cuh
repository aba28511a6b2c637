// Operands of a warp's products in float64 and float32, and the products.
//
// float64 has tensor cores of its own. A float32 number is the sum of three bfloat16, each with 8 of its 24 digits,
// and of the nine products of the parts of two numbers six count:
//
//     a b = a0 b0 + (a0 b1 + a1 b0) + (a0 b2 + a1 b1 + a2 b0) + what is left out
//
// a0 is a, cut off (so that the largest numbers do not become infinite): |a1| < 2**-7 |a|. a1 is rounded: what remains
// for a2 is exact, has either sign, and |a2| <= 2**-16 |a|. What is left out, a1 b2 + a2 b1 + a2 b2, is below
// 2**-22 |a b|, and is as often above 0 as below. Parts under the smallest normal number are lost: |a| should be above
// 2**-102 for all of its digits to count.
//
// The tensor cores cut sums off where IEEE rounds them. So they sum over 16 only, the small products first, and
// float32 additions, which round, do the rest.
#pragma once
#include "types.cuh"
#include "mma_sm80.cuh"
#include "mma_sm90.cuh"

template <typename Number>
struct LeftOf;  // (16, 16)
template <typename Number>
struct RightOf;  // (16, 8)

// ---- float64

template <>
struct LeftOf<double> {
  double at[8];

  // What lane 4 g + t holds of rows g and g + 8.
  __device__ __forceinline__ void take(const double (&upper)[4], const double (&lower)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      at[2 * i] = upper[i];
      at[2 * i + 1] = lower[i];
    }
  }
};
template <>
struct RightOf<double> {
  double at[4];

  // What lane 4 g + t holds of column g.
  __device__ __forceinline__ void take(const double (&column)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] = column[i];
  }
};

// d (16, 8) += a (16, 16) b (16, 8), in the fragments of mma_sm80.cuh.
__device__ __forceinline__ void multiply(double (&d)[4], const double (&a)[8], const double (&b)[4]) {
#if __CUDA_ARCH__ >= 900
  mma_m16n8k16_f64(d, a, b);
#else
  double upper[2] = {d[0], d[1]}, lower[2] = {d[2], d[3]};  // rows
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mma_m8n8k4_f64(upper, a[2 * i], b[i]);
    mma_m8n8k4_f64(lower, a[2 * i + 1], b[i]);
  }
  d[0] = upper[0];
  d[1] = upper[1];
  d[2] = lower[0];
  d[3] = lower[1];
#endif
}

// Blocks from the given one on of acc, R times some (16, 8), += a b, of S blocks side by side.
template <typename Acc, int R, int S>
__device__ __forceinline__ void multiply(
    Acc (&acc)[R], int block, const LeftOf<double> (&a)[R], const RightOf<double> (&b)[S]) {
#pragma unroll
  for (int i = 0; i < S; ++i) {
#pragma unroll
    for (int f = 0; f < R; ++f) multiply(acc[f].at[block + i], a[f].at, b[i].at);
  }
}

// ---- float32

// Two numbers as sums of three bfloat16, which lie as pairs, x's in the low half.
__device__ __forceinline__ void split(unsigned& large, unsigned& middle, unsigned& small, float x, float y) {
  constexpr unsigned UPPER = 0xffff0000u;
  large = upper_halves(__float_as_uint(x), __float_as_uint(y));
  x -= __uint_as_float(__float_as_uint(x) & UPPER);
  y -= __uint_as_float(__float_as_uint(y) & UPPER);
  middle = pack<Bfloat16>(x, y);
  x -= __uint_as_float(middle << 16);
  y -= __uint_as_float(middle & UPPER);
  small = upper_halves(__float_as_uint(x), __float_as_uint(y));  // nothing is cut off
}

template <>
struct LeftOf<float> {
  unsigned part[3][4];

  __device__ __forceinline__ void take(const float (&upper)[4], const float (&lower)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      split(part[0][2 * i], part[1][2 * i], part[2][2 * i], upper[2 * i], upper[2 * i + 1]);
      split(part[0][2 * i + 1], part[1][2 * i + 1], part[2][2 * i + 1], lower[2 * i], lower[2 * i + 1]);
    }
  }
};
template <>
struct RightOf<float> {
  unsigned part[3][2];

  __device__ __forceinline__ void take(const float (&column)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) split(part[0][i], part[1][i], part[2][i], column[2 * i], column[2 * i + 1]);
  }
};

// The products that count, small ones first, and the parts that they are of.
constexpr int PRODUCTS = 6;
constexpr __device__ __forceinline__ int left_part(int product) {
  return product == 0 ? 2 : product == 1 || product == 3 ? 1 : 0;
}
constexpr __device__ __forceinline__ int right_part(int product) {
  return product == 2 ? 2 : product == 1 || product == 4 ? 1 : 0;
}

// One product after the other over all blocks: each waits for the one before it in its own block.
template <typename Acc, int R, int S>
__device__ __forceinline__ void multiply(
    Acc (&acc)[R], int block, const LeftOf<float> (&a)[R], const RightOf<float> (&b)[S]) {
  float sum[R][S][4];
#pragma unroll
  for (int f = 0; f < R; ++f) {
#pragma unroll
    for (int i = 0; i < S; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[f][i][e] = 0;
    }
  }
#pragma unroll
  for (int product = 0; product < PRODUCTS; ++product) {
#pragma unroll
    for (int f = 0; f < R; ++f) {
#pragma unroll
      for (int i = 0; i < S; ++i) {
        mma_m16n8k16<Bfloat16>(sum[f][i], a[f].part[left_part(product)], b[i].part[right_part(product)]);
      }
    }
  }
#pragma unroll
  for (int f = 0; f < R; ++f) {
#pragma unroll
    for (int i = 0; i < S; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[f].at[block + i][e] += sum[f][i][e];
    }
  }
}

using Left = LeftOf<Element>;
using Right = RightOf<Element>;

// How many of so many blocks are multiplied side by side: of float32 some, so that products do not wait for each other.
template <int BLOCKS>
constexpr __device__ __forceinline__ int side_by_side() {
  return sizeof(Element) == 8 ? 1 : BLOCKS % 4 == 0 ? 4 : 2;
}

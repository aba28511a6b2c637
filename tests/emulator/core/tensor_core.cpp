#include "tensor_core.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "shadow.h"
#include "warp.h"

namespace emulator {

float element_of(u16 bits, Format format) {
  return format == BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
}

namespace {

// Of zero: below all others. Of what is not finite: above all others, whatever it is multiplied by.
constexpr int NOTHING = -2000, TOO_MUCH = 4000;

// Where a number's bits begin. Subnormal ones are not normalised: bfloat16's and tf32's begin where float32's do;
// float16's, 8 bits of exponent wide here, count as ordinary ones.
int exponent_of(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  int biased = (int)(bits >> 23 & 0xff);
  return x == 0 ? NOTHING : biased == 255 ? TOO_MUCH : (biased ? biased : 1) - 127;
}

float cut_off(double x) {
  float nearest = (float)x;
  return fabs(x) < 0x1p128 && fabs((double)nearest) > fabs(x) ? nextafterf(nearest, 0) : nearest;
}

}  // namespace

void multiply(u32 m, u32 n, u32 k, const float *a, const float *b, const float *c, float *d) {
  constexpr int FRACTION = 25;
  int b_exponents[16 * 256];
  for (u32 i = 0; i < k * n; i++) b_exponents[i] = exponent_of(b[i]);
  for (u32 i = 0; i < m; i++) {
    int largest[256];
    double sums[256], scales[256];
    for (u32 j = 0; j < n; j++) largest[j] = exponent_of(c[i * n + j]);
    for (u32 l = 0; l < k; l++) {
      int exponent = exponent_of(a[i * k + l]);
      for (u32 j = 0; j < n; j++) {
        int here = exponent + b_exponents[l * n + j];
        largest[j] = largest[j] > here ? largest[j] : here;
      }
    }
    for (u32 j = 0; j < n; j++) {
      bool finite = largest[j] < TOO_MUCH + NOTHING, zero = largest[j] <= NOTHING / 2;
      int shift = finite && !zero ? FRACTION - largest[j] : 0;  // in [-229, 277]
      u64 bits = (u64)(1023 + shift) << 52;
      memcpy(&scales[j], &bits, 8);
      sums[j] = (double)(int)(c[i * n + j] * scales[j]);  // below 2^26
    }
    for (u32 l = 0; l < k; l++) {
      double factor = a[i * k + l];
      for (u32 j = 0; j < n; j++) sums[j] += (double)(int)(factor * b[l * n + j] * scales[j]);  // below 2^27
    }
    for (u32 j = 0; j < n; j++) {
      if (largest[j] < TOO_MUCH + NOTHING) {
        d[i * n + j] = cut_off(sums[j] / scales[j]);
      } else {
        sums[j] = c[i * n + j];
        for (u32 l = 0; l < k; l++) sums[j] += (double)a[i * k + l] * b[l * n + j];
        d[i * n + j] = (float)sums[j];
      }
    }
  }
}

void unpack_a(u32 lane, const u32 *registers, Format format, float *a, u32 columns) {
  u32 row = lane / 4, column = lane % 4 * 2;
  for (u32 i = 0; i < columns / 4; i++)  // rows r and r + 8, then the next eight columns
    for (u32 e = 0; e < 2; e++)
      a[(row + i % 2 * 8) * columns + column + i / 2 * 8 + e] =
          element_of((u16)(registers[i] >> 16 * e), format);
}

namespace {

struct MmaArgument {
  void *d;
  const void *a, *b, *c;
};

// tf32 is float32 with the low 13 bits ignored.
float tfloat32_of(u32 bits) {
  bits &= 0xffffe000;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Accumulators of every shape but the float64 8 x 8 one: rows r and r + 8, two columns.
u32 accumulator_index(u32 lane, u32 e, u32 n) { return (lane / 4 + e / 2 * 8) * n + lane % 4 * 2 + e % 2; }

void unpack_b(u32 lane, const u32 *registers, Format format, u32 k, float *b, u32 n) {
  for (u32 i = 0; i < k / 8; i++)
    for (u32 e = 0; e < 2; e++)
      b[(lane % 4 * 2 + i * 8 + e) * n + lane / 4] = element_of((u16)(registers[i] >> 16 * e), format);
}

// Registers of 32-bit elements: a_i at rows r, r + 8, and columns t, t + 4; b_i at rows t, t + 4.
void unpack_tfloat32(u32 lane, const u32 *a, const u32 *b, u32 k, float *A, float *B, u32 n) {
  for (u32 i = 0; i < k / 2; i++) A[(lane / 4 + i % 2 * 8) * k + lane % 4 + i / 2 * 4] = tfloat32_of(a[i]);
  for (u32 i = 0; i < k / 4; i++) B[(lane % 4 + i * 4) * n + lane / 4] = tfloat32_of(b[i]);
}

void set_accumulators(const Collective &c, u32 lane, void *where, const void *values, u32 bytes) {
  as_lane(lane, c, [&] {
    if (self->registers) on_store(where, bytes);
  });
  memcpy(where, values, bytes);
}

void mma_float(const Collective &c, Format format, u32 n, u32 k) {
  float A[16 * 16], B[16 * 8], C[16 * 8];
  for (u32 lane = 0; lane < WARP; lane++) {
    auto *x = (MmaArgument *)c.arguments[lane];
    if (format == TFLOAT32) {
      unpack_tfloat32(lane, (const u32 *)x->a, (const u32 *)x->b, k, A, B, n);
    } else {
      unpack_a(lane, (const u32 *)x->a, format, A, k);
      unpack_b(lane, (const u32 *)x->b, format, k, B, n);
    }
    for (u32 e = 0; e < 4; e++) C[accumulator_index(lane, e, n)] = ((const float *)x->c)[e];
  }
  multiply(16, n, k, A, B, C, C);
  for (u32 lane = 0; lane < WARP; lane++) {
    float d[4];
    for (u32 e = 0; e < 4; e++) d[e] = C[accumulator_index(lane, e, n)];
    set_accumulators(c, lane, ((MmaArgument *)c.arguments[lane])->d, d, sizeof d);
  }
}

// float64: one fma after the other, in the order of k.
void mma_double(const Collective &c, u32 m, u32 n, u32 k) {
  double A[16 * 16], B[16 * 8], C[16 * 8];
  u32 halves = m / 8;  // rows r, or r and r + 8
  for (u32 lane = 0; lane < WARP; lane++) {
    auto *x = (MmaArgument *)c.arguments[lane];
    for (u32 i = 0; i < halves * k / 4; i++)
      A[(lane / 4 + i % halves * 8) * k + lane % 4 + i / halves * 4] = ((const double *)x->a)[i];
    for (u32 i = 0; i < k / 4; i++) B[(lane % 4 + i * 4) * n + lane / 4] = ((const double *)x->b)[i];
    for (u32 e = 0; e < 2 * halves; e++) C[accumulator_index(lane, e, n)] = ((const double *)x->c)[e];
  }
  for (u32 i = 0; i < m; i++)
    for (u32 j = 0; j < n; j++)
      for (u32 l = 0; l < k; l++) C[i * n + j] = fma(A[i * k + l], B[l * n + j], C[i * n + j]);
  for (u32 lane = 0; lane < WARP; lane++) {
    double d[4];
    for (u32 e = 0; e < 2 * halves; e++) d[e] = C[accumulator_index(lane, e, n)];
    set_accumulators(c, lane, ((MmaArgument *)c.arguments[lane])->d, d, 16 * halves);
  }
}

}  // namespace

void mma(Format format, int m, int n, int k, void *d, const void *a, const void *b, const void *c) {
  EMULATOR_ENTER();
  MmaArgument mine{d, a, b, c};
  collective("mma.sync", true, ~0u, &mine, [&](Collective &all) {
    if (format == FLOAT64)
      mma_double(all, (u32)m, (u32)n, (u32)k);
    else
      mma_float(all, format, (u32)n, (u32)k);
  });
}

}  // namespace emulator

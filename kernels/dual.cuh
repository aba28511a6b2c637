// Dual numbers: a value and its slope, so that one function gives a logit and the derivative of it. Where only one
// operand is dual, the other's slope is 0 and no product with it is formed: 0 * inf would be NaN. Choices select value
// and slope together, so that nothing of the other side remains.
#pragma once
#include "functions.cuh"
#include "types.cuh"

struct Dual {
  Accumulator value, slope;

  Dual() = default;
  __device__ __forceinline__ Dual(Accumulator value, Accumulator slope = Accumulator(0)) : value(value), slope(slope) {}
};

__device__ __forceinline__ Dual operator-(Dual x) { return {-x.value, -x.slope}; }
__device__ __forceinline__ Dual operator+(Dual x, Dual y) { return {x.value + y.value, x.slope + y.slope}; }
__device__ __forceinline__ Dual operator+(Dual x, Accumulator y) { return {x.value + y, x.slope}; }
__device__ __forceinline__ Dual operator+(Accumulator x, Dual y) { return {x + y.value, y.slope}; }
__device__ __forceinline__ Dual operator-(Dual x, Dual y) { return {x.value - y.value, x.slope - y.slope}; }
__device__ __forceinline__ Dual operator-(Dual x, Accumulator y) { return {x.value - y, x.slope}; }
__device__ __forceinline__ Dual operator-(Accumulator x, Dual y) { return {x - y.value, -y.slope}; }
__device__ __forceinline__ Dual operator*(Dual x, Dual y) {
  return {x.value * y.value, x.slope * y.value + y.slope * x.value};
}
__device__ __forceinline__ Dual operator*(Dual x, Accumulator y) { return {x.value * y, x.slope * y}; }
__device__ __forceinline__ Dual operator*(Accumulator x, Dual y) { return {x * y.value, y.slope * x}; }

// (x / y)' = (x' - (x / y) y') / y
__device__ __forceinline__ Dual operator/(Dual x, Dual y) {
  const Accumulator quotient = x.value / y.value;
  return {quotient, (x.slope - y.slope * quotient) / y.value};
}
__device__ __forceinline__ Dual operator/(Dual x, Accumulator y) { return {x.value / y, x.slope / y}; }
__device__ __forceinline__ Dual operator/(Accumulator x, Dual y) {
  const Accumulator quotient = x / y.value;
  return {quotient, -(y.slope * quotient) / y.value};
}

#define DUAL_COMPARISON(sign)                                                                       \
  __device__ __forceinline__ bool operator sign(Dual x, Dual y) { return x.value sign y.value; }    \
  __device__ __forceinline__ bool operator sign(Dual x, Accumulator y) { return x.value sign y; }   \
  __device__ __forceinline__ bool operator sign(Accumulator x, Dual y) { return x sign y.value; }
DUAL_COMPARISON(<)
DUAL_COMPARISON(<=)
DUAL_COMPARISON(>)
DUAL_COMPARISON(>=)
DUAL_COMPARISON(==)
DUAL_COMPARISON(!=)
#undef DUAL_COMPARISON

namespace math {

__device__ __forceinline__ Accumulator value(Dual x) { return x.value; }
__device__ __forceinline__ Accumulator slope(Dual x) { return x.slope; }
__device__ __forceinline__ Dual minimum(Dual x, Dual y) { return x.value <= y.value || x.value != x.value ? x : y; }
__device__ __forceinline__ Dual maximum(Dual x, Dual y) { return x.value >= y.value || x.value != x.value ? x : y; }
__device__ __forceinline__ Dual floor(Dual x) { return {floor(x.value), Accumulator(0)}; }
__device__ __forceinline__ Dual absolute(Dual x) {
  return {absolute(x.value), x.value > 0 ? x.slope : x.value < 0 ? -x.slope : Accumulator(0)};
}

// (x - y floor(x / y))', the floor's slope being 0.
__device__ __forceinline__ Dual remainder(Dual x, Dual y) {
  return {remainder(x.value, y.value), x.slope - floor_divide(x.value, y.value) * y.slope};
}
__device__ __forceinline__ Dual remainder(Dual x, Accumulator y) { return {remainder(x.value, y), x.slope}; }
__device__ __forceinline__ Dual remainder(Accumulator x, Dual y) {
  return {remainder(x, y.value), -(floor_divide(x, y.value) * y.slope)};
}

__device__ __forceinline__ Dual exp(Dual x) {
  const Accumulator y = exp(x.value);
  return {y, x.slope * y};
}
__device__ __forceinline__ Dual exp2(Dual x) {
  const Accumulator y = exp2(x.value);
  return {y, x.slope * (y * Accumulator(LN2))};
}
__device__ __forceinline__ Dual log(Dual x) { return {log(x.value), x.slope * (Accumulator(1) / x.value)}; }
__device__ __forceinline__ Dual sqrt(Dual x) {
  const Accumulator y = sqrt(x.value);
  return {y, x.slope * (Accumulator(0.5) / y)};
}
__device__ __forceinline__ Dual tanh(Dual x) {
  const Accumulator y = tanh(x.value);
  return {y, x.slope * (Accumulator(1) - y * y)};
}
__device__ __forceinline__ Dual sin(Dual x) { return {sin(x.value), x.slope * cos(x.value)}; }
__device__ __forceinline__ Dual cos(Dual x) { return {cos(x.value), x.slope * -sin(x.value)}; }

}  // namespace math

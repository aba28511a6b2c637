// From a raw product q . k to the logit: the one place that will know softcap, biases and score functions.
#pragma once
#include "params.cuh"
#include "types.cuh"

struct Score {
  // What is left to multiply logit() by, for the exponent of 2 and for the gradient of the raw product. With no
  // feature on, the logit is the raw product with the scale's sign, and the scale's size waits for exp2, where it
  // costs nothing. So exponent > 0, whatever the scale: the largest logit has the largest exponent, and a logit of
  // -inf has the exponent -inf.
  Accumulator exponent;
  Accumulator gradient;

  // Generic over the number type, so that a dual number brings the slope for the backward.
  template <typename Number>
  __device__ __forceinline__ Number logit(Number product) const {
    if constexpr (SCALE_SIGN < 0) return -product;
    if constexpr (SCALE_SIGN == 0) return product * Accumulator(0);
    return product;
  }
};

__device__ __forceinline__ Score score_of(const Params& params) {
  const double size = SCALE_SIGN == 0 ? 1 : params.softmax_scale * SCALE_SIGN;
  const Accumulator exponent = static_cast<Accumulator>(size * math::LOG2E);
  // A scale that rounds to 0 would make the exponent of -inf a NaN.
  return {math::max(exponent, math::smallest<Accumulator>()), static_cast<Accumulator>(params.softmax_scale)};
}

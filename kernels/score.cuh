// From a raw product q . k to the logit: the one place that will know softcap, biases and score functions.
#pragma once
#include "params.cuh"
#include "types.cuh"

struct Score {
  // What is left to multiply logit() by, for the exponent of 2 and for the gradient of the raw product. With no
  // feature on, the logit is the raw product and the scale waits for exp2, where it costs nothing.
  Accumulator exponent;
  Accumulator gradient;

  // Generic over the number type, so that a dual number brings the slope for the backward.
  template <typename Number>
  __device__ __forceinline__ Number logit(Number product) const {
    return product;
  }
};

__device__ __forceinline__ Score score_of(const Params& params) {
  return {static_cast<Accumulator>(params.softmax_scale * math::LOG2E), static_cast<Accumulator>(params.softmax_scale)};
}

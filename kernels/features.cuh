// All that a kernel asks of single pairs of one head of one entry: what is added to the logit, what a function makes of
// it, who is hidden, which weights are kept. Without features it is empty, and costs nothing.
#pragma once
#include "params.cuh"
#include "seqlen.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "dropout.cuh"

struct Features : Scored {
  Added added;
  HiddenPairs hidden;
  Kept kept;

  __device__ __forceinline__ Features(const Params& params, const Sequence& seq, int head)
      : Scored(params, seq, head), added(params, seq, head), hidden(params, seq, head), kept(params, seq, head) {}

  // The logit of a scaled product.
  template <typename Number, typename AnyPair>
  __device__ __forceinline__ Number logit(const Score& score, Number s, const AnyPair& pair) const {
    return scored(unscored(score, s, pair), pair.i, pair.j);
  }
  // What the score function gets.
  template <typename Number, typename AnyPair>
  __device__ __forceinline__ Number unscored(const Score& score, Number s, const AnyPair& pair) const {
    return added.to(score.capped(s), pair);
  }
  // What mask.visible() says, of a query that may lie beyond the ends, and of this pair alone.
  __device__ __forceinline__ bool sees(const Mask& mask, const Pair& pair) const {
    if ((LENS || HIDES_PAIRS) && (pair.i < 0 || pair.i >= mask.seqlen_q)) return false;
    return mask.visible(pair.i, pair.j) && !hidden.hides(pair.i, pair.j);
  }
  // What the mask function says, whose pair may lie beyond the ends: it gets one inside.
  __device__ __forceinline__ bool accepts(const Mask& mask, const Pair& pair) const {
    if constexpr (!MASK_FUNCTION) return true;
    return !hidden.refuses(clamped(pair.i, mask.seqlen_q), clamped(pair.j, mask.seqlen_k));
  }
  __device__ __forceinline__ bool keeps(const Pair& pair) const { return kept.keeps(pair.i, pair.j); }
};

// Whether dS is made of something else than what dV is made of: without its slope, or of weights that are dropped.
constexpr bool WEIGHTS_APART = SLOPED || DROPOUT;

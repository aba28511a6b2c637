// From a raw product q . k to the logit: the one place that knows softcap, ALiBi, biases and score functions.
#pragma once
#include "params.cuh"
#include "types.cuh"
#include "dual.cuh"
#include "score_args.cuh"
#include "seqlen.cuh"
#include "traced.cuh"

// Whether a logit is more than a scaled product; and whether its slope, by the scaled product, is other than 1.
constexpr bool CHANGES_LOGITS = SOFTCAP || ALIBI || HAS_BIAS || HAS_SCORE, SLOPED = SOFTCAP || HAS_SCORE;

// r = 1 / (1 + exp(2 s / cap)), from which cap tanh(s / cap) = cap - 2 cap r: within 4 u of cap, not of itself, which
// is what a logit needs, whose error counts beside the cap. Exponentials of 0 and infinity give -cap and cap. The
// slope is 1 - tanh^2 = 4 r (1 - r).
__device__ __forceinline__ Accumulator cap_remainder(Accumulator s, Accumulator cap) {
  const Accumulator e = math::exp2(s * (static_cast<Accumulator>(2 * math::LOG2E) / cap));
  return math::reciprocal(e + Accumulator(1));
}
__device__ __forceinline__ Accumulator capped_at(Accumulator cap, Accumulator s) {
  return math::fma(Accumulator(-2) * cap, cap_remainder(s, cap), cap);
}
__device__ __forceinline__ Dual capped_at(Accumulator cap, Dual s) {
  const Accumulator r = cap_remainder(s.value, cap);
  return {math::fma(Accumulator(-2) * cap, r, cap), s.slope * (r * math::fma(Accumulator(-4), r, Accumulator(4)))};
}

struct Score {
  // What is left to multiply logit() by, for the exponent of 2 and for the gradient of the raw product. With no
  // feature on, the logit is the raw product with the scale's sign, and the scale's size waits for exp2, where it
  // costs nothing. So exponent > 0, whatever the scale: the largest logit has the largest exponent, and a logit of
  // -inf has the exponent -inf. With features on, the logit is the natural one.
  Accumulator exponent;
  Accumulator gradient;
  Accumulator softcap;

  __device__ __forceinline__ Accumulator scaled(Accumulator product) const {
    if constexpr (CHANGES_LOGITS) return product * gradient;
    if constexpr (SCALE_SIGN < 0) return -product;
    if constexpr (SCALE_SIGN == 0) return product * Accumulator(0);
    return product;
  }
  // Generic over the number type, so that a dual number brings the slope for the backward.
  template <typename Number>
  __device__ __forceinline__ Number capped(Number s) const {
    if constexpr (SOFTCAP) return capped_at(softcap, s);
    return s;
  }
};

__device__ __forceinline__ Score score_of(const Params& params) {
  const Accumulator scale = static_cast<Accumulator>(params.softmax_scale);
  const Accumulator softcap = static_cast<Accumulator>(params.softcap);
  if constexpr (CHANGES_LOGITS) return {static_cast<Accumulator>(math::LOG2E), scale, softcap};
  const double size = SCALE_SIGN == 0 ? 1 : params.softmax_scale * SCALE_SIGN;
  const Accumulator exponent = static_cast<Accumulator>(size * math::LOG2E);
  // A scale that rounds to 0 would make the exponent of -inf a NaN.
  return {math::max(exponent, math::smallest<Accumulator>()), scale, softcap};
}

// A query and a key, counted in their own sequence.
struct Pair {
  int i, j;
};
// A pair of a fragment: whoever has the fragment knows what is added to its logit.
struct FragmentPair : Pair {
  Accumulator distance;  // of the key from the diagonal, to either side
  Accumulator bias;
};

// What is added to a logit, of one head of one entry.
template <bool ON>
struct AddedOf {
  __device__ __forceinline__ AddedOf(const Params&, const Sequence&, int) {}
  template <typename Number>
  __device__ __forceinline__ Number to(Number s, const Pair&) const {
    return s;
  }
  __device__ __forceinline__ Accumulator distance(int, int) const { return 0; }
  __device__ __forceinline__ Accumulator bias_of(int, int) const { return 0; }
};
template <>
struct AddedOf<true> {
  Rows<const Bias> bias;  // (seqlen_q, seqlen_k)
  Accumulator slope;
  Offset q_offset;
  int last_query, last_key;

  __device__ __forceinline__ AddedOf(const Params& params, const Sequence& seq, int head)
      : bias(rows_of<const Bias>(params.bias, seq.batch_index, head)),
        slope(0),
        q_offset(seq.q_offset),
        last_query(seq.seqlen_q - 1),
        last_key(seq.seqlen_k - 1) {
    if constexpr (ALIBI) {
      const auto slopes = rows_of<const Slope>(params.alibi_slopes, seq.batch_index, head);
      slope = to_accumulator(load_global<1>(slopes.data).at[0]);
    }
  }
  template <typename Number>
  __device__ __forceinline__ Number to(Number s, const Pair& pair) const {
    return to(s, FragmentPair{pair, distance(pair.i, pair.j), HAS_BIAS ? bias_of(pair.i, pair.j) : Accumulator(0)});
  }
  template <typename Number>
  __device__ __forceinline__ Number to(Number s, const FragmentPair& pair) const {
    s = behind_alibi(s, pair.distance);
    if constexpr (HAS_BIAS) s = s + pair.bias;
    return s;
  }
  template <typename Number>
  __device__ __forceinline__ Number behind_alibi(Number s, Accumulator distance) const {
    if constexpr (ALIBI) s = s - slope * (distance < 0 ? -distance : distance);
    return s;
  }
  // Of key j from the diagonal of query i; a long one is rounded.
  __device__ __forceinline__ Accumulator distance(int i, int j) const {
    return ALIBI ? static_cast<Accumulator>(j - q_offset - i) : Accumulator(0);
  }
  // Of a pair beyond the ends of the sequences (a tile may begin before the first row) that of a pair inside, which
  // nobody looks at.
  __device__ __forceinline__ Accumulator bias_of(int i, int j) const {
    const int row = i < 0 ? 0 : smaller(i, last_query);
    return to_accumulator(load_global<1>(bias.at(row, smaller(j, last_key))).at[0]);
  }
};
using Added = AddedOf<ALIBI || HAS_BIAS>;

// What the call's score function makes of such logits, of one head of one entry.
template <bool ON>
struct ScoredOf {
  __device__ __forceinline__ ScoredOf(const Params&, const Sequence&, int) {}
  template <typename Number>
  __device__ __forceinline__ Number scored(Number s, int, int) const {
    return s;
  }
};
template <>
struct ScoredOf<true> {
  const ScoreArgs* args;
  int batch, head;
  int seqlen_q, seqlen_k;

  __device__ __forceinline__ ScoredOf(const Params& params, const Sequence& seq, int of_head)
      : args(&params.score_args),
        batch(flat_batch(params, seq.batch_index)),
        head(of_head),
        seqlen_q(seq.seqlen_q),
        seqlen_k(seq.seqlen_k) {}
  // A pair beyond the ends of the sequences is one inside to the function. What is hidden already, as by a bias of
  // -inf, remains so: -inf may come back from a function as anything.
  template <typename Number>
  __device__ __forceinline__ Number scored(Number s, int i, int j) const {
    const int query = i < 0 ? 0 : smaller(i, seqlen_q - 1), key = smaller(j, seqlen_k - 1);
    const Number y = score_function(s, batch, head, query, key, *args);
    return math::value(s) == -math::infinity<Accumulator>() ? Number(-math::infinity<Accumulator>()) : y;
  }
};
using Scored = ScoredOf<HAS_SCORE>;

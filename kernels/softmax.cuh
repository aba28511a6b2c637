// The softmax, forward: online, block by block, over the rows a thread owns; backward: again, from lse. Exponents
// are powers of 2. What a family calls Scores and Outputs, and its row_max_of() and row_sum_of() over the lanes that
// share a row, stand in the text before this.
#pragma once
#include "features.cuh"

// SPLIT_P: what P is multiplied by before it is rounded. float16 ends at 2^-24, where second parts of P below 2^-12
// would lie; with the factor, those of P below 2^-24. P is at most 1, but for what large logits are rounded by, and may
// be 2^4. bfloat16 has the range of float32.
template <typename T>
constexpr float P_FACTOR_OF = 1;
template <>
constexpr float P_FACTOR_OF<Float16> = 4096;
constexpr float P_FACTOR = SPLIT_P ? P_FACTOR_OF<Element> : 1;

// What the sums of products with P are multiplied by at the end.
__device__ __forceinline__ Accumulator factor_of_sums(const Params& params) {
  return (DROPOUT ? static_cast<Accumulator>(params.undropped) : Accumulator(1)) / Accumulator(P_FACTOR);
}

// at(r, c) is the pair there.
template <typename Scores, typename At>
__device__ __forceinline__ void to_logits(Scores& acc_s, const Score& score, const Features& features, At at) {
#pragma unroll
  for (int r = 0; r < acc_s.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc_s.COLS; ++c) acc_s(r, c) = features.logit(score, score.scaled(acc_s(r, c)), at(r, c));
  }
}

// Weights in columns [begin, end) that dropout does not keep become 0. What is kept is multiplied by finish().
template <typename Scores, typename IsKept>
__device__ __forceinline__ void drop(Scores& acc_s, const IsKept& kept, int begin = 0, int end = Scores::COLS) {
  if constexpr (!DROPOUT) return;
#pragma unroll
  for (int r = 0; r < acc_s.ROWS; ++r) {
#pragma unroll
    for (int c = begin; c < end; ++c) acc_s(r, c) = kept(r, c - begin) ? acc_s(r, c) : Accumulator(0);
  }
}

// The logits of invisible pairs become -inf, whatever they were.
template <typename Scores, typename Visible>
__device__ __forceinline__ void hide(Scores& acc_s, Visible visible) {
#pragma unroll
  for (int r = 0; r < acc_s.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc_s.COLS; ++c) acc_s(r, c) = visible(r, c) ? acc_s(r, c) : -math::infinity<Accumulator>();
  }
}

template <int ROWS>
struct Softmax {
  Accumulator row_max[ROWS];  // the largest logit of the keys seen so far; -inf: no key yet
  Accumulator row_sum[ROWS];  // over this thread's columns only, until finish()
  Accumulator shrink[ROWS];   // what the last block's rise of row_max makes of everything summed before

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      row_max[r] = -math::infinity<Accumulator>();
      row_sum[r] = 0;
    }
  }

  // What the exponents of a row subtract. A row that has seen nothing has row_max = -inf; exp2(-inf - -inf) would be
  // NaN, so subtract 0.
  __device__ __forceinline__ Accumulator subtrahend(int r, const Score& score) const {
    return row_max[r] == -math::infinity<Accumulator>() ? Accumulator(0) : row_max[r] * score.exponent;
  }

  // Whether a row's maximum rose in the last block, so that what was summed before must shrink.
  __device__ __forceinline__ bool rose() const {
    bool any = false;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) any |= shrink[r] != 1;
    return any;
  }

  // One block of keys, row r, as logits: row_max rises. max() drops a NaN, but exp2 keeps it, so a NaN logit makes
  // row_sum, and with it the row, NaN.
  template <typename Scores>
  __device__ __forceinline__ void raise(const Scores& acc_s, int r, const Score& score) {
    Accumulator block_max = acc_s(r, 0);
#pragma unroll
    for (int c = 1; c < acc_s.COLS; ++c) block_max = math::max(block_max, acc_s(r, c));
    const bool first = row_max[r] == -math::infinity<Accumulator>();
    const Accumulator before = subtrahend(r, score);
    row_max[r] = math::max(row_max[r], row_max_of(block_max));
    shrink[r] = first ? Accumulator(0) : math::exp2(before - subtrahend(r, score));  // exactly 1 where nothing rose
  }

  // Row r of the block, after raise(): logits become p = exp2(exponent * (logit - row_max)).
  template <typename Scores>
  __device__ __forceinline__ void weigh(Scores& acc_s, int r, const Score& score) {
    weigh(acc_s, r, score, 0, Scores::COLS);
  }
  // The same for columns [begin, end) of the row, part by part: the first part begins at 0.
  template <typename Scores>
  __device__ __forceinline__ void weigh(Scores& acc_s, int r, const Score& score, int begin, int end) {
    const Accumulator less = -subtrahend(r, score);
    Accumulator sum = begin == 0 ? row_sum[r] * shrink[r] : row_sum[r];
#pragma unroll
    for (int c = begin; c < end; ++c) {
      acc_s(r, c) = math::exp2(math::fma(acc_s(r, c), score.exponent, less));
      sum += acc_s(r, c);
    }
    row_sum[r] = sum;
  }

  // Completes row_sum over the lanes that share a row, and divides acc_o by it. An empty row is 0, whatever its
  // acc_o: 0 times an infinite v is NaN. `factor` is that of kept weights.
  template <typename Outputs, int PARTS>
  __device__ __forceinline__ void finish(Outputs (&acc_o)[PARTS], Accumulator factor = 1) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      row_sum[r] = row_sum_of(row_sum[r]);
      divide(acc_o, r, factor / row_sum[r], empty(r));
    }
  }

  // The same with a sink of each row, sink(r): one more logit in the sum, which no value belongs to. row_max is an
  // exponent afterwards.
  template <typename Outputs, int PARTS, typename Sink>
  __device__ __forceinline__ void finish(Outputs (&acc_o)[PARTS], Accumulator factor, const Score& score, Sink sink) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      row_sum[r] = row_sum_of(row_sum[r]);
      const bool nothing = empty(r);
      const Accumulator exponent = sink(r) * Accumulator(math::LOG2E), before = subtrahend(r, score);
      row_max[r] = math::max(row_max[r] * score.exponent, exponent);
      const Accumulator less = row_max[r] == -math::infinity<Accumulator>() ? Accumulator(0) : row_max[r];
      const Accumulator fall = nothing ? Accumulator(0) : math::exp2(before - less);
      row_sum[r] = math::fma(row_sum[r], fall, math::exp2(exponent - less));
      divide(acc_o, r, factor * fall / row_sum[r], nothing);
    }
  }

 private:
  template <typename Outputs, int PARTS>
  static __device__ __forceinline__ void divide(Outputs (&acc_o)[PARTS], int r, Accumulator inverse, bool nothing) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      multiply_row(acc_o[part], r, inverse);
      if (warp_any(nothing) && nothing) clear_row(acc_o[part], r);  // the vote makes it a branch
    }
  }

 public:
  // A row without a visible key: its sum is 0 and nothing was seen. (A sum of 0 alone may be an overflow, and then
  // row_max is +inf; a row of NaN alone has row_max = -inf, and a NaN sum.)
  __device__ __forceinline__ bool empty(int r) const {
    return row_sum[r] == 0 && row_max[r] == -math::infinity<Accumulator>();
  }

  __device__ __forceinline__ Accumulator lse(int r, const Score& score) const {
    const Accumulator exponent = SINKS ? row_max[r] : row_max[r] * score.exponent;
    return empty(r) ? row_max[r] : math::fma(exponent, Accumulator(math::LN2), math::log(row_sum[r]));
  }
};

// Whether rows beyond the end must be given p = 0 by an lse of +inf: their logits, of a bias, say, may be anything.
// Otherwise they are 0, p is 1, and adds nothing, since such rows of dout are 0.
constexpr bool NO_ROW_BEYOND = CHANGES_LOGITS || LENS;

// lse of rows that see no key: the head's sink, if it has one.
__device__ __forceinline__ Accumulator lse_of_nothing(const Params& params, const Sequence& seq, int head) {
  if constexpr (!SINKS) return -math::infinity<Accumulator>();
  return to_accumulator(load_global<1>(rows_of<const Sink>(params.sinks, seq.batch_index, head).data).at[0]);
}

// All of a row's keys are in: divides by the sum, into which the head's sink goes, if it has one.
template <int ROWS, typename Outputs, int PARTS>
__device__ __forceinline__ void finish(
    const Params& params, const Sequence& seq, int head, Softmax<ROWS>& softmax, Outputs (&acc_o)[PARTS]) {
  const Accumulator factor = factor_of_sums(params);
  if constexpr (SINKS) {
    const Accumulator sink = lse_of_nothing(params, seq, head);
    softmax.finish(acc_o, factor, score_of(params), [&](int) { return sink; });
  } else {
    softmax.finish(acc_o, factor);
  }
}

// lse of a row; -inf where it lies beyond the entry's own length.
template <int ROWS>
__device__ __forceinline__ Accumulator lse_of(const Softmax<ROWS>& softmax, int r, const Score& score, bool is_own) {
  return is_own ? softmax.lse(r, score) : -math::infinity<Accumulator>();
}

// What to subtract from a row's exponents, from its lse. A row without a visible key has lse = -inf and would get
// p = exp2(s + inf); +inf in its place gives p = 0.
__device__ __forceinline__ Accumulator lse_exponent(Accumulator lse) {
  return lse == -math::infinity<Accumulator>() ? -lse : lse * Accumulator(math::LOG2E);
}

// The weight of a pair, 0 where invisible: p = exp2(exponent * logit - lse), lse as lse_exponent() gives it; and what
// dS is a multiple of, p times the logit's slope.
struct Weight {
  Accumulator p, sloped;
};
__device__ __forceinline__ Weight weight_of(const Score& score, Dual logit, Accumulator lse, bool visible) {
  // What a function makes of a row beyond the end, whose lse is +inf, may be infinite itself.
  if constexpr (HAS_SCORE) visible = visible && lse != math::infinity<Accumulator>();
  const Accumulator p = visible ? math::exp2(math::fma(logit.value, score.exponent, -lse)) : Accumulator(0);
  // A function's slope may be infinite where p is 0; a cap's is at most 1, and NaN where the logit is.
  const bool nothing = HAS_SCORE ? p == 0 : !visible;
  return {p, nothing ? Accumulator(0) : p * logit.slope};
}
template <typename AnyPair>
__device__ __forceinline__ Weight weight_of(
    const Score& score, const Features& features, Accumulator product, Accumulator lse, bool visible,
    const AnyPair& pair) {
  if constexpr (SLOPED) {
    return weight_of(score, features.logit(score, Dual{score.scaled(product), Accumulator(1)}, pair), lse, visible);
  } else {
    const Accumulator logit = features.logit(score, score.scaled(product), pair);
    const Accumulator p = math::exp2(math::fma(logit, score.exponent, -lse));
    return visible ? Weight{p, p} : Weight{0, 0};
  }
}

// What dbias is a multiple of: p times the slope of what comes behind the bias; s comes with the bias.
__device__ __forceinline__ Accumulator bias_weight_of(
    const Score& score, const Features& features, Accumulator s, Accumulator lse, bool visible, Pair pair) {
  if constexpr (HAS_SCORE) {
    return weight_of(score, features.scored(Dual{s, Accumulator(1)}, pair.i, pair.j), lse, visible).sloped;
  } else {
    const Accumulator p = math::exp2(math::fma(s, score.exponent, -lse));
    return visible ? p : Accumulator(0);
  }
}

// ds = p * (dp - delta), 0 where invisible: there dp may be anything, and 0 times infinity is NaN.
__device__ __forceinline__ Accumulator score_gradient(
    const Features& features, Accumulator p, Accumulator dp, Accumulator delta, bool visible, bool kept) {
  if constexpr (DROPOUT) dp = kept ? dp * features.kept.factor() : Accumulator(0);
  const Accumulator ds = p * (dp - delta);
  return visible ? ds : Accumulator(0);
}

// acc becomes p, less what is dropped; sloped(r, c, x) takes what dS is a multiple of.
template <typename Scores, typename Visible, typename At, typename Lse, typename Sloped>
__device__ __forceinline__ void probabilities(
    Scores& acc, const Score& score, const Features& features, Visible visible, At at, Lse lse, Sloped sloped) {
#pragma unroll
  for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc.COLS; ++c) {
      const Weight weight =
          weight_of(score, features, acc(r, c), lse_exponent(lse(r, c)), visible(r, c), at(r, c));
      sloped(r, c, weight.sloped);
      acc(r, c) = features.keeps(at(r, c)) ? weight.p : Accumulator(0);
    }
  }
}

// acc = dp becomes ds; p(r, c) is what it is a multiple of.
template <typename Scores, typename Visible, typename At, typename P, typename Delta>
__device__ __forceinline__ void score_gradients(
    Scores& acc, const Features& features, Visible visible, At at, P p, Delta delta) {
#pragma unroll
  for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc.COLS; ++c) {
      acc(r, c) = score_gradient(features, p(r, c), acc(r, c), delta(r, c), visible(r, c), features.keeps(at(r, c)));
    }
  }
}

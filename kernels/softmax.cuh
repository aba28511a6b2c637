// The softmax, forward: online, block by block, over the rows a thread owns; backward: again, from lse. Exponents
// are powers of 2. What a family calls Scores and Outputs, and its row_max_of() and row_sum_of() over the lanes that
// share a row, stand in the text before this.
#pragma once
#include "score.cuh"

template <typename Scores>
__device__ __forceinline__ void to_logits(Scores& acc_s, const Score& score) {
#pragma unroll
  for (int r = 0; r < acc_s.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc_s.COLS; ++c) acc_s(r, c) = score.logit(acc_s(r, c));
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
  // acc_o: 0 times an infinite v is NaN.
  template <typename Outputs, int PARTS>
  __device__ __forceinline__ void finish(Outputs (&acc_o)[PARTS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      row_sum[r] = row_sum_of(row_sum[r]);
      const Accumulator inverse = Accumulator(1) / row_sum[r];
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        multiply_row(acc_o[part], r, inverse);
        if (warp_any(empty(r)) && empty(r)) clear_row(acc_o[part], r);  // the vote makes it a branch
      }
    }
  }

  // A row without a visible key: its sum is 0 and nothing was seen. (A sum of 0 alone may be an overflow, and then
  // row_max is +inf; a row of NaN alone has row_max = -inf, and a NaN sum.)
  __device__ __forceinline__ bool empty(int r) const {
    return row_sum[r] == 0 && row_max[r] == -math::infinity<Accumulator>();
  }

  __device__ __forceinline__ Accumulator lse(int r, const Score& score) const {
    return empty(r) ? row_max[r]
                    : math::fma(row_max[r] * score.exponent, Accumulator(math::LN2), math::log(row_sum[r]));
  }
};

// What to subtract from a row's exponents, from its lse. A row without a visible key has lse = -inf and would get
// p = exp2(s + inf); +inf in its place gives p = 0.
__device__ __forceinline__ Accumulator lse_exponent(Accumulator lse) {
  return lse == -math::infinity<Accumulator>() ? -lse : lse * Accumulator(math::LOG2E);
}

// p = exp2(exponent * logit - lse), 0 where invisible; lse as lse_exponent() gives it.
__device__ __forceinline__ Accumulator probability(
    const Score& score, Accumulator product, Accumulator lse, bool visible) {
  const Accumulator p = math::exp2(math::fma(score.logit(product), score.exponent, -lse));
  return visible ? p : Accumulator(0);
}

// ds = p * (dp - delta), 0 where invisible: there dp may be anything, and 0 times infinity is NaN.
__device__ __forceinline__ Accumulator score_gradient(
    Accumulator p, Accumulator dp, Accumulator delta, bool visible) {
  const Accumulator ds = p * (dp - delta);
  return visible ? ds : Accumulator(0);
}

// acc becomes p.
template <typename Scores, typename Visible, typename Lse>
__device__ __forceinline__ void probabilities(Scores& acc, const Score& score, Visible visible, Lse lse) {
#pragma unroll
  for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc.COLS; ++c) {
      acc(r, c) = probability(score, acc(r, c), lse_exponent(lse(r, c)), visible(r, c));
    }
  }
}

// acc = dp becomes ds.
template <typename Scores, typename Visible, typename P, typename Delta>
__device__ __forceinline__ void score_gradients(Scores& acc, Visible visible, P p, Delta delta) {
#pragma unroll
  for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc.COLS; ++c) {
      acc(r, c) = score_gradient(p(r, c), acc(r, c), delta(r, c), visible(r, c));
    }
  }
}

// The softmax, forward: online, block by block, over the rows a thread owns; backward: again, from lse. Exponents
// are powers of 2. What a family calls Scores and Outputs, and its row_max_of() and row_sum_of() over the lanes that
// share a row, stand in the text before this.
#pragma once
#include "score.cuh"

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

  // One block of keys, row r: products become logits, -inf where invisible, whatever they held; row_max rises.
  // max() drops a NaN, but exp2 keeps it, so a NaN logit makes row_sum, and with it the row, NaN.
  template <typename Scores, typename Visible>
  __device__ __forceinline__ void raise(Scores& acc_s, int r, const Score& score, Visible visible) {
    Accumulator block_max = -math::infinity<Accumulator>();
#pragma unroll
    for (int c = 0; c < acc_s.COLS; ++c) {
      acc_s(r, c) = visible(r, c) ? score.logit(acc_s(r, c)) : -math::infinity<Accumulator>();
      block_max = math::max(block_max, acc_s(r, c));
    }
    const bool first = row_max[r] == -math::infinity<Accumulator>();
    const Accumulator before = subtrahend(r, score);
    row_max[r] = math::max(row_max[r], row_max_of(block_max));
    shrink[r] = first ? Accumulator(0) : math::exp2(before - subtrahend(r, score));  // exactly 1 where nothing rose
  }

  // Row r of the block, after raise(): logits become p = exp2(exponent * (logit - row_max)).
  template <typename Scores>
  __device__ __forceinline__ void weigh(Scores& acc_s, int r, const Score& score) {
    const Accumulator less = -subtrahend(r, score);
    Accumulator sum = row_sum[r] * shrink[r];
#pragma unroll
    for (int c = 0; c < acc_s.COLS; ++c) {
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
#pragma unroll
        for (int c = 0; c < acc_o[part].COLS; ++c) {
          acc_o[part](r, c) = empty(r) ? Accumulator(0) : acc_o[part](r, c) * inverse;
        }
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

// acc becomes p = exp2(exponent * logit - lse), 0 where invisible.
template <typename Scores, typename Visible, typename Lse>
__device__ __forceinline__ void probabilities(Scores& acc, const Score& score, Visible visible, Lse lse) {
#pragma unroll
  for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc.COLS; ++c) {
      const Accumulator logit = score.logit(acc(r, c));
      const Accumulator p = math::exp2(math::fma(logit, score.exponent, -lse_exponent(lse(r, c))));
      acc(r, c) = visible(r, c) ? p : Accumulator(0);
    }
  }
}

// acc = dp becomes ds = p * (dp - delta), 0 where invisible: there dp may be anything, and 0 times infinity is NaN.
template <typename Scores, typename Visible, typename P, typename Delta>
__device__ __forceinline__ void score_gradients(Scores& acc, Visible visible, P p, Delta delta) {
#pragma unroll
  for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc.COLS; ++c) {
      const Accumulator ds = p(r, c) * (acc(r, c) - delta(r, c));
      acc(r, c) = visible(r, c) ? ds : Accumulator(0);
    }
  }
}

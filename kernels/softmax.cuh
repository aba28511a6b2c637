// The softmax, forward: online, block by block, over the rows a thread owns; backward: again, from lse. Exponents
// are powers of 2.
#pragma once
#include "mma_simt.cuh"
#include "score.cuh"

template <int ROWS>
struct Softmax {
  Accumulator row_max[ROWS];  // over the keys seen so far, of exponent * logit; -inf: no key yet
  Accumulator row_sum[ROWS];  // over this thread's columns only, until finish()

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      row_max[r] = -math::infinity<Accumulator>();
      row_sum[r] = 0;
    }
  }

  // A row that has seen nothing has row_max = -inf; exp2(-inf - -inf) would be NaN, so subtract 0.
  __device__ __forceinline__ Accumulator subtrahend(int r) const {
    return row_max[r] == -math::infinity<Accumulator>() ? Accumulator(0) : row_max[r];
  }

  // One block of keys: acc_s becomes p = exp2(exponent * logit - row_max), acc_o shrinks to the new row_max.
  // Invisible pairs are discarded by selection, since what they hold may be anything. max() drops a NaN, but exp2
  // keeps it, so a NaN logit makes row_sum, and with it the row, NaN.
  template <int M, int N, int N_V, int PARTS, typename Visible>
  __device__ __forceinline__ void step(
      Scores<M, N>& acc_s, Outputs<M, N_V> (&acc_o)[PARTS], const Score& score, Visible visible) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      Accumulator block_max = -math::infinity<Accumulator>();
#pragma unroll
      for (int c = 0; c < acc_s.COLS; ++c) {
        acc_s.at[r][c] = score.logit(acc_s.at[r][c]);
        if (visible(r, c)) block_max = math::max(block_max, score.exponent * acc_s.at[r][c]);
      }
      const Accumulator old_max = row_max[r];
      row_max[r] = math::max(old_max, row_max_of(block_max));
      const Accumulator shift = subtrahend(r);
      const Accumulator shrink = math::exp2(old_max - shift);
      row_sum[r] *= shrink;
#pragma unroll
      for (int part = 0; part < PARTS; ++part) multiply_row(acc_o[part], r, shrink);
#pragma unroll
      for (int c = 0; c < acc_s.COLS; ++c) {
        const Accumulator p = math::exp2(math::fma(acc_s.at[r][c], score.exponent, -shift));
        acc_s.at[r][c] = visible(r, c) ? p : Accumulator(0);
        row_sum[r] += acc_s.at[r][c];
      }
    }
  }

  // Completes row_sum over the lanes that share a row, and divides acc_o by it. An empty row is 0, whatever its
  // acc_o: 0 times an infinite v is NaN.
  template <int M, int N_V, int PARTS>
  __device__ __forceinline__ void finish(Outputs<M, N_V> (&acc_o)[PARTS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      row_sum[r] = row_sum_of(row_sum[r]);
      const Accumulator inverse = Accumulator(1) / row_sum[r];
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int c = 0; c < acc_o[part].COLS; ++c) {
          acc_o[part].at[r][c] = empty(r) ? Accumulator(0) : acc_o[part].at[r][c] * inverse;
        }
      }
    }
  }

  // A row without a visible key: its sum is 0 and nothing was seen. (A sum of 0 alone may be an overflow, and then
  // row_max is +inf; a row of NaN alone has row_max = -inf, and a NaN sum.)
  __device__ __forceinline__ bool empty(int r) const {
    return row_sum[r] == 0 && row_max[r] == -math::infinity<Accumulator>();
  }

  __device__ __forceinline__ Accumulator lse(int r) const {
    return empty(r) ? row_max[r] : math::fma(row_max[r], Accumulator(math::LN2), math::log(row_sum[r]));
  }
};

// What to subtract from a row's exponents, from its lse. A row without a visible key has lse = -inf and would get
// p = exp2(s + inf); +inf in its place gives p = 0.
__device__ __forceinline__ Accumulator lse_exponent(Accumulator lse) {
  return lse == -math::infinity<Accumulator>() ? -lse : lse * Accumulator(math::LOG2E);
}

// acc becomes p = exp2(exponent * logit - lse), 0 where invisible.
template <int M, int N, typename Visible, typename Lse>
__device__ __forceinline__ void probabilities(Scores<M, N>& acc, const Score& score, Visible visible, Lse lse) {
#pragma unroll
  for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc.COLS; ++c) {
      const Accumulator logit = score.logit(acc.at[r][c]);
      const Accumulator p = math::exp2(math::fma(logit, score.exponent, -lse_exponent(lse(r, c))));
      acc.at[r][c] = visible(r, c) ? p : Accumulator(0);
    }
  }
}

// acc = dp becomes ds = p * (dp - delta), 0 where invisible: there dp may be anything, and 0 times infinity is NaN.
template <int M, int N, typename Visible, typename P, typename Delta>
__device__ __forceinline__ void score_gradients(Scores<M, N>& acc, Visible visible, P p, Delta delta) {
#pragma unroll
  for (int r = 0; r < acc.ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < acc.COLS; ++c) {
      const Accumulator ds = p(r, c) * (acc.at[r][c] - delta(r, c));
      acc.at[r][c] = visible(r, c) ? ds : Accumulator(0);
    }
  }
}

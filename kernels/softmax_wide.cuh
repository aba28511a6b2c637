// The online softmax of wide numbers, whose logits become exponents first, and then weights.
#pragma once
#include "softmax.cuh"
#include "exp2_table.cuh"

// Of float32: what exponents subtract is the rows' maximum, so that the largest ones, near 0, are the most exact.
template <int ROWS>
struct PromptSoftmax : Softmax<ROWS> {
  // As LazySoftmax has it.
  template <typename Scores>
  __device__ __forceinline__ bool to_exponents(Scores& acc_s, const Score& score) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      this->raise(acc_s, r, score);
      this->row_sum[r] *= this->shrink[r];
      const Accumulator less = -this->subtrahend(r, score);
#pragma unroll
      for (int c = 0; c < acc_s.COLS; ++c) acc_s(r, c) = math::fma(acc_s(r, c), score.exponent, less);
    }
    return warp_any(this->rose());
  }
};

// Of float64, where scaling costs more than it saves: what exponents subtract follows the rows' maxima only when it
// must. A sum of weights up to 2**8 instead of 1 is as exact, and its outputs are hardly ever multiplied.

// row_max is then a logit near which the row's largest one lies, or above which it lies by up to 8 exponents.
template <int ROWS>
struct LazySoftmax : Softmax<ROWS> {
  static constexpr double MOST = 8;
  static constexpr int HIGH_WORD_OF_MOST = 0x40200000;

  // One block of keys: logits become exponents, less what the rows subtract. Whether a row of this warp moved, so that
  // what was summed before must shrink. Rows move each for itself, so that none has bits of another. Reached by all 32
  // lanes.
  template <typename Scores>
  __device__ __forceinline__ bool to_exponents(Scores& acc_s, const Score& score) {
    int highest = 0;  // the upper half of the largest exponent above 0; there, bits are in the order of numbers
    bool unseen = false;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const Accumulator less = -this->subtrahend(r, score);
      unseen |= is_unseen(r);
#pragma unroll
      for (int c = 0; c < acc_s.COLS; ++c) {
        acc_s(r, c) = math::fma(acc_s(r, c), score.exponent, less);
        const int high = static_cast<int>(math::high_word(acc_s(r, c)));
        highest = high > highest ? high : highest;
      }
    }
    if (!warp_any(unseen || highest >= HIGH_WORD_OF_MOST)) return false;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) move(acc_s, r, score);
    return true;
  }

 private:
  __device__ __forceinline__ bool is_unseen(int r) const { return this->row_max[r] == -math::infinity<Accumulator>(); }

  // A row of which nothing was seen, or that exceeds what it subtracts by too much, subtracts its new maximum. max()
  // drops a NaN, but its exponent remains one.
  template <typename Scores>
  __device__ __forceinline__ void move(Scores& acc_s, int r, const Score& score) {
    Accumulator rise = acc_s(r, 0);
#pragma unroll
    for (int c = 1; c < acc_s.COLS; ++c) rise = math::max(rise, acc_s(r, c));
    rise = math::max(row_max_of(rise), -math::infinity<Accumulator>());
    const bool first = is_unseen(r);
    this->shrink[r] = 1;
    if (!first && rise < MOST) return;
    const Accumulator before = this->subtrahend(r, score);
    this->row_max[r] = (first ? Accumulator(0) : this->row_max[r]) + rise / score.exponent;
    const Accumulator fall = before - this->subtrahend(r, score);
#pragma unroll
    for (int c = 0; c < acc_s.COLS; ++c) acc_s(r, c) += fall;
    this->shrink[r] = first ? Accumulator(0) : math::exp2(fall);
    this->row_sum[r] *= this->shrink[r];
  }
};

template <typename Number, int ROWS>
struct WideSoftmaxOf;
template <int ROWS>
struct WideSoftmaxOf<double, ROWS> : LazySoftmax<ROWS> {};
template <int ROWS>
struct WideSoftmaxOf<float, ROWS> : PromptSoftmax<ROWS> {};

template <int ROWS>
struct WideSoftmax : WideSoftmaxOf<Element, ROWS> {
  // After to_exponents(): exponents become p.
  template <typename Scores, typename Exp2>
  __device__ __forceinline__ void weigh(Scores& acc_s, const Exp2& exp2) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < acc_s.COLS; ++c) {
        acc_s(r, c) = exp2(acc_s(r, c));
        this->row_sum[r] += acc_s(r, c);
      }
    }
  }
};

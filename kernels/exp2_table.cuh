// Powers of 2: of float32 an instruction; of float64 by a table and a short polynomial. float64 sums share their units
// with the matrix products, so each operation costs time: this takes 9, a polynomial alone 15.
#pragma once
#include "types.cuh"
#include "memory.cuh"

template <typename Number, int COPIES>
struct Exp2TableOf;
template <typename Number, int COPIES>
struct Exp2Of;

template <int COPIES>
struct Exp2TableOf<float, COPIES> {
  __device__ __forceinline__ void fill(int) {}
};
template <int COPIES>
struct Exp2Of<float, COPIES> {
  __device__ __forceinline__ explicit Exp2Of(const Exp2TableOf<float, COPIES>&) {}
  __device__ __forceinline__ float operator()(float x) const { return math::exp2(x); }
};

// 2**(i / 64), in copies that lie in different banks.
template <int COPIES>
struct Exp2TableOf<double, COPIES> {
  static constexpr int ENTRIES = 64;
  double at[ENTRIES][COPIES];

  // By all threads of the block, which meet before they use it.
  __device__ __forceinline__ void fill(int threads) {
    for (int i = thread_index(); i < ENTRIES * COPIES; i += threads) {
      store_shared(&at[i / COPIES][i % COPIES], Vector<double, 1>{{math::exp2(i / COPIES * (1.0 / ENTRIES))}});
    }
  }
};

// A lane's use of it: 2**x within 3.1 u for x between -1022 and 1024, 0 below and at -inf, NaN at NaN and +inf.
//
// x = n + i / 64 + f with |f| <= 1 / 128, and 2**f = 1 + f q(f), q of degree 4 through Chebyshev's points: 0.02 u. The
// entry is wrong by 2 u at most, its sum with a hundredth of itself by 1 u.
template <int COPIES>
struct Exp2Of<double, COPIES> {
  const double* column;

  __device__ __forceinline__ explicit Exp2Of(const Exp2TableOf<double, COPIES>& table)
      : column(&table.at[0][thread_index() % COPIES]) {}

  __device__ __forceinline__ double operator()(double x) const {
    constexpr double TO_64THS = 0x1.8p46;  // a number so large has no digits behind 64ths
    constexpr unsigned LOWEST = 0xc08ff000u, MINUS_INFINITY = 0xfff00000u;  // upper halves: -1022, and what is less
    const unsigned high = math::high_word(x);
    const bool vanishes = high - LOWEST <= MINUS_INFINITY - LOWEST;  // beyond that range there are NaN
    x = math::from_words(vanishes ? LOWEST : high, math::low_word(x));
    const double shifted = x + TO_64THS, f = x - (shifted - TO_64THS);
    const int n64 = static_cast<int>(math::low_word(shifted));  // 64 n + i
    const double entry = load_shared<1>(column + n64 % 64u * COPIES).at[0];
    // Times 2**n, in the exponent's bits. 2**-1022 is the entry 1, whose lower half is 0.
    const unsigned scaled = math::high_word(entry) + (static_cast<unsigned>(n64) / 64u << 20);
    const double power = math::from_words(vanishes ? 0u : scaled, math::low_word(entry));
    double q = 0x1.5d8812769ed72p-10;
    q = math::fma(q, f, 0x1.3b2ad0385b409p-7);
    q = math::fma(q, f, 0x1.c6b08d70496c1p-5);
    q = math::fma(q, f, 0x1.ebfbdff82ac52p-3);
    q = math::fma(q, f, 0x1.62e42fefa39efp-1);
    return math::fma(power, q * f, power);  // the last step, so that a NaN remains one
  }
};

template <int COPIES>
using Exp2Table = Exp2TableOf<Element, COPIES>;
template <int COPIES>
using Exp2 = Exp2Of<Element, COPIES>;

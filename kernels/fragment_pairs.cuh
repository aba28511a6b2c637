// What options say of all pairs of a fragment at once, a warp's (16, N): a lane draws and loads for others what comes in
// one piece, and the warp exchanges it. A row is a query in the forward and a key in the backward.
#pragma once
#include "features.cuh"
#include "fragment.cuh"

enum class RowIs { QUERY, KEY };

// A bit for each pair of a thread, in the order of its accumulators: four of every eight columns.
template <int N>
struct PairBits {
  static constexpr int WORDS = ceil_div(N, 64);
  unsigned words[WORDS];

  __device__ __forceinline__ bool operator()(int r, int c) const {
    const int i = c / 2 * 4 + r * 2 + c % 2;
    return words[i / 32] >> i % 32 & 1;
  }
};

// Lanes whose numbers differ by LANE trade bits whose places differ by BIT: the one at a place with it goes to the place
// without it of the lane with LANE, and the other way round. Reached by all 32 lanes.
template <int LANE, int BIT>
__device__ __forceinline__ unsigned trade_bits(unsigned x) {
  constexpr unsigned LOW = ~0u / (1u << BIT | 1u);  // bits at places without BIT
  const unsigned other = shuffle_xor(x, LANE);
  const bool high = lane_index() & LANE;
  return high ? (x & ~LOW) | (other >> BIT & LOW) : (x & LOW) | (other << BIT & ~LOW);
}

// Which weights dropout keeps; query i and key j are the thread's first. What Philox draws at once, for four neighbouring
// keys of one query, is of two lanes where a row is a query, of four where it is a key: they draw for one another.
template <RowIs ROW, int N, bool ON>
__device__ __forceinline__ PairBits<N> kept_pairs(const KeptOf<ON>& kept, int i, int j) {
  PairBits<N> bits = {};
  if constexpr (ON) {
    constexpr bool QUERIES = ROW == RowIs::QUERY;
    const int lane = lane_index();
    const int own_i = QUERIES ? i + lane % 2 * 8 : i + lane / 4 % 2, own_j = QUERIES ? j : j + lane / 8 % 2 * 8;
    const unsigned key0 = warp_uniform(kept.key0), key1 = warp_uniform(kept.key1);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      unsigned word[4];
      kept.draw(word, key0, key1, QUERIES ? own_i : own_i + 8 * n, QUERIES ? own_j + 8 * n : own_j);
#pragma unroll
      for (int k = 0; k < 4; ++k) bits.words[n / 8] |= word[k] >= kept.drop_below ? 1u << (n % 8 * 4 + k) : 0u;
    }
#pragma unroll
    for (int w = 0; w < bits.WORDS; ++w) {
      bits.words[w] = QUERIES ? trade_bits<1, 2>(bits.words[w]) : trade_bits<8, 2>(trade_bits<4, 1>(bits.words[w]));
    }
  }
  return bits;
}

// The pairs of a fragment, for what is added to their logits; query i and key j are the thread's first.
template <RowIs ROW>
struct FragmentPairs {
  int i, j;
  Accumulator from_diagonal[2];  // the first column of each row

  __device__ __forceinline__ FragmentPairs(const Added& added, int i, int j) : i(i), j(j) {
    from_diagonal[0] = added.distance(i, j);
    from_diagonal[1] = ROW == RowIs::QUERY ? added.distance(i + 8, j) : added.distance(i, j + 8);
  }
  // Of row r and the column that is `ahead` of the thread's first. Up to 2**24 distances are exact; beyond, the rounding
  // of a row's and of this sum take the place of those of the distance and of its product, which is fused.
  __device__ __forceinline__ Accumulator distance(int r, int ahead) const {
    return ROW == RowIs::QUERY ? from_diagonal[r] + ahead : from_diagonal[r] - ahead;
  }
  __device__ __forceinline__ FragmentPair at(const Added& added, int r, int ahead) const {
    const Pair pair = ROW == RowIs::QUERY ? Pair{i + 8 * r, j + ahead} : Pair{i + ahead, j + 8 * r};
    return {pair, distance(r, ahead), HAS_BIAS ? added.bias_of(pair.i, pair.j) : Accumulator(0)};
  }
};

// What options say of all pairs of a fragment at once, a warp's (16, N): a lane draws and loads for others what comes
// in one piece, and the warp exchanges it. A row is a query in the forward and a key in the backward.
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

// The pair of row r and the column that is `ahead` of the thread's first, which is that of query i and key j.
template <RowIs ROW>
__device__ __forceinline__ Pair pair_of(int i, int j, int r, int ahead) {
  return ROW == RowIs::QUERY ? Pair{i + 8 * r, j + ahead} : Pair{i + ahead, j + 8 * r};
}

// Lanes whose numbers differ by LANE trade bits whose places differ by BIT: the one at a place with it goes to the
// place without it of the lane with LANE, and the other way round. Reached by all 32 lanes.
template <int LANE, int BIT>
__device__ __forceinline__ unsigned trade_bits(unsigned x) {
  constexpr unsigned LOW = ~0u / (1u << BIT | 1u);  // bits at places without BIT
  const unsigned other = shuffle_xor(x, LANE);
  const bool high = lane_index() & LANE;
  return high ? (x & ~LOW) | (other >> BIT & LOW) : (x & LOW) | (other << BIT & ~LOW);
}

// Which weights dropout keeps; query i and key j are the thread's first. What Philox draws at once, for four
// neighbouring keys of one query, is of two lanes where a row is a query, of four where it is a key: they draw for one
// another.
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

// ---- what a mask and segments hide

// Of four bytes those that are not 0, as 0x80.
__device__ __forceinline__ unsigned nonzero_bytes(unsigned x) {
  return ((x & 0x7f7f7f7fu) + 0x7f7f7f7fu | x) & 0x80808080u;
}
// The four bits of such bytes at places 0, 1, 4 and 5: the factor brings them side by side, no two to one place.
__device__ __forceinline__ unsigned gathered(unsigned bytes) { return bytes * 0x00081081u >> 26 & 0x33u; }

// Of the mask, which lies in vectors of 16 bytes; the fragment's keys are all within it, its queries are moved there. A
// lane reads what lies together, a byte for each pair, and the warp deals out the bits.
template <RowIs ROW, int N>
__device__ __forceinline__ void read_mask(
    PairBits<N>& bits, const Rows<const unsigned char>& mask, int i, int j, int seqlen_q) {
  const int t = lane_index() % 4, g = lane_index() / 4;
#pragma unroll
  for (int w = 0; w < bits.WORDS; ++w) {
    unsigned word = 0;
    if constexpr (ROW == RowIs::QUERY) {
      // Eight keys of two queries: of each quad the lane t reads groups of columns 4 k + t, for lanes u of it.
#pragma unroll
      for (int k = 0; k < 2 && 8 * w + 4 * k < N / 8; ++k) {
        const int group = smaller(8 * w + 4 * k + t, N / 8 - 1);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const unsigned char* from = mask.at(clamped(i + 8 * r, seqlen_q), j - 2 * t + 8 * group);
          const Vector<unsigned, 2> bytes = load_global<2>(reinterpret_cast<const unsigned*>(from));
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            word |= gathered(nonzero_bytes(bytes.at[half])) << (16 * k + 8 * half + 2 * r);
          }
        }
      }
      bits.words[w] = trade_bits<2, 8>(trade_bits<1, 4>(word));
    } else {
      // All 16 keys of two queries. Bit 4 (key / 4 % 2) + 2 (key / 8) + query of the byte key % 4 is the pair's, so
      // four bits in a row are those of a lane g = key % 8, in another order; in this order lanes take the queries.
      const int group = smaller(8 * w + g % 4 * 2 + g / 4, N / 8 - 1);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const unsigned char* from = mask.at(clamped(i + 8 * group + e, seqlen_q), j - g);
        const Vector<unsigned, 4> bytes = load_global<4>(reinterpret_cast<const unsigned*>(from));
#pragma unroll
        for (int q = 0; q < 4; ++q) word |= nonzero_bytes(bytes.at[q]) >> (7 - (q % 2 * 4 + q / 2 * 2 + e));
      }
      bits.words[w] = trade_bits<16, 4>(trade_bits<8, 16>(trade_bits<4, 8>(word)));
    }
  }
}

// Which pairs neither mask nor segments hide; query i and key j are the thread's first. What lies beyond the ends of
// the sequences has the bits of something inside. What a mask function says comes on top, pair by pair.
template <RowIs ROW, int N, bool ON>
__device__ __forceinline__ PairBits<N> shown_pairs(const HiddenPairsOf<ON>& hidden, const Mask& ends, int i, int j) {
  PairBits<N> bits = {};
  if constexpr (!HAS_MASK && !SEGMENTS) {
#pragma unroll
    for (int w = 0; w < bits.WORDS; ++w) bits.words[w] = ~0u;
  }
  if constexpr (ON && HAS_MASK) {
    constexpr int KEYS = ROW == RowIs::QUERY ? N : 16;
    const int first_key = ROW == RowIs::QUERY ? j - lane_index() % 4 * 2 : j - lane_index() / 4;
    if (warp_any(hidden.mask.vectors && first_key + KEYS <= ends.seqlen_k)) {
      read_mask<ROW>(bits, hidden.mask, i, j, ends.seqlen_q);
    } else {
#pragma unroll
      for (int w = 0; w < bits.WORDS; ++w) {
#pragma unroll 1
        for (int n = 8 * w; n < smaller(8 * w + 8, N / 8); ++n) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const Pair pair = pair_of<ROW>(i, j, k / 2, 8 * n + k % 2);
            const unsigned char* at =
                hidden.mask.at(clamped(pair.i, ends.seqlen_q), clamped(pair.j, ends.seqlen_k));
            bits.words[w] |= load_global<1>(at).at[0] != 0 ? 1u << (n % 8 * 4 + k) : 0u;
          }
        }
      }
    }
  }
  if constexpr (ON && SEGMENTS) {
    const auto query = [&](int i) { return load_global<1>(hidden.q_segments.at(clamped(i, ends.seqlen_q))).at[0]; };
    const auto key = [&](int j) { return load_global<1>(hidden.kv_segments.at(clamped(j, ends.seqlen_k))).at[0]; };
    const auto row = [&](int r) { return ROW == RowIs::QUERY ? query(i + 8 * r) : key(j + 8 * r); };
    const long long rows[2] = {row(0), row(1)};
#pragma unroll
    for (int w = 0; w < bits.WORDS; ++w) {
      unsigned same = 0;
#pragma unroll
      for (int n = 8 * w; n < smaller(8 * w + 8, N / 8); ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const long long column = ROW == RowIs::QUERY ? key(j + 8 * n + e) : query(i + 8 * n + e);
#pragma unroll
          for (int r = 0; r < 2; ++r) same |= rows[r] == column ? 1u << (n % 8 * 4 + 2 * r + e) : 0u;
        }
      }
      bits.words[w] = HAS_MASK ? bits.words[w] & same : same;
    }
  }
  return bits;
}

// ---- what is added to logits

// Biases of a fragment, as they are stored; query i and key j are the thread's first. Those of 16 bits are read at
// once, by vectors where the bias lies in them, and wait in registers; others one by one, when they are asked for.
template <RowIs ROW, int N, bool HELD = HAS_BIAS && sizeof(Bias) == 2>
struct Biases {
  int i, j;

  __device__ __forceinline__ void read(const Added&, int first_i, int first_j) {
    i = first_i;
    j = first_j;
  }
  __device__ __forceinline__ Accumulator at(const Added& added, int r, int c) const {
    const Pair pair = pair_of<ROW>(i, j, r, Fragment<N>::ahead(c));
    return added.bias_of(pair.i, pair.j);
  }
};
template <RowIs ROW, int N>
struct Biases<ROW, N, true> {
  unsigned words[N / 8][2];  // of each row and eight columns the two of this thread

  template <bool ON>
  __device__ __forceinline__ void read(const AddedOf<ON>& added, int i, int j) {
    constexpr int KEYS = ROW == RowIs::QUERY ? N : 16;
    const int t = lane_index() % 4, g = lane_index() / 4, first_key = ROW == RowIs::QUERY ? j - 2 * t : j - g;
    if (warp_any(added.bias.vectors && first_key + KEYS <= added.last_key + 1)) {
      if constexpr (ROW == RowIs::QUERY) {
        read_queries(added.bias, i, first_key, t, added.last_query + 1);
      } else {
        read_keys(added.bias, i - 2 * t, first_key, t, g, added.last_query + 1);
      }
      return;
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto bits = [&](int e) {
          const Pair pair = pair_of<ROW>(i, j, r, 8 * n + e);
          const int row = clamped(pair.i, added.last_query + 1), col = clamped(pair.j, added.last_key + 1);
          return static_cast<unsigned>(load_global<1>(added.bias.at(row, col)).at[0].bits);
        };
        words[n][r] = bits(0) | bits(1) << 16;
      }
    }
  }
  __device__ __forceinline__ Accumulator at(const Added&, int r, int c) const {
    return to_accumulator(Bias{static_cast<unsigned short>(words[c / 2][r] >> c % 2 * 16)});
  }

 private:
  static __device__ __forceinline__ void read_eight(unsigned (&x)[4], const Bias* from) {
    const Vector<unsigned, 4> four = load_global<4>(reinterpret_cast<const unsigned*>(from));
#pragma unroll
    for (int u = 0; u < 4; ++u) x[u] = four.at[u];
    transpose_quad(x);
  }
  // Lane t of a quad reads groups of eight columns 4 k + t, two for each lane.
  __device__ __forceinline__ void read_queries(const Rows<const Bias>& bias, int i, int key, int t, int seqlen_q) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Bias* row = bias.at(clamped(i + 8 * r, seqlen_q), key);
#pragma unroll
      for (int k = 0; k < ceil_div(N, 32); ++k) {
        unsigned x[4];
        read_eight(x, row + 8 * (N % 32 == 0 ? 4 * k + t : smaller(4 * k + t, N / 8 - 1)));
#pragma unroll
        for (int u = 0; u < 4 && 4 * k + u < N / 8; ++u) words[4 * k + u][r] = x[u];
      }
    }
  }
  // A matrix of eight queries and eight keys comes with queries as rows: lane t of a quad reads, of one of two groups
  // of queries, one of two groups of keys.
  __device__ __forceinline__ void read_keys(
      const Rows<const Bias>& bias, int query, int key, int t, int g, int seqlen_q) {
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
      unsigned x[4];
      read_eight(x, bias.at(clamped(query + 8 * n + t / 2 * 8 + g, seqlen_q), key + t % 2 * 8));
#pragma unroll
      for (int u = 0; u < 4; ++u) words[n + u / 2][u % 2] = movmatrix_trans(x[u]);
    }
  }
};

// How far keys are from the diagonals of queries; query i and key j are the thread's first. Up to 2**24 distances are
// exact; beyond, the rounding of a row's and of this sum take the place of those of the distance and of its product,
// which is fused.
template <RowIs ROW>
struct Distances {
  Accumulator first[2];  // the first column of each row

  __device__ __forceinline__ Distances(const Added& added, int i, int j) {
    first[0] = added.distance(i, j);
    first[1] = ROW == RowIs::QUERY ? added.distance(i + 8, j) : added.distance(i, j + 8);
  }
  __device__ __forceinline__ Accumulator at(int r, int ahead) const {
    return ROW == RowIs::QUERY ? first[r] + ahead : first[r] - ahead;
  }
};

// The pairs of a fragment, for what is added to their logits; query i and key j are the thread's first.
template <RowIs ROW, int N>
struct FragmentPairs {
  int i, j;
  Distances<ROW> distances;
  Biases<ROW, N> biases;

  __device__ __forceinline__ FragmentPairs(const Added& added, int i, int j) : i(i), j(j), distances(added, i, j) {
    biases.read(added, i, j);
  }
  __device__ __forceinline__ FragmentPair at(const Added& added, int r, int c) const {
    const int ahead = Fragment<N>::ahead(c);
    const Accumulator bias = HAS_BIAS ? biases.at(added, r, c) : Accumulator(0);
    return {pair_of<ROW>(i, j, r, ahead), distances.at(r, ahead), bias};
  }
};

// Which pairs of a fragment are dropped, and which hidden; both are known before its products are.
template <RowIs ROW, int N>
struct FragmentBits {
  PairBits<N> kept, shown;  // shown: only where `masked`

  __device__ __forceinline__ FragmentBits(const Features& features, const Mask& mask, int i, int j, bool masked)
      : kept(kept_pairs<ROW, N>(features.kept, i, j)), shown{} {
    if (masked) shown = shown_pairs<ROW, N>(features.hidden, mask, i, j);
  }
};

// Which weights a dropout keeps: a function of seed, entry, head and pair, the same in every kernel and on the CPU.
#pragma once
#include "params.cuh"
#include "memory.cuh"
#include "seqlen.cuh"

// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw 2011): four random words for a counter of four words and a key of two.
__device__ __forceinline__ void philox(unsigned (&counter)[4], unsigned key0, unsigned key1) {
  constexpr unsigned long long MULTIPLIER0 = 0xd2511f53u, MULTIPLIER1 = 0xcd9e8d57u;
  constexpr unsigned WEYL0 = 0x9e3779b9u, WEYL1 = 0xbb67ae85u;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned long long product0 = MULTIPLIER0 * counter[0], product1 = MULTIPLIER1 * counter[2];
    counter[0] = static_cast<unsigned>(product1 >> 32) ^ counter[1] ^ key0;
    counter[1] = static_cast<unsigned>(product1);
    counter[2] = static_cast<unsigned>(product0 >> 32) ^ counter[3] ^ key1;
    counter[3] = static_cast<unsigned>(product0);
    key0 += WEYL0;
    key1 += WEYL1;
  }
}

// Of one head of one entry.
template <bool ON>
struct KeptOf {
  __device__ __forceinline__ KeptOf(const Params&, const Sequence&, int) {}
  __device__ __forceinline__ bool keeps(int, int) const { return true; }
  __device__ __forceinline__ Accumulator factor() const { return 1; }
};
template <>
struct KeptOf<true> {
  unsigned key0, key1, drop_below;
  int head, batch;
  Accumulator undropped;

  __device__ __forceinline__ KeptOf(const Params& params, const Sequence& seq, int of_head)
      : drop_below(params.drop_below), head(of_head), batch(flat_batch(params, seq.batch_index)) {
    const unsigned long long* at = static_cast<const unsigned long long*>(params.seed.data);
    const unsigned long long seed = load_global<1>(at).at[0];
    key0 = static_cast<unsigned>(seed);
    key1 = static_cast<unsigned>(seed >> 32);
    undropped = static_cast<Accumulator>(params.undropped);
  }
  // Word j % 4 of the four that query i has for keys j / 4 * 4 on.
  __device__ __forceinline__ bool keeps(int i, int j) const {
    unsigned word[4];
    draw(word, key0, key1, i, j);
    const unsigned low = j & 1 ? word[1] : word[0], high = j & 1 ? word[3] : word[2];
    return (j & 2 ? high : low) >= drop_below;
  }
  // All four; of the seed's two halves.
  __device__ __forceinline__ void draw(unsigned (&word)[4], unsigned low, unsigned high, int i, int j) const {
    word[0] = static_cast<unsigned>(j) / 4;
    word[1] = static_cast<unsigned>(i);
    word[2] = static_cast<unsigned>(head);
    word[3] = static_cast<unsigned>(batch);
    philox(word, low, high);
  }
  // What kept weights are multiplied by.
  __device__ __forceinline__ Accumulator factor() const { return undropped; }
};
using Kept = KeptOf<DROPOUT>;

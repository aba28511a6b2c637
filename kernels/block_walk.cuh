// Which blocks a main loop visits: of those that lengths, diagonal and window leave, the ones of which a mask or
// segments leave something. The kernel block_map has written that down, a bit a block; a kernel that hides no single
// pairs has no map, and visits all.
#pragma once
#include "params.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "mask.cuh"

// A row of a map: the bits of blocks of which some pair is seen, then those of blocks of which all pairs are; in whole
// words, that are written by bytes, the lowest first.
constexpr __device__ __forceinline__ int words_of_map(int blocks) { return ceil_div(blocks, 32); }

template <bool ON>
struct BlockWalkOf {
  __device__ __forceinline__ BlockWalkOf(const Tensor&, const Sequence&, int, int, int) {}
  __device__ __forceinline__ int up(int block, int) const { return block; }
  __device__ __forceinline__ int down(int block, int) const { return block; }
  __device__ __forceinline__ bool whole(int) const { return true; }
  __device__ __forceinline__ int count(int begin, int end) const { return end - begin; }
  __device__ __forceinline__ BlockRange within(const BlockRange& range) const { return range; }
};
template <>
struct BlockWalkOf<true> {
  const unsigned* seen;
  int words;

  __device__ __forceinline__ BlockWalkOf(const Tensor& map, const Sequence& seq, int head, int row, int blocks)
      : seen(reinterpret_cast<const unsigned*>(rows_of<const unsigned char>(map, seq.batch_index, head).at(row))),
        words(words_of_map(blocks)) {}
  // The first block from `block` on that is seen, or `end`.
  __device__ __forceinline__ int up(int block, int end) const {
    if (block >= end) return end;
    int word = block / 32;
    unsigned bits = at(word) & ~0u << block % 32;
    while (bits == 0) {
      if (32 * ++word >= end) return end;
      bits = at(word);
    }
    return smaller(32 * word + lowest_bit(bits), end);
  }
  // The last block up to `block` that is seen, or begin - 1.
  __device__ __forceinline__ int down(int block, int begin) const {
    if (block < begin) return begin - 1;
    int word = block / 32;
    unsigned bits = at(word) & ~0u >> (31 - block % 32);
    while (bits == 0) {
      if (32 * word <= begin) return begin - 1;
      bits = at(--word);
    }
    const int found = 32 * word + highest_bit(bits);
    return found < begin ? begin - 1 : found;
  }
  // Whether all pairs of a block are seen, as far as mask and segments say.
  __device__ __forceinline__ bool whole(int block) const { return at(words + block / 32) >> block % 32 & 1; }
  // How many of the blocks [begin, end) are seen.
  __device__ __forceinline__ int count(int begin, int end) const {
    if (begin >= end) return 0;
    int blocks = 0;
    for (int word = begin / 32; 32 * word < end; ++word) {
      unsigned bits = at(word);
      if (32 * word < begin) bits &= ~0u << begin % 32;
      if (32 * word + 32 > end) bits &= ~(~0u << end % 32);
      blocks += count_bits(bits);
    }
    return blocks;
  }
  // A range that begins and ends with blocks that are seen, empty if there are none.
  __device__ __forceinline__ BlockRange within(BlockRange range) const {
    range.end = down(range.end - 1, range.begin) + 1;
    range.begin = up(range.begin, range.end);
    range.full_end = smaller(range.full_end, range.end);
    return range;
  }

 private:
  __device__ __forceinline__ unsigned at(int word) const { return load_global<1>(seen + word).at[0]; }
};
using BlockWalk = BlockWalkOf<HIDES_PAIRS>;

// Over the key blocks of a query block, and over the query blocks of a key block.
__device__ __forceinline__ BlockWalk key_walk(const Params& params, const Sequence& seq, int head, int m_block) {
  return BlockWalk(params.key_map, seq, head, m_block, ceil_div(params.seqlen_k, BLOCK_N));
}
__device__ __forceinline__ BlockWalk query_walk(const Params& params, const Sequence& seq, int head, int n_block) {
  return BlockWalk(params.query_map, seq, head, n_block, ceil_div(params.seqlen_q, BLOCK_M));
}

// Whether a block of a walk needs no look at single pairs.
__device__ __forceinline__ bool needs_no_look(const BlockWalk& walk, const BlockRange& range, int block) {
  return block >= range.full_begin && block < range.full_end && walk.whole(block);
}

// step(block, masked) for all blocks of a walk, upwards.
template <typename Step>
__device__ __forceinline__ void walk_up(const BlockWalk& walk, const BlockRange& blocks, const Step& step) {
  if constexpr (HIDES_PAIRS) {
    for (int block = blocks.begin; block < blocks.end; block = walk.up(block + 1, blocks.end)) {
      if (needs_no_look(walk, blocks, block)) {
        step(block, UNMASKED);
      } else {
        step(block, MASKED);
      }
    }
  } else {
    for (int block = blocks.begin; block < blocks.full_begin; ++block) step(block, MASKED);
    for (int block = blocks.full_begin; block < blocks.full_end; ++block) step(block, UNMASKED);
    for (int block = blocks.full_end; block < blocks.end; ++block) step(block, MASKED);
  }
}

// Which tiles packed sequences have, in one list: each has as many as it is long, none that it is too short for. Blocks
// take from the list by tickets, which only rise, and so each block goes through the sequences once.
//
// A warp looks at 32 sequences at a time, a lane at one. `section` of them, a power of 2 up to 32, are side by side in
// the list: the first tile of all their heads, then the second of those that have two, and so on.
#pragma once
#include "params.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "fragment.cuh"

__device__ __forceinline__ int warp_least(int x) { return -warp_uniform(-x); }

template <bool ON>
struct PackedWalkOf {
  __device__ __forceinline__ PackedWalkOf(const Params&, const Tensor&, int, int, int, int) {}
  __device__ __forceinline__ Work next(Longest) { return {-1, 0, 0}; }
};
// All 32 lanes reach what it does. Between two tiles it holds only where it stands: sequences are looked at again,
// which costs less than the registers, and runs while the ticket is on its way.
template <>
struct PackedWalkOf<true> {
  const Params& params;
  const Tensor& cu_seqlens;
  const int rows, longest, block, num_heads;
  int first = 0, before = 0;  // the sequence of lane 0; tiles of those before it

  __device__ __forceinline__ PackedWalkOf(
      const Params& all, const Tensor& offsets, int all_rows, int longest_sequence, int block_rows, int heads)
      : params(all), cu_seqlens(offsets), rows(all_rows), longest(longest_sequence), block(block_rows),
        num_heads(heads) {}

  // The next tile of this thread block; block -1 where there is no more.
  __device__ __forceinline__ Work next(Longest longest_first) {
    int ticket = 0;
    if (lane_index() == 0) ticket = take_ticket(static_cast<int*>(params.tickets.data));
    const int sequences = count_heads(params, 1);
    for (; first < sequences; first += 32) {
      const int n = first + lane_index();
      int begin, blocks = 0;
      if (n < sequences) blocks = ceil_div(packed_length(cu_seqlens, n, rows, longest, begin), block);
      const int end = sum_up_to(blocks * num_heads);
      const int place = shuffle(ticket, 0) - before, tiles = shuffle(end, 31);
      if (place < tiles) return find(blocks, end, place, longest_first);
      before += tiles;
    }
    return {-1, 0, 0};
  }

 private:
  // Of this lane and those before it.
  static __device__ __forceinline__ int sum_up_to(int x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = shuffle(x, (lane_index() - step) & 31);
      if (lane_index() >= step) x += before;
    }
    return x;
  }

  // The tile at a place among those of these 32 sequences; this lane's has so many blocks, and its tiles end there.
  __device__ __forceinline__ Work find(int blocks, int end, int place, Longest longest_first) const {
    const int lane = lane_index(), same_section = -params.section;
    const int section = count_bits(warp_vote(end <= place)) & same_section;  // its first lane
    const int skipped = shuffle(end, (section - 1) & 31);
    if (section > 0) place -= skipped;
    if ((lane & same_section) != section) blocks = 0;
    int rank = 0;  // so many tiles of each head lie before
    while (true) {
      const unsigned having = warp_vote(blocks > rank);  // sequences with more
      const int side_by_side = count_bits(having) * num_heads;
      const int ranks = warp_least(blocks > rank ? blocks : 0x7fffffff) - rank;  // until the shortest of them ends
      if (place < ranks * side_by_side) {
        rank += place / side_by_side;
        const int pair = place % side_by_side, nth = pair / num_heads;
        const bool is_it = (having >> lane & 1) && count_bits(having & ~(~0u << lane)) == nth;
        const int found = lowest_bit(warp_vote(is_it)), last = shuffle(blocks, found) - 1;
        return {longest_first == Longest::FIRST_BLOCK ? rank : last - rank, pair % num_heads, first + found};
      }
      place -= ranks * side_by_side;
      rank += ranks;
    }
  }
};
using PackedWalk = PackedWalkOf<PACKED>;

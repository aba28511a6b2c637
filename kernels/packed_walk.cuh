// Which tiles packed sequences have, in one list: a sequence has as many as it is long, and none is in the list that it is
// too short for. Blocks take from it by tickets, which only rise, and so each goes through the sequences once.
//
// A warp looks at 32 sequences at a time, a lane at one. `section` of them, a power of 2 up to 32, are side by side in the
// list: first the first tile of all their heads, then the second of those that have two, and so on.
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
// All 32 lanes reach what it does; they hold the same, but for `blocks` and `end`.
template <>
struct PackedWalkOf<true> {
  __device__ __forceinline__ PackedWalkOf(
      const Params& all, const Tensor& offsets, int all_rows, int longest_sequence, int block_rows, int heads)
      : params(all), cu_seqlens(offsets), rows(all_rows), longest(longest_sequence), block(block_rows),
        num_heads(heads), sequences(count_heads(all, 1)), first(0), before(0) {
    look();
  }

  // The next tile of this thread block; block -1 where there is no more.
  __device__ __forceinline__ Work next(Longest longest_first) {
    int ticket = 0;
    if (lane_index() == 0) ticket = take_ticket(static_cast<int*>(params.tickets.data));
    ticket = shuffle(ticket, 0);
    while (true) {
      const int tiles = shuffle(end, 31);
      if (ticket - before < tiles) return find(ticket - before, longest_first);
      before += tiles;
      first += 32;
      if (first >= sequences) return {-1, 0, 0};
      look();
    }
  }

 private:
  const Params& params;
  const Tensor& cu_seqlens;
  const int rows, longest, block, num_heads, sequences;
  int first;   // the sequence of lane 0
  int before;  // tiles of those before it
  int blocks;  // of this lane's sequence
  int end;     // where its tiles end, of those of the 32

  __device__ __forceinline__ void look() {
    const int lane = lane_index(), n = first + lane;
    int begin;
    blocks = n < sequences ? ceil_div(packed_length(cu_seqlens, n, rows, longest, begin), block) : 0;
    end = blocks * num_heads;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = shuffle(end, (lane - step) % 32u);
      if (lane >= step) end += left;
    }
  }

  // The tile at a place of these 32 sequences.
  __device__ __forceinline__ Work find(int place, Longest longest_first) const {
    const int lane = lane_index(), section = params.section;
    const int whose = count_bits(warp_vote(end <= place)), first_lane = whose / section * section;
    const int skipped = shuffle(end, (first_lane - 1) % 32u);
    if (first_lane > 0) place -= skipped;
    const bool beside = lane / section == whose / section;
    int rank = 0;  // tiles of each head that lie before
    while (true) {
      const bool has_more = beside && blocks > rank;
      const unsigned having = warp_vote(has_more);
      const int side_by_side = count_bits(having) * num_heads, ranks = warp_least(has_more ? blocks : 0x7fffffff) - rank;
      if (place >= ranks * side_by_side) {  // shorter sequences end
        place -= ranks * side_by_side;
        rank += ranks;
        continue;
      }
      rank += place / side_by_side;
      const int pair = place % side_by_side, nth = pair / num_heads;
      const int found = lowest_bit(warp_vote(has_more && count_bits(having & ((1u << lane) - 1)) == nth));
      const int last = shuffle(blocks, found) - 1;
      return {longest_first == Longest::FIRST_BLOCK ? rank : last - rank, pair % num_heads, first + found};
    }
  }
};
using PackedWalk = PackedWalkOf<PACKED>;

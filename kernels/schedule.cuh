// Which tile a thread block computes, or which tiles, one after another. A grid has one dimension, so that neither
// 65535 heads nor 65535 entries is a limit.
#pragma once
#include "params.cuh"
#include "memory.cuh"
#include "basics.cuh"

struct Work {
  int block;  // m_block or n_block; -1 where there is no more to do
  int head;
  int batch;
};

enum class Longest { FIRST_BLOCK, LAST_BLOCK };  // which block of a causal head has most to do

__device__ __forceinline__ int count_heads(const Params& params, int num_heads) {
  return num_heads * params.batch_shape[0] * params.batch_shape[1] * params.batch_shape[2] * params.batch_shape[3];
}

// One tile a thread block: blocks x heads x batch entries of them.
__device__ __forceinline__ Work scheduled_work(const Params& params, int num_blocks, int num_heads, Longest longest) {
  const int index = block_index();
  Work work;
  int entry_head;
  if constexpr (CAUSAL) {  // the longest tiles of all heads first: short ones fill the gaps at the end
    const int pairs = count_heads(params, num_heads);
    const int rank = index / pairs;
    work.block = longest == Longest::FIRST_BLOCK ? rank : num_blocks - 1 - rank;
    entry_head = index % pairs;
  } else {  // all tiles take the same time: neighbours share a head, and so its lines of L2
    work.block = index % num_blocks;
    entry_head = index / num_blocks;
  }
  work.head = entry_head % num_heads;
  work.batch = entry_head / num_heads;
  return work;
}

// Persistent thread blocks: the tiles of a call in one list, from which each block takes every n-th.
//
// The list goes through the heads in sections, small enough that what a section reads again and again stays in L2;
// inside a section it begins with the longest tiles of all its heads. Blocks take turns from left to right, then from
// right to left, so that a list sorted by length is shared out evenly; or, with tickets, whoever is free takes one.
struct TileWalk {
  int index, total;  // in the list
  bool backwards;    // the round to come
  int num_blocks, num_heads, all_heads, section;
  int* tickets;

  __device__ __forceinline__ TileWalk(const Params& params, int blocks, int heads)
      : index(block_index()), backwards(true), num_blocks(blocks), num_heads(heads) {
    all_heads = count_heads(params, num_heads);
    total = all_heads * num_blocks;
    section = params.section;
    tickets = static_cast<int*>(params.tickets.data);
  }
  __device__ __forceinline__ bool more() const { return index < total; }
  __device__ __forceinline__ void advance() {
    if (tickets != nullptr) {
      index = grid_size() + take_ticket(tickets);
      return;
    }
    const int from_the_left = block_index(), from_the_right = grid_size() - 1 - from_the_left;
    index += 2 * (backwards ? from_the_right : from_the_left) + 1;
    backwards = !backwards;
  }
  // Longest: which block of a causal head has most to do.
  __device__ __forceinline__ Work work(Longest longest) const {
    const int first_head = index / (section * num_blocks) * section;
    const int side_by_side = smaller(section, all_heads - first_head);
    const int place = index - first_head * num_blocks, rank = place / side_by_side;
    const int entry_head = first_head + place - rank * side_by_side;
    const int batch = entry_head / num_heads;
    return {longest == Longest::FIRST_BLOCK ? rank : num_blocks - 1 - rank, entry_head - batch * num_heads, batch};
  }
};

// What a launch of a decoding kernel carries: Params, and where caches, pages and new rows lie, mirrored by
// cupyflash/_params_decode.py. In Params, k and v are the caches, batch_shape is (1, 1, 1, batch), seqlen_k is how many
// rows an entry may have, and kv_lens are int32, without new rows.
#pragma once
#include "params.cuh"

struct DecodeParams {
  Params params;
  Tensor page_table;            // int32, (batch, page of the entry) as (batch axis, row)
  Tensor k_new, v_new;          // (batch axis, head, row, column)
  Tensor cos, sin;              // of type Angle, (position, pair) as (row, column)
  Tensor q_turned;              // as q: what decode_append writes, and the others read in its place
  Tensor partial, partial_lse;  // as out and lse, in Accumulator: those of the first split
  long long page_stride_k, page_stride_v;  // PAGED: elements from page to page
  long long split_stride, split_lse_stride;  // SPLITS: from one split's results to the next one's
  int page_size, num_pages, table_columns;
  int split_length, num_splits;  // SPLITS: keys of a split at least, a multiple of NUM_WARPS BLOCK_N
  int blocks_of_tile;            // SPLITS: thread blocks of a tile, which take its splits in turn
  int rotary_pairs, positions;
};

static_assert(sizeof(DecodeParams) == DECODE_PARAMS_BYTES, "params_decode.cuh, _params_decode.py: drifted apart");

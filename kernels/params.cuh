// What a launch carries: one struct by value for every kernel, mirrored by cupyflash/_params.py. A kernel reads
// the fields it needs; a tensor that a call does not have is nullptr.
#pragma once
#include "function_args.cuh"

// A view of one array: (batch axes, head, row, column). Strides count elements; 0 along a broadcast axis, negative
// allowed. lse, dlse and delta are (batch axes, head, row): their col_stride is not read.
struct Tensor {
  void* data;
  long long batch_stride[4];  // of the axes of batch_shape
  long long head_stride, row_stride, col_stride;
};

struct Params {
  Tensor q, k, v, out, lse;
  Tensor dout, dlse, delta, dq, dk, dv;
  Tensor partial;       // bwd_finish: a gradient before its sum over broadcast axes
  Tensor exponents;     // one-pass backwards: lse in exponents of 2, +inf in rows beyond the end; delta has 0 there
  Tensor dq_sums;       // the same: (head, m_block, numbers of a tile): dq before it is whole, in float32
  Tensor semaphores;    // the same: (head, m_block), some to each: how many key blocks have added their part of dq
  Tensor q_offsets;     // int64, one for each batch entry; nullptr: q_offset below holds for all
  Tensor tickets;       // persistent kernels: one int32 that starts at 0; nullptr: blocks take turns in a fixed order
  Tensor bias, mask;    // (batch axes, head, query, key), numbers of type Bias, and bytes; broadcast by strides of 0
  Tensor alibi_slopes, sinks;      // (batch axes, head), of types Slope and Sink
  Tensor q_segments, kv_segments;  // int64, (batch axes, one, row)
  Tensor q_lens, kv_lens;          // int64, one for each batch entry; nullptr: all have seqlen_q, seqlen_k
  Tensor seed;                     // one uint64
  Tensor dbias, dsinks;            // as bias and sinks came, lengths of 1 along what they were broadcast over
  Tensor key_map, query_map;       // (batch axes, head, block, bytes): see block_walk.cuh
  Tensor cu_seqlens_q, cu_seqlens_k;  // PACKED: int32 along head_stride, one more than sequences
  long long q_offset;   // query row i sits on key i + q_offset
  double softmax_scale;
  long long first_batch;                // of this launch, among all batch entries of a call
  long long window_left, window_right;  // keys beside the diagonal; NO_BOUND where there is no end
  double softcap;
  double undropped;  // 1 / (1 - dropout)
  int batch_shape[4];   // leading axes, collapsed, right-aligned, filled up with 1; bwd_finish: the gradient's own
  int reduce_shape[4];  // bwd_finish: how many partials each axis has; 1 where the gradient is not broadcast
  int num_heads, num_heads_k;
  int seqlen_q, seqlen_k;
  int head_dim, head_dim_v;
  int section;  // persistent kernels: how many heads run side by side
  unsigned drop_below;  // a weight whose random word is below this is dropped
  int bottom_right;     // an entry's diagonal ends at its own last query and key, q_offset is for whole ones
  int rows_q, rows_k;   // PACKED: of the arrays in which the sequences lie; seqlen_q, seqlen_k bound one sequence
  int tile_shift;       // PACKED: a backward's temporaries have a tile for every 2^tile_shift rows, and one a sequence
  FunctionArgs score_args, mask_args;  // what the call's functions read
};

static_assert(sizeof(Params) == PARAMS_BYTES, "kernels/params.cuh and cupyflash/_params.py have drifted apart");

// Before decoding: new rows go to the cache, and what has rotary positions is turned.
//
// A warp takes one row of one head: of k_new, of v_new, then, TURNS, of q. Blocks go on to further rows.
//
//     rows of a call:   k_new (batch, head_k, row)  |  v_new (batch, head_k, row)  |  q (batch, head, row)
//
// Row t of an entry that had n rows goes to row n + t, and is turned there: a pair (x, y) of its columns becomes
// (x cos - y sin, y cos + x sin).
// No shared memory.
#include "basics.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "rows.cuh"
#include "seqlen.cuh"
#include "cache.cuh"

constexpr int NUM_THREADS = 32 * NUM_WARPS;
constexpr int SMEM_BYTES = 0;

template <typename T>
__device__ __forceinline__ void store_element(T* to, T x) {
  store_global(to, Vector<T, 1>{{x}});
}

// A row as it is, with any strides.
__device__ __forceinline__ void copy_row(
    const Element* from, long long from_stride, Element* to, long long to_stride, int begin, int columns) {
  for (int col = begin + thread_index() % 32; col < columns; col += 32) {
    store_element(to + col * to_stride, load_global<1>(from + col * from_stride).at[0]);
  }
}

// A row turned at a position, which is moved inside the table; columns beyond the pairs as they are.
__device__ __forceinline__ void turn_row(
    const DecodeParams& decode, const Element* from, long long from_stride, Element* to, long long to_stride,
    int position, int columns) {
  const int pairs = decode.rotary_pairs;
  const long long row = clamped_index(position, decode.positions);
  const Angle* cos = static_cast<const Angle*>(decode.cos.data) + row * decode.cos.row_stride;
  const Angle* sin = static_cast<const Angle*>(decode.sin.data) + row * decode.sin.row_stride;
  for (int pair = thread_index() % 32; pair < pairs; pair += 32) {
    const int first = INTERLEAVED ? 2 * pair : pair, second = INTERLEAVED ? first + 1 : first + pairs;
    const auto c = static_cast<Accumulator>(to_accumulator(load_global<1>(cos + pair * decode.cos.col_stride).at[0]));
    const auto s = static_cast<Accumulator>(to_accumulator(load_global<1>(sin + pair * decode.sin.col_stride).at[0]));
    const Accumulator x = to_accumulator(load_global<1>(from + first * from_stride).at[0]);
    const Accumulator y = to_accumulator(load_global<1>(from + second * from_stride).at[0]);
    store_element(to + first * to_stride, from_accumulator<Element>(x * c - y * s));
    store_element(to + second * to_stride, from_accumulator<Element>(y * c + x * s));
  }
  copy_row(from, from_stride, to, to_stride, 2 * pairs, columns);
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) decode_append(const DecodeParams decode) {
  const Params& params = decode.params;
  const long long batch = params.batch_shape[3], rows = params.seqlen_q;
  const long long new_rows = APPENDS ? batch * params.num_heads_k * rows : 0;
  const long long all = 2 * new_rows + (TURNS ? batch * params.num_heads * rows : 0);
  const long long step = static_cast<long long>(grid_size()) * NUM_WARPS;
  for (long long n = static_cast<long long>(block_index()) * NUM_WARPS + thread_index() / 32; n < all; n += step) {
    const bool is_q = n >= 2 * new_rows, is_v = !is_q && n >= new_rows;
    const long long place = is_q ? n - 2 * new_rows : is_v ? n - new_rows : n;
    const int heads = is_q ? params.num_heads : params.num_heads_k;
    const int t = static_cast<int>(place % rows), head = static_cast<int>(place / rows % heads);
    const int entry = static_cast<int>(place / rows / heads);
    const Sequence seq = cached_sequence(decode, entry);
    const int position = seq.seqlen_k - seq.seqlen_q + t, columns = is_v ? params.head_dim_v : params.head_dim;
    const Tensor& source = is_q ? params.q : is_v ? decode.v_new : decode.k_new;
    const Element* from = rows_of<const Element>(source, seq.batch_index, head).at(t);
    Element* to;
    long long to_stride;
    if (is_q) {
      to = rows_of<Element>(decode.q_turned, seq.batch_index, head).at(t);
      to_stride = decode.q_turned.col_stride;
    } else {
      const auto cache = is_v ? values_of<Element>(decode, entry, head) : keys_of<Element>(decode, entry, head);
      to = cache.at(position);
      to_stride = cache.col_stride;
    }
    if (TURNS && !is_v) {
      turn_row(decode, from, source.col_stride, to, to_stride, position, columns);
    } else {
      copy_row(from, source.col_stride, to, to_stride, 0, columns);
    }
  }
}

// Before the other kernels, where a mask, a function or segments hide single pairs: of each block of BLOCK_M queries
// and BLOCK_N keys, whether any pair is seen and whether all are. So main loops leave out blocks that nobody sees, and
// ask for no single pair in those that are whole (block_walk.cuh). Lengths, diagonal and window are not asked here.
//
// key_map has a row for each query block, a bit for each key block; query_map is its transpose. Either may be missing.
// params.batch_shape and num_heads count the maps there are: one for all heads, or all entries, that share the mask.
//
//     a thread block writes a byte of both halves of a row     NUM_WARPS blocks of pairs, a warp for each
//     a warp, in turns, until it has seen a pair and a hidden one:   by 16 bytes of the mask, or by a pair, a lane
//
// Segments are compared by their ranges first: two blocks whose ids lie apart, or are all the same, need no more.
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "tile.cuh"
#include "block_walk.cuh"

static_assert(NUM_WARPS == 8, "a bit for each warp");
static_assert(BLOCK_N % 16 == 0, "a row of a block is whole runs");

struct Smem {
  unsigned seen[NUM_WARPS], whole[NUM_WARPS];
};
constexpr int SMEM_BYTES = sizeof(Smem);

// What there is among some pairs.
struct Found {
  bool seen, hidden;
};
// In a block of pairs, by all lanes of a warp: each says what it found.
__device__ __forceinline__ Found together(const Found& found) { return {warp_any(found.seen), warp_any(found.hidden)}; }

// Where a block of pairs lies, cut at the ends of the sequences.
struct Place {
  int m0, n0, m_end, n_end;

  __device__ __forceinline__ Place(const Sequence& seq, int m_block, int n_block)
      : m0(m_block * BLOCK_M),
        n0(n_block * BLOCK_N),
        m_end(smaller(m0, seq.seqlen_q - BLOCK_M) + BLOCK_M),
        n_end(smaller(n0, seq.seqlen_k - BLOCK_N) + BLOCK_N) {}
};

// look(i, j) at runs of RUN pairs, the first pair of each within the sequences.
template <int RUN, typename Look>
__device__ __forceinline__ Found search(const Place& place, Look look) {
  constexpr int RUNS = BLOCK_N / RUN, SIDE_BY_SIDE = 8;  // of a row; of a lane, their loads under way together
  Found found = {false, false};
#pragma unroll 1
  for (int first = 0; first < BLOCK_M * RUNS; first += 32 * SIDE_BY_SIDE) {
#pragma unroll
    for (int n = 0; n < SIDE_BY_SIDE; ++n) {
      const int run = first + 32 * n + thread_index() % 32;
      const int i = place.m0 + run / RUNS, j = place.n0 + run % RUNS * RUN;
      if (i >= place.m_end || j >= place.n_end) continue;
      const Found here = look(i, j);
      found.seen |= here.seen;
      found.hidden |= here.hidden;
    }
    const Found all = together(found);
    if (all.seen && all.hidden) return all;
  }
  return together(found);
}

// The least and the greatest of a block's ids.
struct IdRange {
  long long low, high;
};
__device__ __forceinline__ long long shuffle_long(long long x, int mask) {
  const unsigned long long bits = x;
  const unsigned low = shuffle_xor(static_cast<unsigned>(bits), mask);
  const unsigned high = shuffle_xor(static_cast<unsigned>(bits >> 32), mask);
  return static_cast<long long>(static_cast<unsigned long long>(high) << 32 | low);
}
__device__ __forceinline__ IdRange range_of(const Rows<const long long>& ids, int begin, int end) {
  long long low = load_global<1>(ids.at(begin)).at[0], high = low;
#pragma unroll 1
  for (int row = begin + thread_index() % 32; row < end; row += 32) {
    const long long id = load_global<1>(ids.at(row)).at[0];
    low = id < low ? id : low;
    high = id > high ? id : high;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const long long other_low = shuffle_long(low, mask), other_high = shuffle_long(high, mask);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  return {low, high};
}

// 16 neighbours of one row of the mask, fewer at its end.
__device__ __forceinline__ Found look_at_mask(const Rows<const unsigned char>& mask, int i, int j, int end) {
  Found found = {false, false};
  if (j + 16 <= end) {
    const Vector<unsigned char, 16> run = load_global<16>(mask.at(i, j));
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      found.seen |= run.at[e] != 0;
      found.hidden |= run.at[e] == 0;
    }
  } else {
#pragma unroll 1
    for (; j < end; ++j) {
      const bool hidden = load_global<1>(mask.at(i, j)).at[0] == 0;
      found.seen |= !hidden;
      found.hidden |= hidden;
    }
  }
  return found;
}

// Of a block of pairs, by all lanes of a warp.
__device__ __forceinline__ Found find(const HiddenPairs& hidden, const Place& place) {
  bool segments_agree = true;
  if constexpr (SEGMENTS) {
    const IdRange q = range_of(hidden.q_segments, place.m0, place.m_end);
    const IdRange k = range_of(hidden.kv_segments, place.n0, place.n_end);
    if (q.high < k.low || k.high < q.low) return {false, true};
    segments_agree = q.low == q.high && k.low == k.high && q.low == k.low;
    if (segments_agree && !HAS_MASK && !MASK_FUNCTION) return {true, false};
  }
  if (HAS_MASK && segments_agree && hidden.mask.vectors) {
    return search<16>(place, [&](int i, int j) { return look_at_mask(hidden.mask, i, j, place.n_end); });
  }
  return search<1>(place, [&](int i, int j) {
    const bool hides = hidden.hides(i, j);
    return Found{!hides, hides};
  });
}

// The byte of `map` that this thread block owns, and the same of its second half: by the whole block.
__device__ __forceinline__ void write_bytes(
    Smem& smem, const Tensor& map, const Sequence& seq, int head, int row, int blocks, int byte) {
  sync_block();  // all warps have found what there is
  if (thread_index() != 0) return;
  unsigned seen = 0, whole = 0;
#pragma unroll
  for (int bit = 0; bit < NUM_WARPS; ++bit) {
    seen |= load_shared<1>(&smem.seen[bit]).at[0] << bit;
    whole |= load_shared<1>(&smem.whole[bit]).at[0] << bit;
  }
  unsigned char* bytes = rows_of<unsigned char>(map, seq.batch_index, head).at(row) + byte;
  store_global(bytes, Vector<unsigned char, 1>{{static_cast<unsigned char>(seen)}});
  store_global(bytes + 4 * words_of_map(blocks), Vector<unsigned char, 1>{{static_cast<unsigned char>(whole)}});
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) block_map(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const int m_blocks = ceil_div(params.seqlen_q, BLOCK_M), n_blocks = ceil_div(params.seqlen_k, BLOCK_N);
  const int bytes_of_keys = 4 * words_of_map(n_blocks), bytes_of_queries = 4 * words_of_map(m_blocks);
  const int of_key_map = params.key_map.data == nullptr ? 0 : m_blocks * bytes_of_keys;
  const int of_query_map = params.query_map.data == nullptr ? 0 : n_blocks * bytes_of_queries;
  const int entry_head = block_index() / (of_key_map + of_query_map);
  const int index = block_index() - entry_head * (of_key_map + of_query_map);
  const bool by_queries = index < of_key_map;  // a row of key_map
  const int bytes = by_queries ? bytes_of_keys : bytes_of_queries;
  const int place = by_queries ? index : index - of_key_map, row = place / bytes, byte = place % bytes;
  const int head = entry_head % params.num_heads;
  const Sequence seq = sequence_of(params, entry_head / params.num_heads);

  const int warp = thread_index() / 32, other = 8 * byte + warp;  // the bit
  const int m_block = by_queries ? row : other, n_block = by_queries ? other : row;
  Found found = {false, true};
  if (m_block < m_blocks && n_block < n_blocks) {
    found = find(HiddenPairs(params, seq, head), Place(seq, m_block, n_block));
  }
  if (thread_index() % 32 == 0) {
    store_shared(&smem.seen[warp], Vector<unsigned, 1>{{found.seen ? 1u : 0u}});
    store_shared(&smem.whole[warp], Vector<unsigned, 1>{{found.hidden ? 0u : 1u}});
  }
  if (by_queries) {
    write_bytes(smem, params.key_map, seq, head, row, n_blocks, byte);
  } else {
    write_bytes(smem, params.query_map, seq, head, row, m_blocks, byte);
  }
}

// Backward, bias, on tensor cores since Ampere: dbias, for both families that have them. Which tile a thread block owns
// and what it adds up there is what bias_turns.cuh says: no atomics, the same bits every time.
//
// A warp owns 16 * FRAGMENTS queries of the tile; what it has of S, dP and dbias stays in its registers. Two thread
// blocks on a multiprocessor fill each other's gaps.
//
//     one turn, PART columns at a time:
//                 S    = Q K^T                     dO, V of this turn are on their way
//                 P    = exp2(S - lse)             behind the last part's S, Q and K of the next turn are sent for
//                 dP   = dO V^T
//                 acc += P * (dP - delta)          behind the last part's dP, dO and V of the next turn are sent for
//
//     shared memory:   q (BLOCK_M, HEAD_DIM)   k (BLOCK_N, HEAD_DIM)   dout (BLOCK_M, HEAD_DIM_V)
//                      v (BLOCK_N, HEAD_DIM_V)   lse and delta of the rows
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "mask.cuh"
#include "score.cuh"
#include "tile_sm80.cuh"
#include "softmax.cuh"
#include "fragment_pairs.cuh"
#include "bias_turns.cuh"

// A bias of queries and keys is the same in every turn: dbias is summed over what the bias is broadcast over. Its tile
// stays in registers.
constexpr bool BIAS_STAYS = !SUM_ROWS && !SUM_COLS;

// S, dP and what is made of them take PART of the tile's columns at a time: registers hold the sums of all of them,
// so that what a turn costs beside its products is shared by many.
constexpr int PART = smaller(BLOCK_N, 64);
static_assert(BLOCK_N % PART == 0, "parts are equal");
// Groups of copies behind dO and V when the first part waits for them: Q and K of the next turn, if it is the last
// part.
constexpr int SENT_BEHIND = BLOCK_N == PART ? 1 : 0;

constexpr int FRAGMENTS = BLOCK_M / (16 * NUM_WARPS);
static_assert(BLOCK_M == 16 * NUM_WARPS * FRAGMENTS && BLOCK_N % 16 == 0, "products are dealt out in steps of 16");
static_assert(BLOCK_M <= NUM_THREADS, "a thread for the numbers of each row");
static_assert(BLOCK_N <= NUM_THREADS && 2 * NUM_WARPS * BLOCK_N <= BLOCK_M * HEAD_DIM, "sums over rows end in q");

struct Smem {
  SwizzledTile<BLOCK_M, HEAD_DIM> q;
  SwizzledTile<BLOCK_N, HEAD_DIM> k;
  SwizzledTile<BLOCK_M, HEAD_DIM_V> dout;
  SwizzledTile<BLOCK_N, HEAD_DIM_V> v;
  Accumulator exponents[BLOCK_M], delta[BLOCK_M];
};
constexpr int SMEM_BYTES = sizeof(Smem);

// ---- loads, by the whole block

// How many bytes of a row can be copied as one, in any row of any head of any entry: a turn need not find out.
__device__ __forceinline__ int bytes_in_any_row(const Tensor& tensor) {
  unsigned long long all = static_cast<unsigned long long>(tensor.row_stride | tensor.head_stride);
#pragma unroll
  for (int axis = 0; axis < 4; ++axis) all |= static_cast<unsigned long long>(tensor.batch_stride[axis]);
  return bytes_at_a_time(reinterpret_cast<unsigned long long>(tensor.data) | all * sizeof(Element), tensor.col_stride);
}
struct Bytes {
  int q, k, dout, v;
};

__device__ __forceinline__ void load_q_k(const Params& params, Smem& smem, const BiasTurn& turn, const Bytes& bytes) {
  const Sequence& seq = turn.seq;
  const auto q = rows_of<const Element>(params.q, seq.batch_index, turn.head);    // (seqlen_q, head_dim)
  const auto k = rows_of<const Element>(params.k, seq.batch_index, turn.head_k);  // (seqlen_k, head_dim)
  load_tile(smem.q, q, bytes.q, turn.m_block * BLOCK_M, seq.seqlen_q, params.head_dim);
  load_tile(smem.k, k, bytes.k, turn.n_block * BLOCK_N, seq.seqlen_k, params.head_dim);
}
__device__ __forceinline__ void load_do_v(const Params& params, Smem& smem, const BiasTurn& turn, const Bytes& bytes) {
  const Sequence& seq = turn.seq;
  const auto dout = rows_of<const Element>(params.dout, seq.batch_index, turn.head);  // (seqlen_q, head_dim_v)
  const auto v = rows_of<const Element>(params.v, seq.batch_index, turn.head_k);      // (seqlen_k, head_dim_v)
  load_tile(smem.dout, dout, bytes.dout, turn.m_block * BLOCK_M, seq.seqlen_q, params.head_dim_v);
  load_tile(smem.v, v, bytes.v, turn.n_block * BLOCK_N, seq.seqlen_k, params.head_dim_v);
}
// The numbers of a turn's rows; p of rows beyond the end is 0 by an lse of +inf.
__device__ __forceinline__ void load_numbers(const Params& params, Smem& smem, const BiasTurn& turn) {
  const Sequence& seq = turn.seq;
  const int row = turn.m_block * BLOCK_M + thread_index_again();
  if (thread_index_again() >= BLOCK_M) return;
  Accumulator exponent = math::infinity<Accumulator>(), delta = 0;
  if (row < seq.seqlen_q) {
    exponent = load_number(rows_of<const Accumulator>(params.exponents, seq.batch_index, turn.head), row);
    delta = load_number(rows_of<const Accumulator>(params.delta, seq.batch_index, turn.head), row);
  }
  store_shared(&smem.exponents[thread_index_again()], Vector<Accumulator, 1>{{exponent}});
  store_shared(&smem.delta[thread_index_again()], Vector<Accumulator, 1>{{delta}});
}

// The bias of a warp's (16, BLOCK_N), where it stays: as it is stored where that saves registers.
template <bool HELD>
struct OwnBiasOf {
  Biases<RowIs::QUERY, BLOCK_N> biases;

  __device__ __forceinline__ void read(const Added& added, int i, int j) { biases.read(added, i, j); }
  __device__ __forceinline__ Accumulator at(const Added& added, int r, int c) const { return biases.at(added, r, c); }
};
template <>
struct OwnBiasOf<false> {
  Fragment<BLOCK_N> biases;

  __device__ __forceinline__ void read(const Added& added, int i, int j) {
#pragma unroll
    for (int c = 0; c < biases.COLS; ++c) {
#pragma unroll
      for (int r = 0; r < 2; ++r) biases(r, c) = added.bias_of(i + 8 * r, j + biases.ahead(c));
    }
  }
  __device__ __forceinline__ Accumulator at(const Added&, int r, int c) const { return biases(r, c); }
};
using OwnBias = OwnBiasOf<sizeof(Bias) == 2>;

// ---- results

// The sums of each column over all rows of the tile, in the order of the warps, to threads 0 to BLOCK_N - 1. Q has been
// read for the last time, behind the barrier that ends a turn.
__device__ __forceinline__ Accumulator sum_rows(Smem& smem, const Fragment<BLOCK_N> (&acc)[FRAGMENTS]) {
  Accumulator* sums = reinterpret_cast<Accumulator*>(&smem.q);  // (NUM_WARPS, BLOCK_N)
#pragma unroll
  for (int c = 0; c < acc[0].COLS; ++c) {
    Accumulator sum = 0;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) sum += acc[f](0, c) + acc[f](1, c);
    // The eight lanes that hold other rows of this column.
    sum += shuffle_xor(sum, 4);
    sum += shuffle_xor(sum, 8);
    sum += shuffle_xor(sum, 16);
    const int col = acc[0].first_col() + acc[0].ahead(c);
    if (lane_index() < 4) store_shared(sums + thread_index() / 32 * BLOCK_N + col, Vector<Accumulator, 1>{{sum}});
  }
  sync_block();  // they are there
  Accumulator whole = 0;
  if (thread_index() < BLOCK_N) {
#pragma unroll 1
    for (int warp = 0; warp < NUM_WARPS; ++warp) whole += load_shared<1>(sums + warp * BLOCK_N + thread_index()).at[0];
  }
  return whole;
}

__device__ __forceinline__ void store_results(
    const Params& params, Smem& smem, const BiasTile& tile, Fragment<BLOCK_N> (&acc)[FRAGMENTS], int first_row) {
  const auto dbias = tile.rows(params);  // (seqlen_q or 1, seqlen_k or 1)
  const int m0 = tile.m_block * BLOCK_M + first_row, n0 = tile.n_block * BLOCK_N;
  if constexpr (SUM_COLS) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Accumulator sum = 0;
#pragma unroll
        for (int c = 0; c < acc[f].COLS; ++c) sum += acc[f](r, c);
        sum = row_sum_of(sum);
        const int row = m0 + 16 * f + acc[f].warp_row(r);
        if (!SUM_ROWS && lane_index() % 4 == 0 && row < params.seqlen_q) store_gradient(dbias, row, 0, sum);
        clear_row(acc[f], r);
        acc[f](r, 0) = sum;  // in the first column of each of four lanes
      }
    }
  }
  if constexpr (SUM_ROWS) {
    const Accumulator sum = sum_rows(smem, acc);
    const int col = thread_index();
    if (col < (SUM_COLS ? 1 : BLOCK_N) && (SUM_COLS || n0 + col < params.seqlen_k)) {
      store_gradient(dbias, 0, SUM_COLS ? 0 : n0 + col, sum);
    }
  }
  if constexpr (!SUM_ROWS && !SUM_COLS) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        auto rows = dbias;
        rows.data = rows.at(0, n0);  // a multiple of 16 bytes behind column 0: vectors stay what they are
        store_row(rows, m0 + 16 * f + acc[f].warp_row(r), params.seqlen_q, params.seqlen_k - n0, acc[f], r);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS) bwd_bias_sm80(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const Score score = score_of(params);
  Fragment<BLOCK_N> acc_ds[FRAGMENTS];  // (16 FRAGMENTS, BLOCK_N) of this warp
  clear(acc_ds);
  BiasTurn turn(params);
  const Bytes bytes = {bytes_in_any_row(params.q), bytes_in_any_row(params.k), bytes_in_any_row(params.dout),
                       bytes_in_any_row(params.v)};
  const int first_row = warp_uniform(thread_index() / 32) * 16 * FRAGMENTS;
  if (turn.exists(params)) {
    load_q_k(params, smem, turn, bytes);
    cp_async_commit();
    load_do_v(params, smem, turn, bytes);
  }
  cp_async_commit();
  OwnBias own_bias[FRAGMENTS];
  if (BIAS_STAYS && turn.exists(params)) {
    Added added(params, turn.seq, turn.head);
    added.last_query = params.seqlen_q - 1;  // within the tensor, which an entry's own lengths may not fill
    added.last_key = params.seqlen_k - 1;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      using Whole = Fragment<BLOCK_N>;
      const int row = turn.m_block * BLOCK_M + first_row + 16 * f + Whole::warp_row(0);
      own_bias[f].read(added, row, turn.n_block * BLOCK_N + Whole::first_col());
    }
  }
#pragma unroll 1
  while (turn.exists(params)) {
    const Sequence& seq = turn.seq;
    const Mask mask = mask_of(params, seq);
    const Features features(params, seq, turn.head);
    const BlockRange blocks = mask.key_blocks(turn.m_block * BLOCK_M, BLOCK_M);
    const bool masked = !needs_no_look(key_walk(params, seq, turn.head, turn.m_block), blocks, turn.n_block);
    BiasTurn next = turn;
    next.advance(params);

    load_numbers(params, smem, turn);
    cp_async_wait<1>();
    sync_block();  // Q and K are written, by all threads, and the rows' numbers
#pragma unroll
    for (int part = 0; part < BLOCK_N / PART; ++part) {
      const bool last = part + 1 == BLOCK_N / PART;
      Fragment<PART> acc_s[FRAGMENTS], acc_dp[FRAGMENTS];
      const auto at = [&](int f, int r, int c) ALWAYS_INLINE {
        using Scores = Fragment<PART>;
        return Pair{turn.m_block * BLOCK_M + first_row + 16 * f + Scores::warp_row(r),
                    turn.n_block * BLOCK_N + part * PART + Scores::first_col() + Scores::ahead(c)};
      };
      PairBits<PART> shown[FRAGMENTS] = {};
      if (HIDES_PAIRS && masked) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
          const Pair first = at(f, 0, 0);
          shown[f] = shown_pairs<RowIs::QUERY, PART>(features.hidden, mask, first.i, first.j);
        }
      }
      // What the query of a thread's row sees; nothing where it lies beyond an entry's own length.
      const auto row_of = [&](int f, int r) ALWAYS_INLINE {
        const Pair first = at(f, r, 0);
        const bool exists = !(LENS || HIDES_PAIRS) || first.i < mask.seqlen_q;
        return exists ? mask.row(first.i, first.j) : MaskRow{0, -1};
      };
      const auto sees = [&](bool ask, const MaskRow& row, int f, int r, int c) ALWAYS_INLINE {
        if (!ask) return true;
        const bool visible = row.visible(acc_s[f].ahead(c));
        return HIDES_PAIRS ? visible && shown[f](r, c) && features.accepts(mask, at(f, r, c)) : visible;
      };
      // S becomes P; dP becomes dS, which is added.
      const auto weigh = [&](bool ask) ALWAYS_INLINE {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
          const Distances<RowIs::QUERY> distances(features.added, at(f, 0, 0).i, at(f, 0, 0).j);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const MaskRow row = row_of(f, r);
            const Accumulator lse = load_shared<1>(&smem.exponents[first_row + 16 * f + acc_s[f].warp_row(r)]).at[0];
#pragma unroll
            for (int c = 0; c < acc_s[f].COLS; ++c) {
              const Pair pair = at(f, r, c);
              const Accumulator capped = score.capped(score.scaled(acc_s[f](r, c)));
              const Accumulator s = features.added.behind_alibi(capped, distances.at(r, acc_s[f].ahead(c)));
              const Accumulator bias = BIAS_STAYS ? own_bias[f].at(features.added, r, part * PART / 4 + c)
                                                  : features.added.bias_of(pair.i, pair.j);
              acc_s[f](r, c) = bias_weight_of(score, features, s + bias, lse, sees(ask, row, f, r, c), pair);
            }
          }
        }
      };
      const auto add_ds = [&](bool ask) ALWAYS_INLINE {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
          const auto kept = kept_pairs<RowIs::QUERY, PART>(features.kept, at(f, 0, 0).i, at(f, 0, 0).j);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const MaskRow row = row_of(f, r);
            const Accumulator delta = load_shared<1>(&smem.delta[first_row + 16 * f + acc_s[f].warp_row(r)]).at[0];
#pragma unroll
            for (int c = 0; c < acc_s[f].COLS; ++c) {
              acc_ds[f](r, part * PART / 4 + c) += score_gradient(
                  features, acc_s[f](r, c), acc_dp[f](r, c), delta, sees(ask, row, f, r, c), kept(r, c));
            }
          }
        }
      };

      clear(acc_s);
      add_product<HEAD_DIM / 16>(acc_s, operand<Side::LEFT, Major::K>(smem.q, first_row),
                                 operand<Side::RIGHT, Major::K>(smem.k, part * PART));
      if (last) {
        sync_block();  // Q and K are read: send for the next ones
        if (next.exists(params)) load_q_k(params, smem, next, bytes);
        cp_async_commit();
      }
      if (masked) {
        weigh(MASKED);
      } else {
        weigh(UNMASKED);
      }
      if (part == 0) {
        cp_async_wait<SENT_BEHIND>();
        sync_block();  // dO and V are written, by all threads
      }
      clear(acc_dp);
      add_product<HEAD_DIM_V / 16>(acc_dp, operand<Side::LEFT, Major::K>(smem.dout, first_row),
                                   operand<Side::RIGHT, Major::K>(smem.v, part * PART));
      if (masked) {
        add_ds(MASKED);
      } else {
        add_ds(UNMASKED);
      }
    }
    sync_block();  // dO, V and the rows' numbers are read: send for the next ones
    if (next.exists(params)) load_do_v(params, smem, next, bytes);
    cp_async_commit();
    turn = next;
  }
  store_results(params, smem, turn.tile, acc_ds, first_row);
}

// Before its sum over batch entries: dsinks of one head of one entry, the sum over rows of
// p_sink * (dlse - sum over d of dout * out) = -exp(sink - lse) * delta, as bwd_delta has left delta.
//
// A thread block owns one head of one entry. Thread t takes rows t, t + NUM_THREADS, ... in order; then the threads'
// sums are added up, always the same pairs: no atomics, the same bits every time. A row whose lse is -inf has neither
// key nor sink.
//
//     shared memory:  one sum for each thread
#include "basics.cuh"
#include "params.cuh"
#include "types.cuh"
#include "memory.cuh"
#include "seqlen.cuh"
#include "schedule.cuh"
#include "tile.cuh"

struct Smem {
  Accumulator sum[NUM_THREADS];
};
constexpr int SMEM_BYTES = sizeof(Smem);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) bwd_sinks(const Params params) {
  DYNAMIC_SHARED(Smem, smem);
  const Work work = scheduled_work(params, 1, params.num_heads, Longest::LAST_BLOCK);
  const Sequence seq = sequence_of(params, work.batch);
  const auto lse = rows_of<const Accumulator>(params.lse, seq.batch_index, work.head);      // (seqlen_q)
  const auto delta = rows_of<const Accumulator>(params.delta, seq.batch_index, work.head);  // (seqlen_q)
  const auto sinks = rows_of<const Sink>(params.sinks, seq.batch_index, work.head);
  const Accumulator sink = to_accumulator(load_global<1>(sinks.data).at[0]);

  Accumulator sum = 0;
  for (int row = thread_index(); row < seq.seqlen_q; row += NUM_THREADS) {
    const Accumulator row_lse = load_number(lse, row);
    const Accumulator p = math::exp2((sink - row_lse) * Accumulator(math::LOG2E));
    if (row_lse != -math::infinity<Accumulator>()) sum = math::fma(-p, load_number(delta, row), sum);
  }
  store_shared(&smem.sum[thread_index()], Vector<Accumulator, 1>{{sum}});
  for (int half = NUM_THREADS / 2; half > 0; half /= 2) {
    sync_block();  // the sums are there
    if (thread_index() < half) {
      const Accumulator other = load_shared<1>(&smem.sum[thread_index() + half]).at[0];
      sum += other;
      store_shared(&smem.sum[thread_index()], Vector<Accumulator, 1>{{sum}});
    }
  }
  const auto dsinks = rows_of<Accumulator>(params.dsinks, seq.batch_index, work.head);  // one number
  if (thread_index() == 0) store_number(dsinks, 0, sum);
}

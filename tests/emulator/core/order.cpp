// Happens-before: how knowledge travels between threads, and the proxy fences' share of it.
#include "state.h"

namespace emulator {

void tick() { self->warp->tick++; }

Clock published(const Thread &thread) {
  Clock clock = thread.clock;
  clock.raise(thread.index, thread.warp->tick, thread.block->slots());
  return clock;
}

void acquire(Thread &thread, const Clock &clock) {
  if (clock.empty() || thread.clock.same(clock)) return;
  Block &block = *thread.block;
  if (!(block.memo_left.same(thread.clock) && block.memo_right.same(clock))) {
    Clock result = thread.clock;
    result.join(clock);
    block.memo_left = thread.clock, block.memo_right = clock, block.memo_result = result;
  }
  thread.clock = block.memo_result;
}

void acquire_fenced(Thread &thread, const Clock (&fenced)[2]) {
  if (!launch->any_fence) return;
  for (int space = 0; space < 2; space++) thread.fenced[space].join(fenced[space]);
}

void gather(Clock &into, Clock (&fenced)[2], const Thread &thread) {
  into.join(thread.clock);
  into.raise(thread.index, thread.warp->tick, thread.block->slots());
  if (!launch->any_fence) return;
  for (int space = 0; space < 2; space++) fenced[space].join(thread.fenced[space]);
}

u32 new_agent(Block &block) {
  u32 agent = block.next_agent++ % AGENTS;
  block.agent_ticks[agent]++;
  return block.num_threads + agent;
}

u32 agent_tick(const Block &block, u32 slot) { return block.agent_ticks[slot - block.num_threads]; }

}  // namespace emulator

// __syncthreads and named barriers.
#include "report.h"
#include "state.h"

namespace emulator {

namespace {

void complete(Barrier &barrier) {
  // Every waiting thread has given all it knew, so the sum replaces its clock.
  for (Thread *thread : barrier.waiting) {
    thread->clock = barrier.clock;
    acquire_fenced(*thread, barrier.fenced);
    if (thread != self) wake(*thread);
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.clock = barrier.fenced[0] = barrier.fenced[1] = Clock();
}

void arrive(const char *name, u32 id, u32 threads, bool wait, bool plain) {
  if (id >= NUM_BARRIERS) fail("barrier", "%s: there is no barrier %u", name, id);
  if (threads == 0 || threads % WARP || threads > (self->block->num_threads + WARP - 1) / WARP * WARP)
    fail("barrier", "%s %u: %u threads, in a block of %u", name, id, threads, self->block->num_threads);
  Barrier &barrier = self->block->barriers[id];
  if (barrier.arrived) {
    if (barrier.expected != threads)
      fail("barrier", "%s %u is for %u threads here and for %u at %s", name, id, threads, barrier.expected,
           place(barrier.pc).c_str());
    if (plain && barrier.plain && !same_line(barrier.pc, self->pc))
      fail("divergence", "__syncthreads here while other threads of the block wait in that at %s",
           place(barrier.pc).c_str());
  } else {
    barrier.expected = threads, barrier.plain = plain, barrier.pc = self->pc;
  }
  barrier.arrived++;
  gather(barrier.clock, barrier.fenced, *self);
  tick();
  if (wait) barrier.waiting.push_back(self);
  u32 present = plain ? self->block->num_threads : threads;
  if (barrier.arrived == present)
    complete(barrier);
  else if (wait)
    wait_for(Wait::BARRIER, id, 0, name);
}

}  // namespace

void sync_threads() {
  EMULATOR_ENTER();
  arrive("__syncthreads, barrier", 0, (self->block->num_threads + WARP - 1) / WARP * WARP, true, true);
}

uint32_t sync_threads_vote(bool predicate, int mode) {
  EMULATOR_ENTER();
  u32 &count = self->block->votes[self->block->vote_turn % 2];
  u32 turn = self->block->vote_turn;
  count += predicate;
  u32 threads = self->block->num_threads;
  if (self->block->barriers[0].arrived + 1 == threads) {  // the last one opens the next vote
    self->block->vote_turn++;
    self->block->votes[self->block->vote_turn % 2] = 0;
  }
  arrive("__syncthreads, barrier", 0, (threads + WARP - 1) / WARP * WARP, true, true);
  u32 total = self->block->votes[turn % 2];
  return mode == SYNC_COUNT ? total : mode == SYNC_AND ? total == threads : total != 0;
}

void named_barrier(const char *name, uint32_t id, uint32_t threads, bool wait) {
  EMULATOR_ENTER();
  arrive(name, id, threads, wait, false);
}

}  // namespace emulator

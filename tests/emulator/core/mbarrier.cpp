// mbarriers: arrivals and transaction bytes, phases, and what an arrival makes known to those who wait.
#include <cstring>

#include "async.h"
#include "report.h"
#include "shadow.h"

namespace emulator {

namespace {

constexpr u32 MAX_COUNT = (1u << 20) - 1;
u64 mark_of(u32 address) { return 0x6d62617272696572ull ^ address; }

}  // namespace

Mbarrier &live_mbarrier(u32 address, const char *instruction) {
  u8 *p = shared_at(address, 8, 8, instruction);
  auto found = self->block->mbarriers.find(address);
  if (found == self->block->mbarriers.end())
    fail("mbarrier", "%s: no mbarrier was initialised at shared+%u", instruction, address - SHARED_BASE);
  Mbarrier &m = found->second;
  u64 value;
  memcpy(&value, p, 8);
  if (value != mark_of(address))
    fail("mbarrier", "%s: the mbarrier at shared+%u was overwritten", instruction, address - SHARED_BASE);
  if (m.init_slot != self->index && self->clock.of(m.init_slot) < m.init_tick)
    fail("race", "%s of the mbarrier at shared+%u is not ordered after its initialisation by %s at %s",
         instruction, address - SHARED_BASE, who(*self->block, m.init_slot).c_str(),
         place_of(m.init_pc).c_str());
  return m;
}

void advance_mbarrier(Block &block, u32 address, Mbarrier &m) {
  if (m.pending || m.bytes) return;
  m.phase++;
  m.pending = m.count;
  m.complete = m.gathering;
  m.gathering = Clock();
  for (int space = 0; space < 2; space++) {
    m.complete_fenced[space] = m.gathering_fenced[space];
    m.gathering_fenced[space] = Clock();
  }
  for (u32 t = 0; t < block.num_threads; t++) {
    Thread &thread = block.threads[t];
    if (!thread.done && thread.wait == Wait::MBARRIER && thread.wait_on == address &&
        (m.phase & 1) != thread.wait_for)
      wake(thread);
  }
}

void mbarrier_init(uint32_t address, uint32_t count) {
  EMULATOR_ENTER();
  u8 *p = shared_at(address, 8, 8, "mbarrier.init");
  if (count == 0 || count > MAX_COUNT) fail("mbarrier", "mbarrier.init with a count of %u", count);
  if (self->block->mbarriers.count(address))
    fail("mbarrier", "mbarrier.init of the live mbarrier at shared+%u", address - SHARED_BASE);
  on_store(p, 8);
  u64 mark = mark_of(address);
  memcpy(p, &mark, 8);
  mark_mbarrier(p, true);
  Mbarrier m{};
  m.count = m.pending = count;
  m.init_slot = self->index, m.init_tick = self->warp->tick, m.init_pc = short_pc(self->pc);
  self->block->mbarriers[address] = m;
}

void mbarrier_invalidate(uint32_t address) {
  EMULATOR_ENTER();
  live_mbarrier(address, "mbarrier.inval");
  mark_mbarrier(self->block->shared + (address - SHARED_BASE), false);
  self->block->mbarriers.erase(address);
}

void mbarrier_arrive(uint32_t address, uint32_t count, uint32_t bytes, bool expects) {
  EMULATOR_ENTER();
  Mbarrier &m = live_mbarrier(address, expects ? "mbarrier.arrive.expect_tx" : "mbarrier.arrive");
  if (count == 0 || count > m.pending)
    fail("mbarrier", "the mbarrier at shared+%u takes %u arrivals a phase: %u more are left, %u come",
         address - SHARED_BASE, m.count, m.pending, count);
  if (bytes > MAX_COUNT) fail("mbarrier", "expect_tx of %u bytes", bytes);
  self->polled = 0;
  gather(m.gathering, m.gathering_fenced, *self);
  tick();
  m.bytes += bytes;
  m.pending -= count;
  advance_mbarrier(*self->block, address, m);
  maybe_yield();
}

void mbarrier_expect(uint32_t address, uint32_t bytes) {
  EMULATOR_ENTER();
  Mbarrier &m = live_mbarrier(address, "mbarrier.expect_tx");
  if (bytes > MAX_COUNT) fail("mbarrier", "expect_tx of %u bytes", bytes);
  m.bytes += bytes;
}

namespace {
void acquire_phase(const Mbarrier &m) {
  acquire(*self, m.complete);
  acquire_fenced(*self, m.complete_fenced);
}
}  // namespace

bool mbarrier_test(uint32_t address, uint32_t parity) {
  EMULATOR_ENTER();
  Mbarrier &m = live_mbarrier(address, "mbarrier.try_wait");
  // try_wait may block: asked the same twice in a row, with nothing between, it is a spin.
  u64 question = address * 2 + (parity & 1), phase = m.phase;
  if ((phase & 1) == (parity & 1) && self->polled == question && self->polled_value == phase)
    wait_for(Wait::MBARRIER, address, parity & 1, "mbarrier.try_wait");
  self->polled = question, self->polled_value = phase;
  Mbarrier &after = self->block->mbarriers[address];
  bool done = (after.phase & 1) != (parity & 1);
  if (done) acquire_phase(after);
  return done;
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  EMULATOR_ENTER();
  live_mbarrier(address, "mbarrier.try_wait");
  while ((self->block->mbarriers[address].phase & 1) == (parity & 1))
    wait_for(Wait::MBARRIER, address, parity & 1, "mbarrier.try_wait");
  acquire_phase(self->block->mbarriers[address]);
}

// Makes initialisations that this thread knows of visible to asynchronous copies.
void fence_mbarrier_init() {
  EMULATOR_ENTER();
  for (auto &entry : self->block->mbarriers) {
    Mbarrier &m = entry.second;
    if (m.fenced || (m.init_slot != self->index && self->clock.of(m.init_slot) < m.init_tick)) continue;
    m.fenced = true, m.fence_slot = self->index, m.fence_tick = self->warp->tick;
  }
  tick();
}

}  // namespace emulator

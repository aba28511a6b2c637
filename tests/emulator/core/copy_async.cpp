// cp.async: copies of one thread, grouped by commit, landed at the latest by the wait that covers them.
#include <cstring>

#include "async.h"
#include "report.h"
#include "shadow.h"

namespace emulator {

u8 *shared_at(u32 address, u32 bytes, u32 alignment, const char *instruction) {
  i64 offset = (i64)address - SHARED_BASE;
  if (offset < 0 || offset + bytes > launch->shared_bytes)
    fail("out of bounds", "%s of %u bytes at shared%+lld, of %u bytes of shared memory", instruction, bytes,
         (long long)offset, launch->shared_bytes);
  if (address % alignment)
    fail("misaligned", "%s at shared+%lld, which is not %u-byte aligned", instruction, (long long)offset,
         alignment);
  return self->block->shared + offset;
}

u32 shared_address(const void *p) {
  EMULATOR_ENTER();
  i64 offset = (const u8 *)p - self->block->shared;
  if (offset < 0 || offset > launch->shared_bytes)
    fail("out of bounds",
         "an address at shared%+lld, of %u bytes of shared memory, taken as one in shared memory",
         (long long)offset, launch->shared_bytes);
  return SHARED_BASE + (u32)offset;
}

void *dynamic_shared(u32 alignment) {
  EMULATOR_ENTER();
  if ((u64)self->block->shared % alignment)
    fail("misaligned", "dynamic shared memory is %u-byte aligned here, not %u", 1024, alignment);
  return self->block->shared;
}

namespace {

void land(CopyAsync &copy) {
  if (copy.landed) return;
  copy.landed = true;
  u8 *to = self->block->shared + (copy.destination - SHARED_BASE);
  memcpy(to, copy.source, copy.source_bytes);
  memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace

void copy_async(uint32_t destination, const void *source, uint32_t bytes, uint32_t source_bytes) {
  EMULATOR_ENTER();
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("misuse", "cp.async of %u bytes", bytes);
  if (source_bytes > bytes) fail("misuse", "cp.async reads %u bytes for %u", source_bytes, bytes);
  u8 *to = shared_at(destination, bytes, bytes, "cp.async");
  if ((u64)source % bytes && source_bytes) fail("misaligned", "cp.async of %u bytes from %p", bytes, source);
  if (source_bytes) {
    if (is_shared(source)) fail("misuse", "cp.async reads global memory; this source is shared");
    on_load(source, source_bytes);
  }
  begin_copy(to, bytes);
  CopyAsync copy{destination, bytes, source_bytes, short_pc(self->pc), (const u8 *)source, false};
  Schedule &schedule = launch->schedule;
  if (schedule.async == Async::EAGER || (schedule.async == Async::RANDOM && schedule.draw(2))) land(copy);
  self->copies.push_back(copy);
}

void copy_async_commit() {
  EMULATOR_ENTER();
  self->copy_groups.push_back(std::move(self->copies));
  self->copies.clear();
}

static void wait_for_groups(int groups_left) {
  tick();  // what lands now was written now, not at an earlier tick that others may know
  while ((int)self->copy_groups.size() > groups_left) {
    for (CopyAsync &copy : self->copy_groups.front()) {
      land(copy);
      if (copy.source_bytes) on_load(copy.source, copy.source_bytes);  // it may have read as late as this
      end_copy(self->block->shared + (copy.destination - SHARED_BASE), copy.bytes);
    }
    self->copy_groups.pop_front();
  }
  maybe_yield();
}

void copy_async_wait(int groups_left) {
  EMULATOR_ENTER();
  wait_for_groups(groups_left);
}

void copy_async_wait_all() {
  EMULATOR_ENTER();
  self->copy_groups.push_back(std::move(self->copies));
  self->copies.clear();
  wait_for_groups(0);
}

void finish_thread_async() {
  for (auto &group : self->copy_groups)
    if (!group.empty())
      fail("unfinished", "a thread exits without waiting for its cp.async at %s",
           place_of(group[0].pc).c_str());
  if (!self->copies.empty())
    fail("unfinished", "a thread exits without waiting for its cp.async at %s",
         place_of(self->copies[0].pc).c_str());
  if (self->registers && !self->registers->pending.empty())
    fail("unfinished", "a thread exits without waiting for its wgmma at %s",
         place_of(self->registers->pending[0].pc).c_str());
  if (!self->bulk_stores.empty()) fail("unfinished", "a thread exits with a bulk store that it did not commit");
  for (auto &group : self->bulk_groups)
    for (u64 id : group) {
      const StoreAgents &store = launch->store_agents[id];
      if (!store.read_waited)
        fail("unfinished", "a thread exits while its bulk store at %s may still read shared memory",
             place(store.pc).c_str());
    }
}

}  // namespace emulator

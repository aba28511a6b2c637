// Atomics, ordered loads and stores, fences: how blocks tell each other things.
//
// The model is that of C++: a release publishes what the thread knows at the place it writes; an acquire that
// reads the value takes it; relaxed operations do so together with fences before the write and after the read.
#include <cmath>
#include <cstring>

#include "async.h"
#include "report.h"
#include "shadow.h"

namespace emulator {

namespace {

u32 width_of(AtomicType type) {
  switch (type) {
    case TYPE_I64:
    case TYPE_U64:
    case TYPE_F64: return 8;
    case TYPE_F16:
    case TYPE_BF16: return 2;
    default: return 4;
  }
}

template <class T>
u64 combine_as(AtomicOperation operation, u64 old_bits, u64 bits, u64 compare_bits) {
  T old, value, compare, result;
  memcpy(&old, &old_bits, sizeof(T));
  memcpy(&value, &bits, sizeof(T));
  memcpy(&compare, &compare_bits, sizeof(T));
  switch (operation) {
    case ATOMIC_ADD: result = (T)(old + value); break;
    case ATOMIC_MIN: result = value < old ? value : old; break;
    case ATOMIC_MAX: result = value > old ? value : old; break;
    case ATOMIC_CAS: result = memcmp(&old, &compare, sizeof(T)) == 0 ? value : old; break;
    default: result = value;
  }
  u64 out = 0;
  memcpy(&out, &result, sizeof(T));
  return out;
}

u64 combine(AtomicOperation operation, AtomicType type, u64 old, u64 value, u64 compare) {
  if (operation == ATOMIC_AND) return old & value;
  if (operation == ATOMIC_OR) return old | value;
  if (operation == ATOMIC_XOR) return old ^ value;
  switch (type) {
    case TYPE_I32: return combine_as<int32_t>(operation, old, value, compare);
    case TYPE_U32: return combine_as<u32>(operation, old, value, compare);
    case TYPE_I64: return combine_as<i64>(operation, old, value, compare);
    case TYPE_U64: return combine_as<u64>(operation, old, value, compare);
    case TYPE_F32: return combine_as<float>(operation, old, value, compare);
    case TYPE_F64: return combine_as<double>(operation, old, value, compare);
    case TYPE_F16: return to_float16(from_float16((u16)old) + from_float16((u16)value));
    default: return to_bfloat16(from_bfloat16((u16)old) + from_bfloat16((u16)value));
  }
}

u64 read_bytes(const void *p, u32 bytes) {
  u64 value = 0;
  memcpy(&value, p, bytes);
  return value;
}

void check_address(const void *p, u32 bytes, const char *what) {
  if ((u64)p % bytes) fail("misaligned", "%s of %u bytes at %s", what, bytes, name_of(p).c_str());
}

Release &release_of(Released &released, u32 block) {
  for (Release &release : released)
    if (release.block == block) return release;
  released.push_back({block, Clock(), {}});
  return released.back();
}

// What `self` publishes at p: all it knows (release), what it knew at its last release fence (relaxed), or
// nothing.
void publish(const void *p, bool release, bool replaces) {
  if (replaces) launch->released.erase((u64)p);  // an atomic, in contrast, continues what was released here
  if (!release && !self->released_by_fence) return;
  Released &released = launch->released[(u64)p];
  Release &mine = release_of(released, self->block->index);
  if (release) {
    mine.clock.join(published(*self));
    for (int space = 0; space < 2; space++) mine.fenced[space].join(self->fenced[space]);
    tick();
  } else {
    mine.clock.join(self->release_fence);
    for (int space = 0; space < 2; space++) mine.fenced[space].join(self->fenced[space]);
  }
}

void take(const Release &release) {
  Block &block = *self->block;
  self->clock.join_across(block.index, release.block, release.clock, block.slots());
  for (int space = 0; space < 2; space++)
    self->fenced[space].join_across(block.index, release.block, release.fenced[space], block.slots());
}

void observe(const void *p, bool acquire) {
  auto found = launch->released.find((u64)p);
  if (found == launch->released.end()) return;
  for (const Release &release : found->second)
    if (acquire)
      take(release);
    else
      self->relaxed.push_back(release);
}

// Threads that spin on p run again.
void wake_pollers(const void *p) {
  for (u32 i = 0; i < launch->schedule.resident; i++) {
    Block &block = resident[i];
    if (!block.running) continue;
    for (u32 t = 0; t < block.num_threads; t++) {
      Thread &thread = block.threads[t];
      if (!thread.done && thread.wait == Wait::POLL && thread.wait_on == (u64)p) wake(thread);
    }
  }
}

// The same load, or atomic that changes nothing, with the same result twice in a row is a spin: the thread goes
// on when the flag is written.
void wait_if_spinning(const void *p, u64 value) {
  if (self->polled == (u64)p && self->polled_value == value) {
    std::string name = name_of(p);
    wait_for(Wait::POLL, (u64)p, value, name.c_str());
  }
}

}  // namespace

uint64_t atomic(AtomicOperation operation, AtomicType type, void *p, uint64_t value, uint64_t compare,
                MemoryOrder order) {
  EMULATOR_ENTER();
  maybe_yield();
  u32 bytes = width_of(type);
  check_address(p, bytes, "an atomic");
  u64 now = read_bytes(p, bytes);
  if (combine(operation, type, now, value, compare) == now) wait_if_spinning(p, now);
  on_access(p, bytes, {true, true});
  u64 old = read_bytes(p, bytes);
  u64 result = combine(operation, type, old, value, compare);
  memcpy(p, &result, bytes);
  observe(p, order & ACQUIRE);
  publish(p, order & RELEASE, false);
  if (result != old) wake_pollers(p);
  self->polled = result == old ? (u64)p : 0, self->polled_value = old;
  return old;
}

void atomic_vector_add(AtomicType type, void *p, const void *values, int count) {
  EMULATOR_ENTER();
  u32 bytes = width_of(type);
  check_address(p, bytes * (u32)count, "a vector reduction");
  on_access(p, bytes * (u32)count, {true, true});
  for (int i = 0; i < count; i++) {
    u8 *at = (u8 *)p + (u32)i * bytes;
    u64 result = combine(ATOMIC_ADD, type, read_bytes(at, bytes),
                         read_bytes((const u8 *)values + (u32)i * bytes, bytes), 0);
    memcpy(at, &result, bytes);
    publish(at, false, false);
  }
}

uint64_t load_ordered(const void *p, uint32_t bytes, MemoryOrder order) {
  EMULATOR_ENTER();
  maybe_yield();
  check_address(p, bytes, "a load");
  wait_if_spinning(p, read_bytes(p, bytes));
  on_access(p, bytes, {false, true});
  u64 value = read_bytes(p, bytes);
  observe(p, order & ACQUIRE);
  self->polled = (u64)p, self->polled_value = value;
  return value;
}

void store_ordered(void *p, uint64_t value, uint32_t bytes, MemoryOrder order) {
  EMULATOR_ENTER();
  maybe_yield();
  check_address(p, bytes, "a store");
  on_access(p, bytes, {true, true});
  memcpy(p, &value, bytes);
  publish(p, order & RELEASE, true);
  wake_pollers(p);
}

void memory_fence(MemoryOrder order) {
  EMULATOR_ENTER();
  if (order & ACQUIRE) {
    for (const Release &release : self->relaxed) take(release);
    self->relaxed.clear();
  }
  if (order & RELEASE) {
    self->release_fence = published(*self);
    self->released_by_fence = true;
    tick();
  }
}

}  // namespace emulator

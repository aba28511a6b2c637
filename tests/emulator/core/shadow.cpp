#include "shadow.h"

#include <cstdio>
#include <cstdlib>

#include "report.h"

namespace emulator {

namespace {

// "q+64": the array, and the distance from its first element in bytes.
std::string name_in(const Buffer &buffer, u64 offset) {
  u8 owner = buffer.owners[offset >> buffer.shift];
  if (!owner) return "memory at " + std::to_string((u64)buffer.data + offset);
  const Array &array = launch->arrays[owner - 1];
  i64 distance = (i64)((u64)buffer.data + offset - array.origin);
  return array.name + (distance < 0 ? "" : "+") + std::to_string(distance);
}

// Who looks at a cell: `slot` of the running block acts, with what one thread knows.
struct Viewpoint {
  u32 block, slot;
  const Clock &clock;
  const Clock &fenced;
  u32 tick;
  Access access;
};

const char *verb(Access access) {
  if (access.async) return access.write ? "asynchronous write" : "asynchronous read";
  if (access.atomic) return access.write ? "atomic" : "atomic read";
  return access.write ? "write" : "read";
}

bool known(const Viewpoint &view, u32 block, u32 slot, u32 tick) {
  if (block == view.block) return slot == view.slot || view.clock.of(slot) >= tick;
  return view.clock.of(block, slot) >= tick;
}

// ---- what is wrong, in words
[[noreturn]] void fail_writer(const Viewpoint &view, const Cell &cell, const std::string &name) {
  std::string other = place_of(cell.writer_pc);
  if (cell.flags & PENDING)
    fail("early use", "%s of %s, the destination of a cp.async at %s that was not waited for",
         verb(view.access), name.c_str(), other.c_str());
  if (cell.writer_block != view.block)
    fail("race between blocks", "%s of %s is not ordered after a write by %s at %s", verb(view.access),
         name.c_str(), who_in(cell.writer_block, cell.writer_slot).c_str(), other.c_str());
  if (cell.writer_slot >= self->block->num_threads)
    fail("early use", "%s of %s, the destination of an asynchronous copy at %s whose end was not waited for",
         verb(view.access), name.c_str(), other.c_str());
  fail("race", "%s of %s is not ordered after a write by %s at %s", verb(view.access), name.c_str(),
       who(*self->block, cell.writer_slot).c_str(), other.c_str());
}

[[noreturn]] void fail_reader(const Viewpoint &view, const Reads &reads, u32 slot, const std::string &name) {
  std::string other = place_of(reads.pc);
  if (reads.block != view.block)
    fail("race between blocks", "%s of %s is not ordered after a read by %s at %s", verb(view.access),
         name.c_str(), who_in(reads.block, slot).c_str(), other.c_str());
  if (slot >= self->block->num_threads)
    fail("early overwrite", "%s of %s, which an asynchronous operation issued at %s may still read",
         verb(view.access), name.c_str(), other.c_str());
  fail("race", "%s of %s is not ordered after a read by %s at %s", verb(view.access), name.c_str(),
       who(*self->block, slot).c_str(), other.c_str());
}

[[noreturn]] void fail_proxy(const Viewpoint &view, const Cell &cell, const std::string &name) {
  fail("missing proxy fence", "%s of %s meets an ordinary write by %s at %s with no fence.proxy.async between",
       verb(view.access), name.c_str(), who_in(cell.writer_block, cell.writer_slot).c_str(),
       place_of(cell.writer_pc).c_str());
}

// ---- one cell
void check_reads(const Viewpoint &view, const Reads &reads, const std::string &name) {
  if (view.access.atomic && reads.atomic) return;
  for (u32 lanes = reads.lanes; lanes; lanes &= lanes - 1) {
    u32 slot = reads.first + __builtin_ctz(lanes);
    if (!known(view, reads.block, slot, reads.tick)) fail_reader(view, reads, slot, name);
  }
}

void check_writer(const Viewpoint &view, const Cell &cell, const std::string &name) {
  if (cell.flags & PENDING) fail_writer(view, cell, name);
  if (cell.writer_block == NOBODY) return;
  bool both_atomic = view.access.atomic && cell.flags & BY_ATOMIC;
  if (!both_atomic && !known(view, cell.writer_block, cell.writer_slot, cell.writer_tick))
    fail_writer(view, cell, name);
  if (!both_atomic && cell.flags & MANY_ATOMICS)
    for (const Writer &w : launch->atomic_writers[&cell])
      if (!known(view, w.block, w.slot, w.tick)) {
        Cell earlier = cell;
        earlier.writer_block = w.block, earlier.writer_slot = w.slot, earlier.writer_pc = w.pc;
        fail_writer(view, earlier, name);
      }
  // The writer's own fence covers its write only up to the fence, so its slot is no exception here.
  u32 fenced = cell.writer_block == view.block ? view.fenced.of(cell.writer_slot)
                                               : view.fenced.of(cell.writer_block, cell.writer_slot);
  if (view.access.async && !(cell.flags & BY_ASYNC) && fenced < cell.writer_tick) fail_proxy(view, cell, name);
}

struct Namer {  // names cost time: made only for a failure
  const Buffer *buffer;
  u64 offset;
  operator std::string() const {
    return buffer ? name_in(*buffer, offset) : "shared+" + std::to_string(offset);
  }
};

void check(const Viewpoint &view, const Cell &cell, const Namer &namer) {
  bool suspicious =
      cell.flags & (PENDING | MBARRIER | MANY_ATOMICS) || !(cell.flags & WRITTEN) ||
      (view.access.async && !(cell.flags & BY_ASYNC)) ||
      (cell.writer_block != NOBODY && !known(view, cell.writer_block, cell.writer_slot, cell.writer_tick));
  if (suspicious) {
    std::string name = namer;
    if (cell.flags & MBARRIER)
      fail("mbarrier", "%s of %s, where a live mbarrier lies", verb(view.access), name.c_str());
    if (cell.flags & WRITTEN || cell.flags & PENDING)
      check_writer(view, cell, name);
    else if (!view.access.write || view.access.atomic)
      fail("uninitialised", "%s of %s, which was never written", verb(view.access), name.c_str());
  }
  if (!view.access.write || !cell.reads.lanes) return;
  auto ordered = [&](const Reads &reads) {
    for (u32 lanes = reads.lanes; lanes; lanes &= lanes - 1)
      if (!known(view, reads.block, reads.first + __builtin_ctz(lanes), reads.tick)) return false;
    return true;
  };
  if (!ordered(cell.reads)) check_reads(view, cell.reads, namer);
  if (cell.more)
    for (const Reads &reads : *cell.more)
      if (!ordered(reads)) check_reads(view, reads, namer);
}

void record_write(const Viewpoint &view, Cell &cell) {
  if (view.access.atomic && cell.flags & BY_ATOMIC && cell.writer_block != NOBODY &&
      !known(view, cell.writer_block, cell.writer_slot, cell.writer_tick)) {
    launch->atomic_writers[&cell].push_back(
        {cell.writer_block, cell.writer_tick, cell.writer_pc, cell.writer_slot});
    cell.flags |= MANY_ATOMICS;
  } else if (cell.flags & MANY_ATOMICS && !view.access.atomic) {
    launch->atomic_writers.erase(&cell);
    cell.flags &= ~MANY_ATOMICS;
  }
  cell.writer_block = view.block, cell.writer_slot = (u16)view.slot, cell.writer_tick = view.tick;
  cell.writer_pc = short_pc(self->pc);
  u16 many = cell.flags & MANY_ATOMICS;
  cell.flags =
      (u16)(WRITTEN | many | (view.access.async ? BY_ASYNC : 0) | (view.access.atomic ? BY_ATOMIC : 0));
  if (view.access.atomic) return;  // atomic reads stay: a plain write after this must still know them
  cell.reads.lanes = 0;
  if (cell.more) cell.more->clear();
}

bool same_group(const Reads &a, const Reads &b) {
  return a.block == b.block && a.first == b.first && a.tick == b.tick && a.atomic == b.atomic;
}

// A read that this one comes after adds nothing: who knows this one knows that one.
bool subsumed(const Viewpoint &view, const Reads &reads, const Reads &by) {
  if (reads.atomic != by.atomic) return false;
  for (u32 lanes = reads.lanes; lanes; lanes &= lanes - 1)
    if (!known(view, reads.block, reads.first + __builtin_ctz(lanes), reads.tick)) return false;
  return true;
}

void record_read(const Viewpoint &view, Cell &cell, const Reads &read) {
  if (!cell.reads.lanes) {
    cell.reads = read;
    return;
  }
  if (same_group(cell.reads, read)) {
    cell.reads.lanes |= read.lanes;
    return;
  }
  if (cell.more)
    for (Reads &reads : *cell.more)
      if (same_group(reads, read)) {
        reads.lanes |= read.lanes;
        return;
      }
  if (subsumed(view, cell.reads, read)) {
    cell.reads = read;
    return;
  }
  if (!cell.more) cell.more = new std::vector<Reads>;
  for (Reads &reads : *cell.more)
    if (subsumed(view, reads, read)) {
      reads = read;
      return;
    }
  cell.more->push_back(read);
}

// ---- where an address lies
struct Span {
  Cell *cells;  // nullptr: a read-only buffer
  u32 count;
  u32 shift;
  u64 first;  // index of the first granule
  const Buffer *buffer;
};

// The nearest array to an address that belongs to none.
std::string nearest(const u8 *p) {
  u64 best = 1 << 22;
  std::string name = "no array is near";
  u64 shared = (u64)(p - self->block->shared);
  if (shared - launch->shared_bytes < best) {
    best = shared - launch->shared_bytes;
    name = "shared+" + std::to_string(shared) + ", of " + std::to_string(launch->shared_bytes) +
           " bytes of shared memory";
  }
  for (const Buffer *buffer : launch->buffers) {
    i64 offset = p - buffer->data;
    for (u64 g = 0; g < buffer->owners.size(); g++) {
      u64 distance = (u64)llabs(offset - (i64)(g << buffer->shift));
      if (!buffer->owners[g] || distance >= best) continue;
      const Array &array = launch->arrays[buffer->owners[g] - 1];
      i64 from = p - (const u8 *)array.origin;
      best = distance;
      name = array.name + (from < 0 ? "" : "+") + std::to_string(from);
    }
  }
  return name;
}

void check_rights(const Buffer &buffer, u64 offset, u32 bytes, Access access) {
  for (u64 g = offset >> buffer.shift; g <= (offset + bytes - 1) >> buffer.shift; g++) {
    u8 owner = buffer.owners[g];
    if (!owner)
      fail("out of bounds", "%s of %u bytes at %s, beside the array's elements", verb(access), bytes,
           nearest(buffer.data + (g << buffer.shift)).c_str());
    if (access.write && !launch->arrays[owner - 1].writable)
      fail("write to an input", "%s of %u bytes at %s, which the kernel may only read", verb(access), bytes,
           name_in(buffer, offset).c_str());
  }
}

[[noreturn]] void fail_granule(u32 bytes) {
  fail("granule", "%u", bytes);  // not an error of the kernel: the launcher tries again with a finer shadow
}

Span span_of(const void *p, u32 bytes, Access access) {
  u64 offset = (u64)((const u8 *)p - self->block->shared);
  if (offset < launch->shared_bytes) {
    if (offset + bytes > launch->shared_bytes)
      fail("out of bounds", "%s of %u bytes at shared+%llu, of %u bytes of shared memory", verb(access), bytes,
           (unsigned long long)offset, launch->shared_bytes);
    u32 shift = launch->shared_shift;
    if ((offset | bytes) & ((1u << shift) - 1)) fail_granule(bytes);
    return {&self->block->cells[offset >> shift], ((bytes - 1) >> shift) + 1, shift, offset >> shift, nullptr};
  }
  Buffer &buffer = buffer_of(p, bytes, verb(access));
  offset = (u64)((const u8 *)p - buffer.data);
  check_rights(buffer, offset, bytes, access);
  u64 first = offset >> buffer.shift, last = (offset + bytes - 1) >> buffer.shift;
  return {buffer.cells.empty() ? nullptr : &buffer.cells[first], (u32)(last - first + 1), buffer.shift, first,
          &buffer};
}

void visit(const Viewpoint &view, const Span &span, const Reads &read) {
  for (u32 i = 0; i < span.count; i++) {
    Cell &cell = span.cells[i];
    check(view, cell, Namer{span.buffer, (span.first + i) << span.shift});
    if (view.access.write)
      record_write(view, cell);
    else
      record_read(view, cell, read);
  }
}

// The kernel's own tables, and its arguments.
bool is_constant(const void *p) {
  return (u64)p - launch->module_begin < launch->module_end - launch->module_begin ||
         (u64)p - (u64)launch->arguments < launch->argument_bytes;
}

bool on_stack(const void *p) { return self->stack.contains((u64)p); }

// ---- registers in use by wgmma
void check_registers(u64 begin, u64 end, bool write) {
  for (const RegisterRange &range : self->registers->pending)
    if (begin < range.end && range.begin < end && (write || range.accumulator))
      fail("wgmma registers", "%s of %s register of the wgmma at %s before wgmma.wait_group",
           write ? "write" : "read", range.accumulator ? "an accumulator" : "an operand",
           place_of(range.pc).c_str());
}

void on_stack_access(const void *p, u32 bytes, bool write) {
  Registers &registers = *self->registers;
  u64 begin = (u64)p, end = begin + bytes;
  if (begin < registers.highest && registers.lowest < end) check_registers(begin, end, write);
  if (write) note_register_write(p, bytes);
}

}  // namespace

bool is_shared(const void *p) { return (u64)((const u8 *)p - self->block->shared) < launch->shared_bytes; }

std::string name_of(const void *p) {
  if (is_shared(p)) return "shared+" + std::to_string((const u8 *)p - self->block->shared);
  const Buffer &buffer = buffer_of(p, 1, "use");
  return name_in(buffer, (u64)((const u8 *)p - buffer.data));
}

Buffer &buffer_of(const void *p, u64 bytes, const char *what) {
  const u8 *q = (const u8 *)p;
  Buffer *buffer = launch->last_buffer;
  if (!buffer || (u64)(q - buffer->data) >= buffer->bytes) {
    buffer = nullptr;
    for (Buffer *candidate : launch->buffers)
      if ((u64)(q - candidate->data) < candidate->bytes) buffer = candidate;
    if (!buffer)
      fail("out of bounds", "%s of %llu bytes at %s (address %p)", what, (unsigned long long)bytes,
           nearest(q).c_str(), p);
    launch->last_buffer = buffer;
  }
  u64 offset = (u64)(q - buffer->data);
  if (offset + bytes > buffer->bytes)
    fail("out of bounds", "%s of %llu bytes at %s, which end outside its memory", what,
         (unsigned long long)bytes, nearest(q).c_str());
  return *buffer;
}

constexpr u64 ENDLESS =
    30'000'000;  // accesses of one thread without a wait: seconds here, for kernels this small

void on_access(const void *p, u32 bytes, Access access) {
  Block &block = *self->block;
  if (++launch->accesses > ENDLESS)
    fail("deadlock",
         "a thread spins: %llu accesses without a wait that the emulator knows (an ordered load, an atomic)",
         (unsigned long long)ENDLESS);
  if (!is_shared(p)) {
    if (on_stack(p)) {
      if (self->registers) on_stack_access(p, bytes, access.write);
      return;
    }
    if (!access.write && is_constant(p)) return;
  }
  Span span = span_of(p, bytes, access);
  if (!span.cells) return;
  u32 tick = self->warp->tick;
  Reads read{block.index,  tick, 1u << self->lane, short_pc(self->pc), (u16)(self->warp->index * WARP),
             access.atomic};
  if (!access.write && !access.async) {
    // What a lane reads again in the same tick was checked the first time: a write since would have erased it.
    bool again = true;
    for (u32 i = 0; i < span.count && again; i++)
      again = span.cells[i].reads.lanes & read.lanes && same_group(span.cells[i].reads, read);
    if (again) return;
  }
  visit({block.index, self->index, self->clock, self->fenced[span.buffer != nullptr], tick, access}, span,
        read);
}

void on_load(const void *p, u32 bytes) { on_access(p, bytes, {false}); }
void on_store(const void *p, u32 bytes) { on_access(p, bytes, {true}); }

void on_async_access(const void *p, u32 bytes, Access access, u32 agent) {
  access.async = true;
  Span span = span_of(p, bytes, access);
  if (!span.cells) return;
  Block &block = *self->block;
  u32 tick = agent_tick(block, agent);
  const Clock &fenced = self->fenced[span.buffer != nullptr];
  Reads read{block.index, tick, 1, short_pc(self->pc), (u16)agent, 0};
  for (u32 i = 0; i < span.count; i++) {
    Cell &cell = span.cells[i];
    check({block.index, self->index, self->clock, fenced, tick, access}, cell,
          Namer{span.buffer, (span.first + i) << span.shift});
    Viewpoint view{block.index, agent, self->clock, fenced, tick, access};
    if (access.write)
      record_write(view, cell);
    else
      record_read(view, cell, read);
  }
}

void on_product_read(const void *p, u32 bytes, u32 agent) {
  Access access{false, false, true};
  Span span = span_of(p, bytes, access);
  Block &block = *self->block;
  u32 tick = agent_tick(block, agent);
  Thread *mine = self;
  for (u32 i = 0; i < span.count; i++) {
    Cell &cell = span.cells[i];
    Namer namer{span.buffer, (span.first + i) << span.shift};
    const void *clock = nullptr, *fenced = nullptr;
    for (u32 lane = 0; lane < WARP; lane++) {
      Thread &thread = block.threads[mine->warp->index * WARP + lane];
      // Lanes mostly share what they know.
      bool writer_in_warp = cell.writer_slot / WARP == mine->warp->index;
      if (lane && !writer_in_warp && clock == thread.clock.identity() && fenced == thread.fenced[0].identity())
        continue;
      clock = thread.clock.identity(), fenced = thread.fenced[0].identity();
      check({block.index, thread.index, thread.clock, thread.fenced[0], tick, access}, cell, namer);
    }
    record_read({block.index, agent, mine->clock, mine->fenced[0], tick, access}, cell,
                {block.index, tick, 1, short_pc(mine->pc), (u16)agent, 0});
  }
}

void begin_copy(const void *p, u32 bytes) {
  Span span = span_of(p, bytes, {true});
  Viewpoint view{self->block->index, self->index, self->clock, self->fenced[0], self->warp->tick, {true}};
  for (u32 i = 0; i < span.count; i++) {
    check(view, span.cells[i], Namer{nullptr, (span.first + i) << span.shift});
    record_write(view, span.cells[i]);
    span.cells[i].flags |= PENDING;
  }
}

void end_copy(const void *p, u32 bytes) {
  Span span = span_of(p, bytes, {true});
  for (u32 i = 0; i < span.count; i++) {
    span.cells[i].flags &= (u16)~PENDING;
    span.cells[i].writer_tick = self->warp->tick;
  }
}

void mark_mbarrier(const void *p, bool live) {
  Span span = span_of(p, 8, {true});
  for (u32 i = 0; i < span.count; i++)
    if (live)
      span.cells[i].flags |= MBARRIER;
    else
      span.cells[i].flags &= (u16)~MBARRIER;
}

void watch_registers() {
  if (self->registers) return;
  self->registers = std::make_unique<Registers>();
  self->registers->written.assign(Stack::BYTES / 4, 0);
}

void note_register_write(const void *p, u32 bytes) {
  Registers &registers = *self->registers;
  u64 first = (u64)((const u8 *)p - self->stack.base) / 4,
      last = (u64)((const u8 *)p + bytes - 1 - self->stack.base) / 4;
  for (u64 i = first; i <= last; i++) registers.written[i] = registers.fences;
}

void clear_cells(std::vector<Cell> &cells, size_t n) {
  for (Cell &cell : cells) delete cell.more;
  cells.assign(n, Cell{NOBODY, 0, 0, 0, 0, {}, nullptr});
}

}  // namespace emulator

// Bulk copies: cp.async.bulk and TMA tensor copies, in the async proxy.
#include <cmath>
#include <cstring>

#include "async.h"
#include "report.h"
#include "shadow.h"
#include "tensor_map.h"

namespace emulator {

namespace {

Bulk &begin(Bulk::Kind kind) {
  Block &block = *self->block;
  block.in_flight.push_back({});
  Bulk &bulk = block.in_flight.back();
  bulk.kind = kind;
  bulk.id = ++launch->operations;
  bulk.pc = self->pc;
  bulk.issuer = self;
  bulk.agent = new_agent(block), bulk.tick = agent_tick(block, bulk.agent);
  bulk.read_agent = new_agent(block), bulk.read_tick = agent_tick(block, bulk.read_agent);
  if (kind == Bulk::LOAD) {
    block.load_ticks[bulk.agent - block.num_threads] = bulk.tick;
    block.load_pcs[bulk.agent - block.num_threads] = bulk.pc;
  }
  return bulk;
}

// Every access of a piece is checked now, at issue; the bytes move later.
void add_piece(Bulk &bulk, u8 *to, const u8 *from, u32 bytes) {
  if (from) on_async_access(from, bytes, {false}, bulk.read_agent);
  on_async_access(to, bytes, {true, bulk.kind == Bulk::REDUCE}, bulk.agent);
  if (!bulk.pieces.empty()) {
    Bulk::Piece &last = bulk.pieces.back();
    if (from && last.from && last.to + last.bytes == to && last.from + last.bytes == from) {
      last.bytes += bytes;
      return;
    }
  }
  bulk.pieces.push_back({to, from, bytes});
}

void check_mbarrier_fence(u32 address, const char *instruction) {
  Mbarrier &m = live_mbarrier(address, instruction);
  if (!m.fenced || (m.fence_slot != self->index && self->clock.of(m.fence_slot) < m.fence_tick))
    fail("missing mbarrier fence",
         "%s reports to the mbarrier at shared+%u, initialised at %s, with no fence.mbarrier_init or "
         "fence.proxy.async "
         "between",
         instruction, address - SHARED_BASE, place_of(m.init_pc).c_str());
}

template <class T>
void add(u8 *to, const u8 *from) {
  T a, b;
  memcpy(&a, to, sizeof(T));
  memcpy(&b, from, sizeof(T));
  a += b;
  memcpy(to, &a, sizeof(T));
}

void combine_16(u8 *to, const u8 *from, int operation) {
  u16 a, b;
  memcpy(&a, to, 2);
  memcpy(&b, from, 2);
  if (operation == BULK_ADD_BF16)
    a = to_bfloat16(from_bfloat16(a) + from_bfloat16(b));
  else if (operation == BULK_ADD_F16)
    a = to_float16(from_float16(a) + from_float16(b));
  else if (operation == BULK_MIN_F16)
    a = to_float16(fminf(from_float16(a), from_float16(b)));
  else
    a = to_float16(fmaxf(from_float16(a), from_float16(b)));
  memcpy(to, &a, 2);
}

u32 reduce_width(int operation) {
  return operation == BULK_ADD_F64 ? 8 : operation == BULK_ADD_F32 || operation == BULK_ADD_U32 ? 4 : 2;
}

void reduce_bytes(u8 *to, const u8 *from, u32 bytes, int operation) {
  u32 width = reduce_width(operation);
  for (u32 i = 0; i < bytes; i += width) switch (operation) {
      case BULK_ADD_F32: add<float>(to + i, from + i); break;
      case BULK_ADD_F64: add<double>(to + i, from + i); break;
      case BULK_ADD_U32: add<u32>(to + i, from + i); break;
      default: combine_16(to + i, from + i, operation);
    }
}

// Moves the bytes. A load then reports to its mbarrier.
void land(Block &block, Bulk &bulk) {
  take_bulk_source(bulk);
  const u8 *from = bulk.taken.data();
  for (const Bulk::Piece &piece : bulk.pieces) {
    if (bulk.kind == Bulk::REDUCE)
      reduce_bytes(piece.to, from, piece.bytes, (int)bulk.element);
    else
      memcpy(piece.to, from, piece.bytes);
    from += piece.bytes;
  }
  if (bulk.kind != Bulk::LOAD) return;
  Mbarrier &m = block.mbarriers[bulk.mbarrier];
  m.gathering.raise(bulk.agent, bulk.tick, block.slots());
  m.gathering.raise(bulk.read_agent, bulk.read_tick, block.slots());
  m.bytes -= bulk.transaction;
  advance_mbarrier(block, bulk.mbarrier, m);
}

void land_at(Block &block, size_t i) {
  Bulk bulk = std::move(block.in_flight[i]);
  block.in_flight.erase(block.in_flight.begin() + (long)i);
  land(block, bulk);
}

void finish_issue() {
  Block &block = *self->block;
  if (launch->schedule.async == Async::EAGER) land_at(block, block.in_flight.size() - 1);
}

void finish_store(Bulk &bulk) {
  launch->store_agents[bulk.id] = {bulk.agent, bulk.tick, bulk.read_agent, bulk.read_tick, bulk.pc, false};
  self->bulk_stores.push_back(bulk.id);
  finish_issue();
}

// ---- tensors
struct Walk {  // one row of a box: contiguous in global and in shared memory
  u8 *global;  // nullptr: outside the tensor
  u32 shared_offset;
  u32 before, inside, after;  // bytes of the row outside, inside and outside the tensor
};

// The rows of a box from the innermost dimension outwards.
template <class Visit>
void walk_box(const TensorMap &map, const int *coordinates, Visit visit) {
  u32 rows = 1;
  for (u32 d = 1; d < map.rank; d++) rows *= map.box[d];
  u32 row_bytes = map.box[0] * map.element_bytes;
  for (u32 r = 0; r < rows; r++) {
    u32 rest = r;
    i64 offset = 0;
    bool outside = false;
    for (u32 d = 1; d < map.rank; d++) {
      i64 at = (i64)coordinates[d] + rest % map.box[d];
      rest /= map.box[d];
      outside |= at < 0 || at >= (i64)map.dims[d];
      offset += at * (i64)map.strides[d];
    }
    i64 begin = coordinates[0], end = begin + map.box[0];
    i64 first = begin<0 ? 0 : begin, last = end>(i64) map.dims[0] ? (i64)map.dims[0] : end;
    if (outside || last <= first) {
      visit(Walk{nullptr, r * row_bytes, row_bytes, 0, 0});
    } else {
      u32 e = map.element_bytes;
      visit(Walk{map.base + offset + first * e, r * row_bytes, (u32)(first - begin) * e,
                 (u32)(last - first) * e, (u32)(end - last) * e});
    }
  }
}

// Swizzles move 16-byte chunks, so no piece crosses one.
template <class Visit>
void in_chunks(u32 address, u32 bytes, u32 swizzle, Visit visit) {
  u32 done = 0;
  while (done < bytes) {
    u32 piece = 16 - (address + done) % 16;
    if (piece > bytes - done) piece = bytes - done;
    visit(swizzled(address + done, swizzle), done, piece);
    done += piece;
  }
}

const TensorMap &checked_map(const void *p, int rank, u32 shared, const char *instruction) {
  const TensorMap &map = *(const TensorMap *)p;
  if ((u64)p % 64) fail("misaligned", "%s: the tensor map is not 64-byte aligned", instruction);
  if (map.magic != TensorMap::MAGIC) fail("tensor map", "%s: this is no encoded tensor map", instruction);
  if ((int)map.rank != rank)
    fail("tensor map", "%s of rank %d with a map of rank %u", instruction, rank, map.rank);
  // A tile that does not start where the swizzle's pattern does is moved as the hardware does, but no kernel
  // wants it.
  shared_at(shared, map.box_bytes(), swizzle_pattern(map.swizzle), instruction);
  return map;
}

void store_tensor(Bulk::Kind kind, const void *p, u32 source, int rank, const int *coordinates,
                  const char *instruction) {
  const TensorMap &map = checked_map(p, rank, source, instruction);
  for (int axis = 0; axis < rank; ++axis) {  // an H200 stops with an illegal instruction; loads may begin there
    if (coordinates[axis] < 0)
      fail("tensor map", "%s: the box begins at %d along axis %d, before the tensor", instruction, coordinates[axis],
           axis);
  }
  Bulk &bulk = begin(kind);
  bulk.element = map.reduce_operation;
  walk_box(map, coordinates, [&](const Walk &row) {
    if (row.inside)
      in_chunks(source + row.shared_offset + row.before, row.inside, map.swizzle,
                [&](u32 at, u32 done, u32 bytes) {
                  add_piece(bulk, row.global + done, self->block->shared + (at - SHARED_BASE), bytes);
                });
  });
  finish_store(bulk);
}

}  // namespace

void take_bulk_source(Bulk &bulk) {
  if (bulk.read_done) return;
  bulk.read_done = true;
  for (const Bulk::Piece &piece : bulk.pieces) {
    size_t at = bulk.taken.size();
    bulk.taken.resize(at + piece.bytes, 0);
    if (piece.from) memcpy(&bulk.taken[at], piece.from, piece.bytes);
  }
}

bool land_one() {
  u32 places = launch->schedule.resident, first = launch->schedule.draw(places);
  for (u32 i = 0; i < places; i++) {
    Block &block = resident[(first + i) % places];
    if (!block.running || block.in_flight.empty()) continue;
    land_at(block, launch->schedule.draw((u32)block.in_flight.size()));
    return true;
  }
  return false;
}

void finish_block_async(Block &block) {
  for (u32 i = 0; i < AGENTS; i++) {
    bool waited = block.load_ticks[i] == 0;
    for (u32 t = 0; t < block.num_threads && !waited; t++)
      waited = block.threads[t].clock.of(block.num_threads + i) >= block.load_ticks[i];
    if (!waited)
      fail("unfinished", "the block ends and no thread has waited for the bulk load at %s",
           place(block.load_pcs[i]).c_str());
  }
  while (!block.in_flight.empty()) land_at(block, 0);  // stores whose source was read: memory gets them in time
  for (u32 w = 0; w < block.num_warps; w++)
    if (block.warps[w].products_issued != block.warps[w / 4 * 4].products_issued)
      fail("divergence", "warps %u and %u of a warpgroup issued %llu and %llu wgmmas", w / 4 * 4, w,
           (unsigned long long)block.warps[w / 4 * 4].products_issued,
           (unsigned long long)block.warps[w].products_issued);
}

void bulk_load(uint32_t destination, const void *source, uint32_t bytes, uint32_t mbarrier) {
  EMULATOR_ENTER();
  const char *name = "cp.async.bulk to shared memory";
  if (bytes % 16) fail("misaligned", "%s of %u bytes: no multiple of 16", name, bytes);
  if ((u64)source % 16)
    fail("misaligned", "%s from %s, which is not 16-byte aligned", name, name_of(source).c_str());
  check_mbarrier_fence(mbarrier, name);
  u8 *to = shared_at(destination, bytes, 16, name);
  Bulk &bulk = begin(Bulk::LOAD);
  bulk.mbarrier = mbarrier, bulk.transaction = bytes;
  if (bytes) add_piece(bulk, to, (const u8 *)source, bytes);
  finish_issue();
}

static void store_bulk(Bulk::Kind kind, void *destination, u32 source, u32 bytes, int operation,
                       const char *name) {
  if (bytes % 16) fail("misaligned", "%s of %u bytes: no multiple of 16", name, bytes);
  if ((u64)destination % 16)
    fail("misaligned", "%s to %s, which is not 16-byte aligned", name, name_of(destination).c_str());
  u8 *from = shared_at(source, bytes, 16, name);
  Bulk &bulk = begin(kind);
  bulk.element = (u32)operation;
  if (bytes) add_piece(bulk, (u8 *)destination, from, bytes);
  finish_store(bulk);
}

void bulk_store(void *destination, uint32_t source, uint32_t bytes) {
  EMULATOR_ENTER();
  store_bulk(Bulk::STORE, destination, source, bytes, 0, "cp.async.bulk to global memory");
}

void bulk_reduce(void *destination, uint32_t source, uint32_t bytes, BulkReduce operation) {
  EMULATOR_ENTER();
  store_bulk(Bulk::REDUCE, destination, source, bytes, operation, "cp.reduce.async.bulk");
}

void tensor_load(uint32_t destination, const void *p, uint32_t mbarrier, int rank, const int *coordinates) {
  EMULATOR_ENTER();
  const char *name = "cp.async.bulk.tensor to shared memory";
  const TensorMap &map = checked_map(p, rank, destination, name);
  check_mbarrier_fence(mbarrier, name);
  Bulk &bulk = begin(Bulk::LOAD);
  bulk.mbarrier = mbarrier, bulk.transaction = map.box_bytes();
  auto place_row = [&](u32 offset, const u8 *from, u32 bytes) {
    in_chunks(destination + offset, bytes, map.swizzle, [&](u32 at, u32 done, u32 piece) {
      add_piece(bulk, self->block->shared + (at - SHARED_BASE), from ? from + done : nullptr, piece);
    });
  };
  walk_box(map, coordinates, [&](const Walk &row) {
    place_row(row.shared_offset, nullptr, row.before);
    place_row(row.shared_offset + row.before, row.global, row.inside);
    place_row(row.shared_offset + row.before + row.inside, nullptr, row.after);
  });
  finish_issue();
}

void tensor_store(const void *map, uint32_t source, int rank, const int *coordinates) {
  EMULATOR_ENTER();
  store_tensor(Bulk::STORE, map, source, rank, coordinates, "cp.async.bulk.tensor to global memory");
}

void tensor_reduce_add(const void *map, uint32_t source, int rank, const int *coordinates) {
  EMULATOR_ENTER();
  store_tensor(Bulk::REDUCE, map, source, rank, coordinates, "cp.reduce.async.bulk.tensor");
}

void bulk_commit() {
  EMULATOR_ENTER();
  self->bulk_groups.push_back(std::move(self->bulk_stores));
  self->bulk_stores.clear();
}

namespace {

// The store has read its source (and, unless read_only, its destination is written): the thread now knows.
void wait_for_store(u64 id, bool read_only) {
  Block &block = *self->block;
  for (size_t i = 0; i < block.in_flight.size(); i++)
    if (block.in_flight[i].id == id) {
      if (!read_only)
        land_at(block, i);
      else
        take_bulk_source(block.in_flight[i]);
      return;
    }
}

}  // namespace

void bulk_wait(int groups_left, bool read_only) {
  EMULATOR_ENTER();
  int count = (int)self->bulk_groups.size() - groups_left;
  for (int g = 0; g < count; g++)
    for (u64 id : self->bulk_groups[(size_t)g]) {
      wait_for_store(id, read_only);
      StoreAgents &agents = launch->store_agents[id];
      agents.read_waited = true;
      self->clock.raise(agents.read_agent, agents.read_tick, self->block->slots());
      if (!read_only) self->clock.raise(agents.agent, agents.tick, self->block->slots());
    }
  if (!read_only)
    for (int g = 0; g < count; g++) {
      for (u64 id : self->bulk_groups.front()) launch->store_agents.erase(id);
      self->bulk_groups.pop_front();
    }
  maybe_yield();
}

void fence_proxy_async(bool shared, bool global) {
  EMULATOR_ENTER();
  launch->any_fence = true;
  Clock now = published(*self);
  if (shared) self->fenced[0] = now;
  if (global) self->fenced[1] = now;
  fence_mbarrier_init();  // a proxy fence covers those too; it also moves the tick on
}

}  // namespace emulator

// The launcher, and the functions that Python calls. One launch at a time in a process.
#include "async.h"
#include "report.h"
#include "shadow.h"
#include "state.h"

#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

namespace emulator {

namespace {

std::string result;  // kind, a newline, the message

// The range of addresses that the library with this symbol has.
void find_module(const void *symbol) {
  Dl_info info;
  if (!dladdr(symbol, &info)) return;
  launch->module_begin = (u64)info.dli_fbase;
  dl_iterate_phdr(
      [](dl_phdr_info *module, size_t, void *) {
        if (module->dlpi_addr != launch->module_begin) return 0;
        for (int i = 0; i < module->dlpi_phnum; i++)
          if (module->dlpi_phdr[i].p_type == PT_LOAD) {
            u64 end = module->dlpi_addr + module->dlpi_phdr[i].p_vaddr + module->dlpi_phdr[i].p_memsz;
            if (end > launch->module_end) launch->module_end = end;
          }
        return 1;
      },
      nullptr);
}

// A new launch comes after all earlier ones: who wrote is no longer of interest, what was written is.
void forget_writers(Buffer &buffer) {
  for (Cell &cell : buffer.cells) {
    if (cell.more) cell.more->clear();
    cell.reads.lanes = 0;
    cell.flags &= WRITTEN;
    cell.writer_block = NOBODY;
  }
}

void choose_block_order() {
  Dim3 g = launch->grid;
  launch->order.resize((size_t)g.x * g.y * g.z);
  for (size_t i = 0; i < launch->order.size(); i++) launch->order[i] = (u32)i;
  if (launch->schedule.order != Order::IN_ORDER)
    for (size_t i = launch->order.size(); i > 1; i--)
      std::swap(launch->order[i - 1], launch->order[launch->schedule.draw((u32)i)]);
}

std::unique_ptr<Launch> next;  // configured by emulator_configure, run by the kernel's own entry

}  // namespace

const char *run_kernel(void (*entry)(void *), void *arguments, size_t argument_bytes, const void *symbol) {
  Launch current = std::move(*next);
  launch = &current;
  current.entry = entry, current.arguments = arguments, current.argument_bytes = argument_bytes;
  find_module(symbol);
  choose_block_order();
  for (Buffer *buffer : current.buffers) forget_writers(*buffer);
  for (u32 i = 0; i < current.schedule.resident; i++) {
    Block &block = resident[i];
    block.running = false;
    if (!block.shared) {
      void *p = mmap(nullptr, MAX_SHARED + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      block.shared = (u8 *)(((u64)p + 1023) & ~1023ull);
    }
  }
  if (!current.order.empty()) run_blocks();
  self = nullptr;
  launch = nullptr;
  if (!current.failed) return nullptr;
  result = current.kind + "\n" + current.message;
  return result.c_str();
}

}  // namespace emulator

using namespace emulator;

extern "C" {

// Memory of its own between unmapped pages; emulator_data tells its address, a multiple of 256.
void *emulator_allocate(uint64_t bytes) {
  constexpr u64 GUARD = 1 << 16;
  u64 inner = (bytes + GUARD) / GUARD * GUARD;
  auto buffer = std::make_unique<Buffer>();
  buffer->mapped = inner + 2 * GUARD;
  buffer->mapping =
      mmap(nullptr, buffer->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (buffer->mapping == MAP_FAILED) return nullptr;
  buffer->data = (u8 *)buffer->mapping + GUARD;
  buffer->bytes = bytes;
  mprotect(buffer->data, inner, PROT_READ | PROT_WRITE);
  return buffer.release();
}

void *emulator_data(void *buffer) { return ((Buffer *)buffer)->data; }

void emulator_free(void *p) {
  Buffer *buffer = (Buffer *)p;
  clear_cells(buffer->cells, 0);
  munmap(buffer->mapping, buffer->mapped);
  delete buffer;
}

void emulator_configure(const uint32_t *grid, const uint32_t *block, uint32_t shared_bytes,
                        uint32_t shared_granule, int order, int async, uint32_t resident_blocks,
                        uint64_t seed) {
  next = std::make_unique<Launch>();
  next->grid = {grid[0], grid[1], grid[2]}, next->block_dim = {block[0], block[1], block[2]};
  next->shared_bytes = shared_bytes, next->shared_shift = (u32)__builtin_ctz(shared_granule);
  next->schedule = {(Order)order, (Async)async, resident_blocks,
                    seed * 0x9E3779B97F4A7C15ull + 0x632BE59BD9B4E019ull};
  if (!next->schedule.random) next->schedule.random = 1;
  for (int i = 0; i < 8; i++) next->schedule.draw(2);
}

// An array of the next launch; the result is its number, from 1.
int emulator_array(const char *name, uint64_t origin, int writable) {
  next->arrays.push_back({name, origin, (bool)writable});
  return (int)next->arrays.size();
}

// The memory that the next launch may use, granule by granule: `owners` holds numbers of arrays, 0 for none;
// `written` whether each granule holds a value already, nullptr where that is known from before.
void emulator_bind(void *p, uint32_t granule, const uint8_t *owners, int writable, const uint8_t *written) {
  Buffer *buffer = (Buffer *)p;
  u64 granules = (buffer->bytes + granule - 1) / granule;
  bool changed = buffer->shift != (u32)__builtin_ctz(granule);
  buffer->shift = (u32)__builtin_ctz(granule);
  buffer->owners.assign(owners, owners + granules);
  if ((writable && buffer->cells.empty()) || (changed && !buffer->cells.empty())) {
    clear_cells(buffer->cells, granules);
    for (Cell &cell : buffer->cells) cell.flags = WRITTEN;
  }
  if (written && !buffer->cells.empty())
    for (u64 g = 0; g < granules; g++) buffer->cells[g].flags = written[g] ? (u16)WRITTEN : 0;
  next->buffers.push_back(buffer);
}

// Which granules of bound, writable memory hold a value.
void emulator_written(void *p, uint8_t *written) {
  for (const Cell &cell : ((Buffer *)p)->cells) *written++ = cell.flags & WRITTEN;
}

}  // extern "C"

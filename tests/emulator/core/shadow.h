// Every load and store passes here: bounds, initialisation, and whether it is ordered after what it meets.
#pragma once
#include "state.h"

namespace emulator {

struct Access {
  bool write;
  bool atomic = false;
  bool async = false;  // through the async proxy
};

// A plain load or store of the running thread: what the compiler's hooks call.
void on_load(const void *p, u32 bytes);
void on_store(const void *p, u32 bytes);
// The same for an instruction the emulator carries out itself.
void on_access(const void *p, u32 bytes, Access access);

// An asynchronous operation: its accesses are checked as the running thread's at issue and recorded for an
// agent, so that whoever does not know the agent's tick collides with them.
void on_async_access(const void *p, u32 bytes, Access access, u32 agent);

// A wgmma's read of shared memory: checked for every lane of the running warp.
void on_product_read(const void *p, u32 bytes, u32 agent);

// cp.async: marks the destination from issue to wait.
void begin_copy(const void *p, u32 bytes);
void end_copy(const void *p, u32 bytes);

void mark_mbarrier(const void *p, bool live);

// Registers: stack ranges of unfinished wgmmas.
void watch_registers();  // from now on `self` records its register writes
void note_register_write(const void *p, u32 bytes);

// The buffer that holds [p, p + bytes), or a failure that says what lies near.
Buffer &buffer_of(const void *p, u64 bytes, const char *what);
bool is_shared(const void *p);
std::string name_of(const void *p);  // "shared+128" or "q+64"

void clear_cells(std::vector<Cell> &cells, size_t n);

}  // namespace emulator

// What is on its way: landing it, and what must have landed when a thread or block ends.
#pragma once
#include "state.h"

namespace emulator {

bool land_one();  // one bulk copy that is in flight, if any is
void finish_thread_async();
void finish_block_async(Block &block);

u8 *shared_at(u32 address, u32 bytes, u32 alignment, const char *instruction);
u32 shared_address(const void *p);
Mbarrier &live_mbarrier(u32 address, const char *instruction);
void advance_mbarrier(Block &block, u32 address, Mbarrier &m);
void land_product(Wgmma &product);
void take_bulk_source(Bulk &bulk);

}  // namespace emulator

// The running machine: launch, resident blocks, warps, threads, and how each of them waits.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "clock.h"
#include "fiber.h"
#include "interface.h"

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;

constexpr u32 MAX_THREADS = 1024, MAX_RESIDENT = 4, MAX_SHARED = 227 * 1024, WARP = 32;
constexpr u32 SHARED_BASE = 1024;  // 32-bit shared addresses start here, so that 0 is never one

// ---- the order of things (Schedule in Python)
enum class Order : int { IN_ORDER, RANDOM, AHEAD };  // AHEAD: one warp runs as far as it can
enum class Async : int { EAGER, LAZY, RANDOM };      // when asynchronous work lands

struct Schedule {
  Order order = Order::IN_ORDER;
  Async async = Async::EAGER;
  u32 resident = 1;
  u64 random = 1;

  u32 draw(u32 n) {  // xorshift64; 0 <= result < n
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return (u32)((random >> 11) % n);
  }
};

// ---- memory
// Reads of one granule, all in one tick, by lanes of one warp (or by one agent: lanes == 1).
struct Reads {
  u32 block, tick, lanes, pc;
  u16 first;   // slot of lane 0, or of the agent
  u16 atomic;  // an atomic read does not race with atomic writes
};

enum Flag : u16 {
  WRITTEN = 1,        // holds a value
  PENDING = 2,        // a cp.async is on its way here
  BY_ASYNC = 4,       // last written through the async proxy
  BY_ATOMIC = 8,      // last written by an atomic
  MANY_ATOMICS = 16,  // by several unordered ones: see Launch::atomic_writers
  MBARRIER = 32,      // part of a live mbarrier
};
constexpr u32 NOBODY = ~0u;  // as a block: written before this launch

// The shadow of one granule of memory.
struct Cell {
  u32 writer_block, writer_tick, writer_pc;
  u16 writer_slot, flags;
  Reads reads;               // lanes == 0: none
  std::vector<Reads> *more;  // beyond the first
};

struct Writer {
  u32 block, tick, pc;
  u16 slot;
};

// One allocation of device memory. Arrays are views into it, named anew for each launch.
struct Buffer {
  u8 *data;
  u64 bytes;
  void *mapping;
  u64 mapped;
  u32 shift = 0;            // log2 of the granule: the elements' size
  std::vector<u8> owners;   // for each granule the array it belongs to in this launch, from 1; 0: none
  std::vector<Cell> cells;  // once the memory was writable: what no kernel writes can't race
};

// An array of this launch.
struct Array {
  std::string name;
  u64 origin;  // address of its element [0, ..., 0]
  bool writable;
};

// ---- threads
enum class Wait : u8 { NOT, COLLECTIVE, BARRIER, MBARRIER, POLL };

struct Block;
struct Warp;
struct Release;

struct CopyAsync {  // one cp.async
  u32 destination, bytes, source_bytes, pc;
  const u8 *source;
  bool landed;
};

// Register ranges of one thread that unfinished wgmmas own. Registers are elements of arrays on the fiber's
// stack.
struct RegisterRange {
  u64 begin, end, operation;
  bool accumulator;  // else an A operand: may be read, not written
  u32 pc;
};
struct Registers {
  std::vector<u32> written;  // for each 4 bytes of the stack: the number of wgmma.fences before its last write
  u32 fences = 0;
  std::vector<RegisterRange> pending;
  u64 lowest = ~0ull, highest = 0;  // bounds of `pending`
};

struct Thread {
  Builtins builtins;
  Context context;
  Stack stack;
  Block *block;
  Warp *warp;
  u32 index, lane;
  bool done, ready;
  const void *pc;  // where the kernel last called or was hooked

  Wait wait;
  u64 wait_on, wait_for;
  const char *wait_name;

  Clock clock;                   // own slot left out: it is the warp's tick
  Clock fenced[2];               // what a proxy fence has passed, of shared and of global memory
  std::vector<Release> relaxed;  // seen by relaxed loads; an acquire fence takes them into `clock`
  Clock release_fence;           // `clock` at the last release fence
  bool released_by_fence;

  std::vector<CopyAsync> copies;  // not yet committed
  std::deque<std::vector<CopyAsync>> copy_groups;
  std::vector<u64> bulk_stores;  // not yet committed
  std::deque<std::vector<u64>> bulk_groups;

  u64 polled, polled_value;  // the last load of a flag: the same again is a spin
  std::unique_ptr<Registers> registers;
};

// ---- collectives of a warp
struct Collective {
  const char *name;
  bool aligned;  // .aligned: every lane must reach the same instruction
  u32 mask, arrived;
  void *arguments[WARP];
  const void *pc[WARP];
};

struct Wgmma;

struct Warp {
  Block *block;
  u32 index, lanes, ready, priority;
  u32 tick;  // of all its lanes; moves on with every release
  std::vector<Collective> collectives;
  std::vector<std::shared_ptr<Wgmma>> products;  // not yet committed
  std::deque<std::vector<std::shared_ptr<Wgmma>>> product_groups;
  std::deque<u32> group_agents, group_ticks;  // who reads shared memory for each group
  u32 product_agent;                          // the same for the open group; 0: none yet
  u64 products_issued;
};

// ---- barriers
constexpr u32 NUM_BARRIERS = 16;  // of a block

struct Barrier {
  u32 expected = 0, arrived = 0;
  std::vector<Thread *> waiting;
  Clock clock, fenced[2];
  bool plain = false;        // __syncthreads
  const void *pc = nullptr;  // of the first arrival
};

struct Mbarrier {
  u32 count, pending;
  i64 bytes;
  u64 phase;
  Clock gathering, gathering_fenced[2], complete, complete_fenced[2];
  u32 init_slot, init_tick, init_pc;
  bool fenced = false;  // its initialisation; by:
  u32 fence_slot = 0, fence_tick = 0;
};

// ---- asynchronous operations other than cp.async and wgmma
struct Bulk {
  enum Kind { LOAD, STORE, REDUCE } kind;
  u64 id;
  const void *pc;
  Thread *issuer;
  u32 agent, tick;            // of its writes (LOAD: the only one)
  u32 read_agent, read_tick;  // of a STORE's reads
  u32 mbarrier;               // LOAD
  u32 transaction;            // bytes it reports there
  struct Piece {              // contiguous on both sides
    u8 *to;
    const u8 *from;  // nullptr: zeros
    u32 bytes;
  };
  std::vector<Piece> pieces;
  u32 element;  // REDUCE: see bulk.cpp
  bool read_done = false;
  std::vector<u8> taken;  // source bytes, once read
};

struct Block {
  u32 index;  // linear, in the grid
  Dim3 id;
  u32 num_threads, num_warps, num_done;
  bool running = false;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  u8 *shared = nullptr;
  std::vector<Cell> cells;
  Barrier barriers[NUM_BARRIERS];
  std::unordered_map<u32, Mbarrier> mbarriers;
  std::deque<Bulk> in_flight;
  u32 agent_ticks[AGENTS];
  u32 load_ticks[AGENTS];  // of each agent's last load, and where it was issued
  const void *load_pcs[AGENTS];
  u32 next_agent;
  u32 votes[2], vote_turn;  // of __syncthreads_count and its like
  // The last join, since lanes of a warp repeat it: left, right, result. The operands are held, so that their
  // nodes can't be reused for others.
  Clock memo_left, memo_right, memo_result;

  u32 slots() const { return num_threads + AGENTS; }
};

// What releases at a place in memory have published, for each block that released there.
struct Release {
  u32 block;
  Clock clock, fenced[2];
};
using Released = std::vector<Release>;

struct StoreAgents {
  u32 agent, tick, read_agent, read_tick;
  const void *pc;
  bool read_waited;  // its thread knows that the source was read
};

struct Launch {
  Schedule schedule;
  void (*entry)(void *);
  void *arguments;  // kernels read them as the device's constant bank
  u64 argument_bytes;
  Dim3 grid, block_dim;
  u32 shared_bytes, shared_shift;
  std::vector<u32> order;  // linear indices of blocks in the order they start
  size_t started = 0, finished = 0;
  std::vector<Buffer *> buffers;
  std::vector<Array> arrays;
  Buffer *last_buffer = nullptr;
  u64 module_begin = 0, module_end = 0;  // of the kernel's library
  std::unordered_map<u64, Released> released;
  std::unordered_map<const Cell *, std::vector<Writer>> atomic_writers;
  std::unordered_map<u64, StoreAgents> store_agents;  // of bulk stores not waited for yet
  u64 operations = 0;                                 // ids of bulk copies and wgmmas
  Context host;                                       // the launcher, while a fiber runs
  bool failed = false;
  std::string kind, message;
  u64 accesses = 0;        // since the last switch: a spin on an ordinary load never ends
  bool any_fence = false;  // proxy fences are rare: skip their clocks until the first
};

extern Launch *launch;
extern Thread *self;  // the thread that runs, nullptr on the host
extern Block resident[MAX_RESIDENT];

// ---- scheduler.cpp
void wait_for(Wait wait, u64 on, u64 until, const char *name);  // blocks `self` until wake()
void wake(Thread &thread);
void maybe_yield();  // a place where another order could show: random schedules switch here now and then
void run_blocks();
[[noreturn]] void leave();  // to the host, for good

// ---- happens-before (order.cpp)
void tick();                            // `self` has released: later accesses are not covered
Clock published(const Thread &thread);  // its clock with its own progress in it
void acquire(Thread &thread, const Clock &clock);
void acquire_fenced(Thread &thread, const Clock (&fenced)[2]);
void gather(Clock &into, Clock (&fenced)[2], const Thread &thread);  // an arrival
u32 new_agent(Block &block);                                         // its slot; the tick is agent_tick()
u32 agent_tick(const Block &block, u32 slot);

}  // namespace emulator

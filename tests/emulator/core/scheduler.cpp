// Which thread runs next, and when asynchronous work lands.
#include "async.h"
#include "report.h"
#include "shadow.h"
#include "state.h"

#include <cstring>

namespace emulator {

Launch *launch = nullptr;
Thread *self = nullptr;
Block resident[MAX_RESIDENT];

namespace {

struct HostLeft {};

Context abandoned;  // a context that is left for good is saved here and never used

void switch_to(Thread *next) {
  Thread *before = self;
  if (next == before) return;
  self = next;
  launch->accesses = 0;
  emulator_switch(before ? &before->context : &abandoned, next->context);
}

Thread *choose_lane(Warp &warp) {
  u32 lane = __builtin_ctz(warp.ready);
  if (launch->schedule.order == Order::RANDOM) {
    lane = launch->schedule.draw(WARP);
    while (!(warp.ready >> lane & 1)) lane = (lane + 1) % WARP;
  }
  return &warp.block->threads[warp.index * WARP + lane];
}

// The next warp after the running one, in the order of blocks and warps.
Warp *choose_in_order() {
  u32 n = launch->schedule.resident;
  u32 mine = self ? (u32)(self->block - resident) : 0;
  for (u32 i = 0; i <= n; i++) {
    Block &block = resident[(mine + i) % n];
    if (!block.running) continue;
    u32 skip = self && self->block == &block && i == 0 ? self->warp->index : 0;
    for (u32 w = skip; w < block.num_warps; w++)
      if (block.warps[w].ready) return &block.warps[w];
  }
  return nullptr;
}

template <class Better>
Warp *choose_best(Better better) {
  Warp *best = nullptr;
  for (u32 i = 0; i < launch->schedule.resident; i++)
    if (resident[i].running)
      for (Warp &warp : resident[i].warps)
        if (warp.ready && (!best || better(warp, *best))) best = &warp;
  return best;
}

Warp *choose_warp() {
  Schedule &schedule = launch->schedule;
  if (schedule.order == Order::IN_ORDER) return choose_in_order();
  if (schedule.order == Order::RANDOM) {
    u32 seen = 1;
    return choose_best([&](const Warp &, const Warp &) { return schedule.draw(++seen) == 0; });
  }
  if (schedule.draw(64) == 0) {  // now and then another warp takes the lead
    Block &block = resident[schedule.draw(schedule.resident)];
    if (block.running) block.warps[schedule.draw(block.num_warps)].priority = schedule.draw(1 << 20);
  }
  return choose_best([](const Warp &a, const Warp &b) { return a.priority > b.priority; });
}

Thread *choose() {
  for (;;) {
    if (launch->schedule.async == Async::RANDOM && launch->schedule.draw(8) == 0) land_one();
    if (Warp *warp = choose_warp()) return choose_lane(*warp);
    if (!land_one()) fail_deadlock();
  }
}

// ---- blocks
void start_thread(Thread &thread);
void finish_block(Block &block);

// Blocks that the order still has take the places of finished ones.
void start_block(Block &block, u32 index) {
  Dim3 g = launch->grid, d = launch->block_dim;
  block.index = index;
  block.id = {index % g.x, index / g.x % g.y, index / g.x / g.y};
  block.num_threads = d.x * d.y * d.z;
  block.num_warps = (block.num_threads + WARP - 1) / WARP;
  block.num_done = 0;
  block.running = true;
  block.threads.resize(MAX_THREADS);  // once: threads keep their stacks, and pointers to threads stay good
  block.warps.assign(block.num_warps, Warp{});
  for (Barrier &barrier : block.barriers) barrier = Barrier{};
  block.mbarriers.clear();
  block.in_flight.clear();
  for (u32 i = 0; i < AGENTS; i++) block.agent_ticks[i] = block.load_ticks[i] = 0;
  block.next_agent = 0;
  block.votes[0] = block.votes[1] = block.vote_turn = 0;
  block.memo_left = block.memo_right = block.memo_result = Clock();
  memset(block.shared, 0xff, launch->shared_bytes);  // NaN in every float type
  clear_cells(block.cells, (launch->shared_bytes >> launch->shared_shift) + 1);
  for (u32 w = 0; w < block.num_warps; w++) {
    Warp &warp = block.warps[w];
    u32 left = block.num_threads - w * WARP;
    warp.block = &block, warp.index = w, warp.tick = 1;
    warp.lanes = warp.ready = left >= WARP ? ~0u : (1u << left) - 1;
    warp.priority = launch->schedule.draw(1 << 20);
  }
  for (u32 t = 0; t < block.num_threads; t++) {
    Thread &thread = block.threads[t];
    thread.block = &block, thread.warp = &block.warps[t / WARP], thread.index = t, thread.lane = t % WARP;
    thread.builtins = {{t % d.x, t / d.x % d.y, t / d.x / d.y}, block.id, d, g};
    start_thread(thread);
  }
}

void on_thread_entry() {
  launch->entry(launch->arguments);
  Block &block = *self->block;
  Warp &warp = *self->warp;
  EMULATOR_ENTER();
  finish_thread_async();
  for (const Collective &c : warp.collectives)
    if (c.mask >> self->lane & 1)
      for (u32 lane = 0; lane < WARP; lane++)
        if (c.arrived >> lane & 1)
          fail("divergence", "a thread exits while lane %u of its warp waits in %s at %s", lane, c.name,
               place(c.pc[lane]).c_str());
  self->done = true, self->ready = false;
  warp.ready &= ~(1u << self->lane);
  if (++block.num_done == block.num_threads) {
    finish_block(block);
    leave();  // this stack is the block's: only the host may start another block in its place
  }
  switch_to(choose());
  __builtin_unreachable();
}

void start_thread(Thread &thread) {
  thread.stack.allocate();
  thread.context = new_context(thread.stack, on_thread_entry);
  thread.done = false, thread.ready = true, thread.pc = nullptr;
  thread.wait = Wait::NOT;
  thread.clock = thread.release_fence = thread.fenced[0] = thread.fenced[1] = Clock();
  thread.released_by_fence = false;
  thread.relaxed.clear();
  thread.copies.clear(), thread.copy_groups.clear();
  thread.bulk_stores.clear(), thread.bulk_groups.clear();
  thread.polled = 0;
  thread.registers.reset();
}

void finish_block(Block &block) {
  for (u32 id = 0; id < NUM_BARRIERS; id++)
    if (Barrier &barrier = block.barriers[id]; barrier.arrived)
      fail("unfinished", "the block ends with %u of %u arrivals at barrier %u, the first one at %s", barrier.arrived,
           barrier.expected, id, place(barrier.pc).c_str());
  finish_block_async(block);
  block.running = false;
  launch->finished++;
}

}  // namespace

void run_blocks() {
  u32 places = launch->schedule.resident;
  try {
    while (launch->finished < launch->order.size() && !launch->failed) {
      for (u32 i = 0; i < places; i++)
        if (!resident[i].running && launch->started < launch->order.size())
          start_block(resident[i], launch->order[launch->started++]);
      Thread *first = choose();
      self = first;
      emulator_switch(&launch->host, first->context);  // comes back when a block has finished, or at a failure
      self = nullptr;
    }
  } catch (const HostLeft &) {}
}

void wait_for(Wait wait, u64 on, u64 until, const char *name) {
  self->wait = wait, self->wait_on = on, self->wait_for = until, self->wait_name = name;
  self->ready = false;
  self->warp->ready &= ~(1u << self->lane);
  switch_to(choose());
}

void wake(Thread &thread) {
  if (thread.done || thread.ready) return;
  thread.ready = true;
  thread.wait = Wait::NOT;
  thread.warp->ready |= 1u << thread.lane;
}

void maybe_yield() {
  if (launch->schedule.order != Order::IN_ORDER && launch->schedule.draw(4) == 0) switch_to(choose());
}

void leave() {
  if (!self) throw HostLeft();  // a deadlock found between blocks
  self = nullptr;
  emulator_switch(&abandoned, launch->host);
  __builtin_unreachable();
}

}  // namespace emulator

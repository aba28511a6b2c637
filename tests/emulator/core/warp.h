// Collectives of a warp: the last lane to arrive carries them out for all.
#pragma once
#include "report.h"
#include "state.h"

namespace emulator {

// `execute(collective)` runs once, on the last lane's stack, with every lane's argument at hand.
template <class Execute>
void collective(const char *name, bool aligned, u32 mask, void *argument, Execute execute) {
  Warp &warp = *self->warp;
  u32 me = 1u << self->lane;
  if (!(mask & me)) fail("divergence", "%s: its mask %08x lacks the calling lane", name, mask);
  mask &= warp.lanes;  // a last warp may be short
  size_t i = 0;
  while (i < warp.collectives.size() && warp.collectives[i].mask != mask) i++;
  if (i == warp.collectives.size()) warp.collectives.push_back({name, aligned, mask, 0, {}, {}});
  Collective &open = warp.collectives[i];
  for (u32 lane = 0; lane < WARP; lane++) {
    if (!(open.arrived >> lane & 1)) continue;
    if (open.name != name || (aligned && !same_line(open.pc[lane], self->pc)))
      fail("divergence", "%s here while lane %u of the warp is at %s at %s", name, lane, open.name,
           place(open.pc[lane]).c_str());
    break;  // those that arrived agree
  }
  for (u32 lane = 0; lane < WARP; lane++)
    if (mask >> lane & 1 && self->block->threads[warp.index * WARP + lane].done)
      fail("divergence", "%s with the mask %08x: lane %u has exited", name, mask, lane);
  open.arguments[self->lane] = argument;
  open.pc[self->lane] = self->pc;
  open.arrived |= me;
  if (open.arrived != mask) {
    wait_for(Wait::COLLECTIVE, mask, 0, name);
    return;
  }
  Collective done = open;
  warp.collectives.erase(warp.collectives.begin() + (long)i);
  execute(done);
  for (u32 lane = 0; lane < WARP; lane++)
    if (mask >> lane & 1 && lane != self->lane) wake(self->block->threads[warp.index * WARP + lane]);
}

// Runs `body` as if on another lane, so that its accesses are checked as that lane's.
template <class Body>
void as_lane(u32 lane, const Collective &collective, Body body) {
  Thread *mine = self;
  self = &mine->block->threads[mine->warp->index * WARP + lane];
  const void *pc = self->pc;
  self->pc = collective.pc[lane];
  body();
  self->pc = pc;
  self = mine;
}

}  // namespace emulator

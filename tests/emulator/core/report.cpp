#include "report.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <map>

namespace emulator {

namespace {

std::string format_text(const char *format, va_list arguments) {
  char text[8192];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

// Frames of words, of the emulator itself and of the C++ library are not where a reader wants to look.
bool is_kernel_frame(const std::string &frame) {
  return frame.find("/emulator/words/") == std::string::npos &&
         frame.find("/emulator/core/") == std::string::npos && frame.compare(0, 5, "/usr/") != 0 &&
         frame.compare(0, 2, "??") != 0;
}

// addr2line prints the innermost inlined frame first.
std::vector<std::string> frames(const void *pc) {
  std::vector<std::string> found;
  Dl_info info;
  if (!pc || !dladdr(pc, &info)) return found;
  char command[1024], line[1024];
  unsigned long offset = (unsigned long)((const u8 *)pc - (const u8 *)info.dli_fbase) - 1;  // inside the call
  snprintf(command, sizeof command, "env -u LD_PRELOAD addr2line -i -e '%s' 0x%lx 2>/dev/null", info.dli_fname,
           offset);
  FILE *pipe = popen(command, "r");
  if (!pipe) return found;
  while (fgets(line, sizeof line, pipe)) {
    std::string frame(line);
    frame = frame.substr(0, frame.find_first_of(" \n"));
    if (!is_kernel_frame(frame)) continue;
    size_t begin = frame.rfind("/kernels/");  // addr2line puts the compile directory before #line names
    found.push_back(begin == std::string::npos ? frame : frame.substr(begin + 1));
  }
  pclose(pipe);
  return found;
}

}  // namespace

std::string place(const void *pc) {
  static std::map<const void *, std::string> known;
  auto entry = known.find(pc);
  if (entry != known.end()) return entry->second;
  std::vector<std::string> all = frames(pc);
  std::string text = all.empty() ? "an unknown place" : all[0];
  for (size_t i = 1; i < all.size() && i < 4; i++) text += (i == 1 ? " (called at " : ", ") + all[i];
  if (all.size() > 1) text += ")";
  return known[pc] = text;
}

u32 short_pc(const void *pc) { return (u32)((u64)pc - launch->module_begin); }
std::string place_of(u32 pc) { return place((const void *)(launch->module_begin + pc)); }

bool same_line(const void *a, const void *b) { return a == b || place(a) == place(b); }

std::string coordinates(u32 block) {
  if (block == NOBODY) return "(none)";
  char text[64];
  Dim3 g = launch->grid;
  snprintf(text, sizeof text, "(%u, %u, %u)", block % g.x, block / g.x % g.y, block / g.x / g.y);
  return text;
}

std::string who(const Block &block, u32 slot) {
  if (slot >= block.num_threads) return "an asynchronous operation";
  char text[64];
  snprintf(text, sizeof text, "thread %u (warp %u, lane %u)", slot, slot / WARP, slot % WARP);
  return text;
}

std::string who_in(u32 block, u32 slot) {
  std::string text = who(*self->block, slot);
  return block == self->block->index ? text : text + " of block " + coordinates(block);
}

void fail(const char *kind, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  launch->message = format_text(format, arguments);
  va_end(arguments);
  launch->kind = kind;
  launch->failed = true;
  if (self)
    launch->message += "\n  by " + who(*self->block, self->index) + " of block " +
                       coordinates(self->block->index) + " at " + place(self->pc);
  leave();
}

namespace {

std::string describe_wait(const Thread &thread) {
  char text[256];
  Block &block = *thread.block;
  switch (thread.wait) {
    case Wait::BARRIER: {
      const Barrier &b = block.barriers[thread.wait_on];
      snprintf(text, sizeof text, "%s %u: %u of %u threads have arrived", thread.wait_name, (u32)thread.wait_on,
               b.arrived, b.expected);
      break;
    }
    case Wait::MBARRIER: {
      const Mbarrier &m = block.mbarriers[(u32)thread.wait_on];
      snprintf(
          text, sizeof text,
          "mbarrier at shared+%u, parity %u: its phase is %llu, %u of %u arrivals and %lld bytes are missing",
          (u32)thread.wait_on - SHARED_BASE, (u32)thread.wait_for, (unsigned long long)m.phase, m.pending,
          m.count, (long long)m.bytes);
      break;
    }
    case Wait::POLL:
      snprintf(text, sizeof text, "a flag at %s, which holds %llu", thread.wait_name,
               (unsigned long long)thread.wait_for);
      break;
    case Wait::COLLECTIVE:
      snprintf(text, sizeof text, "%s with the lanes of mask %08x", thread.wait_name, (u32)thread.wait_on);
      break;
    case Wait::NOT: snprintf(text, sizeof text, "nothing");
  }
  return text;
}

// Threads of a warp that wait alike share a line.
void describe_block(Block &block, std::string &text, int &lines) {
  text += "\n  block " + coordinates(block.index) + ", " + std::to_string(block.num_done) + " of " +
          std::to_string(block.num_threads) + " threads have exited";
  for (Warp &warp : block.warps) {
    u32 seen = 0;
    for (u32 lane = 0; lane < WARP; lane++) {
      if (!(warp.lanes >> lane & 1) || seen >> lane & 1) continue;
      const Thread &thread = block.threads[warp.index * WARP + lane];
      if (thread.done) continue;
      u32 alike = 0;
      for (u32 other = lane; other < WARP; other++) {
        if (!(warp.lanes >> other & 1)) continue;
        const Thread &t = block.threads[warp.index * WARP + other];
        if (!t.done && t.wait == thread.wait && t.wait_on == thread.wait_on && t.wait_for == thread.wait_for &&
            t.pc == thread.pc)
          alike |= 1u << other;
      }
      seen |= alike;
      if (lines++ < 16) {
        char lanes[64];
        snprintf(lanes, sizeof lanes, "\n    warp %u (%d lanes) waits for ", warp.index,
                 __builtin_popcount(alike));
        text += lanes + describe_wait(thread) + ", at " + place(thread.pc);
      }
    }
  }
}

}  // namespace

void fail_deadlock() {
  std::string text = "deadlock: no thread can run";
  int lines = 0;
  for (u32 i = 0; i < launch->schedule.resident; i++)
    if (resident[i].running) describe_block(resident[i], text, lines);
  size_t waiting = launch->order.size() - launch->started;
  if (waiting)
    text += "\n  " + std::to_string(waiting) + " of " + std::to_string(launch->order.size()) +
            " blocks have not started: a block may wait only for resident and finished ones";
  launch->kind = "deadlock";
  launch->message = text;
  launch->failed = true;
  leave();
}

}  // namespace emulator

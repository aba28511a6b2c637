// Shuffles, votes, reductions, and the matrix moves of a warp. None of them orders memory; __syncwarp does.
#include "warp.h"

#include <cstring>

#include "async.h"
#include "shadow.h"

namespace emulator {

namespace {

template <class Visit>
void each_lane(u32 mask, Visit visit) {
  for (u32 lane = 0; lane < WARP; lane++)
    if (mask >> lane & 1) visit(lane);
}

struct ShuffleArgument {
  u64 value, result;
  int argument, width;
};

// The lane whose value `lane` gets, or itself at an edge. As PTX shfl: segments of `width` lanes.
u32 shuffle_source(u32 lane, int argument, int width, int mode) {
  u32 w = (u32)width, base = lane & ~(w - 1);
  int source = (int)lane;
  if (mode == SHUFFLE_INDEX) return base + ((u32)argument & (w - 1));
  if (mode == SHUFFLE_XOR) source = (int)(lane ^ (u32)argument);
  if (mode == SHUFFLE_UP) return (int)lane - argument < (int)base ? lane : lane - (u32)argument;
  if (mode == SHUFFLE_DOWN) source = (int)lane + argument;
  return source >= (int)(base + w) ? lane : (u32)source;
}

u32 reduce_pair(u32 a, u32 b, int mode) {
  switch (mode) {
    case REDUCE_ADD: return a + b;
    case REDUCE_MIN: return a < b ? a : b;
    case REDUCE_MAX: return a > b ? a : b;
    case REDUCE_MIN_SIGNED: return (i64)(int32_t)a < (int32_t)b ? a : b;
    case REDUCE_MAX_SIGNED: return (i64)(int32_t)a > (int32_t)b ? a : b;
    case REDUCE_AND: return a & b;
    case REDUCE_OR: return a | b;
    default: return a ^ b;
  }
}

}  // namespace

uint64_t shuffle(const char *name, uint32_t mask, uint64_t value, int argument, int width, int mode) {
  EMULATOR_ENTER();
  if (width < 1 || width > 32 || width & (width - 1)) fail("divergence", "%s: a width of %d", name, width);
  ShuffleArgument mine{value, value, argument, width};
  collective(name, false, mask, &mine, [&](Collective &c) {
    each_lane(c.mask, [&](u32 lane) {
      auto *a = (ShuffleArgument *)c.arguments[lane];
      u32 source = shuffle_source(lane, a->argument, a->width, mode);
      if (!(c.mask >> source & 1))
        fail("divergence", "%s: lane %u reads lane %u, which does not take part (mask %08x)", name, lane,
             source, c.mask);
      a->result = ((ShuffleArgument *)c.arguments[source])->value;
    });
  });
  return mine.result;
}

uint32_t vote(const char *name, uint32_t mask, bool predicate, int mode) {
  EMULATOR_ENTER();
  struct Argument {
    bool predicate;
    u32 result;
  } mine{predicate, 0};
  collective(name, false, mask, &mine, [&](Collective &c) {
    u32 ballot = 0;
    each_lane(c.mask, [&](u32 lane) { ballot |= (u32)((Argument *)c.arguments[lane])->predicate << lane; });
    u32 result = mode == VOTE_BALLOT ? ballot : mode == VOTE_ALL ? ballot == c.mask : ballot != 0;
    each_lane(c.mask, [&](u32 lane) { ((Argument *)c.arguments[lane])->result = result; });
  });
  return mine.result;
}

uint32_t reduce(const char *name, uint32_t mask, uint32_t value, int mode) {
  EMULATOR_ENTER();
  u32 mine = value;
  collective(name, false, mask, &mine, [&](Collective &c) {
    bool first = true;
    u32 result = 0;
    each_lane(c.mask, [&](u32 lane) {
      u32 v = *(u32 *)c.arguments[lane];
      result = first ? v : reduce_pair(result, v, mode);
      first = false;
    });
    each_lane(c.mask, [&](u32 lane) { *(u32 *)c.arguments[lane] = result; });
  });
  return mine;
}

uint32_t match_any(uint32_t mask, uint64_t value) {
  EMULATOR_ENTER();
  struct Argument {
    u64 value;
    u32 result;
  } mine{value, 0};
  collective("__match_any_sync", false, mask, &mine, [&](Collective &c) {
    each_lane(c.mask, [&](u32 lane) {
      auto *a = (Argument *)c.arguments[lane];
      each_lane(c.mask, [&](u32 other) {
        a->result |= (u32)(((Argument *)c.arguments[other])->value == a->value) << other;
      });
    });
  });
  return mine.result;
}

bool elect(uint32_t mask) {
  EMULATOR_ENTER();
  bool mine = false;
  collective("elect.sync", true, mask, &mine,
             [&](Collective &c) { *(bool *)c.arguments[__builtin_ctz(c.mask)] = true; });
  return mine;
}

// Lanes that run: a fiber that waits elsewhere is not known to be apart, so this is every lane that has not
// exited.
uint32_t active_mask() {
  EMULATOR_ENTER();
  u32 mask = 0;
  each_lane(self->warp->lanes, [&](u32 lane) {
    mask |= (u32)!self->block->threads[self->warp->index * WARP + lane].done << lane;
  });
  return mask;
}

void sync_warp(uint32_t mask) {
  EMULATOR_ENTER();
  collective("__syncwarp", false, mask, nullptr, [&](Collective &c) {
    Clock clock, fenced[2];
    Thread *threads = &self->block->threads[self->warp->index * WARP];
    each_lane(c.mask, [&](u32 lane) { gather(clock, fenced, threads[lane]); });
    each_lane(c.mask, [&](u32 lane) {
      threads[lane].clock = clock;
      acquire_fenced(threads[lane], fenced);
    });
    tick();
  });
}

// ---- 8 x 8 matrices of 16-bit elements: lane 8 i + r names row r of matrix i; lane l holds elements (l / 4, 2
// (l % 4)) and the next, or, transposed, the same of the transpose.
namespace {

struct MatrixArgument {
  u32 *registers;
  u32 address;
};

void spread(const u16 (&matrix)[8][8], u32 lane, bool transposed, u32 &value) {
  u32 r = lane / 4, c = lane % 4 * 2;
  u16 low = transposed ? matrix[c][r] : matrix[r][c], high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
  value = low | (u32)high << 16;
}

void collect(u16 (&matrix)[8][8], u32 lane, bool transposed, u32 value) {
  u32 r = lane / 4, c = lane % 4 * 2;
  (transposed ? matrix[c][r] : matrix[r][c]) = (u16)value;
  (transposed ? matrix[c + 1][r] : matrix[r][c + 1]) = (u16)(value >> 16);
}

void set_register(Thread &thread, u32 *where, u32 value) {
  Thread *mine = self;
  self = &thread;
  if (self->registers) on_store(where, 4);
  self = mine;
  *where = value;
}

}  // namespace

void load_matrix(uint32_t *registers, int count, uint32_t address, bool transposed) {
  EMULATOR_ENTER();
  MatrixArgument mine{registers, address};
  collective("ldmatrix", true, ~0u, &mine, [&](Collective &c) {
    u16 matrices[4][8][8];
    for (u32 row = 0; row < (u32)count * 8; row++)
      as_lane(row, c, [&] {
        u8 *p = shared_at(((MatrixArgument *)c.arguments[row])->address, 16, 16, "ldmatrix");
        on_load(p, 16);
        memcpy(matrices[row / 8][row % 8], p, 16);
      });
    each_lane(c.mask, [&](u32 lane) {
      for (int i = 0; i < count; i++) {
        u32 value;
        spread(matrices[i], lane, transposed, value);
        set_register(self->block->threads[self->warp->index * WARP + lane],
                     ((MatrixArgument *)c.arguments[lane])->registers + i, value);
      }
    });
  });
}

void store_matrix(const uint32_t *registers, int count, uint32_t address, bool transposed) {
  EMULATOR_ENTER();
  MatrixArgument mine{const_cast<u32 *>(registers), address};
  collective("stmatrix", true, ~0u, &mine, [&](Collective &c) {
    u16 matrices[4][8][8];
    each_lane(c.mask, [&](u32 lane) {
      for (int i = 0; i < count; i++)
        collect(matrices[i], lane, transposed, ((MatrixArgument *)c.arguments[lane])->registers[i]);
    });
    for (u32 row = 0; row < (u32)count * 8; row++)
      as_lane(row, c, [&] {
        u8 *p = shared_at(((MatrixArgument *)c.arguments[row])->address, 16, 16, "stmatrix");
        on_store(p, 16);
        memcpy(p, matrices[row / 8][row % 8], 16);
      });
  });
}

uint32_t transpose_matrix(uint32_t value) {
  EMULATOR_ENTER();
  u32 mine = value;
  collective("movmatrix", true, ~0u, &mine, [&](Collective &c) {
    u16 matrix[8][8];
    each_lane(c.mask, [&](u32 lane) { collect(matrix, lane, false, *(u32 *)c.arguments[lane]); });
    each_lane(c.mask, [&](u32 lane) { spread(matrix, lane, true, *(u32 *)c.arguments[lane]); });
  });
  return mine;
}

}  // namespace emulator

// wgmma: each warp of the warpgroup multiplies its own 16 rows; operands in shared memory are read at any time
// between issue and wait, registers belong to the product until then.
#include <cmath>
#include <cstring>

#include "async.h"
#include "report.h"
#include "shadow.h"
#include "tensor_core.h"
#include "tensor_map.h"
#include "warp.h"

namespace emulator {

// A product of one warp.
struct Wgmma {
  Format format;
  u32 n;
  float *d[WARP];
  const u32 *a_live[WARP];  // nullptr: by descriptor
  u32 a[WARP][4];
  u64 a_descriptor, b_descriptor;
  bool a_transposed, b_transposed, accumulate, landed = false;
  u64 id;
  Warp *warp;
  std::vector<float> before;  // what lazily computed accumulators held; they hold NaN meanwhile
};

namespace {

constexpr u32 K = 16;

struct WgmmaArgument {
  float *d;
  const u32 *a;
  u64 a_descriptor, b_descriptor;
  bool accumulate;
};

// The matrix descriptor of PTX: address, leading and stride offset in 16-byte units, and the swizzle.
struct Descriptor {
  u32 start, leading, stride, swizzle, row_bytes;

  explicit Descriptor(u64 bits)
      : start((u32)(bits & 0x3fff) << 4),
        leading((u32)(bits >> 16 & 0x3fff) << 4),
        stride((u32)(bits >> 32 & 0x3fff) << 4),
        swizzle(3 & (4 - (u32)(bits >> 62))),  // 1, 2, 3 are 128, 64, 32 bytes: as in a tensor map, reversed
        row_bytes(swizzle ? 16u << swizzle : 16) {}

  // Eight neighbours in 16 bytes. K-major: (mn, 8 k8 ...), the neighbours along k.
  u32 k_major(u32 mn, u32 k8) const {
    u32 at = start + mn / 8 * stride + mn % 8 * row_bytes + (swizzle ? k8 * 16 : k8 * leading);
    return swizzled(at, swizzle);
  }
  // MN-major: (8 mn8 ..., k), the neighbours along mn. A row of k holds row_bytes of mn.
  u32 mn_major(u32 mn8, u32 k) const {
    if (!swizzle) return start + mn8 * stride + k / 8 * leading + k % 8 * 16;
    u32 per_row = row_bytes / 16;
    return swizzled(start + mn8 / per_row * leading + mn8 % per_row * 16 + k / 8 * stride + k % 8 * row_bytes,
                    swizzle);
  }
};

// Rows [first, first + count) along M or N, all K columns, in 16-byte units: visit(address, mn, k, along_mn).
template <class Visit>
void walk_operand(const Descriptor &descriptor, u32 first, u32 count, bool transposed, Visit visit) {
  if (transposed)
    for (u32 mn = first; mn < first + count; mn += 8)
      for (u32 k = 0; k < K; k++) visit(descriptor.mn_major(mn / 8, k), mn, k);
  else
    for (u32 mn = first; mn < first + count; mn++)
      for (u32 k = 0; k < K; k += 8) visit(descriptor.k_major(mn, k / 8), mn, k);
}

u32 row_in_group(const Warp &warp) { return warp.index % 4 * 16; }

// Fills operand[(mn - first) * K + k].
void read_operand(const Block &block, const Descriptor &descriptor, u32 first, u32 count, bool transposed,
                  Format format, float *operand) {
  walk_operand(descriptor, first, count, transposed, [&](u32 at, u32 mn, u32 k) {
    u16 bits[8];
    memcpy(bits, block.shared + (at - SHARED_BASE), 16);
    for (u32 e = 0; e < 8; e++) {
      u32 row = mn - first + (transposed ? e : 0), column = k + (transposed ? 0 : e);
      operand[row * K + column] = element_of(bits[e], format);
    }
  });
}

void check_operand(const Descriptor &descriptor, u32 first, u32 count, bool transposed, u32 agent) {
  walk_operand(descriptor, first, count, transposed,
               [&](u32 at, u32, u32) { on_product_read(shared_at(at, 16, 16, "wgmma operand"), 16, agent); });
}

// Accumulator e of a lane: row, then column.
u32 accumulator_at(u32 lane, u32 e, u32 n) {
  return (lane / 4 + e / 2 % 2 * 8) * n + e / 4 * 8 + lane % 4 * 2 + e % 2;
}

bool same_registers(const Wgmma &product, const float *d) { return product.d[0] == d; }

bool is_pending(const Warp &warp, const float *d) {
  for (const auto &product : warp.products)
    if (same_registers(*product, d)) return true;
  for (const auto &group : warp.product_groups)
    for (const auto &product : group)
      if (same_registers(*product, d)) return true;
  return false;
}

void mark_pending(Thread &thread, u64 id, const void *registers, u32 bytes, bool accumulator) {
  Registers &r = *thread.registers;
  u64 begin = (u64)registers;
  r.pending.push_back({begin, begin + bytes, id, accumulator, short_pc(thread.pc)});
  r.lowest = r.lowest < begin ? r.lowest : begin;
  r.highest = r.highest > begin + bytes ? r.highest : begin + bytes;
}

void unmark_pending(Thread &thread, u64 id) {
  Registers &r = *thread.registers;
  std::vector<RegisterRange> kept;
  for (const RegisterRange &range : r.pending)
    if (range.operation != id) kept.push_back(range);
  r.pending.swap(kept);
  r.lowest = ~0ull, r.highest = 0;
  for (const RegisterRange &range : r.pending) {
    r.lowest = r.lowest < range.begin ? r.lowest : range.begin;
    r.highest = r.highest > range.end ? r.highest : range.end;
  }
}

// The protocol: no register may have been written since the last wgmma.fence. An accumulator that an earlier
// product of the same shape still owns needs none.
void check_fence(const void *registers, u32 bytes, const char *what) {
  if (!self->registers || !self->registers->fences) fail("missing wgmma fence", "wgmma before any wgmma.fence");
  if (!self->stack.contains((u64)registers))
    fail("misuse", "%s of a wgmma lie outside the thread's registers: they must be an array of its own", what);
  Registers &r = *self->registers;
  u64 first = ((u64)registers - (u64)self->stack.base) / 4;
  for (u64 i = first; i < first + bytes / 4; i++)
    if (r.written[i] == r.fences)
      fail("missing wgmma fence", "%s of this wgmma, register %llu, were written after the last wgmma.fence",
           what, (unsigned long long)(i - first));
}

// Nothing that an unfinished product owns may be given to another, except the same accumulators in the same
// order.
void check_overlap(const void *registers, u32 bytes, bool accumulator) {
  u64 begin = (u64)registers, end = begin + bytes;
  for (const RegisterRange &range : self->registers->pending) {
    if (begin >= range.end || range.begin >= end) continue;
    if (accumulator && range.accumulator && range.begin == begin && range.end == end) continue;
    if (!accumulator && !range.accumulator) continue;
    fail("wgmma registers", "registers of this wgmma are in use by the unfinished wgmma at %s",
         place_of(range.pc).c_str());
  }
}

void check_lane(const Wgmma &product, u32 lane, bool chained) {
  if (!chained) check_fence(product.d[lane], product.n * 2, "accumulators");
  check_overlap(product.d[lane], product.n * 2, true);
  if (product.a_live[lane]) {
    check_fence(product.a_live[lane], 16, "operand registers");
    check_overlap(product.a_live[lane], 16, false);
  }
}

void hide_accumulators(Wgmma &product) {
  product.before.resize(WARP * product.n / 2);
  for (u32 lane = 0; lane < WARP; lane++) {
    memcpy(&product.before[lane * product.n / 2], product.d[lane], product.n * 2);
    for (u32 e = 0; e < product.n / 2; e++) product.d[lane][e] = NAN;
  }
}

}  // namespace

void land_product(Wgmma &p) {
  if (p.landed) return;
  p.landed = true;
  const Block &block = *p.warp->block;
  std::vector<float> A(16 * K), BT(p.n * K), B(K * p.n), D(16 * p.n, 0.0f);
  for (u32 lane = 0; lane < WARP; lane++) {
    if (p.a_live[lane]) unpack_a(lane, p.a[lane], p.format, A.data(), K);
    if (!p.before.empty()) memcpy(p.d[lane], &p.before[lane * p.n / 2], p.n * 2);
    if (p.accumulate)
      for (u32 e = 0; e < p.n / 2; e++) D[accumulator_at(lane, e, p.n)] = p.d[lane][e];
  }
  if (!p.a_live[0])
    read_operand(block, Descriptor(p.a_descriptor), row_in_group(*p.warp), 16, p.a_transposed, p.format,
                 A.data());
  read_operand(block, Descriptor(p.b_descriptor), 0, p.n, p.b_transposed, p.format, BT.data());
  for (u32 j = 0; j < p.n; j++)
    for (u32 k = 0; k < K; k++) B[k * p.n + j] = BT[j * K + k];
  multiply(16, p.n, K, A.data(), B.data(), D.data(), D.data());
  for (u32 lane = 0; lane < WARP; lane++)
    for (u32 e = 0; e < p.n / 2; e++) p.d[lane][e] = D[accumulator_at(lane, e, p.n)];
}

void wgmma(Format format, int n, float *d, const uint32_t *a, uint64_t a_descriptor, uint64_t b_descriptor,
           bool a_transposed, bool b_transposed, bool accumulate) {
  EMULATOR_ENTER();
  if (n < 8 || n > 256 || n % 8) fail("misuse", "wgmma with N = %d", n);
  WgmmaArgument mine{d, a, a_descriptor, b_descriptor, accumulate};
  collective("wgmma.mma_async", true, ~0u, &mine, [&](Collective &c) {
    Warp &warp = *self->warp;
    auto product = std::make_shared<Wgmma>();
    Wgmma &p = *product;
    p.format = format, p.n = (u32)n, p.warp = &warp, p.id = ++launch->operations;
    p.a_descriptor = a_descriptor, p.b_descriptor = b_descriptor;
    p.a_transposed = a_transposed, p.b_transposed = b_transposed, p.accumulate = accumulate;
    bool chained = is_pending(warp, ((WgmmaArgument *)c.arguments[0])->d);
    if (!warp.product_agent) warp.product_agent = new_agent(*warp.block);
    for (u32 lane = 0; lane < WARP; lane++) {
      auto *x = (WgmmaArgument *)c.arguments[lane];
      if (x->a_descriptor != a_descriptor || x->b_descriptor != b_descriptor || x->accumulate != accumulate)
        fail("divergence", "wgmma: descriptors or the scale of D differ between lanes");
      p.d[lane] = x->d, p.a_live[lane] = x->a;
      if (x->a) memcpy(p.a[lane], x->a, 16);
      as_lane(lane, c, [&] {
        check_lane(p, lane, chained);
        mark_pending(*self, p.id, x->d, p.n * 2, true);
        if (x->a) mark_pending(*self, p.id, x->a, 16, false);
      });
    }
    if (!a) check_operand(Descriptor(a_descriptor), row_in_group(warp), 16, a_transposed, warp.product_agent);
    check_operand(Descriptor(b_descriptor), 0, p.n, b_transposed, warp.product_agent);
    Schedule &schedule = launch->schedule;
    // A product in a chain must not run before the ones it adds to.
    bool eager =
        schedule.async == Async::EAGER || (schedule.async == Async::RANDOM && !chained && schedule.draw(2));
    if (eager)
      land_product(p);
    else if (!chained)
      hide_accumulators(p);
    warp.products.push_back(product);
    warp.products_issued++;
  });
}

void wgmma_fence() {
  EMULATOR_ENTER();
  watch_registers();
  self->registers->fences++;
  collective("wgmma.fence", true, ~0u, nullptr, [](Collective &) {});
}

void wgmma_commit() {
  EMULATOR_ENTER();
  collective("wgmma.commit_group", true, ~0u, nullptr, [](Collective &) {
    Warp &warp = *self->warp;
    warp.product_groups.push_back(std::move(warp.products));
    warp.products.clear();
    warp.group_agents.push_back(warp.product_agent);
    warp.group_ticks.push_back(warp.product_agent ? agent_tick(*warp.block, warp.product_agent) : 0);
    warp.product_agent = 0;
  });
}

void wgmma_wait(int groups_left) {
  EMULATOR_ENTER();
  collective("wgmma.wait_group", true, ~0u, nullptr, [&](Collective &) {
    Warp &warp = *self->warp;
    while ((int)warp.product_groups.size() > groups_left) {
      for (auto &product : warp.product_groups.front()) {
        land_product(*product);
        for (u32 lane = 0; lane < WARP; lane++)
          unmark_pending(warp.block->threads[warp.index * WARP + lane], product->id);
      }
      if (u32 agent = warp.group_agents.front())
        for (u32 lane = 0; lane < WARP; lane++)
          warp.block->threads[warp.index * WARP + lane].clock.raise(agent, warp.group_ticks.front(),
                                                                    warp.block->slots());
      warp.product_groups.pop_front();
      warp.group_agents.pop_front();
      warp.group_ticks.pop_front();
    }
  });
  maybe_yield();
}

}  // namespace emulator

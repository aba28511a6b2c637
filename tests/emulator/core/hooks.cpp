// What the compiler calls: -fsanitize=thread at every load and store, -fsanitize=alignment,bounds,... at
// faults. Linking without the sanitizers' libraries leaves these names to us.
#include <cstring>

#include "report.h"
#include "shadow.h"

using namespace emulator;

namespace {

[[noreturn]] void fail_alignment(const void *p, u32 alignment) {
  std::string where = self->stack.contains((u64)p) ? "a local variable" : name_of(p);
  fail("misaligned", "an access that needs %u-byte alignment at %s", alignment, where.c_str());
}

}  // namespace

#define EMULATOR_HOOK(name, bytes, access)                    \
  extern "C" void name(const void *p) {                       \
    if (!self) return; /* static initialisers, on the host */ \
    self->pc = __builtin_return_address(0);                   \
    access(p, bytes);                                         \
  }
#define EMULATOR_ALIGNED_HOOK(name, bytes, access)                                           \
  extern "C" void name(const void *p) {                                                      \
    if (!self) return;                                                                       \
    self->pc = __builtin_return_address(0);                                                  \
    if ((uint64_t)p % bytes && !self->stack.contains((uint64_t)p)) fail_alignment(p, bytes); \
    access(p, bytes);                                                                        \
  }
#define EMULATOR_HOOKS(bytes)                                        \
  EMULATOR_ALIGNED_HOOK(__tsan_read##bytes, bytes, on_load)          \
  EMULATOR_ALIGNED_HOOK(__tsan_write##bytes, bytes, on_store)        \
  EMULATOR_HOOK(__tsan_unaligned_read##bytes, bytes, on_load)        \
  EMULATOR_HOOK(__tsan_unaligned_write##bytes, bytes, on_store)      \
  EMULATOR_ALIGNED_HOOK(__tsan_volatile_read##bytes, bytes, on_load) \
  EMULATOR_ALIGNED_HOOK(__tsan_volatile_write##bytes, bytes, on_store)
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)

extern "C" void __tsan_init() {}
extern "C" void __tsan_read_range(const void *p, uint64_t bytes) {
  if (!self || !bytes) return;
  EMULATOR_ENTER();
  on_load(p, (u32)bytes);
}
extern "C" void __tsan_write_range(const void *p, uint64_t bytes) {
  if (!self || !bytes) return;
  EMULATOR_ENTER();
  on_store(p, (u32)bytes);
}

// ---- undefined behaviour. The handlers get records with file and line, but the caller's place says the same.
namespace {

[[noreturn]] void undefined(const void *pc, const char *kind, const char *text) {
  self->pc = pc;
  fail(kind, "%s", text);
}

}  // namespace

#define EMULATOR_FAULT(name, parameters, kind, text)              \
  extern "C" void __ubsan_handle_##name parameters {              \
    if (self) undefined(__builtin_return_address(0), kind, text); \
  }
EMULATOR_FAULT(out_of_bounds, (void *, void *), "out of bounds", "an index outside its array")
EMULATOR_FAULT(add_overflow, (void *, void *, void *), "undefined", "a signed addition overflows")
EMULATOR_FAULT(sub_overflow, (void *, void *, void *), "undefined", "a signed subtraction overflows")
EMULATOR_FAULT(mul_overflow, (void *, void *, void *), "undefined", "a signed multiplication overflows")
EMULATOR_FAULT(negate_overflow, (void *, void *), "undefined", "a signed negation overflows")
EMULATOR_FAULT(divrem_overflow, (void *, void *, void *), "undefined",
               "a division by zero, or one that overflows")
EMULATOR_FAULT(shift_out_of_bounds, (void *, void *, void *), "undefined",
               "a shift by more than the type's width")
EMULATOR_FAULT(missing_return, (void *), "undefined", "a function ends without its return")
EMULATOR_FAULT(builtin_unreachable, (void *), "undefined", "unreachable code is reached")

namespace {

struct TypeMismatch {
  struct {
    const char *file;
    u32 line, column;
  } location;
  const void *type;
  unsigned char log_alignment, kind;
};

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(TypeMismatch *data, uint64_t p) {
  if (!self) return;
  EMULATOR_ENTER();
  if (p % (1u << data->log_alignment)) fail_alignment((const void *)p, 1u << data->log_alignment);
}

namespace emulator {

Dim3 thread_index() { return self->builtins.thread; }
Dim3 block_index() { return self->builtins.block; }
Dim3 block_dim() { return self->builtins.block_dim; }
Dim3 grid_dim() { return self->builtins.grid_dim; }

namespace {

void check_vector(const void *p, u32 bytes) {
  if ((u64)p % bytes) fail_alignment(p, bytes);
}

Bytes read_checked(const void *p, u32 bytes) {
  Bytes value{0, 0};
  memcpy(&value, p, bytes);
  return value;
}

}  // namespace

Bytes load_bytes(const void *p, uint32_t bytes) {
  EMULATOR_ENTER();
  check_vector(p, bytes);
  on_load(p, bytes);
  return read_checked(p, bytes);
}

Bytes load_constant_bytes(const void *p, uint32_t bytes) {
  EMULATOR_ENTER();
  check_vector(p, bytes);
  on_load(p, bytes);
  if (is_shared(p)) fail("misuse", "a load through the read-only path of %s", name_of(p).c_str());
  if (!self->stack.contains((u64)p) &&
      (u64)p - launch->module_begin >= launch->module_end - launch->module_begin) {
    Buffer &buffer = buffer_of(p, bytes, "read");
    if (!buffer.cells.empty() &&
        buffer.cells[(u64)((const u8 *)p - buffer.data) >> buffer.shift].writer_block != NOBODY)
      fail("misuse", "a load through the read-only path of %s, which this kernel writes", name_of(p).c_str());
  }
  return read_checked(p, bytes);
}

void store_bytes(void *p, Bytes value, uint32_t bytes) {
  EMULATOR_ENTER();
  check_vector(p, bytes);
  on_store(p, bytes);
  memcpy(p, &value, bytes);
}

void trap() {
  EMULATOR_ENTER();
  fail("trap", "the kernel trapped");
}

}  // namespace emulator

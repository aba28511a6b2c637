// What a kernel sees when g++ compiles it: CUDA's qualifiers, types and functions, and the emulator behind
// them.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "interface.h"

// Declared by hand: the C++ headers take g++ longer than most kernels do.
extern "C" {
#define EMULATOR_MATH_1(name)   \
  double name(double) noexcept; \
  float name##f(float) noexcept;
#define EMULATOR_MATH_2(name)           \
  double name(double, double) noexcept; \
  float name##f(float, float) noexcept;
EMULATOR_MATH_1(exp)
EMULATOR_MATH_1(exp2) EMULATOR_MATH_1(expm1) EMULATOR_MATH_1(log) EMULATOR_MATH_1(log2) EMULATOR_MATH_1(log1p)
    EMULATOR_MATH_1(sqrt) EMULATOR_MATH_1(fabs) EMULATOR_MATH_1(floor) EMULATOR_MATH_1(ceil)
        EMULATOR_MATH_1(trunc) EMULATOR_MATH_1(rint) EMULATOR_MATH_1(sin) EMULATOR_MATH_1(cos)
            EMULATOR_MATH_1(tanh) EMULATOR_MATH_2(fmin) EMULATOR_MATH_2(fmax) EMULATOR_MATH_2(fmod)
                EMULATOR_MATH_2(pow) EMULATOR_MATH_2(copysign) double fma(double, double, double) noexcept;
float fmaf(float, float, float) noexcept;
double ldexp(double, int) noexcept;
float ldexpf(float, int) noexcept;
int abs(int) noexcept;
void *memcpy(void *, const void *, size_t) noexcept;
void *memset(void *, int, size_t) noexcept;
}

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

#define EMULATOR_WORD static inline __attribute__((always_inline))

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_dim())
#define gridDim (emulator::grid_dim())
constexpr int warpSize = 32;

// ---- vector types
#define EMULATOR_VECTORS(T, name, a2, a4)                                   \
  struct name##1 { T x; };                                                  \
  struct alignas(a2) name##2 { T x, y; };                                   \
  struct name##3 { T x, y, z; };                                            \
  struct alignas(a4) name##4 { T x, y, z, w; };                             \
  EMULATOR_WORD name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  EMULATOR_WORD name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  EMULATOR_WORD name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 8, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
using dim3 = emulator::Dim3;

// ---- synchronisation
EMULATOR_WORD void __syncthreads() { emulator::sync_threads(); }
EMULATOR_WORD int __syncthreads_count(int p) {
  return (int)emulator::sync_threads_vote(p, emulator::SYNC_COUNT);
}
EMULATOR_WORD int __syncthreads_and(int p) { return (int)emulator::sync_threads_vote(p, emulator::SYNC_AND); }
EMULATOR_WORD int __syncthreads_or(int p) { return (int)emulator::sync_threads_vote(p, emulator::SYNC_OR); }
EMULATOR_WORD void __syncwarp(unsigned mask = ~0u) { emulator::sync_warp(mask); }
EMULATOR_WORD void __threadfence() { emulator::memory_fence(emulator::ACQUIRE_RELEASE); }
EMULATOR_WORD void __threadfence_block() { emulator::memory_fence(emulator::ACQUIRE_RELEASE); }
EMULATOR_WORD void __trap() { emulator::trap(); }
EMULATOR_WORD void __nanosleep(unsigned) {}

// ---- shuffles and votes
template <class T>
EMULATOR_WORD T emulator_shuffle(const char *name, unsigned mask, T value, int argument, int width, int mode) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 2, 4 or 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = emulator::shuffle(name, mask, bits, argument, width, mode);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
EMULATOR_WORD T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator_shuffle("__shfl_sync", mask, value, lane, width, emulator::SHUFFLE_INDEX);
}
template <class T>
EMULATOR_WORD T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator_shuffle("__shfl_up_sync", mask, value, (int)delta, width, emulator::SHUFFLE_UP);
}
template <class T>
EMULATOR_WORD T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator_shuffle("__shfl_down_sync", mask, value, (int)delta, width, emulator::SHUFFLE_DOWN);
}
template <class T>
EMULATOR_WORD T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emulator_shuffle("__shfl_xor_sync", mask, value, lanes, width, emulator::SHUFFLE_XOR);
}
EMULATOR_WORD unsigned __ballot_sync(unsigned mask, int p) {
  return emulator::vote("__ballot_sync", mask, p, emulator::VOTE_BALLOT);
}
EMULATOR_WORD int __all_sync(unsigned mask, int p) {
  return (int)emulator::vote("__all_sync", mask, p, emulator::VOTE_ALL);
}
EMULATOR_WORD int __any_sync(unsigned mask, int p) {
  return (int)emulator::vote("__any_sync", mask, p, emulator::VOTE_ANY);
}
EMULATOR_WORD unsigned __activemask() { return emulator::active_mask(); }
#define EMULATOR_REDUCE(name, T, mode)                                        \
  EMULATOR_WORD T name(unsigned mask, T value) {                              \
    return (T)emulator::reduce(#name, mask, (unsigned)value, emulator::mode); \
  }
EMULATOR_REDUCE(__reduce_add_sync, unsigned, REDUCE_ADD)
EMULATOR_REDUCE(__reduce_add_sync, int, REDUCE_ADD)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, REDUCE_MIN)
EMULATOR_REDUCE(__reduce_min_sync, int, REDUCE_MIN_SIGNED)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, REDUCE_MAX)
EMULATOR_REDUCE(__reduce_max_sync, int, REDUCE_MAX_SIGNED)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, REDUCE_AND)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, REDUCE_OR)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, REDUCE_XOR)

// ---- atomics: relaxed, as in CUDA
template <class T>
struct EmulatorAtomic;
template <>
struct EmulatorAtomic<int> {
  static constexpr auto type = emulator::TYPE_I32;
};
template <>
struct EmulatorAtomic<unsigned> {
  static constexpr auto type = emulator::TYPE_U32;
};
template <>
struct EmulatorAtomic<long long> {
  static constexpr auto type = emulator::TYPE_I64;
};
template <>
struct EmulatorAtomic<unsigned long long> {
  static constexpr auto type = emulator::TYPE_U64;
};
template <>
struct EmulatorAtomic<float> {
  static constexpr auto type = emulator::TYPE_F32;
};
template <>
struct EmulatorAtomic<double> {
  static constexpr auto type = emulator::TYPE_F64;
};
template <class T>
EMULATOR_WORD T emulator_atomic(emulator::AtomicOperation operation, T *p, T value, T compare,
                                emulator::MemoryOrder order) {
  uint64_t bits = 0, other = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  __builtin_memcpy(&other, &compare, sizeof(T));
  bits = emulator::atomic(operation, EmulatorAtomic<T>::type, p, bits, other, order);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
#define EMULATOR_ATOMIC(name, operation)                                           \
  template <class T>                                                               \
  EMULATOR_WORD T name(T *p, T value) {                                            \
    return emulator_atomic(emulator::operation, p, value, T(), emulator::RELAXED); \
  }
EMULATOR_ATOMIC(atomicAdd, ATOMIC_ADD)
EMULATOR_ATOMIC(atomicMin, ATOMIC_MIN)
EMULATOR_ATOMIC(atomicMax, ATOMIC_MAX)
EMULATOR_ATOMIC(atomicAnd, ATOMIC_AND)
EMULATOR_ATOMIC(atomicOr, ATOMIC_OR)
EMULATOR_ATOMIC(atomicXor, ATOMIC_XOR)
EMULATOR_ATOMIC(atomicExch, ATOMIC_EXCHANGE)
template <class T>
EMULATOR_WORD T atomicCAS(T *p, T compare, T value) {
  return emulator_atomic(emulator::ATOMIC_CAS, p, value, compare, emulator::RELAXED);
}

// ---- arithmetic. Approximate functions are exact ones here. The C library declares some of CUDA's names.
#define __expf expf
#define __logf logf
#define __log2f log2f
template <class T>
EMULATOR_WORD T __ldg(const T *p) {
  return *p;
}
EMULATOR_WORD int min(int a, int b) { return a < b ? a : b; }
EMULATOR_WORD int max(int a, int b) { return a > b ? a : b; }
EMULATOR_WORD unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
EMULATOR_WORD unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
EMULATOR_WORD long long min(long long a, long long b) { return a < b ? a : b; }
EMULATOR_WORD long long max(long long a, long long b) { return a > b ? a : b; }
EMULATOR_WORD float min(float a, float b) { return fminf(a, b); }
EMULATOR_WORD float max(float a, float b) { return fmaxf(a, b); }
EMULATOR_WORD double min(double a, double b) { return fmin(a, b); }
EMULATOR_WORD double max(double a, double b) { return fmax(a, b); }
EMULATOR_WORD float __fadd_rn(float a, float b) { return a + b; }
EMULATOR_WORD float __fsub_rn(float a, float b) { return a - b; }
EMULATOR_WORD float __fmul_rn(float a, float b) { return a * b; }
EMULATOR_WORD float __fdiv_rn(float a, float b) { return a / b; }
EMULATOR_WORD float __frcp_rn(float a) { return 1.0f / a; }
EMULATOR_WORD float __fsqrt_rn(float a) { return sqrtf(a); }
EMULATOR_WORD float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMULATOR_WORD double __dadd_rn(double a, double b) { return a + b; }
EMULATOR_WORD double __dmul_rn(double a, double b) { return a * b; }
EMULATOR_WORD double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
EMULATOR_WORD float __fdividef(float a, float b) { return a / b; }
EMULATOR_WORD float rsqrtf(float a) { return 1.0f / sqrtf(a); }
EMULATOR_WORD double rsqrt(double a) { return 1.0 / sqrt(a); }
EMULATOR_WORD int __popc(unsigned a) { return __builtin_popcount(a); }
EMULATOR_WORD int __clz(int a) { return a ? __builtin_clz((unsigned)a) : 32; }
EMULATOR_WORD int __ffs(int a) { return __builtin_ffs(a); }
EMULATOR_WORD unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
template <class To, class From>
EMULATOR_WORD To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
EMULATOR_WORD int __float_as_int(float a) { return emulator_bits<int>(a); }
EMULATOR_WORD unsigned __float_as_uint(float a) { return emulator_bits<unsigned>(a); }
EMULATOR_WORD float __int_as_float(int a) { return emulator_bits<float>(a); }
EMULATOR_WORD float __uint_as_float(unsigned a) { return emulator_bits<float>(a); }
EMULATOR_WORD long long __double_as_longlong(double a) { return emulator_bits<long long>(a); }
EMULATOR_WORD double __longlong_as_double(long long a) { return emulator_bits<double>(a); }
EMULATOR_WORD uint32_t __cvta_generic_to_shared(const void *p) { return emulator::shared_address(p); }

// ---- makes a kernel callable by the launcher: its arguments are copied from where the launch has them
namespace emulator {
template <class... A>
struct Arguments;
template <>
struct Arguments<> {
  explicit Arguments(void **) {}
  template <class Kernel, class... Before>
  void call(Kernel kernel, const Before &...before) const {
    kernel(before...);
  }
};
template <class First, class... Rest>
struct Arguments<First, Rest...> {
  First first;
  Arguments<Rest...> rest;
  explicit Arguments(void **p) : first(*(First *)*p), rest(p + 1) {}
  template <class Kernel, class... Before>
  void call(Kernel kernel, const Before &...before) const {
    rest.call(kernel, before..., first);
  }
};
template <class... A>
Arguments<A...> &arguments_of(void (*)(A...), void *p) {
  return *(Arguments<A...> *)p;
}
template <class... A>
const char *enter(void (*kernel)(A...), void (*thunk)(void *), void **p) {
  Arguments<A...> arguments(p);
  return run_kernel(thunk, &arguments, sizeof arguments, (const void *)kernel);
}
template <class... A>
size_t argument_sizes(void (*)(A...), uint64_t *sizes) {
  size_t i = 0;
  ((sizes[i++] = sizeof(A)), ...);
  return i;
}
}  // namespace emulator
#define EMULATOR_ENTRY(kernel)                                                                \
  extern "C" const char *emulator_run_##kernel(void **arguments) {                            \
    return emulator::enter(                                                                   \
        kernel, +[](void *p) { emulator::arguments_of(kernel, p).call(kernel); }, arguments); \
  }                                                                                           \
  extern "C" uint64_t emulator_sizes_##kernel(uint64_t *sizes) {                              \
    return emulator::argument_sizes(kernel, sizes);                                           \
  }

// kernels/mma_sm80.cuh for a run on the CPU: the same names, each handed to the emulator.
#pragma once
#include "types.cuh"

__device__ __forceinline__ unsigned shared_address(const void* p) { return emulator::shared_address(p); }

__device__ __forceinline__ unsigned warp_uniform(unsigned x) { return __reduce_max_sync(0xffffffffu, x); }
__device__ __forceinline__ int warp_uniform(int x) { return __reduce_max_sync(0xffffffffu, x); }

template <typename Element>
struct ElementFormat;
template <>
struct ElementFormat<Float16> {
  static constexpr emulator::Format value = emulator::FLOAT16;
};
template <>
struct ElementFormat<Bfloat16> {
  static constexpr emulator::Format value = emulator::BFLOAT16;
};

template <typename Element>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<Float16>(float low, float high) {
  return emulator::to_float16(low) | static_cast<unsigned>(emulator::to_float16(high)) << 16;
}
template <>
__device__ __forceinline__ unsigned pack<Bfloat16>(float low, float high) {
  return emulator::to_bfloat16(low) | static_cast<unsigned>(emulator::to_bfloat16(high)) << 16;
}

__device__ __forceinline__ unsigned upper_halves(unsigned low, unsigned high) {
  return low >> 16 | (high & 0xffff0000u);
}

template <typename Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulator::mma(ElementFormat<Element>::value, 16, 8, 16, d, a, b, d);
}
template <typename Element>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const unsigned (&a)[2], unsigned b) {
  emulator::mma(ElementFormat<Element>::value, 16, 8, 8, d, a, &b, d);
}
__device__ __forceinline__ void mma_m16n8k4_tf32(float (&d)[4], const unsigned (&a)[2], unsigned b) {
  emulator::mma(emulator::TFLOAT32, 16, 8, 4, d, a, &b, d);
}
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4],
                                                 const unsigned (&b)[2]) {
  emulator::mma(emulator::TFLOAT32, 16, 8, 8, d, a, b, d);
}
__device__ __forceinline__ void mma_m8n8k4_f64(double (&d)[2], double a, double b) {
  emulator::mma(emulator::FLOAT64, 8, 8, 4, d, &a, &b, d);
}

__device__ __forceinline__ void ldmatrix_x1(unsigned (&r)[1], unsigned shared) {
  emulator::load_matrix(r, 1, shared, false);
}
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], unsigned shared) {
  emulator::load_matrix(r, 2, shared, false);
}
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned shared) {
  emulator::load_matrix(r, 4, shared, false);
}
__device__ __forceinline__ void ldmatrix_x1_trans(unsigned (&r)[1], unsigned shared) {
  emulator::load_matrix(r, 1, shared, true);
}
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], unsigned shared) {
  emulator::load_matrix(r, 2, shared, true);
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], unsigned shared) {
  emulator::load_matrix(r, 4, shared, true);
}
__device__ __forceinline__ unsigned movmatrix_trans(unsigned r) { return emulator::transpose_matrix(r); }

template <int BYTES>
__device__ __forceinline__ void cp_async(unsigned shared, const void* global, int source_bytes) {
  emulator::copy_async(shared, global, BYTES, source_bytes);
}
template <int BYTES>
__device__ __forceinline__ void cp_async(unsigned shared, const void* global) {
  emulator::copy_async(shared, global, BYTES, BYTES);
}
__device__ __forceinline__ void cp_async_commit() { emulator::copy_async_commit(); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  emulator::copy_async_wait(N);
}

__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  emulator::named_barrier("bar.sync", barrier, threads, true);
}
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  emulator::named_barrier("bar.arrive", barrier, threads, false);
}

__device__ __forceinline__ void add_global(float* p, const float (&x)[4]) {
  emulator::atomic_vector_add(emulator::TYPE_F32, p, x, 4);
}

__device__ __forceinline__ int load_acquire(const int* flag) {
  return static_cast<int>(emulator::load_ordered(flag, 4, emulator::ACQUIRE));
}
__device__ __forceinline__ void store_release(int* flag, int value) {
  emulator::store_ordered(flag, static_cast<unsigned>(value), 4, emulator::RELEASE);
}
__device__ __forceinline__ void add_release(int* flag, int value) {
  emulator::atomic(emulator::ATOMIC_ADD, emulator::TYPE_I32, flag, static_cast<unsigned>(value), 0,
                   emulator::RELEASE);
}
__device__ __forceinline__ int add_acquire_release(int* flag, int value) {
  return static_cast<int>(emulator::atomic(emulator::ATOMIC_ADD, emulator::TYPE_I32, flag, static_cast<unsigned>(value),
                                           0, emulator::ACQUIRE_RELEASE));
}

// kernels/mma_sm90.cuh for a run on the CPU: the same names, each handed to the emulator.
// (kernels/descriptors.cuh is arithmetic and not replaced: it stands in the text before this.)
#pragma once
#include "types.cuh"
#include "mma_sm80.cuh"

__device__ __forceinline__ void mma_m16n8k4_f64(double (&d)[4], const double (&a)[2], double b) {
  emulator::mma(emulator::FLOAT64, 16, 8, 4, d, a, &b, d);
}
__device__ __forceinline__ void mma_m16n8k8_f64(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
  emulator::mma(emulator::FLOAT64, 16, 8, 8, d, a, b, d);
}
__device__ __forceinline__ void mma_m16n8k16_f64(double (&d)[4], const double (&a)[8], const double (&b)[4]) {
  emulator::mma(emulator::FLOAT64, 16, 8, 16, d, a, b, d);
}

__device__ __forceinline__ void stmatrix_x1(unsigned shared, const unsigned (&r)[1]) {
  emulator::store_matrix(r, 1, shared, false);
}
__device__ __forceinline__ void stmatrix_x2(unsigned shared, const unsigned (&r)[2]) {
  emulator::store_matrix(r, 2, shared, false);
}
__device__ __forceinline__ void stmatrix_x4(unsigned shared, const unsigned (&r)[4]) {
  emulator::store_matrix(r, 4, shared, false);
}
__device__ __forceinline__ void stmatrix_x1_trans(unsigned shared, const unsigned (&r)[1]) {
  emulator::store_matrix(r, 1, shared, true);
}
__device__ __forceinline__ void stmatrix_x2_trans(unsigned shared, const unsigned (&r)[2]) {
  emulator::store_matrix(r, 2, shared, true);
}
__device__ __forceinline__ void stmatrix_x4_trans(unsigned shared, const unsigned (&r)[4]) {
  emulator::store_matrix(r, 4, shared, true);
}

__device__ __forceinline__ void add_global(float* p, const float (&x)[2]) {
  emulator::atomic_vector_add(emulator::TYPE_F32, p, x, 2);
}

__device__ __forceinline__ bool elect_one() { return emulator::elect(0xffffffffu); }

__device__ __forceinline__ void mbarrier_init(unsigned mbarrier, int count) {
  emulator::mbarrier_init(mbarrier, count);
}
__device__ __forceinline__ void mbarrier_inval(unsigned mbarrier) { emulator::mbarrier_invalidate(mbarrier); }
__device__ __forceinline__ void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
__device__ __forceinline__ void mbarrier_arrive(unsigned mbarrier) {
  emulator::mbarrier_arrive(mbarrier, 1, 0, false);
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned mbarrier, int bytes) {
  emulator::mbarrier_arrive(mbarrier, 1, bytes, true);
}
__device__ __forceinline__ void mbarrier_expect_tx(unsigned mbarrier, int bytes) {
  emulator::mbarrier_expect(mbarrier, bytes);
}
__device__ __forceinline__ bool mbarrier_try_wait(unsigned mbarrier, int parity) {
  return emulator::mbarrier_test(mbarrier, parity);
}
__device__ __forceinline__ void mbarrier_wait(unsigned mbarrier, int parity) {
  emulator::mbarrier_wait(mbarrier, parity);
}

__device__ __forceinline__ void fence_proxy_async() { emulator::fence_proxy_async(true, true); }
__device__ __forceinline__ void fence_proxy_async_shared() { emulator::fence_proxy_async(true, false); }
__device__ __forceinline__ void fence_proxy_async_global() { emulator::fence_proxy_async(false, true); }

__device__ __forceinline__ void bulk_load(unsigned shared, const void* global, int bytes, unsigned mbarrier) {
  emulator::bulk_load(shared, global, bytes, mbarrier);
}
__device__ __forceinline__ void bulk_store(void* global, unsigned shared, int bytes) {
  emulator::bulk_store(global, shared, bytes);
}
__device__ __forceinline__ void bulk_add(float* global, unsigned shared, int bytes) {
  emulator::bulk_reduce(global, shared, bytes, emulator::BULK_ADD_F32);
}
__device__ __forceinline__ void bulk_add(double* global, unsigned shared, int bytes) {
  emulator::bulk_reduce(global, shared, bytes, emulator::BULK_ADD_F64);
}
__device__ __forceinline__ void bulk_commit() { emulator::bulk_commit(); }
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
  emulator::bulk_wait(N, true);
}
template <int N>
__device__ __forceinline__ void bulk_wait() {
  emulator::bulk_wait(N, false);
}

struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap&) {}

template <typename... Coordinates>
__device__ __forceinline__ void tensor_load(unsigned shared, const TensorMap& map, unsigned mbarrier, int x,
                                            int y, Coordinates... more) {
  const int at[] = {x, y, more...};
  emulator::tensor_load(shared, &map, mbarrier, 2 + sizeof...(more), at);
}
template <typename... Coordinates>
__device__ __forceinline__ void tensor_store(const TensorMap& map, unsigned shared, int x, int y,
                                             Coordinates... more) {
  const int at[] = {x, y, more...};
  emulator::tensor_store(&map, shared, 2 + sizeof...(more), at);
}
__device__ __forceinline__ void tensor_add(const TensorMap& map, unsigned shared, int x, int y, int z, int w) {
  const int at[] = {x, y, z, w};
  emulator::tensor_reduce_add(&map, shared, 4, at);
}

template <int N>
__device__ __forceinline__ void setmaxnreg_dec() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg takes multiples of 8 from 24 to 256");
}
template <int N>
__device__ __forceinline__ void setmaxnreg_inc() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg takes multiples of 8 from 24 to 256");
}

__device__ __forceinline__ void wgmma_fence() { emulator::wgmma_fence(); }
__device__ __forceinline__ void wgmma_commit() { emulator::wgmma_commit(); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  emulator::wgmma_wait(N);
}
template <int REGISTERS>
__device__ __forceinline__ void wgmma_hold(float (&)[REGISTERS]) {}

template <typename Element, Major MAJOR_A, Major MAJOR_B, int REGISTERS>
__device__ __forceinline__ void wgmma_ss(float (&d)[REGISTERS], unsigned long long a, unsigned long long b) {
  emulator::wgmma(ElementFormat<Element>::value, 2 * REGISTERS, d, nullptr, a, b, MAJOR_A == Major::MN,
                  MAJOR_B == Major::MN, true);
}
template <typename Element, Major MAJOR_A, Major MAJOR_B, int REGISTERS>
__device__ __forceinline__ void wgmma_first_ss(float (&d)[REGISTERS], unsigned long long a,
                                               unsigned long long b) {
  emulator::wgmma(ElementFormat<Element>::value, 2 * REGISTERS, d, nullptr, a, b, MAJOR_A == Major::MN,
                  MAJOR_B == Major::MN, false);
}
template <typename Element, Major MAJOR_B, int REGISTERS>
__device__ __forceinline__ void wgmma_rs(float (&d)[REGISTERS], const unsigned (&a)[4], unsigned long long b) {
  emulator::wgmma(ElementFormat<Element>::value, 2 * REGISTERS, d, a, 0, b, false, MAJOR_B == Major::MN, true);
}
template <typename Element, Major MAJOR_B, int REGISTERS>
__device__ __forceinline__ void wgmma_first_rs(float (&d)[REGISTERS], const unsigned (&a)[4],
                                               unsigned long long b) {
  emulator::wgmma(ElementFormat<Element>::value, 2 * REGISTERS, d, a, 0, b, false, MAJOR_B == Major::MN, false);
}

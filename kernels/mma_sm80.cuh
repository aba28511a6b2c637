// Instructions since sm_80 (barriers and ordered accesses since sm_70), each under its own name: matrix
// products of a warp, matrix moves, asynchronous copies, named barriers, and accesses that order memory between
// thread blocks.
//
// Fragments of mma.m16n8k*, lane = 4 g + t:  d[0..1]: row g, columns 2 t and 2 t + 1;  d[2..3]: row g + 8.
//   16-bit A: a[0] row g, columns 2 t and 2 t + 1; a[1] row g + 8; a[2], a[3] the same, 8 columns on.
//   16-bit B: b[0] rows 2 t and 2 t + 1 of column g; b[1] 8 rows on.   32- and 64-bit A and B: t in place of 2
//   t, 4 on.
#pragma once
#include "types.cuh"

// The address of something in shared memory as instructions take it.
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// What is the same in all lanes, said so that ptxas knows it: redux writes a uniform register, a shuffle does not.
// Reached by all 32 lanes.
__device__ __forceinline__ unsigned warp_uniform(unsigned x) { return __reduce_max_sync(0xffffffffu, x); }
__device__ __forceinline__ int warp_uniform(int x) { return __reduce_max_sync(0xffffffffu, x); }

// Two numbers, each rounded to nearest even, in one register: `low` in the low half.
template <typename Element>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<Float16>(float low, float high) {
  unsigned packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ unsigned pack<Bfloat16>(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The upper halves of two registers, `low`'s in the low half.
__device__ __forceinline__ unsigned upper_halves(unsigned low, unsigned high) {
  unsigned both;
  asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(both) : "r"(low), "r"(high));
  return both;
}

// ---- d += a b, float32 accumulators
template <typename Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<Float16>(float (&d)[4], const unsigned (&a)[4],
                                                      const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<Bfloat16>(float (&d)[4], const unsigned (&a)[4],
                                                       const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename Element>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const unsigned (&a)[2], unsigned b);
template <>
__device__ __forceinline__ void mma_m16n8k8<Float16>(float (&d)[4], const unsigned (&a)[2], unsigned b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}
template <>
__device__ __forceinline__ void mma_m16n8k8<Bfloat16>(float (&d)[4], const unsigned (&a)[2], unsigned b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Operands are float32 numbers of which the product reads the upper 19 bits.
__device__ __forceinline__ void mma_m16n8k4_tf32(float (&d)[4], const unsigned (&a)[2], unsigned b) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4],
                                                 const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d: row g, columns 2 t and 2 t + 1.
__device__ __forceinline__ void mma_m8n8k4_f64(double (&d)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
}

// ---- 8 x 8 matrices of 16-bit elements between shared memory and registers. Lane 8 i + r gives the address of
// row r of matrix i, 16-byte aligned; lane l gets elements 2 l and 2 l + 1 of matrix i in r[i], or of its
// transpose.
__device__ __forceinline__ void ldmatrix_x1(unsigned (&r)[1], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x1_trans(unsigned (&r)[1], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// The transpose of one matrix that a warp holds.
__device__ __forceinline__ unsigned movmatrix_trans(unsigned r) {
  unsigned transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
  return transposed;
}

// ---- asynchronous copies, global to shared: BYTES = 4, 8 or 16, both addresses aligned to it; what lies
// beyond source_bytes is written as zeros and not read.
template <int BYTES>
__device__ __forceinline__ void cp_async(unsigned shared, const void* global, int source_bytes) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (BYTES == 16) {  // 16 bytes can pass by L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared), "l"(__cvta_generic_to_global(global)), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared), "l"(__cvta_generic_to_global(global)), "n"(BYTES), "r"(source_bytes)
                 : "memory");
  }
}
// All of them: without a number of bytes there is no test and no arithmetic beside the copy.
template <int BYTES>
__device__ __forceinline__ void cp_async(unsigned shared, const void* global) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"(shared), "l"(__cvta_generic_to_global(global))
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                 :
                 : "r"(shared), "l"(__cvta_generic_to_global(global)), "n"(BYTES)
                 : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but this thread's last N groups; other threads learn of it through a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

// ---- named barriers, 0 to 15 (sync_block uses 0); `threads` counts both those that wait and those that only
// arrive
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

// ---- neighbours added to global memory, as one instruction where there is one (sm_90); the address is aligned to all
__device__ __forceinline__ void add_global(float* p, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(p)), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("red.global.add.f32 [%0], %1;" : : "l"(__cvta_generic_to_global(p + i)), "f"(x[i]) : "memory");
  }
#endif
}

// ---- flags between thread blocks, in global memory
// All that this thread wrote, or saw written, before the release is seen by whoever acquires the value after.
__device__ __forceinline__ int load_acquire(const int* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(flag))
               : "memory");
  return value;
}
__device__ __forceinline__ void store_release(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(flag)), "r"(value)
               : "memory");
}
__device__ __forceinline__ void add_release(int* flag, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(flag)), "r"(value)
               : "memory");
}
// The value before the sum; sees all that was written before the releases it comes behind.
__device__ __forceinline__ int add_acquire_release(int* flag, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(flag)), "r"(value)
               : "memory");
  return before;
}

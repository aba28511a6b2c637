// Instructions of sm_90 (compile for sm_90a), each under its own name: mbarriers, bulk and tensor copies,
// wgmma, registers by warpgroup. What they need of each other is said where it is easy to get wrong.
#pragma once
#include "types.cuh"
#include "mma_sm80.cuh"
#include "descriptors.cuh"

// ---- float64 products of a warp, twice the rate of m8n8k4. Fragments as in mma_sm80.cuh: a[2 i], a[2 i + 1]
// are rows g and g + 8 of column t + 4 i; b[i] is row t + 4 i of column g.
__device__ __forceinline__ void mma_m16n8k4_f64(double (&d)[4], const double (&a)[2], double b) {
  asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(b));
}
__device__ __forceinline__ void mma_m16n8k8_f64(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
      "%2, %3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16_f64(double (&d)[4], const double (&a)[8], const double (&b)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7, %8, %9, %10, %11}, "
      "{%12, %13, %14, %15}, {%0, %1, %2, %3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]), "d"(b[0]),
        "d"(b[1]), "d"(b[2]), "d"(b[3]));
}

// ---- the reverse of ldmatrix
__device__ __forceinline__ void stmatrix_x1(unsigned shared, const unsigned (&r)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" : : "r"(shared), "r"(r[0]) : "memory");
}
__device__ __forceinline__ void stmatrix_x2(unsigned shared, const unsigned (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};"
               :
               : "r"(shared), "r"(r[0]), "r"(r[1])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4(unsigned shared, const unsigned (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x1_trans(unsigned shared, const unsigned (&r)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};"
               :
               : "r"(shared), "r"(r[0])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x2_trans(unsigned shared, const unsigned (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
               :
               : "r"(shared), "r"(r[0]), "r"(r[1])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(unsigned shared, const unsigned (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- two neighbours added to global memory as one; the address is aligned to both
__device__ __forceinline__ void add_global(float* p, const float (&x)[2]) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(p)), "f"(x[0]), "f"(x[1])
               : "memory");
}

// One lane of the warp; all lanes take part.
__device__ __forceinline__ bool elect_one() {
  unsigned elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// ---- mbarriers: 8 bytes of shared memory, 8-byte aligned. A phase ends when `count` threads have arrived and
// all bytes announced have come; phases have parity 0, 1, 0, ... An arrival releases, a wait acquires.
__device__ __forceinline__ void mbarrier_init(unsigned mbarrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(mbarrier), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_inval(unsigned mbarrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" : : "r"(mbarrier) : "memory");
}
// After the inits, before the barrier that shows them to other threads: shows them to asynchronous copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(unsigned mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(mbarrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned mbarrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(mbarrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_expect_tx(unsigned mbarrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;"
               :
               : "r"(mbarrier), "r"(bytes)
               : "memory");
}
// Whether the phase of this parity has ended; may come back early with false.
__device__ __forceinline__ bool mbarrier_try_wait(unsigned mbarrier, int parity) {
  unsigned done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(mbarrier), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(unsigned mbarrier, int parity) {
  while (!mbarrier_try_wait(mbarrier, parity)) {}
}

// ---- the async proxy: bulk and tensor copies and wgmma see ordinary writes only behind a fence
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// ---- bulk copies: one thread issues, `bytes` and addresses are multiples of 16
__device__ __forceinline__ void bulk_load(unsigned shared, const void* global, int bytes, unsigned mbarrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(shared), "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(mbarrier)
               : "memory");
}
__device__ __forceinline__ void bulk_store(void* global, unsigned shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :
               : "l"(__cvta_generic_to_global(global)), "r"(shared), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_add(float* global, unsigned shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               :
               : "l"(__cvta_generic_to_global(global)), "r"(shared), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_add(double* global, unsigned shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f64 [%0], [%1], %2;"
               :
               : "l"(__cvta_generic_to_global(global)), "r"(shared), "r"(bytes)
               : "memory");
}
// Stores and reductions of this thread since the last commit are one group.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the last N groups have read their shared memory (bulk_wait_read) and written their global memory
// (bulk_wait).
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(N) : "memory");
}
template <int N>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" : : "n"(N) : "memory");
}

// ---- tensor copies: a box of a tensor, by coordinates from the innermost dimension outwards. A parameter of
// the kernel, `const __grid_constant__ TensorMap map`. Shared memory is aligned to the swizzle's pattern, at
// least to 128 bytes.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(&map) : "memory");
}

// What lies outside the tensor is written as zeros and counts in the mbarrier's bytes.
__device__ __forceinline__ void tensor_load(unsigned shared, const TensorMap& map, unsigned mbarrier, int x,
                                            int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];"
      :
      : "r"(shared), "l"(&map), "r"(mbarrier), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tensor_load(unsigned shared, const TensorMap& map, unsigned mbarrier, int x,
                                            int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
      "%5}], [%2];"
      :
      : "r"(shared), "l"(&map), "r"(mbarrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void tensor_load(unsigned shared, const TensorMap& map, unsigned mbarrier, int x,
                                            int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
      "%5, %6}], [%2];"
      :
      : "r"(shared), "l"(&map), "r"(mbarrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
__device__ __forceinline__ void tensor_load(unsigned shared, const TensorMap& map, unsigned mbarrier, int x,
                                            int y, int z, int w, int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];"
      :
      : "r"(shared), "l"(&map), "r"(mbarrier), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
      : "memory");
}

// What lies outside the tensor is not written.
__device__ __forceinline__ void tensor_store(const TensorMap& map, unsigned shared, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
               :
               : "l"(&map), "r"(shared), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void tensor_store(const TensorMap& map, unsigned shared, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
               :
               : "l"(&map), "r"(shared), "r"(x), "r"(y), "r"(z)
               : "memory");
}
__device__ __forceinline__ void tensor_store(const TensorMap& map, unsigned shared, int x, int y, int z,
                                             int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               :
               : "l"(&map), "r"(shared), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
__device__ __forceinline__ void tensor_store(const TensorMap& map, unsigned shared, int x, int y, int z, int w,
                                             int v) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               :
               : "l"(&map), "r"(shared), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
               : "memory");
}
__device__ __forceinline__ void tensor_add(const TensorMap& map, unsigned shared, int x, int y, int z, int w) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
      :
      : "l"(&map), "r"(shared), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// ---- registers of a warpgroup: all its threads, N a multiple of 8 from 24 to 256. Raising waits until the
// block has them.
template <int N>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(N));
}
template <int N>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(N));
}

// ---- wgmma: a warpgroup's product of 16-bit operands, M = 64, K = 16, N = 2 * REGISTERS from 8 to 256,
// float32 accumulators. Warp w of the group has rows 16 w to 16 w + 15; for each 8 columns i, d[4 i .. 4 i + 3]
// lie as mma's.
//
//     wgmma_fence();             // registers that were written since (d, a) are handed over
//     wgmma_first_ss(d, ...);    // d = a b: outputs only, so that d is no input that must be kept in registers
//     wgmma_ss(d, ...);          // d += a b
//     wgmma_commit();
//     wgmma_wait<0>();           // d, a and shared memory are free again, for this warp
//     wgmma_hold(d);             // no earlier use of d may move behind this, no later one before it
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits for all but the last N groups.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(N) : "memory");
}
template <int REGISTERS>
__device__ __forceinline__ void wgmma_hold(float (&d)[REGISTERS]) {
#pragma unroll
  for (int i = 0; i < REGISTERS; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Every N has its own instruction, with N / 2 accumulators. WGMMA_D_n is their list in the text, WGMMA_OUT_n(C)
// their operands under constraint C; WGMMA_EACH_N also gives the numbers of the seven operands behind them.
#define WGMMA_D_8 "%0, %1, %2, %3"
#define WGMMA_D_16 WGMMA_D_8 ", %4, %5, %6, %7"
#define WGMMA_D_24 WGMMA_D_16 ", %8, %9, %10, %11"
#define WGMMA_D_32 WGMMA_D_24 ", %12, %13, %14, %15"
#define WGMMA_D_40 WGMMA_D_32 ", %16, %17, %18, %19"
#define WGMMA_D_48 WGMMA_D_40 ", %20, %21, %22, %23"
#define WGMMA_D_56 WGMMA_D_48 ", %24, %25, %26, %27"
#define WGMMA_D_64 WGMMA_D_56 ", %28, %29, %30, %31"
#define WGMMA_D_72 WGMMA_D_64 ", %32, %33, %34, %35"
#define WGMMA_D_80 WGMMA_D_72 ", %36, %37, %38, %39"
#define WGMMA_D_88 WGMMA_D_80 ", %40, %41, %42, %43"
#define WGMMA_D_96 WGMMA_D_88 ", %44, %45, %46, %47"
#define WGMMA_D_104 WGMMA_D_96 ", %48, %49, %50, %51"
#define WGMMA_D_112 WGMMA_D_104 ", %52, %53, %54, %55"
#define WGMMA_D_120 WGMMA_D_112 ", %56, %57, %58, %59"
#define WGMMA_D_128 WGMMA_D_120 ", %60, %61, %62, %63"
#define WGMMA_D_136 WGMMA_D_128 ", %64, %65, %66, %67"
#define WGMMA_D_144 WGMMA_D_136 ", %68, %69, %70, %71"
#define WGMMA_D_152 WGMMA_D_144 ", %72, %73, %74, %75"
#define WGMMA_D_160 WGMMA_D_152 ", %76, %77, %78, %79"
#define WGMMA_D_168 WGMMA_D_160 ", %80, %81, %82, %83"
#define WGMMA_D_176 WGMMA_D_168 ", %84, %85, %86, %87"
#define WGMMA_D_184 WGMMA_D_176 ", %88, %89, %90, %91"
#define WGMMA_D_192 WGMMA_D_184 ", %92, %93, %94, %95"
#define WGMMA_D_200 WGMMA_D_192 ", %96, %97, %98, %99"
#define WGMMA_D_208 WGMMA_D_200 ", %100, %101, %102, %103"
#define WGMMA_D_216 WGMMA_D_208 ", %104, %105, %106, %107"
#define WGMMA_D_224 WGMMA_D_216 ", %108, %109, %110, %111"
#define WGMMA_D_232 WGMMA_D_224 ", %112, %113, %114, %115"
#define WGMMA_D_240 WGMMA_D_232 ", %116, %117, %118, %119"
#define WGMMA_D_248 WGMMA_D_240 ", %120, %121, %122, %123"
#define WGMMA_D_256 WGMMA_D_248 ", %124, %125, %126, %127"
#define WGMMA_OUT_8(C) C(d[0]), C(d[1]), C(d[2]), C(d[3])
#define WGMMA_OUT_16(C) WGMMA_OUT_8(C), C(d[4]), C(d[5]), C(d[6]), C(d[7])
#define WGMMA_OUT_24(C) WGMMA_OUT_16(C), C(d[8]), C(d[9]), C(d[10]), C(d[11])
#define WGMMA_OUT_32(C) WGMMA_OUT_24(C), C(d[12]), C(d[13]), C(d[14]), C(d[15])
#define WGMMA_OUT_40(C) WGMMA_OUT_32(C), C(d[16]), C(d[17]), C(d[18]), C(d[19])
#define WGMMA_OUT_48(C) WGMMA_OUT_40(C), C(d[20]), C(d[21]), C(d[22]), C(d[23])
#define WGMMA_OUT_56(C) WGMMA_OUT_48(C), C(d[24]), C(d[25]), C(d[26]), C(d[27])
#define WGMMA_OUT_64(C) WGMMA_OUT_56(C), C(d[28]), C(d[29]), C(d[30]), C(d[31])
#define WGMMA_OUT_72(C) WGMMA_OUT_64(C), C(d[32]), C(d[33]), C(d[34]), C(d[35])
#define WGMMA_OUT_80(C) WGMMA_OUT_72(C), C(d[36]), C(d[37]), C(d[38]), C(d[39])
#define WGMMA_OUT_88(C) WGMMA_OUT_80(C), C(d[40]), C(d[41]), C(d[42]), C(d[43])
#define WGMMA_OUT_96(C) WGMMA_OUT_88(C), C(d[44]), C(d[45]), C(d[46]), C(d[47])
#define WGMMA_OUT_104(C) WGMMA_OUT_96(C), C(d[48]), C(d[49]), C(d[50]), C(d[51])
#define WGMMA_OUT_112(C) WGMMA_OUT_104(C), C(d[52]), C(d[53]), C(d[54]), C(d[55])
#define WGMMA_OUT_120(C) WGMMA_OUT_112(C), C(d[56]), C(d[57]), C(d[58]), C(d[59])
#define WGMMA_OUT_128(C) WGMMA_OUT_120(C), C(d[60]), C(d[61]), C(d[62]), C(d[63])
#define WGMMA_OUT_136(C) WGMMA_OUT_128(C), C(d[64]), C(d[65]), C(d[66]), C(d[67])
#define WGMMA_OUT_144(C) WGMMA_OUT_136(C), C(d[68]), C(d[69]), C(d[70]), C(d[71])
#define WGMMA_OUT_152(C) WGMMA_OUT_144(C), C(d[72]), C(d[73]), C(d[74]), C(d[75])
#define WGMMA_OUT_160(C) WGMMA_OUT_152(C), C(d[76]), C(d[77]), C(d[78]), C(d[79])
#define WGMMA_OUT_168(C) WGMMA_OUT_160(C), C(d[80]), C(d[81]), C(d[82]), C(d[83])
#define WGMMA_OUT_176(C) WGMMA_OUT_168(C), C(d[84]), C(d[85]), C(d[86]), C(d[87])
#define WGMMA_OUT_184(C) WGMMA_OUT_176(C), C(d[88]), C(d[89]), C(d[90]), C(d[91])
#define WGMMA_OUT_192(C) WGMMA_OUT_184(C), C(d[92]), C(d[93]), C(d[94]), C(d[95])
#define WGMMA_OUT_200(C) WGMMA_OUT_192(C), C(d[96]), C(d[97]), C(d[98]), C(d[99])
#define WGMMA_OUT_208(C) WGMMA_OUT_200(C), C(d[100]), C(d[101]), C(d[102]), C(d[103])
#define WGMMA_OUT_216(C) WGMMA_OUT_208(C), C(d[104]), C(d[105]), C(d[106]), C(d[107])
#define WGMMA_OUT_224(C) WGMMA_OUT_216(C), C(d[108]), C(d[109]), C(d[110]), C(d[111])
#define WGMMA_OUT_232(C) WGMMA_OUT_224(C), C(d[112]), C(d[113]), C(d[114]), C(d[115])
#define WGMMA_OUT_240(C) WGMMA_OUT_232(C), C(d[116]), C(d[117]), C(d[118]), C(d[119])
#define WGMMA_OUT_248(C) WGMMA_OUT_240(C), C(d[120]), C(d[121]), C(d[122]), C(d[123])
#define WGMMA_OUT_256(C) WGMMA_OUT_248(C), C(d[124]), C(d[125]), C(d[126]), C(d[127])
#define WGMMA_EACH_N(X, ...)                             \
  X(8, 4, 5, 6, 7, 8, 9, 10, __VA_ARGS__)                \
  X(16, 8, 9, 10, 11, 12, 13, 14, __VA_ARGS__)           \
  X(24, 12, 13, 14, 15, 16, 17, 18, __VA_ARGS__)         \
  X(32, 16, 17, 18, 19, 20, 21, 22, __VA_ARGS__)         \
  X(40, 20, 21, 22, 23, 24, 25, 26, __VA_ARGS__)         \
  X(48, 24, 25, 26, 27, 28, 29, 30, __VA_ARGS__)         \
  X(56, 28, 29, 30, 31, 32, 33, 34, __VA_ARGS__)         \
  X(64, 32, 33, 34, 35, 36, 37, 38, __VA_ARGS__)         \
  X(72, 36, 37, 38, 39, 40, 41, 42, __VA_ARGS__)         \
  X(80, 40, 41, 42, 43, 44, 45, 46, __VA_ARGS__)         \
  X(88, 44, 45, 46, 47, 48, 49, 50, __VA_ARGS__)         \
  X(96, 48, 49, 50, 51, 52, 53, 54, __VA_ARGS__)         \
  X(104, 52, 53, 54, 55, 56, 57, 58, __VA_ARGS__)        \
  X(112, 56, 57, 58, 59, 60, 61, 62, __VA_ARGS__)        \
  X(120, 60, 61, 62, 63, 64, 65, 66, __VA_ARGS__)        \
  X(128, 64, 65, 66, 67, 68, 69, 70, __VA_ARGS__)        \
  X(136, 68, 69, 70, 71, 72, 73, 74, __VA_ARGS__)        \
  X(144, 72, 73, 74, 75, 76, 77, 78, __VA_ARGS__)        \
  X(152, 76, 77, 78, 79, 80, 81, 82, __VA_ARGS__)        \
  X(160, 80, 81, 82, 83, 84, 85, 86, __VA_ARGS__)        \
  X(168, 84, 85, 86, 87, 88, 89, 90, __VA_ARGS__)        \
  X(176, 88, 89, 90, 91, 92, 93, 94, __VA_ARGS__)        \
  X(184, 92, 93, 94, 95, 96, 97, 98, __VA_ARGS__)        \
  X(192, 96, 97, 98, 99, 100, 101, 102, __VA_ARGS__)     \
  X(200, 100, 101, 102, 103, 104, 105, 106, __VA_ARGS__) \
  X(208, 104, 105, 106, 107, 108, 109, 110, __VA_ARGS__) \
  X(216, 108, 109, 110, 111, 112, 113, 114, __VA_ARGS__) \
  X(224, 112, 113, 114, 115, 116, 117, 118, __VA_ARGS__) \
  X(232, 116, 117, 118, 119, 120, 121, 122, __VA_ARGS__) \
  X(240, 120, 121, 122, 123, 124, 125, 126, __VA_ARGS__) \
  X(248, 124, 125, 126, 127, 128, 129, 130, __VA_ARGS__) \
  X(256, 128, 129, 130, 131, 132, 133, 134, __VA_ARGS__)

// P: whether d counts; the operands behind d are numbered from A0 on.
#define WGMMA_SS(n, A0, A1, A2, A3, A4, A5, A6, TYPE, P, C)                                                  \
  if constexpr (2 * REGISTERS == n) {                                                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n         \
                 "k16.f32." TYPE "." TYPE " {" WGMMA_D_##n "}, %" #A0 ", %" #A1 ", p, 1, 1, %" #A2 ", %" #A3 \
                                                           ";\n}"                                            \
                 : WGMMA_OUT_##n(C)                                                                          \
                 : "l"(a), "l"(b), "n"(static_cast<int>(MAJOR_A)), "n"(static_cast<int>(MAJOR_B)));          \
  }
#define WGMMA_RS(n, A0, A1, A2, A3, A4, A5, A6, TYPE, P, C)                                             \
  if constexpr (2 * REGISTERS == n) {                                                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n    \
                 "k16.f32." TYPE "." TYPE " {" WGMMA_D_##n "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3    \
                                                           "}, %" #A4 ", p, 1, 1, %" #A5 ";\n}"         \
                 : WGMMA_OUT_##n(C)                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(MAJOR_B))); \
  }

template <typename Element>
constexpr bool IS_FLOAT16 = false;
template <>
constexpr bool IS_FLOAT16<Float16> = true;

// a (64, 16) and b (16, N) by descriptor.
template <typename Element, Major MAJOR_A, Major MAJOR_B, int REGISTERS>
__device__ __forceinline__ void wgmma_ss(float (&d)[REGISTERS], unsigned long long a, unsigned long long b) {
  if constexpr (IS_FLOAT16<Element>) {
    WGMMA_EACH_N(WGMMA_SS, "f16", 1, "+f")
  } else {
    WGMMA_EACH_N(WGMMA_SS, "bf16", 1, "+f")
  }
}
template <typename Element, Major MAJOR_A, Major MAJOR_B, int REGISTERS>
__device__ __forceinline__ void wgmma_first_ss(float (&d)[REGISTERS], unsigned long long a,
                                               unsigned long long b) {
  if constexpr (IS_FLOAT16<Element>) {
    WGMMA_EACH_N(WGMMA_SS, "f16", 0, "=f")
  } else {
    WGMMA_EACH_N(WGMMA_SS, "bf16", 0, "=f")
  }
}

// a from registers, laid out as mma.m16n8k16's; b by descriptor.
template <typename Element, Major MAJOR_B, int REGISTERS>
__device__ __forceinline__ void wgmma_rs(float (&d)[REGISTERS], const unsigned (&a)[4], unsigned long long b) {
  if constexpr (IS_FLOAT16<Element>) {
    WGMMA_EACH_N(WGMMA_RS, "f16", 1, "+f")
  } else {
    WGMMA_EACH_N(WGMMA_RS, "bf16", 1, "+f")
  }
}
template <typename Element, Major MAJOR_B, int REGISTERS>
__device__ __forceinline__ void wgmma_first_rs(float (&d)[REGISTERS], const unsigned (&a)[4],
                                               unsigned long long b) {
  if constexpr (IS_FLOAT16<Element>) {
    WGMMA_EACH_N(WGMMA_RS, "f16", 0, "=f")
  } else {
    WGMMA_EACH_N(WGMMA_RS, "bf16", 0, "=f")
  }
}

// Where a thread stands, what it waits for, and how it reaches memory: thin wrappers, each named after what it does.
// A run on the CPU replaces this file; tile.cuh, which builds on it, stays.
#pragma once

// Blocks and grids have one dimension.
__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }

// Read anew at each call: what is computed from it is neither hoisted out of a loop nor kept from before a loop to
// after it, where it would hold registers that the loop's accumulators need.
__device__ __forceinline__ int thread_index_again() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
// The same for a number that is computed: x, worked out where this stands.
__device__ __forceinline__ unsigned not_kept(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ int grid_size() { return static_cast<int>(gridDim.x); }

// What threads of the block (of the warp) wrote before is seen by all of them after. Reached by every thread.
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// The value of lane (own lane ^ mask). Reached by all 32 lanes.
__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ unsigned shuffle_xor(unsigned x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// The value of a lane. Reached by all 32 lanes.
__device__ __forceinline__ int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// Whether any lane says so; and a bit for each that does. Reached by all 32 lanes.
__device__ __forceinline__ bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
__device__ __forceinline__ unsigned warp_vote(bool x) { return __ballot_sync(0xffffffffu, x); }

// The number of the lowest and of the highest bit that is set, of a word that is not 0; how many are.
__device__ __forceinline__ int lowest_bit(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }
__device__ __forceinline__ int highest_bit(unsigned bits) { return 31 - __clz(static_cast<int>(bits)); }
__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }

// The counter's value before this thread's one is added.
__device__ __forceinline__ int take_ticket(int* counter) { return atomicAdd(counter, 1); }

// Added in the order of arrival.
template <typename T>
__device__ __forceinline__ void add_global(T* address, T x) {
  atomicAdd(address, x);
}

// The block's dynamic shared memory as one struct: DYNAMIC_SHARED(Smem, smem); declares `Smem& smem`. Its size at
// launch is sizeof(Smem); aligned as Type asks, to 16 bytes at least; its first content is undefined.
#define DYNAMIC_SHARED(Type, name)                                                                   \
  extern __shared__ __align__(alignof(Type) > 16 ? alignof(Type) : 16) unsigned char name##_bytes[]; \
  Type& name = *reinterpret_cast<Type*>(name##_bytes)

// N neighbours, loaded and stored as one: N * sizeof(T) is 1, 2, 4, 8 or 16 bytes, and so is the address's alignment.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

template <int BYTES>
struct Bits;
template <>
struct Bits<1> {
  using Type = unsigned char;
};
template <>
struct Bits<2> {
  using Type = unsigned short;
};
template <>
struct Bits<4> {
  using Type = unsigned int;
};
template <>
struct Bits<8> {
  using Type = uint2;
};
template <>
struct Bits<16> {
  using Type = uint4;
};

template <typename T, int N>
union Pun {  // the same bits as numbers and as the hardware moves them
  typename Bits<N * sizeof(T)>::Type bits;
  Vector<T, N> vector;
};

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* address, int bytes) {
  return reinterpret_cast<unsigned long long>(address) % bytes == 0;
}

// From global memory that no thread writes during the kernel (through the read-only path).
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_global(const T* address) {
  Pun<T, N> pun;
  pun.bits = __ldg(reinterpret_cast<const typename Bits<N * sizeof(T)>::Type*>(address));
  return pun.vector;
}

// From global memory that other thread blocks write during the kernel; what they wrote before a release that this
// thread has learned of is there.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_global_written(const T* address) {
  Pun<T, N> pun;
  pun.bits = __ldcg(reinterpret_cast<const typename Bits<N * sizeof(T)>::Type*>(address));
  return pun.vector;
}

template <typename T, int N>
__device__ __forceinline__ void store_global(T* address, const Vector<T, N>& vector) {
  Pun<T, N> pun;
  pun.vector = vector;
  *reinterpret_cast<typename Bits<N * sizeof(T)>::Type*>(address) = pun.bits;
}

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_shared(const T* address) {
  Pun<T, N> pun;
  pun.bits = *reinterpret_cast<const typename Bits<N * sizeof(T)>::Type*>(address);
  return pun.vector;
}

template <typename T, int N>
__device__ __forceinline__ void store_shared(T* address, const Vector<T, N>& vector) {
  Pun<T, N> pun;
  pun.vector = vector;
  *reinterpret_cast<typename Bits<N * sizeof(T)>::Type*>(address) = pun.bits;
}

// ---- Copies from global to shared memory that run on while the thread does other work: cp.async, since sm_80.
#if __CUDA_ARCH__ >= 800
constexpr bool ASYNC_COPIES = true;
#else
constexpr bool ASYNC_COPIES = false;  // copy_async() is an ordinary load and store; better to batch loads
#endif

// N neighbours (4, 8 or 16 bytes, so aligned), or zeros where not `inside`: `global` is not read then.
template <int N, typename T>
__device__ __forceinline__ void copy_async(T* shared, const T* global, bool inside) {
#if __CUDA_ARCH__ >= 800
  constexpr int BYTES = N * sizeof(T);
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? BYTES : 0;  // the rest of BYTES is filled with zeros
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(bytes)
                 : "memory");
  }
#else
  Vector<T, N> vector = {};
  if (inside) vector = load_global<N>(global);
  store_shared(shared, vector);
#endif
}

// The thread's own copies have arrived; a barrier must follow before others read them.
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
